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

from saelib.checks import require
from saelib.marks import LOOK, PAPER_GREY, SHADES, Points, band, look_named, look_of, name_ends, plain_log
from saelib.origin import hardware
from saelib.subjects import pick_device

STYLE = Path(__file__).with_name("book.mplstyle")
PENALTY_LOOK = {"none": (SHADES[5], "x"), "L1": LOOK["relu"], "L2": (SHADES[1], "D"), "smooth 0.01": (SHADES[0], "^"),
                "smooth 0.1": (SHADES[2], "v"), "smooth 1": (SHADES[3], "s")}
WIDTH = 4.8  # inches of a single panel: on a phone it still fits, with labels that can be read
MOST_BARS = 400
ROWS_MIME = "application/vnd.saelib.rows+json"


class Picture(Figure):
    """A figure that a notebook shows as SVG, beside the numbers that are drawn in it.

    The numbers are what a notebook's test compares; the SVG is the same file whenever the numbers are the same.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.numbers: list[str] = []
        # where lines end: they are named once all panels are drawn, and share their axis
        self.ends: list[tuple[Axes, dict[str, tuple[float, float, str]]]] = []
        self.rows: list[dict] = []  # the runs behind a frontier, for the page's interactive figure

    def svg(self) -> str:
        """The figure as SVG text, without a date."""
        with matplotlib.style.context(STYLE):
            buffer = io.StringIO()
            FigureCanvasSVG(self).print_svg(buffer, metadata={"Date": None, "Creator": None})
        return buffer.getvalue()

    def draw(self, renderer) -> None:
        """What every kind of file is drawn by: the names of lines first."""
        while self.ends:
            name_ends(*self.ends.pop())
        super().draw(renderer)

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict:
        shown = {"image/svg+xml": self.svg(), "text/plain": "\n".join(self.numbers)}
        return shown | ({ROWS_MIME: self.rows} if self.rows else {})


def canvas(n_panels: int = 1, sharey: bool = True, height: float = 3.2) -> tuple[Picture, list[Axes]]:
    """An empty picture with `n_panels` axes side by side."""
    with matplotlib.style.context(STYLE):
        picture = Picture(figsize=(WIDTH if n_panels == 1 else 2.2 + 2.4 * n_panels, height))
        axes = picture.subplots(1, n_panels, sharey=sharey, squeeze=False)[0]
    return picture, list(axes)


def versus(series: dict[str, Points], xlabel: str, ylabel: str, *, looks: dict[str, tuple[str, str]] | None = None,
           title: str = "", logx: bool = True, logy: bool = True, note: str = "", rule: float | None = None,
           axes: Axes | None = None) -> Picture:
    """y against x for a few labelled series, with all seeds.

    Args:
        series: label -> [(x, [y of each seed])].
        xlabel, ylabel: with their units.
        looks: label -> (colour, marker); of other labels a method's own, or else shades in order.
        title, logx, logy: of the panel, and which of its axes are logarithmic.
        note: seeds, tokens and device, under the axes.
        rule: a y to draw a grey line at.
        axes: draw there instead of on a new picture.

    Returns:
        The picture; its numbers list every point.
    """
    axes = canvas()[1][0] if axes is None else axes
    picture = axes.figure
    plain_log(axes, logx, logy)
    if rule is not None:
        axes.axhline(rule, color=PAPER_GREY, linewidth=0.8)
    ends = {}
    for i, (label, points) in enumerate(series.items()):
        color, marker = (looks or {}).get(label, look_named(label, i))
        ends[label] = *band(axes, points, label, color, marker, log=logy), color
        picture.numbers += [f"{title + ': ' if title else ''}{label}, x {x:.4g}: " + " ".join(f"{y:.4g}" for y in ys)
                            for x, ys in sorted(points)]
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    axes.margins(x=0.12)
    at = sorted({x for points in series.values() for x, _ in points})
    # a few sizes or coefficients, each with its own number
    if logx and len(at) <= 6 and all(x in (int(x), float(f"{x:.1g}")) for x in at):
        axes.set_xticks(at)
    picture.ends.append((axes, ends))
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
    tokens = sorted({r["config"]["n_tokens"] for r in rows})
    return _note(len({r["config"]["seed"] for r in rows}), tokens, sorted({r["provenance"]["hardware"] for r in rows}))


def note(n_seeds: int, n_tokens: int, *more: str) -> str:
    """The same for what was trained here, without rows; `more` says what else it was made from."""
    return _note(n_seeds, [n_tokens], [hardware(pick_device("auto")), *more])


def _note(seeds: int, tokens: Sequence[int], rest: Sequence[str]) -> str:
    span = f"{tokens[0]:,}" if len(tokens) == 1 else f"{tokens[0]:,} to {tokens[-1]:,}"
    return f"{seeds} seed{'s' * (seeds > 1)}, {span} training tokens each, {', '.join(rest)}"


def frontier(rows: Sequence[dict], *, panel: str = "subject", y: str = "normalized_mse",
             ylabel: str = "normalized MSE", logy: bool = True) -> Picture:
    """Reconstruction against sparsity: one panel for each subject (or other field of the config), one line a method.

    Args:
        rows: from `saelib.sweep`. Those without an active latent have no place here: the note counts them.
        panel: the field of the config that panels differ in.
        y, ylabel, logy: the metric of the vertical axis, its label, and whether it is logarithmic.

    Raises:
        ValueError: no rows, or rows that do not belong together; a panel or metric that they lack, or that has no log.
    """
    from saelib.frontiers import check_comparable, check_drawable
    from saelib.methods import METHODS, find
    silent = [row for row in rows if row["metrics"].get("l0") == 0]
    rows = [row for row in rows if row not in silent]
    check_drawable(rows, panel, y, logy)
    panels = group(rows, lambda row: row["config"][panel])
    picture, axes = canvas(len(panels), sharey=False)
    for ax, (name, members) in zip(axes, panels.items()):
        check_comparable(members)
        by_method = group(members, lambda row: row["config"]["method"])
        series = {find(m).label: points_of(rs, lambda r: r["metrics"]["l0"], lambda r: r["metrics"][y])
                  for m, rs in by_method.items()}
        looks = {METHODS[m].label: look_of(m, [row["config"]["method"] for row in rows]) for m in by_method}
        versus(series, "active latents per token, L0", ylabel if ax is axes[0] else "", looks=looks,
               title=str(name) if panel == "subject" else f"{panel} {name}", logy=logy, axes=ax)
    left_out = f"; left out: {len(silent)} without an active latent" if silent else ""
    picture.supxlabel(note_of(rows) + left_out, fontsize=7, color="#555555")
    if y == "normalized_mse":
        picture.rows = [plain_row(row) for row in rows]
    return picture


def plain_row(row: dict) -> dict:
    """What a reader wants to know of one run's point, without what only a rerun needs."""
    config = {name: row["config"][name] for name in ("subject", "method", "sparsity", "n_latents", "seed", "n_tokens")}
    measured = {name: float(f"{row['metrics'][name]:.5g}") for name in ("l0", "normalized_mse")}
    return config | measured | {"device": row["provenance"]["hardware"]}


