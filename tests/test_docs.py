"The documentation site: it builds, every link lands, nothing is asked of another host, equations and figures are there, a browser agrees."

import base64
import functools
import html
import http.server
import importlib
import io
import json
import math
import re
import sys
import threading
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT, WEB, run_node

sys.path.insert(0, str(WEB))

NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
PACKAGE = ROOT / "wave_rnns"
FILES = [p.relative_to(PACKAGE).with_suffix("") for p in PACKAGE.rglob("*.py") if not p.stem.startswith("_")]
MODULES = sorted(".".join(p.parts) for p in FILES)
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)


def settings() -> dict:
    from stage import settings

    return settings()


def home(cfg: dict) -> str:
    "The site's address."
    return f"{cfg['doc_host']}{cfg['doc_baseurl']}/"


def page_of(path: Path) -> str:
    return re.sub(r"^\d+\w?_", "", path.stem) + ".html"


def cells_of(path: Path, kind: str) -> list:
    return [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == kind]


def stored(cells: list, kind: str) -> list[str]:
    "What some cells have stored of a kind."
    found = ("".join(o.get("data", {}).get(kind, "")) for c in cells for o in c.get("outputs", []))
    return [text for text in found if text]


def test_links_land_and_nothing_is_remote(site):
    from check import check_site

    assert check_site(site) == []


def test_check_site_can_fail(tmp_path):
    "The link check finds what it is for."
    from check import check_site

    (tmp_path / "a.html").write_text(
        '<a href="b.html"></a><a href="#nowhere"></a><img src="gone.png"><script src="https://cdn.example/x.js"></script>'
        '<link rel="stylesheet" href="s.css"><a href="https://example.org">fine</a>'
    )
    (tmp_path / "s.css").write_text("@import 'https://fonts.example/f.css'; p { background: url(no.png) }")
    assert len(check_site(tmp_path)) == 6


@every_notebook
def test_equations_are_rendered(path, site):
    "As many displayed equations on the page as the notebook has, each numbered one linkable, none in red."
    page = (site / page_of(path)).read_text(encoding="utf-8")
    text = "\n\n".join(c.source for c in cells_of(path, "markdown"))
    text = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.S).replace(r"\$", "")  # where dollars mean equations
    displayed = len(re.findall(r"\$\$.+?\$\$|(?<!\$)(?<!\$\n)\\begin\{align", text, re.S))
    in_outputs = sum("$$" in table for table in stored(cells_of(path, "code"), "text/markdown"))
    assert displayed <= page.count('class="katex-display"') <= displayed + 20 * in_outputs
    inline = re.findall(r"(?<!\$)\$(?!\s)[^$]+?(?<!\s)\$(?!\$|\d)", re.sub(r"\$\$.+?\$\$", "", text, flags=re.S))
    assert page.count('class="math inline"') >= len(inline), "an equation in a sentence is missing"
    for tag in re.findall(r"\\tag\{([\w.]+)\}", text):
        assert f'id="eq-{tag}"' in page, f"equation ({tag}) has no place to link to"
    assert "katex-error" not in page


@every_notebook
def test_figures_are_there(path, site):
    "Every stored figure of a cell that is shown is on the page, with words for who cannot see it."
    shown = [c for c in cells_of(path, "code") if not re.search(r"^#\|\s*hide\s*$", c.source, re.M)]
    outputs = [o for c in shown for o in c.get("outputs", []) if "image/png" in o.get("data", {})]
    main = (site / page_of(path)).read_text(encoding="utf-8").split("<main", 1)[1]
    drawn = r'<a class="figure-file" href="([^"]+)"><img alt="[^"]+" src="\1" width="(\d+)" height="(\d+)"'
    files = re.findall(drawn, main)
    assert [(site / f).read_bytes() for f, *_ in files] == [base64.b64decode(o.data["image/png"]) for o in outputs]
    sizes = [(m.width, m.height) for o in outputs if (m := o.metadata.get("image/png"))]
    assert [(int(w), int(h)) for _, w, h in files] == sizes, "shown in another size than in JupyterLab"
    assert not re.search(r'<img(?![^>]*\balt="[^"]+")', main), "a figure without a description"


def test_a_figure_without_words_stops_the_build():
    from stage import figure_words

    picture = nbformat.v4.new_output("display_data", {"image/png": "iVBORw0KGgo="})
    draws = nbformat.v4.new_code_cell("plt.plot(x)", outputs=[picture])
    caption = nbformat.v4.new_markdown_cell("**A wave of $C^2\\pm1$ travels**, see [05](05_layer.ipynb).\n\nMore.")
    said = nbformat.v4.new_code_cell("#| fig-alt: a line\nplt.plot(x)", outputs=[picture])
    assert figure_words(nbformat.v4.new_notebook(cells=[draws, caption]), "x") == {
        0: "A wave of C to the 2 plus or minus 1 travels, see 05."
    }
    assert figure_words(nbformat.v4.new_notebook(cells=[said]), "x") == {0: "a line"}
    with pytest.raises(SystemExit, match="x, cell .*: a figure without words"):
        figure_words(nbformat.v4.new_notebook(cells=[draws, nbformat.v4.new_markdown_cell("And now")]), "x")


