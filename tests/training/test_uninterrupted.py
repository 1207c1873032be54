"""Errors and Ctrl-C at any operation of a step: all is as before or after it."""

import copy
import os
import signal
import threading

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from peft_mask import MaskConfig, create_mask_optimizer
from peft_mask.training.uninterrupted import interrupted_afterwards


@pytest.fixture(autouse=True)
def ctrl_c_as_in_a_terminal():
    """A shell that starts something in the background lets it ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class At(TorchDispatchMode):
    """Does something before the n-th operation; counts them."""

    def __init__(self, number, act):
        super().__init__()
        self.number, self.act, self.count = number, act, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.count == self.number:
            self.act()
        self.count += 1
        return func(*args, **(kwargs or {}))


def fail():
    raise torch.OutOfMemoryError("none left")


def press_ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


def trained(**fields):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    config = MaskConfig(target_modules=["0", "2"], target_sparsity=0.05, init_weights=False, seed=0, **fields)
    model = get_peft_model(base, config)
    optimizer = create_mask_optimizer(model)
    step(model, optimizer)
    return model, optimizer


def backward(model):
    model(torch.arange(40.0).view(5, 8).sin()).square().sum().backward()


def step(model, optimizer):
    backward(model)
    optimizer.step()
    optimizer.zero_grad()


def everything(model, optimizer):
    """All values, and the optimizer's, as bytes."""
    values = [*model.state_dict().values()]
    for state in optimizer.state_dict()["state"].values():
        values += [state["step"], state["largest"]]
    return [value.detach().reshape(-1).view(torch.uint8).tolist() for value in values]


def operations(run):
    with At(-1, fail) as counted:
        run()
    return counted.count


@pytest.mark.parametrize("fields", [{}, {"scores_dtype": "bfloat16"}, {"candidates": None}])
def test_an_error_at_any_operation_leaves_all_as_before_or_after_the_step(fields):
    model, optimizer = trained(**fields)
    before = everything(model, optimizer)
    after_model, after_optimizer = trained(**fields)
    count = operations(lambda: step(after_model, after_optimizer))
    after = everything(after_model, after_optimizer)
    assert before != after
    seen = set()
    for number in range(count):
        model, optimizer = trained(**fields)
        with pytest.raises(torch.OutOfMemoryError), At(number, fail):
            step(model, optimizer)
        found = everything(model, optimizer)
        assert found in (before, after), number
        seen.add(found == after)
        if found == before:  # and the step can be taken again
            optimizer.zero_grad()
            step(model, optimizer)
            assert everything(model, optimizer) == after
    assert False in seen


@pytest.mark.parametrize("fields", [{}, {"scores_dtype": "bfloat16"}])
def test_ctrl_c_at_any_operation_of_the_optimizer_comes_when_the_step_is_done(fields):
    after_model, after_optimizer = trained(**fields)
    backward(after_model)
    count = operations(after_optimizer.step)
    after = everything(after_model, after_optimizer)
    seen = set()
    for number in range(count):
        model, optimizer = trained(**fields)
        backward(model)
        before = everything(model, optimizer)
        with pytest.raises(KeyboardInterrupt), At(number, press_ctrl_c):
            optimizer.step()
        found = everything(model, optimizer)
        assert found in (before, after), number
        seen.add(found == after)
    assert True in seen


def test_a_program_that_ignores_ctrl_c_or_runs_beside_the_main_thread_is_left_alone():
    handler = signal.getsignal(signal.SIGINT)
    done = []

    def beside():
        with interrupted_afterwards():
            done.append(signal.getsignal(signal.SIGINT) is handler)

    thread = threading.Thread(target=beside)
    thread.start()
    thread.join()
    assert done == [True]
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with interrupted_afterwards():
            press_ctrl_c()
    finally:
        signal.signal(signal.SIGINT, handler)


def test_ctrl_c_is_not_lost_in_an_error_that_comes_after_it():
    def fail_after_it():
        with interrupted_afterwards():
            press_ctrl_c()
            fail()

    with pytest.raises(KeyboardInterrupt):
        fail_after_it()


def test_the_handler_is_back_after_an_error():
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(ZeroDivisionError), interrupted_afterwards():
        1 / 0  # noqa: B018
    assert signal.getsignal(signal.SIGINT) is handler


def test_nothing_of_a_step_is_lost_when_a_state_is_copied():
    _, optimizer = trained()
    assert everything(nn.Module(), copy.deepcopy(optimizer)) == everything(nn.Module(), optimizer)
