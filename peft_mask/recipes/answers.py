"""How well a trainer's model answers held-out questions: perplexity, and greedy answers, to the letter."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import gather_object, send_to_device
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled

from peft_mask.recipes.chat import Message, render


def check_whole(settings: TrainingArguments) -> None:
    """Check that each process will hold the whole model, so that the first one can generate and merge alone.

    Args:
        settings: as read from the command line, before a model is loaded.

    Raises:
        ValueError: under FSDP, DeepSpeed's ZeRO-3 and a parallelism that splits layers.
    """

    def launched_with(switch: str) -> bool:
        return os.environ.get(f"ACCELERATE_USE_{switch}", "false").lower() in ("true", "1")

    parts = {
        "FSDP": bool(settings.fsdp) or launched_with("FSDP"),
        "ZeRO-3": is_deepspeed_zero3_enabled(),
        "parallelism_config": settings.parallelism_config is not None or launched_with("PARALLELISM_CONFIG"),
    }
    for name, used in parts.items():
        if used:
            raise ValueError(
                f"{name}: each process holds a part of the model, and the first one could neither answer nor merge "
                "without the others: take DDP (examples/accelerate/ddp.yaml)."
            )


def stops_of(model: PreTrainedModel, tokenizer: Any) -> set[int]:
    """Return the ids of the tokens at which generation ends."""
    ends = model.generation_config.eos_token_id
    return {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}


@contextmanager
def inference(trainer: Trainer) -> Iterator[Any]:
    """Give a trainer's model, in evaluation mode, without gradients and in the precision of the training.

    Accelerate puts that precision around the model's forward only when the training begins, and never around
    `generate`: without this, figures before and after the training would be computed in different ones.
    """
    with torch.no_grad(), trainer.accelerator.autocast():
        yield trainer.model.eval()


def perplexity(trainer: Trainer) -> float:
    """Return exp(mean negative log-likelihood of a token of the held-out answers).

    Several processes share the rows; none is counted twice, as in the trainer's own batches, which are filled up.
    """
    accelerator, rows = trainer.accelerator, trainer.eval_dataset
    own = rows.select(range(accelerator.process_index, len(rows), accelerator.num_processes))
    size = trainer.args.per_device_eval_batch_size
    total, tokens = 0.0, 0
    with inference(trainer) as model:
        for batch in DataLoader(own, size, collate_fn=trainer.data_collator):
            inputs = send_to_device(batch, model.device)
            count = int((inputs["labels"][:, 1:] != -100).sum())
            total += model(**inputs).loss.item() * count
            tokens += count
    totals, counts = zip(*gather_object([(total, tokens)]), strict=True)
    return math.exp(sum(totals) / sum(counts))


def greedy_answers(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[Message]], batch_size: int, length: int
) -> list[str]:
    """Answer each prompt with the most likely token at each place, at most `length` of them.

    Args:
        model: a causal language model, or a PEFT model of one, in evaluation mode.
        tokenizer: with a chat template.
        prompts: chats.
        batch_size: how many are answered at a time.
        length: of an answer at the most, in tokens.
    """
    stops = stops_of(model, tokenizer)
    texts = [render(tokenizer, prompt, tokenize=False, add_generation_prompt=True) for prompt in prompts]
    found: list[str] = []
    for start in range(0, len(texts), batch_size):
        inputs = tokenizer(
            texts[start : start + batch_size],
            add_special_tokens=False,  # the template has written them
            padding=True,
            padding_side="left",
            return_tensors="pt",
        ).to(model.device)
        tokens = model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=length,
            eos_token_id=sorted(stops),
            pad_token_id=tokenizer.pad_token_id,
        )
        found += [until(stops, row, tokenizer) for row in tokens[:, inputs["input_ids"].shape[1] :].tolist()]
    return found


def until(stops: Collection[int], ids: Sequence[int], tokenizer: Any) -> str:
    """Return the text of ids before the first at which generation ends; new tokens are a part of it."""
    end = next((place for place, token in enumerate(ids) if token in stops), len(ids))
    return tokenizer.decode(ids[:end]).strip()


def score(trainer: Trainer, rows: Dataset, length: int) -> tuple[dict[str, float], list[str]]:
    """Return the figures of held-out answers, and of the first process the greedy answers.

    Meanwhile the mask is merged: that is exact both ways, and spares making masked weights for every token.
    """
    trainer.model.merge_adapter()
    figures = {"perplexity": perplexity(trainer)}
    answers: list[str] = []
    if trainer.is_world_process_zero():
        size = trainer.args.per_device_eval_batch_size
        with inference(trainer) as model:
            answers = greedy_answers(model, trainer.processing_class, rows["prompt"][:], size, length)
    trainer.model.unmerge_adapter()
    if not answers:
        return figures, []
    right = [text == row[0]["content"].strip() for text, row in zip(answers, rows["completion"][:], strict=True)]
    return figures | {"exact_match": sum(right) / len(right)}, answers
