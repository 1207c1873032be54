"""Runs all scenarios, and writes what came of them as JSON. A process of its own, for it gives torch another device.

    python -m tests.simulated_device.run REPORT [NAME ...]

Without names it runs all. `scenarios` holds, for each, what it raised by device, whether results are those of the CPU,
and its CPU seconds; `memory`, the bytes that steps of a small Llama held, and the estimate of them; `waits`, where the
host waited, by case and phase; `peak`, the bytes of a layer's backward pass; `searches`, how often masks are looked
for; `rules`, what the device itself raises and reports.
"""

import json
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

from tests.simulated_device.device import NAME, peak_of, waits  # before all that asks for devices

import peft  # isort: skip
import torch  # isort: skip
import transformers  # isort: skip
from torch.utils._python_dispatch import TorchDispatchMode  # isort: skip

from peft_mask.scores.functional import masked_linear  # isort: skip
from tests.processes import leave  # isort: skip
from tests.simulated_device import memory, waiting  # isort: skip
from tests.simulated_device.models import batch, layers, masked, train  # isort: skip
from tests.simulated_device.scenarios import SCENARIOS  # isort: skip


def read_to_the_device() -> None:
    """Let PEFT read files to this device, of which safetensors has not heard, as it reads them to CUDA."""
    read = peft.utils.save_and_load.safe_load_file

    def load_file(path, device="cpu"):
        return {name: tensor.to(device) for name, tensor in read(path, device="cpu").items()}

    peft.utils.save_and_load.safe_load_file = load_file


def same(a, b) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a.cpu(), b.cpu()) if isinstance(a, torch.Tensor) else a == b


def report_of(run) -> dict:
    results, errors, start = {}, {}, time.process_time()
    for device in ("cpu", NAME):
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as folder:
            try:
                results[device] = run(device, Path(folder))
            except Exception:
                errors[device] = traceback.format_exc()
    equal = not errors and same(results["cpu"], results[NAME])
    return {"errors": errors, "same": equal, "seconds": round(time.process_time() - start, 2)}


def peak_of_a_backward_pass() -> dict[str, int]:
    """Of a layer of which nothing else is large: what its weight, W * M and the gradient's product take each."""
    weight = torch.randn(256, 256, device=NAME)
    scores = torch.zeros(8, device=NAME, requires_grad=True)
    positions = torch.arange(8, device=NAME)
    x = torch.randn(2, 256, device=NAME, requires_grad=True)
    mask = scores.detach() >= 0
    y = masked_linear(x, weight, scores, None, mask, positions)
    return {"weight": weight.nbytes, "peak": peak_of(lambda: y.backward(torch.ones_like(y)))}


def searches_of_a_step() -> dict[str, int]:
    """How many kinds of matrices a masked model has, and how often their masks are looked for in a step."""
    model = masked(NAME, "llama")
    model.get_base_model().gradient_checkpointing_enable()
    model.enable_input_require_grads()
    optimizer = train(model, NAME)
    found: list[str] = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    with Seen():
        model(**batch(model, NAME)).loss.backward()
        optimizer.step()
    sizes = {layer.mask_shape.numel() for layer in layers(model).values()}
    return {"kinds": len(sizes), "matrices": len(layers(model)), "searches": found.count("topk")}


def rules() -> dict[str, str | int]:
    x, mask = torch.randn(4, 5, device=NAME), torch.ones(4, 5, dtype=torch.bool, device=NAME)
    found = {}
    for name, call in {
        "two devices": lambda: x + x.to(f"{NAME}:1"),
        "the cpu's": lambda: x + torch.ones(4, 5),
        "a generator of the cpu": lambda: torch.randint(3, (2,), device=NAME, generator=torch.Generator()),
        "numpy": lambda: x.numpy(),
        "a number": lambda: bool(x.sum() > 0),
        "a mask": lambda: x[mask],
        "a list": lambda: x[[1, 0]],
        "a table": lambda: torch.tensor([1, 2], device=NAME),
        "to the host": lambda: x.cpu(),
        "a scalar": lambda: x * torch.tensor(2.0) + 1,
        "a fill under a mask": lambda: x.masked_fill(mask, 0.0),
        "an index": lambda: x[torch.zeros(2, dtype=torch.long, device=NAME)],
    }.items():
        with waits() as log:
            try:
                call()
            except (RuntimeError, TypeError) as error:
                found[name] = str(error)
            else:
                found[name] = len(log)
    return found


def main(report: Path, *names: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    read_to_the_device()
    found = {name: report_of(run) for name, run in SCENARIOS.items() if name in names or not names}
    remembered = {name: memory.found(name) for name in memory.CASES if name in names or not names}
    with tempfile.TemporaryDirectory() as folder:
        waited = waiting.found(NAME, Path(folder))
    everything = {"scenarios": found, "memory": remembered, "waits": waited, "peak": peak_of_a_backward_pass()}
    everything |= {"searches": searches_of_a_step(), "rules": rules()}
    half = report.with_suffix(".half")
    half.write_text(json.dumps(everything, indent=1))
    half.replace(report)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
    leave()  # the device's threads may still hold a tensor while the interpreter goes down
