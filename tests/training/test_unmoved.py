"""A training that moves no score says so, and no other one does."""

import pytest
from peft import get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments

from peft_mask import MaskCallback, MaskConfig, MaskStatistics, create_mask_optimizer
from tests.tiny_models import tiny_inputs, tiny_model

UNMOVED = "no score of the adapter '{}' has moved, .* look for a reward that is the same for all completions"


def masked_bert(**fields):
    return get_peft_model(tiny_model("bert"), MaskConfig(task_type="SEQ_CLS", **fields))


def rows():
    inputs = tiny_inputs(tiny_model("bert"), batch_size=8, labels=True)
    return [{name: value[i] for name, value in inputs.items()} for i in range(8)]


def nothing(outputs, labels, **kwargs):
    """The loss of completions that all have the same reward: it depends on the model, and not on what that computes."""
    return outputs.logits.sum() * 0.0


def trainer(model, folder, *callbacks, loss=None, sign_steps=True, **arguments):
    settings = {"max_steps": 4, "per_device_train_batch_size": 4, "save_strategy": "no", "report_to": []}
    settings |= {"use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False, "learning_rate": 5e-3}
    return Trainer(
        model=model,
        args=TrainingArguments(str(folder), **(settings | arguments)),
        train_dataset=rows(),
        callbacks=list(callbacks),
        optimizers=(create_mask_optimizer(model) if sign_steps else None, None),
        compute_loss_func=loss,
    )


@pytest.mark.parametrize("sign_steps", [True, False], ids=["sign steps", "AdamW"])
@pytest.mark.parametrize("fields", [{}, {"binarizer": "threshold", "candidates": None}, {"scores_dtype": "bfloat16"}])
def test_a_training_whose_loss_says_nothing_warns_and_one_with_a_loss_does_not(tmp_path, sign_steps, fields):
    with pytest.warns(UserWarning, match=UNMOVED.format("default")):
        trainer(masked_bert(**fields), tmp_path, MaskCallback(), loss=nothing, sign_steps=sign_steps).train()
    trainer(masked_bert(**fields), tmp_path, MaskCallback(), sign_steps=sign_steps).train()


def test_a_mask_that_has_zeros_and_does_not_move_is_warned_of(tmp_path):
    model = masked_bert()
    trainer(model, tmp_path, MaskCallback()).train()
    assert MaskStatistics(model)(model)["sparsity"] > 0
    with pytest.warns(UserWarning, match=UNMOVED.format("default")):
        trainer(model, tmp_path, MaskCallback(), loss=nothing).train()
    trainer(model, tmp_path, MaskCallback()).train()


def test_one_step_that_counts_is_enough(tmp_path):
    losses = iter([nothing, lambda outputs, labels, **_: outputs.logits.square().sum(), nothing, nothing])
    trainer(masked_bert(), tmp_path, MaskCallback(), loss=lambda *args, **kw: next(losses)(*args, **kw)).train()


def test_a_resumed_training_counts_from_where_the_interrupted_one_began(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2}
    trainer(masked_bert(), tmp_path, MaskCallback(), **saving).train()
    resumed = trainer(masked_bert(), tmp_path, MaskCallback(), loss=nothing, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_training_without_a_step_does_not_warn(tmp_path):
    model = masked_bert()
    late = trainer(model, tmp_path)
    callback = MaskCallback()
    late.add_callback(callback)
    callback.on_train_begin(late.args, late.state, late.control, model=model)
    callback.on_train_end(late.args, late.state, late.control, model=model)


def test_of_several_adapters_the_one_that_was_not_trained_is_named():
    config = MaskConfig(target_modules=["0"], candidates=None)
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), config, adapter_name="one")
    model.add_adapter("other", config)
    model.base_model.set_adapter(["one", "other"])
    statistics = MaskStatistics(model)
    assert statistics.unmoved(model) == ["one", "other"]
    model.base_model.set_scores(lambda name, weight: weight, "one")
    assert statistics.unmoved(model) == ["other"]
    with pytest.warns(UserWarning, match=UNMOVED.format("other")):
        statistics.warn_of_unmoved(model)


def test_a_custom_loop_asks_for_the_warning_itself():
    model = masked_bert()
    statistics, optimizer = MaskStatistics(model), create_mask_optimizer(model)
    for scale, warned in ((0.0, ["default"]), (1.0, [])):
        (model(**tiny_inputs(model, labels=True)).loss * scale).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert statistics.unmoved(model) == warned
