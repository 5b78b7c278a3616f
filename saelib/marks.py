"""What figures are drawn with: colours and markers, logarithmic axes, lines with bands, and names at their ends."""
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from matplotlib.transforms import ScaledTranslation

from saelib.methods import METHODS

LOOK = {"relu": ("#000000", "o"), "topk": ("#0072B2", "s"), "batchtopk": ("#009E73", "^")}
SHADES = ("#332288", "#D55E00", "#7A6A00", "#882255", "#B8468F", "#7a7a7a")  # of what is no method
PAPER_GREY = "#8a8a8a"
MANY = 500  # largest over least of an axis that has no room for labels between powers of ten
LINE = 0.065  # the height of a label, as a share of the axes'

Points = list[tuple[float, list[float]]]  # x, and the y of each seed


def shade(i: int) -> tuple[str, str]:
    """Colour and marker number i of what is no method."""
    return SHADES[i % len(SHADES)], "osD^vx"[i % 6]


def look_of(method: str, methods: Sequence[str]) -> tuple[str, str]:
    """Colour and marker of a method: its own, or else a shade, by its place in `methods` among those without one."""
    others = [key for key in dict.fromkeys(methods) if key not in LOOK]
    return LOOK[method] if method in LOOK else shade(others.index(method))


def look_named(label: str, i: int) -> tuple[str, str]:
    """Colour and marker of a line's label: those of the method of that name, or else shade number i."""
    return {METHODS[key].label: look for key, look in LOOK.items()}.get(label, shade(i))


class Decades(LogLocator):
    """1, 2 and 5 times the powers of ten; of an axis of many decades, which has no room for these, the powers alone."""

    def tick_values(self, vmin, vmax):
        self.set_params(subs=(1.0,) if vmax > MANY * vmin else (1.0, 2.0, 5.0))
        return super().tick_values(vmin, vmax)


def plain_log(axes: Axes, x: bool = True, y: bool = True) -> None:
    """Logarithmic axes with plain numbers on them."""
    for wanted, set_scale, axis in ((x, axes.set_xscale, axes.xaxis), (y, axes.set_yscale, axes.yaxis)):
        if wanted:
            set_scale("log")
            axis.set_major_locator(Decades())
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1e4 else f"{value:g}"))
            axis.set_minor_formatter(NullFormatter())


def band(axes: Axes, points: Points, label: str, color: str, marker: str, log: bool = True) -> tuple[float, float]:
    """Every seed's point, the line through their (geometric) means, and the band from the least to the greatest.
    Returns the line's right end."""
    points = sorted(points)
    xs = [x for x, _ in points]
    centre = [float(np.exp(np.mean(np.log(ys))) if log else np.mean(ys)) for _, ys in points]
    axes.plot(xs, centre, color=color, label=label)
    if max(len(ys) for _, ys in points) >= 3:
        axes.fill_between(xs, [min(ys) for _, ys in points], [max(ys) for _, ys in points], color=color, alpha=0.15,
                          linewidth=0)
    for x, ys in points:
        axes.plot([x] * len(ys), ys, marker, color=color, markerfacecolor="none" if marker in "so^Dv" else color,
                  linestyle="none")
    return xs[-1], centre[-1]


def name_ends(axes: Axes, ends: dict[str, tuple[float, float, str]]) -> None:
    """Write each label where its line ends, (x, y, colour): lower or higher where labels would meet, with a thin line
    to its own end if it is far from there, and on the left where another line ends."""
    axes.get_xlim(), axes.get_ylim()  # matplotlib sets the limits when asked for them, and the transform needs them
    to_axes = axes.transData + axes.transAxes.inverted()
    at = {label: list(to_axes.transform((x, y))) for label, (x, y, _) in ends.items()}
    order = sorted(at, key=lambda label: at[label][1])
    for i, label in enumerate(order):
        for lower in order[:i]:
            if abs(at[label][0] - at[lower][0]) < 0.4:
                at[label][1] = max(at[label][1], at[lower][1] + LINE)
    for i, label in reversed(list(enumerate(order))):  # what was pushed out at the top comes down again
        above = [at[higher][1] - LINE for higher in order[i + 1:] if abs(at[label][0] - at[higher][0]) < 0.4]
        at[label][1] = min(at[label][1], 1.0, *above)
    own = {label: to_axes.transform(end[:2]) for label, end in ends.items()}
    far = [label for label, (_, y) in at.items() if abs(y - own[label][1]) > 0.04]
    for label, (x, y) in at.items():
        # all of a stack stand off, so that no line to an end crosses a name
        beside_far = any(abs(x - at[other][0]) < 0.4 for other in far)
        hidden = any(0 < other[0] - x < 0.15 and abs(other[1] - own[label][1]) < 0.05 for other in own.values())
        leader = {"arrowstyle": "-", "color": ends[label][2], "linewidth": 0.5, "shrinkA": 1, "shrinkB": 3,
                  "relpos": (0, 0.5)}
        away = (-7, -5) if hidden else (12, 0) if beside_far else (5, 0)
        spot = axes.transAxes + ScaledTranslation(away[0] / 72, away[1] / 72, axes.figure.dpi_scale_trans)
        axes.annotate(label, own[label], (x, y), xycoords="axes fraction", textcoords=spot, color=ends[label][2],
                      fontsize=8, ha="right" if hidden else "left", va="center",
                      arrowprops=leader if label in far else None)
