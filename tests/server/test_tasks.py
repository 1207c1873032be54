"""The tasks: what a server answers is what transformers answers for each adapter alone."""

import asyncio
import base64

import numpy as np
import pytest
import torch
from tokenizers import normalizers
from transformers import AutoTokenizer

from peft_mask.server import Embeddings, Generation, InvalidInputError, load_batcher
from peft_mask.server.tasks.classification import scores_of
from peft_mask.server.tasks.embeddings import pooled
from peft_mask.server.tasks.tagging import entities_of
from tests.server.places import NAMES, TEXTS
from tests.tiny_models import tiny_tokenizer

QUESTIONS = [(name, text) for text in TEXTS for name in NAMES]


def answers_of(place, questions, settings=None, **options):
    """Ask a server's batcher twice: the second time all adapters are there, and all rows are in one batch."""
    batcher = load_batcher(place.settings(**(settings or {})))

    async def work():
        try:
            for _ in range(2):
                before = batcher.statistics.batches
                answers = await asyncio.gather(*(batcher.ask(*each, **options) for each in questions))
            assert batcher.statistics.batches == before + 1
            return answers
        finally:
            await batcher.close()

    return asyncio.run(work())


def test_classification_is_that_of_the_pipeline(places, expected):
    for (name, text), answer in zip(QUESTIONS, answers_of(places["classify"], QUESTIONS, top_k=9), strict=True):
        own = expected["classify"][name][text]
        assert [each["label"] for each in answer] == [each["label"] for each in own]
        assert [each["score"] for each in answer] == pytest.approx([each["score"] for each in own], abs=1e-5)


def test_tagging_is_that_of_the_pipeline(places, expected):
    for (name, text), answer in zip(QUESTIONS, answers_of(places["tag"], QUESTIONS), strict=True):
        own = expected["tag"][name][text]
        assert [(each["start"], each["end"], each["label"]) for each in answer["words"]] == [each[:3] for each in own]
        assert [each["score"] for each in answer["words"]] == pytest.approx([each[3] for each in own], abs=1e-5)
        assert all(text[each["start"] : each["end"]] == each["word"] for each in answer["words"])
        assert "entities" in answer


def test_embeddings_are_those_of_each_adapter_alone(places, expected):
    for (name, text), answer in zip(QUESTIONS, answers_of(places["embed"], QUESTIONS), strict=True):
        assert answer == pytest.approx(expected["embed"][name][text], abs=1e-5)


def test_the_base_alone_has_embeddings_of_its_own(places, expected):
    base, own = answers_of(places["embed"], [("__base__", TEXTS[0]), ("a", TEXTS[0])])
    assert own == pytest.approx(expected["embed"]["a"][TEXTS[0]], abs=1e-5)
    assert np.abs(np.subtract(base, own)).max() > 0.01


def test_generation_is_that_of_each_adapter_alone(places, expected):
    for (name, text), answer in zip(QUESTIONS, answers_of(places["generate"], QUESTIONS, max_tokens=6), strict=True):
        assert answer["text"] == expected["generate"][name][text]
        assert answer["prompt_tokens"] == len(text.split())


def test_generation_stops_at_each_rows_own_number_of_tokens(places, expected):
    batcher = load_batcher(places["generate"].settings())

    async def work():
        try:
            return await asyncio.gather(*(batcher.ask("a", TEXTS[1], max_tokens=count) for count in (2, 6)))
        finally:
            await batcher.close()

    short, long = asyncio.run(work())
    assert long["text"] == expected["generate"]["a"][TEXTS[1]]
    assert long["text"].startswith(short["text"])
    assert short["completion_tokens"] == 2
    assert short["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be a whole number from 1 to 40, got 0"),
        ({"max_tokens": 64}, "max_tokens must be a whole number from 1 to 40, got 64"),
        ({"temperature": -1}, "temperature must be a number from 0.0 to 2.0, got -1"),
        ({"temperature": float("nan")}, "temperature must be a number"),
        ({"top_p": 0}, "top_p must be above 0"),
        ({"max_tokens": 40}, "a text of 27 tokens is too long: expected at most 24"),
    ],
)
def test_generation_refuses_options_without_meaning(options, message):
    with pytest.raises(InvalidInputError, match=message):
        Generation(tiny_tokenizer(), 64, max_new_tokens=40).encode("w5 " * 27, options)


