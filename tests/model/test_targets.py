"""Which modules are masked: all that restricts them is heeded, in every combination, or refused."""

import copy
import itertools
import re
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from peft_mask import MaskConfig
from peft_mask.layers.mask_layer import MaskLayer
from peft_mask.layers.stand_in import ParamWrapper
from tests.tiny_models import tiny_model

TINY = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "pad_token_id": 0}
EXPERTS = {"num_key_value_heads": 2, "intermediate_size": 60, "num_local_experts": 2, "num_experts_per_tok": 1}


def mixture(automatic=AutoModel):
    torch.manual_seed(0)
    return automatic.from_config(AutoConfig.for_model("mixtral", **TINY, **EXPERTS))


def masked(model):
    return sorted(name for name, module in model.named_modules() if isinstance(module, MaskLayer))


def blocks_of(model):
    """The blocks that masks stand in, by the word before them; None for a mask in no block."""
    found = set()
    for name in masked(model):
        parts = name.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        found.add(None if at is None else int(parts[at]))
    return found


# ---- layers_to_transform ----

TARGETS = {
    "default": None,
    "all-linear": "all-linear",
    "ALL-LINEAR": "ALL-LINEAR",
    "pattern": r".*\.(query|q_proj|c_attn|output\.dense|down_proj|c_proj)",
    "names": ["query", "output.dense"],
}


@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("blocks", [1, [1], [0, 1], range(1)])
def test_layers_to_transform_holds_for_every_way_to_name_targets(targets, blocks):
    wanted = {blocks} if isinstance(blocks, int) else set(blocks)
    families = ("bert",) if isinstance(targets, list) else ("bert", "llama", "gpt2")
    for family, head in itertools.product(families, ("base", "seq_cls")):
        model = get_peft_model(
            tiny_model(family, head),
            MaskConfig(target_modules=targets, layers_to_transform=blocks, modules_to_save=[]),
        )
        assert blocks_of(model) == wanted, (family, head)


def test_full_names_are_restricted_as_well():
    names = [f"encoder.layer.{i}.attention.self.query" for i in (0, 1)]
    config = MaskConfig(target_modules=names, layers_to_transform=[1])
    assert masked(get_peft_model(tiny_model("bert", "base"), config)) == [f"base_model.model.{names[1]}"]


@pytest.mark.parametrize("automatic", [AutoModel, AutoModelForCausalLM])
def test_parameters_are_restricted_to_blocks(automatic):
    config = MaskConfig(target_parameters=["experts.down_proj"], target_modules=[], layers_to_transform=[1])
    model = get_peft_model(mixture(automatic), config)
    assert blocks_of(model) == {1}
    assert len(masked(model)) == 1


@pytest.mark.parametrize("targets", [["w"], "all-linear", r".*\.w"])
def test_the_block_of_an_expert_is_not_its_own_number(targets):
    def experts():
        return nn.ModuleDict({"experts": nn.ModuleList(nn.ModuleDict({"w": nn.Linear(4, 4)}) for _ in range(3))})

    bare = nn.ModuleDict({"layers": nn.ModuleList([experts(), experts()])})
    for model in (copy.deepcopy(bare), nn.ModuleDict({"model": bare})):
        names = masked(get_peft_model(model, MaskConfig(target_modules=targets, layers_to_transform=[1])))
        assert len(names) == 3
        assert all("layers.1.experts" in name for name in names)


@pytest.mark.parametrize(("pattern", "expected"), [("inner", {"outer.0.inner.1.q", "outer.1.inner.1.q"}), (None, None)])
def test_layers_pattern_says_which_blocks_are_meant(pattern, expected):
    def inner():
        return nn.ModuleDict({"q": nn.Linear(4, 4)})

    base = nn.ModuleDict(
        {"outer": nn.ModuleList(nn.ModuleDict({"inner": nn.ModuleList(inner() for _ in range(2))}) for _ in range(2))}
    )
    for targets in (["q"], "all-linear", r".*\.q"):
        config = MaskConfig(target_modules=targets, layers_to_transform=[1], layers_pattern=pattern)
        names = {name.removeprefix("base_model.model.") for name in masked(get_peft_model(copy.deepcopy(base), config))}
        assert names == (expected or {"outer.1.inner.0.q", "outer.1.inner.1.q"})


@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
def test_a_block_that_is_not_there_is_named(targets):
    for blocks in (2, [1, 2], range(2, 4)):
        with pytest.raises(
            ValueError, match=r"layers_to_transform names \[2.*stand in blocks 0 to 1 of \['encoder.layer"
        ):
            get_peft_model(tiny_model("bert", "base"), MaskConfig(target_modules=targets, layers_to_transform=blocks))


