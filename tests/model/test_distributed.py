"""Several processes train the mask that one would."""

import importlib

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

from peft_mask import (
    DecayTowardKept,
    GradientDropout,
    HoldSparsity,
    MaskConfig,
    MaskStatistics,
    SparsityPenalty,
    create_mask_optimizer,
)
from peft_mask.layers.mask_layer import MaskLayer
from tests.processes import launch, leave

WORLD, STEPS = 2, 6

THRESHOLD = {"binarizer": "threshold", "init_weights": "uniform", "init_sparsity": 0.1, "seed": 0}

# what is trained -> fields of MaskConfig
CASES = {
    "topk": {"target_sparsity": 0.03},
    "bernoulli": {"binarizer": "bernoulli", "init_sparsity": 0.3, "candidates": None},
    "n:m": {"binarizer": "n:m", "candidates": None},
    "rows": {"structure": "row", "target_sparsity": 0.1, "candidates": None},
    "unreached": {"target_sparsity": 0.03},
    "steered": {**THRESHOLD, "candidates": None},
    "held": {**THRESHOLD, "candidates": 0.5},
}
BEFORE = {"steered": [SparsityPenalty(0.3, weight=30.0), GradientDropout(0.5)]}
AFTER = {"steered": [DecayTowardKept(0.05)], "held": [HoldSparsity(0.2)]}
KINDS = ("ddp", "fsdp2")


class Mlp(nn.Sequential):
    """Two layers, and a third that no input reaches."""

    def forward(self, x):
        return self[2](self[1](self[0](x)))


def model(case):
    torch.manual_seed(0)  # in float64 no gradient is so close to zero that the order of a sum decides its sign
    mlp = Mlp(nn.Linear(12, 32), nn.Tanh(), nn.Linear(32, 4), nn.Linear(4, 4)).double()
    targets = ["0", "2", "3"] if case == "unreached" else ["0", "2"]
    return get_peft_model(mlp, MaskConfig(target_modules=targets, **CASES[case]))


def train(model, case, rows=slice(None)):
    # drawn masks follow from every bit of the scores, and processes sum gradients in another order than one does
    drawn, rate = case == "bernoulli", {"bernoulli": 0.5, "steered": 0.02, "held": 0.02}.get(case)
    optimizer = create_mask_optimizer(model, Rounded, mask_lr=rate) if rate else create_mask_optimizer(model)
    plain = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    generator = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        x = torch.randn(8, 12, generator=generator, dtype=torch.float64)
        # gradients fall far enough for the optimizer's steps to shrink, by the mean of all of them and not of a shard
        (model(x[rows]).square().mean() / (1 if drawn else 8**step)).backward()
        for call in BEFORE.get(case, ()):
            call(plain)
        optimizer.step()
        for call in AFTER.get(case, ()):
            call(plain)
        optimizer.zero_grad()


def drawn(seed):
    """A model whose candidates are drawn from the global generator."""
    torch.manual_seed(0)
    mlp = Mlp(nn.Linear(12, 32), nn.Tanh(), nn.Linear(32, 4))
    torch.manual_seed(seed)
    return get_peft_model(mlp, MaskConfig(target_modules=["0", "2"], candidate_rule="random"))


def positions_of(model):
    return {name: buffer.clone() for name, buffer in model.named_buffers() if "positions" in name}


