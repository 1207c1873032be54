from peft import PeftModel, get_peft_model
from torch import nn

from peft_mask import MaskConfig
from tests.simulated_device.models import bits, numbers, train
from tests.simulated_device.scenarios import scenario


def quantized(device, kind):
    """Quantized on the CPU and moved by hand: bitsandbytes exchanges `.data`, which torch forbids for this device."""
    import bitsandbytes as bnb
    import torch

    torch.manual_seed(0)
    made = []
    for linear in (nn.Linear(128, 96), nn.Linear(96, 64)):
        shape = linear.in_features, linear.out_features
        if kind == "int8":
            layer = bnb.nn.Linear8bitLt(*shape, has_fp16_weights=False)
        else:
            layer = bnb.nn.Linear4bit(*shape, quant_type=kind, compute_dtype=torch.float32)
        layer.load_state_dict(linear.state_dict())
        layer = layer.to("cpu")
        weight = layer.weight
        if device != "cpu" and kind == "int8":
            codes = {"CB": weight.CB.to(device), "SCB": weight.SCB.to(device)}
            layer.weight = bnb.nn.Int8Params(weight.data.to(device), False, has_fp16_weights=False, **codes)
        elif device != "cpu":
            weight.quant_state.to(device)
            layer.weight = bnb.nn.Params4bit(
                weight.data.to(device),
                requires_grad=False,
                quant_state=weight.quant_state,
                quant_type=kind,
                blocksize=weight.blocksize,
                bnb_quantized=True,
                compress_statistics=True,
                quant_storage=weight.quant_storage,
                module=layer,
            )
        layer.bias = nn.Parameter(layer.bias.data.to(device))
        made.append(layer)
    return nn.Sequential(made[0], nn.ReLU(), made[1])


def trained(kind):
    def run(device, folder):
        fields = {"target_modules": ["0", "2"], "target_sparsity": 0.05, "seed": 0}
        model = get_peft_model(quantized(device, kind), MaskConfig(**fields))
        x = numbers(device, 16, 128)
        train(model, device, inputs=x)
        model.eval().merge_adapter()
        model(x)
        model.unmerge_adapter()
        model.save_pretrained(folder)
        PeftModel.from_pretrained(quantized(device, kind), folder, torch_device=device)(x)
        # of 4 bits bitsandbytes dequantizes by another kernel on the CPU, and other candidates follow
        return bits(model) if kind == "int8" else None

    run.__name__ = f"quantized_{kind}"
    scenario(run)


for each in ("nf4", "fp4", "int8"):
    trained(each)
