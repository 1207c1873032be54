"""transformers' own door: whatever way an adapter comes in, it does what `PeftModel.from_pretrained` makes of it."""

import copy
import functools
import json
import pickle
import shutil

import pytest
import torch
from peft import (
    AutoPeftModelForSequenceClassification,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
)
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    pipeline,
)

from peft_mask import MaskCallback, MaskConfig, Masks, create_mask_optimizer, keep_scores
from peft_mask.layers.mask_layer import MaskLayer
from tests.tiny_models import FAMILIES, tiny_heads, tiny_inputs, tiny_model, tiny_tokenizer
from tests.versions import LOADS_BY_NAME, LOADS_HEADS, MANAGES_ADAPTERS

pytestmark = pytest.mark.skipif(not LOADS_HEADS, reason="this transformers loads no trained heads, LoRA's neither")
by_name = pytest.mark.skipif(not LOADS_BY_NAME, reason="this transformers loads adapters through PEFT's hooks")
managed = pytest.mark.skipif(not MANAGES_ADAPTERS, reason="all but loading, this transformers does with a later PEFT")
rebuilds = pytest.mark.filterwarnings("ignore:the adapter 'default' holds masks without scores")  # so says PEFT's door

FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"
QUERY = "bert.encoder.layer.0.attention.self.query"


def tensors_of(output):
    return [value for value in output.values() if torch.is_tensor(value)]


def outputs(model):
    with torch.no_grad():
        return tensors_of(model(**tiny_inputs(model)))


def equal(left, right):
    return len(left) == len(right) > 0 and all(map(torch.equal, left, right))


def layers(model):
    return [module for module in model.modules() if isinstance(module, MaskLayer)]


