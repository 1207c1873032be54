from contextlib import suppress
from unittest.mock import patch

import torch
from peft import get_peft_model
from torch import nn

from peft_mask import (
    DecayTowardKept,
    GradientDropout,
    HoldSparsity,
    MaskConfig,
    Masks,
    MaskStatistics,
    SparsityPenalty,
    create_mask_optimizer,
    fill_budget,
    hold_zeros,
    keep_scores,
    saliency_candidates,
    spend_budget,
)
from peft_mask.layers import ahead
from peft_mask.scores.binarize import binarize_topk
from peft_mask.scores.off import off_positions_of_all
from tests.simulated_device.models import base, batch, bits, layers, masked, numbers, on_the_device, train
from tests.simulated_device.scenarios import scenario


def trained(name, family="bert", dtype=torch.float32, autocast=False, **fields):
    """Add a scenario: a training with these settings."""

    def run(device, folder):
        model = masked(device, family, dtype, **fields)
        train(model, device, autocast=autocast)
        return bits(model)

    run.__name__ = f"train_{name}"
    scenario(run)


ALL = {"candidates": None}
trained("topk")
trained("topk_of_all", **ALL)
trained("rows", structure="row", **ALL)
trained("threshold", binarizer="threshold", **ALL)
trained("sign", binarizer="sign", **ALL)
trained("bernoulli", binarizer="bernoulli", **ALL)
trained("n_of_m", binarizer="n:m", **ALL)
trained("magnitude_start", binarizer="threshold", init_weights="magnitude", **ALL)
trained("double_uniform_start", binarizer="threshold", init_weights="double_uniform", init_sparsity=0.1, **ALL)
trained("random_candidates_and_biases", candidate_rule="random", mask_biases=True)
trained("embedding", target_modules=["word_embeddings", "query"])
trained("conv1d", family="gpt2")
trained("bfloat16_scores", scores_dtype="bfloat16")
trained("autocast", autocast=True)


@scenario
def train_wrapped_on_the_cpu_and_moved(device, folder):
    model = masked("cpu").to(device)
    train(model, device)
    for layer in layers(model).values():  # of which torch.compile computes masks
        assert layer.rule("default").budget.tensor.device == layer.peft_mask_scores["default"].device
    return bits(model)


@scenario
def train_bfloat16_base_with_checkpointing(device, folder):
    model = masked(device, "llama", torch.bfloat16)
    model.get_base_model().gradient_checkpointing_enable()
    model.enable_input_require_grads()
    train(model, device)
    return bits(model)


@scenario
def train_with_steps_in_the_backward_pass(device, folder):
    model = masked(device, scores_dtype="bfloat16")
    optimizer = create_mask_optimizer(model)
    optimizer.step_in_backward()
    train(model, device, optimizer)
    return bits(model)


@scenario
def train_the_papers_way_with_a_masked_head(device, folder):
    model = get_peft_model(base(device), MaskConfig.paper(task_type="SEQ_CLS", seed=0))
    train(model, device)
    return bits(model)


@scenario
def train_attention(device, folder):
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True).to(device)
    model = get_peft_model(encoder, MaskConfig(target_modules=["self_attn"], seed=0))
    train(model, device, inputs=numbers(device, 2, 5, 16))
    model.merge_adapter()
    model.unmerge_adapter()
    return bits(model)


@scenario
def train_convolution(device, folder):
    torch.manual_seed(0)
    stack = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).to(device)
    model = get_peft_model(stack, MaskConfig(target_modules=["0", "2"], seed=0))
    train(model, device, inputs=numbers(device, 2, 3, 9, 9))
    return bits(model)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 16, 8))

    def forward(self, x):
        return torch.einsum("bi,eij->bj", x, self.gate_up_proj)


@scenario
def train_stacked_experts(device, folder):
    torch.manual_seed(0)
    stack = nn.Sequential(nn.Linear(8, 16), Experts()).to(device)
    fields = {"target_modules": ["0"], "target_parameters": ["1.gate_up_proj"]}
    model = get_peft_model(stack, MaskConfig(**fields, seed=0))
    train(model, device, inputs=numbers(device, 2, 8))
    return bits(model)


@scenario
def train_two_adapters_at_once(device, folder):
    torch.manual_seed(0)
    fields = {"target_modules": ["0", "2"]}
    mlp = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 8)).to(device)
    model = get_peft_model(mlp, MaskConfig(**fields, seed=0))
    model.add_adapter("b", MaskConfig(**fields, seed=1))
    model.base_model.set_adapter(["default", "b"])
    train(model, device, inputs=numbers(device, 6, 12))
    return bits(model), bits(model, "b")


@scenario
def an_error_while_masks_are_found(device, folder):
    """What was found for a forward pass that failed is not taken for the masks of a later one."""
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 8))
    config = MaskConfig(target_modules=["0", "2"], target_sparsity=0.05, init_weights=False, seed=0)
    model = get_peft_model(mlp, config).to(device)
    found = iter([off_positions_of_all])  # for the first of two shapes

    def none_left(*args):
        if find := next(found, None):
            return find(*args)
        raise torch.OutOfMemoryError("none left")

    with suppress(torch.OutOfMemoryError), patch.object(ahead, "off_positions_of_all", none_left):
        model(numbers(device, 6, 12))
    with torch.no_grad():
        for layer in layers(model).values():
            layer.peft_mask_scores["default"].data.neg_()
        return {name: layer.masked_weight(["default"]).cpu() for name, layer in layers(model).items()}


