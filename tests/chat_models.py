"""A tiny chat model, and what it is taught: a random Llama whose tokenizer spells its words and has ChatML's tokens."""

import json
from pathlib import Path

import torch
from datasets import Dataset
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


def chat(*texts, roles=("user", "assistant")):
    """Messages with these texts, of the roles in turn."""
    return [{"role": roles[i % len(roles)], "content": text} for i, text in enumerate(texts)]


PETS = [("cat", "pet"), ("oak", "tree"), ("dog", "pet"), ("elm", "tree")]
PAIRS = [{"prompt": f"what is {word} {i}", "completion": kind} for i in range(5) for word, kind in PETS]
CHATS = [{"messages": chat(row["prompt"], row["completion"])} for row in PAIRS]


def write(file: Path, rows) -> str:
    """Write rows as the ending of the file says, and return its name."""
    if file.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(str(file))
    else:
        file.write_text("\n".join(json.dumps(row) for row in rows))
    return str(file)


def line(model, folder, rows=CHATS, *more):
    """A command line for rows, or the name of a file."""
    file = rows if isinstance(rows, str) else write(folder / "train.jsonl", rows)
    common = ["--model_name_or_path", model, "--train_file", file, "--output_dir", str(folder / "out")]
    settings = ["--max_steps", "3", "--target_sparsity", "0.03", "--bf16", "false", "--max_new_tokens", "6"]
    return [*common, *settings, "--use_cpu", "true", "--disable_tqdm", "true", *more]
