"""What a GPU does is held to what the CPU does. Skipped without one: `make gpu`."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from peft_mask import MaskConfig, create_mask_optimizer, use_triton
from peft_mask.layers.correction import correct, correct_reference, zeros_of
from peft_mask.scores.binarize import binarize_bernoulli, binarize_groups, binarize_topk
from peft_mask.scores.functional import masked_linear, masked_linear_reference
from peft_mask.scores.order import nth_lowest
from peft_mask.tensors.elements import put, take
from tests.scores.test_binarizers import BINARIZERS, layers, masked, mlp
from tests.served_models import served
from tests.tiny_models import tiny_inputs, tiny_model

pytestmark = pytest.mark.gpu

DEVICE = "cuda"


def train(model, steps=6):
    model.to(DEVICE).train()
    optimizer = create_mask_optimizer(model, mask_lr=0.01)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        x = torch.randn(16, 12, generator=generator).to(DEVICE)
        (model(x) - x[:, :8]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def bits(model, adapter="default"):
    return {name: layer.packed_mask(adapter).cpu() for name, layer in layers(model).items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scores_come_to_the_masks_of_the_cpu(dtype):
    scores = torch.randint(-9, 9, (64, 96)).to(dtype)  # with ties
    scores[0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    for rule in (
        lambda scores: binarize_topk(scores, 700),
        lambda scores: binarize_groups(scores[1:], 2, 4),
        lambda scores: binarize_groups(scores[1:], 10, 32),
        lambda scores: binarize_bernoulli(scores, key=3),
        lambda scores: nth_lowest(scores.view(-1), 900),
    ):
        there = rule(scores.to(DEVICE))
        assert there.device.type == DEVICE
        assert torch.equal(there.cpu(), rule(scores))


@pytest.mark.parametrize("transposed", [False, True])
def test_elements_are_read_and_written_where_the_cpu_does(transposed):
    base = torch.arange(24.0).view(4, 6)
    tensor = (base.t() if transposed else base).to(DEVICE)
    positions, new = torch.tensor([7, 0, 11]), torch.tensor([-1.0, -2.0, -3.0])
    expected = tensor.cpu().clone()
    assert torch.equal(take(tensor, positions.to(DEVICE)).cpu(), take(expected, positions))
    put(tensor, positions.to(DEVICE), new.to(DEVICE))
    put(expected, positions, new)
    assert torch.equal(tensor.cpu(), expected)


@pytest.mark.parametrize("candidates", [False, True])
def test_a_masked_layer_has_the_values_and_gradients_of_its_reference(candidates):
    x, weight = torch.randn(5, 12, device=DEVICE), torch.randn(8, 12, device=DEVICE)
    positions = torch.arange(0, 96, 3, device=DEVICE) if candidates else None
    scores = torch.randn(32 if candidates else 96, device=DEVICE).view(-1 if candidates else (8, 12))
    results = []
    for function in (masked_linear, masked_linear_reference):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, scores)]
        y = function(leaves[0], weight, leaves[1], None, None, positions)
        results.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
    for own, expected in zip(*results, strict=True):
        torch.testing.assert_close(own, expected)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.filterwarnings("ignore:every weight of")
@pytest.mark.parametrize("name", BINARIZERS)
def test_a_training_repeats_itself_and_its_file_is_read_on_a_cpu(name, tmp_path):
    fields = {"scores_dtype": "bfloat16"} if name == "topk" else {}
    model = train(masked(name, **fields))
    assert equal(bits(model), bits(train(masked(name, **fields))))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(mlp(), tmp_path)
    assert equal(bits(loaded), bits(model))
    x = torch.randn(3, 12)
    torch.testing.assert_close(loaded.eval()(x), model.eval()(x.to(DEVICE)).cpu())


def test_switching_restores_every_bit_at_the_same_addresses():
    model = train(masked("topk"))
    model.add_adapter("b", MaskConfig(target_modules=["0", "2"], init_weights=False, target_sparsity=0.05))
    model.to(DEVICE)
    weights = {name: layer.base_layer.weight for name, layer in layers(model).items()}
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    for adapter in ("b", "default", "b"):
        model.base_model.switch_adapter(adapter)
        for name, layer in layers(model).items():
            assert torch.equal(weights[name], torch.where(layer.mask(adapter), before[name], 0))
            assert layer.base_layer.weight.data_ptr() == weights[name].data_ptr()
    model.base_model.switch_adapter(None)
    assert equal({name: weight.detach() for name, weight in weights.items()}, before)


def test_a_captured_graph_serves_whichever_adapter_is_merged():
    model = train(masked("topk")).eval()
    model.add_adapter("b", MaskConfig(target_modules=["0", "2"], init_weights=False, target_sparsity=0.05))
    model.to(DEVICE)
    model.base_model.switch_adapter("default")
    x = torch.randn(4, 12, device=DEVICE)
    with torch.inference_mode():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            model(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = model(x)
        for adapter in ("b", "default", None, "b"):
            model.base_model.switch_adapter(adapter)
            graph.replay()
            torch.testing.assert_close(y, model(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["topk", "threshold", "bernoulli", "n:m"])
def test_a_step_does_not_wait_for_the_device(name):
    model = train(masked(name))
    x = torch.randn(16, 12, device=DEVICE)
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(x).square().mean().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.filterwarnings("ignore")  # of torch.compile
def test_a_compiled_model_is_not_compiled_again_for_another_adapter():
    model = train(masked("topk")).eval()
    model.add_adapter("b", MaskConfig(target_modules=["0", "2"], init_weights=False, target_sparsity=0.05))
    model.to(DEVICE)
    model.base_model.switch_adapter("default")
    torch._dynamo.reset()
    compiled = torch.compile(model.base_model.model, fullgraph=True)
    x = torch.randn(4, 12, device=DEVICE)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for adapter in ("default", "b", "default"):
            model.base_model.switch_adapter(adapter)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


def test_rows_of_a_mixed_batch_are_those_of_their_adapters_alone():
    model = get_peft_model(tiny_model("bert", "seq_cls"), MaskConfig(task_type="SEQ_CLS", init_weights=False))
    model.add_adapter("b", MaskConfig(task_type="SEQ_CLS", init_weights=False))
    model.to(DEVICE).eval()
    inputs = {name: tensor[:1].repeat(3, 1).to(DEVICE) for name, tensor in tiny_inputs(model).items()}
    names = ["b", "__base__", "default"]
    with torch.no_grad():
        mixed = model(**inputs, adapter_names=names).logits
        for row, name in enumerate(names):
            alone = model(**inputs, adapter_names=3 * [name]).logits
            torch.testing.assert_close(mixed[row], alone[row])
    assert len(mixed.unique(dim=0)) == 3


@pytest.fixture
def by_triton(monkeypatch):
    """What is called with correction by the Triton kernel; `.calls` counts them."""
    pytest.importorskip("triton", reason="triton is not installed, which CUDA builds of PyTorch for Linux bring along")
    from peft_mask.layers import correction_triton

    kernel = correction_triton.correction

    def counted(*args):
        call.calls += 1
        return kernel(*args)

    def call(function, *args, **kwargs):
        use_triton()
        try:
            return function(*args, **kwargs)
        finally:
            use_triton(False)

    call.calls = 0
    monkeypatch.setattr(correction_triton, "correction", counted)
    return call


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)],
    ids=str,
)
@pytest.mark.parametrize("sizes", [[1] * 5, [3, 20, 1, 33, 0], [100, 1]], ids=str)
@pytest.mark.parametrize("none", [0, 3])
def test_the_triton_kernel_corrects_as_bags_do_and_waits_for_nothing(dtype, tolerance, sizes, none, by_triton):
    weight = torch.randn(301, 700).to(DEVICE, dtype)
    share = torch.linspace(-0.02, 0.08, 301)[torch.randperm(301)].unsqueeze(1)  # some outputs have lost no weight
    off = torch.rand(len(sizes), 301, 700) < share
    zeros = [zeros_of(mask.view(-1).nonzero().squeeze(1).to(DEVICE), weight) for mask in off]
    x = torch.randn(sum(sizes) + none, 700).to(DEVICE, dtype)
    bags = correct(x, sizes, zeros)
    found = by_triton(correct, x, sizes, zeros)  # compiled
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = by_triton(correct, x, sizes, zeros)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert by_triton.calls == 2
    assert torch.equal(found, again)
    assert not torch.allclose(found[0], found[sizes[0]], atol=0.1), "answers of different adapters differ"
    torch.testing.assert_close(found, bags, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found, correct_reference(x, sizes, zeros), rtol=tolerance, atol=tolerance)
    assert not found[sum(sizes) :].any()


def test_rows_of_a_mixed_batch_are_the_same_by_triton(by_triton):
    model = served(tiny_model("bert", "seq_cls"), task_type="SEQ_CLS").to(DEVICE)
    inputs = {name: tensor[:1].repeat(3, 1).to(DEVICE) for name, tensor in tiny_inputs(model).items()}
    names = ["two", "__base__", "one"]
    with torch.no_grad():
        bags = model(**inputs, adapter_names=names).logits
        found = by_triton(model, **inputs, adapter_names=names).logits
    assert by_triton.calls
    torch.testing.assert_close(found, bags, rtol=1e-4, atol=1e-5)
    assert len(found.unique(dim=0)) == 3


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_base_in_four_bits_is_trained_on_and_merged_into_its_codes(kind):
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    torch.manual_seed(0)
    first, relu, second = nn.Linear(128, 96), nn.ReLU(), nn.Linear(96, 64)
    quantized = []
    for linear in (first, second):
        new = bnb.nn.Linear4bit(linear.in_features, linear.out_features, quant_type=kind, compute_dtype=torch.float32)
        new.load_state_dict(linear.state_dict())
        quantized.append(new.to(DEVICE))
    model = get_peft_model(
        nn.Sequential(quantized[0], relu, quantized[1]), MaskConfig(target_modules=["0", "2"], target_sparsity=0.05)
    )
    codes = [layer.weight.data.clone() for layer in quantized]
    optimizer = create_mask_optimizer(model)
    x = torch.randn(16, 128, device=DEVICE)
    for _ in range(3):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    masked = model(x)
    model.merge_adapter()
    assert not torch.equal(quantized[0].weight.data, codes[0])
    torch.testing.assert_close(model(x), masked)
    model.unmerge_adapter()
    assert all(torch.equal(layer.weight.data, code) for layer, code in zip(quantized, codes, strict=True))


def test_memory_follows_the_estimate():
    from benchmarks import step

    shape = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024}
    batch = (32, 64)

    def make(variant):
        return step.VARIANTS[variant](step.base_model(shape).to(DEVICE))

    step.peak_of_training("mask", make, batch, DEVICE)  # what cuBLAS takes for itself, once
    peak = step.peak_of_training("mask", make, batch, DEVICE)
    assert 0.6 < peak / step.estimated_bytes(shape, batch, "mask", torch.float32, False) < 1.2
