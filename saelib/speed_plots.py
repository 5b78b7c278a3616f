"""Figures of what a step costs: from the benchmark's rows to pictures (see `saelib.bench`)."""
from collections.abc import Sequence

from matplotlib.ticker import LogLocator

from saelib.marks import PAPER_GREY, SHADES, plain_log
from saelib.plots import Picture, canvas, group

CASE_TITLES = {"floor": "floors", "topk": "TopK, nothing dead", "auxk": "TopK, 5 % dead, AuxK on",
               "relu": "ReLU + L1, half active", "relu_few": "ReLU + L1, k active"}
AXIS_TITLES = {"n_latents": "number of latents, n", "k": "active latents, k", "batch_size": "tokens in a batch"}


def color_of(name: str) -> str:
    """Floors grey, saelib dark, what it is compared with orange."""
    if name.startswith("saelib"):
        return SHADES[0]
    return PAPER_GREY if any(word in name for word in ("GEMM", "alone", "copy")) else SHADES[1]


def note_of(rows: Sequence[dict]) -> str:
    """Machine, versions and commit of the rows, as every figure here says them."""
    made = {(p["hardware"] if row["setting"].get("device") == "cuda"
             else f"{p['processor']}, {p['threads']} thread{'s' * (p['threads'] > 1)}",
             p["torch"], p["commit"], row["date"]) for row in rows for p in [row["provenance"]]}
    libraries = ", ".join(sorted({row["version"] for row in rows if "version" in row}))
    return "; ".join(f"{hardware}, torch {torch}, commit {commit}, {date}"
                     for hardware, torch, commit, date in sorted(made)) + (libraries and f"\n{libraries}")


def sizes_of(row: dict) -> str:
    """The setting of a row, in the order in which sizes are said in the text."""
    s = row["setting"]
    return f"d = {s['d_model']}, n = {s['n_latents']}, k = {s['k']}, batch {s['batch_size']}"


def multiples(rows: Sequence[dict]) -> Picture:
    """Every step of one table as a multiple of the encoder's product: a dot at the median, a bar between the quartiles.
    What takes less than a fiftieth of it is listed and not drawn.

    Args:
        rows: of the table "steps" at one setting.

    Returns:
        The picture; its numbers list median and quartiles of every row.
    """
    rows = [row for row in rows if "ratio" in row]
    cases = group([row for row in rows if row["ratio"]["median"] > 0.02], lambda row: row["case"])
    picture, (axes,) = canvas(height=1.0 + 0.19 * (len(rows) + len(cases)))
    picture.set_layout_engine("constrained")
    labels, y = [], 0.0
    for case, members in cases.items():
        labels.append((y, CASE_TITLES.get(case, case), True))
        for row in members:
            y += 1
            ratio, color = row["ratio"], color_of(row["name"])
            axes.plot([ratio["q1"], ratio["q3"]], [y, y], color=color, linewidth=3, alpha=0.35, solid_capstyle="butt")
            axes.plot([ratio["median"]], [y], "o", color=color, markersize=4)
            axes.annotate(f"{ratio['median']:.2g}", (ratio["q3"], y), xytext=(5, 0), textcoords="offset points",
                          fontsize=7, va="center", color=color,
                          bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5})
            labels.append((y, row["name"], False))
        y += 1
    picture.numbers += [f"{row['case']}: {row['name']}: {q['median']:.4g} [{q['q1']:.4g}, {q['q3']:.4g}]"
                        for row in rows for q in [row["ratio"]]]
    axes.axvline(1, color=PAPER_GREY, linewidth=0.8)
    plain_log(axes, y=False)
    axes.margins(x=0.12)
    axes.set(ylim=(y - 0.4, -0.6), xlabel="multiples of the encoder's product")
    axes.set_yticks([at for at, _, _ in labels], [text for _, text, _ in labels], fontsize=8)
    for tick, (_, _, heading) in zip(axes.get_yticklabels(), labels):
        tick.set_fontweight("bold" if heading else "normal")
    picture.supxlabel(f"{sizes_of(rows[0])}\n{note_of(rows)}", fontsize=7, color="#555555")
    return picture


def against(rows: Sequence[dict]) -> Picture:
    """Milliseconds of a step against n, k and the batch, one panel each, with the product that lies under it.

    Args:
        rows: of the table "curves".

    Returns:
        The picture; its numbers list every point.
    """
    panels = group([row for row in rows if "ms" in row], lambda row: row["axis"])
    picture, all_axes = canvas(len(panels))
    picture.set_layout_engine("constrained")
    for axes, (axis, members) in zip(all_axes, panels.items()):
        plain_log(axes)
        ends = {}
        for name, points in group(members, lambda row: row["name"]).items():
            points = sorted(points, key=lambda row: row["setting"][axis])
            xs, ms = [row["setting"][axis] for row in points], [row["ms"] for row in points]
            known = not name.startswith("saelib") or name == points[0]["auto"]  # what `fit` does not choose is broken
            dash, color = "-" if known else "--" if "fp32" in name else ":", color_of(name)
            axes.plot(xs, [m["median"] for m in ms], dash, color=color, marker="o", markersize=3)
            axes.fill_between(xs, [m["q1"] for m in ms], [m["q3"] for m in ms], color=color, alpha=0.15, linewidth=0)
            ends[name] = xs[-1], ms[-1]["median"], color
            picture.numbers.append(f"{axis}: {name}: " + " ".join(f"({x}, {m['median']:.4g})" for x, m in zip(xs, ms)))
        axes.set(xlabel=AXIS_TITLES[axis], ylabel="milliseconds a step" if axes is all_axes[0] else "")
        axes.set_xticks(xs[::2], [f"{x:,}" for x in xs[::2]])
        axes.margins(x=0.1)
        if axes is all_axes[-1]:
            picture.ends.append((axes, ends))
    picture.supxlabel(note_of(rows), fontsize=7, color="#555555")
    return picture


def apart(rows: Sequence[dict]) -> Picture:
    """Each part of a step: what its count predicts (a ring) and what it took (a dot), in milliseconds.

    Args:
        rows: of the table "parts" at one setting, those with a prediction.

    Returns:
        The picture; its numbers list both, and measured over predicted.
    """
    picture, (axes,) = canvas(height=1.2 + 0.27 * len(rows))
    picture.set_layout_engine("constrained")
    for y, row in enumerate(rows):
        took, predicted = row["ms"]["median"], row["predicted_ms"]
        axes.plot([predicted, took], [y, y], color=PAPER_GREY, linewidth=1)
        axes.plot([predicted], [y], "o", color="#000000", markerfacecolor="#ffffff")
        axes.plot([took], [y], "o", color=SHADES[0])
        axes.annotate(f"{took / predicted:.1f}x", (max(took, predicted), y), xytext=(7, 0), textcoords="offset points",
                      fontsize=8, va="center")
        picture.numbers.append(f"{row['name']}: predicted {predicted:.4g} ms by {row['bound']}, measured {took:.4g} "
                               f"ms, ratio {took / predicted:.3g}")
    plain_log(axes, y=False)
    axes.xaxis.set_major_locator(LogLocator())  # parts of a GPU's step span four decades
    axes.margins(x=0.15)
    axes.set(ylim=(len(rows) - 0.5, -0.5), xlabel="milliseconds: predicted (ring),\nmeasured (dot)")
    axes.set_yticks(range(len(rows)), [f"{row['name']} ({row['bound']})" for row in rows], fontsize=8)
    picture.supxlabel(f"{sizes_of(rows[0])}\n{note_of(rows)}", fontsize=7, color="#555555")
    return picture
