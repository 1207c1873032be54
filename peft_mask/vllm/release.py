"""The release of vLLM that this room was written for, and what is said to every other."""

from __future__ import annotations

RELEASE = "0.32"


def check_release() -> None:
    """Refuse another vLLM than the one whose insides are relied on.

    Raises:
        ImportError: there is none, or it is of another minor release.
    """
    try:
        import vllm
    except ModuleNotFoundError as error:
        raise ImportError(
            f"masks in vLLM need vLLM {RELEASE}, and none is installed here: pip install 'vllm=={RELEASE}.*'."
        ) from error
    if vllm.__version__.split(".")[:2] != RELEASE.split("."):
        raise ImportError(
            f"masks in vLLM are made for vLLM {RELEASE} and use what is inside it; this is {vllm.__version__}, where "
            f"that may be otherwise. Install vllm=={RELEASE}.*, or a peft_mask for that release, or serve merged "
            "models, which every vLLM takes (merge_and_unload, save_pretrained)."
        )
