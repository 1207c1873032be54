import pytest

from peft_mask import Masks
from peft_mask.cli.inspect import kind_of, layer_of


def test_what_is_said_of_an_adapter_is_what_its_masks_are(place, run):
    folder = place.adapters / "a"
    masks = Masks.load(folder)
    said = run("inspect", folder, "--json")
    assert said.code == 0
    data = said.data
    assert (data["masks"], data["weights"], data["sparsity"]) == (len(masks), masks.weights, masks.sparsity)
    assert data["bits_per_weight"] == masks.bits_per_weight
    assert data["bytes"]["file"] == (folder / "adapter_model.safetensors").stat().st_size
    assert data["bytes"]["masks"] + data["bytes"]["beside"] < data["bytes"]["file"]
    assert {row["name"]: row["zeros"] for row in data["matrices"]} == masks.zeros
    for groups in ("by_kind", "by_layer"):
        assert sum(row["zeros"] for row in data[groups]) == data["zeros"]
        assert sum(row["bytes"] for row in data[groups]) == data["bytes"]["masks"]
    assert data["task_type"] == "SEQ_CLS"
    assert data["base_model"] == str(place.base)
    assert data["portable"] is True
    assert [row["name"] for row in data["beside"]] == ["classifier.bias", "classifier.weight"]


def test_an_adapter_that_needs_its_base_is_read_without_it(place, run):
    bound, thin = (run("inspect", place.adapters / name, "--json").data for name in ("bound", "thin"))
    assert bound["portable"] is False
    assert "ranks against the base" in bound["coded_as"]
    assert bound["zeros"] == thin["zeros"]
    assert bound["bytes"]["masks"] < thin["bytes"]["masks"]


def test_the_text_has_a_line_for_each_layer_kind_and_if_asked_matrix(place, run):
    text = run("inspect", place.adapters / "a").out
    assert "format        version 1, portable: read without its base" in text
    assert "attention.self.query " in text
    assert "bert.encoder.layer.0" not in text
    assert "bert.encoder.layer.0.attention.self.query " in run("inspect", place.adapters / "a", "--matrices").out


def test_a_checkpoint_says_what_its_scores_take(place, run, tmp_path):
    import torch
    from peft import get_peft_model

    from peft_mask import MaskConfig, keep_scores

    torch.manual_seed(0)
    model = get_peft_model(place.load(2), MaskConfig(task_type="SEQ_CLS", seed=0))
    keep_scores(model)
    model.save_pretrained(tmp_path / "checkpoint")
    data = run("inspect", tmp_path / "checkpoint", "--json").data
    assert data["bytes"]["scores"] > data["weights"] * 0.1 * 4
    assert [row["name"] for row in data["beside"]] == ["classifier.bias", "classifier.weight"]
    assert "to resume training from" in run("inspect", tmp_path / "checkpoint").out


@pytest.mark.parametrize(
    ("name", "kind", "layer"),
    [
        ("bert.encoder.layer.11.output.dense", "output.dense", "11"),
        ("model.layers.0.mlp.experts.7.up_proj", "mlp.experts.*.up_proj", "0"),
        ("0", "*", "0"),
        ("classifier", "classifier", "-"),
    ],
)
def test_names_tell_kind_and_layer(name, kind, layer):
    assert (kind_of(name), layer_of(name)) == (kind, layer)
