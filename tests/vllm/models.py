"""A small Llama on disk, with adapters, and the greedy tokens of each as transformers' merged models write them."""

import json
import shutil
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from peft_mask import MaskConfig

MASKS = ("a", "b", "c")
LORA = "lora"
# chosen among forty, so that no token below is a near tie
PROMPTS = [[(7 * k + 3 + (k % 11 + 2) * i * i) % 500 + 1 for i in range(70)] for k in (6, 8, 14, 15)]
NEW = 24
LEAST_LEAD = 0.015  # of the chosen token over the next: a thousand times what another order of sums changes

_SHAPE = {
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 352,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}


def make(root: Path) -> None:
    """Write a base and its adapters into folders of these names, and `expected.json`."""
    write_base(root / "base", seed=0)
    for seed, name in enumerate(MASKS):
        write_mask(root, name, seed)
    write_mask(root, "ranked", seed=0, portable=False)
    write_lora(root / LORA, root / "base")
    expected = {name: tokens_of(merged(root, name)) for name in (*MASKS, "ranked", LORA, "base")}
    assert expected["ranked"] == expected["a"]
    answers = [str(expected[name]) for name in (*MASKS, LORA, "base")]
    assert len(set(answers)) == len(answers)  # else nothing here could fail
    (root / "expected.json").write_text(json.dumps(expected))

    write_base(root / "other-base", seed=1)
    write_mask(root, "foreign", seed=0, base="other-base")
    shutil.copytree(root / "a", root / "damaged")
    file = root / "damaged" / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-20] ^= 1
    file.write_bytes(data)


def expected(root: Path) -> dict[str, list[list[int]]]:
    """Return name -> the new tokens of every prompt."""
    return json.loads((root / "expected.json").read_text())


def write_base(folder: Path, seed: int, **shape) -> None:
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**_SHAPE | shape)).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(_SHAPE["vocab_size"])}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)


def load(folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def write_mask(root: Path, name: str, seed: int, base: str = "base", **fields) -> None:
    settings = {"task_type": "CAUSAL_LM", "init_weights": False, "seed": seed, "target_sparsity": 0.03}
    get_peft_model(load(root / base), MaskConfig(**settings | fields)).save_pretrained(root / name)


def write_lora(folder: Path, base: Path) -> None:
    torch.manual_seed(5)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(load(base), config)
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)


def merged(root: Path, name: str) -> LlamaForCausalLM:
    if name == "base":
        return load(root / "base")
    return PeftModel.from_pretrained(load(root / "base"), root / name).merge_and_unload().eval()


def tokens_of(model: LlamaForCausalLM, least_lead: float = LEAST_LEAD) -> list[list[int]]:
    """Greedy tokens of every prompt, each far ahead of the next best."""
    found = []
    for prompt in PROMPTS:
        output = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=NEW,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        best = torch.cat(output.logits).topk(2).values
        assert (best[:, 0] - best[:, 1]).min() > least_lead
        found.append(output.sequences[0, len(prompt) :].tolist())
    return found
