"""Training the kept weights of a merged model: what is computed is W * M, zeros stay, and all of it comes back."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

from peft_mask import MaskConfig, Masks, hold_zeros
from peft_mask.layers.mask_layer import MaskLayer
from tests.layers.test_modules import CASES, TARGETS
from tests.layers.test_modules import case as layer_case
from tests.layers.test_modules import config as layer_config
from tests.tiny_models import tiny_inputs, tiny_model
from tests.training.test_training import Interrupt, rows


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 5))


def saved(base, folder, **fields):
    """An adapter of `base` whose mask is random, with three tenths of the weights off."""
    fields = {"target_sparsity": 0.3, "candidates": None, "init_weights": False, "seed": 0} | fields
    get_peft_model(base, MaskConfig(**fields)).save_pretrained(folder)
    return Masks.load(folder)


def merged(base, folder):
    return PeftModel.from_pretrained(base, folder).merge_and_unload().requires_grad_()


OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
}


def steps(model, optimizer, n=5):
    generator = torch.Generator().manual_seed(1)
    for _ in range(n):
        model(torch.randn(8, 12, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_is_training_w_of_w_times_m(tmp_path, name):
    masks = saved(mlp(), tmp_path, target_modules=["0", "2"])
    under = PeftModel.from_pretrained(mlp(), tmp_path)
    layers = {n: m for n, m in under.base_model.model.named_modules() if isinstance(m, MaskLayer)}
    for layer in layers.values():
        layer.base_layer.requires_grad_()
    model = merged(mlp(), tmp_path)
    hold_zeros(model, masks)
    for each in (under, model):
        steps(each, OPTIMIZERS[name]([p for p in each.parameters() if p.requires_grad]))
    assert sum(masks.zeros.values()) > 50
    for module, mask in masks.items():
        weight = model.get_submodule(module).weight
        off = weight[~mask]
        assert not off.any()
        assert not off.signbit().any(), "+0.0"
        assert (weight[mask] != mlp().get_submodule(module).weight[mask]).all()
        if name != "Adafactor":  # which looks at the size of all weights of a matrix, and there at those that are off
            assert torch.equal(weight, torch.where(mask, layers[module].base_layer.weight, 0))


@pytest.mark.parametrize("name", [name for name in CASES if "experts" not in name])
def test_weights_of_every_kind_of_module_are_held(tmp_path, name):
    base, x = layer_case(name)
    get_peft_model(copy.deepcopy(base), layer_config(name)).save_pretrained(tmp_path)
    model = merged(base, tmp_path)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    assert hold_zeros(model, Masks.load(tmp_path))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        model(x).square().sum().backward()
        optimizer.step()
    for parameter_name, parameter in model.named_parameters():
        off = before[parameter_name] == 0
        if parameter.dim() > 1:
            assert off.any()
            assert not parameter[off].any()
    assert any((before[n] != p).any() for n, p in model.named_parameters())


def trainer(model, folder, *callbacks):
    arguments = TrainingArguments(
        str(folder),
        max_steps=6,
        save_steps=3,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        weight_decay=0.1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    return Trainer(model=model, args=arguments, train_dataset=rows(), callbacks=list(callbacks))


def test_trainer_saves_resumes_and_brings_it_back_to_the_bit(tmp_path):
    masks = saved(tiny_model("bert"), tmp_path / "adapter", task_type="SEQ_CLS")
    model = merged(tiny_model("bert"), tmp_path / "adapter")
    hold_zeros(model, masks)
    trainer(model, tmp_path / "a").train()
    model.save_pretrained(tmp_path / "tuned")

    stopped = merged(tiny_model("bert"), tmp_path / "adapter")
    hold_zeros(stopped, masks)
    with pytest.raises(KeyboardInterrupt):
        trainer(stopped, tmp_path / "b", Interrupt()).train()
    checkpoint = tmp_path / "b/checkpoint-3"
    resumed = AutoModelForSequenceClassification.from_pretrained(checkpoint).requires_grad_()
    hold_zeros(resumed, masks)
    trainer(resumed, tmp_path / "b").train(resume_from_checkpoint=str(checkpoint))

    fresh = AutoModelForSequenceClassification.from_pretrained(tmp_path / "tuned").eval()
    inputs = tiny_inputs(fresh)
    with torch.no_grad():
        expected = model.eval()(**inputs).logits
        assert torch.equal(fresh(**inputs).logits, expected)
        assert torch.equal(resumed.eval()(**inputs).logits, expected)
    start = tiny_model("bert")
    for module, mask in masks.items():
        weight, first = fresh.get_submodule(module).weight, start.get_submodule(module).weight
        assert not weight[~mask].any()
        assert (weight[mask] != first[mask]).any()


def test_a_hold_ends_with_its_handles(tmp_path):
    masks = saved(mlp(), tmp_path, target_modules=["0"])
    model = merged(mlp(), tmp_path)
    for handle in hold_zeros(model, masks):
        handle.remove()
    steps(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert model[0].weight[~masks["0"]].any()


def test_what_cannot_be_held_is_refused(tmp_path):
    masks = saved(mlp(), tmp_path, target_modules=["0", "2"])
    with pytest.raises(ValueError, match=r"72 of the 72 weights .* are not zero. Merge the adapter first"):
        hold_zeros(mlp(), masks)
    with pytest.raises(ValueError, match=r"call model.requires_grad_\(\) after merging"):
        hold_zeros(PeftModel.from_pretrained(mlp(), tmp_path).merge_and_unload(), masks)
    with pytest.raises(ValueError, match=r"carries an adapter at '0'"):
        hold_zeros(PeftModel.from_pretrained(mlp(), tmp_path).get_base_model(), masks)
    with pytest.raises(ValueError, match=r"'0' is for a weight of shape \(20, 3\), the base model's is \(20, 12\)"):
        hold_zeros(mlp(), Masks({"0": torch.ones(20, 3, dtype=torch.bool)}))


def test_experts_are_left_to_the_user(tmp_path):
    base, _ = layer_case("experts")
    get_peft_model(copy.deepcopy(base), MaskConfig(**TARGETS["experts"], candidates=None)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="masks a parameter of Experts whose name its file does not say"):
        hold_zeros(base, Masks.load(tmp_path))
