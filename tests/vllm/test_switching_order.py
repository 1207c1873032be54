"""The steps of a switch, in their order, with engines that only write them down."""

import asyncio
from types import SimpleNamespace

import pytest

from peft_mask import AdapterRefusedError
from peft_mask.vllm import SwitchFailedError, mask_in_force, mask_in_force_async, switch_mask, switch_mask_async

PATH = "/adapters/a"
IN_FORCE = {"adapter": PATH, "digest": "d", "zeros": 5}
PREPARED = {"zeros": 5, "changes": 5, "held": 5}


class Steps:
    """Both kinds of engine in one: what is called is written down, and answered by `answers`."""

    def __init__(self, workers=1, **answers):
        self.steps = []
        self.answers = {"mask_prepare": [PREPARED] * workers, "mask_apply": [IN_FORCE] * workers} | answers
        self.answers.setdefault("mask_in_force", self.answers["mask_apply"])
        self.paused = answers.get("paused", False)
        self.llm_engine = SimpleNamespace(
            has_unfinished_requests=lambda: answers.get("unfinished", False),
            reset_encoder_cache=lambda: self.steps.append("reset_encoder_cache"),
        )

    def collective_rpc(self, method, args=()):
        self.steps.append(method)
        answer = self.answers[method]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def reset_prefix_cache(self, reset_connector=False):
        self.steps.append(f"reset_prefix_cache {reset_connector}")
        return self.answers.get("reset", True)

    def reset_mm_cache(self):
        self.steps.append("reset_mm_cache")


class AsyncSteps(Steps):
    async def collective_rpc(self, method, args=()):
        await asyncio.sleep(0)
        return super().collective_rpc(method, args)

    async def is_paused(self):
        return self.paused

    async def pause_generation(self, *, mode, clear_cache):
        await asyncio.sleep(0)
        self.steps.append(f"pause {mode} {clear_cache}")

    async def resume_generation(self):
        self.steps.append("resume")


def switch_async(engine, adapter=PATH):
    return asyncio.run(switch_mask_async(engine, adapter))


def test_the_prefix_cache_is_emptied_after_all_is_checked_and_before_weights_change():
    engine = Steps(workers=2)
    assert switch_mask(engine, PATH) == IN_FORCE
    resets = ["reset_prefix_cache True", "reset_mm_cache", "reset_encoder_cache"]
    assert engine.steps == ["mask_prepare", *resets, "mask_apply"]


def test_a_server_is_paused_after_all_is_checked_and_goes_on_after_weights_changed():
    engine = AsyncSteps(workers=2)
    assert switch_async(engine) == IN_FORCE
    assert engine.steps == ["mask_prepare", "pause wait True", "mask_apply", "resume"]


REFUSED = {"mask_prepare": [PREPARED, {"refused": "its checksum is wrong"}]}
SHORT = {"mask_prepare": [{"zeros": 5, "changes": 5, "held": 2}, {"zeros": 5, "changes": 5, "held": 2}]}


@pytest.mark.parametrize(
    ("answers", "reason"),
    [(REFUSED, f"'{PATH}' is refused: its checksum is wrong"), (SHORT, "of 5 weights .* finds 4 in the model")],
)
def test_what_any_worker_refuses_is_refused_before_anybody_waits(answers, reason):
    for engine, switch in (
        (Steps(**answers), switch_mask),
        (AsyncSteps(**answers), lambda each, _: switch_async(each)),
    ):
        with pytest.raises(AdapterRefusedError, match=reason):
            switch(engine, PATH)
        assert engine.steps == ["mask_prepare"]


@pytest.mark.parametrize(
    ("answers", "reason"),
    [({"unfinished": True}, "have not been finished"), ({"reset": False}, "could not be emptied")],
)
def test_an_engine_with_requests_is_not_switched(answers, reason):
    engine = Steps(**answers)
    with pytest.raises(RuntimeError, match=reason):
        switch_mask(engine, PATH)
    assert "mask_apply" not in engine.steps


