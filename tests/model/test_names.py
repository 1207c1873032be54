"""Wrappers around a model, or around parts of it, are in no adapter's file, and hinder none from being loaded."""

import pytest
import torch
from accelerate.utils import compile_regions, extract_model_from_parallel
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from peft_mask import MaskConfig
from peft_mask.model.names import named_as_in, plain_name
from tests.tiny_models import tiny_inputs, tiny_model


def masked(base):
    torch.manual_seed(1)
    fields = {"init_weights": False, "target_sparsity": 0.05, "target_modules": ["query", "value"]}
    return get_peft_model(base, MaskConfig(task_type="SEQ_CLS", seed=0, **fields)).eval()


def base():
    return tiny_model("bert").eval()


def compiled(model):
    return torch.compile(model, backend="eager")


def with_blocks(model, wrap):
    layers = model.bert.encoder.layer
    for i, block in enumerate(layers):
        layers[i] = wrap(block)
    return model


def compiled_blocks(model):
    return with_blocks(model, compiled)


def checkpointed_blocks(model):
    return with_blocks(model, checkpoint_wrapper)


def regions(model):
    return compile_regions(model, backend="eager")


def in_place(model):
    model.compile(backend="eager")
    return model


BEFORE = {f.__name__: f for f in (compiled, compiled_blocks, checkpointed_blocks, regions, in_place)}
WRAPPED = {
    **{f"{name}, then masked": lambda wrap=wrap: masked(wrap(base())) for name, wrap in BEFORE.items()},
    "masked, then compiled": lambda: compiled(masked(base())),
    "masked, then in place": lambda: in_place(masked(base())),
    "masked, then regions": lambda: regions(masked(base())),
    "data parallel": lambda: nn.DataParallel(masked(base())),
    "data parallel, compiled": lambda: compiled(nn.DataParallel(masked(base()))),
    "compiled, data parallel": lambda: nn.DataParallel(compiled(masked(base()))),
}


def inner(model):
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    return model if isinstance(model, PeftModel) else inner(model)


def logits(model):
    with torch.no_grad():
        return model(**tiny_inputs(base())).logits


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name.startswith("adapter_")}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    masked(base()).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("handed_over", [False, True])
@pytest.mark.parametrize("make", WRAPPED.values(), ids=WRAPPED)
def test_a_wrapped_model_saves_the_bytes_of_a_plain_one(make, handed_over, plain, tmp_path):
    model = make()
    inner(model).save_pretrained(tmp_path, state_dict=model.state_dict() if handed_over else None)
    assert files(tmp_path) == files(plain)


@pytest.mark.parametrize("wrap", [compiled_blocks, checkpointed_blocks])
def test_blocks_that_are_wrapped_later_are_no_part_of_names(wrap, plain, tmp_path):
    model = masked(base())
    wrap(model.base_model.model)
    model.save_pretrained(tmp_path)
    assert files(tmp_path) == files(plain)
    model.base_model.set_scores(lambda name, weight: _kept(name, model, weight))
    assert not any(parameter.lt(0).any() for name, parameter in model.named_parameters() if "scores" in name)
    set_peft_model_state_dict(model, get_peft_model_state_dict(PeftModel.from_pretrained(base(), plain)))
    torch.testing.assert_close(logits(model), logits(PeftModel.from_pretrained(base(), plain)))


def _kept(name, model, weight):
    assert "_orig_mod" not in name
    assert "_checkpoint" not in name
    return torch.ones_like(weight)


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("wrap", BEFORE.values(), ids=BEFORE)
def test_a_plain_adapter_is_loaded_into_a_wrapped_base(wrap, native, plain):
    expected = logits(PeftModel.from_pretrained(base(), plain))
    wrapped = wrap(base())
    if native:
        if wrap is checkpointed_blocks:
            pytest.skip("transformers looks for names in the model as it is, with every method")
        wrapped.load_adapter(str(plain))
        loaded = wrapped.eval()
    else:
        loaded = PeftModel.from_pretrained(wrapped, plain)
        loaded.load_adapter(plain, "second", is_trainable=False)
        loaded.set_adapter("second")
    torch.testing.assert_close(logits(loaded), expected)


@pytest.mark.parametrize("wrap", [lambda model, how: how(model), lambda model, how: with_blocks(model, how)])
def test_what_was_compiled_stays_compiled(wrap):
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    model = masked(wrap(base(), lambda module: torch.compile(module, backend=backend)))
    assert "_orig_mod" not in " ".join(name for name, _ in model.named_modules())
    expected = logits(masked(base()))
    assert not graphs
    torch.testing.assert_close(logits(model), expected)
    assert graphs


def test_a_module_of_the_base_called_module_keeps_its_name():
    inside = nn.ModuleDict({"module": nn.Linear(4, 4)})
    names = {"module.weight": torch.zeros(1)}
    assert named_as_in(inside, names) == names
    parallel = {f"module.{name}": value for name, value in names.items()}
    assert named_as_in(nn.Sequential(inside), {f"module.0.{name}": value for name, value in names.items()}).keys() == {
        "0.module.weight"
    }
    assert named_as_in(inside, parallel).keys() == {"module.weight"}


def test_a_name_that_comes_twice_is_refused():
    model = nn.Sequential(nn.Linear(2, 2))
    tensors = {"0.weight": torch.zeros(2, 2), "_orig_mod.0.weight": torch.ones(2, 2)}
    with pytest.raises(ValueError, match=r"'0\.weight' is there twice, once as '_orig_mod\.0\.weight'"):
        named_as_in(model, tensors)


def test_a_state_dict_of_another_model_is_refused_by_the_names_in_it(tmp_path):
    model = masked(base())
    foreign = {f"another.{name}": value for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"has no '.*peft_mask_scores\.default'; it holds names such as 'another\."):
        model.save_pretrained(tmp_path, state_dict=foreign)


def test_plain_names_hold_no_wrapper():
    wrapped = "module._orig_mod.base_model._fsdp_wrapped_module.model.0._checkpoint_wrapped_module._orig_mod.weight"
    assert plain_name(wrapped) == "module.base_model.model.0.weight"
    assert plain_name("model.module._orig_module.weight") == "model.module._orig_module.weight"
