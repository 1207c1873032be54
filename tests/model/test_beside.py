"""What a file holds beside its masks: the adapter's own heads and embeddings come in, nothing else does."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load, load_file, save_file

from peft_mask import MaskConfig
from tests.tiny_models import tiny_inputs, tiny_model
from tests.versions import KNOWS_COMPLEX

FILE, HEAD = "adapter_model.safetensors", "base_model.model.classifier.weight"


@pytest.fixture
def adapter(tmp_path):
    config = MaskConfig(task_type="SEQ_CLS", init_weights=False, target_sparsity=0.05, seed=0)
    get_peft_model(tiny_model("bert"), config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def edit(folder, **tensors):
    held = load((folder / FILE).read_bytes())  # not mapped, for older safetensors writes into the file that is there
    save_file({**held, **tensors}, folder / FILE, metadata={"format": "pt"})


def edit_config(folder, **fields):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | fields))


def bytes_of(model):
    return {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    "name",
    [
        "bert.embeddings.word_embeddings.weight",
        "bert.encoder.layer.0.attention.self.query.base_layer.weight",
        "classifier.original_module.weight",
        "classifier.modules_to_save.one.weight",
        "bert.encoder.layer.0.attention.self.query.peft_mask_bits.one",
        "nothing.of.that.name",
        "bert",
    ],
)
def test_what_is_not_the_adapters_own_is_refused_and_changes_nothing(adapter, tmp_path, name):
    model = PeftModel.from_pretrained(tiny_model("bert"), adapter, adapter_name="one").eval()
    before = bytes_of(model)
    edit(adapter, **{f"base_model.model.{name}": torch.full((3, 32), 9.0)})
    with pytest.raises(ValueError, match=rf"its file holds \['base_model.model.{name}'\], which would change the base"):
        model.load_adapter(adapter, "two")
    after = bytes_of(model)
    assert all(after[key] == value for key, value in before.items())


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, *([torch.complex64] if KNOWS_COMPLEX else [])])
def test_a_head_of_other_numbers_is_refused(adapter, dtype):
    edit(adapter, **{HEAD: torch.ones(3, 32).to(dtype)})
    with pytest.raises(ValueError, match=rf"cannot load 'classifier\S+': expected torch.float32, the file has {dtype}"):
        PeftModel.from_pretrained(tiny_model("bert"), adapter)


def test_a_head_of_nan_is_refused(adapter):
    edit(adapter, **{HEAD: torch.full((3, 32), float("nan"))})
    with pytest.raises(ValueError, match=r"96 of its 96 values are NaN. Did training diverge"):
        PeftModel.from_pretrained(tiny_model("bert"), adapter)


def test_a_head_in_another_precision_is_cast_as_ever(adapter):
    head = load((adapter / FILE).read_bytes())[HEAD]
    edit(adapter, **{HEAD: head.to(torch.bfloat16)})
    with pytest.raises(ValueError, match=r'"checksums": null'):
        PeftModel.from_pretrained(tiny_model("bert"), adapter)
    edit_config(adapter, checksums=None)
    model = PeftModel.from_pretrained(tiny_model("bert"), adapter)
    loaded = model.base_model.model.classifier.modules_to_save["default"].weight
    assert torch.equal(loaded, head.to(torch.bfloat16).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings_that_were_saved_whole_come_in_where_the_base_has_them_already(tmp_path, dtype):
    model = get_peft_model(tiny_model("llama", "lm"), MaskConfig(init_weights=False, target_sparsity=0.05))
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    assert "base_model.model.model.embed_tokens.weight" in load_file(tmp_path / FILE)
    loaded = PeftModel.from_pretrained(tiny_model("llama", "lm").to(dtype), tmp_path).float().eval()
    inputs = tiny_inputs(model.get_base_model())
    with torch.no_grad():
        expected = model.to(dtype).float().eval()(**inputs).logits
        assert torch.equal(loaded(**inputs).logits, expected)

    other = tiny_model("llama", "lm")
    with torch.no_grad():
        other.model.embed_tokens.weight[7] += 1
    with pytest.raises(ValueError, match=r"embed_tokens.weight'\], which .* Embeddings come in this way"):
        PeftModel.from_pretrained(other, tmp_path)


def test_peft_itself_lets_a_file_write_to_the_base(tmp_path):
    """Why `own_tensors` is there. If this fails, PEFT has closed that hole for every method."""
    model = get_peft_model(tiny_model("bert"), LoraConfig(task_type="SEQ_CLS"))
    model.save_pretrained(tmp_path)
    name = "bert.embeddings.word_embeddings.weight"
    edit(tmp_path, **{f"base_model.model.{name}": torch.zeros(64, 32)})
    assert not PeftModel.from_pretrained(tiny_model("bert"), tmp_path).get_parameter(f"base_model.model.{name}").any()
