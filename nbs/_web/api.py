"""API pages: one a module, one entry an exported symbol, read from the installed package.

Signatures, types and comments come from the code itself (docments), so that an entry cannot differ from what it documents.
"""

import inspect
import re
from dataclasses import is_dataclass
from importlib import import_module
from pprint import pformat

from fastcore.docments import docments
from stage import Room

EMPTY = inspect.Parameter.empty
ADDRESS = re.compile(r"(?: object)? at 0x[0-9a-f]+")


def api_page(room: Room, package: str) -> str:
    "The Markdown of a module's page."
    module = import_module(f"{package}.{room.module}")
    summary = (inspect.getdoc(module) or "").split("\n")[0]
    where = f"[{room.number} {room.title}](/{room.page}.ipynb)"
    head = f'---\ntitle: "{package}.{room.module}"\ndescription: {json_string(summary)}\n---\n\nThe notebook: {where}\n'
    return head + "\n".join(
        entry(name, getattr(module, name), room) for name in public_names(module, room)
    )


def public_names(module, room: Room) -> list[str]:
    "`__all__` in the order of the notebook, which is the order a reader needs."
    order = {n: i for i, n in enumerate(room.anchors)}
    return sorted(module.__all__, key=lambda n: order.get(n, len(order)))


def json_string(text: str) -> str:
    "A YAML-safe string."
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def entry(name: str, obj, room: Room, level: int = 2) -> str:
    "Heading, link to the defining cell, signature, docstring, parameters, and a class's own methods."
    anchor = room.anchors.get(name) or room.anchors.get(name.split(".")[0])
    link = f"[in the notebook](/{room.page}.ipynb#{anchor}){{.api-source}}" if anchor else ""
    parts = [f"{'#' * level} `{name}`{{.nolink}} {{#{name} .api-entry}}", link]
    if inspect.isclass(obj) or callable(obj):
        table = parameters(obj)
        parts += [signature(name, obj, types=not table), doc(obj), table]
    elif isinstance(obj, property):
        parts += [doc(obj)]
    else:
        parts += [constant(name, obj)]
    if inspect.isclass(obj):
        parts += [entry(f"{name}.{n}", m, room, level + 1) for n, m in methods(obj)]
    return "\n\n".join(p for p in parts if p) + "\n"


def methods(cls) -> list[tuple[str, object]]:
    "The public methods and properties that a class defines itself and documents."
    own = [
        (n, m.__func__ if isinstance(m, staticmethod | classmethod) else m)
        for n, m in vars(cls).items()
    ]
    shown = [
        (n, m)
        for n, m in own
        if not n.startswith("_")
        and (inspect.isfunction(m) or isinstance(m, property))
        and inspect.getdoc(m)
    ]
    generated = ("_asdict", "_replace", "count", "index")
    return [(n, m) for n, m in shown if n not in generated]


def signature(name: str, obj, types: bool) -> str:
    "The call as one writes it, a parameter a line when it is long; types only where no table below tells them."
    try:
        params = list(inspect.signature(obj).parameters.values())
    except (TypeError, ValueError):
        return ""
    shown, star = [], False
    for p in params:
        if p.name in ("self", "cls"):
            continue
        if p.kind is p.KEYWORD_ONLY and not star:
            shown, star = [*shown, "*"], True
        star |= p.kind is p.VAR_POSITIONAL
        mark = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
        kind = f": {type_name(p.annotation)}" if types and type_name(p.annotation) else ""
        equals = " = " if kind else "="
        shown.append(
            f"{mark}{p.name}{kind}"
            + ("" if p.default is EMPTY else f"{equals}{short(p.default)}")
        )
    prefix = "class " if inspect.isclass(obj) else ""
    call = f"{prefix}{name}({', '.join(shown)})"
    if len(call) > 80:
        call = f"{prefix}{name}(\n" + "".join(f"    {s},\n" for s in shown) + ")"
    return f"```python\n{call}\n```"


def doc(obj) -> str:
    "The docstring as Markdown."
    text = inspect.getdoc(obj) or ""
    if is_dataclass(obj) and text.startswith(
        f"{obj.__name__}("
    ):  # the one that dataclass writes
        return ""
    return prose(text)


def parameters(obj) -> str:
    "A table of the comments beside the parameters; nothing when there are none."
    try:
        found = docments(obj, full=True, returns=True)
    except Exception:  # no source (a NamedTuple's constructor): the signature has to do
        return ""
    rows = []
    for name, p in found.items():
        comment, kind = p.get("docment") or "", type_name(p.get("anno"))
        if (
            name in ("self", "cls")
            or not (comment or kind)
            or (name == "return" and not comment and kind in ("", "None"))
        ):
            continue
        default = (
            ""
            if p.get("default", EMPTY) is EMPTY or name == "return"
            else f"`{cell_text(short(p['default']))}`"
        )
        label = "**returns**" if name == "return" else f"`{name}`"
        rows.append(
            f"| {label} | {cell_text(prose(kind))} | {default} | {cell_text(prose(comment))} |"
        )
    if not rows or not any(p.get("docment") for p in found.values()):
        return ""
    return "\n".join(
        [
            "::: {.api-params}",
            "",
            "| | type | default | |",
            "|---|---|---|---|",
            *rows,
            "",
            ":::",
        ]
    )


def constant(name: str, value) -> str:
    "A constant's value, when it is short enough to read."
    text = ADDRESS.sub("", pformat(value, width=90, compact=True))
    return (
        f"```python\n{name} = {text}\n```"
        if len(text) < 1500
        else f"A `{type(value).__name__}` of {len(value)} entries."
    )


def short(value) -> str:
    "A default as it is written in code."
    text = (
        getattr(value, "__name__", None)
        if inspect.isfunction(value) or inspect.isclass(value)
        else repr(value)
    )
    return ADDRESS.sub("", text or repr(value))


def type_name(anno) -> str:
    "An annotation as it is written in code."
    if anno in (None, EMPTY):
        return ""
    text = (
        anno
        if isinstance(anno, str)
        else getattr(anno, "__name__", "")
        if isinstance(anno, type) and not getattr(anno, "__args__", None)
        else str(anno)
    )
    return re.sub(r"\b(?:[a-z_]\w*\.)+(?=[A-Za-z])", "", text)


def prose(text: str) -> str:
    "Words out of code as Markdown: outside of backticks a dollar is no equation and a < is no tag."
    pieces = re.split(r"(`[^`]*`)", text)
    return "".join(
        p if p.startswith("`") else p.replace("$", r"\$").replace("<", r"\<") for p in pieces
    )


def cell_text(text: str) -> str:
    "Text on one line, for a table cell."
    return " ".join(text.split()).replace("|", r"\|")


def symbols(room: Room, package: str) -> dict[str, str]:
    "Exported name -> address of its entry; names in backticks link there."
    module = import_module(f"{package}.{room.module}")
    found = {}
    for name in module.__all__:
        found[name] = f"/api/{room.module}.md#{name}"
        obj = getattr(module, name)
        if inspect.isclass(obj):
            found |= {
                f"{name}.{n}": f"/api/{room.module}.md#{name}.{n}" for n, _ in methods(obj)
            }
    return found
