"""The map of the house, drawn from its real imports: python nbs/_web/house.py prints who imports whom.

A module may import from modules of lower or equal number, the library never from the paper's machinery, and nobody in a circle.
tests/test_house.py checks the first two; the order of the map's rows exists only where there is no circle.
"""

import ast
import re
from graphlib import TopologicalSorter
from html import escape
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "wave_rnns"
CELL, LEFT, TOP = 18, 176, 96  # sizes of the drawing, in its own units


def module_name(path: Path) -> str:
    "wave_rnns/paper/tasks.py -> paper.tasks"
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def modules() -> dict[str, Path]:
    "Every module with a name of its own."
    return {
        module_name(p): p for p in sorted(PACKAGE.rglob("*.py")) if not p.stem.startswith("_")
    }


def floors() -> dict[str, str]:
    "Module -> number and name of its notebook. Core stands on nothing, so it is the lowest wherever it is told."
    numbers = {}
    for path in sorted((ROOT / "nbs").glob("*.ipynb")):
        for cell in nbformat.read(path, as_version=4).cells:
            if exported := re.match(r"#\| default_exp (\S+)", cell.source):
                numbers[exported[1]] = path.stem
    return numbers | {"core": ""}


def imports_of(path: Path) -> set[str]:
    "Names of this project's modules that a module imports, wherever in its text: 'cell', 'paper.tasks'."
    found, package = set(), path.relative_to(PACKAGE).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            name = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            if not node.level and name.split(".")[0] != "wave_rnns":
                continue
            name = name.removeprefix("wave_rnns").strip(".")
            found |= {name, *(f"{name}.{alias.name}".strip(".") for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {
                a.name.removeprefix("wave_rnns.")
                for a in node.names
                if a.name.startswith("wave_rnns.")
            }
    return found & set(modules())


def imports() -> dict[str, set[str]]:
    "Module -> the modules that it imports, itself left out."
    return {name: imports_of(path) - {name} for name, path in modules().items()}


def in_order(imported: dict[str, set[str]]) -> list[str]:
    "By number, and among equals what is imported first; a circle raises CycleError."
    floor, rank = floors(), {}
    for name in TopologicalSorter(imported).static_order():
        rank[name] = len(rank)
    return sorted(imported, key=lambda name: (floor[name][:2], rank[name]))


def drawing(imported: dict[str, set[str]], rooms: dict) -> str:
    "Rows import columns: a dot below the diagonal for each import."
    order = in_order(imported)
    at = {name: i for i, name in enumerate(order)}
    parts = []
    for name, i in at.items():
        x, y, room = LEFT + CELL * (i + 0.5), TOP + CELL * (i + 0.5), rooms[name]
        label = f'<tspan class="room-number">{room.number}</tspan> {name}'
        link = f'<a href="{room.page}.html">'
        parts += [
            f'<path d="M{LEFT} {y}H{x}V{TOP + CELL * len(order)}"/>',
            f'{link}<text x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{label}</text></a>',
            f'{link}<text transform="translate({x + 4} {y - 9}) rotate(-60)">{name}</text></a>',
        ]
    for name, others in imported.items():
        for other in sorted(others):
            x, y = LEFT + CELL * (at[other] + 0.5), TOP + CELL * (at[name] + 0.5)
            wing = "paper" if other.startswith("paper.") else "library"
            title = f"<title>{name} imports {other}</title>"
            parts.append(f'<circle class="{wing}" cx="{x}" cy="{y}" r="5">{title}</circle>')
    width, height = LEFT + CELL * len(order) + 60, TOP + CELL * len(order)
    words = "Which module imports which: every dot lies below the diagonal"
    return (
        f'<div class="house-map" tabindex="0" role="region" aria-label="Map of the modules"><svg viewBox="0 0 {width} {height}" '
        f'role="img" aria-label="{words}">{"".join(parts)}</svg></div>'
    )


def map_page(rooms: list) -> str:
    "The page's Markdown: the drawing, and the same in words."
    by_module = {r.module: r for r in rooms if r.module}
    imported = imports()
    rows = []
    for name in in_order(imported):
        r = by_module[name]
        uses = (
            ", ".join(f"`{o}`" for o in in_order(imported) if o in imported[name]) or "nothing"
        )
        rows.append(
            f"| [{r.number}](/{r.page}.ipynb) | `{name}` | {escape(r.title)} | {uses} |"
        )
    return f"""---
title: The map
description: Which module imports which, drawn from the imports themselves when this page was built
---

A row imports the columns where it has a dot. Every dot lies below the diagonal: imports run one way, from higher numbers to
lower ones, and never in a circle. Blue dots are imports of the library (`wave_rnns`), orange ones of the paper's
machinery (`wave_rnns.paper`); no row of the library has an orange one. Tests check all three.

{drawing(imported, by_module)}

## The same in words

| | module | | imports |
|---|---|---|---|
{chr(10).join(rows)}
"""


if __name__ == "__main__":
    graph = imports()
    for module in in_order(graph):
        print(f"{floors()[module][:2]:2} {module:18} {' '.join(sorted(graph[module]))}")
