"""A linear layer with a forward of its own is masked if it computes what nn.Linear does, and refused otherwise."""

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import nn

from peft_mask import MaskConfig
from peft_mask.layers.own_forward import computes_as_linear


class InItsOwnWords(nn.Linear):  # as Falcon's
    def forward(self, x):
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class Counted(nn.Linear):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class Router(nn.Linear):
    def forward(self, x):
        y = super().forward(x)
        return y.softmax(-1), y


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Clamped(nn.Linear):
    def forward(self, x):
        return super().forward(x.clamp(-50, 50))


class Upcast(nn.Linear):
    def forward(self, x):
        return F.linear(x.float(), self.weight.float(), self.bias.float())


class Noisy(nn.Linear):
    def forward(self, x):
        y = super().forward(x)
        return y + 0.01 * torch.randn_like(y) if self.training else y


class Optional(nn.Linear):
    def forward(self, x, scale=1.0):
        return scale * super().forward(x)


class Normalized(nn.Linear):
    def forward(self, x):
        return F.linear(x, F.normalize(self.weight), self.bias)


class Grouped(nn.Linear):
    def forward(self, x):
        return super().forward(x.view(-1, 4, 6).sum(1))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_same_function_in_other_words_is_masked(device, bias):
    for kind in (InItsOwnWords, Counted):
        assert computes_as_linear(kind(6, 4, bias=bias, device=device)), kind
        assert computes_as_linear(kind(6, 4, bias=bias, device=device, dtype=torch.bfloat16)), kind


@pytest.mark.parametrize("kind", [Router, Scaled, Clamped, Upcast, Noisy, Optional, Normalized, Grouped])
def test_another_function_is_refused_by_name(kind):
    assert not computes_as_linear(kind(6, 4).eval())
    with pytest.raises(ValueError, match=f"'0' of type {kind.__name__} .*: {kind.__name__} computes its output in its"):
        get_peft_model(nn.Sequential(kind(6, 4)), MaskConfig(target_modules=["0"]))


def test_a_weight_of_eight_bits_is_no_plain_one():
    layer = InItsOwnWords(6, 4)
    layer.weight = nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False)
    assert not computes_as_linear(layer)


def test_the_trial_leaves_layer_and_generator_alone():
    layer, noisy = Counted(6, 4), Noisy(6, 4)
    before, weight = torch.get_rng_state(), layer.weight
    computes_as_linear(layer)
    computes_as_linear(noisy)
    assert torch.equal(torch.get_rng_state(), before)
    assert layer.weight is weight
    assert layer.calls == 0
    assert (layer.in_features, layer.out_features, layer.training) == (6, 4, True)


def test_its_mask_computes_as_if_merged():
    base = nn.Sequential(InItsOwnWords(12, 8))
    model = get_peft_model(base, MaskConfig(target_modules=["0"], init_weights=False, target_sparsity=0.3)).eval()
    x = torch.randn(3, 12)
    masked = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), masked)
