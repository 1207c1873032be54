"""Embeddings of a vocabulary that was resized before training: what is saved is loaded, and stays with its adapter."""

import contextlib
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

from peft_mask import MaskCallback, MaskConfig
from tests.versions import LOADS_BY_NAME

FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"
TOKENS = [64, 65, 66, 67]  # of those that resizing adds, 64 to 71; as with pad_to_multiple_of, not all are trained
IDS = torch.arange(52, 72).view(2, 10)
RECIPES = {
    "both": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "input alone": {"modules_to_save": ["embed_tokens"]},
    "both, kept tied": {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    "tokens": {"trainable_token_indices": TOKENS},
    "tokens of both": {"trainable_token_indices": {"embed_tokens": TOKENS, "lm_head": TOKENS}},
    "resized alone": {},
}

recipes = pytest.mark.parametrize("recipe", RECIPES)
ties = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
pytestmark = [  # what PEFT says of the recipes, of every method
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer is part:UserWarning"),
    pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`, but no tied modules:UserWarning"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    top = tmp_path_factory.mktemp("bases")
    for tied in (False, True):
        shape = AutoConfig.for_model(
            "llama",
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            intermediate_size=64,
            tie_word_embeddings=tied,
        )
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(shape).save_pretrained(top / str(tied))
    return top


def resized(folder, tied, draw):
    """The base with eight tokens more, whose rows are drawn."""
    model = AutoModelForCausalLM.from_pretrained(folder / str(tied))
    torch.manual_seed(draw)
    model.resize_token_embeddings(72, mean_resizing=False)
    return model.eval()


def trained(folder, tied, recipe, draw=1, seed=0):
    config = MaskConfig(task_type="CAUSAL_LM", init_weights=False, target_sparsity=0.05, seed=seed, **RECIPES[recipe])
    model = get_peft_model(resized(folder, tied, draw), config).eval()
    with torch.no_grad():
        torch.manual_seed(seed)
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name or "trainable_tokens_delta" in name:
                parameter.normal_()
    return model


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def bytes_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def edit_config(adapter, **fields):
    config = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps(config | fields))


@ties
@recipes
@pytest.mark.parametrize("whole", ["auto", True, False])
def test_what_is_saved_is_loaded_to_the_bit(folder, tmp_path, tied, recipe, whole):
    model = trained(folder, tied, recipe)
    expected = logits(model)
    model.save_pretrained(tmp_path, save_embedding_layers=whole)
    for draw in (1, 2) if whole else (1,):
        base = resized(folder, tied, draw)
        before = base.get_input_embeddings().weight.clone()
        loaded = PeftModel.from_pretrained(base, tmp_path).eval()
        assert torch.equal(logits(loaded), expected)
        if whole:
            again = tmp_path / "again"
            loaded.save_pretrained(again, save_embedding_layers=whole)
            assert torch.equal(logits(PeftModel.from_pretrained(resized(folder, tied, 3 - draw), again)), expected)
        assert not any(p.requires_grad for n, p in loaded.named_parameters() if "embed" in n and "delta" not in n)
        embedding = loaded.get_input_embeddings()
        assert torch.equal(getattr(embedding, "original_module", embedding).weight, before)
        torch.testing.assert_close(logits(loaded.merge_and_unload()), expected)


@ties
@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if not recipe.startswith("tokens")])
def test_each_embedding_is_saved_once(folder, tmp_path, tied, recipe):
    trained(folder, tied, recipe).save_pretrained(tmp_path)
    names = {name.removeprefix("base_model.model.") for name in load_file(tmp_path / FILE) if "peft_mask" not in name}
    assert names == {"model.embed_tokens.weight", "lm_head.weight"}


@ties
@recipes
@pytest.mark.parametrize("merged", [False, True], ids=["apart", "merged"])
def test_two_adapters_keep_their_embeddings_apart(folder, tmp_path, tied, recipe, merged):
    expected = {}
    for number, name in enumerate("ab"):
        model = trained(folder, tied, recipe, draw=number, seed=number)
        expected[name] = logits(model)
        model.save_pretrained(tmp_path / name)
    base = resized(folder, tied, 5)
    alone = logits(base)
    model = PeftModel.from_pretrained(base, tmp_path / "a", adapter_name="a")
    model.load_adapter(tmp_path / "b", "b")
    use = model.base_model.switch_adapter if merged else model.set_adapter
    for name in ("a", "b", "a"):
        use(name)
        torch.testing.assert_close(logits(model), expected[name], rtol=0, atol=0)
    if merged:
        model.base_model.switch_adapter(None)
    with model.disable_adapter():
        assert torch.equal(logits(model), alone)
    if merged:
        model.base_model.enable_adapter_layers()
    model.set_adapter("b")
    model.delete_adapter("a")
    assert torch.equal(logits(model), expected["b"])


def test_rows_of_a_batch_have_the_embeddings_of_their_adapters(folder, tmp_path):
    expected = []
    for number, name in enumerate("ab"):
        model = trained(folder, False, "resized alone", draw=number, seed=number)
        expected.append(logits(model)[number])
        model.save_pretrained(tmp_path / name)
    model = PeftModel.from_pretrained(resized(folder, False, 5), tmp_path / "a", adapter_name="a")
    model.load_adapter(tmp_path / "b", "b")
    with torch.no_grad():
        got = model.eval()(input_ids=IDS, adapter_names=["a", "b"]).logits
    torch.testing.assert_close(got, torch.stack(expected))


def test_an_adapter_made_of_others_has_the_embeddings_of_the_first(folder, tmp_path):
    for number, name in enumerate("ab"):
        trained(folder, False, "resized alone", draw=number, seed=number).save_pretrained(tmp_path / name)
    model = PeftModel.from_pretrained(resized(folder, False, 5), tmp_path / "a", adapter_name="a")
    model.load_adapter(tmp_path / "b", "b")
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "both")
    model.set_adapter("both")
    made = model.get_input_embeddings().modules_to_save
    assert torch.equal(made["both"].weight, made["a"].weight)
    assert not torch.equal(made["both"].weight, made["b"].weight)
    assert logits(model).isfinite().all()


@pytest.mark.parametrize("trainable", [False, True])
def test_an_embedding_that_came_with_an_adapter_is_never_trained(folder, tmp_path, trainable):
    trained(folder, True, "resized alone").save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="masks without scores") if trainable else contextlib.nullcontext():
        model = PeftModel.from_pretrained(resized(folder, True, 2), tmp_path, is_trainable=trainable)
    model.set_adapter("default")
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert not any("embed_tokens" in name or "lm_head" in name for name in names)
    plain = model.merge_and_unload()
    assert isinstance(plain.get_input_embeddings().weight, torch.nn.Parameter)
    assert plain.get_input_embeddings().weight is plain.get_output_embeddings().weight


def test_tokens_are_not_trained_on_over_other_rows(folder, tmp_path):
    trained(folder, False, "tokens").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"(?s)cannot train 'model.embed_tokens' on: .*tokens \[68, 69, 70, 71\]"):
        PeftModel.from_pretrained(resized(folder, False, 2), tmp_path, is_trainable=True)


@recipes
@ties
def test_trainer_resumes_and_loads_its_best_model(folder, tmp_path, tied, recipe):
    rows = [{"input_ids": IDS[i % 2], "labels": IDS[i % 2]} for i in range(8)]

    def trainer(draw, **settings):
        model = trained(folder, tied, recipe, draw=draw)
        args = TrainingArguments(
            tmp_path, max_steps=2, save_steps=1, eval_steps=1, eval_strategy="steps", save_strategy="steps",
            load_best_model_at_end=True, per_device_train_batch_size=2, report_to=[], use_cpu=True, disable_tqdm=True,
            learning_rate=1e-2, weight_decay=0.0, dataloader_pin_memory=False, **settings,
        )  # fmt: skip
        return Trainer(model=model, args=args, train_dataset=rows, eval_dataset=rows, callbacks=[MaskCallback(None)])

    first = trainer(1)
    first.train()
    draw = 1 if recipe.startswith("tokens") else 2
    second = trainer(draw)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert torch.equal(logits(second.model.eval()), logits(first.model.eval()))


@pytest.mark.skipif(not LOADS_BY_NAME, reason="this transformers loads adapters through PEFT's hooks")
@ties
@recipes
def test_transformers_own_door_takes_them(folder, tmp_path, tied, recipe):
    model = trained(folder, tied, recipe)
    model.save_pretrained(tmp_path)
    loaded = resized(folder, tied, 2)
    loaded.load_adapter(tmp_path)
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_second_load_under_the_same_name_is_the_second_adapter(folder, tmp_path, low_cpu_mem_usage):
    for number, name in enumerate("ab"):
        model = trained(folder, False, "both", draw=number, seed=number)
        model.save_pretrained(tmp_path / name)
    loaded = PeftModel.from_pretrained(
        resized(folder, False, 5), tmp_path / "a", low_cpu_mem_usage=low_cpu_mem_usage
    ).eval()
    loaded.load_adapter(tmp_path / "b", "default", low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(loaded), logits(model))


def test_older_files_with_every_tensor_twice_are_loaded(folder, tmp_path):
    model = trained(folder, False, "both")
    model.save_pretrained(tmp_path)
    tensors = dict(load_file(tmp_path / FILE))
    for name in [name for name in tensors if name.endswith(("embed_tokens.weight", "lm_head.weight"))]:
        path = name.removesuffix(".weight")
        tensors |= {f"{path}.modules_to_save.weight": tensors[name].clone()}
        tensors |= {f"{path}.original_module.weight": torch.zeros_like(tensors[name])}
    save_file(tensors, tmp_path / FILE, metadata={"format": "pt"})
    edit_config(tmp_path, checksums=None)
    base = resized(folder, False, 2)
    before = base.get_input_embeddings().weight.clone()
    loaded = PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert torch.equal(loaded.get_input_embeddings().original_module.weight, before)


def test_an_embedding_that_the_configuration_does_not_name_is_refused(folder, tmp_path):
    trained(folder, False, "resized alone").save_pretrained(tmp_path)
    edit_config(tmp_path, checksums=None)
    assert PeftModel.from_pretrained(resized(folder, False, 1), tmp_path)  # its own
    with pytest.raises(ValueError, match=r"embed_tokens.weight'\], which .* Embeddings come in this way"):
        PeftModel.from_pretrained(resized(folder, False, 2), tmp_path)


def test_a_training_that_resized_nothing_takes_no_embedding_from_a_file(folder, tmp_path):
    trained(folder, False, "resized alone").save_pretrained(tmp_path)
    shrunk = dict(load_file(tmp_path / FILE))
    for name in [name for name in shrunk if name.endswith(("embed_tokens.weight", "lm_head.weight"))]:
        shrunk[name] = shrunk[name][:64].clone() + 1
    save_file(shrunk, tmp_path / FILE, metadata={"format": "pt"})
    base = AutoModelForCausalLM.from_pretrained(folder / "False")
    model = get_peft_model(base, MaskConfig(task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="Otherwise do not trust this file"):
        model.load_adapter(tmp_path, "default", is_trainable=True)


def test_a_masked_embedding_is_saved_as_a_mask_whatever_the_vocabulary(folder, tmp_path):
    config = MaskConfig(
        task_type="CAUSAL_LM", target_modules=["embed_tokens", "q_proj"], init_weights=False, target_sparsity=0.05
    )
    model = get_peft_model(resized(folder, False, 1), config).eval()
    for _ in range(2):  # of scores, then of bits
        model.save_pretrained(tmp_path)
        assert not any("scores" in name for name in load_file(tmp_path / FILE))
        loaded = PeftModel.from_pretrained(resized(folder, False, 1), tmp_path).eval()
        assert torch.equal(logits(loaded), logits(model))
        model = loaded


def test_lora_replaces_the_embedding_of_the_base(folder, tmp_path):
    """Why `bring_in` is there: a second such adapter changes the first. If this fails, PEFT keeps them apart."""
    get_peft_model(resized(folder, False, 1), LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    base = resized(folder, False, 2)
    before = base.get_input_embeddings().weight.clone()
    PeftModel.from_pretrained(base, tmp_path)
    assert not torch.equal(base.get_input_embeddings().weight, before)
