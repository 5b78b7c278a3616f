"""The book's figures: one function for each kind, one table of colours and markers."""
import io
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

STYLE = Path(__file__).with_name("book.mplstyle")
LOOK = {"relu": ("#000000", "o"), "topk": ("#0072B2", "s"), "batchtopk": ("#009E73", "^"), "jumprelu": ("#D55E00", "D"),
        "gated": ("#CC79A7", "v"), "prolu": ("#332288", "x"), "spare": ("#882255", "+")}
SHADES = ("#0072B2", "#D55E00", "#009E73", "#882255", "#332288", "#7a7a7a")
PAPER_GREY = "#8a8a8a"

Points = list[tuple[float, list[float]]]  # x, and the y of each seed


class Picture(Figure):
    """A figure that a notebook shows as SVG, beside the numbers that are drawn in it.

    The numbers are what a notebook's test compares; the SVG is the same file whenever the numbers are the same.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.numbers: list[str] = []

    def svg(self) -> str:
        """The figure as SVG text, without a date."""
        with matplotlib.style.context(STYLE):
            buffer = io.StringIO()
            FigureCanvasSVG(self).print_svg(buffer, metadata={"Date": None, "Creator": None})
        return buffer.getvalue()

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict[str, str]:
        return {"image/svg+xml": self.svg(), "text/plain": "\n".join(self.numbers)}


def canvas(n_panels: int = 1, sharey: bool = True, height: float = 3.5) -> tuple[Picture, list[Axes]]:
    """An empty picture with `n_panels` axes side by side."""
    with matplotlib.style.context(STYLE):
        picture = Picture(figsize=(5.6 if n_panels == 1 else 2.2 + 2.4 * n_panels, height))
        axes = picture.subplots(1, n_panels, sharey=sharey, squeeze=False)[0]
    return picture, list(axes)


def plain_log(axes: Axes, x: bool = True, y: bool = True) -> None:
    """Logarithmic axes with plain numbers on them."""
    for wanted, set_scale, axis in ((x, axes.set_xscale, axes.xaxis), (y, axes.set_yscale, axes.yaxis)):
        if wanted:
            set_scale("log")
            axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_formatter(NullFormatter())


def band(axes: Axes, points: Points, label: str, color: str, marker: str, log: bool = True) -> None:
    """Every seed's point, the line through their (geometric) means, and the band from the least to the greatest."""
    points = sorted(points)
    xs = [x for x, _ in points]
    centre = [float(np.exp(np.mean(np.log(ys))) if log else np.mean(ys)) for _, ys in points]
    axes.plot(xs, centre, color=color, label=label)
    if max(len(ys) for _, ys in points) >= 3:
        axes.fill_between(xs, [min(ys) for _, ys in points], [max(ys) for _, ys in points], color=color, alpha=0.15, linewidth=0)
    for x, ys in points:
        axes.plot([x] * len(ys), ys, marker, color=color, markerfacecolor="none" if marker in "so^Dv" else color, linestyle="none")
    axes.annotate(label, (xs[-1], centre[-1]), xytext=(5, 0), textcoords="offset points", color=color, fontsize=8, va="center")


def versus(series: dict[str, Points], xlabel: str, ylabel: str, *, looks: dict[str, tuple[str, str]] | None = None, title: str = "",
           logx: bool = True, logy: bool = True, note: str = "", axes: Axes | None = None) -> Picture:
    """y against x for a few labelled series, with all seeds.

    Args:
        series: label -> [(x, [y of each seed])].
        xlabel, ylabel: with their units.
        looks: label -> (colour, marker); shades in order if None.
        title: of the panel.
        logx, logy: logarithmic axes.
        note: seeds, tokens and device, under the axes.
        axes: draw there instead of on a new picture.

    Returns:
        The picture; its numbers list every point.
    """
    picture, axes = (axes.figure, axes) if axes is not None else (lambda p, a: (p, a[0]))(*canvas())
    plain_log(axes, logx, logy)
    for i, (label, points) in enumerate(series.items()):
        color, marker = (looks or {}).get(label, (SHADES[i % len(SHADES)], "osD^vx"[i % 6]))
        band(axes, points, label, color, marker, log=logy)
        picture.numbers += [f"{title + ': ' if title else ''}{label}, x {x:.4g}: " + " ".join(f"{y:.4g}" for y in ys) for x, ys in sorted(points)]
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    axes.margins(x=0.12)
    if note:
        axes.annotate(note, (0, -0.24), xycoords="axes fraction", fontsize=7, color="#555555", va="top")
    return picture


def group(rows: Sequence[dict], key: Callable[[dict], object]) -> dict:
    """Rows by the value of `key`, in order of first appearance."""
    groups = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return dict(groups)


def points_of(rows: Sequence[dict], x: Callable[[dict], float], y: Callable[[dict], float]) -> Points:
    """Seeds that share a sparsity become one point: at their mean x, with every y."""
    members = group(rows, lambda row: row["config"]["sparsity"]).values()
    return [(float(np.mean([x(r) for r in m])), [y(r) for r in m]) for m in members]


def note_of(rows: Sequence[dict]) -> str:
    """Seeds, tokens and hardware of some rows, as every figure says them."""
    seeds = len({r["config"]["seed"] for r in rows})
    tokens = sorted({r["config"]["n_tokens"] for r in rows})
    hardware = sorted({r["provenance"]["hardware"] for r in rows})
    span = f"{tokens[0]:,}" if len(tokens) == 1 else f"{tokens[0]:,} to {tokens[-1]:,}"
    return f"{seeds} seed{'s' * (seeds > 1)}, {span} training tokens each, {', '.join(hardware)}"


def frontier(rows: Sequence[dict], *, panel: str = "subject", x: str = "l0", y: str = "normalized_mse",
             ylabel: str = "normalized MSE", logy: bool = True) -> Picture:
    """Reconstruction against sparsity: one panel for each subject (or other field of the config), one line a method.

    Args:
        rows: from `saelib.sweep`.
        panel: the field of the config that panels differ in.
        x, y: metrics.
        ylabel, logy: of the vertical axis.
    """
    from saelib.methods import METHODS
    panels = group(rows, lambda row: row["config"][panel])
    picture, axes = canvas(len(panels), sharey=False)
    for ax, (name, members) in zip(axes, panels.items()):
        by_method = group(members, lambda row: row["config"]["method"])
        series = {METHODS[m].label: points_of(rs, lambda r: r["metrics"][x], lambda r: r["metrics"][y]) for m, rs in by_method.items()}
        looks = {METHODS[m].label: LOOK[m] for m in by_method}
        versus(series, "active latents per token, L0", ylabel if ax is axes[0] else "", looks=looks, title=str(name), logy=logy, axes=ax)
    picture.supxlabel(note_of(rows), fontsize=7, color="#555555")
    return picture