Line = tuple[Sequence[float], Sequence[float]]  # xs, and their ys


def curves(panels: dict[str, dict[str, Line]], xlabel: str, ylabels: Sequence[str], *,
           looks: dict[str, tuple[str, str]] | None = None, dashed: Sequence[str] = (),
           dots: dict[str, dict[str, Line]] | None = None, note: str = "") -> Picture:
    """Plain lines, a few labelled ones in each panel, on linear axes.

    Args:
        panels: title -> label -> (xs, ys). A label has one colour in all panels.
        xlabel, ylabels: with their units; one ylabel for each panel.
        looks: label -> (colour, marker); of other labels a method's own, or else shades in order.
        dashed: labels of the lines that are dashed.
        dots: title -> label -> (xs, ys) of markers in the colour of the line with that label: what was measured.
        note: what the figure was made from, under the axes.

    Returns:
        The picture; its numbers list about eight points of each line, and every dot.
    """
    picture, all_axes = canvas(len(panels), sharey=False)
    picture.set_layout_engine("constrained")
    labels = list(dict.fromkeys(label for lines in panels.values() for label in lines))
    color = {label: (looks or {}).get(label, look_named(label, i))[0] for i, label in enumerate(labels)}
    for axes, ylabel, (title, lines) in zip(all_axes, ylabels, panels.items()):
        for label, (xs, ys) in lines.items():
            axes.plot(xs, ys, color=color[label], linestyle="--" if label in dashed else "-",
                      zorder=2 + (label in dashed))
            some = range(0, len(xs), max(1, len(xs) // 8))
            picture.numbers.append(f"{title}: {label}: " + " ".join(f"({xs[i]:.4g}, {ys[i]:.4g})" for i in some))
        for label, (xs, ys) in (dots or {}).get(title, {}).items():
            axes.plot(xs, ys, "o", color=color[label], markersize=4, zorder=4)
            picture.numbers.append(f"{title}: {label}, measured: "
                                   + " ".join(f"({x:.4g}, {y:.4g})" for x, y in zip(xs, ys)))
        axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
        picture.ends.append((axes, {label: (xs[-1], ys[-1], color[label]) for label, (xs, ys) in lines.items()}))
    if note:
        picture.supxlabel(note, fontsize=7, color="#555555")
    return picture


def histograms(columns: dict[str, dict[str, Sequence[float]]], xlabel: str, *, note: str = "") -> Picture:
    """Histograms of one quantity at several moments: a column for each case, a row for each moment, what lies at or
    below 0 in grey.

    Args:
        columns: case -> moment -> values.
        xlabel, note: with its units; what the figure was made from.

    Returns:
        The picture; its numbers are the share of values at or below 0 and the mean of the others, in every panel.
    """
    every = np.concatenate([values for moments in columns.values() for values in moments.values()])
    require(bool(np.isfinite(every).all()), "columns", "a dict with NaN or Inf", "of finite numbers")
    per_unit = min(20, MOST_BARS / max(1, np.ptp(every)))
    edges = np.arange(np.floor(every.min() * per_unit), np.ceil(every.max() * per_unit) + 1) / per_unit  # 0 is an edge
    with matplotlib.style.context(STYLE):
        picture = Picture(figsize=(WIDTH, 1.1 + 0.95 * max(map(len, columns.values()))), layout="constrained")
        grid = picture.subplots(max(map(len, columns.values())), len(columns), sharex=True, sharey=True, squeeze=False)
    for j, (case, moments) in enumerate(columns.items()):
        for i, (moment, values) in enumerate(moments.items()):
            axes, values = grid[i][j], np.asarray(values)
            _, _, bars = axes.hist(values, edges, weights=np.full(len(values), 1 / len(values)), color=SHADES[0])
            for left, bar in zip(edges, bars):
                bar.set_facecolor(SHADES[0] if left > -1e-9 else "#b4b4b4")
            silent = float((values <= 0).mean())
            axes.set_title(case if i == 0 else "", loc="left")
            axes.set(yscale="log", ylabel=moment if j == 0 else "",
                     xlabel=xlabel if i == len(moments) - 1 else "")
            axes.set_title(f"{silent:.0%} zeros", fontsize=8, loc="right", pad=2)
            picture.numbers.append(f"{case}, {moment}: {silent:.4f} at or below 0, mean of the others "
                                   f"{values[values > 0].mean() if silent < 1 else 0:.4g}")
    picture.supylabel("share of tokens, logarithmic", fontsize=8)
    if note:
        picture.supxlabel(note, fontsize=7, color="#555555")
    return picture