def test_texts_are_padded_on_the_right_whatever_the_tokenizer_says(places, expected, monkeypatch):
    load = AutoTokenizer.from_pretrained
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *args: load(*args, padding_side="left"))
    for kind in ("classify", "tag", "embed"):
        for (name, text), answer in zip(QUESTIONS, answers_of(places[kind], QUESTIONS), strict=True):
            own = expected[kind][name][text]
            if kind == "embed":
                assert answer == pytest.approx(own, abs=1e-5)
            elif kind == "tag":
                assert [each["label"] for each in answer["words"]] == [each[2] for each in own]
            else:
                assert answer[0]["label"] == own[0]["label"]


def test_a_text_in_which_the_tokenizer_finds_nothing_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    with pytest.raises(InvalidInputError, match="the tokenizer finds nothing in it"):
        Embeddings(tokenizer).encode("\u200b", {})


def test_vectors_can_be_asked_for_in_base64(places):
    (vector,) = answers_of(places["embed"], [("a", TEXTS[0])])
    coded = Embeddings.entry(vector, "base64")["embedding"]
    np.testing.assert_array_equal(np.frombuffer(base64.b64decode(coded), "<f4"), np.float32(vector))
    with pytest.raises(InvalidInputError, match="encoding_format must be float or base64, got 'hex'"):
        Embeddings(tiny_tokenizer()).encode("w5", {"encoding_format": "hex"})


@pytest.mark.parametrize("side", ["left", "right"])
def test_pooling_looks_at_no_padding(side):
    states = torch.arange(24.0).view(2, 4, 3)
    mask = torch.ones(2, 4, dtype=torch.long)
    mask[1, slice(0, 2) if side == "left" else slice(2, 4)] = 0
    own = states[1, 2:] if side == "left" else states[1, :2]
    assert torch.equal(pooled(states, mask, "mean")[1], own.mean(0))
    assert torch.equal(pooled(states, mask, "cls")[1], own[0])
    assert torch.equal(pooled(states, mask, "last")[1], own[-1])


def test_pooling_is_one_of_three():
    with pytest.raises(ValueError, match=r"pooling must be one of \['mean', 'cls', 'last'\], got 'max'"):
        Embeddings(tiny_tokenizer(), pooling="max")


def test_scores_are_those_of_the_kind_of_problem():
    logits = torch.tensor([1.0, -1.0])
    assert torch.equal(scores_of(logits, None), logits.softmax(0))
    assert torch.equal(scores_of(logits, "multi_label_classification"), logits.sigmoid())
    assert torch.equal(scores_of(logits, "regression"), logits)
    assert torch.equal(scores_of(logits[:1], None), logits[:1])


def words_of(*labels):
    return [
        {"label": label, "score": 0.5 + place / 100, "start": 3 * place, "end": 3 * place + 2}
        for place, label in enumerate(labels)
    ]


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        (("O", "B-PER", "I-PER", "O"), [("PER", "bb cc")]),
        (("B-PER", "B-PER"), [("PER", "aa"), ("PER", "bb")]),
        (("I-PER", "I-LOC"), [("PER", "aa"), ("LOC", "bb")]),
        (("B-PER", "O", "I-PER"), [("PER", "aa"), ("PER", "cc")]),
        (("O", "O"), []),
    ],
)
def test_entities_are_runs_of_words_of_one_kind(labels, found):
    entities = entities_of("aa bb cc dd", words_of(*labels))
    assert [(each["label"], each["text"]) for each in entities] == found
    for each in entities:
        inside = [word["score"] for word in words_of(*labels) if each["start"] <= word["start"] < each["end"]]
        assert each["score"] == min(inside)
