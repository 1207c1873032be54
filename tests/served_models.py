"""Small models that serve adapters loaded for inference, with random masks that differ."""

import torch
from peft import get_peft_model

from peft_mask import MaskConfig
from peft_mask.format.packing import pack_bits
from peft_mask.layers.mask_layer import MaskLayer


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, MaskLayer)]


def served(base, names=("one", "two"), sparsity=0.2, **fields):
    """The base with masks of these names loaded for inference; `sparsity` may be a number for each."""
    sparsities = sparsity if isinstance(sparsity, dict) else dict.fromkeys(names, sparsity)
    config = MaskConfig(inference_mode=True, **fields)
    model = get_peft_model(base, config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, MaskConfig(inference_mode=True, **fields))
    generator = torch.Generator().manual_seed(0)
    for layer in layers_of(model):
        for name in names:
            if name in layer.available_adapters:
                mask = torch.rand(layer.mask_shape, generator=generator) >= sparsities[name]
                layer.peft_mask_bits.fill(name, pack_bits(mask))
    return model.eval()


def alone(model, name, call):
    """What a call gives with one adapter for all rows, or none."""
    if name == "__base__":
        with model.disable_adapter():
            return call()
    model.set_adapter(name)
    return call()
