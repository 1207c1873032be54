"""The batcher: answers are each adapter's own, batches are mixed, and a row that fails fails alone."""

import asyncio
import threading
from itertools import groupby
from types import SimpleNamespace

import pytest
import torch

from peft_mask import AdapterRefusedError, UnknownAdapterError
from peft_mask.server import InvalidInputError, OverloadedError, load_batcher
from tests.server.places import TEXTS

QUESTIONS = [(name, text) for text in TEXTS for name in ("a", "b", "c")]


@pytest.fixture
def batcher(places):
    own = load_batcher(places["classify"].settings())
    yield own
    assert own.cache.stats().leases == 0  # whatever a test does, every lease is given back


def best(expected, name, text):
    return expected["classify"][name][text][0]


def check(answer, expected, name, text):
    own = best(expected, name, text)
    assert answer[0]["label"] == own["label"]
    assert answer[0]["score"] == pytest.approx(own["score"], abs=1e-5)


async def ask_all(batcher, questions, **options):
    return await asyncio.gather(*(batcher.ask(*each, **options) for each in questions), return_exceptions=True)


def run(batcher, work):
    async def inside():
        try:
            return await work()
        finally:
            await batcher.close()

    return asyncio.run(inside())


def held(batcher, monkeypatch, at=1):
    """Let the model stop in its `at`-th batch until it is told to go on; returns the events (it stopped, go on)."""
    stopped, go_on, calls = threading.Event(), threading.Event(), iter(range(1, 1000))
    compute = batcher.task.compute

    def computed(*args):
        if next(calls) == at:
            stopped.set()
            assert go_on.wait(30)
        return compute(*args)

    monkeypatch.setattr(batcher.task, "compute", computed)
    return stopped, go_on


def test_every_row_of_a_mixed_batch_is_its_adapters_own(batcher, expected):
    async def work():
        await ask_all(batcher, QUESTIONS)  # all adapters are loaded
        before = batcher.statistics.batches
        return before, await ask_all(batcher, QUESTIONS)

    before, answers = run(batcher, work)
    for (name, text), answer in zip(QUESTIONS, answers, strict=True):
        check(answer, expected, name, text)
    assert batcher.statistics.batches - before == 1
    assert batcher.statistics.most_adapters == 3
    assert batcher.statistics.rows == 2 * len(QUESTIONS)


def test_rows_of_one_adapter_stand_together_in_a_batch(batcher, monkeypatch):
    orders = []
    compute = batcher.task.compute
    monkeypatch.setattr(
        batcher.task,
        "compute",
        lambda model, rows, names, labels: orders.append(names) or compute(model, rows, names, labels),
    )
    questions = [("a", "w5"), ("b", "w6"), ("a", "w7"), ("c", "w8"), ("b", "w9"), ("a", "w40")]

    async def work():
        await ask_all(batcher, questions)
        return await ask_all(batcher, questions)

    answers = run(batcher, work)
    groups = [(name, len(list(own))) for name, own in groupby(orders[-1])]
    assert sorted(count for _, count in groups) == [count for _, count in groups] == [1, 2, 3]
    assert [answer[0]["label"].split(".")[0] for answer in answers] == [
        f"label {'abc'.index(name)}" for name, _ in questions
    ]


@pytest.mark.parametrize(("limit", "batches"), [({"max_rows": 4}, 3), ({"max_tokens": 18}, 4)])
def test_batches_have_no_more_rows_and_tokens_than_they_may_have(places, monkeypatch, limit, batches):
    batcher = load_batcher(places["classify"].settings(**limit))
    sizes = []
    compute = batcher.task.compute
    monkeypatch.setattr(
        batcher.task, "compute", lambda model, rows, *rest: sizes.append(rows) or compute(model, rows, *rest)
    )

    async def work():
        await ask_all(batcher, QUESTIONS)
        sizes.clear()
        await ask_all(batcher, QUESTIONS)

    run(batcher, work)
    assert len(sizes) >= batches
    for rows in sizes:
        assert len(rows) <= batcher.max_rows
        assert len(rows) * max(row.length for row in rows) <= batcher.max_tokens