@pytest.mark.parametrize("dpi", [100, 200])
def test_figures_keep_their_size_on_dense_screens(dpi):
    "A picture of twice the dots takes the same place on the page."
    from finish import picture_size
    from matplotlib.figure import Figure

    Figure(figsize=(4, 3)).savefig(file := io.BytesIO(), dpi=dpi)
    assert picture_size(file.getvalue()) == (400, 300)


@every_notebook
def test_a_page_links_its_notebook(path, site):
    "To download, to read on GitHub, to run on Colab; and a card for those who share the page."
    cfg = settings()
    page = (site / page_of(path)).read_text(encoding="utf-8")
    where = f"blob/{cfg['branch']}/nbs/{path.name}"
    assert f'href="notebooks/{path.name}" download' in page
    assert (site / "notebooks" / path.name).read_bytes() == path.read_bytes()
    assert f'href="{cfg["git_url"]}/{where}"' in page
    assert f'href="https://colab.research.google.com/github/{cfg["user"]}/{cfg["repo"]}/{where}"' in page
    seconds = json.loads((ROOT / "nbs/results/notebooks.json").read_text())["seconds"]
    if path.stem in seconds:
        assert f"Run All: {math.ceil(seconds[path.stem])} s on two cores" in page
    card = re.search(r'property="og:image" content="([^"]+)"', page)[1]
    assert card.startswith(home(cfg)) and (site / card.removeprefix(home(cfg))).is_file()


def test_the_sitemap_lists_every_page(site):
    listed = re.findall(r"<loc>([^<]+)</loc>", (site / "sitemap.xml").read_text(encoding="utf-8"))
    pages = {p.relative_to(site).as_posix() for p in site.rglob("*.html")} - {"404.html", "play.html"}
    assert sorted(listed) == sorted(home(settings()) + p for p in pages)


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p.name.startswith("2")], ids=lambda p: p.stem)
def test_result_pages_answer_first(path, site):
    "Before a result page's first chapter no code stands open, and above a figure none does."
    main = (site / page_of(path)).read_text(encoding="utf-8").split("<main", 1)[1]
    folded = re.sub(r'<details class="code-fold".*?</details>', "", main, flags=re.S)
    assert 'class="sourceCode' not in folded.split("<h2", 1)[0]
    for cell in re.split(r'<div id="cell-\d+', folded):
        assert "figure-file" not in cell or 'class="sourceCode' not in cell.split("figure-file")[0]


@pytest.mark.parametrize("name", MODULES)
def test_exported_symbols_have_entries(name, site):
    module = importlib.import_module(f"wave_rnns.{name}")
    page = (site / f"api/{name}.html").read_text(encoding="utf-8")
    for symbol in module.__all__:
        assert f'id="{symbol}"' in page, f"no entry for {symbol}"
        value = getattr(module, symbol)
        begins = re.match(r"[A-Za-z ]{13,}\b", (value.__doc__ or "") if callable(value) else "")
        assert not begins or html.escape(begins[0], quote=False) in page, f"the docstring of {symbol} is missing"


def test_exported_code_stays_in_the_text(site):
    "The site shows what JupyterLab shows: a reader follows the code itself, not only its signature."
    page = re.sub(r"<[^>]+>", "", (site / "cell.html").read_text(encoding="utf-8"))
    assert "class WaveCell(Cell):" in html.unescape(page)
    assert "#| export" not in page and "#|export" not in page


def test_sidebar_is_in_the_order_of_numbers(site):
    page = (site / "index.html").read_text(encoding="utf-8")
    side = page.split('id="quarto-sidebar"', 1)[1].split("</nav>", 1)[0]
    listed = [Path(h).name for h in re.findall(r'href="([^"#]+\.html)"', side) if "api/" not in h]
    expected = ["index.html"] + [page_of(p) for p in NOTEBOOKS if p.stem != "index"]
    assert [h for h in listed if h in expected] == expected


@pytest.mark.browser
def test_in_a_browser(site, npm_packages, chromium, tmp_path):
    "Light and dark, desk and phone: no console error, nothing wider than 360 px, contrast, no other host, search and menus work."
    pages = ["index.html"] + [page_of(p) for p in NOTEBOOKS if p.stem != "index"] + [f"api/{m}.html" for m in MODULES]
    more = ("map.html", "contributing.html", "promises.html", "changelog.html")
    pages += [name for name in more if (site / name).exists()]
    place = settings()["doc_baseurl"]  # as on the web, not at a server's root
    (tmp_path / place.strip("/")).symlink_to(site)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            "Say nothing."

        def send_error(self, code, *_):
            "Any address that leads nowhere shows the site's 404 page, as on the web."
            self.send_response(code)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write((site / "404.html").read_bytes())

    handler = functools.partial(Handler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{server.server_port}{place}/"
        problems = run_node("browser.mjs", chromium, npm_packages, base, json.dumps(pages), timeout=600)
        server.shutdown()
    assert not problems, "\n".join(problems[:30])
