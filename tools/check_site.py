"""python tools/check_site.py _build/html

Fails on an asset from another host, a broken link or anchor, a picture without a proper alternative text, and an
unresolved reference.
"""
import re
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

from bs4 import BeautifulSoup

ASSETS = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "object": "data"}
LINKS = {"a": "href", "link": "href"}
FILE_NAME = re.compile(r"\S+\.(png|svg|jpe?g|gif|webp)$", re.IGNORECASE)
OUTSIDE_STYLE = re.compile(r"""@import\s+(?:url\()?["']?(?:https?:)?//|url\(["']?(?:https?:)?//""")
SHORTEST_ALT = 8


class Site:
    """The parsed pages of a built site and the anchors of each."""

    def __init__(self, root):
        self.root = root.resolve()
        files = [path for path in self.root.rglob("*.html") if "_static" not in path.parts]
        self.pages = {path: BeautifulSoup(path.read_text("utf8"), "html.parser") for path in sorted(files)}
        self.anchors = {path: {tag["id"] for tag in page.find_all(id=True)} for path, page in self.pages.items()}

    def reference_problem(self, page, tag, url):
        """What is wrong with one reference of a page, or None."""
        parts = urlsplit(url)
        if parts.scheme in ("data", "mailto", "javascript"):
            return None
        if parts.scheme or parts.netloc:
            harmless = tag.name == "a" or "canonical" in tag.get("rel", [])
            return None if harmless else f"{tag.name} from another host: {url}"
        if parts.path.startswith("/"):
            return f"{url}: starts at the host's root, so breaks in a sub-path"
        target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
        if target.is_dir():
            target /= "index.html"
        if not target.exists():
            return f"{url}: no such file"
        anchor = unquote(parts.fragment)
        if anchor and target in self.anchors and anchor not in self.anchors[target]:
            return f"{url}: no such anchor"
        return None

    def problems(self):
        for path, page in self.pages.items():
            for problem in self.page_problems(path, page):
                yield f"{path.relative_to(self.root)}: {problem}"
        for style in self.root.rglob("*.css"):
            if OUTSIDE_STYLE.search(style.read_text("utf8")):
                yield f"{style.relative_to(self.root)}: a style that loads from another host"

    def page_problems(self, path, page):
        for name, attribute in (ASSETS | LINKS).items():
            for tag in page.find_all(name, **{attribute: True}):
                problem = self.reference_problem(path, tag, tag[attribute])
                if problem:
                    yield problem
        article = page.find("article") or page
        for image in article.find_all("img"):
            alt = image.get("alt", "").strip()
            if len(alt) < SHORTEST_ALT or FILE_NAME.fullmatch(alt):
                yield f"no alternative text on {image.get('src')}: {alt!r}"
        for shown_source in article.find_all(["pre", "code"]):
            shown_source.decompose()  # '??' may well be code
        if "??" in article.get_text():
            yield "an unresolved '??'"


def main(folder):
    root = Path(folder)
    if not (root / "index.html").exists():
        raise SystemExit(f"{folder}: no index.html here; build the book first")
    site = Site(root)
    problems = list(site.problems())
    print("\n".join(problems)
          or f"{len(site.pages)} pages checked: links, anchors, alternative texts, no outside asset")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
