"""Every file that a page needs comes with the site: MathJax from a Python package; no thebe, no require.js."""
import importlib.util
import shutil
from pathlib import Path

MATHJAX_PARTS = ["tex-mml-chtml.js", "output/chtml/fonts/woff-v2"]


def name_local_scripts(app, config):
    config.mathjax_path = "mathjax/tex-mml-chtml.js"
    config.nb_ipywidgets_js = {}


def copy_mathjax(app, exception):
    if exception or app.builder.format != "html":
        return
    package = Path(importlib.util.find_spec("sphinx-mathjax-offline").origin).parent
    for part in MATHJAX_PARTS:
        source = package / "static" / "mathjax" / part
        target = Path(app.outdir, "_static", "mathjax", part)
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True)
        else:
            shutil.copy2(source, target)


def belongs_to_thebe(asset):
    body = getattr(asset, "attributes", {}).get("body") or ""
    return "THEBE" in body or "sphinx-thebe" in str(getattr(asset, "filename", asset))


def drop_thebe(app, pagename, templatename, context, doctree):
    for kind in ("script_files", "css_files"):
        context[kind] = [asset for asset in context.get(kind, []) if not belongs_to_thebe(asset)]


def setup(app):
    app.connect("config-inited", name_local_scripts, priority=900)
    app.connect("html-page-context", drop_thebe, priority=900)
    app.connect("build-finished", copy_mathjax)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
