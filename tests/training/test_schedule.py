"""Budgets that grow: the share that schedules allow, and that training keeps to it."""

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from peft_mask import MaskCallback, MaskConfig, SparsitySchedule, keep_scores, spend_budget
from peft_mask.layers.mask_layer import MaskLayer
from peft_mask.model.saving import adapter_bytes
from peft_mask.training import callback
from tests.tiny_models import tiny_model
from tests.training.test_training import STEPS, masked_bert, rows, trainer


@pytest.mark.parametrize(
    ("schedule", "shares"),
    [
        (SparsitySchedule("linear", begin=0.2, end=0.6), [0.0, 0.0, 0.5, 1.0, 1.0]),
        (SparsitySchedule("cubic", begin=0.2, end=0.6), [0.0, 0.0, 0.875, 1.0, 1.0]),
        (SparsitySchedule("stepwise", begin=0.2, end=0.6, stages=3), [0.0, 0.0, 1 / 3, 1.0, 1.0]),
        (SparsitySchedule("stepwise", end=1.0, stages=5), [0.0, 0.2, 0.4, 0.6, 1.0]),
    ],
)
def test_shares_of_the_budget(schedule, shares):
    assert [schedule.share(t) for t in (0.0, 0.2, 0.4, 0.6, 1.0)] == pytest.approx(shares)
    through = [schedule.share(step / 100) for step in range(101)]
    assert through == sorted(through)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "quadratic"}, r"kind must be one of \['linear', 'cubic', 'stepwise'\], got 'quadratic'"),
        ({"begin": 0.5, "end": 0.5}, "0 <= begin < end <= 1, got 0\\.5 and 0\\.5"),
        ({"end": 1.5}, "got 0.0 and 1.5"),
        ({"stages": 0}, "stages must be a positive integer, got 0"),
    ],
)
def test_a_field_out_of_range_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        SparsitySchedule(**fields)


def layers(model):
    return [module for module in model.modules() if isinstance(module, MaskLayer)]


def zeros(model):
    return [int((~layer.mask("default")).sum()) for layer in layers(model)]


def test_a_share_is_spent_of_adapters_with_a_budget_and_the_budget_stays():
    config = MaskConfig(target_modules=["0"], target_sparsity=0.2, candidates=None)
    model = get_peft_model(nn.Sequential(nn.Linear(20, 10)), config)
    with torch.no_grad():
        model.base_model.model[0].peft_mask_scores["default"].uniform_(-2, -1)
    for share, expected in ((0.0, 1), (0.25, 10), (1.0, 40), (0.5, 20)):
        spend_budget(model, share)
        assert zeros(model) == [expected]
    assert config.target_sparsity == 0.2
    with pytest.raises(ValueError, match=r"share must be from 0 to 1, got 1\.5"):
        spend_budget(model, 1.5)
    plain = get_peft_model(nn.Sequential(nn.Linear(20, 10)), MaskConfig.paper(target_modules=["0"], seed=0))
    before = zeros(plain)
    spend_budget(plain, 0.5)
    assert zeros(plain) == before


def budget(model):
    return sum(layer.rule("default").zeros for layer in layers(model))


@pytest.mark.parametrize(("sparsity", "fits"), [(0.1, False), (0.2, True), (0.3, True)])
def test_scores_come_back_beside_a_mask_of_less_than_their_budget_and_not_of_more(tmp_path, sparsity, fits):
    def base():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(20, 10))

    model = get_peft_model(base(), MaskConfig(target_modules=["0"], target_sparsity=0.2, candidates=None))
    with torch.no_grad():
        model.base_model.model[0].peft_mask_scores["default"].uniform_(-2, -1)
    keep_scores(model)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"target_sparsity": sparsity}))
    if fits:
        loaded = PeftModel.from_pretrained(base(), tmp_path, is_trainable=True)
        assert zeros(loaded) == [40], "as in the file"
        assert budget(loaded) == round(200 * sparsity)
    else:
        with pytest.raises(ValueError, match="cannot load the scores of '0': they do not belong to the mask beside"):
            PeftModel.from_pretrained(base(), tmp_path, is_trainable=True)


