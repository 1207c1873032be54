"""Several processes train the mask that one would."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peft import get_peft_model
from safetensors.torch import load_file
from torch import nn

from peft_mask import MaskConfig, create_mask_optimizer
from peft_mask.layer import MaskLayer

WORLD, STEPS = 2, 6


BUDGET = {"target_sparsity": 0.03}
DRAWN = {"binarizer": "bernoulli", "init_sparsity": 0.3, "candidates": None}


def model(fields):
    torch.manual_seed(0)  # in float64 no gradient is so close to zero that the order of a sum decides its sign
    mlp = nn.Sequential(nn.Linear(12, 32), nn.Tanh(), nn.Linear(32, 4)).double()
    return get_peft_model(mlp, MaskConfig(target_modules=["0", "2"], **fields))


def train(model, rows, drawn=False):
    # drawn masks follow from every bit of the scores, and processes sum gradients in another order than one does
    optimizer = create_mask_optimizer(model, Rounded, mask_lr=0.5) if drawn else create_mask_optimizer(model)
    generator = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        x = torch.randn(8, 12, generator=generator, dtype=torch.float64)
        # gradients fall far enough for the optimizer's steps to shrink, by the mean of all of them and not of a shard
        (model(x[rows]).square().mean() / (1 if drawn else 8**step)).backward()
        optimizer.step()
        optimizer.zero_grad()


class Rounded(torch.optim.SGD):
    """Gradient descent whose steps are a few sizes: the sign, or nothing for a small gradient."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.grad.copy_(p.grad.sign() * (p.grad.abs() > 1e-9))
        return super().step(closure)


def on_each_rank(rank, folder, kind, fields):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    try:
        ours, drawn = model(fields), fields == DRAWN
        rows = slice(4 * rank, 4 * rank + 4)
        if kind == "ddp":
            train(nn.parallel.DistributedDataParallel(ours), rows, drawn)
            state = None
        else:
            from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
            from torch.distributed.fsdp import fully_shard

            for layer in [module for module in ours.modules() if isinstance(module, MaskLayer)]:
                fully_shard(layer)
            fully_shard(ours)
            train(ours, rows, drawn)
            local = [p for name, p in ours.named_parameters() if "scores" in name]
            assert all(p.to_local().numel() < p.numel() for p in local)
            state = get_model_state_dict(ours, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if kind == "ddp" or rank == 0:
            ours.save_pretrained(f"{folder}/{rank}", state_dict=state)
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("fields", [BUDGET, DRAWN], ids=["topk", "bernoulli"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_processes_train_the_mask_that_one_trains(tmp_path, kind, fields):
    one = model(fields)
    train(one, slice(None), fields == DRAWN)
    one.save_pretrained(tmp_path / "one")
    mp.spawn(on_each_rank, (str(tmp_path), kind, fields), nprocs=WORLD)
    expected = load_file(tmp_path / "one" / "adapter_model.safetensors")
    assert any(int((~layer.mask("default")).sum()) for layer in one.modules() if isinstance(layer, MaskLayer))
    for rank in range(WORLD if kind == "ddp" else 1):
        saved = load_file(tmp_path / str(rank) / "adapter_model.safetensors")
        assert saved.keys() == expected.keys()
        assert all(torch.equal(saved[key], expected[key]) for key in expected)


def job(folder, processes, steps="6"):
    """Run `distributed_job.py` as a user launches it."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    script = str(Path(__file__).with_name("distributed_job.py"))
    done = subprocess.run(
        [sys.executable, *launcher, script, str(folder), steps], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return load_file(folder / "adapter_model.safetensors")


def assert_same_masks(adapter, expected):
    assert adapter.keys() == expected.keys()
    masks = [key for key in expected if key.endswith("peft_mask_bits")]
    assert len(masks) == 13
    assert all(torch.equal(adapter[key], expected[key]) for key in masks)
    for key in expected.keys() - set(masks):  # of a trained head the order of a sum does change the last bit
        torch.testing.assert_close(adapter[key], expected[key], rtol=1e-10, atol=1e-12)


@pytest.mark.slow
def test_trainer_on_two_processes_trains_the_mask_of_one_and_either_resumes_the_other(tmp_path):
    one = job(tmp_path / "one", 1)
    assert_same_masks(job(tmp_path / "two", 2), one)
    job(tmp_path / "two then one", 2, "3")
    assert_same_masks(job(tmp_path / "two then one", 1), one)
    job(tmp_path / "one then two", 1, "3")
    assert_same_masks(job(tmp_path / "one then two", 2), one)
