"""Verdicts and numbers that the notebooks recorded, on any page.

The records lie in the outputs of the executed notebooks, and nowhere else (see the extension `executed`):
`application/vnd.saelib.verdict+json` and `application/vnd.saelib.numbers+json`.

```{scoreboard}
```                                    a table of all verdicts
```{scoreboard-summary}
```                                    how many claims have which verdict
{number}`03_frontier:gap_32`           a number of notebooks/03_frontier.ipynb
{number}`03_frontier:gap_32:.2f`       the same with a format
{number}`laptop/03_frontier:gap_32`    the same of the run at a profile that is kept in book/results (see `tools.keep`)

scoreboard.json at the site's root holds the table's rows. A name that no notebook recorded is a warning.
"""
import json
import re
from collections import Counter
from pathlib import Path

import nbformat
from docutils import nodes
from docutils.statemachine import StringList
from executed import executed_path
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective, SphinxRole

from saelib.verdicts import VERDICT_MIME, anchor
from tools import keep
from tools.keep import records
from tools.run import run_record

logger = logging.getLogger(__name__)

FIELDS = ("id", "claim", "section", "criterion", "paper", "ours", "verdict")
BADGES = {"held": "✓ held", "held in part": "◐ held in part", "not held": "✗ not held"}
COLUMNS = {
    "id": "Id",
    "claim": "Claim",
    "verdict": "Verdict",
    "ours": "Here",
    "paper": "Paper's figure",
    "criterion": "Criterion",
    "section": "In the paper",
}


def notebook_pages(env):
    """The notebooks that are pages of this book, in the order of their names."""
    return sorted(name for name in env.found_docs if Path(env.doc2path(name)).suffix == ".ipynb")


def verdicts(app):
    """The scoreboard's rows, each with its notebook and profile, in the order of their ids."""
    rows = []
    for docname in notebook_pages(app.env):
        path = executed_path(app, docname)
        if not path.exists():
            continue  # the extension `executed` warns of it
        notebook = nbformat.read(path, 4)
        profile = run_record(notebook).get("profile", "unknown")
        for record in records(notebook, VERDICT_MIME):
            row = {name: record.get(name) for name in FIELDS}
            rows.append({**row, "notebook": Path(docname).name, "profile": profile})
    return sorted(rows, key=place)


def place(row):
    """Where a claim stands in the table: by its id, A2.10 after A2.9."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", str(row["id"]))]


def complaints(rows):
    """What is wrong with the rows: a missing field, an unknown verdict, a claim judged twice."""
    for row in rows:
        missing = [name for name in FIELDS if row[name] is None]
        if missing:
            yield f"{row['notebook']}: a verdict lacks {', '.join(missing)}"
        elif row["verdict"] not in BADGES:
            yield f"{row['notebook']}: {row['verdict']!r} is no verdict; they are: {', '.join(BADGES)}"
    for claim, times in Counter(row["id"] for row in rows).items():
        if times > 1:
            yield f"claim {claim} has {times} verdicts"


class Scoreboard(SphinxDirective):
    """The table of verdicts."""

    def run(self):
        self.env.metadata[self.env.docname]["scoreboard"] = True
        for docname in notebook_pages(self.env):
            self.env.note_dependency(str(executed_path(self.env.app, docname)))
        rows = verdicts(self.env.app)
        for complaint in complaints(rows):
            logger.warning("scoreboard: %s", complaint, location=self.get_location(), type="scoreboard")
        return [self.table(rows)]  # _static/scoreboard.js adds a filter

    def table(self, rows):
        group = nodes.tgroup(cols=len(COLUMNS))
        group += [nodes.colspec(colwidth=1, stub=int(name == "id")) for name in COLUMNS]
        head = nodes.row("", *[nodes.entry("", nodes.paragraph(text=title)) for title in COLUMNS.values()])
        group += nodes.thead("", head)
        group += nodes.tbody("", *[self.row(row) for row in rows])
        # the margin too
        return nodes.container("", nodes.table("", group, classes=["scoreboard"]), classes=["full-width"])

    def row(self, row):
        cells = {name: self.inline(str(row[name])) for name in COLUMNS}
        cells["id"] = [self.link(row)]
        classes = ["verdict-badge", str(row["verdict"]).replace(" ", "-")]
        cells["verdict"] = [nodes.inline(text=BADGES.get(row["verdict"], "?"), classes=classes)]
        return nodes.row("", *[nodes.entry("", nodes.paragraph("", "", *cells[name])) for name in COLUMNS])

    def inline(self, text):
        """Text with the page's own markup, such as $k$."""
        holder = nodes.Element()
        self.state.nested_parse(StringList([text], source="scoreboard"), 0, holder)
        return holder.children[0].children if holder.children else []

    def link(self, row):
        """The claim's id, linked to its verdict."""
        page = self.env.app.builder.get_relative_uri(self.env.docname, f"notebooks/{row['notebook']}")
        return nodes.reference("", str(row["id"]), internal=True, refuri=f"{page}#{anchor(str(row['id']))}")


