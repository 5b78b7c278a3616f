"""Show a notebook's executed copy in place of its source.

The environment variable BOOK_PROFILE, else the setting `executed_profile`, says which runs are shown: those in
runs/PROFILE/. For `quick` a notebook that has none shows its committed outputs, which are a quick run too;
`committed` shows committed outputs only. Prose always comes from the source, outputs from the run.

A copy that is missing, or that other code made, is a warning, and so fails a strict build.
"""
import os
import sys
from pathlib import Path

import nbformat
from sphinx.util import logging

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tools import keep  # noqa: E402
from tools.run import code_cells, code_hash, duration, run_record  # noqa: E402

logger = logging.getLogger(__name__)
WORDS_A_MINUTE = 180  # prose, equations and code together


def executed_path(app, docname):
    """Where the outputs of a notebook page come from; the file may not exist."""
    source = Path(app.srcdir, f"{docname}.ipynb")
    profile = app.config.executed_profile
    run = Path(app.srcdir, "runs", profile, source.name)
    if profile == "committed" or (profile == "quick" and not run.exists()):
        return source
    return run


def warn(docname, text, kind):
    logger.warning("%s: %s", docname, text, location=docname, type="executed", subtype=kind)


def remedy(app, docname):
    profile = app.config.executed_profile
    committed = executed_path(app, docname).parent.name == "notebooks"
    return "make notebooks" if committed else f"python tools/run.py {profile} {Path(docname).name}"


def read_executed(app, docname, source):
    """The executed copy of a notebook, or None; warns where it can't be trusted."""
    path = executed_path(app, docname)
    if not path.exists():
        warn(docname, f"never run at profile {app.config.executed_profile!r}: {remedy(app, docname)}", "missing")
        return None
    executed = nbformat.read(path, 4)
    ours, theirs = code_cells(source), code_cells(executed)
    if [cell.source for cell in ours] != [cell.source for cell in theirs]:
        warn(docname, f"the run shown is of other code than the page's: {remedy(app, docname)}", "code")
    elif run_record(executed).get("code") != code_hash(source):
        warn(docname, f"saelib has changed since the run shown: {remedy(app, docname)}", "stale")
    return executed


def with_outputs(source, executed):
    """The source's cells with the outputs of the run; the run's own cells where the code differs."""
    ours, theirs = code_cells(source), code_cells(executed)
    if [cell.source for cell in ours] != [cell.source for cell in theirs]:
        injected = [cell for cell in executed.cells if "injected-parameters" in cell.metadata.get("tags", [])]
        source.cells = [cell for cell in executed.cells if cell not in injected]
        return
    for cell, run in zip(ours, theirs):
        cell.outputs, cell.execution_count = run.outputs, run.execution_count


def provenance_box(record):
    """The box that says where the numbers of a page come from, as a Markdown directive."""
    profile = record.get("profile", "unknown")
    sentences = [f"**Numbers on this page**: profile `{profile}`."]
    if "date" not in record:
        sentences.append("They are the outputs committed with the notebook.")
    else:
        changed = ", with uncommitted changes" if record["uncommitted_changes"] else ""
        commit = f"`{record['commit']}`{changed}" if record["commit"] else "not recorded"
        packages = ", ".join(f"{name} {number}" for name, number in record["packages"].items())
        others = {name: value for name, value in record["parameters"].items() if name != "profile"}
        parameters = ", ".join(f"`{name} = {value}`" for name, value in others.items())
        sentences += [
            f"Run on {record['date']} in {duration(record['seconds'])} on {record['hardware']}.",
            f"Parameters: {parameters}." if parameters else "",
            f"Python {record['python']}, {packages}. Commit: {commit}.",
        ]
    return "\n".join([":::{container} provenance", " ".join(filter(None, sentences)), ":::"])


def run_times(root, notebook, record, name):
    """How long the notebook takes at each profile that it has, where somebody has measured it."""
    took = {profile: keep.kept(root, profile).get(name, {}) for profile in keep.profiles_of(notebook)}
    if "seconds" in record:
        took[record["profile"]] = record
    by_hardware = {}
    for profile, run in took.items():
        by_hardware.setdefault(run.get("hardware"), []).append(f"{duration(run['seconds'])} at `{profile}`" if run
                                                               else f"`{profile}`")
    unknown = by_hardware.pop(None, [])
    measured = [f"{', '.join(times)} on {hardware}" for hardware, times in by_hardware.items()]
    return [f"Runs in {'; '.join(measured)}." if measured else "",
            f"Not measured: {', '.join(unknown)}." if unknown else ""]


def chapter_line(root, notebook, record, name):
    """What a chapter costs, in reading and in running, with the notebook to take away."""
    words = sum(len(cell.source.split()) for cell in notebook.cells
                if "remove-cell" not in cell.metadata.get("tags", []))
    parts = [f"{max(1, round(words / WORDS_A_MINUTE))} min to read.", *run_times(root, notebook, record, name),
             f"{{download}}`Download this notebook <{name}.ipynb>`"]
    return "\n".join([":::{container} chapter-line", " ".join(filter(None, parts)), ":::"])


def insert_below_title(notebook, box):
    """Put the box right below the page's title."""
    first = notebook.cells[0]
    title, _, rest = first.source.lstrip().partition("\n")
    if first.cell_type == "markdown" and title.startswith("# "):
        first.source = f"{title}\n\n{box}\n{rest}"
    else:
        notebook.cells.insert(0, nbformat.v4.new_markdown_cell(box, id="provenance"))


def show_executed_copy(app, docname, content):
    """On source-read: `content` is a list of one string, the file's text."""
    if Path(app.env.doc2path(docname)).suffix != ".ipynb":
        return
    app.env.note_dependency(str(executed_path(app, docname)))
    for module in sorted(ROOT.joinpath("saelib").rglob("*.py")):
        app.env.note_dependency(str(module))
    for results in sorted(Path(app.srcdir, "book", "results").glob("*.json")):
        app.env.note_dependency(str(results))
    source = nbformat.reads(content[0], 4)
    executed = read_executed(app, docname, source)
    if executed is None:
        return
    with_outputs(source, executed)
    record = run_record(executed)
    line = chapter_line(app.srcdir, source, record, Path(docname).name)
    insert_below_title(source, f"{line}\n\n{provenance_box(record)}")
    content[0] = nbformat.writes(source)


def setup(app):
    app.add_config_value("executed_profile", os.environ.get("BOOK_PROFILE", "quick"), "env")
    app.connect("source-read", show_executed_copy)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