BROKEN = {"mask_apply": [IN_FORCE, {"broken": "it stopped halfway."}]}
APART = {"mask_apply": [IN_FORCE, {"refused": "somebody else switched."}]}
DIFFERENT = {"mask_apply": [IN_FORCE, {**IN_FORCE, "digest": "e"}]}


@pytest.mark.parametrize(
    ("answers", "reason"),
    [(BROKEN, "it stopped halfway"), (APART, "under several masks"), (DIFFERENT, "under several masks")],
)
def test_after_half_a_switch_a_server_stays_paused_and_asks_to_be_restarted(answers, reason):
    with pytest.raises(SwitchFailedError, match=f"{reason}.*restart vLLM"):
        switch_mask(Steps(**answers), PATH)
    engine = AsyncSteps(**answers)
    with pytest.raises(SwitchFailedError, match=f"{reason}.*restart vLLM"):
        switch_async(engine)
    assert "resume" not in engine.steps


def test_an_engine_that_was_left_halfway_is_not_switched_again():
    earlier = {"mask_prepare": [PREPARED, {"broken": "it stopped halfway."}]}
    for engine, switch in (
        (Steps(**earlier), switch_mask),
        (AsyncSteps(**earlier), lambda each, _: switch_async(each)),
    ):
        with pytest.raises(SwitchFailedError, match=r"it stopped halfway\. .*restart vLLM"):
            switch(engine, PATH)
        assert engine.steps == ["mask_prepare"]


def test_a_server_whose_workers_do_not_answer_stays_paused():
    engine = AsyncSteps(mask_apply=TimeoutError("no answer"))
    with pytest.raises(SwitchFailedError, match=r"did not answer \(no answer\). Restart vLLM, which stays paused"):
        switch_async(engine)
    assert engine.steps[-1] == "mask_apply"


def test_a_server_goes_on_if_all_workers_refuse_to_apply():
    engine = AsyncSteps(mask_apply=[{"refused": "somebody else switched."}])
    with pytest.raises(AdapterRefusedError, match="somebody else"):
        switch_async(engine)
    assert engine.steps[-1] == "resume"


def test_a_server_that_somebody_else_paused_stays_so():
    engine = AsyncSteps(paused=True)
    switch_async(engine)
    assert "resume" not in engine.steps


def test_a_switch_that_nobody_waits_for_any_more_still_ends():
    async def cancelled(engine):
        task = asyncio.create_task(switch_mask_async(engine, PATH))
        while not engine.steps:
            await asyncio.sleep(0)
        task.cancel()
        for _ in range(20):
            await asyncio.sleep(0)

    engine = AsyncSteps()
    asyncio.run(cancelled(engine))
    assert engine.steps[-2:] == ["mask_apply", "resume"]


def test_two_switches_of_a_server_come_one_after_the_other():
    async def both(engine):
        await asyncio.gather(switch_mask_async(engine, PATH), switch_mask_async(engine, PATH))

    engine = AsyncSteps()
    asyncio.run(both(engine))
    assert engine.steps == ["mask_prepare", "pause wait True", "mask_apply", "resume"] * 2


def test_workers_without_the_extension_are_told_from_other_errors():
    start = "start vLLM with --worker-extension-cls"
    for error, reason in (
        (NotImplementedError("Method 'mask_in_force' is not implemented."), start),
        (Exception("Worker failed with error ''CPUWorker' object has no attribute 'mask_in_force''"), start),
        (OSError("gone"), "gone"),
    ):
        with pytest.raises((RuntimeError, OSError), match=reason):
            mask_in_force(Steps(mask_in_force=error))
        with pytest.raises((RuntimeError, OSError), match=reason):
            asyncio.run(mask_in_force_async(AsyncSteps(mask_in_force=error)))


def test_folders_are_named_in_full_as_workers_may_stand_elsewhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    engine = Steps()
    asked = []
    engine.collective_rpc = lambda method, args=(): asked.append(args) or engine.answers[method]
    switch_mask(engine, "a")
    switch_mask(engine, None)
    assert asked == [(str(tmp_path / "a"),)] * 2 + [(None,)] * 2
