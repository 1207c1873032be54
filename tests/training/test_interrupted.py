"""Trainings that end early: what their masks then are, and that the next training has the whole budget."""

import json
from contextlib import suppress

import pytest
import torch
from peft import PeftModel
from transformers import TrainerCallback

from peft_mask import MaskCallback, Masks, SparsitySchedule, create_mask_optimizer, keep_scores, spend_budget
from tests.tiny_models import tiny_inputs, tiny_model
from tests.training.test_schedule import Watch, bits_of, budget, layers, new_masks, zeros
from tests.training.test_training import trainer

STEPS = 10  # of which the gentle budget of such a model takes half
LINEAR = SparsitySchedule("linear", end=1.0)
SAVING = {"save_strategy": "steps", "save_steps": 1}


class End(TrainerCallback):
    """Ends a training after its second step, in which a fifth of the budget was let."""

    def __init__(self, how):
        self.how = how

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            if self.how == "stop":
                control.should_training_stop = True
            else:
                raise self.how


def train(model, folder, *callbacks, schedule="auto", **arguments):
    watch = Watch()
    ours = trainer(model, folder, MaskCallback(schedule), watch, *callbacks, **{"max_steps": STEPS} | arguments)
    return ours, watch


def loop(model, shares=(), optimizer=None):
    """A loop of one's own: two steps with a growing budget, or as many as there are shares."""
    optimizer = optimizer or create_mask_optimizer(model)
    for share in shares or (None, None):
        if share is not None:
            spend_budget(model, share)
        model(**tiny_inputs(model, labels=True)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def interrupted(folder, how):
    """A model whose training ended early, and its trainer if it had one."""
    model = new_masks()
    if how == "loop":
        loop(model, (0.0, 0.2))
        return model, None
    ours, _ = train(model, folder, End(how))
    if how == "stop":
        ours.train()
    else:
        with pytest.raises(how):
            ours.train()
    ours.callback_handler.callbacks = [call for call in ours.callback_handler.callbacks if not isinstance(call, End)]
    return model, ours


ENDS = [RuntimeError, KeyboardInterrupt, "stop", "loop"]


@pytest.mark.parametrize("how", ENDS)
def test_after_a_training_that_ended_early_the_mask_is_that_of_its_last_step(tmp_path, how):
    model, _ = interrupted(tmp_path, how)
    whole = budget(new_masks())
    before, off = bits_of(model), sum(zeros(model))
    assert 0 < off <= 0.2 * whole + len(zeros(model))
    model.eval()(**tiny_inputs(model))
    create_mask_optimizer(model)
    assert bits_of(model) == before
    keep_scores(model, enabled=False)
    model.save_pretrained(tmp_path / "saved")
    assert sum(Masks.load(tmp_path / "saved").zeros.values()) == off
    assert json.loads((tmp_path / "saved/adapter_config.json").read_text())["target_sparsity"] == 0.05


@pytest.mark.parametrize("how", ENDS)
@pytest.mark.parametrize("schedule", ["auto", None, LINEAR], ids=["auto", "none", "linear"])
def test_the_next_training_spends_the_whole_budget(tmp_path, how, schedule):
    model, _ = interrupted(tmp_path, how)
    again, watch = train(model, tmp_path, schedule=schedule)
    again.train()
    assert watch.seen == sorted(watch.seen), "it only grows"
    assert budget(model) == budget(new_masks())
    assert sum(zeros(model)) > 0.9 * budget(model)
    if schedule is None:
        assert set(watch.seen) == {budget(model)}
    elif schedule == "auto":
        assert watch.seen[0] == pytest.approx(0.2 * budget(model), abs=2 * len(zeros(model))), "from where it was"


@pytest.mark.parametrize("how", [RuntimeError, "stop"])
def test_so_does_the_same_trainer_when_it_is_called_again(tmp_path, how):
    model, ours = interrupted(tmp_path, how)
    ours.train()
    assert sum(zeros(model)) > 0.9 * budget(new_masks())


@pytest.mark.parametrize("how", ENDS)
@pytest.mark.parametrize("training", [True, False], ids=["in training", "in evaluation, which is without dropout"])
def test_so_does_a_loop_that_says_nothing_of_budgets(tmp_path, how, training):
    model, _ = interrupted(tmp_path, how)
    loop(model.train(training))
    assert budget(model) == budget(new_masks())
    assert sum(zeros(model)) > 0.7 * budget(model), "few votes do not fill all of it"


def test_after_a_stop_any_optimizer_has_the_whole_budget(tmp_path):
    model, _ = interrupted(tmp_path, "stop")
    loop(model, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3))
    assert sum(zeros(model)) > 0.7 * budget(new_masks())


