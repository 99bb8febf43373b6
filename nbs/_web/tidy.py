"""One form for every notebook, after nbdev_clean: python nbs/_web/tidy.py [NOTEBOOK ...]

Stored line by line, so that a diff shows lines. The title cell holds `# Title` and `> summary` and nothing else: nbdev reads it
as front matter and would drop any text after it from the documentation; such text moves to a cell of its own. Progress bars are not kept.
Pictures are stored with a palette of 256 colours where no eye can tell: two dots per pixel then take the room of one. The first mention
of a work is a link (works.py). The first code cell fetches the project where it is missing, on Colab.
"""

import base64
import hashlib
import io
import re
import sys
from pathlib import Path

from execnb.nbio import mk_cell, read_nb, write_nb
from PIL import Image, ImageChops, ImageStat

from stage import settings
from works import link_works

COLAB_ID = "c01ab000"
COLAB = """#| hide
try:
    import wave_rnns  # noqa: F401
except ImportError:  # on Colab: fetch the project, its records and what it needs
    !git clone -q --depth 1 {git_url} checkout
    %cd -q checkout/nbs
    %pip install -q -e ..
    import sys

    sys.path.append("..")"""
TITLE = re.compile(r"(# \S[^\n]*\n\n> \S[^\n]*)\n*(.*)", re.S)


def is_bar(output) -> bool:
    "Is it what tqdm writes, or its widget? Warnings stay, for a test to find them."
    if "application/vnd.jupyter.widget-view+json" in output.get("data", {}):
        return True
    lines = re.split(r"[\r\n]+", "".join(output.get("text", "")))
    bars = [line for line in lines if re.search(r"\d+/\d+ \[|\d+%\|", line)]
    return output.get("name") == "stderr" and len(bars) == sum(
        bool(line.strip()) for line in lines
    )


def with_palette(png: bytes, most: float = 12, mean: float = 0.35) -> bytes:
    """The same picture in 256 colours. It stays as it is where a colour would move by more than `most` of 255, or all of them
    by more than `mean` (photographs, long gradients), where it is transparent, and where it has a palette."""
    picture = Image.open(io.BytesIO(png))
    see_through = picture.mode == "RGBA" and picture.getchannel("A").getextrema()[0] < 255
    if picture.mode == "P" or see_through:
        return png
    full = picture.convert("RGB")
    few = full.quantize(
        256, method=Image.Quantize.MAXCOVERAGE, kmeans=1, dither=Image.Dither.NONE
    )
    moved = ImageStat.Stat(ImageChops.difference(full, few.convert("RGB")))
    if max(high for _, high in moved.extrema) > most or max(moved.mean) > mean:
        return png
    file = io.BytesIO()  # with its dots per inch: the site takes a picture's size from them
    few.save(file, "PNG", optimize=True, dpi=picture.info.get("dpi", (100, 100)))
    return file.getvalue()


def fetch_on_colab(nb):
    "The first code cell installs the project where there is none, and does nothing elsewhere."
    nb.cells = [c for c in nb.cells if c.get("id") != COLAB_ID]
    at = next((i for i, c in enumerate(nb.cells) if c.cell_type == "code"), None)
    if at is not None:
        cell = mk_cell(COLAB.format(**settings()), "code")
        cell.id, cell.execution_count = COLAB_ID, None
        nb.cells.insert(at, cell)


def tidy(path: Path) -> bool:
    "Rewrite the notebook; returns whether that changed it."
    before = path.read_bytes()
    nb = read_nb(path)
    m = (
        TITLE.fullmatch(nb.cells[0].source)
        if nb.cells and nb.cells[0].cell_type == "markdown"
        else None
    )
    if m and m[2]:
        nb.cells[0].source = m[1]
        cell = mk_cell(m[2], "markdown")
        cell.id = hashlib.sha1(m[2].encode()).hexdigest()[:8]  # the same on every machine
        nb.cells.insert(1, cell)
    words = [c for c in nb.cells[1:] if c.cell_type == "markdown"]
    for cell, text in zip(words, link_works([c.source for c in words]), strict=True):
        cell.source = text
    fetch_on_colab(nb)
    nb.metadata.pop("widgets", None)  # of the bars
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if not is_bar(o)]
            for data in (o.get("data", {}) for o in cell.outputs):
                if "image/png" in data:
                    png = base64.b64decode("".join(data["image/png"]))
                    data["image/png"] = base64.b64encode(with_palette(png)).decode()
    write_nb(nb, path)
    return path.read_bytes() != before


if __name__ == "__main__":
    names = [Path(a) for a in sys.argv[1:]] or sorted(
        Path(__file__).resolve().parents[1].glob("*.ipynb")
    )
    for name in names:
        if tidy(name):
            print(f"tidied {name.name}")
