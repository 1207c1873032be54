"""What stands beside the masks is as it was saved, by every door; what is not leaves everything as it was."""

import json
import shutil

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load, save_file

from peft_mask import MaskConfig, Masks, hotswap_adapter, keep_scores
from tests.tiny_models import tiny_inputs, tiny_model
from tests.versions import LOADS_BY_NAME, LOADS_HEADS

FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"
HEAD, TOKENS = "classifier.weight", "bert.embeddings.word_embeddings.token_adapter.trainable_tokens_delta"
by_name = pytest.mark.skipif(not (LOADS_BY_NAME and LOADS_HEADS), reason="another door in this transformers")


def save(folder, seed=0, scores=False, **fields):
    config = MaskConfig(task_type="SEQ_CLS", init_weights=False, target_sparsity=0.05, seed=seed, **fields)
    model = get_peft_model(tiny_model("bert"), config).eval()
    with torch.no_grad():
        torch.manual_seed(seed)
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name or "trainable_tokens" in name:
                parameter.normal_()
    keep_scores(model, scores)
    model.save_pretrained(folder)
    return model


def edit(folder, **tensors):
    held = load((folder / FILE).read_bytes())
    save_file({**held, **{f"base_model.model.{k}": v for k, v in tensors.items()}}, folder / FILE)


def edit_config(folder, **fields):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | fields))


def damage(folder, name):
    """Flip the lowest bit of a value."""
    tensor = load((folder / FILE).read_bytes())[f"base_model.model.{name}"].clone()
    tensor.view(torch.int32).view(-1)[1] ^= 1
    edit(folder, **{name: tensor})


def outputs(model):
    with torch.no_grad():
        return model.eval()(**tiny_inputs(tiny_model("bert"))).logits


@pytest.mark.parametrize("name", [HEAD, TOKENS])
def test_a_flipped_bit_is_refused_by_every_door_of_pefts(tmp_path, name):
    fields = {"trainable_token_indices": {"word_embeddings": [3, 5]}}
    save(tmp_path / "good", seed=1, **fields)
    save(tmp_path / "bad", seed=2, **fields)
    damage(tmp_path / "bad", name)
    message = rf"cannot load '{name}': it is not what was saved"
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(tiny_model("bert"), tmp_path / "bad")
    model = PeftModel.from_pretrained(tiny_model("bert"), tmp_path / "good")
    expected = outputs(model)
    with pytest.raises(ValueError, match=message):
        model.load_adapter(tmp_path / "bad", "other")
    with pytest.raises(ValueError, match=message):
        hotswap_adapter(model, str(tmp_path / "bad"), "default")
    assert torch.equal(outputs(model), expected)
    edit_config(tmp_path / "bad", checksums=None)  # as older files, and those that were changed on purpose
    assert PeftModel.from_pretrained(tiny_model("bert"), tmp_path / "bad")


@by_name
def test_a_flipped_bit_is_refused_by_transformers_own_door(tmp_path):
    save(tmp_path)
    good = tiny_model("bert")
    good.load_adapter(tmp_path)
    damage(tmp_path, HEAD)
    model = tiny_model("bert")
    with pytest.raises(ValueError, match=rf"cannot load '{HEAD}': it is not what was saved"):
        model.load_adapter(tmp_path)
    with pytest.raises(ValueError, match="has no mask for"):
        outputs(model)
    edit_config(tmp_path, checksums=None)
    tiny_model("bert").load_adapter(tmp_path)


@by_name
def test_what_transformers_casts_on_the_way_is_taken_as_it_comes(tmp_path):
    save(tmp_path)
    model = tiny_model("bert").bfloat16()
    model.load_adapter(tmp_path)
    assert model.classifier.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("ending", ["peft_mask_scores", "peft_mask_positions"])
def test_scores_in_a_checkpoint_are_covered(tmp_path, ending):
    save(tmp_path, scores=True)
    name = f"bert.encoder.layer.0.attention.self.query.{ending}"
    tensor = load((tmp_path / FILE).read_bytes())[f"base_model.model.{name}"].clone()
    if ending == "peft_mask_scores":
        tensor.view(torch.int32)[tensor.argmax()] ^= 1  # the mask stays as it is
    else:
        tensor[-1] = tensor[-1] + 1 if tensor[-1] + 1 < 32 * 32 else tensor[-2] + 1
    edit(tmp_path, **{name: tensor})
    with pytest.raises(ValueError, match=r"cannot load (the scores of )?'bert.encoder.layer.0.attention.self.query"):
        PeftModel.from_pretrained(tiny_model("bert"), tmp_path, is_trainable=True)


def test_another_token_in_the_configuration_is_refused(tmp_path):
    save(tmp_path, trainable_token_indices={"word_embeddings": [3, 5]})
    edit_config(tmp_path, trainable_token_indices={"word_embeddings": [3, 6]})
    with pytest.raises(ValueError, match=rf"cannot load '{TOKENS}': it is not what was saved"):
        PeftModel.from_pretrained(tiny_model("bert"), tmp_path)


