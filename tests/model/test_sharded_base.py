"""A base that is sharded before it is masked: no mask can be made of a part of a weight, and what to do is said."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peft import PeftModel, get_peft_model
from torch import nn

from peft_mask import MaskConfig
from tests.processes import leave

SHARDED = r"cannot mask '.*0': its weight of shape \(16, 16\) is sharded over processes.*shard the model with its masks"


def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))


def config(**fields):
    return MaskConfig(target_modules=["0"], **fields)


def work(rank, folder):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh, x = init_device_mesh("cpu", (2,)), torch.randn(3, 16)
    cpu = torch.device("cpu")

    def fsdp2(model):
        fully_shard(model, mesh=mesh)
        return model

    ways = [
        (fsdp2, SHARDED),
        (lambda model: parallelize_module(model, mesh, {"0": ColwiseParallel()}), SHARDED),
        (lambda model: FullyShardedDataParallel(model, device_id=cpu), SHARDED),
        (lambda model: FullyShardedDataParallel(model, device_id=cpu, use_orig_params=True), "FSDP1 keeps the weight"),
    ]
    for shard, message in ways:
        with pytest.raises((ValueError, RuntimeError), match=message):
            get_peft_model(shard(base()), config())
    with pytest.raises(ValueError, match=SHARDED):
        PeftModel.from_pretrained(fsdp2(base()), f"{folder}/mask")

    masked = get_peft_model(base(), config(init_weights=False))
    expected = masked(x)
    fsdp2(masked)
    with pytest.raises(ValueError, match=SHARDED):
        masked.load_adapter(f"{folder}/mask", "another")
    with pytest.raises(ValueError, match="cannot load the mask of '0': the base weight is sharded"):
        masked.load_adapter(f"{folder}/mask", "default")
    with pytest.raises(ValueError, match=r"cannot merge into the weight of a Linear, .* sharded over processes"):
        masked.merge_adapter()
    torch.testing.assert_close(masked(x), expected)  # sharded as the message says

    beside = base()
    fully_shard(beside[2], mesh=mesh)  # what is not masked may be sharded
    assert get_peft_model(beside, config())(x).shape == (3, 4)
    leave()


@pytest.mark.slow
def test_masks_on_a_sharded_base_are_refused_in_words(tmp_path):
    get_peft_model(base(), config(init_weights=False)).save_pretrained(tmp_path / "mask")
    mp.spawn(work, (str(tmp_path),), nprocs=2)