class Rounded(torch.optim.SGD):
    """Gradient descent whose steps are a few sizes: the sign, or nothing for a small gradient."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.grad.copy_(p.grad.sign() * (p.grad.abs() > 1e-9))
        return super().step(closure)


def train_sharded(ours, case, rows, **settings):
    """Train under FSDP2; the state dict of all shards, on the first process."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard

    for layer in [module for module in ours.modules() if isinstance(module, MaskLayer)]:
        fully_shard(layer, **settings)
    fully_shard(ours, **settings)
    train(ours, case, rows)
    local = [p for name, p in ours.named_parameters() if "scores" in name]
    assert all(p.to_local().numel() < p.numel() for p in local)
    whole = masks_of(ours)
    with pytest.raises(ValueError, match=r"its scores are sharded over processes. Use trainer.save_model"):
        get_peft_model_state_dict(ours)
    state = get_model_state_dict(ours, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return state, whole


def masks_of(model):
    return {name: layer.mask("default") for name, layer in model.named_modules() if isinstance(layer, MaskLayer)}


def on_each_rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    rows = slice(4 * rank, 4 * rank + 4)
    try:
        for case in CASES:
            ours = model(case)
            train(nn.parallel.DistributedDataParallel(ours, find_unused_parameters=case == "unreached"), case, rows)
            ours.save_pretrained(f"{folder}/ddp/{case}/{rank}")
            sharded = model(case)
            state, masks = train_sharded(sharded, case, rows)
            torch.save(masks, f"{folder}/{case}-{rank}.pt")
            if rank == 0:
                sharded.save_pretrained(f"{folder}/fsdp2/{case}/{rank}", state_dict=state)
            dist.barrier()
        for kind, seed in (("alike", 0), ("apart", rank)):
            ours = drawn(seed)
            before = positions_of(ours)
            replica = nn.parallel.DistributedDataParallel(ours)
            replica(torch.ones(2, 12)).sum().backward()
            torch.save((before, positions_of(ours), list(replica.named_module_buffers)), f"{folder}/{kind}-{rank}.pt")
        policy = dist.fsdp.MixedPrecisionPolicy(torch.bfloat16, torch.float32)
        _, masks = train_sharded(model("topk"), "topk", rows, mp_policy=policy)
        torch.save(masks, f"{folder}/mixed-{rank}.pt")
    finally:
        dist.destroy_process_group()
    leave()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with what processes trained."""
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(on_each_rank, (str(folder),), nprocs=WORLD)
    return folder


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_processes_train_the_mask_that_one_trains(tmp_path, trained, kind, case):
    one = model(case)
    train(one, case)
    one.save_pretrained(tmp_path)
    expected = load_file(tmp_path / "adapter_model.safetensors")
    assert any(int((~mask).sum()) for mask in masks_of(one).values())
    for rank in range(WORLD if kind == "ddp" else 1):
        saved = load_file(trained / kind / case / str(rank) / "adapter_model.safetensors")
        assert saved.keys() == expected.keys()
        assert all(torch.equal(saved[key], expected[key]) for key in expected)


@pytest.mark.parametrize("kind", ["alike", "apart"])
def test_processes_that_drew_other_candidates_train_those_of_the_first(trained, kind):
    (first, of_first, sent), (second, of_second, _) = (torch.load(trained / f"{kind}-{rank}.pt") for rank in range(2))
    assert all(torch.equal(first[name], second[name]) == (kind == "alike") for name in first)
    assert all(torch.equal(of_first[name], first[name]) for name in first)
    assert all(torch.equal(of_second[name], first[name]) for name in first)
    assert sent == ([] if kind == "alike" else list(first)), "before each forward pass"


@pytest.mark.parametrize("case", CASES)
def test_every_process_sees_the_whole_mask_of_scores_that_are_sharded(trained, case):
    one = model(case)
    train(one, case)
    for rank in range(WORLD):
        masks = torch.load(trained / f"{case}-{rank}.pt")
        assert all(torch.equal(masks[name], mask) for name, mask in masks_of(one).items())


def test_sharded_scores_are_trained_in_mixed_precision(trained):
    one = model("topk")
    train(one, "topk")
    expected = masks_of(one)
    for rank in range(WORLD):
        masks = torch.load(trained / f"mixed-{rank}.pt")
        assert all(int((~mask).sum()) == round(0.03 * mask.numel()) for mask in masks.values() if mask.numel() > 16)
        # gradients of another precision: now and then another vote
        assert sum(int((masks[name] != mask).sum()) for name, mask in expected.items()) <= 4


def in_pieces():
    """A model as FSDP1 leaves it outside the forward pass."""
    ours = model("topk")
    for parameter in ours.parameters():
        parameter._fsdp_flattened = True
        parameter.data = parameter.data.flatten()[: parameter.numel() // 2]
    return ours


@pytest.mark.parametrize(
    "use",
    [
        MaskStatistics,
        masks_of,
        get_peft_model_state_dict,
        lambda ours: get_peft_model_state_dict(ours, state_dict=model("topk").state_dict()),
        lambda ours: ours.merge_adapter(),
        lambda ours: ours.base_model.set_target_sparsity(0.02),
    ],
    ids=["statistics", "mask", "save", "save whole", "merge", "budget"],
)
def test_whatever_needs_a_mask_refuses_the_pieces_of_fsdp1(use):
    with pytest.raises(RuntimeError, match=r"FSDP1 keeps the weight of a Linear as a piece .* Use FSDP2"):
        use(in_pieces())


def test_one_sharded_adapter_is_an_ordinary_one(trained):
    files = {path.name for path in (trained / "fsdp2" / "topk" / "0").iterdir()}
    assert files == {"adapter_model.safetensors", "adapter_config.json", "README.md"}
    loaded = PeftModel.from_pretrained(model("topk").unload(), trained / "fsdp2" / "topk" / "0")
    assert all(int((~mask).sum()) == round(0.03 * mask.numel()) for mask in masks_of(loaded).values())


def job(folder, processes, steps="6", kind="ddp", dtype="float64"):
    """Run `distributed_job.py`; the adapter that it saves."""
    launch("tests/distributed_job.py", str(folder), steps, dtype, processes=processes, kind=kind)
    return load_file(folder / "adapter_model.safetensors")


def assert_same_masks(adapter, expected):
    assert adapter.keys() == expected.keys()
    masks = [key for key in expected if key.endswith("peft_mask_bits")]
    assert len(masks) == 13
    assert all(torch.equal(adapter[key], expected[key]) for key in masks)
    for key in expected.keys() - set(masks):  # of a trained head the order of a sum does change the last bit
        torch.testing.assert_close(adapter[key], expected[key], rtol=1e-10, atol=1e-12)


def replicas(model, count, monkeypatch):
    """The copies of a model that DataParallel makes, a GPU each, here on the CPU; gradients reach the original."""
    replicate = importlib.import_module("torch.nn.parallel.replicate")
    monkeypatch.setattr(replicate, "_get_device_index", lambda device, optional: device)
    monkeypatch.setattr(
        replicate,
        "_broadcast_coalesced_reshape",
        lambda tensors, devices, detach=False: [[tensor.view_as(tensor) for tensor in tensors] for _ in devices],
    )
    return replicate.replicate(model, list(range(count)))


@pytest.mark.parametrize("fields", [{}, {"mask_biases": True}, {"binarizer": "threshold", "candidates": None}], ids=str)
def test_data_parallel_trains_and_computes_with_the_masks_of_the_model(fields, tmp_path, monkeypatch):
    def base():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 8))

    x = torch.randn(6, 12)
    model = get_peft_model(base(), MaskConfig(target_modules=["0", "2"], init_weights=False, seed=0, **fields))
    y = model(x)
    y.square().mean().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    parts = [replica(rows) for replica, rows in zip(replicas(model, 2, monkeypatch), x.chunk(2), strict=True)]
    torch.testing.assert_close(torch.cat(parts), y)
    torch.cat(parts).square().mean().backward()
    for name, gradient in expected.items():
        assert gradient.any()
        torch.testing.assert_close(model.get_parameter(name).grad, gradient)

    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path)
    for replica in replicas(loaded, 2, monkeypatch):
        torch.testing.assert_close(replica(x), y)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return job(tmp_path_factory.mktemp("one"), 1)


@pytest.mark.slow
def test_trainer_on_several_processes_trains_the_mask_of_one_and_either_resumes_the_other(tmp_path, one):
    assert_same_masks(job(tmp_path / "four", 4), one)
    job(tmp_path / "two then one", 2, "3")
    assert_same_masks(job(tmp_path / "two then one", 1), one)
    job(tmp_path / "one then two", 1, "3")
    assert_same_masks(job(tmp_path / "one then two", 2), one)


@pytest.mark.slow
def test_trainer_on_sharded_models_trains_the_mask_of_one_and_resumes_on_more(tmp_path, one):
    job(tmp_path, 2, "3", "fsdp2")
    assert (tmp_path / "checkpoint-3" / "pytorch_model_fsdp.bin").is_file()  # so it was sharded
    assert_same_masks(job(tmp_path, 4, kind="fsdp2"), one)
