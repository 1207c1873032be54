"""The plugin for axolotl, behind the plugin interface of axolotl 0.19.0.

Where axolotl is not installed, which pins other releases of PEFT and transformers, a stand-in has the two classes that
the plugin imports. Its source of truth is `axolotl/integrations/base.py` of the wheel axolotl-0.19.0: `BasePlugin`,
whose hooks do nothing by themselves, `AdapterCapabilities(name, lora_like, relora)`, and who calls which hook:
`load_adapter` by `axolotl/loaders/adapter.py`, `get_input_args` by `axolotl/utils/config`, `add_callbacks_pre_trainer`
by `axolotl/core/builders/base.py`, `post_trainer_create` by `axolotl/train.py`, and `create_optimizer` by nobody.
"""

import importlib
import sys
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from peft_mask import MaskCallback, MaskConfig, MaskLayer, SignAdamW
from tests.project.test_documents import ROOT, blocks_of
from tests.tiny_models import tiny_inputs, tiny_model

NAME = "peft_mask.integrations.axolotl"


@dataclass(frozen=True)
class AdapterCapabilities:
    name: str
    lora_like: bool = False
    relora: bool = False


class BasePlugin:
    pass


@pytest.fixture
def module(monkeypatch):
    """The plugin's file, imported behind axolotl or the stand-in."""
    try:
        importlib.import_module("axolotl.integrations.base")
    except ImportError:
        stand_in = ModuleType("axolotl.integrations.base")
        stand_in.BasePlugin, stand_in.AdapterCapabilities = BasePlugin, AdapterCapabilities
        for parent in ("axolotl", "axolotl.integrations"):
            monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
        monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    yield importlib.import_module(NAME)
    sys.modules.pop(NAME, None)


class Settings(dict):
    """As axolotl's configuration: what is missing is None."""

    def __getattr__(self, name):
        return self.get(name)


def settings(**more):
    return Settings({"adapter": "mask", "mask": {"target_sparsity": 0.02}} | more)


def rows(model):
    inputs = tiny_inputs(model, batch_size=8, labels=True)
    return [{name: value[place] for name, value in inputs.items()} for place in range(8)]


def trained(module, cfg, folder, model=None):
    """Train as axolotl does: adapter, callbacks, trainer, and then what the plugin does to it."""
    plugin = module.MaskPlugin()
    model, _ = plugin.load_adapter(model or tiny_model("llama", "lm"), cfg)
    trainer = Trainer(
        model,
        TrainingArguments(
            str(folder), max_steps=3, logging_steps=1, report_to="none", use_cpu=True, learning_rate=0.25
        ),
        train_dataset=rows(model),
        callbacks=plugin.add_callbacks_pre_trainer(cfg, model),
    )
    plugin.post_trainer_create(cfg, trainer)
    trainer.train()
    return trainer


def test_the_yaml_s_mask_is_trained_with_its_optimizer_and_callback_and_saved_as_bits(module, tmp_path):
    trainer = trained(module, settings(), tmp_path)
    assert isinstance(trainer.optimizer.optimizer, SignAdamW)  # within accelerate's
    sparsities = [entry["sparsity"] for entry in trainer.state.log_history if "sparsity" in entry]
    assert len(sparsities) == 3
    assert 0 < sparsities[-1] <= 0.021
    trainer.save_model(tmp_path / "out")
    assert all(name.endswith("peft_mask_bits") for name in load_file(tmp_path / "out" / "adapter_model.safetensors"))
    again = PeftModel.from_pretrained(tiny_model("llama", "lm"), tmp_path / "out").eval()
    with torch.no_grad():
        logits = [model.eval()(**tiny_inputs(model)).logits for model in (again, trainer.model)]
    assert torch.equal(*logits)


def test_the_learning_rate_is_for_what_is_no_score(module, tmp_path):
    cfg = settings(mask={"target_sparsity": 0.02, "modules_to_save": ["lm_head"]})
    trainer = trained(module, cfg, tmp_path)
    rates = {bool(group.get("sign")): group["initial_lr"] for group in trainer.optimizer.param_groups}
    assert rates[False] == 0.25
    assert rates[True] != 0.25


