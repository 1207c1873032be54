"""Masks switched in a real vLLM engine whose weights two workers share."""

import pytest

from peft_mask.vllm import switch_mask

pytestmark = [pytest.mark.usefixtures("settings_of_vllm"), pytest.mark.filterwarnings("default")]  # vLLM's own warnings

EXTENSION = {"worker_extension_cls": "peft_mask.vllm.MaskExtension"}


def test_two_workers_with_halves_of_the_weights_switch_as_one(engine, folder, expected):
    halves = engine(folder / "base", tensor_parallel_size=2, **EXTENSION)
    untouched = halves.llm.collective_rpc("compute_weight_checksums")
    assert len(untouched) == 2
    for name in ("a", "ranked", "b", None):
        switch_mask(halves.llm, name and folder / name)
        assert halves.tokens() == expected[name or "base"]
    assert halves.llm.collective_rpc("compute_weight_checksums") == untouched
