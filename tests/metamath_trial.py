"""Try the rows of `benchmarks.metamath` in PEFT's own harness, without a GPU or a hub.

python tests/metamath_trial.py PEFT ROW     # PEFT: a checkout of github.com/huggingface/peft; half a minute

PEFT's source distribution does not contain the harness, so it is not fetched as that of `tests/peft_suite.py` is. It is
copied, told that a CPU will do, and given a tiny Llama and stand-ins for its data sets, in their columns. What is tried
is that a row starts, trains, is evaluated and writes its result; the figures mean nothing.
"""

import json
import os
import shutil
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything that reads it is imported
sys.path.insert(0, str(Path(__file__).parents[1]))

import datasets
import torch
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, decoders, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from benchmarks.metamath import __main__ as metamath
from peft_mask import Masks

SUMS = [(a, b) for a in range(20) for b in range(10)]
QUESTION = "What is {} plus {}?"
WIKI = "A sum is what one gets by adding numbers. The sum of two numbers is larger than both, if none is zero. " * 3
METAMATH = {
    "type": ["GSM_AnsAug"] * len(SUMS),
    "query": [QUESTION.format(a, b) for a, b in SUMS],
    "original_question": [QUESTION.format(a, b) for a, b in SUMS],
    "response": [f"{a} + {b} = {a + b}\nThe answer is: {a + b}" for a, b in SUMS],
}
GSM8K = {
    "question": [QUESTION.format(b, a) for a, b in SUMS],
    "answer": [f"{b} + {a} = {a + b}\n#### {a + b}" for a, b in SUMS],
}
SETTINGS = {"max_steps": 40, "eval_steps": 20, "batch_size_eval": 25, "generation_kwargs": {"max_new_tokens": 24}}
OF_A_DEVICE = {  # what the harness asks of torch.cuda, for torch.cpu to answer
    "get_device_name": lambda *_: "a CPU, for a trial",
    "manual_seed_all": torch.manual_seed,
    **dict.fromkeys(("memory_allocated", "memory_reserved", "max_memory_reserved"), lambda: 0),
    **dict.fromkeys(("reset_peak_memory_stats", "empty_cache"), lambda: None),
}


def load_dataset(name: str, *_: object, streaming: bool = False, **__: object) -> object:
    if name == "HuggingFaceFW/finewiki":
        return Dataset.from_dict({"text": [WIKI] * 100}).to_iterable_dataset()
    if name == "meta-math/MetaMathQA":
        return DatasetDict(train=Dataset.from_dict(METAMATH))
    rows = Dataset.from_dict(GSM8K)
    return DatasetDict(train=rows.select(range(100)), test=rows.select(range(100, 120)))


def save_model(folder: Path) -> None:
    """Save a tiny Llama that spells, as the harness wants a loss between 1 and 2 on its texts of Wikipedia."""
    template = json.loads((folder / "default_training_params.json").read_text())["query_template"]
    texts = [template.format(query=q) + r for q, r in zip(METAMATH["query"], METAMATH["response"], strict=True)]
    letters = sorted(set("".join([WIKI, *texts, *GSM8K["answer"]])))
    vocabulary = {letter: number for number, letter in enumerate(["<eos>", *letters])}
    spelling = Tokenizer(models.BPE(vocabulary, []))
    spelling.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=spelling, eos_token="<eos>")
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", vocab_size=len(vocabulary), eos_token_id=0, tie_word_embeddings=True, **shape
    )
    model = AutoModelForCausalLM.from_config(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    wiki = torch.tensor([tokenizer(WIKI)["input_ids"]])
    loss = torch.tensor(float("inf"))
    while loss > 1.5:
        loss = model(input_ids=wiki, labels=wiki).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder / "tiny")
    tokenizer.save_pretrained(folder / "tiny")


def copied(checkout: Path, folder: Path) -> Path:
    """Copy the harness, with the tiny model as its base and a CPU among the devices that it takes."""
    harness = folder / "harness"
    shutil.copytree(checkout / "method_comparison" / "MetaMathQA", harness)
    code, devices = (harness / "utils.py").read_text(), '["cuda", "xpu"]'
    if devices not in code:
        raise SystemExit(f"{harness / 'utils.py'} no longer says which devices it takes: {devices}")
    (harness / "utils.py").write_text(code.replace(devices, '["cuda", "xpu", "cpu"]'))
    save_model(harness)
    params = harness / "default_training_params.json"
    own = {"model_id": str(harness / "tiny"), **SETTINGS}
    params.write_text(json.dumps(json.loads(params.read_text()) | own))
    return harness


def main(checkout: str, row: str) -> None:
    torch.set_num_threads(1)
    datasets.load_dataset = load_dataset
    for name, function in OF_A_DEVICE.items():
        setattr(torch.cpu, name, function)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        harness = copied(Path(checkout), folder)
        tempfile.tempdir = str(folder)
        # the harness wants Python 3.12, for `delete`
        tempfile.TemporaryDirectory = lambda **_: nullcontext(tempfile.mkdtemp())  # type: ignore[assignment,misc]
        metamath.run(harness, row)
        file = next(folder.glob("*/adapter_model.safetensors"))
        result = json.loads(next(harness.glob(f"*results/mask--{row}*.json")).read_text())["train_info"]
        assert result["status"] == "success"
        assert result["file_size"] == file.stat().st_size
        steps = [{key: m[key] for key in m if "accuracy" in key or "loss" in key} for m in result["metrics"]]
        print(*steps, Masks.load(file.parent), sep="\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