def test_a_trained_mask_is_trained_on_or_only_used(module, tmp_path):
    trained(module, settings(), tmp_path).save_model(tmp_path / "out")
    plugin, cfg = module.MaskPlugin(), settings(lora_model_dir=str(tmp_path / "out"))
    with pytest.warns(UserWarning, match="holds masks without scores"):
        model, config = plugin.load_adapter(tiny_model("llama", "lm"), cfg)
    assert isinstance(config, MaskConfig)
    assert any(parameter.requires_grad for parameter in model.parameters())
    model, _ = plugin.load_adapter(tiny_model("llama", "lm"), cfg, inference=True)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_where_trl_wraps_the_model_only_the_configuration_is_given(module):
    model = tiny_model("llama", "lm")
    nothing, config = module.MaskPlugin().load_adapter(model, settings(), config_only=True)
    assert nothing is None
    assert isinstance(config, MaskConfig)
    assert (config.target_sparsity, config.task_type) == (0.02, "CAUSAL_LM")
    assert not any(isinstance(layer, MaskLayer) for layer in model.modules())


def test_without_a_budget_the_mask_has_the_default_one(module):
    _, config = module.MaskPlugin().load_adapter(None, settings(mask=None), config_only=True)
    assert config.target_sparsity == MaskConfig().target_sparsity


def test_another_adapter_is_left_to_axolotl(module):
    plugin, cfg = module.MaskPlugin(), settings(adapter="lora", lora_r=8, load_in_4bit=True)
    trainer = object()  # which has nothing that could be set
    assert plugin.load_adapter(None, cfg) is None
    assert plugin.add_callbacks_pre_trainer(cfg, None) == []
    plugin.post_trainer_create(cfg, trainer)


def test_axolotl_is_told_the_adapter_s_name_and_the_yaml_s_new_key(module):
    plugin = module.MaskPlugin()
    (capability,) = plugin.get_adapter_capabilities()
    assert (capability.name, capability.lora_like, capability.relora) == ("mask", False, False)
    where, _, name = plugin.get_input_args().rpartition(".")
    arguments = getattr(importlib.import_module(where), name)
    assert arguments(mask={"target_bytes": 50000}).mask == {"target_bytes": 50000}
    assert arguments().mask == {}
    assert [type(callback) for callback in plugin.add_callbacks_pre_trainer(settings(), None)] == [MaskCallback]


def test_the_yaml_of_the_page_names_the_plugin_and_masks_what_it_says(module):
    page = ROOT / "docs" / "neighbors.md"
    (shown,) = (yaml.safe_load(block.source) for block in blocks_of(page) if block.language == "yaml")
    assert shown.pop("plugins") == [f"{NAME}.{module.MaskPlugin.__name__}"]
    model, config = module.MaskPlugin().load_adapter(tiny_model("llama", "lm"), Settings(shown))
    assert isinstance(config, MaskConfig)
    assert config.target_sparsity == shown["mask"]["target_sparsity"]
    masked = [name for name, layer in model.named_modules() if isinstance(layer, MaskLayer)]
    assert len(masked) == 2  # one in each block
    assert all(name.endswith(".gate_proj") for name in masked)


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        ({"lora_r": 8}, ValueError, r"'lora_r' is LoRA's, and the YAML says 'adapter: mask': leave it out, and put"),
        ({"load_in_4bit": True}, ValueError, r"'load_in_4bit' is set, and axolotl quantizes a base for the adapters"),
        ({"mask": {"target_sparsity": 2}}, ValueError, r"target_sparsity must be"),
        ({"mask": {"sparsity": 0.1}}, TypeError, r"sparsity"),
    ],
)
def test_what_a_yaml_cannot_mean_is_refused(module, more, error, message):
    with pytest.raises(error, match=message):
        module.MaskPlugin().load_adapter(None, settings(**more), config_only=True)
