"""Rows of one batch under different adapters: each as if its adapter were alone."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper
from torch import nn

from peft_mask import MaskConfig
from peft_mask.layers.mask_layer import MaskLayer
from tests.served_models import alone, served
from tests.tiny_models import EOS, tiny_inputs, tiny_model

NAMES = ["one", "two", "__base__", "one", "two"]


def random_masks(model):
    """Draw every score of every adapter anew, so that no two masks are alike."""
    torch.manual_seed(1)
    for layer in model.modules():
        if isinstance(layer, MaskLayer):
            for scores in layer.peft_mask_scores.values():
                nn.init.normal_(scores)
    return model.eval()


def two_adapters(family, head, task_type, **fields):
    config = MaskConfig(task_type=task_type, **({"target_sparsity": 0.2, "candidates": None} | fields))
    model = get_peft_model(tiny_model(family, head), config, adapter_name="one")
    model.add_adapter("two", config)
    return random_masks(model)


def batch(model, rows=5):
    torch.manual_seed(2)
    inputs = tiny_inputs(model.base_model.model)
    inputs["input_ids"] = torch.randint(3, 60, (rows, 7))
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


@pytest.mark.parametrize("bits", [False, True])
@pytest.mark.parametrize(("family", "head", "task_type"), [("bert", "seq_cls", "SEQ_CLS"), ("gpt2", "lm", "CAUSAL_LM")])
def test_each_row_is_as_if_its_adapter_were_alone(tmp_path, family, head, task_type, bits):
    model = two_adapters(family, head, task_type)
    if bits:
        model.save_pretrained(tmp_path)
        model = PeftModel.from_pretrained(tiny_model(family, head), tmp_path / "one", adapter_name="one")
        model.load_adapter(tmp_path / "two", "two")
        model.eval()
    inputs = batch(model)
    expected = {name: alone(model, name, lambda: model(**inputs).logits) for name in set(NAMES)}
    assert not torch.allclose(expected["one"], expected["two"])
    mixed = model(**inputs, adapter_names=NAMES).logits
    for row, name in enumerate(NAMES):
        torch.testing.assert_close(mixed[row], expected[name][row])


def test_rows_have_their_own_task_heads():
    model = two_adapters("bert", "seq_cls", "SEQ_CLS")
    for name in ("one", "two"):
        nn.init.normal_(model.base_model.model.classifier.modules_to_save[name].weight)
    inputs = batch(model)
    expected = {name: alone(model, name, lambda: model(**inputs).logits) for name in ("one", "two")}
    mixed = model(**inputs, adapter_names=["one", "two", "two", "one", "one"]).logits
    for row, name in enumerate(["one", "two", "two", "one", "one"]):
        torch.testing.assert_close(mixed[row], expected[name][row])


@pytest.mark.parametrize("family", ["roberta", "mpnet", "modernbert", "electra", "bart"])
def test_rows_have_their_own_task_heads_of_several_layers(family):
    model = two_adapters(family, "seq_cls", "SEQ_CLS")
    for head in [own for own in model.modules() if isinstance(own, ModulesToSaveWrapper)]:
        for parameter in head.modules_to_save.parameters():
            nn.init.normal_(parameter)
    inputs = batch(model)
    if family == "bart":  # which asks for them at the end of each text
        inputs["input_ids"][:, -1] = EOS
    with model.disable_adapter():
        bare = model(**inputs).logits
    expected = {name: alone(model, name, lambda: model(**inputs).logits) for name in ("one", "two")} | {
        "__base__": bare
    }
    assert not torch.allclose(expected["one"], expected["two"], atol=0.1)
    for active in ("one", "two"):
        model.set_adapter(active)
        mixed = model(**inputs, adapter_names=NAMES).logits
        for row, name in enumerate(NAMES):
            torch.testing.assert_close(mixed[row], expected[name][row], atol=1e-4, rtol=1e-4)
    model.set_adapter("two")
    torch.testing.assert_close(model(**inputs).logits, expected["two"])  # no hook is left


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(8, 3)

    def forward(self, x, gate):
        return self.dense(x) * gate


class WithGatedHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(6, 8), Gated()

    def forward(self, x):
        return self.head(self.body(x), x[:, :1])


def test_a_trained_module_that_gets_several_tensors_is_not_mixed():
    config = MaskConfig(target_modules=["body"], modules_to_save=["head"], candidates=None)
    model = get_peft_model(WithGatedHead(), config, "one").eval()
    with pytest.raises(TypeError, match=r"cannot mix adapters in a Gated .* Call the model with one adapter at a time"):
        model(torch.randn(2, 6), adapter_names=["one", "one"])


def test_a_layer_that_an_adapter_does_not_mask_is_the_bare_one_for_it():
    model = get_peft_model(
        nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3)), MaskConfig(target_modules=["0"], candidates=None), "one"
    )
    model.add_adapter("two", MaskConfig(target_modules=["1"], candidates=None))
    random_masks(model)
    x = torch.randn(2, 6)
    expected = {name: alone(model, name, lambda: model(x)) for name in ("one", "two")}
    mixed = model(x, adapter_names=["two", "one"])
    torch.testing.assert_close(mixed, torch.stack([expected["two"][0], expected["one"][1]]))


@pytest.mark.parametrize(("family", "head", "task_type"), [("gpt2", "lm", "CAUSAL_LM"), ("t5", "lm", "SEQ_2_SEQ_LM")])
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_generation(family, head, task_type, how):
    model = two_adapters(family, head, task_type)
    inputs = batch(model)

    def generate(**kwargs):
        torch.manual_seed(3)
        return model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False, **how, **kwargs)

    expected = {name: alone(model, name, generate) for name in set(NAMES)}
    mixed = generate(adapter_names=NAMES)
    each = how.get("num_return_sequences", 1)
    for row, name in enumerate(name for name in NAMES for _ in range(each)):
        assert torch.equal(mixed[row], expected[name][row])


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(("family", "head", "task_type"), [("llama", "lm", "CAUSAL_LM"), ("t5", "lm", "SEQ_2_SEQ_LM")])
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}])
def test_generation_with_loaded_masks(family, head, task_type, how, exact):
    model = served(tiny_model(family, head), task_type=task_type)
    model.base_model.set_exact(exact)
    inputs = batch(model)

    def generate(**kwargs):
        found = model.generate(
            **inputs,
            max_new_tokens=6,
            min_new_tokens=6,
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
            **how,
            **kwargs,
        )
        return found.sequences, found.sequences_scores if how else torch.stack(found.scores, 1)

    expected = {name: alone(model, name, generate) for name in set(NAMES)}
    assert not torch.allclose(expected["one"][1], expected["two"][1], atol=1e-3)
    sequences, scores = generate(adapter_names=NAMES)
    for row, name in enumerate(NAMES):
        assert torch.equal(sequences[row], expected[name][0][row])
        torch.testing.assert_close(scores[row], expected[name][1][row])


def test_rows_are_told_to_the_layers_of_their_model_alone():
    teacher, student = (served(tiny_model("bert", "base")) for _ in range(2))
    student.set_adapter("two")
    inputs = batch(teacher, 2)
    with torch.no_grad():
        expected = student(**inputs).last_hidden_state
        seen = []
        teacher.base_model.model.encoder.register_forward_hook(
            lambda *_: seen.append(student(**inputs).last_hidden_state)
        )
        teacher(**inputs, adapter_names=["one", "__base__"])
    assert torch.equal(seen[0], expected)


@pytest.mark.parametrize("place", ["argument", "model"])
@pytest.mark.parametrize(("family", "head", "task_type"), [("gpt2", "lm", "CAUSAL_LM"), ("t5", "lm", "SEQ_2_SEQ_LM")])
def test_generation_with_beams_that_a_configuration_asks_for(family, head, task_type, place):
    model = two_adapters(family, head, task_type)
    inputs = batch(model)
    how = {"num_beams": 3, "num_return_sequences": 2}
    length = {"max_new_tokens": 4, "min_new_tokens": 4}
    expected = {name: alone(model, name, lambda: model.generate(**inputs, **length, **how)) for name in set(NAMES)}
    model.set_adapter("one")
    own = model.get_base_model().generation_config
    changed = copy.deepcopy(own) if place == "argument" else own
    changed.update(**how)
    arguments = {"generation_config": changed} if place == "argument" else {}
    mixed = model.generate(**inputs, **length, **arguments, adapter_names=NAMES)
    for row, name in enumerate(name for name in NAMES for _ in range(2)):
        assert torch.equal(mixed[row], expected[name][row])
    single = model.generate(
        **inputs, **length, **arguments, adapter_names=NAMES, num_beams=1, num_return_sequences=1, do_sample=False
    )
    assert len(single) == len(NAMES)


def test_what_cannot_be_mixed_is_refused_and_leaves_no_hook():
    model = two_adapters("bert", "seq_cls", "SEQ_CLS")
    inputs = batch(model)
    plain = model(**inputs).logits
    with pytest.raises(ValueError, match=r"same as the number of inputs, but got 2 and 5 respectively"):
        model(**inputs, adapter_names=["one", "two"])
    with pytest.raises(ValueError, match=r"non-existing adapter\(s\): c\. Loaded are \['one', 'two'\]"):
        model(**inputs, adapter_names=["one", "two", "c", "one", "one"])
    with pytest.raises(TypeError, match="must be a list with a name for each row, got 'one'"):
        model(**inputs, adapter_names="one")
    with pytest.raises(ValueError, match="when the model is in training mode"):
        model.train()(**inputs, adapter_names=NAMES)
    model.eval()
    assert torch.equal(model(**inputs).logits, plain)
    model.merge_adapter()
    with pytest.raises(ValueError, match="when there are merged adapters, please call `unmerge_adapter` first"):
        model(**inputs, adapter_names=NAMES)


def test_disabled_adapters_are_disabled_for_every_row():
    model = two_adapters("bert", "seq_cls", "SEQ_CLS")
    inputs = batch(model)
    with model.disable_adapter():
        assert torch.equal(model(**inputs, adapter_names=NAMES).logits, model(**inputs).logits)


def test_rows_of_no_adapter_are_refused_where_one_is_merged_into_attention():
    base = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = get_peft_model(base, MaskConfig(target_modules=["self_attn"]), adapter_name="attention")
    model.add_adapter("linear", MaskConfig(target_modules=["linear1"]))
    model.eval().merge_adapter(["attention"])
    with pytest.raises(ValueError, match="when there are merged adapters"), torch.no_grad():
        model(torch.randn(2, 3, 8), adapter_names=["linear", "__base__"])
