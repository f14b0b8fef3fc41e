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


def test_det_diagonal_is_where_both_errors_agree():
    miss = np.linspace(0, 1, 101)
    axes = figures.new_figure(4, 4).add_subplot()
    figures.draw_det(axes, {"none": [(1 - miss, miss)]})
    bold = max(axes.lines, key=lambda line: line.get_linewidth())
    x, y = bold.get_xdata(), bold.get_ydata()
    # miss + accept = 1 is the other diagonal in probit scale, which meets the EER's at 50%, the origin.
    assert np.allclose(x, -y, atol=0.05)


def test_curves_with_gaps_and_without_steps_are_drawn():
    axes = figures.new_figure(4, 3).add_subplot()
    figures.draw_cosines(axes, [np.array([np.nan, 0.5, -0.5]), np.zeros(0)], "none")
    figures.draw_cosines(axes, [np.full(4, np.nan)], "none")
    figures.draw_epochs(axes, {"none": [np.zeros(0)]})