def test_an_adapter_that_is_refused_fails_its_own_rows_alone(batcher, expected):
    answers = run(
        batcher, lambda: ask_all(batcher, [("a", TEXTS[0]), ("nobody", TEXTS[0]), ("../a", TEXTS[0]), ("b", TEXTS[1])])
    )
    check(answers[0], expected, "a", TEXTS[0])
    assert isinstance(answers[1], UnknownAdapterError)
    assert isinstance(answers[2], AdapterRefusedError)
    check(answers[3], expected, "b", TEXTS[1])


def test_a_row_at_which_the_model_fails_fails_alone(batcher, expected, monkeypatch):
    compute = batcher.task.compute

    def computed(model, rows, *rest):
        if any(row.details == "poison" for row in rows):
            raise RuntimeError("out of memory")
        return compute(model, rows, *rest)

    monkeypatch.setattr(batcher.task, "compute", computed)
    monkeypatch.setattr(batcher.task, "details", lambda texts, encoded: "poison" if texts[0] == "w60 w61" else None)
    questions = [*QUESTIONS, ("a", "w60 w61"), *QUESTIONS]
    answers = run(batcher, lambda: ask_all(batcher, questions))
    for (name, text), answer in zip(questions, answers, strict=True):
        if text == "w60 w61":
            assert str(answer) == "out of memory"
        else:
            check(answer, expected, name, text)
    assert batcher.statistics.failures > 1  # the batch, halves of it, and the row


@pytest.mark.parametrize(
    ("item", "options", "message"),
    [
        ("", {}, "an input is empty: expected a text"),
        ("  ", {}, "an input is empty"),
        (5, {}, "an input is a text, got int"),
        (None, {}, "an input is a text, got NoneType"),
        ({"text": "5", "texts": "6"}, {}, "an input has 'text' and may have 'text_pair', got 'texts'"),
        ({"text_pair": "6"}, {}, "an input is a text, got NoneType"),
        ("w5 " * 65, {}, "a text of 65 tokens is too long: expected at most 64"),
        ("5" * 2000, {}, "a text of 2000 characters is too long: expected at most 1024"),
        ("5", {"top_k": 0}, "top_k must be a whole number from 1 to 10000, got 0"),
        ("5", {"top_k": True}, "top_k must be a whole number"),
        ("5", {"temperature": 1}, "there is no option 'temperature' for /v1/classify"),
    ],
)
def test_an_input_without_meaning_is_refused(batcher, item, options, message):
    with pytest.raises(InvalidInputError, match=message):
        run(batcher, lambda: batcher.ask("a", item, **options))
    assert batcher.cache.stats().loads == 0  # nothing was done for it


def test_the_base_is_refused_where_it_has_no_head(batcher):
    with pytest.raises(InvalidInputError, match="the base has no head for this task"):
        run(batcher, lambda: batcher.ask("__base__", "5"))


def test_a_text_and_its_pair_are_one_input(batcher):
    async def work():
        pair = {"text": "5 6", "text_pair": "7 8"}
        return await ask_all(batcher, [("a", pair), ("a", "5 6")], top_k=2)

    pair, single = run(batcher, work)
    assert pair != single


def test_one_request_more_than_may_wait_is_refused(places, monkeypatch):
    batcher = load_batcher(places["classify"].settings(max_waiting=3, max_questions=3))
    stopped, go_on = held(batcher, monkeypatch)

    async def work():
        first = [asyncio.create_task(batcher.ask("a", text)) for text in TEXTS[:3]]
        await asyncio.to_thread(stopped.wait)
        with pytest.raises(OverloadedError, match="3 requests wait already"):
            await batcher.ask("a", TEXTS[3])
        go_on.set()
        await asyncio.gather(*first)
        return await batcher.ask("a", TEXTS[3])  # there is room again

    assert run(batcher, work)


