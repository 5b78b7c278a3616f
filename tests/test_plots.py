import math
import re

import pytest

from saelib import METHODS, marks, plots

SERIES = {"TopK": [(8, [0.3, 0.31, 0.29]), (32, [0.1, 0.11, 0.1])]}


def test_the_same_numbers_make_the_same_file():
    assert plots.versus(SERIES, "x", "y").svg() == plots.versus(SERIES, "x", "y").svg()


def test_a_figure_has_no_date_and_lists_its_numbers():
    picture = plots.versus(SERIES, "x", "y")
    bundle = picture._repr_mimebundle_()
    assert not re.search(r"dc:date|20\d\d-\d\d-\d\d", bundle["image/svg+xml"])
    assert bundle["text/plain"].splitlines() == ["TopK, x 8: 0.3 0.31 0.29", "TopK, x 32: 0.1 0.11 0.1"]


@pytest.mark.parametrize("log, centre", [(True, 0.2), (False, 0.7 / 3)])
def test_the_line_is_the_geometric_mean_on_a_logarithmic_axis_and_the_band_goes_from_least_to_greatest(log, centre):
    axes = plots.versus({"a": [(1, [0.1, 0.2, 0.4]), (2, [0.1, 0.2, 0.4])]}, "x", "y", logy=log).axes[0]
    assert list(axes.lines[0].get_ydata()) == pytest.approx([centre, centre])
    corners = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert (corners.min(), corners.max()) == (0.1, 0.4)


def run_of(method, sparsity, seed, l0, mse):
    config = {"subject": "pygpt", "method": method, "sparsity": sparsity, "n_latents": 64, "seed": seed,
              "n_tokens": 1000}
    return {"config": config, "metrics": {"l0": l0, "normalized_mse": mse}, "provenance": {"hardware": "a toy"}}


def test_a_frontier_draws_error_over_the_mean_l0_of_the_seeds_in_the_methods_own_colour():
    picture = plots.frontier([run_of("topk", k, seed, k + 2 * seed, 1 / k) for k in (8, 16) for seed in (0, 1)])
    line = picture.axes[0].lines[0]
    assert list(line.get_xdata()) == [9, 17] and list(line.get_ydata()) == pytest.approx([1 / 8, 1 / 16])
    assert line.get_color() == "#0072B2"
    assert picture.get_supxlabel() == "2 seeds, 1,000 training tokens each, a toy"


def test_every_method_of_the_paper_keeps_a_colour_of_its_own():
    colors, markers = (set(looks) for looks in zip(*marks.LOOK.values()))
    assert len(colors) == len(markers) == len(marks.LOOK)


