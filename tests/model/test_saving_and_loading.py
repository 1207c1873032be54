"""What an adapter's file holds, and what is refused on the way back, in the user's words."""

import json
import os
import subprocess
import sys

import pytest
import torch
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from peft_mask import MaskConfig, keep_scores
from peft_mask.format.record import read_record
from peft_mask.layers.mask_layer import MaskLayer


def mlp(seed=0, width=20, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, width), nn.ReLU(), nn.Linear(width, 5)).to(dtype)


def masked(base, **fields):
    torch.manual_seed(1)
    fields = {
        "target_modules": ["0", "2"],
        "binarizer": "threshold",
        "candidates": None,
        "init_weights": False,
    } | fields
    return get_peft_model(base, MaskConfig(**fields)).eval()


@pytest.fixture
def adapter(tmp_path):
    model = masked(mlp())
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def edit(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


KEY = "base_model.model.0.peft_mask_bits"


def test_the_file_holds_one_record_a_layer_and_nothing_else(adapter):
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert set(tensors) == {KEY, KEY.replace("0", "2")}
    record = read_record(tensors[KEY])
    assert record.shape == (20, 12)
    assert sorted(os.listdir(adapter)) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]


def test_saving_twice_writes_the_same_bytes_and_changes_nothing(tmp_path):
    model = masked(mlp())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for name in ("a", "b"):
        model.save_pretrained(tmp_path / name)
    assert (tmp_path / "a/adapter_model.safetensors").read_bytes() == (
        tmp_path / "b/adapter_model.safetensors"
    ).read_bytes()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_saving_while_merged_keeps_the_fingerprint_of_the_base(tmp_path, adapter):
    model = masked(mlp())
    model.merge_adapter()
    model.save_pretrained(tmp_path / "merged")
    assert (tmp_path / "merged/adapter_model.safetensors").read_bytes() == (
        adapter / "adapter_model.safetensors"
    ).read_bytes()


def test_an_adapter_loads_onto_a_merged_model(adapter):
    model = masked(mlp())
    model.merge_adapter()
    with pytest.warns(UserWarning, match=r"Unmerging the model first"):  # PEFT's own doing
        model.load_adapter(adapter, "other")
    set_peft_model_state_dict(model, load_file(adapter / "adapter_model.safetensors"), "other")
    model.merge_adapter()  # with zeros in the base, its fingerprint is still compared with the weight as it was
    set_peft_model_state_dict(model, load_file(adapter / "adapter_model.safetensors"), "other")


def test_loading_for_inference_and_for_training_give_the_same_mask(adapter):
    bits = PeftModel.from_pretrained(mlp(), adapter)
    with pytest.warns(UserWarning, match=r"holds masks without scores: every score restarts at init_margin"):
        scores = PeftModel.from_pretrained(mlp(), adapter, is_trainable=True)
    x = torch.randn(3, 12)
    assert torch.equal(bits(x), scores(x))
    values = scores.base_model.model[0].peft_mask_scores["default"]
    assert values.requires_grad
    assert set(values.unique().tolist()) == {torch.tensor(-0.016).item(), torch.tensor(0.016).item()}


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("is_trainable", [False, True])
@pytest.mark.filterwarnings("ignore:the adapter 'default' holds masks without scores")
def test_low_cpu_mem_usage_loads_the_same(adapter, low_cpu_mem_usage, is_trainable):
    model = PeftModel.from_pretrained(mlp(), adapter, low_cpu_mem_usage=low_cpu_mem_usage, is_trainable=is_trainable)
    x = torch.randn(3, 12)
    assert torch.equal(model(x), masked(mlp())(x))


def test_scores_travel_only_when_asked_for(tmp_path):
    model = masked(mlp())
    layer = model.base_model.model[0]
    with torch.no_grad():
        layer.peft_mask_scores["default"].mul_(torch.rand_like(layer.peft_mask_scores["default"]))
    keep_scores(model)
    model.save_pretrained(tmp_path / "checkpoint")
    assert "base_model.model.0.peft_mask_scores" in load_file(tmp_path / "checkpoint/adapter_model.safetensors")
    resumed = PeftModel.from_pretrained(mlp(), tmp_path / "checkpoint", is_trainable=True)
    loaded = resumed.base_model.model[0].peft_mask_scores["default"]
    assert torch.equal(loaded, layer.peft_mask_scores["default"])
    used = PeftModel.from_pretrained(mlp(), tmp_path / "checkpoint")
    assert list(used.base_model.model[0].peft_mask_scores) == []
    keep_scores(model, enabled=False)
    model.save_pretrained(tmp_path / "published")
    published = load_file(tmp_path / "published/adapter_model.safetensors")
    assert {tensor.dtype for tensor in published.values()} == {torch.uint8}


