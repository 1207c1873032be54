"""Training with plain Trainer: learning rates, figures in the logs, and exact resuming from checkpoints."""

import math

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments

from peft_mask import MaskCallback, MaskConfig, MaskStatistics, create_mask_optimizer
from peft_mask.layers.mask_layer import MaskLayer
from tests.tiny_models import tiny_inputs, tiny_model

STEPS = 6


def masked_bert(**fields):
    return get_peft_model(tiny_model("bert"), MaskConfig(task_type="SEQ_CLS", **fields))


def rows(n=16):
    inputs = tiny_inputs(tiny_model("bert"), batch_size=n, labels=True)
    return [{name: value[i] for name, value in inputs.items()} for i in range(n)]


def trainer(model, folder, *callbacks, **arguments):
    settings = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 5e-3,
        "logging_steps": 2,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    } | arguments
    optimizer = create_mask_optimizer(model, lr=1e-3, mask_lr=5e-3)
    return Trainer(
        model=model,
        args=TrainingArguments(**settings),
        train_dataset=rows(),
        eval_dataset=rows(),
        callbacks=list(callbacks),
        optimizers=(optimizer, None),
    )


def scores(model):
    return {name: value.detach().clone() for name, value in model.named_parameters() if "peft_mask_scores" in name}


# ---- optimizer ----


def test_scores_get_their_own_learning_rate_and_never_decay():
    model = masked_bert()
    optimizer = create_mask_optimizer(model, lr=1e-4, mask_lr=1e-2, weight_decay=0.1, eps=1e-7)
    by_parameter = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert by_parameter.keys() == {id(parameter) for parameter in trained.values()}
    for name, parameter in trained.items():
        group = by_parameter[id(parameter)]
        is_score = "peft_mask_scores" in name
        assert group["lr"] == (1e-2 if is_score else 1e-4), name
        assert group["weight_decay"] == (0.1 if name.endswith("weight") else 0.0), name
        assert group["eps"] == 1e-7


def test_another_optimizer_class_can_be_given():
    optimizer = create_mask_optimizer(masked_bert(), torch.optim.SGD, momentum=0.9)
    assert type(optimizer) is torch.optim.SGD
    assert optimizer.param_groups[0]["momentum"] == 0.9


def test_a_model_without_scores_is_refused():
    with pytest.raises(ValueError, match="no mask scores to train: wrap it with get_peft_model"):
        create_mask_optimizer(nn.Linear(2, 2))


# ---- statistics ----


def test_statistics_count_zeros_flips_and_entropy():
    config = MaskConfig(target_modules=["0", "1"], binarizer="threshold", candidates=None)
    model = get_peft_model(nn.Sequential(nn.Linear(10, 3), nn.Linear(3, 5)), config)
    statistics = MaskStatistics(model)
    assert statistics(model) == {"sparsity": 0.0, "flip_ratio": 0.0, "bits_per_weight": 0.0}
    with torch.no_grad():
        model.base_model.model[0].peft_mask_scores["default"][0, :3] = -1
    figures = statistics(model)
    entropy = -(0.1 * math.log2(0.1) + 0.9 * math.log2(0.9)) * 30
    assert figures == pytest.approx({"sparsity": 3 / 45, "flip_ratio": 3 / 45, "bits_per_weight": entropy / 45})
    later = MaskStatistics(model)
    with torch.no_grad():
        model.base_model.model[0].peft_mask_scores["default"][0, 0] = 1
    assert later(model)["flip_ratio"] == pytest.approx(1 / 45)
    assert later(model)["sparsity"] == pytest.approx(2 / 45)


# ---- Trainer ----


def test_plain_trainer_trains_and_the_callback_logs_the_masks(tmp_path):
    model = masked_bert()
    plain = trainer(model, tmp_path, MaskCallback())
    plain.train()
    logged = [entry for entry in plain.state.log_history if "loss" in entry]
    assert len(logged) == STEPS // 2
    for entry in logged:
        assert {"sparsity", "flip_ratio", "bits_per_weight"} <= entry.keys()
    masks = [layer.mask("default") for layer in model.modules() if isinstance(layer, MaskLayer)]
    zeros, weights = sum(int((~mask).sum()) for mask in masks), sum(mask.numel() for mask in masks)
    assert zeros > 0
    assert logged[-1]["sparsity"] == pytest.approx(zeros / weights, abs=1e-6)


class Interrupt(TrainerCallback):
    """Stops right after the checkpoint of step 3, as a lost machine would."""

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt


