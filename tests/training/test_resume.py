"""A training that was interrupted ends as the one that was not."""

import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from attacks import resume
from attacks.resume import CASES, STEPS, differences, model_to_train, rows, train
from peft_mask import MaskStatistics, SparsitySchedule, create_mask_optimizer, spend_budget


class Interrupt(TrainerCallback):
    """Stops at an event of a step, as a lost machine would."""

    def __init__(self, event, step):
        self.step = step
        setattr(self, event, self._stop)

    def _stop(self, args, state, control, **kwargs):
        if state.global_step >= self.step:
            raise KeyboardInterrupt


# one after another in the same training, which goes on from its last whole checkpoint each time
INTERRUPTIONS = [("on_optimizer_step", 3), ("on_save", 4), ("on_substep_end", 7), ("on_evaluate", 10)]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_training_interrupted_at_any_event_ends_as_the_uninterrupted_one(tmp_path, case):
    whole = train(case, tmp_path / "whole")
    for event, step in INTERRUPTIONS:
        with pytest.raises(KeyboardInterrupt):
            train(case, tmp_path / "interrupted", [Interrupt(event, step)])
    assert differences(train(case, tmp_path / "interrupted"), whole) == []
    figures = [log["flip_ratio"] for log in whole.logs if "flip_ratio" in log]
    assert len(figures) == STEPS
    assert figures[-1] > figures[0]
    assert len(set(figures)) > 3, "masks moved on"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Python 3.12 and later, of a fork where there are threads
def test_killed_trainings_end_as_the_uninterrupted_one():
    assert resume.kill("topk, bfloat16", 3, resume.Random(0)) == [[]] * 3


def test_differences_find_what_is_not_the_same(tmp_path):
    def outcome():
        return resume.Outcome({"a": torch.zeros(2)}, [{"loss": 1.0}], "checkpoint-2", {"file": "hash"})

    assert differences(outcome(), outcome()) == []
    for change in (
        lambda other: other.tensors["a"].add_(1e-45),
        lambda other: other.tensors.update(a=torch.zeros(2).double()),
        lambda other: other.tensors.pop("a"),
        lambda other: other.logs[0].update(loss=1.1),
        lambda other: other.logs.append({}),
        lambda other: setattr(other, "best", None),
        lambda other: other.files.update(file="other"),
    ):
        other = outcome()
        change(other)
        assert len(differences(outcome(), other)) == 1


def test_a_checkpoint_without_its_end_is_not_taken(tmp_path):
    assert resume.last_whole_checkpoint(tmp_path) is None
    for step, state in ((2, '{"global_step": 2}'), (10, '{"global_step": 10}'), (12, '{"global_st'), (14, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    assert resume.last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


# ---- a loop of one's own ----


def loop(case, folder, steps, resumed_from=None):
    """Train under Accelerate, with dropout, in `steps`; what came of it, saved in `folder` after the last of them."""
    torch.manual_seed(7)
    accelerator = Accelerator(cpu=True)
    model = model_to_train(case)
    statistics, schedule = MaskStatistics(model), SparsitySchedule("cubic", end=0.6)
    optimizer = create_mask_optimizer(model, lr=1e-3, mask_lr=5e-3)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, STEPS)
    # with a generator of its own: an iterator draws a number when it is made, and a resumed loop makes one more
    loader = DataLoader(rows(STEPS * 4), batch_size=4, generator=torch.Generator())
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    if resumed_from is not None:
        accelerator.load_state(resumed_from)
        loader = accelerator.skip_first_batches(loader, steps.start)
    model.train()
    figures = []
    for step, batch in zip(steps, loader, strict=False):
        if case.startswith("topk"):
            spend_budget(model, schedule.share(step / STEPS))
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        figures.append({"loss": loss.item()} | statistics(model))
    accelerator.save_state(folder)
    tensors = {name: value.detach().clone() for name, value in model.state_dict().items()}
    for number, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{name}": torch.as_tensor(value) for name, value in state.items()}
    return tensors, figures


@pytest.mark.parametrize("case", ["topk, bfloat16", "bernoulli"])
def test_a_loop_goes_on_from_the_state_that_accelerate_saved(tmp_path, case):
    tensors, figures = loop(case, tmp_path / "whole", range(STEPS))
    _, first = loop(case, tmp_path / "part", range(5))
    torch.rand(3)
    again, second = loop(case, tmp_path / "rest", range(5, STEPS), tmp_path / "part")
    assert first + second == figures
    assert len({figure["loss"] for figure in figures}) == STEPS
    assert again.keys() == tensors.keys()
    assert [name for name in tensors if not torch.equal(tensors[name], again[name])] == []
