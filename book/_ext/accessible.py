"""Mend what the tools that make the pages get wrong: for readers who use a screen reader, and for the eye."""
import html
import re
import textwrap
from pathlib import Path

from docutils import nodes

MATHS_THEN_MARK = re.compile(r'(<span class="math notranslate nohighlight">[^<]*</span>)([,.;:!?)]+)')
PICTURE = re.compile(r'<img (?=[^>]*\bsrc="((?:\.\./)*(_(?:images|static)/[^"]+\.svg))")[^>]*>')
CODE = re.compile(r'(?<=<div class="highlight"><pre>)(.*?)(?=</pre>)', re.DOTALL)
TAG = re.compile(r"<[^>]*>")
EQUALS = re.compile(r" (=|<-) ")
NUMBER = re.compile(r'<span class="linenos">([^<]*)</span>')
SPACES = re.compile(r'^((?:<span></span>)?(?:<span class="linenos">[^<]*</span>)?)(?:<span class="w">( +)</span>|( +))')
INDENT = r'\1<span class="indent">\2\3</span>'
WIDTH = re.compile(r'<svg\b[^>]*\bwidth="([\d.]+)pt"')
DESCRIPTION = 200  # characters of a page that a link to it shows
COLUMN = 700  # pixels: no wider picture fits beside the margin


def picture_width(app, path):
    """The width in pixels that a picture of the site was drawn for, or None."""
    sources = {f"{app.builder.imagedir}/{name}": source for source, name in app.builder.images.items()}
    file = Path(app.srcdir, sources[path]) if path in sources else Path(app.outdir, path)
    found = WIDTH.search(file.read_text("utf8")) if file.exists() else None
    return round(float(found[1]) * 4 / 3) if found else None


def fitted(app, match):
    """The picture as a link to itself, with its width, by which book.css keeps its labels legible: see there."""
    width = picture_width(app, match[2])
    if width is None:
        return match[0]
    # the theme's word, at which its contents make room
    kind = "image-reference wide full-width" if width > COLUMN else "image-reference"
    return f'<a class="{kind}" href="{match[1]}" style="--drawn-width: {width}px">{match[0]}</a>'


def in_lines(match):
    """A block of code, each line in an element that knows its indentation, so that the rest of a long one goes on below
    it, deeper; and the indentation in one of its own, which a phone may narrow."""
    if 'class="hll"' in match[0]:  # an emphasised line holds its line break: the pieces would not nest
        return match[0]
    lines = match[0].splitlines(keepends=True)
    numbers = [len(found[1]) + 2 if (found := NUMBER.search(line)) else 0 for line in lines]
    plain = [TAG.sub("", NUMBER.sub("", line)) for line in lines]
    indents = [number + len(text) - len(text.lstrip(" ")) for number, text in zip(numbers, plain)]
    return "".join(f'<span class="line" style="--indent: {indent}ch">{SPACES.sub(INDENT, line)}</span>'
                   for indent, line in zip(indents, lines))


def set_equations(app, what, name, obj, options, lines):
    """A paragraph of a docstring that is an equation keeps its lines and its spaces, and is no prose. Runs before
    napoleon finds the sections."""
    paragraphs = [paragraph.split("\n") for paragraph in "\n".join(lines).split("\n\n")]
    are_equations = [i > 0 and not lines[0].rstrip().endswith(":") and bool(EQUALS.search(" ".join(lines)))
                     for i, lines in enumerate(paragraphs)]
    set_off = [[".. code-block:: text", "", *(f"   {line}" for line in paragraph)] if is_one else paragraph
               for paragraph, is_one in zip(paragraphs, are_equations)]
    lines[:] = "\n\n".join("\n".join(paragraph) for paragraph in set_off).split("\n")


def mend(app, pagename, templatename, context, doctree):
    """Mend a page. docutils makes a bibliography a list of `doc-biblioentry`, which is no list item; MathJax lets a
    line break before a comma; code and pictures are wider than a phone."""
    if "body" in context:
        body = context["body"].replace('role="doc-biblioentry"', 'role="listitem"')
        body = MATHS_THEN_MARK.sub(r'<span class="unbroken">\1\2</span>', body)
        body = CODE.sub(in_lines, body)
        context["body"] = PICTURE.sub(lambda match: fitted(app, match), body)
    if doctree is not None and (first := next(iter(doctree.findall(nodes.paragraph)), None)) is not None:
        said = html.escape(textwrap.shorten(first.astext(), DESCRIPTION, placeholder="…"))
        context["metatags"] = context.get("metatags", "") + f'<meta name="description" content="{said}">'


def setup(app):
    app.setup_extension("sphinx.ext.autodoc")
    app.connect("autodoc-process-docstring", set_equations, priority=400)
    app.connect("html-page-context", mend, priority=900)  # after the extensions that write pictures
    return {"parallel_read_safe": True, "parallel_write_safe": True}
