"""Libraries that take a PEFT configuration train, save and load masks (docs/neighbors.md)."""

import math

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
)

from peft_mask import MaskCallback, MaskConfig, Masks, SignAdamW, create_mask_optimizer, update_model_card
from peft_mask.layers.mask_layer import MaskLayer
from tests.tiny_models import tiny_inputs, tiny_model, tiny_tokenizer

FILE = "adapter_model.safetensors"
SETTINGS = {
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}


def text(i):
    return " ".join(f"w{4 + (7 * i + 3 * j) % 60}" for j in range(8))


def layers(model):
    return [module for module in model.modules() if isinstance(module, MaskLayer)]


def scores(model):
    return [layer.peft_mask_scores["default"].detach().clone() for layer in layers(model)]


def equal(left, right):
    return len(left) == len(right) > 0 and all(map(torch.equal, left, right))


def logits(model):
    with torch.no_grad():
        return model.eval()(**tiny_inputs(model)).logits


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def rows(model, n=8):
    inputs = tiny_inputs(model, batch_size=n, labels=True)
    inputs.pop("decoder_input_ids", None)  # made of the labels
    return [{name: value[i] for name, value in inputs.items()} for i in range(n)]


# ---- TRL ----


def causal_lm():
    return tiny_model("llama", "lm")


