import json
import subprocess
import sys

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from peft_mask import MaskConfig, Masks
from tests.cli.test_main import copied
from tests.server.places import TEXTS

FILE = "adapter_model.safetensors"


# ---- verify ----


@pytest.mark.parametrize("name", ["a", "b", "bound"])
def test_an_adapter_belongs_to_the_base_it_was_trained_on(name, place, run):
    said = run("verify", place.adapters / name, "--base", place.base)
    assert (said.code, said.err) == (0, "")
    assert said.out == "They belong together, by samples of the weights: 13 masks of 13, and 2 tensors beside them.\n"


def test_each_mask_that_is_for_other_weights_is_named(place, run, tmp_path):
    model = AutoModel.from_pretrained(place.base)
    with torch.no_grad():
        model.encoder.layer[1].attention.self.query.weight.mul_(-1)
        model.encoder.layer[0].output.dense.weight.mul_(-1)
    model.save_pretrained(tmp_path / "changed")
    said = run("verify", place.adapters / "a", "--base", tmp_path / "changed", "--json")
    assert said.code == 1
    assert sorted(said.data["wrong_masks"]) == [
        "bert.encoder.layer.0.output.dense",
        "bert.encoder.layer.1.attention.self.query",
    ]
    text = run("verify", place.adapters / "a", "--base", tmp_path / "changed").out
    assert text.startswith("They do not belong together: 2 masks of 13 are wrong.\n")
    assert text.count("the base weight is not the one it was trained on") == 1, "once for all that it is true of"


def test_an_adapter_cannot_ask_not_to_be_checked(place, run, tmp_path):
    folder = copied(place.adapters / "a", tmp_path / "sly")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"check_base": False}))
    model = AutoModel.from_pretrained(place.base)
    with torch.no_grad():
        model.encoder.layer[1].attention.self.query.weight.mul_(-1)
    model.save_pretrained(tmp_path / "changed")
    assert run("verify", folder, "--base", tmp_path / "changed").code == 1


def test_a_base_of_another_kind_is_no(place, talking, run):
    said = run("verify", place.adapters / "a", "--base", talking.base)
    assert said.code == 1
    assert "has no module 'bert.encoder.layer.0.attention" in said.out


