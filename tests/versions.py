"""What the installed releases of transformers and safetensors can do, for tests that must know."""

from pathlib import Path

import peft
import safetensors
import transformers
from packaging.version import Version
from transformers.integrations.peft import MIN_PEFT_VERSION


def _runs_on_meta() -> bool:
    try:
        from transformers.utils.generic import maybe_autocast

        with maybe_autocast("meta", enabled=False):
            return True
    except (ImportError, RuntimeError):
        return False


def _pinned(library: str, version: str) -> bool:
    constraints = Path(__file__).parents[1] / "constraints.txt"  # which comes with no source distribution
    return constraints.exists() and f"{library}=={version}" in constraints.read_text("utf-8").splitlines()


_TRANSFORMERS = Version(transformers.__version__)

PINNED_TRANSFORMERS = _pinned("transformers", transformers.__version__)

LOADS_BY_NAME = Version("5") <= _TRANSFORMERS  # those before load adapters through PEFT's hooks
MARKS_WHAT_IT_READS = Version("5") <= _TRANSFORMERS  # so that a head that was not in the checkpoint is known
LOADS_HEADS = not Version("5") <= _TRANSFORMERS < Version("5.18")  # LoRA's neither
ASKS_BEFORE_PUSHING = hasattr(transformers.TrainerCallback, "on_push_begin")
MANAGES_ADAPTERS = Version(MIN_PEFT_VERSION) <= Version(peft.__version__)  # `add_adapter`, `set_adapter` and so on ask
RESUMES_DOWNLOADS = Version("5") <= _TRANSFORMERS  # with the huggingface_hub that it comes with
RUNS_ON_META = _runs_on_meta()  # its Llama and others that ask for no autocast of their rotary embeddings
REPLACES_FILES = KNOWS_COMPLEX = Version("0.8") <= Version(safetensors.__version__)  # 0.4.5 writes into the old file
