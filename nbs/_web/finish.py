"""From generated pages to the finished site: equations, numbers, captions, and nothing from another host."""

import base64
import html
import json
import math
import re
import shutil
import struct
import subprocess
from pathlib import Path

MATH = re.compile(r'<span class="math (inline|display)">\\[(\[](.*?)\\[)\]]</span>', re.S)
REMOTE = re.compile(r"<(?:link|script)\b[^>]*cdn\.jsdelivr\.net[^>]*>(?:</script>)?")
HEADING = re.compile(r"<h([2-6])\b([^>]*)>(.*?)</h\1>", re.S)
TAG = re.compile(r"\\tag\*?\{([^{}]+)\}")


def render_equations(pages: dict[Path, str], web: Path) -> dict[Path, str]:
    "Replace every equation by KaTeX's HTML, all pages in one call; numbered ones get an id to link to."
    found = []
    for path, text in pages.items():
        found += [
            (m[1] == "display", html.unescape(m[2]).strip(), path.name)
            for m in MATH.finditer(text)
        ]
    jobs = [{"tex": tex, "display": display, "where": where} for display, tex, where in found]
    run = subprocess.run(
        ["node", str(web / "katex.mjs")],
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
    )
    if run.returncode:
        raise SystemExit(f"equations that KaTeX cannot read:\n{run.stderr}")
    done = iter(zip(found, json.loads(run.stdout), strict=True))

    def put(m: re.Match) -> str:
        (display, tex, _), rendered = next(done)
        number = TAG.search(tex)
        anchor = f' id="eq-{slug(number[1])}"' if number else ""
        return f'<span class="math {"display" if display else "inline"}"{anchor}>{rendered}</span>'

    return {path: MATH.sub(put, text) for path, text in pages.items()}


def slug(text: str) -> str:
    return re.sub(r"[^\w.-]", "", text)


def link_equations(text: str) -> str:
    "`equation (3)` in a sentence links to equation (3) of the same page."
    known = set(re.findall(r'id="eq-([^"]+)"', text))

    def link(m: re.Match) -> str:
        if slug(m[2]) not in known:
            return m[0]
        return f'{m[1]}<a class="eq-ref" href="#eq-{slug(m[2])}">({m[2]})</a>'

    def sentence(m: re.Match) -> str:  # text between tags only, and never in code
        return re.sub(
            r"((?:[Ee]quations?|[Ee]qs?\.|and)(?:\s|&nbsp;|\xa0)+)\((\w[\w.]*)\)", link, m[0]
        )

    parts = re.split(
        r"(<pre\b.*?</pre>|<code\b.*?</code>|<head\b.*?</head>|<script\b.*?</script>)",
        text,
        flags=re.S,
    )
    return "".join(
        p if i % 2 else re.sub(r">[^<>]+<", sentence, p) for i, p in enumerate(parts)
    )


def number_sidebar(text: str) -> str:
    "A notebook's number stands in its own column of the sidebar and of the links to the next page."
    return re.sub(
        r'(<span class="(?:menu-text|nav-page-text)">)(\d\d\w?) ',
        r'\1<span class="room-number">\2</span> ',
        text,
    )


def contents_like_headings(text: str) -> str:
    "The table of contents shows a heading as the page does, equations and code included."
    titles = {}
    for m in HEADING.finditer(text):
        if anchor := re.search(r'(?:data-anchor-)?id="([^"]+)"', m[2]):
            titles[anchor[1]] = re.sub(r"</?a\b[^>]*>", "", m[3])

    def put(m: re.Match) -> str:
        inner = re.sub(
            r"<code>\w+\.(\w+)</code>",
            r"<code>.\1</code>",
            titles.get(html.unescape(m[2]), ""),
        )  # a method, under its class
        return f"{m[1]}{inner}</a>" if inner else m[0]

    return re.sub(r'(<a href="#[^"]*" id="toc-([^"]+)"[^>]*>)[^<]*</a>', put, text)


def picture_size(png: bytes) -> tuple[int, int]:
    "Width and height in CSS pixels: matplotlib writes its dots per inch into the file, and 100 of them are an inch here."
    width, height = struct.unpack(">II", png[16:24])
    at = png.find(b"pHYs", 0, 4096)
    dense = round(struct.unpack(">I", png[at + 4 : at + 8])[0] * 0.0254 / 100) if at > 0 else 1
    return width // max(dense, 1), height // max(dense, 1)


def figures_to_files(text: str, page: str, site: Path, up: str) -> str:
    "Figures become files beside the pages, with their size, and a link that opens them at full size."
    folder, count = site / "figures", 0

    def put(m: re.Match) -> str:
        nonlocal count
        count += 1
        data = base64.b64decode(m[2])
        folder.mkdir(exist_ok=True)
        name = f"{page}-{count}.png"
        (folder / name).write_bytes(data)
        width, height = picture_size(data)
        alt = re.search(r'alt="[^"]*"', m[0])
        img = f'<img {alt[0] if alt else ""} src="{up}figures/{name}" width="{width}" height="{height}" loading="lazy">'
        return f'<a class="figure-file" href="{up}figures/{name}">{img}</a>'

    return re.sub(r'<img\b([^>]*?)src="data:image/png;base64,([^"]+)"[^>]*>', put, text)


