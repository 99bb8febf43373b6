"""Write README.md from nbs/index.ipynb: python nbs/_web/readme.py

The index is run first, and what it says in words (tables, the reading order) is stored anew. Its pictures are kept as they
are stored: another machine's matplotlib would draw them with other bytes. To redraw one, run the index in JupyterLab.
"""

import base64
import os
import re
from pathlib import Path

import nbformat
from execnb.nbio import read_nb, write_nb
from nbclient import NotebookClient
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parents[2]
INDEX = ROOT / "nbs/index.ipynb"
# what the site's first page has beyond the README, which is to fit a screen
SITE_ONLY = {"The claim in one picture", "All numbers", "Train", "Reading order"}


def has_picture(cell) -> bool:
    return any("image/png" in o.get("data", {}) for o in cell.get("outputs", []))


def refresh(path: Path):
    "Run the index and store the outputs of every cell that draws nothing."
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    nb = nbformat.read(path, as_version=4)
    stored = [c.get("outputs", []) for c in nb.cells]
    NotebookClient(
        nb,
        timeout=300,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
    ).execute()
    kept = read_nb(
        path
    )  # nbdev's own reader and writer: the file keeps its form, and only outputs change
    for cell, run, old in zip(kept.cells, nb.cells, stored, strict=True):
        if cell.cell_type == "code" and not (has_picture(run) and old):
            cell.outputs = [clean(o) for o in run.outputs if o.get("name") != "stderr"]
    write_nb(kept, path)


def clean(output) -> dict:
    "An output without what changes from run to run, in a notebook file's own form (text as lists of lines)."
    out = {k: v for k, v in output.items() if k != "transient"}
    if "execution_count" in out:
        out["execution_count"] = None
    if "data" in out:
        out["data"] = {
            k: v.splitlines(keepends=True) if isinstance(v, str) and k != "image/png" else v
            for k, v in out["data"].items()
        }
    if "text" in out:
        out["text"] = out["text"].splitlines(keepends=True)
    return out


def convert(path: Path) -> tuple[str, dict[str, bytes]]:
    "The README's text, and its pictures by the name it gives them."
    nb = nbformat.read(path, as_version=4)
    pictures: dict[str, bytes] = {}
    cells, section = [], ""
    for i, cell in enumerate(nb.cells):
        if heading := cell.cell_type == "markdown" and re.match(r"## (.+)", cell.source):
            section = heading[1]
        if section in SITE_ONLY:
            continue
        directives = (
            re.findall(r"^#\|\s*(.+?)\s*$", cell.source, re.M)
            if cell.cell_type == "code"
            else []
        )
        if "hide" in directives:
            continue
        if cell.cell_type == "code":
            cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M).strip()
            for out in cell.outputs:
                if "image/png" in out.get("data", {}):
                    name = f"nbs/images/index-{len(pictures) + 1}.png"
                    pictures[name] = base64.b64decode(out.data["image/png"])
                    out.data = {"text/markdown": f"![{caption(nb.cells[i + 1 :])}]({name})"}
            if "echo: false" in directives:
                cell.metadata["transient"] = {"remove_source": True}
        cells.append(cell)
    nb.cells = cells
    nb.metadata["language_info"] = {"name": "python"}
    text, _ = MarkdownExporter().from_notebook_node(nb)
    text = re.sub(r"\]\(([\w-]+\.ipynb[^)]*)\)", r"](nbs/\1)", text)
    text = (
        text.replace("](images/", "](nbs/images/")
        .replace("](../", "](")
        .replace("\n```\n\n\n```python\n", "\n\n")
    )  # cells in a row are one piece of code
    note = "<!-- Written by `make readme` from nbs/index.ipynb. Edit the notebook, not this file. -->\n\n"
    return note + re.sub(r"\n{3,}", "\n\n", text).strip() + "\n", pictures


def caption(cells) -> str:
    "The bold sentence right after a picture says what it shows, to people who cannot see it too."
    bold = re.match(r"\*\*(.+?)\*\*", cells[0].source, re.S) if cells else None
    return " ".join(bold[1].split()).rstrip(".") if bold else "Figure"


def main():
    refresh(INDEX)
    text, pictures = convert(INDEX)
    for name, data in pictures.items():
        (ROOT / name).parent.mkdir(exist_ok=True)
        (ROOT / name).write_bytes(data)
    (ROOT / "README.md").write_text(text, encoding="utf-8")
    print(f"README.md: {len(text.splitlines())} lines, {len(pictures)} picture(s)")


if __name__ == "__main__":
    main()
