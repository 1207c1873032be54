"""Our rows of PEFT's MetaMathQA comparison, and the harness that they are handed to, in whose place a small one stands.

PEFT's own is tried by `tests/metamath_trial.py`, which needs a checkout of PEFT.
"""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
from peft import PeftConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.gpu_runs import MODELS, made
from benchmarks.metamath import __main__ as metamath
from peft_mask import MaskConfig, MaskLayer, SignAdamW, SparsitySchedule
from peft_mask.analysis import storage
from tests.tiny_models import tiny_inputs
from tests.versions import RUNS_ON_META

PROMISED = {"llama-3.2-3B-gate-0.05": (0.0005, 0.55e6), "llama-3.2-3B-gate-0.2": (0.002, 1.83e6)}
# with enough weights for a budget of half a thousandth to grow
SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 2000,
}
FAKE_UTILS = """
import torch
def get_optimizer_and_scheduler(model, *, optimizer_type, max_steps, lr_scheduler_arg, **kwargs):
    return getattr(torch.optim, optimizer_type)(model.parameters(), **kwargs), lr_scheduler_arg
"""
FAKE_RUN = """
import json, os, sys
from pathlib import Path
import torch
from utils import get_optimizer_and_scheduler
verbose, path = sys.argv[1:]
assert verbose == "-v" and len(path.split(os.path.sep)) == 3
params = json.loads(Path(path, "training_params.json").read_text())
assert hasattr(torch.optim, params["optimizer_type"])
Path(os.environ["SAID"]).write_text(json.dumps([path, Path(path, "adapter_config.json").exists()]))
"""


@pytest.fixture(autouse=True)
def torch_as_it_was(monkeypatch):
    monkeypatch.setattr(torch.optim, metamath.OPTIMIZER, None, raising=False)


def config_of(row):
    return PeftConfig.from_pretrained(str(metamath.HERE / "experiments" / "mask" / row))


def model_of(row):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SHAPE))
    return get_peft_model(base, config_of(row))


def zeros_of(model):
    layers = [module for module in model.modules() if isinstance(module, MaskLayer)]
    return [int(layer.mask("default").logical_not().sum()) for layer in layers]


def test_the_rows_are_those_that_are_promised():
    assert sorted(PROMISED) == metamath.ROWS


@pytest.mark.parametrize("row", metamath.ROWS)
def test_a_row_is_a_new_configuration_of_gate_projections_as_it_is_saved(row, tmp_path):
    config = MaskConfig(task_type="CAUSAL_LM", target_modules=["gate_proj"], target_sparsity=PROMISED[row][0])
    config.save_pretrained(tmp_path)
    own = metamath.HERE / "experiments" / "mask" / row / "adapter_config.json"
    saved, written = (json.loads(path.read_text()) for path in (tmp_path / "adapter_config.json", own))
    assert written | {"peft_version": None} == saved | {"peft_version": None}
    assert not config_of(row).is_saved


@pytest.mark.parametrize("row", metamath.ROWS)
def test_a_row_masks_the_gate_projections_alone(row):
    model = model_of(row)
    masked = [name for name, module in model.named_modules() if isinstance(module, MaskLayer)]
    assert len(masked) == model.config.num_hidden_layers
    assert all(name.endswith("mlp.gate_proj") for name in masked)


@pytest.mark.skipif(not RUNS_ON_META, reason="this transformers' Llama does not run without weights")
@pytest.mark.parametrize("row", metamath.ROWS)
def test_the_file_of_a_row_has_the_promised_size_on_the_base_of_the_comparison(row):
    config = config_of(row)
    sparsity, size = PROMISED[row]
    assert config.target_sparsity == sparsity
    assert storage(made(MODELS["Llama-3.2-3B"]), config, sparsity).mask == pytest.approx(size, rel=0.01)


@pytest.mark.parametrize("row", metamath.ROWS)
def test_the_budget_grows_with_the_steps_as_the_callback_lets_it(row):
    steps = 40
    model = model_of(row)
    weights = SHAPE["hidden_size"] * SHAPE["intermediate_size"]
    optimizer = metamath.mask_optimizer(model, steps)
    schedule = SparsitySchedule.gentle(PROMISED[row][0], steps)
    inputs = tiny_inputs(model, labels=True)
    for step in range(steps):
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        share = schedule.share((step + 1) / steps)
        assert set(zeros_of(model)) == {max(1, round(share * PROMISED[row][0] * weights))}
    assert share == 1.0


def test_the_harness_makes_the_optimizer_of_masks_and_all_others_as_before():
    utils = SimpleNamespace()
    exec(FAKE_UTILS, vars(utils))
    metamath.add_optimizer(utils)
    model = model_of(metamath.ROWS[0])
    options = {"max_steps": 10, "lr_scheduler_arg": "cosine"}
    optimizer, schedule = utils.get_optimizer_and_scheduler(model, optimizer_type=metamath.OPTIMIZER, **options)
    assert isinstance(optimizer, SignAdamW)
    assert all(group["sign"] for group in optimizer.param_groups)
    assert schedule == "cosine"
    other, _ = utils.get_optimizer_and_scheduler(model, optimizer_type="AdamW", lr=0.5, **options)
    assert type(other) is torch.optim.AdamW
    assert [group["lr"] for group in other.param_groups] == [0.5]


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    harness = tmp_path / "peft" / "method_comparison" / "MetaMathQA"
    harness.mkdir(parents=True)
    (harness / "utils.py").write_text(FAKE_UTILS)
    (harness / "run.py").write_text(FAKE_RUN)
    monkeypatch.setattr(peft, "__file__", str(tmp_path / "peft" / "src" / "peft" / "__init__.py"))
    monkeypatch.setattr(sys, "version_info", (3, 12, 1))
    return tmp_path / "peft"


@pytest.mark.parametrize("row", metamath.ROWS)
def test_a_row_is_run_as_by_hand(row, checkout, tmp_path, monkeypatch):
    monkeypatch.chdir(Path.cwd())
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", ["ours"])
    monkeypatch.delitem(sys.modules, "utils", raising=False)
    monkeypatch.setenv("SAID", str(tmp_path / "said"))
    try:
        metamath.main([str(checkout), row])
    finally:
        sys.modules.pop("utils", None)
    assert json.loads((tmp_path / "said").read_text()) == [f"experiments/mask/{row}", True]


def test_without_a_row_each_has_a_process_of_its_own(checkout, monkeypatch):
    calls = []
    monkeypatch.setattr(metamath.subprocess, "run", lambda command, check: calls.append((command[1:], check)))
    metamath.main([str(checkout)])
    assert calls == [(["-m", "benchmarks.metamath", str(checkout), row], True) for row in metamath.ROWS]


def test_a_folder_without_the_harness_is_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"error: .* has no method_comparison.MetaMathQA.run\.py: give a checkout of"):
        metamath.main([str(tmp_path)])


def test_a_peft_from_elsewhere_is_refused(checkout, monkeypatch):
    monkeypatch.setattr(peft, "__file__", os.__file__)
    with pytest.raises(SystemExit, match=r"error: PEFT is imported from .*, not from .*: pip install -e "):
        metamath.main([str(checkout)])


def test_a_python_that_cannot_tell_the_size_of_the_file_is_refused(checkout, monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 11, 7))
    with pytest.raises(SystemExit, match=r"error: the harness needs Python 3\.12 or newer, this is .*99999999 bytes"):
        metamath.main([str(checkout)])
