"""What the extension does in a worker, with a model that is loaded as vLLM's are."""

import pytest
import torch

from peft_mask import Masks
from tests.vllm.pretend import Worker, pretend_vllm, scatter

SHAPES = {"layer.q_proj": (8, 6), "layer.k_proj": (4, 6), "layer.head": (10, 6)}


def write(folder, seed, names=tuple(SHAPES)):
    generator = torch.Generator().manual_seed(seed)
    masks = Masks({name: torch.rand(SHAPES[name], generator=generator) > 0.3 for name in names})
    masks.save(folder)
    return masks


def masked(untouched, masks):
    """The packed weights under masks."""
    qkv = torch.cat([masks["layer.q_proj"], masks["layer.k_proj"]]) if "layer.k_proj" in masks else None
    return {
        "layer.qkv_proj.weight": untouched["layer.qkv_proj.weight"] * (1 if qkv is None else qkv),
        "layer.head.weight": untouched["layer.head.weight"] * masks["layer.head"],
    }


def check_equal(some, others):
    assert some.keys() == others.keys()
    for name, weight in some.items():
        assert torch.equal(weight, others[name]), name


def switch(worker, adapter):
    prepared = worker.mask_prepare(adapter)
    assert "refused" not in prepared, prepared
    return worker.mask_apply(adapter)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_any_switch_gives_masked_weights_and_the_base_comes_back_to_the_bit(tmp_path, monkeypatch, dtype):
    pretend_vllm(monkeypatch)
    worker = Worker(tmp_path / "base", dtype)  # a checkpoint in float32, served in another dtype
    untouched = worker.weights()
    masks = {str(tmp_path / name): write(tmp_path / name, seed) for seed, name in enumerate("abc")}
    masks[str(tmp_path / "d")] = write(tmp_path / "d", 3, names=["layer.head"])
    for adapter in [*masks, *reversed(masks), None, *masks]:
        report = switch(worker, adapter)
        assert report["adapter"] == adapter
        check_equal(worker.weights(), untouched if adapter is None else masked(untouched, masks[adapter]))
    switch(worker, None)
    check_equal(worker.weights(), untouched)


def test_preparing_changes_nothing_and_counts_what_would_change(tmp_path, monkeypatch):
    pretend_vllm(monkeypatch)
    worker = Worker(tmp_path / "base")
    untouched, zeros = worker.weights(), sum(write(tmp_path / "a", 0).zeros.values())
    report = worker.mask_prepare(str(tmp_path / "a"))
    assert report == {"zeros": zeros, "changes": zeros, "held": zeros}
    check_equal(worker.weights(), untouched)
    assert worker.mask_in_force() == {"adapter": None, "digest": None, "zeros": 0}


def test_what_somebody_else_prepared_is_not_applied(tmp_path, monkeypatch):
    pretend_vllm(monkeypatch)
    worker = Worker(tmp_path / "base")
    untouched = worker.weights()
    write(tmp_path / "a", 0), write(tmp_path / "b", 1)
    worker.mask_prepare(str(tmp_path / "a"))
    worker.mask_prepare(str(tmp_path / "b"))
    assert "somebody else" in worker.mask_apply(str(tmp_path / "a"))["refused"]
    assert "somebody else" in worker.mask_apply(str(tmp_path / "b"))["refused"]  # which the first took away
    check_equal(worker.weights(), untouched)


def test_after_a_failure_halfway_the_worker_says_so_to_whatever_it_is_asked(tmp_path, monkeypatch):
    def half(model, patches):
        scatter(model, patches[:1])
        raise RuntimeError("no memory")

    pretend_vllm(monkeypatch, load=half)
    worker = Worker(tmp_path / "base")
    write(tmp_path / "a", 0)
    for report in (switch(worker, str(tmp_path / "a")), worker.mask_in_force(), worker.mask_prepare(None)):
        assert "stopped halfway (no memory)" in report["broken"]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"quantization": "awq"}, r"the base is quantized \(awq\)"),
        ({"use_mla": True}, "computes with matrices made of its weights"),
        ({"model": "somebody/nothing"}, "is no folder and was not downloaded"),
    ],
)
def test_models_that_compute_with_something_else_are_refused(tmp_path, monkeypatch, settings, reason):
    pretend_vllm(monkeypatch)
    write(tmp_path / "a", 0)
    refused = Worker(tmp_path / "base", **settings).mask_prepare(str(tmp_path / "a"))["refused"]
    with pytest.raises(ValueError, match=reason):
        raise ValueError(refused)


@pytest.mark.parametrize("field", ["pipeline_parallel_size", "enable_expert_parallel"])
def test_layers_spread_over_workers_are_refused(tmp_path, monkeypatch, field):
    pretend_vllm(monkeypatch)
    worker = Worker(tmp_path / "base")
    setattr(worker.vllm_config.parallel_config, field, 2)
    assert "spread over workers" in worker.mask_prepare(None)["refused"]


def test_a_vllm_of_another_release_is_refused(tmp_path, monkeypatch):
    pretend_vllm(monkeypatch, version="0.33.1")
    refused = Worker(tmp_path / "base").mask_prepare(None)["refused"]
    assert "made for vLLM 0.32" in refused
    assert "this is 0.33.1" in refused
