"""Mend what the tools that make the pages get wrong: for readers who use a screen reader, and for the eye."""
import re

MATHS_THEN_MARK = re.compile(r'(<span class="math notranslate nohighlight">[^<]*</span>)([,.;:!?)]+)')


def mend(app, pagename, templatename, context, doctree):
    """docutils makes a bibliography a list of `doc-biblioentry`, which is no list item; MathJax lets a line break before a comma."""
    if "body" in context:
        body = context["body"].replace('role="doc-biblioentry"', 'role="listitem"')
        context["body"] = MATHS_THEN_MARK.sub(r'<span class="unbroken">\1\2</span>', body)


def setup(app):
    app.connect("html-page-context", mend)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
