"""The interactive frontier: the rows behind a notebook's frontier figures, drawn on top of the static picture.

The rows lie in the outputs of the executed notebook (`application/vnd.saelib.rows+json`, from `plots.frontier`). On the
notebook's own page the script finds the figure by its name (the cell's metadata `mystnb.figure.name`); on any other:

```{frontier} 06_frontier
:name: fig-headline

A caption; the figure's own if left out.
```

shows the static picture of the notebook's first frontier, and the script does the rest. Without JavaScript and in print
the static picture stays. _static/frontier/NOTEBOOK.svg and .js hold picture and rows: those of the page's own profile,
and those of every other profile that was run here (runs/PROFILE/) or has its rows committed
(book/results/PROFILE.json).
"""
import html
import json
from pathlib import Path

import nbformat
from docutils import nodes
from docutils.statemachine import StringList
from executed import executed_path
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

from tools import keep
from tools.keep import ROWS_MIME
from tools.run import code_hash, run_record

logger = logging.getLogger(__name__)
SVG_MIME = "image/svg+xml"
ASSETS = Path("_static", "frontier")


def frontiers_of(notebook):
    """The frontier figures of an executed notebook, in order: name, caption, alt, svg."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if ROWS_MIME in data and SVG_MIME in data:
                shown = cell.metadata.get("mystnb", {})
                figure, image = shown.get("figure", {}), shown.get("image", {})
                yield {
                    "name": figure.get("name"), "caption": figure.get("caption", ""), "alt": image.get("alt", ""),
                    "svg": "".join(data[SVG_MIME]),
                }


def read_frontiers(app, docname):
    path = executed_path(app, docname)
    return list(frontiers_of(nbformat.read(path, 4))) if path.exists() else []


def profiles_with_rows(app, notebook):
    """Profile -> {about, figures: name -> rows}, the page's own profile first."""
    committed = Path(app.srcdir, "notebooks", f"{notebook}.ipynb")
    shown, source, found = executed_path(app, f"notebooks/{notebook}"), nbformat.read(committed, 4), {}
    own = run_record(nbformat.read(shown, 4)).get("profile", "unknown")
    for profile in dict.fromkeys([own, *keep.profiles_of(source)]):
        local = Path(app.srcdir, "runs", profile, committed.name)
        path = shown if profile == own else local if local.exists() else committed if profile == "quick" else None
        run = keep.run_of(path) if path else keep.kept(app.srcdir, profile).get(notebook, {})
        if run.get("frontiers"):
            found[profile] = {"about": origin(run, code_hash(source)), "figures": run["frontiers"]}
    return found


def origin(run, code):
    """Where rows come from, in words."""
    when = f"Run on {run['date']} on {run['hardware']}." if "date" in run else "Committed with the notebook."
    return when if run.get("code") == code else f"{when} The code has changed since."


def methods_of(figures):
    """Label, knob and colour of each method in the rows, in the order of METHODS."""
    from saelib import METHODS
    from saelib.marks import look_of

    keys = dict.fromkeys(row["method"] for rows in figures for row in rows)
    ordered = [key for key in METHODS if key in keys] + [key for key in keys if key not in METHODS]
    table = {}
    for key in ordered:  # a chapter may show a method of its own, which only its kernel knew
        known, (color, marker) = METHODS.get(key), look_of(key, ordered)
        table[key] = {"label": known.label if known else key, "knob": known.knob if known else "sparsity",
                      "color": color, "marker": marker}
    return table


class Frontier(SphinxDirective):
    """The first frontier figure of a notebook."""

    required_arguments = 1
    option_spec = {"name": str}
    has_content = True

    def run(self):
        docname = f"notebooks/{self.arguments[0]}"
        self.env.note_dependency(str(executed_path(self.env.app, docname)))
        figures = read_frontiers(self.env.app, docname)
        if not figures:
            logger.warning("frontier: %s shows no frontier with its rows: run it again", docname,
                           location=self.get_location(), type="frontier")
            return []
        self.env.metadata[self.env.docname]["frontier"] = self.arguments[0]
        figure = nodes.figure("", self.picture(figures[0]), align="default", classes=["frontier-figure"])
        caption = list(self.content) or [figures[0]["caption"]]
        holder = nodes.Element()
        self.state.nested_parse(StringList(caption, source="frontier"), self.content_offset, holder)
        if holder.children:
            figure += nodes.caption("", "", *holder.children[0].children)
        self.options.setdefault("name", f"frontier-{self.arguments[0]}")
        self.add_name(figure)
        return [figure]

    def picture(self, figure):
        up = "../" * self.env.docname.count("/")
        source = f"{up}{ASSETS.as_posix()}/{self.arguments[0]}.svg"
        alt = html.escape(figure["alt"] or "Reconstruction error against active latents, one line for each method")
        return nodes.raw("", f'<img src="{source}" alt="{alt}" data-frontier="{figure["name"] or ""}">', format="html")


def notebook_of(app, pagename):
    """The notebook whose rows a page draws, or None."""
    named = app.env.metadata.get(pagename, {}).get("frontier")
    if named:
        return named
    if pagename in app.env.found_docs and Path(app.env.doc2path(pagename)).suffix == ".ipynb":
        named = any(figure["name"] for figure in read_frontiers(app, pagename))
        return Path(pagename).name if named else None
    return None


def add_assets(app, pagename, templatename, context, doctree):
    notebook = notebook_of(app, pagename)
    if notebook is None:
        return
    write_assets(app, notebook)
    app.add_css_file("frontier.css")
    app.add_js_file("dom.js", loading_method="defer", priority=400)
    app.add_js_file("frontier.js", loading_method="defer")
    app.add_js_file(f"frontier/{notebook}.js", loading_method="defer", priority=600)


def write_assets(app, notebook):
    figures = read_frontiers(app, f"notebooks/{notebook}")
    folder = Path(app.outdir, ASSETS)
    folder.mkdir(parents=True, exist_ok=True)
    if figures and app.builder.format == "html":
        profiles = profiles_with_rows(app, notebook)
        methods = methods_of([rows for profile in profiles.values() for rows in profile["figures"].values()])
        data = {"methods": methods, "profiles": profiles}
        (folder / f"{notebook}.svg").write_text(figures[0]["svg"], encoding="utf8")
        (folder / f"{notebook}.js").write_text(f"saelibFrontier({json.dumps(data, separators=(',', ':'))});\n",
                                               encoding="utf8")


def setup(app):
    app.setup_extension("executed")
    app.add_directive("frontier", Frontier)
    app.connect("html-page-context", add_assets)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
