"""Threads that run one model at the same time: each computes what it would alone, also while adapters come and go."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from peft_mask import MaskConfig, hotswap_adapter
from peft_mask.layers.mask_layer import MaskLayer
from tests.model.test_mixed import alone, batch, random_masks, two_adapters
from tests.tiny_models import tiny_model

ROWS = 5


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, MaskLayer)]


def in_threads(calls):
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


def at_a_layer(model, index, action):
    """Do something once, between two layers of a forward pass."""
    done = []

    def hook(*_):
        if not done:
            done.append(True)
            action()

    return layers_of(model)[index].register_forward_pre_hook(hook)


@pytest.fixture
def served(tmp_path):
    """A model that serves adapters one and two, what they compute alone, and a folder of a third."""
    two_adapters("bert", "seq_cls", "SEQ_CLS").save_pretrained(tmp_path)
    three = two_adapters("bert", "seq_cls", "SEQ_CLS", target_sparsity=0.4)
    three.save_pretrained(tmp_path / "more", selected_adapters=["two"])
    model = PeftModel.from_pretrained(tiny_model("bert", "seq_cls"), tmp_path / "one", adapter_name="one")
    model.load_adapter(tmp_path / "two", "two")
    model.eval()
    inputs = batch(model)
    with torch.no_grad():
        expected = {name: alone(model, name, lambda: model(**inputs).logits) for name in ("one", "two", "__base__")}
    model.set_adapter("one")
    return model, inputs, expected, tmp_path / "more" / "two"


def call(model, inputs, name=None):
    with torch.no_grad():
        return model(**inputs, **({} if name is None else {"adapter_names": [name] * ROWS})).logits


def test_threads_with_adapters_of_their_own_compute_what_each_does_alone(served):
    model, inputs, expected, _ = served
    # names, and None for whoever leaves it at the active adapter
    names = ["one", "two", None, "two"]
    count = len(names)
    barrier = threading.Barrier(count, timeout=30)
    hooks = [layer.register_forward_pre_hook(lambda *_: (barrier.wait(), None)[1]) for layer in layers_of(model)]
    for _ in range(3):
        found = in_threads([lambda name=name: call(model, inputs, name) for name in names])
        for name, logits in zip(names, found, strict=True):
            torch.testing.assert_close(logits, expected[name or "one"])
    for hook in hooks:
        hook.remove()
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not torch.allclose(expected["one"], expected["two"])


def test_a_head_of_several_layers_computes_the_rows_of_its_own_thread():
    model = two_adapters("roberta", "seq_cls", "SEQ_CLS")
    for parameter in model.base_model.model.classifier.modules_to_save.parameters():
        nn.init.normal_(parameter)
    inputs = batch(model)
    with torch.no_grad():
        expected = {name: alone(model, name, lambda: model(**inputs).logits) for name in ("one", "two")}
    model.set_adapter("one")
    names = ["one", "two", None, "two", "one"]
    barrier = threading.Barrier(len(names), timeout=30)  # before the head, when the hooks of all are there
    hook = layers_of(model)[-1].register_forward_hook(lambda *_: (barrier.wait(), None)[1])
    for _ in range(5):
        found = in_threads([lambda name=name: call(model, inputs, name) for name in names])
        for name, logits in zip(names, found, strict=True):
            torch.testing.assert_close(logits, expected[name or "one"], atol=1e-4, rtol=1e-4)
    hook.remove()
    assert not any(module._forward_hooks for module in model.modules())
    assert not torch.allclose(expected["one"], expected["two"], atol=0.1)


def test_a_hook_that_another_thread_has_just_removed_does_no_harm(served):
    model, inputs, expected, _ = served
    layer = layers_of(model)[0]
    torch_forgets = layer._forward_pre_hooks_with_kwargs.clear  # as it does when the other thread is through
    handle = layer.register_forward_pre_hook(lambda *_: (torch_forgets(), None)[1], prepend=True)

    def other():
        with model.base_model._enable_peft_forward_hooks(adapter_names=["two"] * ROWS):
            return in_threads([lambda: call(model, inputs)])[0]

    torch.testing.assert_close(other(), expected["one"])
    handle.remove()


@pytest.mark.parametrize("what", ["load", "delete", "load and delete"])
def test_who_names_the_adapter_in_the_call_does_not_notice_others_come_and_go(served, what):
    model, inputs, expected, more = served
    if what == "delete":
        model.load_adapter(more, "three")

    def change():
        if "load" in what:
            model.load_adapter(more, "three")
        if "delete" in what:
            model.delete_adapter("three")

    handle = at_a_layer(model, 3, change)
    torch.testing.assert_close(call(model, inputs, "two"), expected["two"])
    handle.remove()
    assert ("three" in model.peft_config) == (what == "load")
    torch.testing.assert_close(call(model, inputs, "two"), expected["two"])


def test_adapters_are_loaded_and_deleted_while_threads_serve_others(served):
    model, inputs, expected, more = served
    stop, wrong = threading.Event(), []

    def serve(name):
        calls = 0
        while not stop.is_set() or calls < 2:
            logits = call(model, inputs, name)
            if not torch.allclose(logits, expected[name], atol=1e-6):
                wrong.append(name)
            calls += 1
        return calls

    with ThreadPoolExecutor(2) as pool:
        servers = [pool.submit(serve, name) for name in ("one", "two")]
        try:
            for _ in range(3):
                model.load_adapter(more, "three")
                three = call(model, inputs, "three")
                model.delete_adapter("three")
        finally:
            stop.set()
        assert all(server.result() >= 2 for server in servers)
    assert not wrong
    assert not torch.allclose(three, expected["two"])


@pytest.mark.parametrize("how", ["set_adapter", "hotswap_adapter"])
def test_what_changes_a_model_for_everyone_does_so_layer_by_layer(served, how):
    model, inputs, expected, more = served
    swap = {
        "set_adapter": lambda: model.set_adapter("two"),
        "hotswap_adapter": lambda: hotswap_adapter(model, str(more), "one", torch_device="cpu"),
    }[how]
    handle = at_a_layer(model, 3, swap)
    between = call(model, inputs)
    handle.remove()
    after = call(model, inputs)
    assert not torch.allclose(between, expected["one"])  # which is why docs/serving.md asks for a lock
    assert not torch.allclose(between, after)


def attention():
    return nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, dropout=0.0), {"target_modules": ["self_attn"]}


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 16, 16))

    def forward(self, x):
        return torch.einsum("brc,ecd->brd", x, self.weight)


def experts():
    return nn.Sequential(Experts()), {"target_modules": [], "target_parameters": ["0.weight"]}


@pytest.mark.parametrize("make", [attention, experts])
def test_a_weight_that_is_exchanged_for_one_thread_is_not_met_by_another(make):
    torch.manual_seed(0)
    base, fields = make()
    model = get_peft_model(base, MaskConfig(candidates=None, target_sparsity=0.3, **fields), "one").eval()
    model.add_adapter("two", MaskConfig(candidates=None, target_sparsity=0.3, **fields))
    random_masks(model)
    model.set_adapter("one")
    layer = layers_of(model)[0]
    x = torch.randn(2, 4, 16)
    with torch.no_grad():
        expected = {"one": model(x)}
        with model.disable_adapter():
            expected["bare"] = model(x)
        parameters = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}
        main, second_is_inside, first_is_done = threading.get_ident(), threading.Event(), threading.Event()
        others = []

        def within(*_):  # the second would come in after the first, and leave after it
            if threading.get_ident() == main:
                others.append(pool.submit(call_again))
                second_is_inside.wait(0.5)
            else:
                second_is_inside.set()
                first_is_done.wait(30)

        def call_again():
            with torch.no_grad():
                return model(x)

        handle = layer.get_base_layer().register_forward_pre_hook(within)
        with ThreadPoolExecutor(1) as pool:
            torch.testing.assert_close(model(x), expected["one"])
            first_is_done.set()
            torch.testing.assert_close(others[0].result(30), expected["one"])
        handle.remove()
        for name, parameter in model.named_parameters():
            assert id(parameter) == parameters[name][0], name
            assert torch.equal(parameter, parameters[name][1]), name
        with model.disable_adapter():
            torch.testing.assert_close(model(x), expected["bare"])
