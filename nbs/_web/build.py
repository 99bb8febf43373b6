"""Build the documentation site from the notebooks: python nbs/_web/build.py [OUT]

No Quarto. nbdev processes the notebooks, smalldocs lays the pages out, KaTeX renders the equations, and every style
sheet and font lies in the site itself. What Quarto users get from nbdev_docs is the same text in Quarto's dress.
"""

import contextlib
import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import yaml
from PIL import Image, ImageDraw, ImageFont
from api import api_page, symbols
from check import check_site
from finish import finish
from house import map_page
from stage import ROOT, Room, pictures, relink, room, settings, sidebar, stage_notebook

WEB = Path(__file__).resolve().parent
SKIP = "add_show_docs,exec_show_docs,mv_exports,add_links"  # the API has its own pages, and exported code stays in the text
FONTS = ("source-serif-4", "source-sans-3", "source-code-pro")
SCRIPTS = ("latin", "latin-ext", "greek")
ABOUT = {
    "CONTRIBUTING.md": "Contributing",
    "tests/README.md": "Promises of the tests",
    "CHANGELOG.md": "Changelog",
}

NOT_FOUND = """---
title: There is no such page
toc: false
page-navigation: false
---

The address leads nowhere: a page may have moved with its notebook. The list of pages is beside this text (on a phone behind the
button above), the search box knows every word, and [the first page](index.ipynb) is a good place to start.
"""


def process(rooms: list[Room], work: Path, cfg: dict, blob: str) -> Path:
    "Stage the notebooks under their page names and let nbdev process them; returns the folder of processed pages."
    nbs = work / "nbs"
    nbs.mkdir()
    text = (ROOT / "settings.ini").read_text(encoding="utf-8")
    (work / "settings.ini").write_text(
        text.rstrip() + f"\nskip_procs = {SKIP}\n", encoding="utf-8"
    )
    pages = {r.path.stem: r.page for r in rooms}
    for r in rooms:
        stage_notebook(r.path, nbs / f"{r.page}.ipynb", pages, blob)
    with contextlib.chdir(work):
        from nbdev.serve import proc_nbs

        return Path(proc_nbs(n_workers=0)).resolve()


def house_pages(pages: Path, blob: str) -> list[dict]:
    "CONTRIBUTING, CHANGELOG and what the tests promise are pages of the site too."
    entries = []
    for name, title in ABOUT.items():
        if (ROOT / name).exists():
            text = (ROOT / name).read_text(encoding="utf-8")
            text = re.sub(r"\]\((?!https?:|#|\.\./)([^)\s]+)\)", rf"]({blob}/\1)", text)
            page = f"{title.split()[0].lower()}.md"
            (pages / page).write_text(text, encoding="utf-8")
            entries.append({"text": title, "href": page})
    return entries


def assets(pages: Path):
    "Style sheets, fonts and equations' fonts, copied from npm's packages so that a page needs no other host."
    modules = WEB / "node_modules"
    if not (modules / "katex").is_dir():
        sys.exit("npm's packages are missing: run `make docs`, or `npm ci` in nbs/_web")
    out = pages / "assets"
    katex = out / "katex"
    (katex / "fonts").mkdir(parents=True)
    css = (modules / "katex/dist/katex.min.css").read_text(encoding="utf-8")
    css = re.sub(
        r",url\(fonts/[^)]+\.(?:woff|ttf)\) format\(\"(?:woff|truetype)\"\)", "", css
    )  # every browser reads woff2
    (katex / "katex.min.css").write_text(css, encoding="utf-8")
    for font in (modules / "katex/dist/fonts").glob("*.woff2"):
        shutil.copy(font, katex / "fonts")
    faces = []
    (out / "fonts").mkdir()
    for family in FONTS:
        folder = modules / "@fontsource-variable" / family
        for style in ("index.css", "wght-italic.css"):
            for face in re.findall(
                r"@font-face\s*\{[^}]*\}", (folder / style).read_text(encoding="utf-8")
            ):
                file = re.search(r"url\((?:\./)?files/([^)]+\.woff2)\)", face)[1]
                if any(file.startswith(f"{family}-{s}-wght") for s in SCRIPTS):
                    shutil.copy(folder / "files" / file, out / "fonts")
                    faces.append(
                        face.replace("./files/", "files/").replace("files/", "fonts/")
                    )
    (out / "fonts.css").write_text("\n".join(faces) + "\n", encoding="utf-8")
    for name in ("site.css", "favicon.svg", "search.js"):
        shutil.copy(WEB / name, out)
    bootstrap = (
        Path(__import__("smalldocs").__file__).parent
        / "assets/vendor/bootstrap/bootstrap.min.css"
    )
    plain = bootstrap.read_text(encoding="utf-8")
    # the dark sheet is Bootstrap's own dark mode, made the page's default
    night = plain.replace("[data-bs-theme=dark]{", ":root,[data-bs-theme=dark]{", 1)
    for name, sheet in (("light.css", plain), ("dark.css", night)):
        (pages / name).write_text(
            sheet + (WEB / name).read_text(encoding="utf-8"), encoding="utf-8"
        )


