"""torch.compile: one graph, compiled once, for inference, training and switching."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from peft_mask import MaskConfig, create_mask_optimizer, spend_budget
from tests.served_models import served
from tests.tiny_models import tiny_inputs, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch.compile

CONFIG = {"task_type": "SEQ_CLS", "target_sparsity": 0.1, "candidates": 0.5, "init_weights": False}


class Compiled:
    """A model in one graph, and how often it was compiled."""

    def __init__(self, model):
        torch._dynamo.reset()
        self.compilations = 0
        # transformers finds this out in the first forward pass with labels, and would be compiled again for it
        model.config.problem_type = "single_label_classification"
        self.model = torch.compile(model, fullgraph=True, backend=self._backend)

    def _backend(self, graph, example_inputs):
        self.compilations += 1
        return graph.forward

    def __call__(self, **inputs):
        return self.model(**inputs)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        *(
            pytest.param(fields, marks=pytest.mark.slow)
            for fields in ({"candidates": None}, {"scores_dtype": "bfloat16"})
        ),
    ],
    ids=str,
)
def test_training_steps_run_in_one_graph(fields):
    def trained(compiled):
        torch.manual_seed(0)
        model = get_peft_model(tiny_model("bert"), MaskConfig(**(CONFIG | fields), seed=0)).train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        optimizer = create_mask_optimizer(model)
        forward = Compiled(model.base_model.model) if compiled else model
        inputs = tiny_inputs(model.get_base_model(), labels=True)
        losses = []
        for _ in range(3):
            loss = forward(**inputs).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        if compiled:
            assert forward.compilations == 1
        return losses, {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    losses, parameters = trained(compiled=True)
    expected_losses, expected = trained(compiled=False)
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    assert len(set(losses)) == 3
    for name, value in parameters.items():
        torch.testing.assert_close(value, expected[name])


def test_merged_adapters_are_switched_without_compiling_again(tmp_path):
    fields = {**CONFIG, "task_type": None}  # a head of each adapter's own would be PEFT's to switch, by name
    for seed in range(3):
        get_peft_model(tiny_model("bert", "base"), MaskConfig(**fields, seed=seed)).save_pretrained(
            tmp_path / f"{seed}"
        )
    model = PeftModel.from_pretrained(tiny_model("bert", "base"), tmp_path / "0", adapter_name="zero")
    model.load_adapter(tmp_path / "1", "one")
    model.load_adapter(tmp_path / "2", "two")
    inputs = tiny_inputs(model.get_base_model())
    compiled = Compiled(model.base_model.model)
    logits = {}
    with torch.no_grad():
        for name in ("zero", "one", "two", "zero", "one"):
            model.base_model.switch_adapter(name)
            torch.testing.assert_close(compiled(**inputs).last_hidden_state, model(**inputs).last_hidden_state)
            logits[name] = model(**inputs).last_hidden_state
    assert compiled.compilations == 1
    assert not torch.equal(logits["zero"], logits["one"])


@pytest.mark.slow
def test_a_compiled_peft_model_takes_adapters_as_it_takes_inputs():
    model = get_peft_model(tiny_model("bert"), MaskConfig(**CONFIG)).eval()
    inputs = tiny_inputs(model.get_base_model())
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits)
        with model.disable_adapter():
            torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize(
    "fields", [{}, pytest.param({"structure": "row", "candidates": None}, marks=pytest.mark.slow)], ids=str
)
def test_a_budget_that_grows_is_compiled_once(fields):
    steps = 12  # more than dynamo compiles one function for

    def losses(compiled):
        torch.manual_seed(0)
        model = get_peft_model(tiny_model("bert"), MaskConfig(**(CONFIG | fields), seed=0)).train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        optimizer = create_mask_optimizer(model)
        forward = Compiled(model.base_model.model) if compiled else model
        inputs = tiny_inputs(model.get_base_model(), labels=True)
        for step in range(steps):
            spend_budget(model, (step + 1) / steps)
            loss = forward(**inputs).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            yield loss.item()
        if compiled:
            assert forward.compilations == 1

    found, expected = list(losses(compiled=True)), list(losses(compiled=False))
    assert found == pytest.approx(expected, rel=1e-5)
    assert len(set(found)) == steps


@pytest.mark.slow
def test_a_budget_is_compiled_for_anew_only_where_it_was_never_as_large():
    model = get_peft_model(tiny_model("bert"), MaskConfig(**CONFIG, seed=0)).eval()
    inputs = tiny_inputs(model.get_base_model())
    compiled = Compiled(model.base_model.model)
    with torch.no_grad():
        for sparsity, compilations in ((0.1, 1), (0.02, 1), (0.06, 1), (0.2, 2), (0.05, 2)):
            model.base_model.set_target_sparsity(sparsity)
            torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits)
            assert compiled.compilations == compilations


def test_a_trace_of_masks_is_refused_and_one_of_merged_weights_right():
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 4)), MaskConfig(target_modules=["0"])).eval()
    x = torch.randn(3, 8)
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace cannot record how a mask is made: merge it first"):
        torch.jit.trace(model, x)
    expected = model(x)
    assert torch.equal(torch.export.export(model, (x,)).module()(x), expected)
    model.merge_adapter()
    assert torch.equal(torch.jit.trace(model, x)(x), expected)


class Reads(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(8, 8)
        self.attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, torch.nn.functional.linear(x, self.layer.weight))[0]


def test_a_weight_that_is_read_breaks_no_graph():
    model = get_peft_model(Reads(), MaskConfig(target_modules=["layer", "attention"], init_weights=False)).eval()
    assert torch._dynamo.explain(model.base_model.model)(torch.randn(1, 3, 8)).graph_break_count == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "equal"),
    [({}, 1.0), ({"binarizer": "threshold"}, 1.0), ({"gradient_tokens": 0.5}, 0.8)],  # last bits tell what is drawn
    ids=str,
)
def test_torchs_own_compiler_trains_what_is_trained_without_it(fields, equal):
    """Other tests stop where operations are known; here they become code."""

    def trained(compiled):
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 8))
        model = get_peft_model(base, MaskConfig(target_modules=["0", "2"], seed=0, **fields))
        optimizer = create_mask_optimizer(model)
        forward = torch.compile(model, fullgraph=True) if compiled else model
        torch._dynamo.reset()
        for _ in range(3):
            forward(torch.arange(9600.0).view(600, 16).sin()).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return [p.detach() for name, p in model.named_parameters() if "scores" in name]

    pairs = zip(trained(True), trained(False), strict=True)
    found = torch.cat([torch.isclose(*pair, rtol=1e-5, atol=1e-6) for pair in pairs])
    assert found.float().mean() >= equal


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_batches_of_several_adapters_run_in_one_graph_whatever_their_mixture(family):
    model = served(tiny_model(family, "base"))
    inputs = {name: torch.cat([tensor] * 2)[:3] for name, tensor in tiny_inputs(model.get_base_model()).items()}
    mixtures = [["one", "two", "__base__"], ["two", "two", "one"], ["one"] * 3, ["__base__"] * 3]

    def output(**kwargs):
        with torch.no_grad():
            return model(**inputs, **kwargs).last_hidden_state

    expected = [output(adapter_names=names) for names in mixtures]
    assert not torch.allclose(expected[0], expected[1], atol=1e-3)
    active = output()
    compilations = []
    model.get_base_model().compile(fullgraph=True, backend=lambda graph, _: (compilations.append(1), graph.forward)[1])
    for names, logits in zip(mixtures, expected, strict=True):
        torch.testing.assert_close(output(adapter_names=names), logits)
        assert len(compilations) == 1
    torch.testing.assert_close(output(), active)  # this is another graph
    torch.testing.assert_close(output(adapter_names=mixtures[0]), expected[0])
    assert len(compilations) == 2


def test_a_compiled_layer_knows_its_copy_from_itself():
    model = served(torch.nn.Sequential(torch.nn.Linear(8, 8)), target_modules=["0"])
    x = torch.randn(2, 8)
    with torch.no_grad():
        model(x, adapter_names=["one", "two"])
        other = copy.deepcopy(model)
        other.base_model.model[0].base_layer.weight.mul_(2)
        expected = [each(x, adapter_names=["one", "two"]) for each in (model, other)]
        for each in (model, other):
            each.get_base_model().compile(fullgraph=True, backend="aot_eager")
        found = [each(x, adapter_names=["one", "two"]) for each in (model, other)]
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(*expected)


def test_compiled_batches_have_gradients_and_autocast():
    model = served(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 4)), target_modules=["0", "1"])
    x = torch.randn(2, 8)

    def found():
        leaf = x.clone().requires_grad_()
        model(leaf, adapter_names=["one", "two"]).square().sum().backward()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return leaf.grad, model(x, adapter_names=["one", "two"])

    expected = found()
    model.get_base_model().compile(backend="eager")
    torch.testing.assert_close(found(), expected)


@pytest.mark.parametrize("trained", ["weight", "bias"])
def test_compiled_batches_have_gradients_of_what_is_trained_of_the_base(trained):
    model = served(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 4)), target_modules=["0", "1"])
    parameter = getattr(model.base_model.model[1].base_layer, trained).requires_grad_()
    x = torch.randn(2, 8)

    def found():
        parameter.grad = None
        model(x, adapter_names=["one", "two"]).square().sum().backward()
        return parameter.grad

    expected = found()
    model.get_base_model().compile(backend="eager")
    torch.testing.assert_close(found(), expected)


def test_a_trace_of_rows_of_several_adapters_is_refused():
    model = served(torch.nn.Sequential(torch.nn.Linear(8, 4)), target_modules=["0"])
    x = torch.randn(2, 8)
    with (
        model.base_model._enable_peft_forward_hooks(adapter_names=["one", "two"]),
        pytest.raises(RuntimeError, match=r"torch\.jit\.trace cannot record how a mask is made: merge it first"),
    ):
        torch.jit.trace(model.get_base_model(), x)
