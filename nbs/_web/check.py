"""Check a built site: every local link lands, and no page asks another host for anything."""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADS = {
    ("script", "src"),
    ("img", "src"),
    ("source", "src"),
    ("video", "src"),
    ("iframe", "src"),
    ("audio", "src"),
    ("embed", "src"),
    ("object", "data"),
}
LOADING_RELS = {
    "stylesheet",
    "icon",
    "preload",
    "modulepreload",
    "preconnect",
    "dns-prefetch",
    "manifest",
}


class Page(HTMLParser):
    "The ids, links and loaded files of one page."

    def __init__(self, text: str):
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        got = {k: v or "" for k, v in attrs}
        self.ids |= {got[k] for k in ("id", "name") if k in got}
        if tag == "a" and "href" in got:
            self.links.append(got["href"])
        if tag == "link" and set(got.get("rel", "").split()) & LOADING_RELS:
            self.loads.append(got.get("href", ""))
        self.loads += [v for k, v in got.items() if (tag, k) in LOADS]
        if "style" in got:
            self.loads += css_loads(got["style"])


def css_loads(text: str) -> list[str]:
    "What a style sheet loads."
    return [
        u.strip("'\" ")
        for pair in re.findall(r"url\(([^)]*)\)|@import\s+['\"]([^'\"]+)", text)
        for u in pair
        if u
    ]


def remote(url: str) -> bool:
    return bool(re.match(r"(?:https?:)?//", url))


def check_site(site: Path) -> list[str]:
    "Every problem, one line each; an empty list is a sound site."
    problems = []
    pages = {p: Page(p.read_text(encoding="utf-8")) for p in sorted(site.rglob("*.html"))}
    for path, page in pages.items():
        name = path.relative_to(site)
        for url in page.loads:
            if remote(url):
                problems.append(f"{name}: loads from another host: {url}")
            elif (
                url
                and not url.startswith(("data:", "#", "blob:"))
                and not target(path, url).exists()
            ):
                problems.append(f"{name}: missing file {url}")
        for url in page.links:
            parts = urlsplit(url)
            if parts.scheme or url.startswith("//"):
                continue
            to = path if not parts.path else target(path, url)
            to = to / "index.html" if to.is_dir() else to
            if not to.exists():
                problems.append(f"{name}: broken link {url}")
            elif (
                parts.fragment and to in pages and unquote(parts.fragment) not in pages[to].ids
            ):
                problems.append(f"{name}: no such place {url}")
    for path in site.rglob("*.css"):
        for url in css_loads(path.read_text(encoding="utf-8")):
            if remote(url):
                problems.append(f"{path.relative_to(site)}: loads from another host: {url}")
            elif not url.startswith(("data:", "#")) and not target(path, url).exists():
                problems.append(f"{path.relative_to(site)}: missing file {url}")
    return problems


def target(page: Path, url: str) -> Path:
    return (page.parent / unquote(urlsplit(url).path)).resolve()


if __name__ == "__main__":
    found = check_site(Path(sys.argv[1]).resolve())
    print("\n".join(found) or "every link lands, nothing is loaded from another host")
    sys.exit(bool(found))
