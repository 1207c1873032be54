"""Means over tasks, and what can be compared of methods that have some of them."""

from dataclasses import replace

import pytest

from benchmarks.accuracy.summary import Row, summarize, summarize_alike, summarize_parts

FULL = Row("trec", "full", 9, 1e-3, (0, 1), (0.6, 0.8), (0.5, 0.5), {"0.001": 0.5}, 8, 300, 0, *[None] * 3, 1.0)
OTHER = replace(FULL, task="sst2", test=(0.4, 0.6))
MASK = replace(FULL, method="growing-mask", seeds=(0,), test=(0.65,), tries={"0.001": 0.5, "0.003": 0.4})


def test_a_method_with_every_task_has_a_mean_and_one_without_stands_beside_others_on_its_own() -> None:
    rows = [FULL, OTHER, MASK]
    (mean,) = summarize(rows)
    assert (mean["method"], mean["tasks"], mean["seeds"]) == ("full", 2, [0, 1])
    assert (mean["test"], mean["sd"]) == pytest.approx((0.6, 0.2 / 2**0.5))
    (part,) = summarize_parts(rows)
    assert (part["method"], part["names"], part["at_edge"]) == ("growing-mask", ["trec"], 1)
    assert part["points_over_full"] == pytest.approx(5.0), "of the same task and seed: 0.65 and 0.6"
    assert "points_over_lora-r8" not in part


def test_a_mean_over_some_tasks_is_of_the_seeds_that_all_of_them_have() -> None:
    part = [replace(FULL, method="vera-all", seeds=(0,), test=(0.6,)), replace(OTHER, method="vera-all")]
    (own,) = summarize_parts([FULL, OTHER, replace(FULL, task="ag_news"), *part])
    assert (own["seeds"], own["test"]) == ([0], pytest.approx(0.5)), "the second seed of sst2 has no other"


def test_the_tasks_that_most_have_are_compared_by_the_first_seed() -> None:
    third = replace(FULL, task="ag_news")
    mask = [MASK, replace(MASK, task="sst2", test=(0.45,))]
    rows = [FULL, OTHER, third, *mask, replace(MASK, method="vera-all")]
    full, own = summarize_alike(rows, summarize_parts(rows))
    assert (full["method"], full["test"]) == ("full", pytest.approx(0.5))
    assert (own["method"], own["test"], own["sd"]) == ("growing-mask", pytest.approx(0.55), None)
    assert summarize_alike([FULL], []) == []
