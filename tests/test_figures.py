import numpy as np
import pytest

from gradalign import figures


def luminance(code):
    return sum(w * int(code[i : i + 2], 16) for w, i in ((0.2126, 1), (0.7152, 3), (0.0722, 5)))


def test_named_methods_have_their_own_colours_and_others_keep_theirs():
    methods = ["none", "mean", "pcgrad", "gradvac", "cagrad"]
    assert len({figures.color(m) for m in methods}) == 5
    assert figures.color("mgda") == figures.color("mgda")
    # Dark enough for text on white.
    assert all(luminance(figures.color(m)) < 170 for m in [*methods, "mgda", "upgrad", "dualproj"])


def test_same_figure_same_bytes():
    def draw(kind):
        with figures.styled():
            figure = figures.new_figure(4, 3)
            axes = figure.add_subplot()
            figures.label(axes, figures.draw_epochs(axes, {"none": [np.arange(3.0)]}))
        return figures.to_bytes(figure, kind)

    for kind in ("svg", "png"):
        assert draw(kind) == draw(kind)


@pytest.mark.parametrize("ends", [[0.5] * 5, [0.0, 0.01, 0.5, 0.99, 1.0], [1.0] * 5, [0.0] * 5])
def test_labels_never_overlap(ends):
    methods = ["none", "mean", "pcgrad", "gradvac", "cagrad"]
    axes = figures.new_figure(4, 3).add_subplot()
    axes.set_ylim(0, 1)
    figures.label(axes, dict(zip(methods, ends, strict=True)))
    heights = sorted(text.xy[1] for text in axes.texts)
    assert len(heights) == 5
    assert np.diff(heights).min() > 0.07
    assert heights[0] >= 0
    assert heights[-1] <= 1


def test_means_stop_where_the_first_seed_stopped():
    axes = figures.new_figure(4, 3).add_subplot()
    figures.draw_epochs(axes, {"pcgrad": [np.array([3.0, 2.0, 1.0]), np.array([5.0, 4.0])]})
    bold = max(axes.lines, key=lambda line: line.get_linewidth())
    assert bold.get_xdata().tolist() == [1, 2]
    assert bold.get_ydata().tolist() == [4.0, 3.0]


def test_rings_mark_the_best_epochs_and_names_stand_at_the_ends():
    axes = figures.new_figure(4, 3).add_subplot()
    curves = {"none": [np.array([3.0, 1.0, 2.0])], "pcgrad": [np.array([5.0, 4.0])]}
    ends = figures.draw_epochs(axes, curves, best={"none": [2], "pcgrad": [0]})
    assert ends == {"none": 2.0, "pcgrad": 4.0}
    rings = [line for line in axes.lines if line.get_color() == "white"]
    assert [(list(ring.get_xdata()), list(ring.get_ydata())) for ring in rings] == [([2], [1.0])]
    figures.label(axes, {"none": np.nan, "pcgrad": 4.0})
    assert [text.get_text() for text in axes.texts] == ["pcgrad"]


def test_attacks_are_sorted_by_their_errors_and_those_of_training_come_last():
    axes = figures.new_figure(4, 3).add_subplot()
    values = {"old": {"0": 90.0}, "easy": {"0": 1.0, "1": 3.0}, "hard": {"0": 50.0, "1": 52.0}}
    figures.draw_attacks(axes, {"none": values}, {"old"})
    assert [text.get_text() for text in axes.get_yticklabels()] == ["hard", "easy", "old (seen)"]
    assert axes.yaxis_inverted()
    places = [(list(line.get_xdata()), line.get_ydata()[0]) for line in axes.lines]
    assert places == [([50, 52], 0), ([51], 0), ([1, 3], 1), ([2], 1), ([90, 90], 2), ([90], 2)]


def test_cosines_are_drawn_as_they_are():
    cosines = np.linspace(-1, 0.5, 101)
    bands, layers, shares = figures.new_figure(9, 3).subplots(1, 3)
    figures.draw_cosines(bands, [cosines], "none", bins=1)
    _, middle, agreeing, conflicting = bands.lines
    assert (list(middle.get_xdata()), list(middle.get_ydata())) == ([50.5], [-0.25])
    assert list(agreeing.get_ydata()) == list(cosines[cosines >= 0])
    assert list(conflicting.get_ydata()) == list(cosines[cosines < 0])
    figures.draw_layers(layers, ["in", "out"], np.array([[0.1, -0.2], [0.3, 0.4], [0.5, 0.6]]))
    assert layers.images[0].get_array().tolist() == [[0.1, 0.3, 0.5], [-0.2, 0.4, 0.6]]
    # The first row on top, beside its name.
    assert list(layers.images[0].get_extent()) == [0, 3, 2, 0]
    assert [text.get_text() for text in layers.get_yticklabels()] == ["in", "out"]
    figures.draw_parameters(shares, ["a.weight", "b.weight"], {"none": [np.array([0, 0.5]), np.array([0.5, 1])]})
    assert list(shares.lines[0].get_ydata()) == [25, 75]


