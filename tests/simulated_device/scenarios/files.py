from peft import PeftModel

from peft_mask import MaskConfig, Masks, hotswap_adapter
from tests.simulated_device.models import base, batch, bits, masked, train
from tests.simulated_device.scenarios import scenario


def saved(device, folder, **fields):
    model = masked(device, **fields)
    train(model, device)
    model.save_pretrained(folder)
    return model


def loaded(device, folder, **how):
    return PeftModel.from_pretrained(base(device), folder, torch_device=device, **how).eval()


@scenario
def save_and_load(device, folder):
    saved(device, folder)
    model = loaded(device, folder)
    model.load_adapter(folder, "b", torch_device=device)
    model(**batch(model, device))
    return bits(model), bits(model, "b")


@scenario
def save_and_load_against_the_base(device, folder):
    saved(device, folder, portable=False)
    Masks.load(folder, base=base(device)).save(folder / "portable")
    Masks.load(folder / "portable").save(folder / "again", base=base(device))
    return bits(loaded(device, folder)), bits(loaded(device, folder / "again"))


@scenario
def load_on_the_meta_device_first(device, folder):
    saved(device, folder)
    model = loaded(device, folder, low_cpu_mem_usage=True)
    model.load_adapter(folder, "b", torch_device=device, low_cpu_mem_usage=True)
    model(**batch(model, device))
    return bits(model), bits(model, "b")


@scenario
def train_on_from_masks(device, folder):
    saved(device, folder)
    model = loaded(device, folder, is_trainable=True)
    train(model, device)
    return bits(model)


@scenario
def hotswap(device, folder):
    saved(device, folder)
    model = loaded(device, folder, adapter_name="a")
    hotswap_adapter(model, str(folder), "a", torch_device=device)
    model(**batch(model, device))
    return bits(model, "a")


@scenario
def transformers_own_door(device, folder):
    saved(device, folder)
    model = base(device)
    model.load_adapter(str(folder), "a")
    model.eval()(**batch(model, device))
    other = base(device)
    other.add_adapter(MaskConfig(seed=0), "x")
    train(other, device)
    return bits(model, "a"), bits(other, "x")