def train_a_step(model, **inputs):
    optimizer = create_mask_optimizer(model)
    model.train()
    torch.manual_seed(0)  # dropout
    model(**tiny_inputs(model, labels=True, **inputs)).loss.backward()
    optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base with tokenizer, and two adapters of it with trained heads: `base`, `one`, `two`."""
    folder = tmp_path_factory.mktemp("native")
    tiny_model("bert").save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    for seed, name in enumerate(["one", "two"]):
        model = get_peft_model(base_in(folder), MaskConfig(task_type="SEQ_CLS", target_sparsity=0.05))
        train_a_step(model, seed=seed).save_pretrained(folder / name)
    return folder


def base_in(folder):
    return AutoModelForSequenceClassification.from_pretrained(folder / "base")


@functools.cache
def expected(folder, name):
    return outputs(PeftModel.from_pretrained(base_in(folder), folder / name).eval())


@pytest.fixture
def adapter(folder, tmp_path):
    """A copy of an adapter, to be damaged."""
    return shutil.copytree(folder / "one", tmp_path / "adapter")


def edit_config(adapter, **fields):
    config = json.loads((adapter / CONFIG).read_text()) | fields
    (adapter / CONFIG).write_text(json.dumps(config))


def edit_tensors(adapter, change):
    tensors = load_file(adapter / FILE)
    change(tensors)
    save_file(tensors, adapter / FILE, metadata={"format": "pt"})


# ---- what works ----


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loads_by_name_what_peft_loads(family, tmp_path):
    head = "lm" if "lm" in tiny_heads(family) else "base"
    config = MaskConfig(init_weights=False, target_sparsity=0.05)
    get_peft_model(tiny_model(family, head), config).save_pretrained(tmp_path)
    model = tiny_model(family, head)
    loaded = model.load_adapter(tmp_path)
    assert loaded is None or loaded.missing_keys == loaded.unexpected_keys == set()
    assert equal(outputs(model), outputs(PeftModel.from_pretrained(tiny_model(family, head), tmp_path).eval()))
    assert not equal(outputs(model), outputs(tiny_model(family, head)))


@managed
def test_an_adapter_added_and_saved_by_transformers_comes_in_by_every_door(folder, tmp_path):
    model = base_in(folder)
    model.add_adapter(MaskConfig(task_type="SEQ_CLS", target_sparsity=0.05))
    trained = outputs(train_a_step(model))
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG, FILE]

    by_peft = PeftModel.from_pretrained(base_in(folder), tmp_path).eval()
    assert equal(outputs(by_peft), trained)
    assert equal(outputs(AutoPeftModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)), trained)
    assert equal(outputs(AutoModelForSequenceClassification.from_pretrained(tmp_path)), trained)
    native = base_in(folder)
    native.load_adapter(tmp_path)
    assert equal(outputs(native), trained)
    assert all(torch.equal(layer.mask("default"), Masks.load(tmp_path)[name]) for name, layer in named_layers(native))


def named_layers(model):
    return [(name, module) for name, module in model.named_modules() if isinstance(module, MaskLayer)]


@managed
def test_adapters_are_set_disabled_enabled_and_deleted(folder):
    model = base_in(folder)
    bare = outputs(model)
    for name in ("one", "two"):
        model.load_adapter(folder / name, adapter_name=name)
        assert model.active_adapters() == [name]
    for name in ("one", "two", "one"):
        model.set_adapter(name)
        assert equal(outputs(model), expected(folder, name))
    model.disable_adapters()
    assert equal(outputs(model), bare)
    model.enable_adapters()
    for module in model.modules():  # transformers disables trained heads, too, and enables none, whatever the method
        if isinstance(module, ModulesToSaveWrapper):
            module.enable_adapters(True)
    assert equal(outputs(model), expected(folder, "one"))
    model.delete_adapter("two")
    assert equal(outputs(model), expected(folder, "one"))
    model.delete_adapter("one")
    assert equal(outputs(model), bare)
    model.load_adapter(folder / "two")
    model.set_adapter("default")  # for the trained head, which is set by itself on a model that never had one only
    assert equal(outputs(model), expected(folder, "two"))


@managed
def test_two_adapters_set_at_once_mask_with_their_product(tmp_path):
    model = tiny_model("bert", "base")
    for seed, name in enumerate(["one", "two"]):
        config = MaskConfig(init_weights=False, target_sparsity=0.05, seed=seed)
        get_peft_model(tiny_model("bert", "base"), config).save_pretrained(tmp_path / name)
        model.load_adapter(tmp_path / name, adapter_name=name)
    model.set_adapter(["one", "two"])
    (Masks.load(tmp_path / "one") & Masks.load(tmp_path / "two")).save(tmp_path / "both")
    both = tiny_model("bert", "base")
    both.load_adapter(tmp_path / "both")
    assert equal(outputs(model), outputs(both))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_adapter_loads_by_name_onto_the_base_in_another_dtype(folder, dtype):
    model = base_in(folder).to(dtype)
    model.load_adapter(folder / "one")
    assert equal(outputs(model), outputs(PeftModel.from_pretrained(base_in(folder).to(dtype), folder / "one").eval()))


def test_only_bits_are_left_in_memory(folder):
    model = AutoModelForSequenceClassification.from_pretrained(folder / "one")
    for layer in layers(model):
        rows, columns = layer.mask_shape
        assert layer.peft_mask_bits["default"].shape == (rows, -(-columns // 8))
        assert not layer.peft_mask_scores


def test_pipelines_take_the_folder_of_an_adapter_and_adapted_models(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    by_peft = PeftModel.from_pretrained(base_in(folder), folder / "one").eval()
    native = base_in(folder)
    native.load_adapter(folder / "one")
    text = "w5 w6 w7"
    with torch.no_grad():
        scores = by_peft(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0].tolist()
    for model, told in [
        (str(folder / "one"), {}),
        (native, {"tokenizer": tokenizer}),
        (by_peft, {"tokenizer": tokenizer}),
    ]:
        found = pipeline("text-classification", model=model, **told, top_k=None)([text])[0]
        assert sorted(label["score"] for label in found) == pytest.approx(sorted(scores), rel=1e-6)


def test_a_loaded_layer_compiles_whole(folder):
    model = base_in(folder)
    model.load_adapter(folder / "one")
    layer = model.get_submodule(QUERY)
    x = torch.randn(3, 32)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="eager")(x), layer(x))


def test_a_state_dict_loads_with_its_configuration(folder):
    source = PeftModel.from_pretrained(base_in(folder), folder / "one").eval()
    state, config = get_peft_model_state_dict(source), copy.deepcopy(source.peft_config["default"])
    model = base_in(folder)
    model.load_adapter(peft_config=config, adapter_state_dict=state)
    assert equal(outputs(model), outputs(source))


def test_loaded_models_are_copied_and_pickled(folder):
    model = base_in(folder)
    model.load_adapter(folder / "one")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert equal(outputs(other), outputs(model))


def test_a_copy_that_waits_is_filled_without_the_original(folder):
    config = PeftConfig.from_pretrained(folder / "one")
    waiting = inject_adapter_in_model(config, base_in(folder))
    for other in (copy.deepcopy(waiting), pickle.loads(pickle.dumps(waiting))):
        layer = other.get_submodule(QUERY)
        layer.peft_mask_bits.default = load_file(folder / "one" / FILE)[f"base_model.model.{QUERY}.peft_mask_bits"]
        assert torch.equal(layer.mask("default"), Masks.load(folder / "one")[QUERY])
        with pytest.raises(ValueError, match=f"has no mask for '{QUERY}'"):
            waiting.get_submodule(QUERY).mask("default")


# ---- training ----


@rebuilds
def test_training_goes_on_from_the_mask(folder):
    model = base_in(folder)
    loaded = model.load_adapter(folder / "one", is_trainable=True)
    assert loaded is None or loaded.unexpected_keys == set()
    model.eval()
    assert equal(outputs(model), expected(folder, "one"))
    with pytest.warns(UserWarning, match="holds masks without scores"):
        by_peft = PeftModel.from_pretrained(base_in(folder), folder / "one", is_trainable=True).eval()
    assert [name for name, _ in named_layers(model)]
    for left, right in zip(layers(model), layers(by_peft), strict=True):
        assert torch.equal(left.peft_mask_scores["default"], right.peft_mask_scores["default"])
        assert torch.equal(left.positions("default"), right.positions("default"))
        assert left.state_dict().keys() == right.state_dict().keys()
        assert "default" not in left.peft_mask_bits
    assert equal(outputs(train_a_step(model)), outputs(train_a_step(by_peft)))
    assert not equal(outputs(model), expected(folder, "one"))


def test_a_checkpoint_with_scores_goes_on_from_these(folder, tmp_path):
    model = train_a_step(get_peft_model(base_in(folder), MaskConfig(task_type="SEQ_CLS", target_sparsity=0.05)))
    keep_scores(model)
    model.save_pretrained(tmp_path)
    other = base_in(folder)
    loaded = other.load_adapter(tmp_path, is_trainable=True)
    assert loaded is None or loaded.missing_keys == set()
    for left, right in zip(layers(model), layers(other), strict=True):
        assert torch.equal(left.peft_mask_scores["default"], right.peft_mask_scores["default"])
        assert torch.equal(left.positions("default"), right.positions("default"))
    used = base_in(folder)
    used.load_adapter(tmp_path)
    assert equal(outputs(used), outputs(model))


@rebuilds
@pytest.mark.parametrize("candidates", [None, 0.1])
def test_all_or_some_weights_with_scores_are_trained_on(folder, tmp_path, candidates):
    config = MaskConfig(init_weights=False, target_sparsity=0.05, candidates=candidates)
    get_peft_model(base_in(folder), config).save_pretrained(tmp_path)
    model = base_in(folder)
    model.load_adapter(tmp_path, is_trainable=True)
    model.eval()
    assert equal(outputs(model), outputs(PeftModel.from_pretrained(base_in(folder), tmp_path).eval()))


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, row):
        return {"input_ids": torch.arange(5) + row, "labels": torch.tensor(row % 3)}


def trainer_of(model, output_dir):
    arguments = TrainingArguments(
        output_dir, max_steps=2, save_steps=1, per_device_train_batch_size=4, report_to=[], use_cpu=True
    )
    optimizers = (create_mask_optimizer(model), None)
    return Trainer(model, arguments, train_dataset=Rows(), optimizers=optimizers, callbacks=[MaskCallback()])


@managed
def test_trainer_trains_and_saves_an_added_adapter_but_does_not_resume_it(folder, tmp_path):
    model = base_in(folder)
    model.add_adapter(MaskConfig(task_type="SEQ_CLS", target_sparsity=0.05))
    trainer = trainer_of(model, tmp_path / "out")
    trainer.train()
    trainer.save_model(tmp_path / "final")
    assert not any("scores" in name for name in load_file(tmp_path / "final" / FILE))
    assert any("scores" in name for name in load_file(tmp_path / "out/checkpoint-1" / FILE))
    assert equal(outputs(AutoModelForSequenceClassification.from_pretrained(tmp_path / "final")), outputs(model.eval()))
    # transformers looks for a whole model in the checkpoint of one that is not wrapped by PEFT, whatever the method
    with pytest.raises(ValueError, match="Can't find a checkpoint index"):
        trainer_of(model, tmp_path / "out").train(resume_from_checkpoint=True)


# ---- what is refused ----


def test_another_base_is_refused_with_the_name_of_the_module(folder):
    model = tiny_model("bert", seed=5)
    with pytest.raises(ValueError, match=r"mask of 'bert\.\S+': the base weight is not the one it was trained on"):
        model.load_adapter(folder / "one")
    with pytest.raises(
        ValueError, match=r"the adapter 'default' has no mask for 'bert\.\S+': nothing was loaded for it"
    ):
        outputs(model)
    if MANAGES_ADAPTERS:
        model.delete_adapter("default")
        assert equal(outputs(model), outputs(tiny_model("bert", seed=5)))


def test_another_base_is_refused_for_training_too(folder):
    with pytest.raises(ValueError, match=r"mask of 'bert\.\S+': the base weight is not the one it was trained on"):
        tiny_model("bert", seed=5).load_adapter(folder / "one", is_trainable=True)


def test_check_base_opens_this_door_too(adapter):
    edit_config(adapter, check_base=False)
    tiny_model("bert", seed=5).load_adapter(adapter)


def test_a_damaged_record_is_refused(folder, adapter):
    def change(tensors):
        tensors[f"base_model.model.{QUERY}.peft_mask_bits"][-10] ^= 1

    edit_tensors(adapter, change)
    with pytest.raises(ValueError, match=f"cannot load the mask of '{QUERY}': its checksum is wrong"):
        base_in(folder).load_adapter(adapter)


@by_name
def test_a_file_that_is_not_there_is_missed(folder, adapter):
    (adapter / FILE).unlink()
    with pytest.raises(OSError, match=r"adapter_model|pytorch_model|safetensors"):
        base_in(folder).load_adapter(adapter)


@by_name
def test_a_mask_missing_from_the_file_is_an_error_on_first_use(folder, adapter):
    edit_tensors(adapter, lambda tensors: tensors.pop(f"base_model.model.{QUERY}.peft_mask_bits"))
    model = base_in(folder)
    loaded = model.load_adapter(adapter)
    assert loaded is None or loaded.missing_keys == {f"{QUERY}.peft_mask_bits.default"}
    message = f"the adapter 'default' has no mask for '{QUERY}': nothing was loaded for it, or loading failed"
    with pytest.raises(ValueError, match=message):
        outputs(model)
    with pytest.raises(ValueError, match=message):
        model.get_submodule(QUERY).merge()
    if MANAGES_ADAPTERS:
        with pytest.raises(ValueError, match=message):
            model.save_pretrained(adapter / "again")


@by_name
@pytest.mark.parametrize("sizes", [None, [97, 98]])
@pytest.mark.parametrize("ignore_mismatched_sizes", [False, True])
def test_without_the_sizes_of_its_records_an_adapter_is_refused(folder, adapter, sizes, ignore_mismatched_sizes):
    edit_config(adapter, record_bytes=sizes)
    with pytest.raises(AttributeError, match=r"(?s)by name: .*record_bytes.*Load it with PeftModel.from_pretrained"):
        base_in(folder).load_adapter(adapter, ignore_mismatched_sizes=ignore_mismatched_sizes)
    model = PeftModel.from_pretrained(base_in(folder), adapter).eval()
    assert equal(outputs(model), expected(folder, "one"))
    model.save_pretrained(adapter)
    model = base_in(folder)
    model.load_adapter(adapter)
    assert equal(outputs(model), expected(folder, "one"))


@by_name
def test_wrong_sizes_are_refused(folder, adapter):
    sizes = json.loads((adapter / CONFIG).read_text())["record_bytes"]
    edit_config(adapter, record_bytes=[size + 1 for size in sizes])
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        base_in(folder).load_adapter(adapter)


@by_name
def test_no_room_is_made_for_records_longer_than_a_mask_can_be(folder, adapter):
    sizes = json.loads((adapter / CONFIG).read_text())["record_bytes"]
    edit_config(adapter, record_bytes=[2**40] * len(sizes))
    with pytest.raises(AttributeError, match="does not say how long its record is"):
        base_in(folder).load_adapter(adapter)
    assert equal(outputs(PeftModel.from_pretrained(base_in(folder), adapter).eval()), expected(folder, "one"))


def test_an_adapter_in_inference_mode_that_was_never_loaded_does_not_act_as_a_mask():
    model = inject_adapter_in_model(MaskConfig(inference_mode=True), tiny_model("bert"))
    with pytest.raises(ValueError, match=r"the adapter 'default' has no mask for"):
        outputs(model)


# ---- the sizes ----


def sizes_in(folder):
    tensors = load_file(folder / FILE)
    return [len(tensors[name]) for name in sorted(tensors) if name.endswith("peft_mask_bits")]


def test_the_configuration_follows_the_records(folder, tmp_path):
    model = get_peft_model(base_in(folder), MaskConfig(task_type="SEQ_CLS", target_sparsity=0.05))
    written = []
    for sparsity in (0.05, 0.01):
        model.base_model.set_target_sparsity(sparsity)
        train_a_step(model).save_pretrained(tmp_path)
        written.append(json.loads((tmp_path / CONFIG).read_text())["record_bytes"])
        assert written[-1] == sizes_in(tmp_path)
    assert written[0] != written[1]
    Masks.load(tmp_path).save(tmp_path / "masks")
    assert json.loads((tmp_path / "masks" / CONFIG).read_text())["record_bytes"] == written[1]
    (Masks.load(folder / "one") & Masks.load(folder / "two")).save(tmp_path / "both")
    assert json.loads((tmp_path / "both" / CONFIG).read_text())["record_bytes"] == sizes_in(tmp_path / "both")
    base_in(folder).load_adapter(tmp_path / "both")


def test_a_configuration_that_saved_one_adapter_starts_another(folder, tmp_path):
    config = MaskConfig(task_type="SEQ_CLS")
    first = get_peft_model(base_in(folder), config)
    names = first.state_dict().keys()
    first.save_pretrained(tmp_path)
    assert config.record_bytes is not None
    second = get_peft_model(base_in(folder), config)
    assert second.state_dict().keys() == names


@pytest.mark.parametrize("sizes", [(3, 4), [3, 0], [3, 4.0], "34"])
def test_malformed_sizes_are_refused(sizes):
    with pytest.raises(ValueError, match="record_bytes must be a list of positive integers or None"):
        MaskConfig(record_bytes=sizes)
