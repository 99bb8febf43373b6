"""From notebooks to pages: what is done to a notebook before the site generator sees it.

nbdev cleans the notebooks (hidden cells, directives, front matter); this module decides what a reader of the site gets:
the exported code stays visible (it is the text), import cells fold away, `03_scan.ipynb` becomes `scan.html`,
and links between notebooks follow. Everything here is text in, text out.
"""

import ast
import json
import re
from configparser import ConfigParser
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

import nbformat
import yaml

ROOT = Path(__file__).resolve().parents[2]
EXPORTS = re.compile(r"^#\|[ \t]*exports?i?\b.*$", re.M)
MODULE = re.compile(r"^#\|\s*default_exp\s+(\S+)", re.M)
BARE_ALIGN = re.compile(
    r"(?<!\$)(?<!\$\n)(\\begin\{(align\*?|equation\*?|gather\*?)\}.*?\\end\{\2\})", re.S
)


@dataclass
class Room:
    "One notebook and where it goes."

    path: Path  # the notebook
    page: str  # the page's name without a suffix, `scan` for `03_scan.ipynb`
    number: str  # `03`, empty for the index
    title: str  # its `# Title`
    module: str  # the module it exports, empty when it exports none
    anchors: dict[str, str] = field(
        default_factory=dict
    )  # exported name -> id of the cell that defines it


def settings(root: Path = ROOT) -> dict:
    "The project's settings.ini as a dict."
    parser = ConfigParser(delimiters=["="])
    parser.read(root / "settings.ini", encoding="utf-8")
    return dict(parser["DEFAULT"])


def room(path: Path) -> Room:
    "Read a notebook's number, page name, title, module and exported names."
    nb = nbformat.read(path, as_version=4)
    number, page = re.match(r"(?:(\d+\w?)_)?(.*)", path.stem).groups()
    title = next(
        (m[1] for c in nb.cells if (m := re.search(r"^#\s+(.+?)\s*$", c.source, re.M))), page
    )
    module = next(
        (m[1] for c in nb.cells if c.cell_type == "code" and (m := MODULE.search(c.source))),
        "",
    )
    found = Room(path, page, number or "", title, module)
    for cell in nb.cells:
        names = exported_names(cell)
        found.anchors |= dict.fromkeys(names, f"export-{names[0]}" if names else "")
    return found