def test_blocks_where_there_are_none_are_refused():
    layers = nn.ModuleList([nn.ModuleDict({"q": nn.Linear(4, 4)}), nn.ModuleDict({"k": nn.Linear(4, 4)})])
    with pytest.raises(ValueError, match=r"none of the modules to mask stands in the blocks of .*=\[1\]"):
        get_peft_model(nn.ModuleDict({"layers": layers}), MaskConfig(target_modules=["q"], layers_to_transform=[1]))
    with pytest.raises(ValueError, match="the modules to mask stand in no numbered blocks"):
        get_peft_model(nn.Sequential(nn.Linear(4, 4)), MaskConfig(target_modules="all-linear", layers_to_transform=[0]))
    config = MaskConfig(target_modules=["query"], layers_to_transform=[0], layers_pattern="lyer")
    with pytest.raises(ValueError, match="with layers_pattern='lyer', and the modules to mask stand in no numbered"):
        get_peft_model(tiny_model("bert", "base"), config)


@pytest.mark.parametrize("targets", [None, ["q_proj"], r".*\.q_proj"])
def test_what_was_masked_is_what_is_loaded(targets, tmp_path):
    config = MaskConfig(
        target_modules=targets, layers_to_transform=[1], init_weights=False, target_sparsity=0.1, seed=0
    )
    model = get_peft_model(tiny_model("llama", "base"), config)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("llama", "base"), tmp_path)
    assert masked(loaded) == masked(model)
    assert all(
        torch.equal(loaded.get_submodule(n).mask("default"), model.get_submodule(n).mask("default"))
        for n in masked(model)
    )


# ---- exclude_modules, modules_to_save, names ----


def test_excluded_parameters_are_left_out():
    config = MaskConfig(
        target_modules=["q_proj"], target_parameters=["experts.down_proj"], exclude_modules=r"layers\.0\..*"
    )
    model = get_peft_model(mixture(), config)
    wrappers = [name for name, module in model.named_modules() if isinstance(module, ParamWrapper)]
    assert wrappers == ["base_model.model.layers.1.mlp.experts"]
    assert blocks_of(model) == {1}


def test_parameters_that_only_differ_in_front_cannot_be_told_apart():
    def experts():
        return nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"experts": nn.ParameterDict()})])})

    base = nn.ModuleDict({"layers": experts()["layers"], "vision": experts()})
    for tower in (base, base["vision"]):
        tower["layers"][0]["experts"]["w"] = nn.Parameter(torch.randn(2, 4, 4))
    config = MaskConfig(target_parameters=["experts.w"], exclude_modules=["vision.layers.0.experts"])
    with pytest.raises(ValueError, match=r"the parameters of \['vision.layers.0.experts'\] are to be left out"):
        get_peft_model(base, config)


def test_adapters_name_the_same_parameters_also_where_they_are_restricted():
    fields = {"target_parameters": ["experts.down_proj"], "target_modules": []}
    model = get_peft_model(mixture(), MaskConfig(**fields, layers_to_transform=[1]))
    model.add_adapter("b", MaskConfig(**fields, layers_to_transform=[1]))
    with pytest.raises(ValueError, match="adapters of one model must name the same target_parameters"):
        model.add_adapter("c", MaskConfig(**fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": ["query", "qeury"]}, r"BertModel has nothing called target_modules=\['qeury'\]"),
        ({"exclude_modules": ["key", "kye"]}, r"nothing called exclude_modules=\['kye'\]"),
        ({"target_parameters": ["expert"]}, r"nothing called target_parameters=\['expert'\]"),
        ({"modules_to_save": ["classifer"]}, r"nothing called modules_to_save=\['classifer'\]"),
    ],
)
def test_a_name_in_vain_is_said(fields, message):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        get_peft_model(tiny_model("bert", "base"), MaskConfig(**fields))
    ours = [str(one.message) for one in said if "has nothing called" in str(one.message)]
    assert len(ours) == 1
    assert re.search(message, ours[0])


def test_a_target_that_is_trained_whole_is_said():
    with pytest.warns(UserWarning, match=r"\['classifier'\] of target_modules are not masked, since modules_to_save"):
        get_peft_model(tiny_model("bert"), MaskConfig(task_type="SEQ_CLS", target_modules=["query", "classifier"]))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"target_modules": ["nothing"]},
            r"Target modules {'nothing'} not found .* BertForSequenceClassification. Names",
        ),
        ({"target_modules": "que.*"}, r"Target modules {'que\.\*'} not found in the base model"),
        ({"target_parameters": ["x"], "target_modules": []}, r"Parameters \['x'\] not found in the base model"),
        (
            {"target_modules": ["query"], "exclude_modules": ["query"], "layers_to_transform": [0]},
            r"nothing is left to mask .*: exclude_modules={'query'} leaves out bert.encoder.layer.0.attention",
        ),
        ({"exclude_modules": ".*"}, "nothing is left to mask .*exclude_modules='.*' leaves out .* and [0-9]+ more"),
        (
            {"target_modules": ["classifier"], "task_type": "SEQ_CLS"},
            r"nothing is left to mask .*: modules_to_save=\['classifier'.*trains classifier whole",
        ),
    ],
)
def test_nothing_to_mask_says_why(fields, message):
    model = tiny_model("bert")
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, MaskConfig(**fields))
    assert not masked(model)