@pytest.mark.parametrize("schedule", ["auto", LINEAR], ids=["auto", "linear"])
def test_a_batch_that_was_too_large_begins_anew(tmp_path, schedule):
    class OutOfMemory(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2 and state.train_batch_size == 4:
                raise RuntimeError("CUDA out of memory.")

    model = new_masks()
    ours, _ = train(model, tmp_path, OutOfMemory(), schedule=schedule, auto_find_batch_size=True)
    ours.train()
    assert ours.state.train_batch_size < 4
    assert sum(zeros(model)) > 0.9 * budget(new_masks())


@pytest.fixture
def whole(tmp_path):
    """What a training that was not interrupted came to, with a checkpoint of every step."""
    model = new_masks()
    ours, watch = train(model, tmp_path / "whole", **SAVING)
    ours.train()
    return model, watch.seen


@pytest.mark.parametrize("how", [RuntimeError, "stop"])
def test_a_training_that_goes_on_in_the_same_model_keeps_the_share_that_it_had(tmp_path, whole, how):
    model = new_masks()
    ours, _ = train(model, tmp_path, End(how), **SAVING)
    with suppress(RuntimeError):
        ours.train()
    again, watch = train(model, tmp_path, **SAVING)
    again.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-1"))
    assert watch.seen == whole[1][1:]
    assert bits_of(model) == bits_of(whole[0])


@pytest.mark.parametrize("schedule", ["auto", LINEAR], ids=["auto", "linear"])
@pytest.mark.parametrize("checkpoint", [3, STEPS])
def test_going_on_for_more_steps_than_planned_gives_no_zeros_back(tmp_path, checkpoint, schedule):
    first, before = train(new_masks(), tmp_path, schedule=schedule, **SAVING)
    first.train()
    model = new_masks()
    longer, after = train(model, tmp_path, schedule=schedule, max_steps=3 * STEPS)
    longer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{checkpoint}"))
    assert after.seen[0] >= before.seen[checkpoint - 1]
    assert after.seen == sorted(after.seen)
    if checkpoint == STEPS:
        assert set(after.seen) == {budget(model)}


def test_evaluated_at_the_start_a_resumed_training_is_what_its_checkpoint_was(tmp_path, whole):
    losses = []

    class Losses(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **kwargs):
            losses.append((state.global_step, bits_of(kwargs["model"])))
            control.should_training_stop = True

    ours, _ = train(new_masks(), tmp_path, Losses(), eval_on_start=True)
    ours.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    saved = PeftModel.from_pretrained(tiny_model("bert"), tmp_path / "whole/checkpoint-2")
    assert losses[0] == (2, bits_of(saved))


def test_a_checkpoint_is_the_mask_that_it_was_until_it_is_trained(tmp_path, whole):
    checkpoint = tmp_path / "whole/checkpoint-2"
    saved = PeftModel.from_pretrained(tiny_model("bert"), checkpoint)
    loaded = PeftModel.from_pretrained(tiny_model("bert"), checkpoint, is_trainable=True)
    inputs = tiny_inputs(saved)
    assert bits_of(loaded) == bits_of(saved)
    assert torch.equal(loaded.eval()(**inputs).logits, saved.eval()(**inputs).logits)
    loaded.save_pretrained(tmp_path / "again")
    assert Masks.load(tmp_path / "again") == Masks.load(checkpoint)
    assert sum(zeros(loaded)) < 0.4 * budget(loaded)
    loop(loaded)
    assert sum(zeros(loaded)) > 0.7 * budget(loaded)


def test_so_it_is_through_the_door_of_transformers(tmp_path, whole):
    checkpoint = tmp_path / "whole/checkpoint-2"
    saved = PeftModel.from_pretrained(tiny_model("bert"), checkpoint)
    model = tiny_model("bert")
    model.load_adapter(str(checkpoint), is_trainable=True)
    assert list(bits_of(model).values()) == list(bits_of(saved).values())


def test_a_checkpoint_loads_over_a_training_that_was_interrupted_earlier(tmp_path, whole):
    model, _ = interrupted(tmp_path, RuntimeError)
    checkpoint = tmp_path / f"whole/checkpoint-{STEPS}"
    model.load_adapter(str(checkpoint), "default")
    assert bits_of(model) == bits_of(PeftModel.from_pretrained(tiny_model("bert"), checkpoint))


def test_scores_that_are_set_have_the_whole_budget(tmp_path, whole):
    loaded = PeftModel.from_pretrained(tiny_model("bert"), tmp_path / "whole/checkpoint-2", is_trainable=True)
    loaded.base_model.set_scores(lambda name, weight: -weight.abs() - 1)
    assert sum(zeros(loaded)) == budget(loaded)
    assert len(layers(loaded)) == len(zeros(loaded))