def test_who_goes_while_the_model_computes_leaves_the_adapter_in_its_slot_until_it_is_done(places, monkeypatch):
    batcher = load_batcher(places["classify"].settings(slots=1))
    stopped, go_on = held(batcher, monkeypatch)

    async def work():
        gone = asyncio.create_task(batcher.ask("a", TEXTS[0]))
        await asyncio.to_thread(stopped.wait)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        assert batcher.cache.stats().leases == 1  # the model still reads it
        after = asyncio.create_task(batcher.ask("b", TEXTS[0]))
        await asyncio.sleep(0.05)
        assert not after.done()
        go_on.set()
        await after
        assert batcher.cache.stats().leases == 0

    run(batcher, work)


def test_who_goes_while_waiting_is_not_computed(batcher, monkeypatch):
    stopped, go_on = held(batcher, monkeypatch)

    async def work():
        first = asyncio.create_task(batcher.ask("a", TEXTS[0]))
        await asyncio.to_thread(stopped.wait)
        gone = asyncio.create_task(batcher.ask("a", TEXTS[1]))
        await asyncio.sleep(0.01)
        gone.cancel()
        go_on.set()
        await first
        await batcher.ask("a", TEXTS[2])

    run(batcher, work)
    assert batcher.statistics.rows == 2


def test_closing_answers_what_is_computed_and_refuses_what_waits(batcher, expected, monkeypatch):
    stopped, go_on = held(batcher, monkeypatch)

    async def work():
        first = asyncio.create_task(batcher.ask("a", TEXTS[0]))
        await asyncio.to_thread(stopped.wait)
        waiting = asyncio.create_task(batcher.ask("a", TEXTS[1]))
        await asyncio.sleep(0.01)
        closing = asyncio.create_task(batcher.close())
        await asyncio.sleep(0.01)
        go_on.set()
        await closing
        check(await first, expected, "a", TEXTS[0])
        for late in (waiting, batcher.ask("a", TEXTS[2])):
            with pytest.raises(OverloadedError, match="the server stops"):
                await late

    asyncio.run(work())


def test_the_check_computes_a_row_before_those_that_wait(batcher, monkeypatch):
    stopped, go_on = held(batcher, monkeypatch)
    order = []

    async def ask(name, work):
        await work
        order.append(name)

    async def work():
        batcher.max_rows = 1
        tasks = [asyncio.create_task(ask("first", batcher.ask("a", TEXTS[0])))]
        await asyncio.to_thread(stopped.wait)
        tasks.append(asyncio.create_task(ask("waiting", batcher.ask("a", TEXTS[1]))))
        await asyncio.sleep(0.01)
        tasks.append(asyncio.create_task(ask("check", batcher.check())))
        await asyncio.sleep(0.01)
        go_on.set()
        await asyncio.gather(*tasks)

    run(batcher, work)
    assert order == ["first", "check", "waiting"]


def test_the_check_is_in_no_batch_with_others(batcher, monkeypatch):
    stopped, go_on = held(batcher, monkeypatch)
    sizes = []
    compute = batcher.task.compute
    monkeypatch.setattr(
        batcher.task, "compute", lambda model, rows, *rest: sizes.append(len(rows)) or compute(model, rows, *rest)
    )

    async def work():
        tasks = [asyncio.create_task(batcher.ask("a", TEXTS[0]))]
        await asyncio.to_thread(stopped.wait)
        tasks += [asyncio.create_task(batcher.ask("a", text)) for text in TEXTS[1:]]
        await asyncio.sleep(0.01)
        tasks.append(asyncio.create_task(batcher.check()))
        await asyncio.sleep(0.01)
        go_on.set()
        await asyncio.gather(*tasks)

    run(batcher, work)
    assert sizes == [1, 1, 3]