def card(cfg: dict, target: Path):
    "The picture that a link to the site shows elsewhere, 1200 by 630: the rings, and what this is."
    rings = Image.open(ROOT / "nbs/images/wave.webp")
    rings.seek(rings.n_frames // 3)
    picture = Image.new("RGB", (1200, 630), "white")
    frame = rings.convert("RGB")
    frame.thumbnail((1160, 470))
    picture.paste(frame, ((1200 - frame.width) // 2, 20))
    draw = ImageDraw.Draw(picture)
    words, tagline = (
        cfg["description"].split(":")[0],
        "A literate, tested reproduction in PyTorch",
    )
    for text, size, y, ink in ((words, 46, 520, "#101418"), (tagline, 30, 582, "#616972")):
        draw.text((600, y), text, fill=ink, font=ImageFont.load_default(size), anchor="mm")
    picture.save(target)


def config(cfg: dict, contents: list) -> dict:
    "The site generator's configuration, from settings.ini, _quarto.yml and sidebar.yml."
    quarto = yaml.safe_load((ROOT / "nbs/_quarto.yml").read_text(encoding="utf-8"))["format"][
        "html"
    ]
    return {
        "project": {"type": "website", "output-dir": "site", "resources": ["assets/**"]},
        "website": {
            "title": cfg["title"],
            "description": cfg["description"],
            "favicon": "assets/favicon.svg",
            "site-url": cfg["doc_host"]
            + cfg["doc_baseurl"],  # addresses in sitemap.xml, and of the picture on cards
            "image": "/assets/card.png",
            "open-graph": True,
            "twitter-card": True,
            "navbar": {
                "title": cfg["title"],
                "logo": "assets/favicon.svg",
                "logo-alt": "",
                "search": True,
                "tools": [{"icon": "github", "href": cfg["git_url"], "text": "Source code"}],
            },
            "sidebar": {"style": "floating", "contents": contents},
            "page-navigation": True,
            "page-footer": {
                "left": f"{cfg['title']} {cfg['version']}, MIT licence",
                "right": "Built from the notebooks, with the outputs that are stored in them",
            },
        },
        "theme": {"light": "light.css", "dark": "dark.css"},
        "css": ["assets/fonts.css", "assets/site.css"],
        "toc": quarto["toc"],
        "toc-depth": quarto["toc-depth"],
        "linkify": True,
    }


def build(out: Path) -> list[Room]:
    "Build the site into `out` and return its rooms."
    cfg = settings()
    blob = f"{cfg['git_url']}/blob/{cfg['branch']}"
    rooms = [room(p) for p in sorted((ROOT / "nbs").glob("*.ipynb"))]
    taken = [r.page for r in rooms]
    if doubled := {p for p in taken if taken.count(p) > 1}:
        sys.exit(f"two notebooks share a page name: {', '.join(doubled)}")
    with tempfile.TemporaryDirectory() as tmp:
        pages = process(rooms, Path(tmp), cfg, blob)
        (pages / "api").mkdir()
        index, api = {}, []
        for r in rooms:
            if r.module and r.anchors:
                text = relink(
                    api_page(r, cfg["lib_name"]), {x.path.stem: x.page for x in rooms}, blob
                )
                (pages / "api" / f"{r.module}.md").write_text(text, encoding="utf-8")
                index |= symbols(r, cfg["lib_name"])
                api.append({"text": r.module, "href": f"api/{r.module}.md"})
        (pages / "_symbols.json").write_text(json.dumps(index), encoding="utf-8")
        assets(pages)
        card(cfg, pages / "assets/card.png")
        (pages / "404.md").write_text(NOT_FOUND, encoding="utf-8")
        contents = sidebar(rooms, ROOT / "nbs")
        contents += [{"section": "API", "contents": api}] if api else []
        (pages / "map.md").write_text(map_page(rooms), encoding="utf-8")
        about = [{"text": "The map", "href": "map.md"}, *house_pages(pages, blob)]
        contents += [{"section": "About the project", "contents": about}]
        (pages / "_smalldocs.yml").write_text(
            yaml.safe_dump(config(cfg, contents), sort_keys=False), encoding="utf-8"
        )
        (pages / "_quarto.yml").unlink(missing_ok=True)
        for r in rooms:
            for name in pictures(r.path):
                (pages / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / "nbs" / name, pages / name)

        import smalldocs.site

        site = smalldocs.site.build(pages, quiet=True)
        for warning in site.warnings:
            if (
                "output-file is not read" in warning
            ):  # nbdev writes it for Quarto; the pages have their names already
                continue
            print(f"warning: {warning}", file=sys.stderr)
        finish(pages / "site", WEB, rooms, cfg)
        sitemap = pages / "site/sitemap.xml"
        text = sitemap.read_text(encoding="utf-8")
        text = re.sub(r"\s*<url>\s*<loc>[^<]*/404\.html</loc>.*?</url>", "", text, flags=re.S)
        sitemap.write_text(text, encoding="utf-8")
        if out.exists():
            shutil.rmtree(out)
        shutil.copytree(pages / "site", out)
        shutil.copy(ROOT / "wave_rnns/paper/play.html", out)  # the page to play with, as it is
    return rooms


def main():
    out = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "_docs").resolve()
    if not shutil.which("node"):
        sys.exit(
            "make docs needs Node >= 18 to render the equations: https://nodejs.org, or apt-get install nodejs npm"
        )
    if out.exists() and any(out.iterdir()) and not (out / "site_libs").is_dir():
        sys.exit(
            f"{out} is not empty and is not a site that this script built: name another folder"
        )
    sys.path.insert(0, str(ROOT))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    rooms = build(out)
    problems = check_site(out)
    print("\n".join(problems), file=sys.stderr)
    print(
        f"{len(list(out.rglob('*.html')))} pages from {len(rooms)} notebooks: {os.path.relpath(out)}/index.html"
    )
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
