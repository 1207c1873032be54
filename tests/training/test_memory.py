"""The estimate of training memory: exact where it counts, an upper bound of what a step really holds."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM
from transformers.integrations import replace_with_bnb_linear

from benchmarks.harness import peak_bytes
from peft_mask import MaskConfig, create_mask_optimizer, training_memory
from peft_mask.layers.mask_layer import MaskLayer
from peft_mask.training.memory import saved_bytes
from tests.tiny_models import tiny_inputs, tiny_model
from tests.versions import RUNS_ON_META


def mlp():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


class Named(nn.Module):
    """Takes its input by name, as transformers' models do."""

    def __init__(self):
        super().__init__()
        self.mlp = mlp()

    def forward(self, x):
        return self.mlp(x)


CONFIG = {"target_modules": ["mlp.0", "mlp.2"]}


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_every_part_is_counted(device):
    with torch.device(device):
        model, inputs = Named(), {"x": torch.zeros(10, 8)}
    memory = training_memory(model, MaskConfig(**CONFIG, candidates=0.25), inputs)
    weights, biases = 128 + 64, 16 + 4
    assert memory.parameters == 4 * (weights + biases)
    assert memory.scores == (4 + 4) * weights // 4
    assert memory.gradients == 4 * weights // 4
    assert memory.optimizer == 0
    values = 4 * 10 * (8 + 16)  # the input, and what ReLU and the second layer share
    assert memory.activations == values + 4 * (1 + 1), "with the position of the weight that each matrix has off"
    assert memory.transient == 4 * 128 + (4 + 2 * 4) * 32 + 2 * 4 * 10 * 16
    assert memory.total == sum(vars(memory).values())
    assert str(memory).endswith("total 0 MiB")


def test_dtypes_optimizers_and_dense_scores_change_what_they_should():
    with torch.device("meta"):
        model, inputs = Named(), {"x": torch.zeros(10, 8)}

    def memory(optimizer="sign", **fields):
        return training_memory(model, MaskConfig(**CONFIG, **fields), inputs, optimizer)

    assert memory(candidates=None).scores == 4 * 192
    assert memory(candidates=None, scores_dtype="bfloat16").scores == 2 * 192
    assert memory("adamw", candidates=None).optimizer == 8 * 192
    assert memory("adamw_8bit", candidates=None).optimizer == 2 * 192
    assert memory("adamw", candidates=None, scores_dtype="bfloat16").optimizer == 4 * 192
    assert memory(candidates=None).gradients == 4 * 192
    assert memory("sign_in_backward", candidates=None).gradients == 0
    values = 4 * 10 * (8 + 16)
    assert memory(candidates=None).activations == values + 4 * (1 + 1)
    assert memory(candidates=None, structure="row").activations == values + 16 // 8 + 1
    assert memory(candidates=None, binarizer="threshold").activations == values, "each score is compared again"


OFF_AT_ONCE = {"init_weights": False}  # a budget is spent before the first step


@pytest.mark.parametrize(
    "fields",
    [
        OFF_AT_ONCE,
        {"candidates": None, **OFF_AT_ONCE},
        {"candidates": None, "structure": "row"},
        {"candidates": None, "binarizer": "threshold"},
    ],
)
def test_masks_are_counted_where_autograd_keeps_them(fields):
    inputs = {"x": torch.zeros(10, 8)}
    expected = training_memory(Named(), MaskConfig(**CONFIG, **fields), inputs).activations
    model = get_peft_model(Named(), MaskConfig(**CONFIG, **fields))
    assert saved_bytes(model, inputs) == expected


def test_an_unknown_optimizer_is_refused():
    message = r"scores_optimizer must be one of \['sign', 'sign_in_backward', 'adamw', 'adamw_8bit'\], got 'adam'"
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        training_memory(Named(), MaskConfig(**CONFIG), {"x": torch.zeros(10, 8)}, "adam")


def test_the_model_is_left_as_it_was():
    model = tiny_model("bert")
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    training_memory(model, MaskConfig(task_type="SEQ_CLS"), tiny_inputs(model, labels=True))
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert not [module for module in model.modules() if isinstance(module, MaskLayer)]


