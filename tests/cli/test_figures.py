"""The numbers of a report."""

import json

import pytest
import torch

from peft_mask import Masks
from peft_mask.cli import figures
from peft_mask.cli.adapter import read_adapter
from tests.cli.test_main import copied
from tests.cli.test_report import STATE


def test_zeros_are_counted_where_they_lie():
    mask = torch.ones(32, 32, dtype=torch.bool)
    mask[:2, :2] = False
    rows = figures.positions(Masks({"layers.0.x": mask, "layers.1.x": mask}))
    assert len(rows) == figures.BINS**2
    off = [row for row in rows if row["ratio"]]
    assert off == [{"kind": "x", "row": 0, "column": 0, "ratio": pytest.approx(256.0)}]


def test_even_masks_have_a_ratio_of_one_everywhere_whatever_their_shape():
    masks = Masks({"a": torch.zeros(35, 50, dtype=torch.bool), "b": torch.ones(3, dtype=torch.bool)})
    assert {row["ratio"] for row in figures.positions(masks)} == {1.0}


def test_a_full_row_is_crowded_and_a_random_one_is_not():
    mask = torch.ones(100, 50, dtype=torch.bool)
    mask[7] = False
    (row,) = figures.crowding(Masks({"x": mask}))
    assert row["rows"] == 1.0
    assert row["columns"] == pytest.approx(0.1)
    assert row["rows_at_random"] < 0.7


def test_zeros_are_in_the_class_of_their_magnitude():
    weight = torch.arange(1000).float().view(10, 100)
    base = torch.nn.Sequential(torch.nn.Linear(100, 10))
    base[0].weight.data = weight
    mask = torch.ones(1000, dtype=torch.bool)
    mask[[0, 499, 500, 999]] = False
    rows = figures.magnitudes(Masks({"0": mask.view(10, 100)}), base)
    assert {row["weights"]: row["share"] for row in rows if row["share"]} == {
        "0-50 %": 0.5,
        "50-80 %": 0.25,
        "99.9-100 %": 0.25,
    }


def test_a_log_gives_the_curves_that_can_be_drawn(place, tmp_path):
    made = copied(place.adapters / "a", tmp_path / "a")
    assert figures.curves(read_adapter(str(made))) == {}
    (made / "checkpoint-20").mkdir()
    (made / "checkpoint-20" / "trainer_state.json").write_text(json.dumps(STATE))
    found = figures.curves(read_adapter(str(made)))
    assert found["loss"] == [(5, 0.75), (10, 0.5), (15, 0.25)]
    assert next(iter(found)) == "loss"
    assert "eval_accuracy" not in found, "one point is no curve"
    (made / "checkpoint-100").mkdir()
    (made / "checkpoint-100" / "trainer_state.json").write_text("[")
    assert figures.curves(read_adapter(str(made))) == {}
    long = {"log_history": [{"step": step, "loss": 1.0} for step in range(5001)]}
    (made / "trainer_state.json").write_text(json.dumps(long))
    points = figures.curves(read_adapter(str(made)))["loss"]
    assert len(points) <= 402
    assert points[-1] == (5000, 1.0)
