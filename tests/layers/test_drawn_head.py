"""The masked random head: drawn by a rule of our own, frozen, masked, and back to the bit wherever it is loaded."""

import copy
import os
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForSequenceClassification

from peft_mask import MaskConfig, create_mask_optimizer
from peft_mask.analysis import masks_of
from peft_mask.layers.drawn_head import draw_head, random_weight
from peft_mask.layers.mask_layer import MaskLayer
from tests.model.test_model import logits
from tests.tiny_models import tiny_inputs, tiny_model

HEADS = {
    "bert": {"classifier"},
    "roberta": {"classifier.dense", "classifier.out_proj"},
    "distilbert": {"pre_classifier", "classifier"},
    "electra": {"classifier.dense", "classifier.out_proj"},
    "deberta-v2": {"pooler.dense", "classifier"},
    "modernbert": {"head.dense", "classifier"},
    "llama": {"score"},
}


def config(**fields):
    return MaskConfig.paper(**{"task_type": "SEQ_CLS", "seed": 0} | fields)


def bernoulli():
    return MaskConfig(binarizer="bernoulli", candidates=None, init_sparsity=0.499, task_type="SEQ_CLS", head="masked")


def masked(model):
    return {n for n, m in model.base_model.model.named_modules() if isinstance(m, MaskLayer)}


def trained(model, steps=3):
    optimizer = create_mask_optimizer(model.train(), mask_lr=0.02)
    for _ in range(steps):
        model(**tiny_inputs(model, labels=True)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.mark.parametrize("family", HEADS)
def test_the_papers_head_is_random_frozen_masked_and_not_saved(family, tmp_path):
    base = tiny_model(family)
    model = get_peft_model(base, config())
    assert HEADS[family] <= masked(model)
    parameters = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert parameters
    assert all(".peft_mask_scores." in name for name in parameters), "nothing but scores is trained"
    for name in HEADS[family]:
        layer = base.get_submodule(name).base_layer
        assert torch.equal(layer.weight, random_weight(layer.weight.shape, 0, name))
        assert layer.bias is None or not layer.bias.any()
    trained(model)
    inputs = tiny_inputs(model)
    expected = logits(model, inputs)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.uint8}
    assert {key.removeprefix("base_model.model.").removesuffix(".peft_mask_bits") for key in tensors} == masked(model)

    other = tiny_model(family)
    with torch.no_grad():  # another machine's head, as transformers draws one for every model it loads
        for name in HEADS[family]:
            other.get_submodule(name).weight.normal_()
    loaded = PeftModel.from_pretrained(other, tmp_path).eval()
    assert torch.equal(logits(loaded, inputs), expected)
    loaded.merge_adapter()
    assert torch.equal(logits(loaded, inputs), expected)
    assert torch.equal(logits(loaded.merge_and_unload(), inputs), expected)


def test_tokens_are_classified_by_a_masked_head_as_well(tmp_path):
    model = trained(get_peft_model(tiny_model("bert", "token_cls"), config(task_type=None, head="masked")))
    assert "classifier" in masked(model)
    model.save_pretrained(tmp_path)
    inputs = tiny_inputs(model)
    loaded = PeftModel.from_pretrained(tiny_model("bert", "token_cls", seed=0), tmp_path).eval()
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))


def test_pooler_and_head_are_masked_whatever_blocks_are():
    model = get_peft_model(tiny_model("bert"), config(layers_to_transform=[1]))
    names = masked(model)
    assert {"bert.pooler.dense", "classifier"} <= names
    assert all(".layer.1." in name for name in names - {"bert.pooler.dense", "classifier"})
    assert len(names) == 8
    chosen = get_peft_model(tiny_model("bert"), config(target_modules=["query"]))
    assert {name.rpartition(".")[2] for name in masked(chosen)} == {"query", "dense", "classifier"}
    assert len(masked(chosen)) == 4


def test_a_trained_head_is_the_control():
    model = get_peft_model(tiny_model("bert"), config(head="trained"))
    assert "classifier" not in masked(model)
    parameters = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert any(".classifier.modules_to_save.default.weight" in name for name in parameters)


def test_the_weights_are_what_their_definition_says():
    def splitmix64(i):
        z = (i + 1) * 0x9E3779B97F4A7C15 % 2**64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        return z ^ z >> 31

    key = zlib.crc32(b"7/head/classifier.dense") << 32
    expected = []
    for i in range(15):
        words = [splitmix64((key + 3 * i + j) % 2**64) for j in range(3)]
        parts = [word >> shift & 0xFFFF for word in words for shift in (0, 16, 32, 48)]
        expected.append(0.02 * ((sum(parts) - 6 * 65535) / 65536))
    weight = random_weight((3, 5), 7, "classifier.dense")
    assert torch.equal(weight, torch.tensor(expected, dtype=torch.float64).float().view(3, 5))


