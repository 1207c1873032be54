"""A masked model of every family: what is masked, that base weights come back exactly, and what is refused."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_mask import MaskConfig, create_mask_optimizer
from peft_mask.layers.mask_layer import MaskLayer
from peft_mask.model.targets import head_modules
from peft_mask.tensors import stored
from tests.tiny_models import FAMILIES, tiny_heads, tiny_inputs, tiny_model

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def random_masks(**fields):
    return MaskConfig(binarizer="threshold", candidates=None, init_weights=False, init_sparsity=0.3, **fields)


def masked_mlp(dtype=torch.float32, **fields):
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 5)).to(dtype)
    return get_peft_model(mlp, random_masks(target_modules=["0", "2"], **fields)).eval()


def base_weights(model):
    """The weights and buffers of the base model under their names in it, copied."""
    return {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): value.clone()
        for name, value in model.state_dict().items()
        if "peft_mask_" not in name and "modules_to_save" not in name
    }


def assert_same_bits(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.dtype == second[name].dtype
        assert torch.equal(value.view(torch.uint8), second[name].view(torch.uint8)), name


def logits(model, inputs):
    with torch.no_grad():
        output = model(**inputs)
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


def head_and_config(family):
    """The head to train `family` with, and the configuration a user would write."""
    if family in ("vit", "clip"):  # PEFT has no task type for images
        return "seq_cls", {"modules_to_save": ["classifier"]}
    if "seq_cls" in tiny_heads(family):
        return "seq_cls", {"task_type": "SEQ_CLS"}
    return "lm", {}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_saves_loads_merges_and_unmerges(family, tmp_path):
    head, fields = head_and_config(family)
    base = tiny_model(family, head)
    inputs = tiny_inputs(base)
    before, plain = base_weights(base), logits(base, inputs)

    model = get_peft_model(base, MaskConfig(**fields)).eval()
    assert torch.equal(logits(model, inputs), plain), "all weights are kept at the start"
    model.train()
    optimizer = create_mask_optimizer(model, mask_lr=0.008)
    for _ in range(3):
        model(**tiny_inputs(model, labels=True)).loss.backward()
        for name, parameter in model.named_parameters():
            if "peft_mask_scores" in name and "pooler" not in name:
                assert parameter.grad is not None, name
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    trained = logits(model, inputs)
    assert not torch.equal(trained, plain)
    model.save_pretrained(tmp_path)

    loaded = PeftModel.from_pretrained(tiny_model(family, head), tmp_path).eval()
    assert torch.equal(logits(loaded, inputs), trained)
    assert not [name for name, _ in loaded.named_parameters() if "peft_mask_scores" in name]
    loaded.merge_adapter()
    assert torch.equal(logits(loaded, inputs), trained)
    loaded.unmerge_adapter()
    after = {name.replace(".original_module", ""): value for name, value in base_weights(loaded).items()}
    assert_same_bits(before, after)
    merged = loaded.merge_and_unload()
    assert torch.equal(logits(merged, inputs), trained)
    assert not [module for module in merged.modules() if isinstance(module, MaskLayer)]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_default_masks_the_linear_layers_of_the_backbone(family):
    head, fields = head_and_config(family)
    base = tiny_model(family, head)
    heads = tuple(f"{name}." for name in (*head_modules(base), "classifier"))
    out = base.get_output_embeddings()
    expected = {
        name
        for name, module in base.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and not f"{name}.".startswith(heads) and module is not out
    }
    model = get_peft_model(base, MaskConfig(**fields))
    masked = {name for name, module in model.base_model.model.named_modules() if isinstance(module, MaskLayer)}
    assert masked == expected
    assert len(masked) >= 2 * 4


def test_the_whole_task_head_is_trained_and_saved():
    for family, names in {
        "bert": {"classifier"},
        "distilbert": {"pre_classifier", "classifier"},
        "deberta-v2": {"pooler", "classifier"},
        "modernbert": {"head", "classifier"},
        "bart": {"classification_head"},
        "llama": {"score"},
    }.items():
        assert set(head_modules(tiny_model(family))) == names, family
        model = get_peft_model(tiny_model(family), MaskConfig(task_type="SEQ_CLS"))
        assert names <= set(model.peft_config["default"].modules_to_save)
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        for name in names:
            assert any(f".{name}.modules_to_save.default" in parameter for parameter in trained), (family, name)
    assert head_modules(tiny_model("bert", "base")) == []
    assert head_modules(nn.Linear(2, 2)) == []


@pytest.mark.parametrize("target_modules", [None, ["query", "dense"]])
def test_layers_to_transform_masks_these_blocks_only(target_modules):
    config = MaskConfig(layers_to_transform=[1], target_modules=target_modules)
    model = get_peft_model(tiny_model("bert", "base"), config)
    masked = [name for name, module in model.named_modules() if isinstance(module, MaskLayer)]
    assert masked
    assert all(".layer.1." in name for name in masked)


def test_all_linear_and_exclude_modules_work_as_in_lora():
    config = MaskConfig(target_modules="all-linear", exclude_modules=["query"])
    model = get_peft_model(tiny_model("bert", "base"), config)
    masked = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, MaskLayer)}
    assert masked == {"key", "value", "dense"}


@pytest.mark.parametrize("dtype", DTYPES)
def test_unmerge_restores_weights_exactly(dtype):
    model = masked_mlp(dtype)
    with torch.no_grad():  # values that arithmetic would not bring back
        weight = model.base_model.model[0].get_base_layer().weight
        weight[0, :5] = torch.tensor([float("inf"), float("-inf"), float("nan"), -0.0, 6e-8], dtype=dtype)
    before = base_weights(model)
    model.merge_adapter()
    mask = model.base_model.model[0].mask("default")
    merged = base_weights(model)["0.weight"]
    assert merged[~mask].view(torch.uint8).count_nonzero() == 0, "off is +0.0"
    assert not torch.equal(merged.view(torch.uint8), before["0.weight"].view(torch.uint8))
    model.unmerge_adapter()
    assert_same_bits(before, base_weights(model))


@pytest.mark.parametrize("dtype", DTYPES)
def test_ten_random_switches_leave_the_base_as_it_was(dtype):
    model = masked_mlp(dtype)
    for name in ("b", "c"):
        model.add_adapter(name, random_masks(target_modules=["0", "2"]))
    model.eval()
    before = base_weights(model)
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    x = torch.randn(4, 12).to(dtype)
    expected = {None: model.base_model.model[2].base_layer(model.base_model.model[0].base_layer(x).relu())}
    for name in ("default", "b", "c"):
        model.set_adapter(name)
        expected[name] = model(x)
    generator = torch.Generator().manual_seed(0)
    for choice in torch.randint(4, (10,), generator=generator).tolist():
        name = (None, "default", "b", "c")[choice]
        model.base_model.switch_adapter(name)
        assert torch.equal(model(x), expected[name])
    model.unmerge_adapter()
    assert_same_bits(before, base_weights(model))
    assert addresses == [parameter.data_ptr() for parameter in model.parameters()]


def test_new_bits_are_merged_not_the_positions_of_the_old_ones(tmp_path):
    paths = []
    for seed in (1, 2):
        torch.manual_seed(0)
        mlp = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 5))
        model = get_peft_model(mlp, random_masks(target_modules=["0", "2"], seed=seed))
        paths.append(tmp_path / str(seed))
        model.save_pretrained(paths[-1])
    x = torch.randn(3, 12)
    torch.manual_seed(0)
    model = PeftModel.from_pretrained(nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 5)), paths[0])
    model.merge_adapter()
    model.unmerge_adapter()
    model.load_adapter(paths[1], "default")  # into the same buffers
    masked = model(x)
    model.merge_adapter()
    assert torch.equal(model(x), masked)


def test_switching_to_an_unknown_adapter_changes_nothing():
    model = masked_mlp()
    model.merge_adapter()
    before = base_weights(model)
    with pytest.raises(ValueError, match=r"no adapter named 'x'; loaded are \['default'\]"):
        model.base_model.switch_adapter("x")
    assert_same_bits(before, base_weights(model))


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_in_the_middle_of_a_merge_leaves_the_base_as_it_was(merge, error, monkeypatch):
    model = masked_mlp()
    before = base_weights(model)
    x = torch.randn(3, 12)
    output = model(x)
    put = stored.put
    calls = []

    def failing_put(*args):
        calls.append(args)
        if len(calls) == 2:  # the second layer, its stash already taken
            raise error("pulled the plug")
        put(*args)

    monkeypatch.setattr(stored, "put", failing_put)
    with pytest.raises(error, match=r"pulled the plug"):
        getattr(model, merge)()
    assert len(calls) > 2, "the first layer had been merged"
    assert_same_bits(before, base_weights(model))
    assert torch.equal(model(x), output)


def test_merging_several_adapters_is_their_product_in_any_order():
    x = torch.randn(3, 12)
    model = masked_mlp()
    model.add_adapter("b", random_masks(target_modules=["0", "2"]))
    model.eval()
    before = base_weights(model)
    outputs = []
    for names in (["default", "b"], ["b", "default"]):
        model.base_model.set_adapter(names)
        outputs.append(model(x))
        model.merge_adapter()
        outputs.append(model(x))
        model.unmerge_adapter()
        model.merge_adapter(adapter_names=names[:1])
        with pytest.warns(UserWarning, match=r"Already following adapters were merged"):
            model.merge_adapter(adapter_names=names[1:])
        outputs.append(model(x))
        model.unmerge_adapter()
        assert_same_bits(before, base_weights(model))
    product = model.base_model.model[0].mask("default") & model.base_model.model[0].mask("b")
    merged = torch.where(product, before["0.weight"], 0)
    assert not torch.equal(merged, before["0.weight"])
    assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_merging_twice_warns_and_does_nothing():
    model = masked_mlp()
    model.merge_adapter()
    merged = base_weights(model)
    with pytest.warns(UserWarning, match=r"All adapters are already merged, nothing to do"):
        model.merge_adapter()
    assert_same_bits(merged, base_weights(model))


def test_merge_and_unload_after_merging_and_unload_after_merging():
    x = torch.randn(3, 12)
    for unload in ("merge_and_unload", "unload"):
        model = masked_mlp()
        masked, before = model(x), base_weights(model)
        model.merge_adapter()
        plain = getattr(model, unload)()
        if unload == "unload":
            assert_same_bits(before, base_weights(plain))
        else:
            assert torch.equal(plain(x), masked)


def test_disabled_adapters_are_the_base_model_also_when_merged():
    model = masked_mlp()
    base = model.base_model.model
    x = torch.randn(3, 12)
    masked = model(x)
    plain = base[2].base_layer(base[0].base_layer(x).relu())
    with model.disable_adapter():
        assert torch.equal(model(x), plain)
    model.merge_adapter()
    assert torch.equal(model(x), masked)
    with model.disable_adapter():
        assert torch.equal(model(x), plain)
    assert torch.equal(model(x), masked)


@pytest.mark.parametrize("safe_merge", [False, True])
def test_nan_scores_cannot_be_merged(safe_merge):
    model = masked_mlp()
    before = base_weights(model)
    with torch.no_grad():
        model.base_model.model[2].peft_mask_scores["default"][0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"NaNs detected in the merged weights. The adapter default seems to"):
        model.merge_adapter(safe_merge=safe_merge)
    assert_same_bits(before, base_weights(model))


def test_safe_merge_refuses_a_broken_base():
    model = masked_mlp()
    with torch.no_grad():
        model.base_model.model[2].base_layer.weight.fill_(float("inf"))
    before = base_weights(model)
    with pytest.raises(ValueError, match=r"a weight that is kept is not finite"):
        model.merge_adapter(safe_merge=True)
    assert_same_bits(before, base_weights(model))


def test_only_scores_and_the_head_are_trained():
    model = get_peft_model(tiny_model("bert"), MaskConfig(task_type="SEQ_CLS"))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(".peft_mask_scores." in name or ".classifier.modules_to_save." in name for name in trained)


def test_kept_weights_can_be_trained_under_a_fixed_mask(tmp_path):
    masked_mlp().save_pretrained(tmp_path)
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 5))
    model = PeftModel.from_pretrained(mlp, tmp_path)
    layer = model.base_model.model[0]
    layer.base_layer.weight.requires_grad_()
    model(torch.randn(3, 12)).sum().backward()
    mask = layer.mask("default")
    assert (layer.base_layer.weight.grad[~mask] == 0).all()
    assert (layer.base_layer.weight.grad[mask] != 0).any()


def test_an_inference_adapter_holds_an_eighth_of_a_byte_a_weight(tmp_path):
    masked_mlp().save_pretrained(tmp_path)
    torch.manual_seed(0)
    model = PeftModel.from_pretrained(nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 5)), tmp_path)
    layer = model.base_model.model[0]
    assert layer.peft_mask_bits["default"].shape == (20, 2)
    assert layer.peft_mask_bits["default"].dtype == torch.uint8
    assert list(layer.peft_mask_scores) == []


# ---- bad input ----


def test_no_matching_module_is_peft_s_own_error():
    with pytest.raises(ValueError, match=r"Target modules {'nothing'} not found in the base model"):
        get_peft_model(nn.Sequential(nn.Linear(2, 2)), MaskConfig(target_modules=["nothing"]))


def test_a_model_without_a_known_backbone_needs_target_modules():
    with pytest.raises(ValueError, match=r"Please specify `target_modules` in `peft_config`: Sequential is not"):
        get_peft_model(nn.Sequential(nn.Linear(2, 2)), MaskConfig())


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.LayerNorm(4), r"'1' of type LayerNorm is not supported: supported are Linear, Conv1D, Conv1d"),
        (nn.Bilinear(2, 2, 2), "'1' of type Bilinear is not supported: supported are Linear"),
        (nn.MultiheadAttention(4, 2).out_proj, "nn.MultiheadAttention reads the weight of its out_proj directly"),
        (type("Odd", (nn.Linear,), {"forward": lambda self, x: x})(2, 2), "Odd computes its output in its own way"),
    ],
)
def test_an_unsupported_layer_is_refused_before_anything_changes(module, reason):
    model = nn.Sequential(nn.Linear(4, 4), module)
    with pytest.raises(ValueError, match=reason):
        get_peft_model(model, MaskConfig(target_modules=["0", "1"]))
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("ensure_weight_tying", [False, True])
def test_tied_weights_are_refused(ensure_weight_tying):
    model = tiny_model("gpt2", "lm")
    assert model.lm_head.weight is model.transformer.wte.weight
    with (
        pytest.warns(UserWarning, match=r"a tied layer is part of the adapter"),  # PEFT's own word on it
        pytest.raises(ValueError, match=r"cannot mask 'lm_head': its weight is tied to .*'transformer.wte'"),
    ):
        get_peft_model(model, MaskConfig(target_modules=["lm_head", "c_attn"], ensure_weight_tying=ensure_weight_tying))


@pytest.mark.parametrize("share", [lambda weight: weight, lambda weight: weight.t(), lambda weight: weight[:2]])
def test_weights_that_share_memory_are_refused_as_tied_ones_are(share):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = nn.Parameter(share(model[0].weight.data))
    with pytest.raises(ValueError, match=r"cannot mask '0': its weight is tied to '1'"):
        get_peft_model(model, MaskConfig(target_modules=["0"]))


def test_parts_of_one_tensor_are_not_tied():
    fused = torch.randn(8, 4)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    for layer, part in zip(model, fused.chunk(2), strict=True):
        layer.weight = nn.Parameter(part)
    model = get_peft_model(model, MaskConfig(target_modules=["0", "1"], init_weights=False)).eval()
    x = torch.randn(3, 4)
    expected = model(x)
    model.merge_adapter()
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("assign", [False, True])
def test_a_whole_state_dict_fills_a_mask_for_use(tmp_path, assign):
    def base():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4))

    get_peft_model(base(), MaskConfig(target_modules=["0"], init_weights=False)).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path)
    fresh = get_peft_model(base(), MaskConfig(target_modules=["0"], inference_mode=True))
    x = torch.randn(3, 6)
    with pytest.raises(ValueError, match="the adapter 'default' has no mask for '0'"):
        fresh(x)
    fresh.load_state_dict(loaded.state_dict(), assign=assign)
    assert torch.equal(fresh(x), loaded(x))
    other = get_peft_model(nn.Sequential(nn.Linear(20, 4)), MaskConfig(target_modules=["0"], inference_mode=True))
    with pytest.raises(RuntimeError, match=r"size mismatch for base_model\.model\.0\.peft_mask_bits\.default"):
        other.load_state_dict(loaded.state_dict(), strict=False)
    with pytest.raises(ValueError, match="the adapter 'default' has no mask for '0'"):
        other(torch.randn(3, 20))


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
def test_a_layer_of_another_method_is_refused():
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"])).base_model.model
    with (
        pytest.warns(UserWarning, match=r"Already found a `peft_config` attribute"),
        pytest.raises(ValueError, match=r"cannot mask '0': it already carries an adapter of type peft.tuners.lora"),
    ):
        get_peft_model(model, MaskConfig(target_modules=["0"]))


def test_a_meta_weight_cannot_be_computed_with():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4))
    model = get_peft_model(model, MaskConfig(target_modules=["0"]))
    with pytest.raises(RuntimeError, match=r"cannot mask a weight on the meta device"):
        model(torch.randn(2, 4))
