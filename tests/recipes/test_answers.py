"""Figures of a chat model: in one precision, of each row once, on any device."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_mask import MaskCallback
from peft_mask.recipes import sft
from peft_mask.recipes.answers import greedy_answers, perplexity, score
from tests.chat_models import CHATS, chat, line, tiny_chat_model, write
from tests.processes import launch


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_chat_model(tmp_path_factory.mktemp("chat"))


def test_before_and_after_are_scored_in_the_precision_of_the_training(model, tmp_path):
    """Accelerate puts it around the model's forward when the training begins, not when the trainer is made."""
    test = write(tmp_path / "test.jsonl", CHATS)
    trainer, held_out = sft.make_trainer(
        *sft.parse(line(model, tmp_path, CHATS, "--test_file", test, "--bf16", "true"))
    )
    trainer.remove_callback(MaskCallback)
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0)  # so that no mask changes
    dtypes = set()
    head = trainer.model.get_base_model().lm_head
    head.register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
    before = score(trainer, held_out, 4)
    trainer.train()
    assert score(trainer, held_out, 4) == before
    assert dtypes == {torch.bfloat16}


@pytest.mark.slow
def test_of_several_processes_none_scores_a_row_again(model, tmp_path):
    test = write(tmp_path / "test.jsonl", [*CHATS[:4], {"messages": chat("what is it", "a thing of many words")}])
    command = line(model, tmp_path, CHATS, "--test_file", test, "--per_device_eval_batch_size", "2")
    trainer, held_out = sft.make_trainer(*sft.parse(command))
    figures, _ = score(trainer, held_out, 6)
    printed = launch("examples/sft.py", *command, "--merge_to", str(tmp_path / "merged"))
    assert printed.count("5 held-out answers:") == printed.count("an ordinary model") == 1
    before = next(row for row in printed.splitlines() if row.split()[:1] == ["before"])
    assert [float(figure) for figure in before.split()[1:]] == pytest.approx(list(figures.values()), abs=1e-3)


def test_packed_or_not_the_perplexity_is_the_same(model, tmp_path):
    test = write(tmp_path / "test.jsonl", CHATS)
    both = [[], ["--packing", "true", "--max_length", "150"]]
    found = []
    for more in both:
        trainer, _ = sft.make_trainer(*sft.parse(line(model, tmp_path, CHATS, "--test_file", test, *more)))
        found.append(perplexity(trainer))
    assert found[0] == pytest.approx(found[1], rel=1e-5)


class Doubles(TorchDispatchMode):
    """Counts tensors of float64 that are made."""

    made = 0

    def __torch_dispatch__(self, function, types, arguments=(), settings=None):
        result = function(*arguments, **(settings or {}))
        self.made += isinstance(result, torch.Tensor) and result.dtype == torch.float64
        return result


def test_scoring_takes_no_float64_which_mps_does_not_have(model, tmp_path):
    trainer, held_out = sft.make_trainer(*sft.parse(line(model, tmp_path)))
    with Doubles() as doubles:
        score(trainer, held_out, 4)
    assert doubles.made == 0


def test_an_answer_does_not_depend_on_the_prompts_beside_it(model):
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.eos_token
    speaker = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    prompts = [chat("a cat"), chat("what is an old oak in a dark wood"), chat("dog 7 and dog 8")]
    alone = greedy_answers(speaker, tokenizer, prompts, 1, 6)
    assert greedy_answers(speaker, tokenizer, prompts, 3, 6) == alone
    assert len(set(alone)) > 1