def test_scores_that_do_not_fit_their_mask_are_refused(tmp_path):
    model = masked(mlp())
    keep_scores(model)
    model.save_pretrained(tmp_path)

    def change(tensors):
        tensors["base_model.model.0.peft_mask_scores"][0, 0] *= -1

    edit(tmp_path, change)
    with pytest.raises(ValueError, match=r"cannot load the scores of '0': they do not belong to the mask beside them"):
        PeftModel.from_pretrained(mlp(), tmp_path, is_trainable=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_same_base_in_another_dtype_is_accepted(adapter, dtype):
    model = PeftModel.from_pretrained(mlp(dtype=dtype), adapter)
    expected = masked(mlp()).base_model.model[0].mask("default")
    assert torch.equal(model.base_model.model[0].mask("default"), expected)


def test_another_base_of_the_same_shape_is_refused(adapter):
    with pytest.raises(ValueError, match=r"'0': the base weight is not the one it was trained on"):
        PeftModel.from_pretrained(mlp(seed=5), adapter)


def test_a_mask_that_keeps_everything_is_accepted_on_every_base(tmp_path):
    config = MaskConfig(target_modules=["0"])
    get_peft_model(mlp(), config).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(mlp(seed=5), tmp_path)
    assert model.base_model.model[0].mask("default").all()


def test_the_escape_named_in_the_error_works(adapter):
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["check_base"] = False
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    PeftModel.from_pretrained(mlp(seed=5), adapter)


def test_another_base_of_another_shape_is_refused(adapter):
    message = "mask of '0': its shape is 20x12, expected 24x12. Was this adapter trained on another base model"
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(mlp(width=24), adapter)


def test_masks_missing_from_the_file_are_listed(adapter):
    edit(adapter, lambda tensors: tensors.update({"base_model.model.7.peft_mask_bits": tensors.pop(KEY)}))
    with pytest.raises(ValueError, match=r"(?s)not in the file: \['0'\].*not in the model: \['7'\]"):
        PeftModel.from_pretrained(mlp(), adapter)


def test_a_foreign_file_is_refused(adapter):
    save_file({"lora_A.weight": torch.zeros(2)}, adapter / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"(?s)not in the file: \['0', '2'\].*Is it an adapter of peft_mask, whole"):
        PeftModel.from_pretrained(mlp(), adapter)


def test_a_truncated_file_is_refused(adapter):
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(SafetensorError, match=r"file not fully covered|MetadataIncompleteBuffer"):
        PeftModel.from_pretrained(mlp(), adapter)


def test_a_flipped_bit_is_refused(adapter):
    def change(tensors):
        tensors[KEY][-10] ^= 1

    edit(adapter, change)
    with pytest.raises(ValueError, match=r"cannot load the mask of '0': its checksum is wrong"):
        PeftModel.from_pretrained(mlp(), adapter)


def test_a_newer_format_is_refused(adapter):
    def change(tensors):
        tensors[KEY][4] = 3

    edit(adapter, change)
    with pytest.raises(ValueError, match=r"'0': it has format version 3, written by a newer peft_mask"):
        PeftModel.from_pretrained(mlp(), adapter)


def test_a_mask_under_two_names_is_refused(adapter):
    edit(adapter, lambda tensors: tensors.update({"0.peft_mask_bits": tensors[KEY].clone()}))
    with pytest.raises(ValueError, match=r"the file holds '0.peft_mask_bits' twice, with the prefix"):
        PeftModel.from_pretrained(mlp(), adapter)


@pytest.mark.parametrize(
    "value", [torch.full((20, 12), float("nan")), torch.ones(20, 12, dtype=torch.int64), torch.ones(12, 20)], ids=str
)
def test_scores_that_are_none_are_refused(tmp_path, value):
    model = masked(mlp())
    keep_scores(model)
    model.save_pretrained(tmp_path)
    edit(tmp_path, lambda tensors: tensors.update({"base_model.model.0.peft_mask_scores": value}))
    with pytest.raises(ValueError, match=r"cannot load the scores of '0'"):
        PeftModel.from_pretrained(mlp(), tmp_path, is_trainable=True)


def test_nan_scores_are_not_saved(tmp_path):
    model = masked(mlp())
    with torch.no_grad():
        model.base_model.model[2].peft_mask_scores["default"][1] = float("nan")
    with pytest.raises(ValueError, match=r"cannot save the mask of '2': 20 of 100 scores are NaN. Did training"):
        model.save_pretrained(tmp_path)


def test_a_matrix_switched_off_whole_is_warned_of(tmp_path):
    model = masked(mlp())
    with torch.no_grad():
        model.base_model.model[2].peft_mask_scores["default"].fill_(-1)
    with pytest.warns(UserWarning, match=r"every weight of \['2'\] is switched off, which kills these layers"):
        model.save_pretrained(tmp_path)


def test_a_model_with_injected_adapters_round_trips_by_state_dict():
    config = MaskConfig(target_modules=["0", "2"], init_weights=False, target_sparsity=0.1)
    model = inject_adapter_in_model(config, mlp())
    state = get_peft_model_state_dict(model)
    assert set(state) == {"0.peft_mask_bits", "2.peft_mask_bits"}
    other = inject_adapter_in_model(MaskConfig(target_modules=["0", "2"], inference_mode=True), mlp())
    set_peft_model_state_dict(other, state)
    x = torch.randn(3, 12)
    assert torch.equal(other(x), model(x))


@pytest.mark.slow
def test_without_the_import_peft_names_what_to_import(adapter, tmp_path):
    script = f"from peft import PeftConfig; PeftConfig.from_pretrained({str(adapter)!r})"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "KeyError: 'PEFT_MASK'" in result.stderr


def test_an_adapter_may_be_loaded_under_another_name(adapter):
    model = PeftModel.from_pretrained(mlp(), adapter, adapter_name="renamed")
    assert [m._get_available_adapters() for m in model.modules() if isinstance(m, MaskLayer)] == [{"renamed"}] * 2
