"""The share of zeros that a model needs: shorter models, and masks beside full fine-tuning of the same model."""

from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModel

from benchmarks.accuracy import shares
from benchmarks.accuracy.model import first_blocks
from benchmarks.accuracy.runs import runs_in
from tests.tiny_models import tiny_model, tiny_tokenizer


def row(task: str, method: str, seed: int, test: float, model: str = "a/model", lr: float = 1e-3) -> dict[str, object]:
    found = {"task": task, "method": method, "lr": lr, "seed": seed, "steps": 9, "dev": test, "test": test}
    found |= {"trained_parameters": 8, "bytes": 300, "head_bytes": 100, "settings": {"model": model}, "environment": {}}
    if method != "full":
        zeros = 0.005 if method == "growing-mask" else float(method.removeprefix("growing-mask-"))
        found |= {"sparsity": zeros, "masked_weights": 1000, "bits_per_weight": 0.1, "entropy_bytes": 5}
    return found


def test_a_mask_stands_beside_full_fine_tuning_on_the_same_seeds(tmp_path: Path) -> None:
    runs = runs_in(tmp_path / "results")
    for task, better in (("trec", 0.02), ("ud_ewt_pos", -0.01)):
        for seed in (0, 1, 2):
            runs.add(row(task, "full", seed, 0.5 + seed / 10))
        for seed in (0, 1):
            runs.add(row(task, "growing-mask", seed, 0.5 + seed / 10 + better))
        runs.add(row(task, "growing-mask-0.001", 0, 0.45))
    runs.add(row("trec", "growing-mask-0.02", 0, 0.9))  # which the other task lacks
    small, default = shares.points_of(tmp_path / "results")
    assert (small["share"], default["share"], default["seeds"]) == (0.001, 0.005, 2)
    assert default["points"] == pytest.approx({"trec": 2.0, "ud_ewt_pos": -1.0})
    assert small["points"] == pytest.approx({"trec": -5.0, "ud_ewt_pos": -5.0})
    assert (default["weights"], default["bytes"]) == (1000, 200)

    (tmp_path / "pages").mkdir()
    shares.write_shares(tmp_path, tmp_path / "pages")
    page = (tmp_path / "pages" / "shares.md").read_text("utf-8")
    assert "| MiniLM, 6 blocks | 1,000 | 0.50 % | 200 | 2 | +2.00 | -1.00 | +0.50 |" in page
    assert (tmp_path / "pages" / "shares.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("blocks", [0, 3])
def test_blocks_that_a_model_does_not_have_are_refused(blocks: int, tmp_path: Path) -> None:
    tiny_model("bert").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"the first {blocks} blocks of '.*': it has 2, ask for 1 to 2"):
        first_blocks(str(tmp_path), blocks, tmp_path / "shorter")


def test_the_first_blocks_of_a_model_are_a_model(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    tiny_model("bert").save_pretrained(whole)
    tiny_tokenizer().save_pretrained(whole)
    name = first_blocks(str(whole), 1, tmp_path / "shorter")
    assert Path(name).parts[-2:] == ("whole", "1-blocks")
    assert AutoConfig.from_pretrained(name).num_hidden_layers == 1
    states = AutoModel.from_pretrained(name).state_dict()
    expected = AutoModel.from_pretrained(whole).state_dict()
    assert states.keys() < expected.keys()
    assert all(values.equal(expected[key]) for key, values in states.items())