class Summary(SphinxDirective):
    """Two lines: how many claims of the paper and how many of ours were put to the test, and how many have each
    verdict."""

    def run(self):
        self.env.metadata[self.env.docname]["scoreboard"] = True
        for docname in notebook_pages(self.env):
            self.env.note_dependency(str(executed_path(self.env.app, docname)))
        rows = verdicts(self.env.app)
        own = [row for row in rows if str(row["section"]).startswith("ours")]
        return [self.line(f"{len(rows) - len(own)} claims of the paper: ", [row for row in rows if row not in own]),
                self.line(f"{len(own)} of our own: ", own)]

    def line(self, title, rows):
        counts = Counter(row["verdict"] for row in rows)
        line = nodes.paragraph("", "", nodes.strong(text=title), classes=["scoreboard-summary"])
        for verdict, badge in BADGES.items():
            line += nodes.inline(text=f"{badge} {counts[verdict]}",
                                 classes=["verdict-badge", verdict.replace(" ", "-")])
            line += nodes.Text(" ")
        return line


class recorded_number(nodes.inline):  # noqa: N801 (docutils names nodes in lower case)
    """A number out of a run; the tooltip says which."""


def open_number(translator, node):
    translator.body.append(translator.starttag(node, "span", "", CLASS="recorded-number", title=node["tooltip"]))


def close_number(translator, node):
    translator.body.append("</span>")


def no_markup(translator, node):
    pass


class Number(SphinxRole):
    """{number}`NOTEBOOK:NAME` or {number}`NOTEBOOK:NAME:FORMAT`, with PROFILE/ before it for a run that is kept."""

    def run(self):
        place, _, rest = self.text.partition(":")
        profile, _, notebook = place.rpartition("/")
        name, _, form = rest.partition(":")
        try:
            numbers, profile = self.kept(profile, notebook) if profile else self.shown(notebook)
            if name not in numbers:
                raise LookupError(f"{place} recorded no {name!r}; it has: {', '.join(sorted(numbers)) or 'none'}")
            value = numbers[name]
            text = format(value, form) if form else str(value)
        except (LookupError, ValueError) as error:
            reason = error.args[0]
            logger.warning("number %r: %s", self.text, reason, location=self.get_location(), type="scoreboard")
            return [nodes.strong(text="??")], []
        tooltip = f"{name}, from notebook {notebook}, profile {profile}"
        return [recorded_number("", "", nodes.Text(text), tooltip=tooltip)], []

    def kept(self, profile, notebook):
        path = keep.kept_path(self.env.srcdir, profile)
        self.env.note_dependency(str(path))
        run = keep.kept(self.env.srcdir, profile).get(notebook, {})
        return run.get("numbers", {}), f"{profile}, run of {run.get('date', 'an unknown day')}"

    def shown(self, notebook):
        docname = f"notebooks/{notebook}"
        if docname not in self.env.found_docs:
            raise LookupError(f"no page {docname}")
        path = executed_path(self.env.app, docname)
        self.env.note_dependency(str(path))
        if not path.exists():
            raise LookupError(f"{docname} has not been run")
        executed = nbformat.read(path, 4)
        return keep.numbers_of(executed), run_record(executed).get("profile", "unknown")


def pages_with_scoreboard(app, env, added, changed, removed):
    """A notebook that comes or goes changes the tables."""
    if not any(Path(env.doc2path(name)).suffix == ".ipynb" for name in added | removed):
        return []
    return [name for name, about in env.metadata.items() if about.get("scoreboard")]


def add_assets(app, pagename, templatename, context, doctree):
    if app.env.metadata.get(pagename, {}).get("scoreboard"):
        app.add_js_file("dom.js", loading_method="defer", priority=400)
        app.add_js_file("scoreboard.js", loading_method="defer")


def write_json(app, exception):
    if exception is None and app.builder.format == "html":
        rows = json.dumps(verdicts(app), indent=1, ensure_ascii=False)
        Path(app.outdir, "scoreboard.json").write_text(rows + "\n", encoding="utf8")


def setup(app):
    app.setup_extension("executed")
    app.add_directive("scoreboard", Scoreboard)
    app.add_directive("scoreboard-summary", Summary)
    app.add_role("number", Number())
    skip = (no_markup, no_markup)
    app.add_node(recorded_number, html=(open_number, close_number), latex=skip, text=skip)
    app.connect("env-get-outdated", pages_with_scoreboard)
    app.connect("html-page-context", add_assets)
    app.connect("build-finished", write_json)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