UNIT = re.compile(r"(<t[dh]\b[^>]*>)([^<]{1,16})(</t[dh]>)")


def tables_keep_units(text: str) -> str:
    "`4.31 ms` and `1e-4` in a table stay on one line; a table that is too wide can be scrolled with the keyboard too."
    text = re.sub(
        r"<td\b[^>]*>[^<]*\de-\d[^<]*",
        lambda m: re.sub(r"[\d.]+e-\d+", r'<span class="number">\g<0></span>', m[0]),
        text,
    )
    text = UNIT.sub(lambda m: m[1] + m[2].replace(" ", "\xa0") + m[3], text)
    return text.replace(
        '<div class="sd-table">',
        '<div class="sd-table" tabindex="0" role="region" aria-label="Table">',
    )


def head_of_page(text: str, notebook: str, seconds: float | None, cfg: dict) -> str:
    "Under the title: where the notebook is and how long it takes, and on a phone what the page holds."
    links = ""
    if notebook:
        path = f"{cfg['user']}/{cfg['repo']}/blob/{cfg['branch']}/nbs/{notebook}"
        links = (
            '<p class="notebook-links"><span>This page is a notebook:</span> '
            f'<a href="notebooks/{notebook}" download>download</a> '
            f'<a href="{cfg["git_url"]}/blob/{cfg["branch"]}/nbs/{notebook}">GitHub</a> '
            f'<a href="https://colab.research.google.com/github/{path}">Colab</a>'
            + (f"<span>Run All: {math.ceil(seconds)} s on two cores</span>" if seconds else "")
            + "</p>"
        )
    toc = re.search(r'<nav id="TOC"[^>]*>.*?</h2>(<ul>.*?</ul>)</nav>', text, re.S)
    menu = ""
    if toc:
        items = re.sub(r' (?:id|class|data-scroll-target)="[^"]*"', "", toc[1])
        menu = (
            f'<details class="on-this-page"><summary>On this page</summary>{items}</details>'
        )
    return re.sub(
        r'(<header id="title-block-header".*?</header>)',
        lambda m: m[1] + links + menu,
        text,
        count=1,
        flags=re.S,
    )


def localise(text: str, up: str) -> str:
    "Drop what the generator would load from a content network; equations are HTML by now and need only a style sheet."
    had_math = 'class="katex' in text
    text = REMOTE.sub("", text)
    styles = (
        f'<link rel="stylesheet" href="{up}assets/katex/katex.min.css">' if had_math else ""
    )
    text = text.replace("</head>", f"{styles}</head>", 1)
    fuse = f'<script src="{up}site_libs/fuse/fuse.min.js"></script>'
    return text.replace(fuse, f'{fuse}<script src="{up}assets/search.js"></script>', 1)


def sort_search(site: Path, numbers: dict[str, str]):
    "The search index says what is a notebook (with its number) and what is an entry of the API."
    path = site / "search.json"
    entries = json.loads(path.read_text(encoding="utf-8"))
    for e in entries:
        page = e["href"].split("#")[0]
        e["api"] = page.startswith("api/")
        e["title"] = f"{numbers.get(page, '')} {e['title']}".strip()
    kept = [e for e in entries if not e["href"].startswith("404.html")]
    path.write_text(
        json.dumps(kept, ensure_ascii=False, separators=(",", ":")), encoding="utf-8"
    )


def finish(site: Path, web: Path, rooms: list, cfg: dict):
    "Run every step over every page."
    pages = {p: p.read_text(encoding="utf-8") for p in sorted(site.rglob("*.html"))}
    pages = render_equations(pages, web)
    notebooks = {f"{r.page}.html": r.path for r in rooms}
    record = web.parent / "results/notebooks.json"
    seconds = json.loads(record.read_text(encoding="utf-8"))["seconds"]
    (site / "notebooks").mkdir()
    for path in notebooks.values():
        shutil.copy(path, site / "notebooks")
    for path, text in pages.items():
        name = path.relative_to(site).as_posix()
        up = "../" * name.count("/")
        text = localise(text, up)
        text = figures_to_files(text, path.stem, site, up)
        for step in (
            contents_like_headings,
            link_equations,
            number_sidebar,
            tables_keep_units,
        ):
            text = step(text)
        source = notebooks.get(name)
        if source:
            text = head_of_page(text, source.name, seconds.get(source.stem), cfg)
        else:
            text = head_of_page(text, "", None, cfg)
        if name == "404.html":  # it is shown in the place of any address
            text = text.replace("<head>", f'<head><base href="{cfg["doc_baseurl"]}/">', 1)
        path.write_text(text, encoding="utf-8")
    sort_search(site, {f"{r.page}.html": r.number for r in rooms})