def test_det_diagonal_is_where_both_errors_agree():
    miss = np.linspace(0, 1, 101)
    axes = figures.new_figure(4, 4).add_subplot()
    figures.draw_det(axes, {"none": [(1 - miss, miss)]})
    bold = max(axes.lines, key=lambda line: line.get_linewidth())
    x, y = bold.get_xdata(), bold.get_ydata()
    # miss + accept = 1 is the other diagonal in probit scale, which meets the EER's at 50%, the origin.
    assert np.allclose(x, -y, atol=0.05)
    assert np.ptp(x) > 4
    # In percent.
    assert [text.get_text() for text in axes.get_xticklabels()][-3:] == ["40", "60", "80"]


def test_curves_with_gaps_and_without_steps_are_drawn():
    axes = figures.new_figure(4, 3).add_subplot()
    figures.draw_cosines(axes, [np.array([np.nan, 0.5, -0.5]), np.zeros(0)], "none")
    figures.draw_cosines(axes, [np.full(4, np.nan)], "none")
    figures.draw_epochs(axes, {"none": [np.zeros(0)]})


def extents(figure, axes):
    figure.draw_without_rendering()
    return [text.get_window_extent() for text in axes.texts]


def draw_easy_det(axes):
    miss = np.linspace(0, 1, 1001)
    figures.draw_det(axes, {"none": [((1 - miss) ** 40, miss)], "pcgrad": [((1 - miss) ** 60, miss)]})


def draw_close_attacks(axes):
    figures.draw_attacks(
        axes, {m: {"new": {"0": 50.0, "1": 51.0}, "old": {"0": 9.0}} for m in ("none", "pcgrad")}, set()
    )


@pytest.mark.parametrize("draw", [draw_easy_det, draw_close_attacks])
def test_names_stand_beside_the_axes_and_apart(draw):
    figure = figures.new_figure(5, 4)
    axes = figure.add_subplot()
    draw(axes)
    first, second = extents(figure, axes)
    assert min(first.x0, second.x0) > axes.get_window_extent().x1
    assert max(first.x1, second.x1) < figure.bbox.x1
    assert first.y0 > second.y1


def test_seeds_close_together_are_told_apart_and_nothing_lies_on_their_lines():
    figure = figures.new_figure(6.4, 4)
    axes = figure.add_subplot()
    figures.draw_seeds(axes, {m: {"0": 41.0, "1": 41.5, "2": 41.9} for m in ("none", "pcgrad")})
    assert extents(figure, axes) == []
    assert [text.get_text() for text in axes.get_xticklabels()] == ["none\n41.5", "pcgrad\n41.5"]
    heights = axes.transData.transform([(0, v) for v in (41.0, 41.5, 41.9)])[:, 1]
    dots = next(line for line in axes.lines if line.get_marker() == "o")
    assert np.diff(heights).min() > 2 * dots.get_markersize() * figure.dpi / 72
    # A method may lack a seed.
    figures.draw_seeds(figure.add_subplot(), {"none": {"0": 41.0, "1": 42.0}, "pcgrad": {"0": 43.0}})


def test_axes_of_nothing_but_zeros_have_a_sensible_length():
    parameters, seeds, attacks = figures.new_figure(9, 3).subplots(1, 3)
    figures.draw_parameters(parameters, ["a.weight", "b.weight"], {"none": [np.zeros(2)]})
    figures.draw_seeds(seeds, {"none": {"0": 0.0}})
    figures.draw_attacks(attacks, {"none": {"new": {"0": 0.0}}}, set())
    assert parameters.get_ylim() == attacks.get_xlim() == (0, 1)
    assert seeds.get_ylim() == (0, 0.5)


def test_steps_are_counted_in_whole_numbers():
    figure = figures.new_figure(6, 3)
    bands, layers = figure.subplots(1, 2)
    figures.draw_cosines(bands, [np.full(10, 0.5)], "none")
    figures.draw_layers(layers, ["a"], np.full((10, 1), 0.5))
    figure.draw_without_rendering()
    for axes in (bands, layers):
        assert len(axes.get_xticks()) > 2
        assert (axes.get_xticks() % 1 == 0).all()
