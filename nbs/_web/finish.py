"""From generated pages to the finished site: equations, numbers, captions, and nothing from another host."""

import html
import json
import re
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


def describe_figures(text: str) -> str:
    "A figure without a description gets its caption, or at least its page's title, for people who cannot see it."
    title = re.search(r"<title>(.*?)</title>", text, re.S)
    name = re.sub(r"\s+–.*", "", title[1]) if title else "this page"
    count = 0

    def put(m: re.Match) -> str:
        nonlocal count
        count += 1
        after = re.match(
            r"(?:\s*</div>)+\s*<p><strong>(.*?)</p>", text[m.end() : m.end() + 3000], re.S
        )
        words = (
            re.sub(r"<[^>]+>|\s+", " ", after[1]).strip()
            if after
            else f"Figure {count} of {name}"
        )
        return f'<img alt="{html.escape(html.unescape(words))[:300]}" loading="lazy"{m[1]}>'

    return re.sub(r"<img((?:(?! alt=)[^>])*)>", put, text)


def localise(text: str, depth: int) -> str:
    "Drop what the generator would load from a content network; equations are HTML by now and need only a style sheet."
    up = "../" * depth
    had_math = 'class="katex' in text
    text = REMOTE.sub("", text)
    styles = (
        [f'<link rel="stylesheet" href="{up}assets/katex/katex.min.css">'] if had_math else []
    )
    return text.replace("</head>", "".join(styles) + "</head>", 1)


def finish(site: Path, web: Path):
    "Run every step over every page."
    pages = {p: p.read_text(encoding="utf-8") for p in sorted(site.rglob("*.html"))}
    pages = render_equations(pages, web)
    for path, text in pages.items():
        text = localise(text, len(path.relative_to(site).parts) - 1)
        for step in (contents_like_headings, link_equations, number_sidebar, describe_figures):
            text = step(text)
        path.write_text(text, encoding="utf-8")