@scenario
def statistics_and_budgets(device, folder):
    model = masked(device, target_bytes=3000)
    statistics = MaskStatistics(model)
    spend_budget(model, 0.5)
    train(model, device)
    figures = statistics(model)
    spend_budget(model, 1.0)
    fill_budget(model)
    filled = bits(model)
    model.base_model.set_target_sparsity(0.002)
    return figures, filled, bits(model)


@scenario
def budgets_that_are_read_or_not(device, folder):
    scores = numbers(device, 40, 30).mul(3).round()  # with ties
    masks = [binarize_topk(scores, zeros) for zeros in (1, 7, 200)]
    masks += [binarize_topk(scores, torch.full((), zeros, device=device), most=200) for zeros in (1, 7, 200)]
    assert all(torch.equal(a, b) for a, b in zip(masks[:3], masks[3:], strict=True))
    return masks


@scenario
def controls(device, folder):
    """Of linear layers alone: what is dropped follows from the last bits of scores, and a norm's differ by device."""
    linear = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).to(device)
    model = get_peft_model(linear, MaskConfig(target_modules=["0", "2"], binarizer="threshold", seed=0))
    before = [SparsityPenalty(0.03), GradientDropout(0.1)]
    after = [DecayTowardKept(0.01), HoldSparsity(0.03)]
    train(model, device, before=before, after=after, inputs=numbers(device, 4, 16))
    return bits(model)


@scenario
def candidates_and_scores_from_either_device(device, folder):
    model = masked(device)
    inputs = batch(model, device)
    chosen = saliency_candidates(model, [inputs, inputs], lambda given: model(**given).loss)
    model.base_model.set_candidates(chosen)
    model.base_model.set_candidates({name: positions.cpu() for name, positions in chosen.items()})
    train(model, device)
    model.base_model.set_scores(lambda name, weight: weight)
    own = {name.removeprefix("base_model.model."): layer for name, layer in layers(model).items()}
    model.base_model.set_scores(
        {name: layer.peft_mask_scores["default"].detach().cpu() * 2 for name, layer in own.items()}
    )
    train(model, device)
    return bits(model)


@scenario
def resume_with_the_optimizers_state(device, folder):
    """Of several processes each loads the state to its device, `step` included."""
    model = masked(device, scores_dtype="bfloat16")
    optimizer = train(model, device)
    optimizer.load_state_dict(on_the_device(optimizer.state_dict(), device))
    train(model, device, optimizer)
    return bits(model)


@scenario
def resume_training_from_a_checkpoint(device, folder):
    """What `Trainer` does on resume: `load_adapter` reads the file to the device that there is."""
    model = masked(device)
    train(model, device)
    keep_scores(model)
    model.save_pretrained(folder)
    again = masked(device)
    again.load_adapter(folder, "default", is_trainable=True, torch_device=device)
    train(again, device)
    return bits(again)


@scenario
def load_the_best_model_at_the_end(device, folder):
    """What `Trainer` does at the end: the best checkpoint, with its scores, into the adapter that was trained."""
    model = masked(device)
    train(model, device)
    keep_scores(model)
    model.save_pretrained(folder)
    train(model, device)
    model.load_adapter(folder, "default", torch_device=device)
    return bits(model)


@scenario
def tune_what_a_mask_keeps(device, folder):
    model = masked(device)
    train(model, device)
    model.save_pretrained(folder)
    merged = model.merge_and_unload().requires_grad_()
    hold_zeros(merged, Masks.load(folder))
    optimizer = torch.optim.AdamW(merged.parameters(), lr=1e-3)
    for _ in range(2):
        merged(**batch(merged, device)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return [int((p == 0).sum()) for name, p in merged.named_parameters() if name.endswith("query.weight")]


@scenario
def train_on_two_devices(device, folder):
    """A model whose layers lie on two devices, as `device_map="auto"` places them."""
    second = f"{device}:1" if device != "cpu" else device

    class Split(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(24, 32).to(device), nn.Linear(32, 8).to(second)

        def forward(self, x):
            return self.b(self.a(x).relu().to(second))

    masks = []
    x = numbers(device, 6, 24)
    for fields, before, after in (
        ({}, [GradientDropout(0.1)], []),
        ({"binarizer": "threshold"}, [SparsityPenalty(0.03)], [DecayTowardKept(0.01), HoldSparsity(0.03)]),
    ):
        torch.manual_seed(0)
        model = get_peft_model(Split(), MaskConfig(target_modules=["a", "b"], seed=0, **fields))
        statistics = MaskStatistics(model)
        train(model, device, before=before, after=after, inputs=x)
        masks += [statistics(model), bits(model)]
        if not fields:
            chosen = saliency_candidates(model, [x], lambda given, model=model: model(given).square().mean())
            model.base_model.set_candidates(chosen)
        model.save_pretrained(folder)
        for name in ("default", None):
            model.base_model.switch_adapter(name)
            model(x)
    return masks