def test_a_damaged_head_is_no(place, run, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = copied(place.adapters / "a", tmp_path / "damaged")
    tensors = load_file(folder / FILE)
    tensors["base_model.model.classifier.weight"] += 1
    save_file(tensors, folder / FILE)
    said = run("verify", folder, "--base", place.base)
    assert said.code == 1
    assert "cannot load 'classifier.weight': it is not what was saved" in said.out


def test_a_base_that_cannot_be_had_is_neither_yes_nor_no(place, refused, tmp_path):
    (tmp_path / "empty").mkdir()
    message = refused("verify", place.adapters / "a", "--base", tmp_path / "empty")
    assert f"there is no model of transformers at '{tmp_path / 'empty'}' that can be read" in message


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (
            "nope",
            "there is no folder 'nope', and it cannot be had from the Hub: check the name, the network and your login",
        ),
        ("./nope", "there is no folder './nope', and it is no id on the Hub like 'user/name': check the name."),
    ],
)
def test_a_base_that_is_nowhere_is_refused_in_a_whole_line(base, message, place, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = refused("merge", place.adapters / "a", "--base", base, "--out", "out")
    assert message in said
    assert said.endswith((".", ".)"))


def test_an_adapter_is_no_base(place, refused, tmp_path):
    a = place.adapters / "a"
    said = refused("merge", a, "--base", place.adapters / "b", "--out", tmp_path / "out")
    assert (
        f"'{place.adapters / 'b'}' holds an adapter, not a base model: give the base that it was trained on, " in said
    )
    assert said.endswith(f"'{place.base}' by its configuration.")


# ---- convert ----


def test_a_file_against_its_base_and_back_is_the_same_file(place, run, tmp_path):
    thin = place.adapters / "thin"
    said = run("convert", thin, "--against", place.base, "--out", tmp_path / "small", "--json")
    assert said.code == 0
    assert said.data["portable"] is False
    assert said.data["mask_bytes"] < said.data["mask_bytes_before"]
    assert run("verify", tmp_path / "small", "--base", place.base).code == 0
    run("convert", tmp_path / "small", "--portable", "--base", place.base, "--out", tmp_path / "back")
    assert (tmp_path / "back" / FILE).read_bytes() == (thin / FILE).read_bytes()
    before, after = (json.loads((folder / "adapter_config.json").read_text()) for folder in (thin, tmp_path / "back"))
    assert after == before
    assert (tmp_path / "back" / "labels.json").read_bytes() == (thin / "labels.json").read_bytes()
    assert "| bytes of the masks |" in (tmp_path / "small" / "README.md").read_text()


def test_the_card_of_a_converted_adapter_has_its_own_figures(place, run, tmp_path):
    said = run("convert", place.adapters / "thin", "--against", place.base, "--out", tmp_path / "small", "--json")
    card = (tmp_path / "small" / "README.md").read_text()
    assert f"| bytes of the masks | {said.data['mask_bytes']:,} |" in card
    assert "It is coded against the weights of the base model" in card


def test_what_needs_its_base_is_not_converted_without_it_or_with_another(place, talking, refused, tmp_path):
    message = refused("convert", place.adapters / "bound", "--portable", "--out", tmp_path / "no")
    assert "is coded against its base: name it with --base" in message
    message = refused("convert", place.adapters / "thin", "--against", talking.base, "--out", tmp_path / "no")
    assert "the base is none for the adapter" in message
    message = refused(
        "convert", place.adapters / "thin", "--against", place.base, "--dtype", "float16", "--out", tmp_path / "no"
    )
    assert "load the base model in float32 or bfloat16" in message
    message = refused("convert", place.adapters / "thin", "--against", "x", "--base", "y", "--out", tmp_path / "no")
    assert "--against names the base already" in message
    assert list(tmp_path.iterdir()) == []


def test_a_random_head_that_is_masked_is_drawn_as_the_adapter_says(place, run, tmp_path):
    model = get_peft_model(place.load(4), MaskConfig.paper(task_type="SEQ_CLS", seed=0, head_seed=7))
    model.save_pretrained(tmp_path / "paper")
    assert run("verify", tmp_path / "paper", "--base", place.base).code == 0
    assert run("convert", tmp_path / "paper", "--against", place.base, "--out", tmp_path / "small").code == 0
    assert Masks.load(tmp_path / "small", model.unload()) == Masks.load(tmp_path / "paper")
    assert run("merge", tmp_path / "small", "--base", place.base, "--out", tmp_path / "merged").code == 0
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").classifier.weight
    assert torch.equal(merged == 0, ~Masks.load(tmp_path / "paper")["classifier"])


# ---- merge ----


def test_a_merged_checkpoint_computes_what_base_and_adapter_do_without_this_package(place, run, tmp_path):
    said = run("merge", place.adapters / "b", "--base", place.base, "--out", tmp_path / "merged", "--json")
    assert (said.code, said.err) == (0, "")
    assert said.data["class"] == "BertForSequenceClassification"
    assert said.data["bytes"] == sum(file.stat().st_size for file in (tmp_path / "merged").iterdir())
    code = f"""
import sys, torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
model = AutoModelForSequenceClassification.from_pretrained({str(tmp_path / "merged")!r}).eval()
tokenizer = AutoTokenizer.from_pretrained({str(tmp_path / "merged")!r})
assert model.config.id2label[4] == "label 1.4", model.config.id2label
with torch.no_grad():
    torch.save(model(**tokenizer({TEXTS!r}, padding=True, return_tensors="pt")).logits, {str(tmp_path / "logits")!r})
assert "peft_mask" not in sys.modules and "peft" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    adapter = PeftModel.from_pretrained(place.load(5), place.adapters / "b").eval()
    inputs = AutoTokenizer.from_pretrained(place.base)(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "logits"), adapter(**inputs).logits)


def test_random_heads_are_not_written(place, run, refused, tmp_path):
    run("combine", place.adapters / "a", place.adapters / "b", "--how", "union", "--out", tmp_path / "bare")
    message = refused("merge", tmp_path / "bare", "--base", place.base, "--out", tmp_path / "no")
    assert "'classifier.bias' is neither in the base nor in the adapter, and would be random" in message
    assert run("merge", tmp_path / "bare", "--base", place.base, "--backbone", "--out", tmp_path / "out").code == 0
    weight = AutoModel.from_pretrained(tmp_path / "out").encoder.layer[0].attention.self.query.weight
    mask = Masks.load(tmp_path / "bare")["bert.encoder.layer.0.attention.self.query"]
    assert torch.equal(weight == 0, ~mask)


def test_a_quantized_base_is_merged_into_its_codes_or_written_in_floats(talking, run, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    arguments = ["merge", talking.adapters / "a", "--base", talking.base, "--quantize", "nf4"]
    said = run(*arguments, "--out", tmp_path / "codes", "--json")
    assert (said.code, said.data["quantized"]) == (0, True)
    said = run(*arguments, "--dequantize", "--out", tmp_path / "floats", "--json")
    assert (said.code, said.data["quantized"]) == (0, False)
    codes, floats = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("codes", "floats"))
    masks = Masks.load(talking.adapters / "a")
    for name, mask in masks.items():
        weight = floats.get_submodule(name).weight
        assert torch.equal(weight[~mask], torch.zeros_like(weight[~mask])), name
    assert codes.is_quantized
    assert not getattr(floats, "is_quantized", False)
    # a base that is quantized on disk already
    base = AutoModelForCausalLM.from_pretrained(talking.base, quantization_config=codes.config.quantization_config)
    base.save_pretrained(tmp_path / "base")
    assert run("verify", talking.adapters / "a", "--base", tmp_path / "base").code == 0
    said = run("merge", talking.adapters / "a", "--base", tmp_path / "base", "--out", tmp_path / "again", "--json")
    assert said.data["quantized"] is True
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    expected, found = codes.state_dict(), again.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_dequantize_is_refused_where_nothing_is_quantized(place, refused, tmp_path):
    message = refused("merge", place.adapters / "a", "--base", place.base, "--dequantize", "--out", tmp_path / "no")
    assert "--dequantize is for a quantized base" in message


def test_no_tokenizer_is_made_up(place, run, tmp_path):
    AutoModel.from_pretrained(place.base).save_pretrained(tmp_path / "base")
    said = run("merge", place.adapters / "a", "--base", tmp_path / "base", "--out", tmp_path / "merged")
    assert said.code == 0
    assert "without a tokenizer: neither base nor adapter has one" in said.out
    assert not [path.name for path in (tmp_path / "merged").iterdir() if "token" in path.name or "vocab" in path.name]


def test_the_adapters_own_tokenizer_goes_along_and_its_tokens_have_rows(talking, run, tmp_path):
    folder = copied(talking.adapters / "a", tmp_path / "a")
    tokenizer = AutoTokenizer.from_pretrained(talking.base)
    tokenizer.add_tokens(["<|yes|>", "<|no|>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    assert run("merge", folder, "--base", talking.base, "--out", tmp_path / "merged").code == 0
    assert len(AutoTokenizer.from_pretrained(tmp_path / "merged")) == len(tokenizer) == 66
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").get_input_embeddings().num_embeddings == 66


def test_names_of_other_labels_than_the_head_has_are_refused(place, refused, tmp_path):
    folder = copied(place.adapters / "a", tmp_path / "a")
    (folder / "labels.json").write_text('["one", "two", "three"]')
    message = refused("merge", folder, "--base", place.base, "--out", tmp_path / "no")
    assert "names 3 labels, the model has 2" in message


def test_a_base_that_has_the_head_already_is_loaded_as_it_is(place, run, tmp_path):
    AutoModelForSequenceClassification.from_pretrained(place.base, num_labels=7).save_pretrained(tmp_path / "seven")
    said = run("merge", place.adapters / "b", "--base", tmp_path / "seven", "--out", tmp_path / "merged")
    assert said.code == 0
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").config.num_labels == 5
