"""Mend what the tools that make the pages leave out for readers who use a screen reader."""


def mend_roles(app, pagename, templatename, context, doctree):
    """docutils makes a bibliography a list of `doc-biblioentry`, which is no list item."""
    if "body" in context:
        context["body"] = context["body"].replace('role="doc-biblioentry"', 'role="listitem"')


def setup(app):
    app.connect("html-page-context", mend_roles)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
