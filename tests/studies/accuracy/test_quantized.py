"""LoRA in few bits: codes, their bytes, and rows that say what is scored."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.accuracy import quantized, runs, summary
from benchmarks.accuracy.methods import METHODS
from benchmarks.accuracy.quantized import GROUP, dequantize, packed, quantize
from benchmarks.accuracy.tasks import TASKS
from benchmarks.accuracy.training import Setting
from tests.studies.made_up import STEPS


def values(bits: int, numbers: torch.Tensor) -> torch.Tensor:
    return dequantize(*quantize(numbers, bits), bits, numbers)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_each_number_becomes_the_nearest_that_its_group_has(bits: int) -> None:
    numbers = torch.randn(3 * GROUP)
    codes, scales = quantize(numbers, bits)
    levels = torch.arange(2**bits) * 2.0 - (2**bits - 1)
    assert codes.max() < 2**bits
    for group, scale, own in zip(numbers.view(-1, GROUP), scales.float(), codes, strict=True):
        assert torch.equal(own, (group[:, None] - levels * scale).abs().argmin(1).to(torch.uint8))


def test_one_bit_is_the_sign_times_about_the_mean_magnitude() -> None:
    torch.manual_seed(0)
    numbers = torch.randn(GROUP)
    found = values(1, numbers)
    assert torch.equal(found.sign(), numbers.sign())
    assert found.abs()[0].item() == pytest.approx(numbers.abs().mean().item(), rel=0.1)


def test_more_bits_are_nearer() -> None:
    numbers = torch.randn(5, 77)
    errors = [(values(bits, numbers) - numbers).square().mean() for bits in (1, 2, 4)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_zeros_and_numbers_of_two_values_come_back_exactly(bits: int) -> None:
    assert torch.equal(values(bits, torch.zeros(70)), torch.zeros(70))
    widest = 2.0**bits - 1  # of scale 1, which bfloat16 has exactly
    numbers = torch.tensor([-widest, widest]).repeat(40)
    assert torch.equal(values(bits, numbers), numbers)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_codes_lie_in_as_few_bytes_as_they_need(bits: int) -> None:
    codes = torch.randint(2**bits, (2, GROUP), dtype=torch.uint8)
    stored = packed(codes, bits)
    assert stored.nbytes == codes.numel() * bits // 8
    apart = (stored[:, None].int() >> torch.arange(0, 8, bits)) & (2**bits - 1)
    assert torch.equal(apart.flatten(), codes.flatten().int())


def test_an_adapter_is_trained_once_and_has_a_row_for_each_number_of_bits(
    setting: Setting,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    task, method = replace(TASKS["trec"], steps=STEPS), METHODS["lora-r8"]
    with pytest.raises(SystemExit, match=r"lora-r8 on trec has no test score yet: run python -m benchmarks\.acc"):
        quantized.run_all(task, 8, 0, setting, tmp_path)
    (whole,) = runs.search(task, method, [0], setting, tmp_path, STEPS)
    quantized.run_all(task, 8, 0, setting, tmp_path)
    rows = {row.method: row for row in summary.rows_of(summary.read_results(tmp_path))}
    assert list(rows) == ["lora-r8", "lora-r8-4bit", "lora-r8-2bit", "lora-r8-1bit"]
    sizes = [row.bytes for row in rows.values()]
    assert sizes == sorted(sizes, reverse=True)
    assert all(row.lr == whole["lr"] and row.head_bytes == whole["head_bytes"] for row in rows.values())
    assert rows["lora-r8-2bit"].bfloat16_bytes == rows["lora-r8-2bit"].bytes
    assert not list(tmp_path.rglob("*.safetensors")), "trained parameters are left behind"
    monkeypatch.setattr(quantized, "train", None)
    quantized.run_all(task, 8, 0, setting, tmp_path)
