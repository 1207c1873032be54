"""Rows and batches of a task."""

from dataclasses import replace
from itertools import chain

import pytest

from benchmarks.accuracy.tasks import IGNORED, TASKS, Rows, training_batches
from benchmarks.accuracy.training import Setting
from tests.studies.made_up import STEPS


def test_a_words_label_stands_on_its_last_piece_and_words_cut_off_count(setting: Setting) -> None:
    rows = setting.rows(TASKS["ud_ewt_pos"], "dev")
    assert rows.labels[0] == [IGNORED, 2, 0, IGNORED, 0, 1, IGNORED]  # [CLS] the red un ##happy runs [SEP]
    short = setting.rows(replace(TASKS["ud_ewt_pos"], max_length=4), "dev")
    assert short.labels[0] == [IGNORED, 2, 0, IGNORED]
    assert short.labelled == rows.labelled == 9 * 4


def test_batches_are_a_function_of_the_seed_and_show_every_row_once_an_epoch() -> None:
    rows = Rows([[0] * (1 + i % 7) for i in range(96)], [0] * 96, 96, pad=0)
    batches = list(training_batches(rows, seed=3, steps=6, batch_size=32))
    assert batches == list(training_batches(rows, seed=3, steps=6, batch_size=32))
    assert batches != list(training_batches(rows, seed=4, steps=6, batch_size=32))
    assert sorted(chain(*batches[:3])) == sorted(chain(*batches[3:])) == list(range(96))
    assert batches[:2] == list(training_batches(rows, seed=3, steps=2, batch_size=32))


@pytest.mark.parametrize("numbers", [(0, 32), (STEPS, 0), (-1, 32)])
def test_steps_and_batches_of_nothing_are_refused(setting: Setting, numbers: tuple[int, int]) -> None:
    rows = setting.rows(TASKS["trec"], "train")
    with pytest.raises(ValueError, match=f"steps and batch_size must be at least 1, got {numbers[0]} and {numbers[1]}"):
        next(training_batches(rows, 0, *numbers))


def test_too_few_rows_for_a_batch_are_refused() -> None:
    with pytest.raises(ValueError, match="a batch of 32 needs as many rows, the training split has 1"):
        list(training_batches(Rows([[0]], [0], 1, pad=0), seed=0, steps=1, batch_size=32))
