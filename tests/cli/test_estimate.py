import argparse

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from peft_mask import MaskConfig, training_memory
from peft_mask.cli.estimate import gibibytes
from peft_mask.training.cards import usable
from tests.versions import RUNS_ON_META

pytestmark = pytest.mark.skipif(not RUNS_ON_META, reason="this transformers' Llama does not run without weights")


def test_the_estimate_is_that_of_training_memory(talking, run):
    said = run("estimate", "--model", talking.base, "--tokens", 32, "--batch", 3, "--json")
    assert said.code == 0
    with torch.device("meta"):
        shape = AutoConfig.from_pretrained(talking.base)
        model = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16).train()
        ids = torch.zeros(3, 32, dtype=torch.long)
    model.config.use_cache = False
    model.gradient_checkpointing_enable({"use_reentrant": False})
    memory = training_memory(model, MaskConfig(task_type="CAUSAL_LM"), {"input_ids": ids, "labels": ids})
    assert said.data["bytes"] == vars(memory) | {"total": memory.total}


def test_no_weights_are_read(talking, run, tmp_path):
    (tmp_path / "config.json").write_bytes((talking.base / "config.json").read_bytes())
    assert run("estimate", "--model", tmp_path, "--tokens", 32).code == 0


def test_tasks_may_be_called_as_train_calls_them(talking, run, refused):
    arguments = ("estimate", "--model", talking.base, "--tokens", 32, "--json")
    assert run(*arguments, "--task", "text-classification").data == run(*arguments, "--task", "SEQ_CLS").data
    assert "expected one of CAUSAL_LM, SEQ_CLS, TOKEN_CLS, text-classification, " in refused(
        *arguments, "--task", "sing"
    )


def test_a_card_has_room_or_not(talking, run):
    arguments = ("estimate", "--model", talking.base, "--tokens", 32)
    said = run(*arguments, "--card", "24GB", "--json")
    assert said.data["card"] == {"gib": 24.0, "usable_bytes": int(usable(24)), "fits": True, "longest_row": 64}
    assert "It fits a card of 24 GB" in run(*arguments, "--card", "24GB").out
    tight = run("estimate", "--model", "llama", "--card", "8", "--json").data  # Llama 7B
    assert tight["card"]["fits"] is False
    assert tight["card"]["longest_row"] == 0


def test_four_bits_and_less_to_train_take_less(talking, run):
    def total(*options):
        return run("estimate", "--model", "llama", *options, "--json").data["bytes"]["total"]

    usual = total()
    assert total("--nf4") < usual / 2
    assert total("--scores-dtype", "bfloat16", "--steps", "sign_in_backward") < usual
    assert total("--no-checkpointing") > usual


def test_a_model_that_is_not_there_or_has_no_such_head_is_refused_with_its_name(refused, tmp_path):
    message = refused("estimate", "--model", tmp_path)
    assert f"there is no model of transformers at '{tmp_path}' that can be read" in message
    message = refused("estimate", "--model", "vit")
    assert "transformers has no model for --task CAUSAL_LM of the type 'vit': choose another of" in message


def test_rows_that_the_model_cannot_take_and_cards_that_are_none_are_refused(talking, refused):
    assert "is made for rows of 64 tokens at most" in refused("estimate", "--model", talking.base, "--tokens", 65)
    assert "expected the memory of a card, such as 24GB, got 'big'" in refused(
        "estimate", "--model", talking.base, "--card", "big"
    )
    assert "expected a number above 0, got '-3'" in refused("estimate", "--model", talking.base, "--tokens=-3")


@pytest.mark.parametrize(("text", "size"), [("24GB", 24), ("24", 24), ("7.5 gib", 7.5)])
def test_sizes_of_cards_are_as_they_are_sold(text, size):
    assert gibibytes(text) == size
    with pytest.raises(argparse.ArgumentTypeError, match="such as 24GB"):
        gibibytes(f"{text}x")