def test_the_weights_look_normal_and_differ_by_seed_and_name():
    weights = torch.stack([random_weight((400, 300), *key).flatten() for key in ((0, "a"), (1, "a"), (0, "b"))])
    assert torch.corrcoef(weights).fill_diagonal_(0).abs().max() < 0.01
    first = weights[0].double() / 0.02
    assert first.mean().abs() < 0.01
    assert first.std().item() == pytest.approx(1, abs=0.01)
    for quantile in (0.01, 0.1, 0.25, 0.5, 0.9, 0.99):
        normal = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(quantile)).item()
        assert first.quantile(quantile).item() == pytest.approx(normal, abs=0.05)


@pytest.mark.parametrize("make", [config, pytest.param(bernoulli, marks=pytest.mark.slow)])
def test_a_fresh_process_computes_the_same_to_the_bit(tmp_path, make):
    base = tiny_model("roberta")
    base.save_pretrained(tmp_path / "base")
    tensors = load_file(tmp_path / "base/model.safetensors")
    save_file(
        {key: value for key, value in tensors.items() if not key.startswith("classifier")},
        tmp_path / "base/model.safetensors",
        metadata={"format": "pt"},
    )
    model = trained(get_peft_model(base, make()))
    assert 0 < masks_of(model).sparsity < 1
    model.save_pretrained(tmp_path / "adapter")
    inputs = tiny_inputs(model)
    save_file(inputs | {"logits": logits(model, inputs)}, tmp_path / "expected.safetensors")
    script = f"""
import torch, peft_mask
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification
base = AutoModelForSequenceClassification.from_pretrained({str(tmp_path / "base")!r})
tensors = load_file({str(tmp_path / "expected.safetensors")!r})
expected = tensors.pop("logits")
model = PeftModel.from_pretrained(base, {str(tmp_path / "adapter")!r}).eval()
with torch.no_grad():
    assert torch.equal(model(**tensors).logits, expected)
"""
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root)}
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, env=environment, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr


def test_it_comes_in_by_transformers_own_door(tmp_path):
    base = tiny_model("bert")
    base.save_pretrained(tmp_path / "base")
    model = trained(get_peft_model(base, config()))
    model.save_pretrained(tmp_path / "adapter")
    inputs = tiny_inputs(model)
    native = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    native.load_adapter(tmp_path / "adapter")
    assert torch.equal(logits(native.eval(), inputs), logits(model, inputs))


def test_adapters_of_one_model_share_the_head(tmp_path):
    model = trained(get_peft_model(tiny_model("bert"), config()))
    inputs = tiny_inputs(model)
    first = logits(model, inputs)
    model.add_adapter("b", config(seed=1))
    model.set_adapter("b")
    second = logits(trained(model), inputs)
    assert not torch.equal(first, second)
    for name, expected in (("default", first), ("b", second), ("default", first)):
        model.base_model.switch_adapter(name)
        assert torch.equal(logits(model, inputs), expected)
    model.unmerge_adapter()
    before = {key: value.clone() for key, value in model.base_model.model.state_dict().items()}
    for other, says in ((config(head_seed=1), "'masked' and 1"), (MaskConfig(task_type="SEQ_CLS"), "'trained' and 0")):
        with pytest.raises(ValueError, match=f"share a masked head, or train one each: .* the new one {says}"):
            model.add_adapter("c", other)
    after = model.base_model.model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_an_adapter_of_another_head_seed_is_refused(tmp_path):
    get_peft_model(tiny_model("bert"), config(head_seed=1)).save_pretrained(tmp_path)
    text = (tmp_path / "adapter_config.json").read_text()
    (tmp_path / "adapter_config.json").write_text(text.replace('"head_seed": 1', '"head_seed": 2'))
    with pytest.raises(ValueError, match="mask of 'classifier': the base weight is not the one it was trained on"):
        PeftModel.from_pretrained(tiny_model("bert"), tmp_path)


def test_heads_that_cannot_be_drawn_are_refused_and_nothing_changes():
    with pytest.raises(ValueError, match=r'head="masked": BertModel has no task head outside its backbone'):
        get_peft_model(tiny_model("bert", "base"), config())
    odd = tiny_model("bert")
    odd.classifier = nn.Sequential(nn.Linear(32, 8), nn.PReLU(), nn.Linear(8, 3))
    before = copy.deepcopy(odd.state_dict())
    with pytest.raises(ValueError, match=r"how to draw 'classifier.1' of type PReLU is not known. Train the head with"):
        get_peft_model(odd, config())
    assert all(torch.equal(value, before[key]) for key, value in odd.state_dict().items())
    with torch.device("meta"):
        empty = nn.ModuleDict({"classifier": nn.Linear(3, 2)})
    with pytest.raises(ValueError, match=r"'classifier' is on the meta device. Load the base model's weights before"):
        draw_head(empty, ["classifier"], 0)


def test_norms_of_a_head_start_neutral():
    head = nn.ModuleDict({"head": nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))})
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.fill_(5)
    draw_head(head, ["head"], 0)
    assert torch.equal(head["head"][0].weight, random_weight((3, 3), 0, "head.0"))
    assert not head["head"][0].bias.any()
    assert (head["head"][1].weight == 1).all()
    assert not head["head"][1].bias.any()
