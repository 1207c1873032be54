"""Bytes and sparsity: what is promised before training, and what the file then weighs."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments

from peft_mask import MaskCallback, MaskConfig, Masks, create_mask_optimizer, fill_budget, keep_scores
from peft_mask.scores.budget import expected_bytes, file_bytes, sparsity_for_bytes

WIDTH = 128


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 2))


def masked(**fields):
    return get_peft_model(mlp(), MaskConfig(**({"target_modules": ["0", "2"]} | fields)))


def trained(**fields):
    """A model whose zeros lie in few columns: easier to code than a mask without order."""
    model = masked(**fields)
    optimizer = create_mask_optimizer(model)
    generator = torch.Generator().manual_seed(0)
    scale = torch.linspace(0, 3, 32).exp()
    for _ in range(20):
        x = torch.randn(16, 32, generator=generator) * scale
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def saved_bytes(model, folder):
    model.save_pretrained(folder)
    return (folder / "adapter_model.safetensors").stat().st_size


def test_the_size_of_a_file_is_known_from_its_records(tmp_path):
    model = trained()
    size = saved_bytes(model, tmp_path)
    masks = Masks.load(tmp_path)
    records = {name: len(masks._masks[name].record) for name in masks}
    assert file_bytes(records) == size


@pytest.mark.parametrize("target", [500, 650, 800])
def test_target_bytes_are_met_within_three_per_cent_at_the_end_of_training(tmp_path, target):
    model = trained(target_bytes=target)
    fill_budget(model)
    assert saved_bytes(model, tmp_path) == pytest.approx(target, rel=0.03)
    config = model.peft_config["default"]
    assert config.target_bytes == target
    assert Masks.load(tmp_path).sparsity == pytest.approx(config.target_sparsity, rel=0.05)


def test_the_callback_fills_the_budget(tmp_path):
    class Scored(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = mlp()

        def forward(self, x, labels):
            logits = self.mlp(x)
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    model = get_peft_model(Scored(), MaskConfig(target_modules=["0", "2"], target_bytes=900))
    estimated = model.peft_config["default"].target_sparsity
    rows = [{"x": torch.randn(32), "labels": i % 2} for i in range(16)]
    arguments = TrainingArguments(str(tmp_path / "out"), max_steps=4, report_to=[], use_cpu=True, save_strategy="no")
    optimizers = (create_mask_optimizer(model), None)
    Trainer(model, arguments, train_dataset=rows, callbacks=[MaskCallback()], optimizers=optimizers).train()
    trained_to = model.peft_config["default"].target_sparsity
    assert saved_bytes(model, tmp_path / "adapter") == pytest.approx(900, rel=0.03)
    assert model.base_model.set_target_bytes(900) == (tmp_path / "adapter/adapter_model.safetensors").stat().st_size
    assert model.peft_config["default"].target_sparsity == trained_to != estimated


def test_a_checkpoint_of_a_byte_budget_goes_on_with_it(tmp_path):
    model = trained(target_bytes=900)
    fill_budget(model)
    keep_scores(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(mlp(), tmp_path, is_trainable=True)
    assert loaded.peft_config["default"].target_bytes == 900
    for ours, theirs in zip(model.base_model.model[::2], loaded.base_model.model[::2], strict=True):
        if hasattr(ours, "mask"):
            assert torch.equal(ours.mask("default"), theirs.mask("default"))


@pytest.mark.parametrize("target", [10, 10**7])
def test_a_size_out_of_reach_is_refused_before_anything_changes(target):
    base = mlp()
    with pytest.raises(ValueError, match=rf"target_bytes={target} is out of reach: .* take from \d+ bytes .* to \d+"):
        get_peft_model(base, MaskConfig(target_modules=["0", "2"], target_bytes=target))
    assert type(base[0]) is nn.Linear
    model = trained()
    before = model.base_model.model[2].mask("default")
    with pytest.raises(ValueError, match="is out of reach"):
        model.base_model.set_target_bytes(target)
    assert torch.equal(model.base_model.model[2].mask("default"), before)


def test_a_budget_that_training_cannot_fill_is_warned_of_and_nothing_lost():
    model = trained(target_bytes=1400)  # gradients want to switch off half the candidates only
    mask = model.base_model.model[2].mask("default")
    with pytest.warns(UserWarning, match="'default' keeps its sparsity .*: target_bytes=1400 is out of reach"):
        fill_budget(model)
    assert torch.equal(model.base_model.model[2].mask("default"), mask)


def test_an_interrupted_search_leaves_the_budget_as_it_was(monkeypatch):
    model = trained()
    mask = model.base_model.model[2].mask("default")
    sizes = iter([400, 500])

    def interrupted(*_):
        if (size := next(sizes, None)) is None:
            raise KeyboardInterrupt
        return size

    monkeypatch.setattr("peft_mask.model.scored.adapter_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.base_model.set_target_bytes(450)
    assert torch.equal(model.base_model.model[2].mask("default"), mask)


def test_one_training_gives_masks_of_every_sparsity_each_within_the_next(tmp_path):
    model = trained(target_sparsity=0.02)
    masks = {}
    for sparsity in (0.02, 0.01, 0.005):
        model.base_model.set_target_sparsity(sparsity)
        masks[sparsity] = model.base_model.model[2].mask("default")
        assert int((~masks[sparsity]).sum()) == round(sparsity * WIDTH * WIDTH)
    assert torch.equal(masks[0.02] & masks[0.01], masks[0.02])
    assert torch.equal(masks[0.01] & masks[0.005], masks[0.01])
    model.save_pretrained(tmp_path)
    assert torch.equal(Masks.load(tmp_path)["2"], masks[0.005])


def test_moving_a_budget_needs_scores_a_budget_and_a_sparsity_in_range(tmp_path):
    model = trained()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"sparsity must be above 0 and at most 0.1, got 0.2"):
        model.base_model.set_target_sparsity(0.2)
    loaded = PeftModel.from_pretrained(mlp(), tmp_path)
    with pytest.raises(ValueError, match="'default' has no scores, only the mask they came to"):
        loaded.base_model.set_target_sparsity(0.001)
    with pytest.raises(ValueError, match="no budget: its binarizer is 'threshold'"):
        masked(binarizer="threshold", candidates=None).base_model.set_target_bytes(1000)
    model.add_adapter("b", MaskConfig(target_modules=["0"]))
    model.base_model.set_adapter(["default", "b"])
    with pytest.raises(ValueError, match=r"name the adapter: \['default', 'b'\] are active"):
        model.base_model.set_target_sparsity(0.001)


def test_a_sparsity_is_found_for_every_size():
    shapes = {"a": (300, 200), "b": (50, 1000)}
    for target in (700, 1000, 3000, 8000):
        sparsity = sparsity_for_bytes(lambda s: expected_bytes(shapes, s), target, 0.5)
        assert expected_bytes(shapes, sparsity) == pytest.approx(target, rel=0.01)