class Watch(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.seen.append(budget(kwargs["model"]))


def test_a_callback_follows_its_schedule_through_a_resume(tmp_path):
    watch, model = Watch(), masked_bert(target_sparsity=0.05)
    whole = budget(model)
    callback = MaskCallback(SparsitySchedule("linear", end=1.0))
    saving = {"save_strategy": "steps", "save_steps": 3}
    trainer(model, tmp_path, callback, watch, **saving).train()
    assert watch.seen == pytest.approx([whole * step / STEPS for step in range(STEPS)], abs=len(zeros(model)))
    assert budget(model) == whole, "at the end"

    resumed, again = Watch(), masked_bert(target_sparsity=0.05)
    callback = MaskCallback(SparsitySchedule("linear", end=1.0))
    trainer(again, tmp_path, callback, resumed, **saving).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.seen == watch.seen[3:]
    assert zeros(again) == zeros(model)


@pytest.mark.parametrize(
    ("sparsity", "steps", "end"),
    [(0.005, 10_000, 0.2), (0.005, 100, 0.2), (0.005, 50, 0.4), (0.005, 10, 0.5), (0.02, 400, 0.2), (0.02, 100, 0.5)],
)
def test_gently_a_half_per_cent_takes_twenty_steps_or_a_fifth_of_the_training(sparsity, steps, end):
    schedule = SparsitySchedule.gentle(sparsity, steps)
    assert (schedule.kind, schedule.begin, schedule.end) == ("linear", 0, pytest.approx(end))


def new_masks():
    return masked_bert(target_sparsity=0.05)


def random_masks():
    return masked_bert(target_sparsity=0.05, init_weights=False)


@pytest.mark.parametrize(
    ("start", "schedule", "shares"),
    [
        (new_masks, {}, [0, 1 / 4, 1 / 2, 3 / 4, 1]),
        (new_masks, {"schedule": None}, [1] * 5),
        (random_masks, {}, [1] * 5),  # which have zeros to lose
        (random_masks, {"schedule": SparsitySchedule("linear", end=0.5)}, [0, 1 / 4, 1 / 2, 3 / 4, 1]),
    ],
    ids=["new", "new, at once", "from a mask", "from a mask, asked to grow"],
)
def test_by_default_the_budget_of_a_new_mask_grows_gently(tmp_path, start, schedule, shares):
    watch, model = Watch(), start()
    whole, steps = budget(model), {"max_steps": 8, "save_strategy": "steps", "save_steps": 2}
    trainer(model, tmp_path, MaskCallback(**schedule), watch, **steps).train()
    assert watch.seen[:5] == pytest.approx([whole * share for share in shares], abs=len(zeros(model)))
    assert watch.seen[5:] == [whole] * 3

    resumed, again = Watch(), start()
    checkpoint = str(tmp_path / "checkpoint-2")
    trainer(again, tmp_path, MaskCallback(**schedule), resumed, **steps).train(resume_from_checkpoint=checkpoint)
    assert resumed.seen == watch.seen[2:]
    assert bits_of(again) == bits_of(model)


def test_when_all_is_spent_no_step_sets_budgets(tmp_path, monkeypatch):
    shares, spend = [], callback.spend_budget
    monkeypatch.setattr(callback, "spend_budget", lambda model, share: [shares.append(share), spend(model, share)])
    trainer(new_masks(), tmp_path, MaskCallback(), max_steps=8).train()
    assert shares == [0, 1 / 4, 1 / 2, 3 / 4, 1]


def test_a_callback_that_is_added_later_resumes_as_from_new_masks(tmp_path):
    watch, steps = Watch(), {"max_steps": 8, "save_strategy": "steps", "save_steps": 2}
    trainer(new_masks(), tmp_path, MaskCallback(), watch, **steps).train()
    late = Watch()
    again = trainer(new_masks(), tmp_path, late, **steps)
    again.add_callback(MaskCallback())
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert late.seen == watch.seen[2:]


def test_a_second_training_of_a_mask_does_not_let_it_grow_anew(tmp_path):
    watch, model = Watch(), new_masks()
    twice = trainer(model, tmp_path, MaskCallback(), watch, max_steps=10)
    twice.train()
    assert watch.seen[0] < watch.seen[-1] == budget(model)
    watch.seen.clear()
    twice.train()
    assert watch.seen == [budget(model)] * 10


def test_a_model_without_masks_trains_with_the_callback(tmp_path):
    model = tiny_model("bert")
    plain = Trainer(
        model,
        TrainingArguments(tmp_path, max_steps=2, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True),
        train_dataset=rows(),
        callbacks=[MaskCallback()],
    )
    assert plain.train().global_step == 2


def test_a_schedule_is_followed_in_a_second_training_too(tmp_path):
    watch, model = Watch(), new_masks()
    twice = trainer(model, tmp_path, MaskCallback(SparsitySchedule("stepwise", end=1.0, stages=1)), watch, max_steps=2)
    for _ in range(2):
        twice.train()  # which starts at the share that the one before left, and ends with all
    assert watch.seen[:2] == watch.seen[2:] == [len(zeros(model))] * 2
    assert budget(model) > len(zeros(model))


def test_a_schedule_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"""schedule must be a SparsitySchedule, "auto" or None, got 'linear'."""):
        MaskCallback("linear")