def test_a_model_without_linear_layers_says_so():
    with pytest.raises(ValueError, match="Sequential has no linear layer"):
        get_peft_model(nn.Sequential(nn.Conv1d(2, 2, 1)), MaskConfig(target_modules="all-linear"))
    base = AutoModel.from_config(
        AutoConfig.for_model("resnet", embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], num_channels=1)
    )
    with pytest.raises(ValueError, match=r"ResNetModel has no linear layer.*name other modules in target_modules"):
        get_peft_model(base, MaskConfig())


# ---- what cannot be masked ----


@pytest.mark.parametrize("targets", [None, "all-linear"])
@pytest.mark.parametrize(
    ("family", "more", "left_out"),
    [
        ("falcon", {}, None),
        ("llama4_text", {**EXPERTS, "intermediate_size_mlp": 60}, "router, since Llama4Router computes"),
        ("phimoe", EXPERTS, "router, since PhimoeTopKRouter computes"),
    ],
)
def test_the_default_masks_what_it_can_and_says_what_not(family, more, left_out, targets):
    base = AutoModel.from_config(AutoConfig.for_model(family, **{**TINY, **more}))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = get_peft_model(base, MaskConfig(target_modules=targets))
    messages = [str(one.message) for one in said if "not masked" in str(one.message)]
    assert len(messages) == (left_out is not None)
    assert all(left_out in message for message in messages)
    assert masked(model)
    if left_out is None:
        lora = get_peft_model(tiny_falcon(), LoraConfig(target_modules="all-linear"))
        assert masked(model) == sorted(
            name.removesuffix(".lora_A") for name, _ in lora.named_modules() if name.endswith(".lora_A")
        )


def tiny_falcon():
    return AutoModel.from_config(AutoConfig.for_model("falcon", **TINY))


def test_excluding_what_cannot_be_masked_silences_the_line():
    base = AutoModel.from_config(AutoConfig.for_model("phimoe", **TINY, **EXPERTS))
    model = get_peft_model(base, MaskConfig(exclude_modules=["router"]))  # warnings are errors
    assert masked(model)


def test_what_cannot_be_masked_and_is_named_is_an_error():
    base = AutoModel.from_config(AutoConfig.for_model("phimoe", **TINY, **EXPERTS))
    with pytest.raises(
        ValueError, match=r"router' of type PhimoeTopKRouter is not supported: PhimoeTopKRouter computes"
    ):
        get_peft_model(base, MaskConfig(target_modules=["q_proj", "router"]))


@pytest.mark.parametrize("named", ["all-linear", ["layers.0.0", "layers.1.0"], r"layers\.\d\.0"])
def test_what_activation_checkpointing_has_wrapped_is_found_by_its_plain_name(named):
    blocks = nn.ModuleList([checkpoint_wrapper(nn.Sequential(nn.Linear(4, 4))) for _ in range(2)])
    model = get_peft_model(nn.ModuleDict({"layers": blocks}), MaskConfig(target_modules=named))
    assert len([module for module in model.modules() if isinstance(module, MaskLayer)]) == 2


def test_a_bias_that_two_layers_share_is_refused():
    base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    base[1].bias = base[0].bias
    get_peft_model(copy.deepcopy(base), MaskConfig(target_modules=["0"]))
    with pytest.raises(ValueError, match="cannot mask '0': its weight is tied to '1'"):
        get_peft_model(base, MaskConfig(target_modules=["0"], mask_biases=True))


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(2, 4, 4))


@pytest.mark.parametrize("order", [["one", "two"], ["two", "one"]])
def test_an_adapter_made_of_others_masks_the_parameters_of_any(order):
    base = nn.ModuleDict({"l": nn.Linear(4, 4), "e": Experts()})
    model = get_peft_model(base, MaskConfig(target_modules=["l"]), adapter_name="one")
    model.add_adapter("two", MaskConfig(target_modules=["l"], target_parameters=["e.w"]))
    model.base_model.add_weighted_adapter(order, [1.0, 1.0], "both")
    assert len([m for m in model.modules() if isinstance(m, MaskLayer) and "both" in m.available_adapters]) == 2


def test_an_unloaded_model_holds_nothing_of_ours():
    base = nn.Sequential(nn.Linear(4, 4))
    before = set(vars(base))
    assert set(vars(get_peft_model(base, MaskConfig(target_modules=["0"])).merge_and_unload())) == before
