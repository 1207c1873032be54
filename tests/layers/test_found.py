"""What a layer knows of its mask from one pass to the next: enough for the backward pass, and nothing beyond it."""

import copy
import pickle

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from peft_mask import MaskConfig
from peft_mask.scores import rules


class Blocks(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.reentrant = reentrant
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        for layer in (self.first, self.second):
            x = layer(x) if self.reentrant is None else checkpoint(layer, x, use_reentrant=self.reentrant)
        return x


def masked(reentrant=None, **fields):
    torch.manual_seed(0)
    config = MaskConfig(target_modules=["first", "second"], target_sparsity=0.05, init_weights=False, seed=0, **fields)
    return get_peft_model(Blocks(reentrant), config)


@pytest.fixture
def searches(monkeypatch):
    """How often positions were looked for."""
    calls = []
    find = rules.off_positions
    monkeypatch.setattr(rules, "off_positions", lambda *args: calls.append(args) or find(*args))
    return calls


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_a_step_looks_for_them_once_a_matrix_whether_checkpointed_or_not(searches, reentrant):
    model = masked(reentrant)
    for step in (1, 2):
        model(torch.ones(3, 8, requires_grad=True)).square().sum().backward()
        assert len(searches) == 2 * step


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_forward_pass_that_runs_again_has_the_mask_of_the_first_time(reentrant):
    """Scores that are changed in between, as by steps within the backward pass, are those of the next batch."""
    gradients = []
    for change in (False, True):
        model = masked(reentrant)
        x = torch.ones(3, 8, requires_grad=True)
        loss = model(x).square().sum()
        if change:
            for name, scores in model.named_parameters():
                if "peft_mask_scores" in name:
                    scores.data.neg_()
        loss.backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


def write_past_autograd(scores):
    scores.data.copy_(-scores)


def write_in_place(scores):
    with torch.no_grad():
        scores.neg_()


def write_by_numpy(scores):
    scores.detach().numpy()[:] *= -1


@pytest.mark.parametrize("write", [write_past_autograd, write_in_place, write_by_numpy])
@pytest.mark.parametrize("training", [True, False])
def test_scores_count_from_the_next_forward_pass_on_however_they_were_written(write, training):
    model, x = masked().train(training), torch.ones(3, 8)
    before = model(x)
    for name, scores in model.named_parameters():
        if "peft_mask_scores" in name:
            write(scores)
    after = model(x)
    model.merge_adapter()
    assert torch.equal(model(x), after)
    assert not torch.equal(after, before)


def test_nothing_of_it_is_copied_or_pickled():
    model = masked()
    model(torch.ones(3, 8))
    found = model.base_model.model.first.found
    assert found.__dict__["_off"]
    for other in (copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        assert not other.__dict__["_off"]


def test_a_model_that_is_moved_forgets_it():
    model = masked()
    model(torch.ones(3, 8))
    model.double()
    assert not model.base_model.model.first.found.__dict__["_off"]


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # in an evaluation none has
@pytest.mark.parametrize("reentrant", [False, True])
def test_an_evaluation_in_inference_mode_before_the_backward_pass_does_no_harm(reentrant):
    gradients = []
    for evaluated in (False, True):
        model, x = masked(reentrant), torch.ones(3, 8, requires_grad=True)
        loss = model(x).square().sum()
        if evaluated:
            with torch.inference_mode():
                model(x)
        loss.backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)
