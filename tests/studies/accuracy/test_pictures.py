"""What a picture shows of a table: names, marks and the front."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.accuracy.methods import METHODS, QUANTIZED
from benchmarks.accuracy.pictures import adapters_above_probe, draw_curve, front, label


def mean(
    method: str, test: float, size: float, bfloat16: float | None = None, sd: float | None = None
) -> dict[str, Any]:
    return {"method": method, "test": test, "bytes": size, "bfloat16_bytes": bfloat16, "sd": sd}


MEANS = [
    mean("growing-mask", 0.92, 68e3, sd=0.001),
    mean("lora-r8", 0.91, 1.3e6, 0.65e6),
    mean("tinylora-qv", 0.87, 43e3, 43e3),
    mean("full", 0.925, 90e6, 45e6),
    mean("probe", 0.88, 0),
]


@pytest.mark.parametrize(
    ("method", "name"),
    [
        ("growing-mask-0.002", "mask 0.2 %"),
        ("lora-r8", "LoRA r=8"),
        ("lora-r1-qv", "LoRA r=1, query and value"),
        ("lora-r16-2bit", "LoRA r=16, 2 bits"),
        ("full", "full fine-tuning"),
    ],
)
def test_a_method_is_called_what_people_call_it(method: str, name: str) -> None:
    assert label(method) == name


def test_no_two_methods_have_one_name() -> None:
    assert len({label(method) for method in [*METHODS, *QUANTIZED]}) == len({*METHODS, *QUANTIZED})


def test_adapters_that_beat_a_frozen_probe_have_a_mark_with_the_bytes_that_one_would_store() -> None:
    assert adapters_above_probe(MEANS) == {"growing-mask": (68e3, 92.0, 0.1), "lora-r8": (0.65e6, 91.0, 0.0)}
    assert "tinylora-qv" in adapters_above_probe(MEANS[:-1])


def test_the_front_is_of_those_that_none_surpasses_with_as_few_bytes() -> None:
    assert front([(3, 0.9), (1, 0.5), (2, 0.4), (2, 0.7), (4, 0.9)]) == [(1, 0.5), (2, 0.7), (3, 0.9)]


@pytest.mark.parametrize(
    "means", [MEANS, MEANS[:1], MEANS[3:], MEANS[-1:], []], ids=["all", "one", "lines", "a probe", "none"]
)
def test_any_table_has_its_picture(means: list[dict[str, Any]], tmp_path: Path) -> None:
    draw_curve(means, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