def luminance(color):
    channels = [int(color[i: i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("key", list(marks.LOOK))
def test_colours_stand_out_on_white(key):
    assert 1.05 / (luminance(marks.LOOK[key][0]) + 0.05) >= 3


@pytest.mark.parametrize("sizes, labelled", [((256, 1024), [256, 1024]), ((0.3, 3.0), None),
                                             (range(100, 800, 100), None)])
def test_a_few_sizes_are_labelled_with_their_own_numbers(sizes, labelled):
    axes = plots.versus({"pygpt": [(n, [1.0]) for n in sizes]}, "n", "y").axes[0]
    assert (list(axes.get_xticks()) == labelled) == (labelled is not None)


def test_what_is_no_method_has_no_methods_colour():
    methods = {marks.LOOK[key][0] for key in ("relu", "topk", "batchtopk")}
    assert not methods & set(marks.SHADES)
    assert not any(look[0] in methods for name, look in plots.PENALTY_LOOK.items() if name != "L1")


def test_curves_list_what_was_measured_and_keep_a_labels_colour_in_every_panel():
    lines = {"a": ([0, 1], [0.0, 1.0]), "b": ([0, 1], [0.0, 1.0])}
    picture = plots.curves({"p": lines, "q": {"b": lines["b"]}}, "x", ("y", ""), dots={"q": {"b": ([0.5], [0.25])}})
    assert "q: b, measured: (0.5, 0.25)" in picture.numbers
    assert picture.axes[0].lines[1].get_color() == picture.axes[1].lines[0].get_color()


def test_labels_at_the_same_height_are_moved_apart_and_stay_beside_the_panel():
    picture = plots.curves({"p": {f"line {i}": ([0, 1], [0.0, 1.0]) for i in range(6)}}, "x", ("y",))
    picture.svg()  # names the lines
    heights = sorted(label.xyann[1] for label in picture.axes[0].texts)
    assert all(b - a > 0.06 for a, b in zip(heights, heights[1:])) and heights[-1] <= 1
    far = [abs(label.xyann[1] - label.xy[1]) > 0.04 for label in picture.axes[0].texts]
    # a thin line leads to the line's own end
    assert [label.arrow_patch is not None for label in picture.axes[0].texts] == far and any(far)


@pytest.mark.parametrize("rival, side", [((1.05, 1.0), "right"), ((2.0, 1.0), "left"), ((1.05, 9.0), "left"),
                                         ((0.95, 1.0), "left")])
def test_a_label_that_another_lines_end_would_cover_moves_to_the_left(rival, side):
    picture = plots.versus({"own": [(0.0, [9.0]), (1.0, [1.0])], "rival": [(0.0, [9.5]), (rival[0], [rival[1]])]}, "x",
                           "y", logx=False, logy=False)
    picture.svg()
    label, = (text for text in picture.axes[0].texts if text.get_text() == "own")
    assert label.get_horizontalalignment() == side


def test_a_name_stands_at_the_end_of_its_line_after_a_second_panel_has_stretched_the_axis_that_they_share():
    picture, panels = plots.canvas(2, sharey=True)
    for axes, top in zip(panels, (1.0, 10.0)):
        plots.versus({"own": [(0.0, [0.0]), (1.0, [top])]}, "x", "y", logx=False, logy=False, axes=axes)
    picture.svg()
    label, = panels[0].texts
    assert label.xyann[1] == pytest.approx(panels[0].transAxes.inverted().transform(panels[0].transData.transform(
        (1.0, 1.0)))[1])


def test_a_figure_that_is_saved_has_its_names_too(tmp_path):
    picture = plots.versus({"own": [(1.0, [1.0]), (2.0, [2.0])]}, "x", "y")
    picture.savefig(tmp_path / "figure.png")
    picture.savefig(tmp_path / "figure.pdf")
    assert [label.get_text() for label in picture.axes[0].texts] == ["own"]


def test_an_axis_of_many_decades_is_labelled_at_powers_of_ten_alone():
    few, many = (plots.versus({"a": [(1.11, [1.0]), (end, [1.0])]}, "x", "y").axes[0].xaxis for end in (30.3, 7e4))
    assert 2.0 in few.get_major_locator()() and 20.0 in few.get_major_locator()()
    assert all(round(math.log10(tick)) == pytest.approx(math.log10(tick)) for tick in many.get_major_locator()())


def row(subject="s", method="topk", **metrics):
    return {"config": {"subject": subject, "method": method, "sparsity": 4, "n_latents": 8, "seed": 0, "n_tokens": 9},
            "metrics": {"l0": 4.0, "normalized_mse": 0.1, "dead_fraction": 0.0} | metrics,
            "provenance": {"hardware": "CPU"}}


def test_a_method_without_a_colour_of_its_own_has_the_same_in_every_panel():
    rows = [row("a", "multi_topk"), row("b", "relu_l2"), row("b", "multi_topk", l0=5.0)]
    colors = [{line.get_label(): line.get_color() for line in axes.lines} for axes in plots.frontier(rows).axes]
    assert colors[0]["Multi-TopK"] == colors[1]["Multi-TopK"] != colors[1][METHODS["relu_l2"].label]


@pytest.mark.parametrize("rows, options, message", [
    ([], {}, "rows is []: it must be one row or more"),
    ([row()], {"panel": "foo"}, "panel is 'foo': it must be one of subject, method, sparsity, n_latents"),
    ([row()], {"y": "mse"}, "y is 'mse': it must be one of l0, normalized_mse, dead_fraction"),
    ([row()], {"y": "dead_fraction"},
     "rows is 'with dead_fraction 0 (topk, 4, seed 0)': it must be finite and above 0 in it, or logy=False"),
    ([row(), row(l0=math.nan)], {}, "rows is 'with l0 nan (topk, 4, seed 0)': it must be finite and above 0 in it"),
    ([row(normalized_mse=math.nan)], {"logy": False},
     "rows is 'with normalized_mse nan (topk, 4, seed 0)': it must be finite"),
    ([row(method="mine")], {}, "method is 'mine': it must be one of"),
])
def test_what_no_frontier_can_be_drawn_of_is_named(rows, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        plots.frontier(rows, **options)


def test_a_run_without_an_active_latent_is_left_out_and_counted():
    picture = plots.frontier([row(), row(method="relu", l0=0.0)])
    assert len(picture.numbers) == 1 and "left out: 1 without an active latent" in picture.get_supxlabel()


def test_a_histogram_counts_what_is_at_or_below_zero():
    picture = plots.histograms({"case": {"then": [-0.1, 0.0, 0.2, 0.4]}}, "x")
    assert picture.numbers == ["case, then: 0.5000 at or below 0, mean of the others 0.3"]


def test_a_histogram_of_large_values_has_no_more_bars_than_can_be_seen():
    picture = plots.histograms({"case": {"then": [-3e4, 1e5]}}, "x")
    edges = [bar.get_x() for bar in picture.axes[0].patches]
    assert 300 < len(edges) <= 402 and min(abs(edge) for edge in edges) < 1e-6
    with pytest.raises(ValueError, match="columns is 'a dict with NaN or Inf': it must be of finite numbers"):
        plots.histograms({"case": {"then": [0.0, math.nan]}}, "x")


def test_sizes_are_not_taken_for_seeds():
    rows = [{"config": {"subject": "synthetic", "method": "topk", "sparsity": k, "n_latents": n, "seed": 0,
                        "n_tokens": 100},
             "metrics": {"l0": k, "normalized_mse": 1 / n / k}, "provenance": {"hardware": "CPU"}} for n in (8, 16)
            for k in (4, 8)]
    with pytest.raises(ValueError, match="rows is 'of n_latents 16, 8 on one frontier': it must be alike in it: "
                       "leave some out, or set them apart by plots.frontier\\(panel='n_latents'\\)"):
        plots.frontier(rows)
    assert [axes.get_title() for axes in plots.frontier(rows,
                                                        panel="n_latents").axes] == ["n_latents 8", "n_latents 16"]


def test_methods_of_ones_own_are_told_apart():
    rows = [{"config": {"subject": "synthetic", "method": method, "sparsity": k, "n_latents": 8, "seed": 0,
                        "n_tokens": 100},
             "metrics": {"l0": k, "normalized_mse": 1 / k}, "provenance": {"hardware": "CPU"}}
            for method in ("topk", "multi_topk", "topk_ste") for k in (4, 8)]
    assert len({line.get_color() for line in plots.frontier(rows).axes[0].get_lines()}) == 3