def test_masks_that_are_saved_say_nothing_of_heads_and_tokens(tmp_path):
    save(tmp_path / "a", trainable_token_indices={"word_embeddings": [3, 5]})
    Masks.load(tmp_path / "a").save(tmp_path / "masks")
    assert "checksums" not in json.loads((tmp_path / "masks" / CONFIG).read_text())
    loaded = PeftModel.from_pretrained(tiny_model("bert"), tmp_path / "masks")
    assert Masks.load(tmp_path / "a").keys() == Masks.load(tmp_path / "masks").keys()
    assert outputs(loaded).isfinite().all()


def test_a_checkpoint_without_its_scores_is_still_as_it_was_saved(tmp_path):
    model = save(tmp_path, scores=True)
    held = load((tmp_path / FILE).read_bytes())
    published = {name: value for name, value in held.items() if not name.endswith(("_scores", "_positions"))}
    assert len(published) < len(held)
    save_file(published, tmp_path / FILE)
    assert torch.equal(outputs(PeftModel.from_pretrained(tiny_model("bert"), tmp_path)), outputs(model))


def test_what_could_not_be_loaded_is_not_saved(tmp_path):
    model = save(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"cannot save 'classifier.weight': 1 of its \d+ values are NaN"):
        model.save_pretrained(tmp_path)
    assert before[FILE] == (tmp_path / FILE).read_bytes()
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].weight.zero_()
    state = {name: value for name, value in model.state_dict().items() if not name.endswith("default.bias")}
    with pytest.raises(ValueError, match=r"cannot save 'classifier.bias': it is sharded over processes"):
        model.save_pretrained(tmp_path, state_dict=state)


@pytest.mark.parametrize("value", [3, [], {"records": "a"}, {"records": 1, "tensors": {}}, {"tensors": {"a": 1}}])
def test_malformed_checksums_are_refused(value):
    with pytest.raises(ValueError, match="checksums must be what saving wrote or None"):
        MaskConfig(checksums=value)


def _shape(folder):
    edit(folder, **{HEAD: torch.zeros(4, 32)})


def _bias_shape(folder):
    edit(folder, **{"classifier.bias": torch.zeros(4)})


def _nan(folder):
    edit(folder, **{HEAD: torch.full((3, 32), float("nan"))})


def _record(folder):
    name = "bert.encoder.layer.1.output.dense.peft_mask_bits"
    record = load((folder / FILE).read_bytes())[f"base_model.model.{name}"].clone()
    record[70] ^= 1
    edit(folder, **{name: record})


def _missing(folder):
    held = load((folder / FILE).read_bytes())
    held.pop(f"base_model.model.{HEAD}")
    save_file(held, folder / FILE)


def _foreign(folder):
    edit(folder, **{"bert.embeddings.word_embeddings.weight": torch.zeros(64, 32)})


REFUSALS = {
    _shape: r"cannot load 'classifier.weight': expected the shape \(3, 32\), the file has \(4, 32\)",
    _bias_shape: r"cannot load 'classifier.bias': expected the shape \(3,\), the file has \(4,\)",
    _nan: "cannot load 'classifier.weight': 96 of its 96 values are NaN",
    _record: "cannot load the mask of 'bert.encoder.layer.1.output.dense': its checksum is wrong",
    _missing: "'base_model.model.classifier.weight'",  # PEFT's own KeyError, the name alone
    _foreign: r"its file holds \['base_model.model.bert.embeddings.word_embeddings.weight'\], which would",
}


@pytest.mark.parametrize("change", REFUSALS)
@pytest.mark.parametrize("trained", [False, True], ids=["in use", "in training"])
@pytest.mark.filterwarnings("ignore:.*holds masks without scores")
def test_a_load_that_fails_leaves_the_adapter_of_that_name_as_it_was(tmp_path, change, trained):
    save(tmp_path / "one", seed=1)
    save(tmp_path / "two", seed=2)
    change(tmp_path / "two")
    model = (
        get_peft_model(tiny_model("bert"), MaskConfig(task_type="SEQ_CLS", seed=0))
        if trained
        else PeftModel.from_pretrained(tiny_model("bert"), tmp_path / "one")
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises((ValueError, KeyError), match=REFUSALS[change]):
        model.load_adapter(tmp_path / "two", "default", is_trainable=trained)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(before[name].numpy().tobytes() == after[name].numpy().tobytes() for name in before)
    shutil.rmtree(tmp_path / "two")
    good = save(tmp_path / "two", seed=2)
    if not trained:
        model.load_adapter(tmp_path / "two", "default")
        assert torch.equal(outputs(model), outputs(good))
