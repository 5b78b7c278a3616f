"""```{pygpt-losses}```: a table of the built-in model's held-out loss beside those of n-gram models, out of its
training log."""
import json
from pathlib import Path

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

LOG = Path("saelib", "pygpt", "train_log.jsonl")
NAMES = {"unigram": "unigram", "bigram": "bigram, with back-off", "trigram": "trigram, with back-off",
         "held_out": "pygpt"}


class Losses(SphinxDirective):
    """One row a model; the last one says by how much pygpt beats the trigram."""

    def run(self):
        path = Path(self.env.srcdir, LOG)
        self.env.note_dependency(str(path))
        last = json.loads(path.read_text("utf8").splitlines()[-1])
        rows = [(name, f"{last[key]:.2f}") for key, name in NAMES.items()]
        rows.append(("pygpt below the trigram by", f"{last['trigram'] - last['held_out']:.2f}"))
        group = nodes.tgroup(cols=2)
        group += [nodes.colspec(colwidth=3), nodes.colspec(colwidth=1)]
        group += nodes.thead("", self.row("model", "held-out loss"))
        group += nodes.tbody("", *[self.row(*row) for row in rows])
        return [nodes.table("", group)]

    def row(self, *cells):
        return nodes.row("", *[nodes.entry("", nodes.paragraph(text=cell)) for cell in cells])


def setup(app):
    app.add_directive("pygpt-losses", Losses)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
