"""A tiny chat model: a random Llama whose tokenizer spells its words, and has ChatML's tokens and template."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }} {{ message['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)


def tiny_chat_model(folder: Path, *, template: str | None = CHATML, tied: bool = True, width: int = 32) -> str:
    """Save one, and return where; without a template its tokenizer has none of ChatML's tokens either."""
    tokens = ["<unk>", "</s>", " ", *LETTERS, *"<|>_/"]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")
    if template is not None:
        fast.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
        fast.eos_token = "<|im_end|>"
        fast.chat_template = template
    fast.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=2 * width,
        bos_token_id=None,
        eos_token_id=fast.eos_token_id,
        pad_token_id=None,
        tie_word_embeddings=tied,
        initializer_range=0.3,  # so that a mask makes a difference
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)