def test_the_check_says_what_is_wrong_with_the_model(batcher, monkeypatch):
    monkeypatch.setattr(type(batcher.task), "answers", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(batcher, batcher.check)


def test_rows_with_a_key_of_their_own_are_computed_apart(places, expected, monkeypatch):
    batcher = load_batcher(places["generate"].settings())
    keys = []
    compute = batcher.task.compute
    monkeypatch.setattr(
        batcher.task,
        "compute",
        lambda model, rows, *rest: keys.append({row.key for row in rows}) or compute(model, rows, *rest),
    )

    async def work():
        await ask_all(batcher, QUESTIONS, max_tokens=6)
        keys.clear()
        plain = ask_all(batcher, QUESTIONS, max_tokens=6)
        drawn = ask_all(batcher, QUESTIONS, max_tokens=6, temperature=1.5)
        return await asyncio.gather(plain, drawn)

    answers, _ = run(batcher, work)
    assert [len(own) for own in keys] == [1, 1]
    for (name, text), answer in zip(QUESTIONS, answers, strict=True):
        assert answer["text"] == expected["generate"][name][text]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [("max_rows", 0, "max_rows must be at least 1, got 0"), ("max_wait", -1.0, "max_wait must be at least 0")],
)
def test_a_number_without_meaning_is_refused(batcher, field, value, message):
    with pytest.raises(ValueError, match=message):
        type(batcher)(batcher.cache, batcher.task, **{field: value})


def test_a_task_with_a_wrong_number_of_answers_fails_its_rows_and_nothing_else(batcher, monkeypatch):
    compute = batcher.task.compute
    monkeypatch.setattr(batcher.task, "compute", lambda *args: [])

    async def work():
        with pytest.raises(RuntimeError, match="the task has 0 answers for 1 rows"):
            await batcher.ask("a", TEXTS[0])
        monkeypatch.setattr(batcher.task, "compute", compute)
        return await batcher.ask("a", TEXTS[0])

    assert run(batcher, work)


def test_an_answer_that_is_not_finite_is_an_error_of_its_row(batcher, expected, monkeypatch):
    answers = type(batcher.task).answers

    def poisoned(self, model, batch):
        if any(row.details for row in batch.rows):
            model = lambda **inputs: SimpleNamespace(logits=torch.full((len(batch.rows), 5), float("nan")))  # noqa: E731
            model.config = batcher.cache.model.config
        return answers(self, model, batch)

    monkeypatch.setattr(type(batcher.task), "answers", poisoned)
    monkeypatch.setattr(batcher.task, "details", lambda texts, encoded: texts[0] == TEXTS[1])
    good, bad = run(batcher, lambda: ask_all(batcher, [("a", TEXTS[0]), ("a", TEXTS[1])]))
    check(good, expected, "a", TEXTS[0])
    assert isinstance(bad, ArithmeticError)
    assert str(bad) == "the model's answer is not finite"


def test_another_event_loop_is_refused_and_does_not_hang(batcher):
    asyncio.run(batcher.ask("a", TEXTS[0]))
    with pytest.raises(RuntimeError, match="belongs to the event loop that it was first asked in"):
        asyncio.run(asyncio.wait_for(batcher.ask("a", TEXTS[0]), 10))


def test_checks_that_come_together_compute_one_row(batcher):
    async def work():
        await asyncio.gather(*(batcher.check() for _ in range(5)))

    run(batcher, work)
    assert batcher.statistics.rows == 1


def test_prompts_and_answers_of_a_batch_fit_together(places, monkeypatch):
    batcher = load_batcher(places["generate"].settings(max_length=20))
    batches = []
    compute = batcher.task.compute
    monkeypatch.setattr(
        batcher.task, "compute", lambda model, rows, *rest: batches.append(rows) or compute(model, rows, *rest)
    )

    async def work():
        await batcher.ask("a", "w5", max_tokens=1)
        batches.clear()
        long, short = batcher.ask("a", "w5 " * 15, max_tokens=5), batcher.ask("a", "w5", max_tokens=19)
        return await asyncio.gather(long, short)

    assert len(run(batcher, work)) == 2
    assert len(batches) == 2  # 15 and 19 tokens are more than the 20 that there are places for
