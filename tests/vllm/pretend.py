"""As much of vLLM as its workers' extension meets: a model with packed weights and its loader, and who patches them."""

import sys
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import nn

from peft_mask.vllm.extension import MaskExtension

PARTS = {
    "layer.q_proj.weight": ("layer.qkv_proj.weight", 0, 8),
    "layer.k_proj.weight": ("layer.qkv_proj.weight", 8, 12),
}


class Model(nn.Module):
    """Two projections of the checkpoint in one weight, as vLLM has them, and a head."""

    def __init__(self, tied=False):
        super().__init__()
        self.layer = nn.ModuleDict({"qkv_proj": nn.Linear(6, 12, bias=False), "head": nn.Linear(6, 10, bias=False)})
        if tied:
            self.embedding = nn.Embedding(10, 6, _weight=self.layer["head"].weight)
        self.transposes = False

    def load_weights(self, weights):
        parameters, loaded = dict(self.named_parameters()), set()
        for name, tensor in weights:
            target, start, end = PARTS.get(name, (name, None, None))
            place = parameters[target].data[start:end]
            place.copy_(tensor.t() if self.transposes else tensor)
            loaded.add(target)
        return loaded


def write_checkpoint(folder, seed=0, dtype=torch.float32):
    """Write the checkpoint of such a model."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    shapes = {"layer.q_proj.weight": (8, 6), "layer.k_proj.weight": (4, 6), "layer.head.weight": (10, 6)}
    weights = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors")
    return weights


class Patch(NamedTuple):
    name: str
    shape: tuple
    dtype: torch.dtype
    values: torch.Tensor
    indices: torch.Tensor


def scatter(model, patches):
    """What vLLM does with patches, without its loader."""
    for patch in patches:
        target, start, end = PARTS.get(patch.name, (patch.name, None, None))
        place = dict(model.named_parameters())[target].data[start:end]
        place.view(-1)[patch.indices] = patch.values.to(place.dtype)


def pretend_vllm(monkeypatch, version="0.32.0", load=scatter):
    """Let `vllm` be importable, with this version and this way to patch."""
    inside = ModuleType("vllm.model_executor.model_loader.checkpoint_weight_patch")
    inside.CheckpointWeightPatch, inside.load_checkpoint_weight_patches = Patch, load
    top = ModuleType("vllm")
    top.__version__ = version
    packages = [ModuleType(name) for name in ("vllm.model_executor", "vllm.model_executor.model_loader")]
    for module in (top, *packages, inside):
        monkeypatch.setitem(sys.modules, module.__name__, module)


class Worker(MaskExtension):
    """A worker with the extension, whose model was loaded from a checkpoint."""

    def __init__(self, folder, dtype=torch.float32, tied=False, **model_config):
        model = Model(tied).to(dtype)
        model.load_weights(write_checkpoint(folder).items())
        self.model_runner = SimpleNamespace(get_model=lambda: model)
        settings = {"model": str(folder), "revision": None, "quantization": None, "use_mla": False}
        parallel = {"pipeline_parallel_size": 1, "enable_expert_parallel": False}
        self.vllm_config = SimpleNamespace(
            model_config=SimpleNamespace(**settings | model_config),
            parallel_config=SimpleNamespace(**parallel),
            load_config=SimpleNamespace(download_dir=None),
        )

    def weights(self):
        return {name: weight.detach().clone() for name, weight in self.model_runner.get_model().named_parameters()}