@pytest.mark.parametrize("fields", [{}, {"candidates": None}, {"scores_dtype": "bfloat16"}])
def test_a_step_holds_no_more_than_the_estimate_and_not_much_less(fields):
    model, inputs, width = Named(), {"x": torch.randn(256, 512)}, 512
    model.mlp = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
    memory = training_memory(model, MaskConfig(**CONFIG, **fields), inputs)
    model = get_peft_model(model, MaskConfig(**CONFIG, **fields))
    optimizer = create_mask_optimizer(model)

    def step():
        model(**inputs).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    expected = memory.total - memory.parameters - memory.scores - inputs["x"].nbytes
    assert 0.6 * expected < peak_bytes(step) < 1.2 * expected


def transformer(family, device):
    with torch.device(device):
        model = tiny_model(family, "lm" if family == "llama" else "seq_cls").to(device).train()
        inputs = {name: tensor.to(device) for name, tensor in tiny_inputs(model, 32, 60, labels=True).items()}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model, inputs


def task(family):
    return MaskConfig(task_type="CAUSAL_LM" if family == "llama" else "SEQ_CLS")


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_step_with_checkpointing_holds_no_more_than_the_estimate_and_not_much_less(family):
    model, inputs = transformer(family, "cpu")
    plain = training_memory(model, task(family), inputs)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    memory = training_memory(model, task(family), inputs)
    assert memory.activations < 0.75 * plain.activations  # of two blocks
    assert vars(memory) | {"activations": 0} == vars(plain) | {"activations": 0}
    model = get_peft_model(model, task(family))
    optimizer = create_mask_optimizer(model)

    def step():
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    expected = memory.total - memory.parameters - memory.scores
    assert 0.75 * expected < peak_bytes(step) < 1.1 * expected


@pytest.mark.skipif(not RUNS_ON_META, reason="this transformers' Llama does not run without weights")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_attention_masks_and_checkpointing_are_counted_without_weights(family, checkpointing):
    found = {}
    for device in ("cpu", "meta"):
        model, inputs = transformer(family, device)
        if checkpointing:
            model.gradient_checkpointing_enable()
        found[device] = training_memory(model, task(family), inputs)
        del inputs["attention_mask"]
        assert training_memory(model, task(family), inputs).activations <= found[device].activations
    # without a device's own kernels attention keeps its probabilities
    blocks = 1 if checkpointing else 2
    probabilities = 4 * 32 * 2 * 60 * 60 * blocks
    assert 0.9 * probabilities < found["meta"].activations - found["cpu"].activations < 1.5 * probabilities


def test_checkpointed_blocks_are_left_as_they_were():
    model, inputs = transformer("bert", "cpu")
    model.gradient_checkpointing_enable()
    model.eval()
    layer = model.bert.encoder.layer[0]
    before = layer._gradient_checkpointing_func
    assert training_memory(model, task("bert"), inputs).activations > 0
    assert layer._gradient_checkpointing_func is before
    assert not any(module.training for module in model.modules())


def test_a_number_that_only_values_tell_is_asked_for_in_vain():
    class Counts(Named):
        def forward(self, x):
            return self.mlp(x) * x.sum().item()

    with torch.device("meta"), pytest.raises(RuntimeError, match=r"item\(\) cannot be called on meta tensors"):
        training_memory(Counts(), MaskConfig(**CONFIG), {"x": torch.zeros(10, 8)})


def test_steps_within_the_backward_pass_hold_one_gradient_at_a_time():
    width, layers = 256, 24
    peaks = {}
    for in_backward in (False, True):
        base = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))
        config = MaskConfig(target_modules=[str(i) for i in range(layers)], candidates=None)
        model, x = get_peft_model(base, config), torch.randn(4, width)
        optimizer = create_mask_optimizer(model)
        if in_backward:
            optimizer.step_in_backward()

        def step(model=model, optimizer=optimizer, x=x):
            model(x).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

        step()
        peaks[in_backward] = peak_bytes(step)
    gradient = 4 * width**2
    assert peaks[False] > layers * gradient
    assert peaks[True] < layers / 2 * gradient  # one, and a few tensors of its size that any step makes


@pytest.mark.skipif(not RUNS_ON_META, reason="this transformers' Llama does not run without weights")
def test_a_seven_billion_parameter_llama_is_counted_without_having_one():
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(dtype="bfloat16")).to(torch.bfloat16)
        inputs = {"input_ids": torch.zeros(1, 64, dtype=torch.long)}
    memory = training_memory(model, MaskConfig(), inputs)
    masked = sum(m.weight.numel() for name, m in model.model.named_modules() if isinstance(m, nn.Linear))
    assert memory.scores == pytest.approx(0.8 * masked, rel=1e-3)
    assert memory.scores + memory.gradients < memory.parameters


