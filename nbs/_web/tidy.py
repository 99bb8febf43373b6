"""One form for every notebook, after nbdev_clean: python nbs/_web/tidy.py [NOTEBOOK ...]

Stored line by line, so that a diff shows lines. The title cell holds `# Title` and `> summary` and nothing else: nbdev reads it
as front matter and would drop any text after it from the documentation; such text moves to a cell of its own. Progress bars are not kept.
"""

import hashlib
import re
import sys
from pathlib import Path

from execnb.nbio import mk_cell, read_nb, write_nb

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
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if not is_bar(o)]
    write_nb(nb, path)
    return path.read_bytes() != before


if __name__ == "__main__":
    names = [Path(a) for a in sys.argv[1:]] or sorted(
        Path(__file__).resolve().parents[1].glob("*.ipynb")
    )
    for name in names:
        if tidy(name):
            print(f"tidied {name.name}")
