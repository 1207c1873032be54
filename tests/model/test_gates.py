"""`"gate-projections"`: found in every gated model, refused in words where there are none."""

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.utils.error import NoMatchingPeftModuleError
from torch import nn
from transformers import AutoConfig, AutoModel

from peft_mask import MaskConfig, MaskLayer
from tests.tiny_models import tiny_model

SIZE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def masked(model):
    return {
        name.removeprefix("base_model.model.") for name, part in model.named_modules() if isinstance(part, MaskLayer)
    }


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "gemma"])
def test_gates_masks_the_gate_of_every_block_and_nothing_else(family):
    size = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
    }
    base = AutoModel.from_config(
        AutoConfig.for_model(family, vocab_size=64, intermediate_size=60, pad_token_id=0, **size)
    )
    model = get_peft_model(base, MaskConfig.gates())
    assert masked(model) == {f"layers.{block}.mlp.gate_proj" for block in range(2)}
    assert model.peft_config["default"].target_sparsity == 0.002


def test_gates_of_t5_are_its_first_inputs():
    size = {"d_model": 32, "d_ff": 60, "d_kv": 16, "num_layers": 2, "num_heads": 2, "vocab_size": 64}
    base = AutoModel.from_config(AutoConfig.for_model("t5", feed_forward_proj="gated-gelu", **size))
    names = masked(get_peft_model(base, MaskConfig(target_modules="Gate-Projections")))
    assert len(names) == 4
    assert all(name.endswith("DenseReluDense.wi_0") for name in names)


def test_an_attention_s_gate_is_none_and_experts_in_one_matrix_are_told():
    mixture = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
    shared = {"shared_expert_intermediate_size": 24, "decoder_sparse_step": 1}
    base = AutoModel.from_config(
        AutoConfig.for_model("qwen2_moe", **SIZE, intermediate_size=60, **mixture, **shared, pad_token_id=0)
    )
    with pytest.warns(
        UserWarning, match=r"some gates of Qwen2MoeModel are one with .*experts\.gate_up_proj.*not masked"
    ):
        model = get_peft_model(base, MaskConfig.gates())
    assert masked(model) == {f"layers.{block}.mlp.shared_expert.gate_proj" for block in range(2)}

    block = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("gate_proj", "q_proj", "w1", "w2", "w3")})
    model = get_peft_model(nn.Sequential(block), MaskConfig.gates())
    assert masked(model) == {"0.w1"}  # and no gate_proj without an up_proj


def test_fields_stand_over_those_of_the_preset():
    config = MaskConfig.gates(task_type="CAUSAL_LM", target_sparsity=0.0005)
    assert (config.task_type, config.target_sparsity) == ("CAUSAL_LM", 0.0005)
    assert MaskConfig.gates(target_bytes=2000).target_sparsity is None
    assert MaskConfig.gates(binarizer="threshold").target_sparsity is None
    assert MaskConfig.gates(pattern="2:4").target_sparsity is None


@pytest.mark.parametrize("word", ["gate-projections", "all-linear"])
def test_a_list_of_one_such_word_is_the_word(word):
    """Command lines make lists."""
    listed = get_peft_model(tiny_model("llama", "lm"), MaskConfig(target_modules=[word]))
    assert masked(listed) == masked(get_peft_model(tiny_model("llama", "lm"), MaskConfig(target_modules=word)))


def test_layers_to_transform_and_exclude_modules_hold():
    model = get_peft_model(tiny_model("llama", "lm"), MaskConfig.gates(layers_to_transform=[1]))
    assert masked(model) == {"model.layers.1.mlp.gate_proj"}
    model = get_peft_model(tiny_model("llama", "lm"), MaskConfig.gates(exclude_modules=["layers.1.mlp.gate_proj"]))
    assert masked(model) == {"model.layers.0.mlp.gate_proj"}


def test_a_saved_adapter_names_its_modules_and_computes_the_same(tmp_path):
    base = tiny_model("llama", "lm")
    state = {name: value.clone() for name, value in base.state_dict().items()}
    model = get_peft_model(base, MaskConfig.gates(task_type="CAUSAL_LM", init_weights=False)).eval()
    ids = torch.arange(4, 12).view(1, -1)
    before = model(ids).logits
    model.save_pretrained(tmp_path)
    assert set(PeftConfig.from_pretrained(tmp_path).target_modules) == masked(model)
    fresh = tiny_model("llama", "lm")
    fresh.load_state_dict(state)
    assert torch.equal(PeftModel.from_pretrained(fresh, tmp_path).eval()(ids).logits, before)


def test_a_model_without_gates_is_refused():
    with pytest.raises(
        NoMatchingPeftModuleError, match=r"BertModel has no such modules: none is called gate_proj or wi_0 or w1"
    ):
        get_peft_model(tiny_model("bert", "base"), MaskConfig.gates())


def test_gates_that_are_one_with_other_weights_are_refused_by_name():
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    base = AutoModel.from_config(
        AutoConfig.for_model("phi3", vocab_size=64, intermediate_size=60, pad_token_id=0, **size)
    )
    with pytest.raises(NoMatchingPeftModuleError, match=r"one with the up projections in layers\.0\.mlp\.gate_up_proj"):
        get_peft_model(base, MaskConfig.gates())
    mixture = {"num_local_experts": 2, "num_experts_per_tok": 1}
    base = AutoModel.from_config(
        AutoConfig.for_model("mixtral", vocab_size=64, intermediate_size=60, pad_token_id=0, **size, **mixture)
    )
    with pytest.raises(NoMatchingPeftModuleError, match=r"experts\.gate_up_proj.*target_parameters"):
        get_peft_model(base, MaskConfig.gates())
