"Is the house in order? What is generated equals what is committed, nothing unpickles, no machine leaves its paths."

import ast
import base64
import graphlib
import io
import json
import os
import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT, SKIP, WEB, run_python
from matplotlib.figure import Figure
from PIL import Image, ImageChops

sys.path.insert(0, str(WEB))

import house
from stage import settings
from tidy import COLAB, COLAB_ID, with_palette
from works import WORKS, link_works

NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
FLOOR, IMPORTS = house.floors(), house.imports()
TEXT = {*".py .ipynb .md .yml .yaml .ini .toml .cff .css .mjs .json .csv .in .cu .cuh .mplstyle".split(), ""}


def files(root: Path, *patterns: str) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for pattern in patterns for p in sorted(root.glob(pattern))}


def tracked() -> list[Path]:
    "What git would publish; everything but build products where there is no git."
    done = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        return [p for p in ROOT.rglob("*") if p.is_file() and not SKIP & set(p.parts)]
    return [ROOT / line for line in done.stdout.splitlines() if (ROOT / line).is_file()]


def assert_same(before: dict[str, bytes], after: dict[str, bytes], command: str):
    assert before.keys() == after.keys(), f"{command} adds or removes {sorted(before.keys() ^ after.keys())}"
    changed = [name for name in before if before[name] != after[name]]
    assert not changed, f"{command} changes {changed}: run it and commit what it writes"


def test_export_and_clean_leave_no_diff(copied):
    before = files(copied, "wave_rnns/**/*.py"), files(copied, "nbs/*.ipynb")
    run_python("-c", "from nbdev.doclinks import nbdev_export; nbdev_export()", cwd=copied)
    assert_same(before[0], files(copied, "wave_rnns/**/*.py"), "nbdev_export")
    run_python("-c", "from nbdev.clean import nbdev_clean; nbdev_clean()", cwd=copied)
    run_python("nbs/_web/tidy.py", cwd=copied)
    assert_same(before[1], files(copied, "nbs/*.ipynb"), "make clean")


def test_readme_leaves_no_diff(copied):
    before = files(copied, "README.md", "nbs/images/*", "nbs/index.ipynb")
    run_python("nbs/_web/readme.py", cwd=copied)
    assert_same(before, files(copied, "README.md", "nbs/images/*", "nbs/index.ipynb"), "make readme")


@pytest.fixture(params=NOTEBOOKS, scope="module", ids=lambda p: p.stem)
def cells(request):
    "The cells of each notebook."
    notebook = nbformat.read(request.param, as_version=4)
    nbformat.validate(notebook)
    return notebook.cells


def stored_text(cell) -> str:
    "What a code cell printed, in its stored form."
    outputs = cell.get("outputs", [])
    return "\n".join(o.get("text") or o.get("data", {}).get("text/plain", "") for o in outputs)


def test_notebook_form(cells):
    "A title and a one-line summary without LaTeX, and nothing else in that cell; no warnings kept as outputs."
    assert re.fullmatch(r"# \S.*\n\n> [^\s$][^\n$]*", cells[0].source), "not '# Title', an empty line, '> summary'"
    for cell in cells:
        for out in cell.get("outputs", []):
            assert out.output_type != "error", f"an error is stored: {out.get('evalue')}"
            assert out.get("name") != "stderr", f"stderr is stored: {out.text[:200]}"
        address = re.search(r"<[^>]* at 0x[0-9a-f]+>", stored_text(cell))
        assert not address, f"an object of one process is stored: {address[0]}; end the line with ;"


def test_every_module_comes_from_a_notebook():
    assert set(FLOOR) == set(IMPORTS)


def test_what_is_stored_is_whole(cells):
    "A notebook that was run without its data, or whose pictures were lost, is a story with pages torn out."
    for before, cell in zip(cells, cells[1:], strict=False):
        if cell.cell_type == "code":
            missing = re.search(r"not in the data folder|could not be downloaded|\bskipped\b", stored_text(cell))
            shown_on_purpose = missing and missing[0] in cell.source  # the cell is about this message
            assert not missing or shown_on_purpose, f"stored without its data: {missing[0]!r}"
        caption = re.match(r"\*\*[^*]{8,}\*\*", cell.source) if cell.cell_type == "markdown" else None
        draws = before.cell_type == "code" and re.search(r"\b(plt\.|draw_|plot_|show_)", before.source)
        if caption and draws:
            kinds = {kind for o in before.get("outputs", []) for kind in o.get("data", {})}
            shown = {"image/png", "image/svg+xml", "text/html", "text/markdown"} & kinds
            assert shown, f"nothing stands above the caption {caption[0]}"