@pytest.fixture(scope="module")
def nf4(tmp_path_factory):
    """Loads a base in 4 bits, as often as it is called; a layer must be as wide as a block of its codes."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    folder = tmp_path_factory.mktemp("base")
    settings = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = AutoConfig.for_model("llama", vocab_size=64, **settings)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    return lambda: AutoModelForCausalLM.from_pretrained(folder, quantization_config=four_bits, device_map="cpu")


def sft_trainer(model, folder, scores_dtype="float32", **arguments):
    trl = pytest.importorskip("trl", reason="trl is not installed")
    trainer = trl.SFTTrainer(
        model,
        trl.SFTConfig(str(folder), **(SETTINGS | {"max_steps": 4} | arguments)),
        train_dataset=Dataset.from_dict({"text": [text(i) for i in range(8)]}),
        processing_class=tiny_tokenizer(),
        peft_config=MaskConfig(task_type="CAUSAL_LM", target_sparsity=0.02, scores_dtype=scores_dtype),
        callbacks=[MaskCallback()],
    )
    trainer.optimizer = create_mask_optimizer(trainer.model)
    return trainer


def test_sft_trains_a_mask_and_saves_nothing_else(tmp_path):
    trainer = sft_trainer(causal_lm(), tmp_path)  # in bfloat16 autocast and with gradient checkpointing, by default
    assert trainer.args.bf16
    trainer.train()
    assert trainer.model.is_gradient_checkpointing
    assert {value.dtype for value in scores(trainer.model)} == {torch.float32}
    assert len(logged(trainer, "sparsity")) == 4
    trainer.save_model(tmp_path / "out")
    assert all(name.endswith("peft_mask_bits") for name in load_file(tmp_path / "out" / FILE))
    trained = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    again = PeftModel.from_pretrained(causal_lm(), tmp_path / "out")
    assert torch.equal(logits(again), logits(trained))
    assert not torch.equal(logits(again), logits(causal_lm()))
    with again.disable_adapter():
        assert torch.equal(logits(again), logits(causal_lm()))


def test_sft_casts_the_scores_of_a_quantized_base_to_bfloat16_and_they_are_trained(nf4, tmp_path):
    trained = []
    for prepare in (lambda model: model, prepare_model_for_kbit_training):
        trainer = sft_trainer(prepare(nf4()), tmp_path, bf16=False)
        before = scores(trainer.model)
        assert {value.dtype for value in before} == {torch.bfloat16}
        trainer.train()
        after = scores(trainer.model)
        assert not any(torch.equal(old, new) for old, new in zip(before, after, strict=True))
        trained.append(after)
    assert equal(*trained)  # to prepare the base for training changes none of them
    trainer.save_model(tmp_path / "out")
    assert 0.019 < Masks.load(tmp_path / "out").sparsity < 0.021
    assert torch.equal(logits(PeftModel.from_pretrained(nf4(), tmp_path / "out")), logits(trainer.model))


@pytest.mark.parametrize("quantized", [False, True], ids=["float32", "nf4"])
def test_sft_resumes_bit_for_bit(nf4, tmp_path, quantized):
    base, dtype = (nf4, "bfloat16") if quantized else (causal_lm, "float32")
    whole, resumed = (
        sft_trainer(base(), tmp_path, dtype, save_strategy="steps", save_steps=2, bf16=False) for _ in range(2)
    )
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert equal(scores(resumed.model), scores(whole.model))


def dpo_trainer(model, folder, **arguments):
    trl = pytest.importorskip("trl", reason="trl is not installed")
    pairs = {"prompt": [text(i) for i in range(8)]} | {
        name: [" " + text(i + shift) for i in range(8)] for name, shift in (("chosen", 3), ("rejected", 5))
    }
    return trl.DPOTrainer(
        model,
        args=trl.DPOConfig(str(folder), max_steps=3, bf16=False, **SETTINGS),
        train_dataset=Dataset.from_dict(pairs),
        processing_class=tiny_tokenizer(),
        callbacks=[MaskCallback()],
        **arguments,
    )


def test_the_reference_of_dpo_is_the_base_without_the_mask(tmp_path):
    trainer = dpo_trainer(causal_lm(), tmp_path, peft_config=MaskConfig(task_type="CAUSAL_LM", target_sparsity=0.05))
    trainer.optimizer = create_mask_optimizer(trainer.model)
    assert trainer.ref_model is None
    trainer.train()
    assert logged(trainer, "loss")[0] == pytest.approx(math.log(2))  # every weight is kept at the start
    assert logged(trainer, "rewards/chosen")[0] == 0
    assert 0 not in logged(trainer, "rewards/chosen")[1:]
    assert len(logged(trainer, "sparsity")) == 3
    trainer.save_model(tmp_path / "out")
    assert all(name.endswith("peft_mask_bits") for name in load_file(tmp_path / "out" / FILE))
    again = PeftModel.from_pretrained(causal_lm(), tmp_path / "out")
    assert torch.equal(logits(again), logits(trainer.model))
    with trainer.model.disable_adapter():
        assert torch.equal(logits(trainer.model), logits(causal_lm()))


@pytest.fixture
def trained(tmp_path):
    """The folder of a mask that differs from the base."""
    model = get_peft_model(causal_lm(), MaskConfig(init_weights=False, target_sparsity=0.05, task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "trained")
    return tmp_path / "trained"


@pytest.mark.filterwarnings("ignore:the adapter 'default' holds masks without scores")
def test_dpo_goes_on_from_a_trained_mask_against_a_merged_reference(trained, tmp_path):
    model = PeftModel.from_pretrained(causal_lm(), trained, is_trainable=True)
    start = logits(model)
    reference = PeftModel.from_pretrained(causal_lm(), trained).merge_and_unload()
    trainer = dpo_trainer(model, tmp_path, ref_model=reference)
    trainer.optimizer = create_mask_optimizer(trainer.model, mask_lr=0.03)  # over the margin of a loaded mask
    trainer.train()
    assert logged(trainer, "loss")[0] == pytest.approx(math.log(2))
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(reference), start)
    assert not torch.equal(logits(model), start)


def rewarded(kind, model, folder):
    trl = pytest.importorskip("trl", reason="trl is not installed")
    config, trainer = getattr(trl, f"{kind}Config"), getattr(trl, f"{kind}Trainer")
    sizes = {"num_generations": 2, "max_completion_length": 4, "beta": 0.1, "max_steps": 1, "bf16": False}
    return trainer(
        model,
        reward_funcs=lambda completions, **_: [float(len(completion)) for completion in completions],
        args=config(str(folder), **sizes, **SETTINGS),
        train_dataset=Dataset.from_dict({"prompt": [text(i) for i in range(8)]}),
        processing_class=tiny_tokenizer(),
        callbacks=[MaskCallback()],
    )


def kto_trainer(model, folder):
    trl = pytest.importorskip("trl", reason="trl is not installed")
    rows = {"prompt": [text(i) for i in range(8)], "completion": [" " + text(i + 3) for i in range(8)]}
    return trl.KTOTrainer(
        model,
        args=trl.KTOConfig(str(folder), max_steps=1, bf16=False, **SETTINGS),
        train_dataset=Dataset.from_dict(rows | {"label": [True, False] * 4}),
        processing_class=tiny_tokenizer(),
        callbacks=[MaskCallback()],
    )


WITH_REFERENCE = {
    "dpo": dpo_trainer,
    "kto": kto_trainer,
    "grpo": lambda model, folder: rewarded("GRPO", model, folder),
    "rloo": lambda model, folder: rewarded("RLOO", model, folder),
}


@pytest.mark.parametrize("make", WITH_REFERENCE.values(), ids=WITH_REFERENCE)
@pytest.mark.filterwarnings("ignore:the adapter 'default' holds masks without scores")
def test_the_reference_of_a_trained_mask_is_that_mask(make, trained, tmp_path):
    model = PeftModel.from_pretrained(causal_lm(), trained, is_trainable=True)
    start = logits(model)
    trainer = make(model, tmp_path)
    trainer.optimizer = create_mask_optimizer(trainer.model, mask_lr=0.03)
    trainer.train()
    assert not torch.equal(logits(model), start)
    model.set_adapter("ref")
    assert torch.equal(logits(model), start)
    if make is dpo_trainer:
        assert logged(trainer, "loss")[0] == pytest.approx(math.log(2))


# ---- sentence-transformers ----


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    folder = tmp_path_factory.mktemp("encoder")
    tiny_model("bert", "base").save_pretrained(folder / "bert")
    tiny_tokenizer().save_pretrained(folder / "bert")
    SentenceTransformer(modules=[Transformer(str(folder / "bert")), Pooling(32)]).save_pretrained(str(folder / "base"))
    return str(folder / "base")


def encoder_trainer(model, folder, **arguments):
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    pairs = {"anchor": [text(i) for i in range(8)], "positive": [text(i + 1) for i in range(8)]}
    return SentenceTransformerTrainer(
        model,
        SentenceTransformerTrainingArguments(str(folder), **(SETTINGS | {"max_steps": 2} | arguments)),
        train_dataset=Dataset.from_dict(pairs),
        eval_dataset=Dataset.from_dict(pairs),
        loss=MultipleNegativesRankingLoss(model),
        optimizers=(create_mask_optimizer(model), None),
        callbacks=[MaskCallback()],
    )


def masked_encoder(folder):
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(folder)
    model.add_adapter(MaskConfig(task_type="FEATURE_EXTRACTION", target_sparsity=0.05))
    return model


SENTENCES = [text(i) for i in range(4)]


def test_a_sentence_transformer_trains_saves_and_loads_a_mask(encoder, tmp_path):
    from sentence_transformers import SentenceTransformer

    plain = SentenceTransformer(encoder).encode(SENTENCES)
    model = masked_encoder(encoder)
    trainer = encoder_trainer(model, tmp_path / "run")
    trainer.train()
    assert len(logged(trainer, "sparsity")) == 2
    trained = model.encode(SENTENCES)
    assert (trained != plain).any()

    model.save_pretrained(str(tmp_path / "adapter"))
    assert all(name.endswith("peft_mask_bits") for name in load_file(tmp_path / "adapter" / FILE))
    own_card = (tmp_path / "adapter" / "README.md").read_text("utf-8")
    for _ in range(2):  # the second time changes nothing
        update_model_card(tmp_path / "adapter")
        card = (tmp_path / "adapter" / "README.md").read_text("utf-8")
        examples = card.split("```python\n")[1:]
        assert len(examples) == 1 + own_card.count("```python\n")
        assert all(example.startswith("import peft_mask") for example in examples)
        assert all(example.count("import peft_mask") == 1 for example in examples)
        assert "library_name: sentence-transformers" in card
        assert 'SentenceTransformer("this/repository")' in card
        assert "## A mask" in card
    assert (SentenceTransformer(str(tmp_path / "adapter")).encode(SENTENCES) == trained).all()
    other = SentenceTransformer(encoder)
    other.load_adapter(str(tmp_path / "adapter"))
    assert (other.encode(SENTENCES) == trained).all()
    other.disable_adapters()
    assert (other.encode(SENTENCES) == plain).all()


def test_a_checkpoint_of_a_sentence_transformer_is_whole_though_its_trainer_does_not_resume(encoder, tmp_path):
    from sentence_transformers import SentenceTransformer

    model = masked_encoder(encoder)
    encoder_trainer(model, tmp_path, save_strategy="steps", save_steps=2).train()
    checkpoint = str(tmp_path / "checkpoint-2")
    with pytest.raises(RuntimeError, match="Missing key"):
        encoder_trainer(masked_encoder(encoder), tmp_path / "b").train(resume_from_checkpoint=checkpoint)
    assert (SentenceTransformer(checkpoint).encode(SENTENCES) == model.encode(SENTENCES)).all()
    trained_on = SentenceTransformer(encoder)
    trained_on.load_adapter(checkpoint, is_trainable=True)
    assert equal(scores(trained_on), scores(model))


@pytest.mark.parametrize("adapter_name", ["default", "task"])
def test_the_best_model_of_a_sentence_transformer_is_loaded_with_all_that_was_trained(encoder, tmp_path, adapter_name):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense

    base = SentenceTransformer(encoder)
    SentenceTransformer(modules=[*base, Dense(32, 16)]).save_pretrained(str(tmp_path / "base"))
    model = SentenceTransformer(str(tmp_path / "base"))
    model.add_adapter(MaskConfig(task_type="FEATURE_EXTRACTION", target_sparsity=0.05), adapter_name=adapter_name)
    best = {"metric_for_best_model": "eval_loss", "greater_is_better": True}  # the first is the best
    steps = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    trainer = encoder_trainer(model, tmp_path / "run", load_best_model_at_end=True, **best, **steps)
    trainer.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    assert trainer.state.best_global_step == 2
    assert len(set(losses.values())) == 3
    assert trainer.evaluate()["eval_loss"] == losses[2]
    assert (model.encode(SENTENCES) == SentenceTransformer(str(tmp_path / "run/checkpoint-2")).encode(SENTENCES)).all()


# ---- diffusers ----


@pytest.fixture
def unet():
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

    def make():
        torch.manual_seed(0)
        return diffusers.UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=8,
            attention_head_dim=4,
            norm_num_groups=4,
        ).eval()

    return make


UNET_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2"]


def denoised(model):
    generator = torch.Generator().manual_seed(0)
    sample, states = (torch.randn(shape, generator=generator) for shape in ((2, 4, 8, 8), (2, 5, 8)))
    return model(sample, torch.tensor([3, 5]), states).sample


def train_unet(model):
    optimizer = create_mask_optimizer(model)
    for _ in range(2):
        denoised(model).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return denoised(model).detach()


def test_a_unet_trains_saves_and_loads_a_mask_of_linear_layers_and_convolutions(unet, tmp_path):
    model = unet()
    plain = denoised(model)
    model.add_adapter(MaskConfig(target_modules=UNET_TARGETS, target_sparsity=0.05))
    assert {type(layer).__name__ for layer in layers(model)} == {"Linear", "Conv"}
    trained = train_unet(model)
    assert not torch.equal(trained, plain)
    model.disable_adapters()
    assert torch.equal(denoised(model), plain)
    model.enable_adapters()
    with pytest.raises(AttributeError, match="set_scale"):
        model.set_adapters("default", weights=0.5)

    model.save_lora_adapter(tmp_path)
    tensors = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert all(name.endswith("peft_mask_bits") for name in tensors)
    assert len(Masks.load(tmp_path / "pytorch_lora_weights.safetensors")) == len(layers(model))
    other = unet()
    other.add_adapter(MaskConfig(target_modules=UNET_TARGETS, inference_mode=True))
    set_peft_model_state_dict(other, tensors)
    assert torch.equal(denoised(other), trained)

    other.fuse_lora()
    assert torch.equal(denoised(other), trained)
    other.unfuse_lora()
    other.unload_lora()
    assert not layers(other)
    assert torch.equal(denoised(other), plain)

    lora = unet()
    with pytest.raises(TypeError, match="LoraConfig"):
        lora.load_lora_adapter(tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors")
    assert torch.equal(denoised(lora), plain)


def test_a_merged_unet_is_an_ordinary_one(unet, tmp_path):
    model = get_peft_model(unet(), MaskConfig(target_modules=UNET_TARGETS, target_sparsity=0.05))
    trained = train_unet(model)
    model.save_pretrained(tmp_path)
    merged = PeftModel.from_pretrained(unet(), tmp_path).merge_and_unload()
    assert type(merged) is type(unet())
    assert torch.equal(denoised(merged), trained)


def cast(model):
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)


def offload(model, **settings):
    cpu = torch.device("cpu")
    model.enable_group_offload(onload_device=cpu, offload_device=cpu, **settings)


def to_disk(folder):
    return lambda model: offload(model, offload_type="leaf_level", offload_to_disk_path=str(folder / "groups"))


@pytest.fixture
def unet_mask(unet, tmp_path):
    model = get_peft_model(unet(), MaskConfig(target_modules=UNET_TARGETS, target_sparsity=0.05, init_weights=False))
    model.save_pretrained(tmp_path / "mask")
    return tmp_path / "mask"


@pytest.mark.parametrize("masked_first", [False, True])
@pytest.mark.parametrize("way", ["cast", "leaf_level", "block_level", "disk"])
@torch.no_grad()
def test_a_unet_that_is_cast_or_offloaded_computes_under_its_mask(unet, unet_mask, way, masked_first, tmp_path):
    kinds = {"cast": cast, "disk": to_disk(tmp_path), "leaf_level": lambda m: offload(m, offload_type="leaf_level")}
    kinds["block_level"] = lambda m: offload(m, offload_type="block_level", num_blocks_per_group=1)
    expected = denoised(PeftModel.from_pretrained(unet(), unet_mask))
    base = unet()
    if masked_first:
        model = PeftModel.from_pretrained(base, unet_mask)
        kinds[way](base)
    else:
        kinds[way](base)
        model = PeftModel.from_pretrained(base, unet_mask)
    got = denoised(model)
    if way != "cast":
        assert torch.equal(got, expected)
    elif not masked_first:
        assert 0 < (got - expected).abs().max() < 0.1 * (denoised(unet()) - expected).abs().max()
    if way == "disk":
        with pytest.raises(ValueError, match="cannot merge, or unmerge: diffusers' group offloading"):
            model.merge_adapter()
        assert torch.equal(denoised(model), expected)
    else:
        model.merge_adapter()
        torch.testing.assert_close(denoised(model), got)
        model.unmerge_adapter()
        assert torch.equal(denoised(model), got)


@torch.no_grad()
def test_masks_on_disk_are_not_saved_from_a_state_dict_without_values(unet, unet_mask, tmp_path):
    base = unet()
    model = PeftModel.from_pretrained(base, unet_mask)
    to_disk(tmp_path)(base)
    with pytest.raises(ValueError, match="diffusers' group offloading keeps tensors of it on disk"):
        model.save_pretrained(tmp_path / "again")


# ---- transformers' other trainers ----


def test_seq2seq_trainer_generates_under_the_mask(tmp_path):
    model = get_peft_model(tiny_model("t5", "lm"), MaskConfig(task_type="SEQ_2_SEQ_LM", target_sparsity=0.05))
    data = rows(model)
    trainer = Seq2SeqTrainer(
        model,
        Seq2SeqTrainingArguments(str(tmp_path), max_steps=2, predict_with_generate=True, **SETTINGS),
        train_dataset=data,
        callbacks=[MaskCallback()],
        optimizers=(create_mask_optimizer(model), None),
    )
    trainer.train()
    assert len(logged(trainer, "sparsity")) == 2
    predicted = torch.from_numpy(trainer.predict(data, max_length=6, num_beams=2).predictions)
    inputs = {name: torch.stack([row[name] for row in data]) for name in ("input_ids", "attention_mask")}
    generated = model.eval().generate(**inputs, max_length=6, num_beams=2)
    assert torch.equal(predicted[:, :6], generated)  # the rest is padding


class MaskTrainer(Trainer):
    def create_optimizer(self, model=None):
        self.optimizer = create_mask_optimizer(model or self.model, lr=self.args.learning_rate)
        return self.optimizer


def test_hyperparameter_search_tries_sparsities_and_learning_rates(tmp_path):
    optuna = pytest.importorskip("optuna", reason="optuna is not installed")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    tried = set()

    def model_init(trial):
        sparsity = trial.suggest_float("target_sparsity", 0.01, 0.1) if trial else 0.005
        return get_peft_model(tiny_model("bert"), MaskConfig(task_type="SEQ_CLS", target_sparsity=sparsity))

    class Witness(MaskCallback):
        def on_train_end(self, args, state, control, **kwargs):
            super().on_train_end(args, state, control, **kwargs)
            optimizer = kwargs["optimizer"].optimizer  # within accelerate's
            assert isinstance(optimizer, SignAdamW)
            budget = kwargs["model"].peft_config["default"].target_sparsity
            sparsity = [entry["sparsity"] for entry in state.log_history if "sparsity" in entry][-1]
            assert sparsity == pytest.approx(budget, rel=0.3)
            tried.add((budget, optimizer.param_groups[-1]["initial_lr"]))

    data = rows(tiny_model("bert"))
    trainer = MaskTrainer(
        args=TrainingArguments(str(tmp_path), max_steps=2, eval_strategy="epoch", **SETTINGS),
        model_init=model_init,
        train_dataset=data,
        eval_dataset=data,
        callbacks=[Witness()],
    )
    best = trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2, log=True)},
        backend="optuna",
        direction="minimize",
        n_trials=3,
        sampler=optuna.samplers.RandomSampler(seed=0),
    )
    assert len({sparsity for sparsity, _ in tried}) == len({lr for _, lr in tried}) == 3
    assert (best.hyperparameters["target_sparsity"], best.hyperparameters["learning_rate"]) in tried
