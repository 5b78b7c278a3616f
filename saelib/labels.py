"""Names of lines, beside the lines."""
from matplotlib.axes import Axes
from matplotlib.transforms import ScaledTranslation

LINE = 0.065  # the height of a label, as a share of the axes'


def name_ends(axes: Axes, ends: dict[str, tuple[float, float, str]]) -> None:
    """Write each label where its line ends, (x, y, colour): lower or higher where labels would meet, with a thin line to its own end if it is far
    from there, and on the left where another line ends."""
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
        beside_far = any(abs(x - at[other][0]) < 0.4 for other in far)  # all of a stack stand off, so that no line to an end crosses a name
        hidden = any(0 < other[0] - x < 0.15 and abs(other[1] - own[label][1]) < 0.05 for other in own.values())
        leader = {"arrowstyle": "-", "color": ends[label][2], "linewidth": 0.5, "shrinkA": 1, "shrinkB": 3, "relpos": (0, 0.5)} if label in far else None
        away = (-7, -5) if hidden else (12, 0) if beside_far else (5, 0)
        spot = axes.transAxes + ScaledTranslation(away[0] / 72, away[1] / 72, axes.figure.dpi_scale_trans)
        axes.annotate(label, own[label], (x, y), xycoords="axes fraction", textcoords=spot, color=ends[label][2], fontsize=8,
                      ha="right" if hidden else "left", va="center", arrowprops=leader)
