"""What DistributedDataParallel sends before each forward pass: of our buffers nothing."""

import tempfile

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel, distributed

from peft_mask import MaskConfig
from tests.tiny_models import tiny_inputs, tiny_model


@pytest.fixture
def sent(monkeypatch):
    """One process, and the tensors that it has sent."""
    tensors = []
    send = dist._broadcast_coalesced

    def counted(group, given, *args, **kwargs):
        tensors.extend(given)
        return send(group, given, *args, **kwargs)

    monkeypatch.setattr(distributed.dist, "_broadcast_coalesced", counted)
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        yield tensors
        dist.destroy_process_group()


def through_peft():
    model = get_peft_model(tiny_model("bert"), MaskConfig(task_type="SEQ_CLS"))
    model.add_adapter("b", MaskConfig(task_type="SEQ_CLS", candidates=0.5))
    return model


def through_transformers():
    model = tiny_model("bert")
    model.add_adapter(MaskConfig(), "a")
    return model


def loaded_beside_one_in_training():
    with tempfile.TemporaryDirectory() as folder:
        through_peft().save_pretrained(folder)
        model = PeftModel.from_pretrained(tiny_model("bert"), folder, is_trainable=False)
    model.add_adapter("b", MaskConfig(task_type="SEQ_CLS"))
    model.set_adapter("b")
    return model


@pytest.mark.parametrize(
    "made",
    [through_peft, lambda: through_peft().base_model, through_transformers, loaded_beside_one_in_training],
    ids=["PeftModel", "MaskModel", "transformers", "bits"],
)
def test_positions_and_masks_are_not_sent_and_other_buffers_are(sent, made):
    model = made().train()
    model.register_buffer("own", torch.zeros(3))
    replica = DistributedDataParallel(model)
    inputs = tiny_inputs(tiny_model("bert"), labels=True)
    sent.clear()
    replica(**inputs).loss.backward()
    ours = [name for name, _ in model.named_buffers() if "peft_mask_" in name]
    assert ours
    assert not [name for name in replica.named_module_buffers if "peft_mask_" in name]
    assert model.own.data_ptr() in {tensor.data_ptr() for tensor in sent}
    assert {tensor.dtype for tensor in sent} <= {torch.float32, torch.int64}, "positions are int32, masks uint8"


def test_what_an_owner_has_told_ddp_stands():
    mlp = nn.Sequential(nn.Linear(8, 8))
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(mlp, ["0.weight"])
    model = get_peft_model(mlp, MaskConfig(target_modules=["0"]))
    assert model._ddp_params_and_buffers_to_ignore == ["0.weight"]
