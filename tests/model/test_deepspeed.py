"""DeepSpeed: ZeRO's pieces of matrices train the mask of one process, and what cannot be done under it is refused.

Most of it needs only what DeepSpeed leaves at parameters: `ds_shape` where ZeRO-3 keeps them in parts, `_hp_mapping`
where ZeRO-1 and ZeRO-2 train a copy of theirs.
"""

import importlib.util
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peft import get_peft_model, get_peft_model_state_dict
from torch import nn

from peft_mask import (
    DecayTowardKept,
    GradientDropout,
    HoldSparsity,
    MaskConfig,
    Masks,
    SignAdamW,
    SparsityPenalty,
    create_mask_optimizer,
)
from peft_mask.layers.mask_layer import MaskLayer
from tests.model.test_distributed import job
from tests.processes import leave

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed: pip install deepspeed"
)
WORLD, STEPS = 2, 6


def model(**fields):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(12, 33), nn.Tanh(), nn.Linear(33, 4))  # 40 and 13 scores
    return get_peft_model(layers, MaskConfig(target_modules=["0", "2"], **{"target_sparsity": 0.05} | fields))


def take_away(parameter):
    """Leave of a parameter what ZeRO-3 does outside the forward pass."""
    parameter.ds_shape = parameter.shape
    parameter.data = torch.empty(0)


# ---- sign steps of pieces ----


def steps_of(optimizers, parameters, gradients):
    """Let optimizers step, each by its own parameter's gradients."""
    for parts in gradients:
        for optimizer, p, part in zip(optimizers, parameters, parts, strict=True):
            p.grad = torch.tensor(part)
            optimizer.step()
    return torch.cat([p.detach() for p in parameters]).tolist()


def piecewise(monkeypatch, sizes):
    """Return optimizers of two processes that hold pieces of one matrix, and these pieces."""
    optimizers, pieces = [], []
    for size in sizes:
        optimizer = SignAdamW([{"params": [nn.Parameter(torch.zeros(5))], "sign": True, "lr": 1.0}])
        optimizer.param_groups[0]["params"] = [nn.Parameter(torch.zeros(size))]
        optimizers.append(optimizer)
        pieces.extend(optimizer.param_groups[0]["params"])

    def with_the_others(norms):
        assert len(norms) == 1
        return [sum(torch.linalg.vector_norm(torch.tensor(part), ord=1) for part in now["parts"])]

    now = {}
    monkeypatch.setattr("peft_mask.training.sign_adamw.sum_over_processes", with_the_others)
    return optimizers, pieces, now


def test_pieces_of_a_matrix_take_the_steps_of_the_matrix(monkeypatch):
    gradients = [([8.0, -8.0, 8.0], [8.0, 8.0]), ([0.01, -0.01, 0.01], [8.0, 8.0]), ([0.5, 0.5, 0.5], [0.1, -0.1])]
    p = nn.Parameter(torch.zeros(5))
    whole = SignAdamW([{"params": [p], "sign": True, "lr": 1.0}])
    expected = steps_of([whole], [p], [(a + b,) for a, b in gradients])
    optimizers, pieces, now = piecewise(monkeypatch, (3, 3))  # ZeRO pads the last piece
    for parts in gradients:
        now["parts"] = (parts[0], [*parts[1], 0.0])
        found = steps_of(optimizers, pieces, [now["parts"]])
    assert found == pytest.approx([*expected, 0.0])
    assert len(set(map(abs, expected))) > 1


def test_pieces_whose_gradients_are_not_finite_anywhere_are_skipped_everywhere(monkeypatch):
    optimizers, pieces, now = piecewise(monkeypatch, (3, 2))
    now["parts"] = ([1.0, 1.0, 1.0], [float("nan"), 1.0])
    with pytest.warns(UserWarning, match="the optimizer has skipped the step"):
        assert steps_of(optimizers, pieces, [now["parts"]]) == [0.0] * 5


def test_pieces_of_several_matrices_are_refused():
    optimizer = SignAdamW([{"params": [nn.Parameter(torch.zeros(4)) for _ in range(2)], "sign": True}])
    optimizer.param_groups[0]["params"] = [nn.Parameter(torch.zeros(4))]
    with pytest.raises(RuntimeError, match=r"under ZeRO, create_mask_optimizer\(model\), which makes a group for each"):
        optimizer.step()


def test_a_group_that_zero_3_has_emptied_for_now_is_no_piece():
    p, *others = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    optimizer = SignAdamW([{"params": [p], "sign": True, "lr": 1.0}, {"params": others, "sign": True}])
    optimizer.param_groups[1]["params"] = []
    assert steps_of([optimizer], [p], [([1.0, -1.0],)]) == [-1.0, 1.0]


def test_scores_that_take_sign_steps_have_a_group_each():
    groups = create_mask_optimizer(model()).param_groups
    assert [group["sizes"] for group in groups] == [[40], [13]]


# ---- parameters that ZeRO-3 keeps in parts ----


def test_a_weight_in_parts_is_refused_before_anything_changes():
    layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    take_away(layers[1].weight)
    with pytest.raises(
        ValueError, match=r"cannot mask '1': DeepSpeed ZeRO-3 keeps its weight of shape \(4, 4\) in parts"
    ):
        get_peft_model(layers, MaskConfig(target_modules=["0", "1"]))
    assert type(layers[0]) is nn.Linear


def test_a_weight_in_parts_is_not_merged():
    ours = model()
    take_away(ours.base_model.model[2].base_layer.weight)
    with pytest.raises(ValueError, match=r"cannot reach the weight of a Linear, of shape \(4, 33\).* Save the adapter"):
        ours.merge_adapter()
    assert not any(layer.merged for layer in ours.modules() if isinstance(layer, MaskLayer))