RESUMED = {
    "default": {},
    "bfloat16": {"scores_dtype": "bfloat16"},
    "sign": {"binarizer": "sign"},
    "bernoulli": {"binarizer": "bernoulli", "init_sparsity": 0.499},
    "n:m": {"binarizer": "n:m", "candidates": None},
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_ends_as_the_uninterrupted_one(tmp_path, name):
    fields = RESUMED[name]
    whole = masked_bert(**fields)
    saving = {"save_strategy": "steps", "save_steps": 3}
    uninterrupted = trainer(whole, tmp_path / "a", MaskCallback(), **saving)
    uninterrupted.train()

    with pytest.raises(KeyboardInterrupt):
        trainer(masked_bert(**fields), tmp_path / "b", MaskCallback(), Interrupt(), **saving).train()
    resumed = masked_bert(**fields)
    again = trainer(resumed, tmp_path / "b", MaskCallback(), **saving)
    again.train(resume_from_checkpoint=True)

    expected = scores(whole)
    assert expected
    if name != "sign":  # whose margins are longer than so few steps
        assert any((value < 0).any() for value in expected.values())
    for key, value in scores(resumed).items():
        assert torch.equal(value, expected[key]), key
    for model, folder in ((whole, "whole"), (resumed, "resumed")):
        model.save_pretrained(tmp_path / folder)
    names = ["whole/adapter_model.safetensors", "resumed/adapter_model.safetensors"]
    first, second = ((tmp_path / name).read_bytes() for name in names)
    assert first == second
    logs = [[entry for entry in t.state.log_history if "loss" in entry] for t in (uninterrupted, again)]
    assert logs[0][-1] == logs[1][-1]


def test_resuming_without_the_callback_warns(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 3}
    trainer(masked_bert(), tmp_path, **saving).train()
    with pytest.warns(UserWarning, match="train with MaskCallback, which keeps the scores in checkpoints"):
        trainer(masked_bert(), tmp_path, **saving).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_scores_are_not_uploaded_by_a_transformers_that_asks_no_callback_before_it(tmp_path, monkeypatch):
    monkeypatch.delattr(TrainerCallback, "on_push_begin", raising=False)
    model = masked_bert()
    with pytest.raises(ValueError, match=r'"every_save" would upload the scores .* Set hub_strategy="end"'):
        MaskCallback().on_train_begin(TrainingArguments(tmp_path, push_to_hub=True), TrainerState(), None, model=model)
    MaskCallback().on_train_begin(
        TrainingArguments(tmp_path, push_to_hub=True, hub_strategy="end"), TrainerState(), None, model=model
    )


def test_the_best_checkpoint_comes_back_with_its_scores(tmp_path):
    model = masked_bert()
    best = trainer(
        model,
        tmp_path,
        MaskCallback(),
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
    )
    best.train()
    checkpoint = load_file(best.state.best_model_checkpoint + "/adapter_model.safetensors")
    loaded = {name.removesuffix(".default"): value for name, value in scores(model).items()}
    assert loaded
    for name, value in loaded.items():
        assert torch.equal(value, checkpoint[name])


def test_training_that_stops_early_leaves_the_best_adapter(tmp_path):
    model = masked_bert()
    seen = {}

    class Watch(TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            seen[state.global_step] = scores(kwargs["model"])

    best = trainer(
        model,
        tmp_path,
        MaskCallback(),
        Watch(),
        EarlyStoppingCallback(early_stopping_patience=1),
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
    )
    accuracies = iter([0.5, 0.7, 0.6, 0.9])
    best.compute_metrics = lambda _: {"accuracy": next(accuracies)}
    best.train()
    assert best.state.global_step == 3
    now = scores(model)
    assert all(torch.equal(value, seen[2][name]) for name, value in now.items())
    assert any((value != seen[3][name]).any() for name, value in now.items())


def test_checkpoints_hold_scores_and_the_final_adapter_does_not(tmp_path):
    model = masked_bert()
    trainer(model, tmp_path, MaskCallback(), save_strategy="steps", save_steps=3).train()
    model.save_pretrained(tmp_path / "final")
    layers = sum(isinstance(module, MaskLayer) for module in model.modules())
    for folder, expected in (("checkpoint-3", layers), ("checkpoint-6", layers), ("final", 0)):
        keys = load_file(tmp_path / folder / "adapter_model.safetensors").keys()
        assert sum(key.endswith("peft_mask_scores") for key in keys) == expected
        assert sum(key.endswith("peft_mask_bits") for key in keys) == layers


@pytest.mark.parametrize("fields", [{}, {"binarizer": "bernoulli"}, {"binarizer": "n:m", "candidates": None}])
def test_gradient_checkpointing_gives_the_same_gradients(fields):
    gradients = []
    for enabled in (False, True):
        model = masked_bert(init_weights=False, seed=0, **fields)
        if enabled:
            base = model.base_model.model
            # the second is its name in older versions of transformers, where the default is another, and deprecated now
            enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        torch.manual_seed(0)  # older attention has the rate of its dropout elsewhere
        model(**tiny_inputs(model, labels=True)).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert any("peft_mask_scores" in name for name in gradients[0])
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name])


def test_scores_of_a_model_in_double_precision_stay_so_in_a_resume(tmp_path):
    model = masked_bert().double()
    first = trainer(model, tmp_path, MaskCallback(), save_strategy="steps", save_steps=2)
    first.train()
    resumed = trainer(masked_bert().double(), tmp_path, MaskCallback(), save_strategy="steps", save_steps=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, parameter in resumed.model.named_parameters():
        if "peft_mask_scores" in name:
            assert parameter.dtype == torch.float64
            assert torch.equal(parameter, model.get_parameter(name)), name
