"""PEFT's own doors and fields, with a mask in the place of LoRA: what its quicktour shows, and what is refused."""

import accelerate
import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, PeftModel, TaskType, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from peft_mask import MaskConfig, Masks, create_mask_optimizer
from peft_mask.layers.mask_layer import MaskLayer
from tests.layers.test_modules import case, config
from tests.tiny_models import tiny_config, tiny_inputs, tiny_model


def trained(model, steps=2):
    optimizer = create_mask_optimizer(model)
    inputs = tiny_inputs(model.get_base_model(), labels=True)
    model.train()
    for _ in range(steps):
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def test_the_quicktour_of_peft(tmp_path, capsys):
    base = tiny_model("bert")
    base.save_pretrained(tmp_path / "base")
    config = MaskConfig(task_type=TaskType.SEQ_CLS, inference_mode=False)
    model = get_peft_model(type(base).from_pretrained(tmp_path / "base"), config)
    model.print_trainable_parameters()
    assert capsys.readouterr().out.startswith("trainable params: ")
    model = trained(model)
    model.save_pretrained(tmp_path / "adapter")
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {
        file.name for file in (tmp_path / "adapter").iterdir()
    }
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter").eval()
    inputs = tiny_inputs(base)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def test_status_names_masks():
    model = get_peft_model(tiny_model("bert"), MaskConfig(task_type="SEQ_CLS"))
    status = model.get_model_status()
    assert (status.adapter_model_type, status.active_adapters) == ("MaskModel", ["default"])
    assert status.enabled is True
    assert status.trainable_params == sum(p.numel() for p in model.parameters() if p.requires_grad)
    layers = [layer for layer in model.get_layer_status() if layer.module_type.startswith("peft_mask.")]
    assert len(layers) == 13
    assert all(layer.available_adapters == ["default"] for layer in layers)


@pytest.mark.parametrize("saved", ["embed_tokens", "lm_head"])  # the names by which PEFT knows tied weights
def test_an_embedding_and_the_head_tied_to_it_are_trained_and_saved_as_one_weight(saved, tmp_path):
    def tied():
        torch.manual_seed(0)
        shape = tiny_config("llama")
        shape.tie_word_embeddings = True
        return AutoModelForCausalLM.from_config(shape).eval()

    config = MaskConfig(task_type="CAUSAL_LM", modules_to_save=[saved], ensure_weight_tying=True)
    model = get_peft_model(tied(), config)
    llama = model.get_base_model()
    head, embedding = llama.lm_head.modules_to_save["default"], llama.model.embed_tokens.modules_to_save["default"]
    assert head.weight is embedding.weight
    trained(model)
    inputs = tiny_inputs(llama)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tied(), tmp_path)
    with torch.no_grad():
        assert not torch.equal(embedding.weight, llama.model.embed_tokens.original_module.weight)
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
        with model.disable_adapter():
            assert torch.equal(model(**inputs).logits, tied()(**inputs).logits)


@pytest.mark.parametrize("family", ["gpt2", "llama"])  # with tied embeddings and without
def test_embeddings_of_chosen_tokens_are_trained_beside_the_masks(family, tmp_path):
    config = MaskConfig(task_type="CAUSAL_LM", trainable_token_indices=[3, 4])
    model = get_peft_model(tiny_model(family, "lm"), config)
    model.get_base_model().config.loss_type = "ForCausalLM"
    (token,) = (p for name, p in model.named_parameters() if "trainable_tokens_delta" in name)
    before = token.detach().clone()
    inputs = tiny_inputs(model.get_base_model())
    inputs["input_ids"][:, 0] = 3
    model.train()
    optimizer = create_mask_optimizer(model)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    optimizer.step()
    model.eval()
    assert (token != before).any()

    model.save_pretrained(tmp_path)
    shapes = {key: value.shape for key, value in load_file(tmp_path / "adapter_model.safetensors").items()}
    assert [tuple(shape) for key, shape in shapes.items() if "trainable_tokens" in key] == [(2, 32)]
    loaded = PeftModel.from_pretrained(tiny_model(family, "lm"), tmp_path)
    with torch.no_grad():
        logits = model(**inputs).logits
        assert torch.equal(loaded(**inputs).logits, logits)
        torch.testing.assert_close(loaded.merge_and_unload()(**inputs).logits, logits)


def test_a_mixed_model_refuses_masks_in_words():
    with pytest.raises(ValueError, match=r"'PEFT_MASK' is not compatible with the `PeftMixedModel`"):
        get_peft_model(tiny_model("bert"), MaskConfig(task_type="SEQ_CLS"), mixed=True)


def test_an_embedding_that_peft_would_save_whole_is_named_so_that_it_does_not(tmp_path):
    model = get_peft_model(
        tiny_model("llama", "lm"), MaskConfig(task_type="CAUSAL_LM", target_modules=["embed_tokens", "q_proj"])
    )
    model.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert len(keys) == 3
    assert all(key.endswith("peft_mask_bits") for key in keys)
    loaded = PeftModel.from_pretrained(tiny_model("llama", "lm"), tmp_path)
    inputs = tiny_inputs(model.get_base_model())
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model.eval()(**inputs).logits)


@pytest.mark.parametrize("offload", ["disk", "cpu"])
@pytest.mark.parametrize("module", ["linear", "conv2d", "embedding"])
def test_an_offloaded_base_is_masked_merged_and_trained_as_any_other(module, offload, tmp_path):
    def wrapped(base):
        return get_peft_model(base, config(module, "candidates"))

    base, x = case(module)
    model = wrapped(base)
    offloaded, _ = case(module)
    if offload == "disk":
        accelerate.disk_offload(offloaded, tmp_path / "weights", execution_device="cpu")
    else:
        accelerate.cpu_offload(offloaded, execution_device="cpu")
    assert all(p.is_meta for p in offloaded.parameters())
    other = wrapped(offloaded)

    scores = {name: p for name, p in model.named_parameters() if p.requires_grad}
    expected = model(x)
    expected.square().sum().backward()
    output = other(x)
    output.square().sum().backward()
    torch.testing.assert_close(output, expected)
    for name, p in other.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, scores[name].grad)

    model.save_pretrained(tmp_path / "ours")
    other.save_pretrained(tmp_path / "theirs")
    assert Masks.load(tmp_path / "ours") == Masks.load(tmp_path / "theirs")
    with torch.no_grad():
        other.merge_adapter()
        torch.testing.assert_close(other(x), expected)
        other.unmerge_adapter()
        torch.testing.assert_close(other(x), expected)
        with other.disable_adapter():
            torch.testing.assert_close(other(x), case(module)[0](x))


@pytest.mark.parametrize("module", ["attention", "experts"])
def test_modules_whose_weight_is_exchanged_are_refused_where_they_are_offloaded(module):
    base, _ = case(module)
    accelerate.cpu_offload(base, execution_device="cpu")
    with pytest.raises(ValueError, match=r"cannot mask '.*': accelerate has offloaded it"):
        get_peft_model(base, config(module))
    assert not any(isinstance(child, MaskLayer) for child in base.modules())