@pytest.mark.parametrize("portable", [True, False])
def test_an_adapter_is_saved_from_the_state_dict_though_all_is_in_parts(portable):
    expected = get_peft_model_state_dict(model())
    ours = model(portable=portable)
    state = {name: value.clone() for name, value in ours.state_dict().items()}
    for parameter in ours.parameters():
        take_away(parameter)
    with pytest.raises(ValueError, match=r"its scores are sharded over processes. Use trainer.save_model"):
        get_peft_model_state_dict(ours)
    if portable:
        saved = get_peft_model_state_dict(ours, state_dict=state)
    else:
        with pytest.warns(UserWarning, match="saved as with portable=True"):
            saved = get_peft_model_state_dict(ours, state_dict=state)
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in expected)


def test_an_empty_state_dict_makes_no_empty_adapter(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match=r"cannot save the adapter 'default': .* zero3_save_16bit_model: true"):
        model().save_pretrained(tmp_path, state_dict={})
    assert not (tmp_path / "adapter_model.safetensors").exists()
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    assert get_peft_model_state_dict(model(), state_dict={}) == {}


# ---- scores that DeepSpeed trains in a copy of its own ----

CHANGES = {
    "SparsityPenalty": SparsityPenalty(0.1),
    "GradientDropout": GradientDropout(0.1),
    "HoldSparsity": HoldSparsity(0.1),
    "DecayTowardKept": DecayTowardKept(0.1),
    "set_scores": lambda ours: ours.base_model.set_scores(lambda name, weight: weight),
    "set_candidates": lambda ours: ours.base_model.set_candidates({}),
}


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("mark", ["_hp_mapping", "ds_id"])
def test_what_deepspeed_would_overwrite_is_refused(what, mark):
    fields = {} if "set" in what else {"binarizer": "threshold", "target_sparsity": None, "candidates": None}
    ours = model(**fields)
    setattr(ours.base_model.model[0].peft_mask_scores["default"], mark, None)
    with pytest.raises(
        RuntimeError, match=f"{what} would have no effect: DeepSpeed takes its step within the backward"
    ):
        CHANGES[what](ours)


# ---- DeepSpeed itself ----


def train(ours, optimizer, rows, dtype=torch.float32):
    """Train by DeepSpeed if `ours` is its engine, else by torch."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        loss = ours(torch.randn(8, 12, generator=generator)[rows].to(dtype)).float().square().mean()
        if optimizer is None:
            ours.backward(loss)
            ours.step()
        else:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()


def on_each_rank(rank, folder):
    import deepspeed

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    try:
        for stage, dtype in ((1, torch.float32), (2, torch.float32), (3, torch.float32), (2, torch.bfloat16)):
            ours = model()
            engine, *_ = deepspeed.initialize(
                model=ours,
                optimizer=create_mask_optimizer(ours),
                config={
                    "train_micro_batch_size_per_gpu": 4,
                    "zero_allow_untested_optimizer": True,
                    "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
                    "bf16": {"enabled": dtype is torch.bfloat16},
                },
            )
            train(engine, None, slice(4 * rank, 4 * rank + 4), dtype)
            with pytest.raises(RuntimeError, match="set_scores would have no effect"):
                ours.base_model.set_scores(lambda name, weight: weight)
            if stage == 3:
                with pytest.raises(ValueError, match="DeepSpeed ZeRO-3 keeps it in parts"):
                    ours.merge_adapter()
            layers = {name: layer for name, layer in ours.named_modules() if isinstance(layer, MaskLayer)}
            torch.save({n: layer.mask("default") for n, layer in layers.items()}, f"{folder}/{stage}-{dtype}-{rank}.pt")
    finally:
        dist.destroy_process_group()
    leave()


@needs_deepspeed
@pytest.mark.slow
def test_zero_of_any_stage_trains_the_mask_of_one_process(tmp_path):
    one = model()
    train(one, create_mask_optimizer(one), slice(None))
    masks = {name: layer.mask("default") for name, layer in one.named_modules() if isinstance(layer, MaskLayer)}
    mp.spawn(on_each_rank, (str(tmp_path),), nprocs=WORLD)
    found = [torch.load(path) for path in tmp_path.glob("*.pt")]
    assert len(found) == 4 * WORLD
    for each in found:
        assert all(int((~mask).sum()) == int((~masks[name]).sum()) for name, mask in each.items())
        # other sums of the same gradients, and in bfloat16 other gradients: now and then another vote
        assert sum(int((each[name] != mask).sum()) for name, mask in masks.items()) <= 4


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["zero2", "zero3"])
def test_trainer_under_zero_trains_the_mask_of_one_process_and_resumes(tmp_path, kind):
    job(tmp_path / "one", 1, dtype="float32")
    job(tmp_path / kind, 2, "3", kind, "float32")
    assert list((tmp_path / kind / "checkpoint-3").glob("global_step3/*optim_states.pt"))  # so DeepSpeed has run
    job(tmp_path / kind, 2, "6", kind, "float32")
    one, found = Masks.load(tmp_path / "one"), Masks.load(tmp_path / kind)
    assert len(found) == 13
    assert {path.name for path in (tmp_path / kind).iterdir() if path.is_file()} == {
        "adapter_model.safetensors",
        "adapter_config.json",
        "README.md",
        "training_args.bin",
    }
    assert sum(int((found[name] != one[name]).sum()) for name in one) <= 4
