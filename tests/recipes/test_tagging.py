"""Tags of words: which piece of a word carries one, and how they are scored."""

import numpy as np
import pytest
from transformers import EvalPrediction

from peft_mask.recipes import token_classification
from peft_mask.recipes.tagging import IGNORED, label_last_pieces, span_f1, spans, token_accuracy


def test_last_pieces_carry_the_tags():
    assert label_last_pieces([None, 0, 0, 1, None], [7, 8]) == [IGNORED, IGNORED, 7, 8, IGNORED]
    assert label_last_pieces([None, 0, 0], [7, 8]) == [IGNORED, IGNORED, 7]  # the second word was cut off


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ("", set()),
        ("O O", set()),
        ("B-a", {(0, 1, "a")}),
        ("B-a I-a O B-b", {(0, 2, "a"), (3, 4, "b")}),
        ("B-a B-a I-a", {(0, 1, "a"), (1, 3, "a")}),  # neighbors of the same type
        ("B-a I-b I-b", {(0, 1, "a"), (1, 3, "b")}),  # another type ends a span and starts one
        ("O I-a I-a O", {(1, 3, "a")}),  # no B-: starts one all the same
        ("I-a B-a", {(0, 1, "a"), (1, 2, "a")}),
        ("B-creative-work I-creative-work", {(0, 2, "creative-work")}),
    ],
)
def test_spans_are_those_of_conlleval(tags, found):
    assert spans(tags.split()) == found


def test_span_f1_wants_type_and_boundaries():
    gold = [["B-a", "I-a", "O"], ["B-b", "O", "B-a"]]
    assert span_f1(gold, gold) == 1
    assert span_f1(gold, [["I-a", "I-a", "O"], ["I-b", "O", "I-a"]]) == 1  # the same spans
    assert span_f1(gold, [["B-b", "I-b", "O"], ["O", "O", "O"]]) == 0  # type
    assert span_f1(gold, [["B-a", "O", "O"], ["O", "O", "O"]]) == 0  # boundary
    # micro: 1 right of 3 in the data and 2 found, wherever they stand
    assert span_f1(gold, [["B-a", "I-a", "O"], ["O", "B-a", "O"]]) == pytest.approx(2 * 1 / (3 + 2))
    assert span_f1([["O"]], [["O"]]) == 0


def test_token_accuracy_counts_words_not_sentences():
    assert token_accuracy([["A"], ["A", "B", "B"]], [["A"], ["B", "B", "A"]]) == 0.5


def test_tags_are_scored_as_words_and_as_spans():
    logits = np.eye(3)[[[0, 1, 2], [2, 2, 2]]]  # predicted: B-a I-a O, O O O
    labels = np.array([[0, 1, IGNORED], [IGNORED, 0, 2]])
    metrics = token_classification.metrics_of(["B-a", "I-a", "O"])
    assert metrics(EvalPrediction(logits, labels)) == {"accuracy": 3 / 4, "f1": 2 / 3}
    assert token_classification.metrics_of(["DT", "NN", "B-"])(EvalPrediction(logits, labels)) == {"accuracy": 3 / 4}