def test_what_autograd_keeps_is_counted_once():
    x = torch.randn(10, 8, requires_grad=True)
    layer = nn.Linear(8, 3)

    class Twice(nn.Module):
        def forward(self, x):
            return layer(x) + (x * x).sum()

    assert saved_bytes(Twice(), {"x": x}) == x.nbytes + layer.weight.nbytes  # `layer` is not this model's own


def in_four_bits(model, device):
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    kind = {"quant_type": "nf4", "compress_statistics": True}
    for name, module in list(model.model.named_modules()):
        if isinstance(module, nn.Linear):
            shape = module.in_features, module.out_features
            layer = bnb.nn.Linear4bit(*shape, False, torch.bfloat16, device="meta", **kind)
            if device != "meta":
                layer.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, **kind).to(device)
            model.model.set_submodule(name, layer)
    return model


def small_llama(device, dtype=torch.bfloat16, **fields):
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    with torch.device(device):
        return LlamaForCausalLM(LlamaConfig(**shape, vocab_size=100, **fields)).to(dtype).train()


def ids(device, tokens=64):
    rows = torch.ones(1, tokens, dtype=torch.long, device=device)
    return {"input_ids": rows, "labels": rows}


@pytest.mark.skipif(not RUNS_ON_META, reason="this transformers' Llama does not run without weights")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_base_in_four_bits_is_counted_with_and_without_weights(checkpointing):
    found = {}
    for device in ("cpu", "meta"):
        model = in_four_bits(small_llama(device, attn_implementation="eager"), device)
        if checkpointing:
            model.gradient_checkpointing_enable()
        found[device] = training_memory(model, MaskConfig(), ids(device))
        layer = model.model.layers[0].mlp.up_proj
        assert "forward" not in vars(layer)
        assert (layer.weight.quant_state is None) == (device == "meta")
    # what a causal mask is made of is kept by one of them and not by the other
    assert vars(found["meta"]) == pytest.approx(vars(found["cpu"]), rel=0.02)
    assert found["meta"].parameters == found["cpu"].parameters
    dense = small_llama("meta", attn_implementation="eager")
    if checkpointing:
        dense.gradient_checkpointing_enable()
    plain = training_memory(dense, MaskConfig(), ids("meta"))
    masked = 2 * (4 * 64 * 64 + 3 * 64 * 128)
    memory = found["meta"]
    assert plain.parameters - memory.parameters == pytest.approx((2 - 0.5 - 1 / 64) * masked, rel=0.15)  # with tables
    assert plain.scores - memory.scores == pytest.approx(0.3 * masked, rel=0.05)  # positions in a byte each
    assert memory.activations == plain.activations, "the inputs of layers, and no dequantized weight"


@pytest.mark.skipif(not RUNS_ON_META, reason="this transformers' Llama does not run without weights")
def test_what_transformers_makes_of_a_model_is_counted_as_quantized():
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = replace_with_bnb_linear(small_llama("meta"), ["lm_head"], quantization)
    by_hand = in_four_bits(small_llama("meta"), "meta")
    assert training_memory(model, MaskConfig(), ids("meta")) == training_memory(by_hand, MaskConfig(), ids("meta"))


@pytest.mark.skipif(not RUNS_ON_META, reason="this transformers' Llama does not run without weights")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_attention_in_16_bits_keeps_no_probabilities_without_weights(dtype):
    model = small_llama("meta", dtype)
    short, long, longer = (training_memory(model, MaskConfig(), ids("meta", n)).activations for n in (256, 512, 768))
    curved = (longer - long) - (long - short)
    assert (curved == 0) == (dtype == torch.bfloat16)


@pytest.mark.skipif(not RUNS_ON_META, reason="this transformers' Llama does not run without weights")
def test_fused_attention_keeps_what_a_kernel_of_torch_keeps():
    class Attention(nn.Module):
        def forward(self, q, k, v):
            return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    kept = {}
    for device in ("cpu", "meta"):
        given = {n: torch.zeros(1, 4, 96, 16, dtype=torch.bfloat16, device=device, requires_grad=True) for n in "qkv"}
        kept[device] = saved_bytes(Attention(), given)
    assert kept["meta"] == kept["cpu"] == 4 * (2 * 4 * 96 * 16) + 4 * 4 * 96
