"""```{latent-explorer}```: the page that looks into latents, with the data that tools/make_explorer.py made.

The data come from runs/PROFILE/explorer; for the profile `committed` from those of `quick`, which `make test` makes.
Data that are missing, or that other code made, are a warning, and so fail a strict build. Without JavaScript the page
still says what was trained, and what it would show.
"""
import html
import shutil
from pathlib import Path

from docutils import nodes
from executed import ROOT  # noqa: F401 (it puts the root on the path)
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

from tools import make_explorer

logger = logging.getLogger(__name__)
ASSETS = Path("_static", "explorer")
WITHOUT_SCRIPT = """\
<noscript><p class="explorer-note">This page draws its latents with JavaScript, which is off here. It would show, for
each latent of the two autoencoders above, how often it fires, the held-out text that it fires on most, and the next
tokens that it makes more and less likely.</p></noscript>
"""
PARTS = ("latents", "Latents", WITHOUT_SCRIPT), ("programs", "A program through both", "")


def profile_of(app):
    profile = app.config.executed_profile
    return "quick" if profile == "committed" else profile


def data_folder(app):
    return Path(app.srcdir, "runs", profile_of(app), "explorer")


def check(app, about, location):
    """Warn where the data cannot be trusted."""
    remedy = f"python tools/make_explorer.py {profile_of(app)}"
    if not about:
        logger.warning("explorer: no data: %s", remedy, location=location, type="explorer")
    elif about.get("code") != make_explorer.code_hash(profile_of(app)):
        logger.warning("explorer: saelib has changed since its data were made: %s", remedy, location=location,
                       type="explorer")


def summary(about):
    """The two autoencoders as a table in HTML, a column each, which fits a phone."""
    saes = about["saes"].values()
    rows = {
        "Setting": [f"{'k' if sae['knob'] == 'k' else 'λ'} = {sae['sparsity']:.3g}" for sae in saes],
        "Latents": [f"{sae['n_latents']:,}" for sae in saes],
        "L0": [f"{sae['l0']:.1f}" for sae in saes],
        "Normalized MSE": [f"{sae['normalized_mse']:.3f}" for sae in saes],
        "Dead latents": [f"{sae['dead_fraction']:.1%}" for sae in saes],
    }
    head = "".join(f'<th scope="col">{html.escape(sae["label"])}</th>' for sae in saes)
    body = "".join(f'<tr><th scope="row">{name}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
                   for name, cells in rows.items())
    note = (f"Profile {about['profile']}: {about['training_tokens']:,} training tokens, on "
            f"{html.escape(about['hardware'])}, "
            f"{about['date']}. Latents are shown on {about['text_tokens']:,} tokens of held-out files.")
    return (f'<table class="table explorer-summary"><thead><tr><th '
            f'scope="col">Autoencoder</th>{head}</tr></thead><tbody>{body}</tbody></table>'
            f'<p class="explorer-note">{note}</p>')


def part(name, title, body):
    """A section of the page, so that its contents list it, with a place that the script fills."""
    return nodes.section("", nodes.title("", title), nodes.raw("", f'{body}<div data-part="{name}"></div>',
                                                               format="html"), ids=[f"explorer-{name}"])


class LatentExplorer(SphinxDirective):
    """The places on the page that the script fills."""

    def run(self):
        about_path = data_folder(self.env.app) / "about.json"
        self.env.note_dependency(str(about_path))
        about = make_explorer.about_of(about_path.parent)
        check(self.env.app, about, self.get_location())
        self.env.metadata[self.env.docname]["explorer"] = True
        if not about:
            return []
        root = "../" * self.env.docname.count("/") + ASSETS.as_posix()
        begin = nodes.raw("", f'{summary(about)}<div id="latent-explorer" data-root="{root}/">', format="html")
        return [begin, *(part(name, title, body) for name, title, body in PARTS),
                nodes.raw("", "</div>", format="html")]


def add_assets(app, pagename, templatename, context, doctree):
    if app.env.metadata.get(pagename, {}).get("explorer"):
        app.add_js_file("dom.js", loading_method="defer", priority=400)
        app.add_js_file("explorer.js", loading_method="defer")
        app.add_css_file("explorer.css")


def copy_data(app, exception):
    folder = data_folder(app)
    if exception or app.builder.format != "html" or not folder.exists():
        return
    target = Path(app.outdir, ASSETS)
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(folder, target)


def setup(app):
    app.setup_extension("executed")
    app.add_directive("latent-explorer", LatentExplorer)
    app.connect("html-page-context", add_assets)
    app.connect("build-finished", copy_data)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
