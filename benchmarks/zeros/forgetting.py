"""What a training may forget: how the base model answers questions that have nothing to do with it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks.zeros.data import Rows, joined

QUESTIONS = (
    "What is the capital of France?",
    "Name three fruits.",
    "Why is the sky blue?",
    "Who wrote Romeo and Juliet?",
    "How many days are in a week?",
    "Write a sentence about the sea.",
    "What is the opposite of cold?",
    "What do bees make?",
    "Explain what a computer is.",
    "Give me a recipe for tomato soup.",
    "What language is spoken in Brazil?",
    "Tell me a short story about a dog.",
    "What is gravity?",
    "How do I boil an egg?",
    "List the planets of the solar system.",
    "What should I pack for a trip to the mountains?",
)
LENGTH = 32


def answers(model: nn.Module, tokenizer: Any) -> Rows:
    """Return the questions with the model's own greedy answers, of which every token is scored."""
    pairs = []
    for question in QUESTIONS:
        chat = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        prompt = tokenizer(text, add_special_tokens=False, return_tensors="pt")
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            made = model.generate(  # type: ignore[operator]
                **prompt, do_sample=False, max_new_tokens=LENGTH, pad_token_id=tokenizer.eos_token_id
            )[0]
        tokens, start = made.tolist(), prompt["input_ids"].shape[1]
        pairs.append((tokens[:start], tokens[start:]))
    return joined(pairs)
