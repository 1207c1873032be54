from peft import PeftModel

from tests.simulated_device.models import base, batch, bits
from tests.simulated_device.scenarios import scenario
from tests.simulated_device.scenarios.files import loaded, saved


@scenario
def merge_and_unmerge(device, folder):
    model = saved(device, folder).eval()
    model.merge_adapter(safe_merge=True)
    model(**batch(model, device))
    model.unmerge_adapter()
    masks = bits(model)
    plain = model.merge_and_unload()
    plain(**batch(plain, device))
    return masks, {name: p.detach() for name, p in plain.named_parameters() if "classifier" not in name}


@scenario
def switch_and_disable(device, folder):
    saved(device, folder)
    model = loaded(device, folder, adapter_name="a")
    model.load_adapter(folder, "b", torch_device=device)
    inputs = batch(model, device)
    for name in ("a", "b", None, "a"):
        model.base_model.switch_adapter(name)
        model(**inputs)
    model.unmerge_adapter()
    with model.disable_adapter():
        model(**inputs)
    return bits(model, "a"), {name: p.detach() for name, p in model.named_parameters() if "classifier" not in name}


@scenario
def mixed_batch(device, folder):
    saved(device, folder)
    model = loaded(device, folder, adapter_name="a")
    model.load_adapter(folder, "b", torch_device=device)
    model(**batch(model, device), adapter_names=["a", "__base__", "b", "a"])
    return bits(model, "a")


@scenario
def adapters_made_of_others(device, folder):
    model = saved(device, folder)
    model.load_adapter(folder, "b", torch_device=device)
    for kind in ("intersection", "union", "majority"):
        model.add_weighted_adapter(["default", "b"], [1.0, 1.0], kind, combination_type=kind)
    model.set_adapter("union")
    model.eval()(**batch(model, device))
    model.delete_adapter("b")
    return bits(model, "union"), bits(model, "majority")


@scenario
def generate(device, folder):
    saved(device, folder, family="llama")
    model = PeftModel.from_pretrained(base(device, "llama"), folder, torch_device=device).eval()
    inputs = {name: tensor for name, tensor in batch(model, device).items() if name != "labels"}
    tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    return tokens.shape, bits(model)