def exported_names(cell) -> list[str]:
    "The names that an exported cell defines; a method patched onto a class counts as `Class.method`."
    if cell.cell_type != "code" or not EXPORTS.search(cell.source):
        return []
    names = []
    for node in ast.parse(re.sub(r"^[%!].*$", "", cell.source, flags=re.M)).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            patched = any(
                getattr(d, "id", "").startswith("patch") for d in node.decorator_list
            )
            owner = ast.unparse(node.args.args[0].annotation) + "." if patched else ""
            names.append(owner + node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names += [t.id for t in targets if isinstance(t, ast.Name)]
    return names


def only_imports(source: str) -> bool:
    "Is the cell nothing but imports, more than one? It folds away then."
    try:
        body = ast.parse(source).body
    except SyntaxError:
        return False
    return len(body) > 1 and all(isinstance(n, ast.Import | ast.ImportFrom) for n in body)


def plain(markdown: str) -> str:
    "Markdown as a sentence to be read aloud: no marks, no links, formulas in words as far as they go."

    def formula(m: re.Match) -> str:
        tex = re.sub(r"\\(?:text|mathrm|texttt|operatorname)\{([^}]*)\}", r"\1", m[1])
        tex = re.sub(r"\\[,;:! ]|\\(?:left|right|big|Big|quad|qquad)\b", " ", tex)
        tex = re.sub(r"\^\{?([^{}\s])", r" to the \1", tex)
        for sign, words in {
            "pm": "plus or minus",
            "times": "times",
            "sqrt": "root of",
        }.items():
            tex = re.sub(rf"\\{sign}(?![A-Za-z])", f" {words} ", tex)
        return re.sub(r"[\\{}]", "", tex.replace("_", " "))

    text = re.sub(r"\$+([^$]+)\$+", formula, markdown)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return " ".join(re.sub(r"[*`]", "", text).split())


def figure_words(nb, name: str) -> dict[int, str]:
    """Cell number -> what its picture shows, in words: `#| fig-alt: ...` in the cell, else the caption, a paragraph right after
    it that begins in bold. A picture without either stops the build."""
    words = {}
    for i, cell in enumerate(nb.cells):
        if cell.cell_type != "code" or re.search(r"^#\|\s*hide\s*$", cell.source, re.M):
            continue
        if not any(
            k.startswith("image/") for o in cell.get("outputs", []) for k in o.get("data", {})
        ):
            continue
        written = re.search(r"^#\|\s*fig-alt:\s*(.+?)\s*$", cell.source, re.M)
        after = nb.cells[i + 1].source if i + 1 < len(nb.cells) else ""
        if written:
            words[i] = written[1].strip("\"'")
        elif after.startswith("**"):
            text = plain(after.split("\n\n")[0])
            words[i] = text if len(text) < 400 else text[: text.rfind(" ", 0, 400)] + " ..."
        else:
            raise SystemExit(
                f"{name}, cell {cell.get('id', i)}: a figure without words. Write a caption after it (a paragraph that begins in "
                "bold) or '#| fig-alt: what it shows' in the cell"
            )
    return words


def answers_first(cell) -> bool:
    "On a result page code folds away above a figure or a table, and where it is longer than half a screen."
    shown = {k for o in cell.get("outputs", []) for k in o.get("data", {})}
    return (
        bool(shown & {"image/png", "text/markdown", "text/html"})
        or cell.source.count("\n") > 14
    )


def stage_cell(cell, pages: dict[str, str], blob: str, fold: bool = False):
    "A cell as the site shows it."
    if cell.cell_type == "markdown":
        cell.source = BARE_ALIGN.sub(r"$$\n\1\n$$", relink(cell.source, pages, blob))
    elif cell.cell_type == "code":
        names = exported_names(cell)
        cell.source = EXPORTS.sub(
            f"#| label: export-{names[0]}" if names else "", cell.source, count=1
        )
        if only_imports(cell.source) and "#| hide" not in cell.source:
            code = re.sub(r"^#\|.*\n", "", cell.source, flags=re.M).strip()
            cell.source = f"#| code-fold: true\n#| code-summary: Imports\n{code}"
        elif fold and "code-fold" not in cell.source:
            cell.source = f"#| code-fold: true\n#| code-summary: Code\n{cell.source}"
        for out in cell.get("outputs", []):
            data = out.get("data", {})
            if "text/markdown" in data:
                text = relink(data["text/markdown"], pages, blob)
                data["text/markdown"] = re.sub(
                    r"^#{1,6}\s+(.+)$", r"**\1**", text, flags=re.M
                )  # an output is no chapter
    return cell


def relink(text: str, pages: dict[str, str], blob: str) -> str:
    "Links to notebooks follow them to their new names; links to other files go to the repository, pictures stay."
    text = re.sub(
        r"\]\((?:\./)?([\w-]+)\.ipynb(#[^)\s]*)?\)",
        lambda m: f"]({pages.get(m[1], m[1])}.ipynb{m[2] or ''})",
        text,
    )
    text = re.sub(r"\]\(\.\./([^)\s]+)\)", rf"]({blob}/\1)", text)
    return re.sub(
        r"(?<!!)(\[[^\]]*\]\()(?![a-z]+:|#|/)([^)\s]+)\)",
        lambda m: file_link(m, pages, blob),
        text,
    )


def file_link(m: re.Match, pages: dict[str, str], blob: str) -> str:
    "A link to a file beside the notebooks that is no page of the site."
    path = m[2].split("#")[0]
    if path.endswith(".ipynb") or not (ROOT / "nbs" / path).exists():
        return m[0]
    return f"{m[1]}{blob}/nbs/{m[2]})"


def pictures(path: Path) -> list[str]:
    "The picture files that a notebook's prose shows."
    cells = [
        c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "markdown"
    ]
    found = re.findall(
        r"!\[[^\]]*\]\(([^)\s]+)|<(?:img|video|source)\b[^>]*\bsrc=\"([^\"]+)",
        "\n".join(cells),
    )
    return [
        f
        for pair in found
        for f in pair
        if f and not re.match(r"[a-z]+:|/", f) and (path.parent / f).is_file()
    ]


def stage_notebook(path: Path, target: Path, pages: dict[str, str], blob: str):
    "Write the notebook as the site wants it; the text under a title is kept (nbdev would drop the rest of that cell)."
    nb = nbformat.read(path, as_version=4)
    results = path.name.startswith("2")
    words = figure_words(nb, path.name)
    chapter = next((i for i, c in enumerate(nb.cells) if c.source.startswith("## ")), 0)
    cells = []
    for i, cell in enumerate(nb.cells):
        m = (
            re.match(r"(#\s[^\n]+\n*(?:>[^\n]*\n?)?)(.*)", cell.source, re.S)
            if not cells and cell.cell_type == "markdown"
            else None
        )
        if m and m[2].strip():
            cells.append(nbformat.v4.new_markdown_cell(m[1].strip()))
            cell.source = m[2].strip()
        folds = results and (i < chapter or answers_first(cell))
        cell = stage_cell(cell, pages, blob, folds)
        if i in words and "fig-alt:" not in cell.source:
            cell.source = (
                f"#| fig-alt: {json.dumps(words[i], ensure_ascii=False)}\n{cell.source}"
            )
        cells.append(cell)
    nb.cells = cells
    nbformat.write(nb, target)


def sidebar(rooms: list[Room], nbs: Path) -> list:
    "sidebar.yml with its globs spelled out: the site generator must see the numbers' order, not the pages' alphabet."
    listed: set[str] = set()

    def entries(contents):
        for item in contents:
            if isinstance(item, dict) and "section" in item:
                inner = list(entries(item["contents"]))
                if inner:
                    yield {"section": item["section"], "contents": inner}
                continue
            pattern = item["auto"] if isinstance(item, dict) else item
            for r in rooms:
                if fnmatch(r.path.name, pattern) and r.page not in listed:
                    listed.add(r.page)
                    yield {"text": f"{r.number} {r.title}".strip(), "href": f"{r.page}.ipynb"}

    config = yaml.safe_load((nbs / "sidebar.yml").read_text(encoding="utf-8"))
    contents = list(entries(config["website"]["sidebar"]["contents"]))
    rest = [
        {"text": f"{r.number} {r.title}".strip(), "href": f"{r.page}.ipynb"}
        for r in rooms
        if r.page not in listed
    ]
    return contents + ([{"section": "More", "contents": rest}] if rest else [])
