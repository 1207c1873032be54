"""Pictures: files are written, with everything in them that was given."""

import pytest
import torch

from peft_mask.analysis.plots import Line, plot_dots, plot_lines, plot_points


def test_lines_are_drawn_with_their_names(tmp_path):
    path = tmp_path / "lines.svg"
    lines = {"fine-tuned": Line([1, 2, 3], [1.0, 2.0, 3.0]), "control": Line([1, 2], [5.0, 6.0], dashed=True)}
    plot_lines(path, lines, "tasks", "bytes", "many tasks", log=True)
    written = path.read_text("utf-8")
    assert written.count("<!-- fine-tuned -->") == written.count("<!-- control -->") == 1
    for text in ("tasks", "bytes", "many tasks"):
        assert f"<!-- {text} -->" in written


def test_bars_show_the_errors_of_those_lines_that_have_any(tmp_path):
    path = tmp_path / "bars.svg"
    lines = {"mean": Line([1, 2], [1.0, 2.0], error=[0.1, 0.2]), "one seed": Line([1, 2], [2.0, 3.0])}
    drawn = {}
    for name, line in lines.items():
        plot_lines(path, {name: line}, "", "", "")
        drawn[name] = "LineCollection" in path.read_text("utf-8")
    assert drawn == {"mean": True, "one seed": False}


def test_dots_have_a_row_a_name(tmp_path):
    path = tmp_path / "dots.svg"
    plot_dots(path, {"first": {"a mask": 0.5, "a control": 0.4}, "second": {"a control": 0.3}}, "accuracy", "masks")
    written = path.read_text("utf-8")
    for text in ("a mask", "a control", "first", "second", "accuracy", "masks"):
        assert written.count(f"<!-- {text} -->") == 1


@pytest.mark.parametrize("count", [1, 3, 4])
def test_points_are_drawn_in_as_many_panels_as_given(count, tmp_path):
    path = tmp_path / "points.svg"
    panel = torch.randn(10, 2), torch.arange(10) % 2
    plot_points(path, {f"panel {i}": panel for i in range(count)}, ["negative", "positive"], "states")
    written = path.read_text("utf-8")
    assert [written.count(f"<!-- panel {i} -->") for i in range(count)] == [1] * count
    assert written.count("<!-- negative -->") == 1, "one legend for all"
    assert written.count('id="PathCollection_') == 2 * count + 2, "with the legend's two"


def test_a_picture_may_be_a_png(tmp_path):
    plot_lines(tmp_path / "a.png", {"a": Line(["x", "y"], [1.0, 2.0])}, "", "", "")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
