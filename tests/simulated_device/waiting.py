"""Where the host waits for the device: lists of waits by phase, in the steady state, of what is done over and over."""

import torch
from peft import PeftModel, get_peft_model
from torch import nn

from peft_mask import MaskConfig, MaskStatistics, create_mask_optimizer
from tests.simulated_device.device import waits
from tests.simulated_device.models import batch, masked, on_the_device, train

ALL = {"candidates": None}

# what is trained -> family of the base, settings of the mask
TRAININGS = {
    "topk": ("bert", {}),
    "topk of a decoder": ("llama", {}),
    "topk of Conv1D": ("gpt2", {}),
    "topk with biases": ("bert", {"mask_biases": True}),
    "rows": ("bert", {"structure": "row", **ALL}),
    "bfloat16 scores": ("bert", {"scores_dtype": "bfloat16"}),
    "threshold": ("bert", {"binarizer": "threshold", **ALL}),
    "bernoulli": ("bert", {"binarizer": "bernoulli", **ALL}),
    "n:m": ("bert", {"binarizer": "n:m", **ALL}),
    "embedding": ("bert", {"target_modules": ["word_embeddings"]}),
}


def of_a_step(device, family="bert", checkpointed=False, resumed=False, **fields):
    model = masked(device, family, **fields)
    if checkpointed:
        model.get_base_model().gradient_checkpointing_enable()
    optimizer = train(model, device)
    if resumed:  # as of several processes, each of which loads all tensors to its device
        optimizer.load_state_dict(on_the_device(optimizer.state_dict(), device))
        train(model, device, optimizer)
    inputs = batch(model, device)
    model(**inputs)  # what transformers finds out of a batch for itself is known from here on
    with waits() as forward:
        loss = model(**inputs).loss
    with waits() as backward:
        loss.backward()
    with waits() as step:
        optimizer.step()
        optimizer.zero_grad()
    return {"forward": forward, "backward": backward, "step": step}


def of_serving(device, folder):
    masked_mlp(device).save_pretrained(folder)
    model = PeftModel.from_pretrained(mlp(device), folder, adapter_name="a", torch_device=device).eval()
    model.load_adapter(folder, "b", torch_device=device)
    x = torch.ones(3, 12, device=device)
    found = {}
    with torch.no_grad():
        with waits() as found["the first unmerged"]:  # finds where the mask is off, a wait for each layer
            model(x)
        with waits() as found["unmerged"]:
            model(x)
        for phase in ("the first mixed", "mixed"):
            with waits() as found[phase]:
                model(x, adapter_names=["a", "b", "__base__"])
        for name in "abab":
            with waits() as found["a later switch"]:
                model.base_model.switch_adapter(name)
        with waits() as found["merged"]:
            model(x)
    return found


def of_a_log(device):
    model = masked_mlp(device)
    statistics = MaskStatistics(model)
    statistics(model)
    with waits() as log:
        statistics(model)
    return {"log": log}


def mlp(device):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 8)).to(device)


def masked_mlp(device):
    model = get_peft_model(mlp(device), MaskConfig(target_modules=["0", "2"], seed=0))
    train(model, device, create_mask_optimizer(model), inputs=torch.ones(3, 12, device=device))
    return model


def found(device, folder):
    """All of it: case -> phase -> waits."""
    return {
        **{name: of_a_step(device, family, **fields) for name, (family, fields) in TRAININGS.items()},
        "checkpointed": of_a_step(device, "llama", checkpointed=True),
        "resumed, bfloat16 scores": of_a_step(device, resumed=True, scores_dtype="bfloat16"),
        "serving": of_serving(device, folder),
        "a log of two matrices": of_a_log(device),
    }
