"""Hooks of a base layer run as they do without a mask: of torch and of accelerate, from before and after wrapping."""

import copy

import accelerate
import pytest
import torch
from accelerate.hooks import ModelHook, SequentialHook, add_hook_to_module, remove_hook_from_module
from peft import get_peft_model
from torch import nn

from peft_mask import MaskConfig
from tests.layers.test_modules import TARGETS, case, config, masked_layers


class Scale(ModelHook):
    """Doubles what goes in and what comes out."""

    def pre_forward(self, module, *args, **kwargs):
        return tuple(twice(arg) for arg in args), kwargs

    def post_forward(self, module, output):
        return twice(output)


class WithoutGradient(ModelHook):
    no_grad = True


def twice(value):
    return 2 * value if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def add_pre_hook_with_kwargs(layer):
    def hook(module, args, kwargs):
        return tuple(twice(arg) for arg in args), kwargs

    layer.register_forward_pre_hook(hook, with_kwargs=True)


def add_backward_hooks(layer):
    layer.register_full_backward_hook(lambda module, into, out: tuple(g if g is None else 3 * g for g in into))
    layer.register_full_backward_pre_hook(lambda module, out: tuple(5 * g for g in out))


HOOKS = {
    "forward": lambda layer: layer.register_forward_hook(lambda module, args, output: 2 * output),
    "forward, with kwargs": lambda layer: layer.register_forward_hook(
        lambda module, args, kwargs, output: output + len(args) + len(kwargs), with_kwargs=True
    ),
    "forward, that changes nothing": lambda layer: layer.register_forward_hook(lambda module, args, output: None),
    "pre": lambda layer: layer.register_forward_pre_hook(lambda module, args: tuple(twice(arg) for arg in args)),
    "pre, with kwargs": add_pre_hook_with_kwargs,
    "backward": add_backward_hooks,
    "accelerate": lambda layer: add_hook_to_module(layer, Scale()),
    "accelerate, two": lambda layer: add_hook_to_module(layer, SequentialHook(Scale(), Scale())),
    "accelerate, and torch": lambda layer: (add_hook_to_module(layer, Scale()), HOOKS["forward"](layer)),
    "accelerate, gone again": lambda layer: remove_hook_from_module(add_hook_to_module(layer, Scale())),
}
MODULES = ["linear", "Conv1D", "conv2d", "embedding", "scaled embedding", "experts"]


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")  # of embeddings
@pytest.mark.parametrize("late", [False, True], ids=["before", "after wrapping"])
@pytest.mark.parametrize("add", HOOKS.values(), ids=list(HOOKS))
@pytest.mark.parametrize("module", MODULES)
def test_hooks_of_a_layer_run_around_its_mask(module, add, late):
    def hooked(wrap):
        base, _ = case(module)
        if not late:
            add(base[0])
        model = wrap(base)
        if late:
            layers = masked_layers(model)
            add(next(iter(layers.values())).get_base_layer() if layers else base[0])
        return model

    _, x = case(module)
    plain = hooked(lambda base: base)
    fresh = hooked(lambda base: get_peft_model(base, MaskConfig(**TARGETS.get(module, {"target_modules": ["0"]}))))
    masked = hooked(lambda base: get_peft_model(base, config(module)))
    x.requires_grad_(x.is_floating_point())
    gradients = []
    for model in (plain, fresh):
        output = model(x)
        output.square().sum().backward()
        gradients.append((output.detach(), x.grad))
        x.grad = None
    torch.testing.assert_close(gradients[1], gradients[0])
    with torch.no_grad():
        output = masked(x)
        assert not torch.equal(output, plain(x))
        masked.merge_adapter()
        torch.testing.assert_close(masked(x), output)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")  # of embeddings
@pytest.mark.parametrize("module", MODULES)
def test_a_hook_is_handed_the_base_layer_itself(module):
    model = get_peft_model(case(module)[0], config(module))
    layer = next(iter(masked_layers(model).values())).get_base_layer()
    seen = []
    layer.register_forward_pre_hook(lambda module, args: seen.append(module))
    layer.register_forward_hook(lambda module, args, output: seen.append(module))
    layer.register_full_backward_hook(lambda module, into, out: seen.append(module))
    model(case(module)[1]).sum().backward()
    assert len(seen) == 3
    assert all(module is layer for module in seen)


def test_a_hook_that_always_runs_does_so_when_the_layer_fails():
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), MaskConfig(target_modules=["0"]))
    seen = []
    layer = model.base_model.model[0].base_layer
    layer.register_forward_hook(lambda module, args, output: seen.append(output), always_call=True)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(torch.randn(2, 5))
    assert seen == [None]


def test_a_hook_may_remove_itself():
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), MaskConfig(target_modules=["0"]))
    layer, seen = model.base_model.model[0].base_layer, []
    handle = layer.register_forward_hook(lambda module, args, output: (seen.append(1), handle.remove())[1])
    model(torch.randn(2, 4))
    model(torch.randn(2, 4))
    assert seen == [1]


def test_a_hook_of_accelerate_may_ask_for_no_gradient():
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), MaskConfig(target_modules=["0"]))
    assert model(torch.randn(2, 4)).requires_grad
    add_hook_to_module(model.base_model.model[0].base_layer, WithoutGradient())
    assert not model(torch.randn(2, 4)).requires_grad


def test_rows_of_several_adapters_run_the_hooks_as_well():
    base, x = case("linear")
    base[0].register_forward_hook(lambda module, args, output: 2 * output)
    model = get_peft_model(copy.deepcopy(base), config("linear"), adapter_name="one")
    model.add_adapter("two", config("linear", seed=2))
    with torch.no_grad():
        mixed = model.eval()(x, adapter_names=["one", "two", "__base__", "one"])
        torch.testing.assert_close(mixed[2], base(x)[2])
        for adapter, rows in (("one", [0, 3]), ("two", [1])):
            model.set_adapter(adapter)
            torch.testing.assert_close(mixed[rows], model(x)[rows])


def test_a_layer_whose_forward_was_replaced_is_refused():
    base = nn.Sequential(nn.Linear(4, 4))
    base[0].forward = lambda x: x
    with pytest.raises(ValueError, match=r"'0' of type Linear is not supported: its forward was replaced"):
        get_peft_model(base, MaskConfig(target_modules=["0"]))
    assert type(base[0]) is nn.Linear


@pytest.mark.parametrize("candidates", [0.5, None])
def test_a_masked_model_that_is_offloaded_afterwards_computes_the_same(candidates):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    config = MaskConfig(target_modules=["0", "2"], init_weights=False, candidates=candidates, mask_biases=True, seed=0)
    model = get_peft_model(base, config).eval()
    x = torch.randn(3, 8)
    expected = model(x)
    accelerate.cpu_offload(model, torch.device("cpu"))
    assert torch.equal(model(x), expected)
