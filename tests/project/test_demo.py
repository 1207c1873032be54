"""The demo as `make demo` runs it, on the real pretrained model, only shorter."""

import json

import pytest

from examples.demo.__main__ import main


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
def test_the_demo_learns_serves_and_restores_the_real_model(tmp_path, capsys):
    assert main(["--steps", "40", "--output", str(tmp_path)]) == 0
    rows = {(row["task"], row["method"]): row for row in json.loads((tmp_path / "results.json").read_text())}
    mask = rows["ud_ewt_pos", "mask"]
    assert mask["score"] > 0.75  # 40 steps; guessing the most common tag reaches 0.17
    assert mask["adapter_bytes"] < rows["ud_ewt_pos", "LoRA r=8"]["adapter_bytes"] / 8
    assert capsys.readouterr().out.count("  equal  ") == 7