def test_pictures_are_sharp(cells):
    "Two dots per pixel, and the size at which they are shown: python nbs/_web/rerun.py draws them so."
    for cell in cells:
        for out in cell.get("outputs", []):
            if "image/png" in out.get("data", {}):
                picture = Image.open(io.BytesIO(base64.b64decode(out.data["image/png"])))
                shown = out.metadata.get("image/png", {})
                half = {"width": picture.width // 2, "height": picture.height // 2}
                assert shown == half, f"cell {cell.id}: {picture.size} dots, shown as {shown}"


def png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def test_pictures_are_small():
    "256 colours where nobody sees it, once and for all; what would suffer keeps every dot."
    figure = Figure(figsize=(4, 3), dpi=200)
    figure.subplots().imshow([[i * k % 40 for i in range(40)] for k in range(30)], cmap="viridis")
    file = io.BytesIO()
    figure.savefig(file)
    drawn = file.getvalue()
    small = with_palette(drawn)
    assert len(small) < 0.6 * len(drawn) and with_palette(small) == small
    before, after = Image.open(io.BytesIO(drawn)), Image.open(io.BytesIO(small))
    assert after.mode == "P" and round(after.info["dpi"][0]) == 200
    moved = ImageChops.difference(before.convert("RGB"), after.convert("RGB")).getextrema()
    assert max(high for _, high in moved) <= 12
    ramp = Image.linear_gradient("L")
    photograph = Image.merge("RGB", [ramp, ramp.transpose(Image.Transpose.ROTATE_90), ramp])
    see_through = Image.merge("LA", [ramp, ramp]).convert("RGBA")
    for kept in (photograph, see_through):
        assert with_palette(png(kept)) == png(kept)


def test_the_first_code_cell_is_for_colab(cells):
    "The same in every notebook, and nobody reads it on the site."
    for first in [c for c in cells if c.cell_type == "code"][:1]:
        assert first.source == COLAB.format(**settings()) and "#| hide" in first.source
        assert first.id == COLAB_ID and not first.outputs


def test_colab_fetches_the_project(tmp_path):
    "A fresh shell in an empty folder where nothing is installed; git and pip are not run, only noted."
    (tmp_path / "checkout/nbs").mkdir(parents=True)
    program = f"""
import os, sys
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.io import capture_output
sys.modules["wave_rnns"] = None  # importing it raises ImportError
shell, ran = InteractiveShell.instance(), []
shell.system = ran.append
shell.register_magic_function(lambda line: ran.append("pip " + line), magic_name="pip")
with capture_output() as shown:
    shell.run_cell({COLAB.format(**settings())!r}).raise_error()
print([shown.stdout, shown.stderr, ran, os.getcwd(), ".." in sys.path])
"""
    environment = {**os.environ, "IPYTHONDIR": str(tmp_path / "ipython")}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ran = [f"git clone -q --depth 1 {settings()['git_url']} checkout", "pip install -q -e .."]
    assert ast.literal_eval(done.stdout) == ["", "", ran, str(tmp_path / "checkout/nbs"), True]


CITED = re.compile(r"et al\.|\((?:[A-Z][\w'-]+(?:,? (?:and|&) [A-Z][\w'-]+)*,? )(?:19|20)\d\d\)")


@pytest.mark.parametrize("path", [*NOTEBOOKS, ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda p: p.stem)
def test_cited_works_are_linked(path):
    "Who is named with a year or as `et al.` can be read: the paragraph has a link. First mentions of known works: test_clean."
    if path.suffix == ".ipynb":
        cells = nbformat.read(path, as_version=4).cells
        text = "\n\n".join(c.source for c in cells if c.cell_type == "markdown")
    else:
        text = path.read_text(encoding="utf-8")
    for paragraph in text.split("\n\n"):
        cited = CITED.search(paragraph)
        assert not cited or "](http" in paragraph, f"{cited[0]} without a link: {paragraph[:200]}"


def test_what_counts_as_a_citation():
    for words in ("Keller et al.", "as shown (Smith and Jones, 1999)", "(Le 2015)", "(O'Neil & Wu, 2020)"):
        assert CITED.search(words), words
    for words in ("in 2015", "(2015)", "(from 2012 to 2015)", "(Section 2 of it)"):
        assert not CITED.search(words), words


def test_the_first_mention_of_a_work_becomes_a_link():
    adam = WORKS[r"\bAdam\b"]
    page = ["# Adam\n\n`Adam` and $Adam$, [Adam's page](x.html)", "Then Adam, and Adam again.", "Adam."]
    linked = link_works(page)
    assert linked == [page[0], f"Then [Adam]({adam}), and Adam again.", "Adam."]
    assert link_works(linked) == linked
    there = f"By [Kingma and Ba]({adam}) is Adam."
    assert link_works([there, "Adam"]) == [there, "Adam"]
    assert link_works(["Adam.", there]) == [f"[Adam]({adam}).", there]
    assert all(
        re.fullmatch(r"https://(arxiv\.org/abs/\d{4}\.\d{4,5}|doi\.org/10\.\d{4,}/\S+|papers\.nips\.cc/\S+)", a)
        for a in WORKS.values()
    )


def test_every_notebook_says_how_long_it_takes():
    "Measured by `make rerun`; above a minute, a bar is what a reader watches."
    record = json.loads((ROOT / "nbs/results/notebooks.json").read_text())
    assert record["cores"] == 2
    assert {p.stem for p in NOTEBOOKS} == {"index", *record["seconds"]}, "make rerun measures what is missing"
    slow = {name for name, seconds in record["seconds"].items() if seconds > 60}
    assert slow <= set(record["bars"]), f"more than a minute without a bar: {sorted(slow - set(record['bars']))}"


def test_imports_run_one_way_and_make_no_circle():
    "A room imports only from rooms with lower numbers, and the library never from the paper's machinery."
    for me, others in IMPORTS.items():
        for other in others:
            assert me.startswith("paper.") or not other.startswith("paper."), f"the library's {me} imports {other}"
            assert FLOOR[other][:2] <= FLOOR[me][:2], f"{me} ({FLOOR[me]}) imports {other} ({FLOOR[other]})"
    house.in_order(IMPORTS)  # raises CycleError
    with pytest.raises(graphlib.CycleError):
        house.in_order({"cell": {"scan"}, "scan": {"cell"}})


def test_the_map_shows_every_import():
    "The page is drawn from the modules as they are, and each dot lies below the diagonal."
    from stage import room

    page = house.map_page([room(p) for p in NOTEBOOKS])
    shown = re.findall(r'cx="([\d.]+)" cy="([\d.]+)" r="5"><title>(\S+) imports (\S+)</title>', page)
    assert {(me, other) for *_, me, other in shown} == {(me, other) for me in IMPORTS for other in IMPORTS[me]}
    assert all(float(x) - house.LEFT < float(y) - house.TOP for x, y, *_ in shown)
    assert len(shown) > 50 and ("layer", "scan") in {(me, other) for *_, me, other in shown}


def test_the_first_page_needs_only_torch():
    "Notebook 00 builds everything itself; only its last code cell uses this project."
    first = nbformat.read(ROOT / "nbs/00_one_page.ipynb", as_version=4)
    colab, *earlier, last = [c.source for c in first.cells if c.cell_type == "code"]
    assert "on Colab" in colab
    assert "wave_rnns" in last and not any("wave_rnns" in source for source in earlier)


def test_no_machine_paths():
    "A path of somebody's machine in a file, or in a notebook's stored output, is a leak and a lie for everybody else."
    path = re.compile(r"(?<![\w.~$}-])/(?:home|Users|root|opt|work|mnt|media|tmp/\w+_jobs)/[\w.-]+")
    found = []
    for file in tracked():
        if file.suffix in TEXT and file.stat().st_size < 20_000_000:
            for n, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
                found += [f"{file.relative_to(ROOT)}:{n}: {m[0]}" for m in path.finditer(line)]
    assert not found, "\n".join(found[:20])


def test_no_large_files():
    most = {".ipynb": 1_000_000}
    large = [p.name for p in tracked() if p.stat().st_size > most.get(p.suffix, 2_000_000)]
    assert not large, large
    weights = sum(p.stat().st_size for p in tracked() if p.suffix == ".safetensors")
    assert weights < 12_000_000, f"{weights / 1e6:.1f} MB of weights: at most 12"


def test_top_level_is_the_agreed_one():
    names = {p.relative_to(ROOT).parts[0] for p in tracked()}
    agreed = "settings.ini setup.py ruff.toml Makefile MANIFEST.in nbs wave_rnns tests LICENSE CITATION.cff README.md CHANGELOG.md"
    assert {n for n in names if not n.startswith(".")} <= {*agreed.split(), "CONTRIBUTING.md"}, names


def test_versions_agree():
    cfg = ConfigParser(delimiters=["="])
    cfg.read(ROOT / "settings.ini")
    version = cfg["DEFAULT"]["version"]
    assert f'__version__ = "{version}"' in (ROOT / "wave_rnns/__init__.py").read_text()
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {version}" in (ROOT / "CHANGELOG.md").read_text()


def test_makefile_help_lists_every_target():
    text = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z][a-z-]*):", text, re.M))
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True).stdout
    assert targets == set(re.findall(r"^  make (\S+)", shown, re.M))