def bits_of(model):
    named = {name: module for name, module in model.named_modules() if isinstance(module, MaskLayer)}
    return {name: layer.packed_mask("default").tolist() for name, layer in named.items()}


class Scores(TrainerCallback):
    """Gives the evaluations these accuracies, and remembers the masks that they saw."""

    def __init__(self, *accuracies):
        self.accuracies, self.seen, self.zeros = iter(accuracies), {}, {}

    def on_evaluate(self, args, state, control, **kwargs):
        self.seen[state.global_step] = bits_of(kwargs["model"])
        self.zeros[state.global_step] = sum(zeros(kwargs["model"]))

    def metrics(self, _):
        return {"accuracy": next(self.accuracies)}


@pytest.mark.parametrize("fields", [{"target_sparsity": 0.05}, {"target_bytes": 3000}])
@pytest.mark.parametrize("accuracies", [(0.5, 0.9, 0.7), (0.5, 0.7, 0.9)], ids=["best on the way", "best at the end"])
def test_the_best_checkpoint_keeps_the_budget_that_it_was_evaluated_with(tmp_path, accuracies, fields):
    model, watch = masked_bert(**fields), Scores(*accuracies)
    options = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    callback = MaskCallback(SparsitySchedule("linear", end=0.8))
    best = trainer(
        model, tmp_path, callback, watch, **options, load_best_model_at_end=True, metric_for_best_model="accuracy"
    )
    best.compute_metrics = watch.metrics
    best.train()
    assert list(watch.seen) == [2, 4, 6]
    assert watch.zeros[4] < watch.zeros[6], "the budget grows"
    now = bits_of(model)
    if best.state.best_global_step == 4:
        assert now == watch.seen[4]
    elif "target_sparsity" in fields:
        assert now == watch.seen[6]
    else:
        assert adapter_bytes(model.base_model.model, "default", portable=True) == pytest.approx(3000, rel=0.01)


def test_a_training_that_is_stopped_keeps_the_budget_that_it_had(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3
            self.seen = bits_of(kwargs["model"])

    stop, model = Stop(), masked_bert(target_sparsity=0.05)
    whole = budget(model)
    trainer(model, tmp_path, MaskCallback(SparsitySchedule("linear", end=1.0)), stop).train()
    assert bits_of(model) == stop.seen
    assert sum(zeros(model)) == pytest.approx(whole / 3, abs=len(zeros(model))), "as in the third step"
    assert budget(model) == whole, "for the next training"


def test_a_size_in_bytes_is_reached_at_the_end_of_a_schedule(tmp_path):
    model = masked_bert(target_bytes=3000)
    trainer(model, tmp_path, MaskCallback(SparsitySchedule("cubic"))).train()
    assert model.peft_config["default"].target_bytes == 3000
    assert adapter_bytes(model.base_model.model, "default", portable=True) == pytest.approx(3000, rel=0.01)
