"""The golden masks and adapters, and the script that wrote their files: `python -m tests.golden.make`.

The files are format version 1 for ever: a change of the code that changes one of them is wrong. New ones may be added.
`*.record` and `adapter` hold masks alone; `portable` and `coded` are adapters with a task head as PEFT saves them, and
`expected.json` says which weights these switch off, without any code of ours.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from peft_mask import MaskConfig
from peft_mask.format.fingerprint import UNKNOWN, Fingerprint, fingerprint_of
from peft_mask.format.masks import Masks
from peft_mask.format.packing import pack_bits
from peft_mask.format.record import write_record

HERE = Path(__file__).parent


def scattered(shape: tuple[int, ...], sparsity: float) -> Tensor:
    """A mask that looks random and is the same on every machine."""
    return hashed(shape) >= int(sparsity * 2**32)


def uneven(rows: int, cols: int) -> Tensor:
    """A mask whose first rows are dense in zeros and whose last rows have few."""
    rate = torch.arange(rows, 0, -1).square() * (2**31 // rows**2)
    return hashed((rows, cols)) >= rate.unsqueeze(1)


def hashed(shape: tuple[int, ...]) -> Tensor:
    index = torch.arange(torch.Size(shape).numel())
    mixed = (index + 1) * 2654435761 % 2**32
    return ((mixed ^ mixed >> 15) * 2246822519 % 2**32).reshape(shape)


MASKS = {
    "zeros_listed": scattered((40, 50), 0.02),
    "kept_listed": scattered((30, 33), 0.97),
    "uneven": uneven(100, 60),
    "packed": scattered((7, 23), 0.5),
    "all_kept": torch.ones(3, 7, dtype=torch.bool),
    "all_off": torch.zeros(9, 20, dtype=torch.bool),
    "one_weight_off": torch.zeros(1, 1, dtype=torch.bool),
    "no_weights": torch.ones(0, 4, dtype=torch.bool),
    "vector": scattered((200,), 0.05),
    "convolution": scattered((4, 3, 5, 5), 0.1),
}


def weight_of(mask: Tensor) -> Tensor:
    """A weight for the mask, exact in float16."""
    return (hashed(tuple(mask.shape)) % 2**11 - 2**10).float() / 2**10


def large_off() -> tuple[Tensor, Tensor]:
    """A mask that switches off large weights only, and the weight, which bfloat16 rounds."""
    weight = weight_of(torch.empty(60, 70))
    return (weight.abs() < 0.9) | scattered((60, 70), 0.5), weight


def large_off_record() -> bytes:
    mask, weight = large_off()
    return write_record(pack_bits(mask), mask.shape, fingerprint_of(weight), weight).numpy().tobytes()


def fingerprint_for(name: str) -> Fingerprint:
    return UNKNOWN if name == "all_kept" else fingerprint_of(weight_of(MASKS[name]), exact=name != "packed")


def record_for(name: str) -> bytes:
    mask = MASKS[name]
    return write_record(pack_bits(mask), mask.shape, fingerprint_for(name)).numpy().tobytes()


def adapter() -> Masks:
    return Masks({f"encoder.{name}": mask for name, mask in MASKS.items()})


# folder -> module -> the mask that an adapter with a task head has: all three codecs, rows with and without padding
TRAINED = {
    "portable": {"0": scattered((60, 70), 0.02), "2": scattered((40, 60), 0.03), "4": scattered((32, 40), 0.5)},
    "coded": {"0": large_off()[0], "2": scattered((40, 60), 0.97), "4": scattered((32, 40), 0.5)},
}


def golden_base() -> nn.Module:
    """A model whose weights are the same on every machine, for ever."""
    model = nn.Sequential(
        nn.Linear(70, 60), nn.ReLU(), nn.Linear(60, 40), nn.ReLU(), nn.Linear(40, 32), nn.ReLU(), nn.Linear(32, 3)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(weight_of(parameter))
    return model.eval()


def golden_head() -> dict[str, Tensor]:
    return {"weight": weight_of(torch.empty(3, 32)) / 4, "bias": weight_of(torch.empty(3)) / 2}


def trained(name: str) -> PeftModel:
    """The adapter that `portable` or `coded` holds, on its base."""
    fields = {"binarizer": "threshold", "candidates": None, "portable": name == "portable"}
    config = MaskConfig(target_modules=list(TRAINED[name]), modules_to_save=["6"], **fields)
    model = get_peft_model(golden_base(), config).eval()
    with torch.no_grad():
        for module, mask in TRAINED[name].items():
            scores = model.base_model.model.get_submodule(module).peft_mask_scores["default"]
            scores.copy_(torch.where(mask, 0.1, -0.1))
        model.base_model.model.get_submodule("6").modules_to_save["default"].load_state_dict(golden_head())
    return model


def expected() -> dict[str, dict[str, list[str]]]:
    """The masks as text: a string for each row, 1 = kept."""
    return {
        name: {
            module: ["".join(str(int(kept)) for kept in row) for row in mask.tolist()] for module, mask in masks.items()
        }
        for name, masks in TRAINED.items()
    }


if __name__ == "__main__":
    for name in MASKS:
        (HERE / f"{name}.record").write_bytes(record_for(name))
    (HERE / "large_off.record").write_bytes(large_off_record())
    adapter().save(HERE / "adapter")
    for name in TRAINED:
        trained(name).save_pretrained(HERE / name)
        (HERE / name / "README.md").unlink()
    (HERE / "expected.json").write_text(json.dumps(expected(), indent=0) + "\n")
