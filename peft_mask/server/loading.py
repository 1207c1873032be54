"""A base and a folder of adapters -> what answers requests."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import get_peft_model
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoTokenizer

from peft_mask.model.names import BITS, module_name
from peft_mask.server.batcher import Batcher
from peft_mask.server.settings import ServerSettings
from peft_mask.server.tasks import TASKS, Classification, Embeddings, Generation, Tagging, Task
from peft_mask.serving.cache import AdapterCache
from peft_mask.serving.source import CONFIG, TENSORS
from peft_mask.settings.config import MaskConfig

_AUTO: dict[type[Task], Any] = {
    Classification: transformers.AutoModelForSequenceClassification,
    Tagging: transformers.AutoModelForTokenClassification,
    Embeddings: transformers.AutoModel,
    Generation: transformers.AutoModelForCausalLM,
}
Shapes = dict[str, tuple[int, ...]]  # of the tensors of a file, by name


def task_of(settings: ServerSettings) -> type[Task]:
    """Return what is served: what the settings say, or else what all adapters of the folder are for.

    Raises:
        ValueError: the folder holds no mask that can be read, or masks for several tasks.
    """
    return _task_of(() if settings.task else _adapters_in(Path(settings.adapters)), settings)


def load_batcher(settings: ServerSettings) -> Batcher:
    """Load a base, make room for the adapters of a folder in it, and return what answers for them.

    No adapter is loaded yet: the masked layers are those of the adapter with the most masks, the head is as wide as the
    widest.

    Raises:
        ValueError: as in `task_of`, or the base cannot be loaded.
    """
    if settings.threads:
        torch.set_num_threads(settings.threads)
    readable = _adapters_in(Path(settings.adapters))
    task = _task_of(readable, settings)
    found = [(config, shapes) for config, shapes in readable if _is_for(task, config)]
    if not found:
        raise ValueError(f"no adapter in '{settings.adapters}' is for the task {task.task_type}.")
    pattern, _ = max(found, key=lambda each: sum(key.endswith(BITS) for key in each[1]))
    pattern.inference_mode, pattern.base_model_name_or_path = True, None  # it may have another name here
    pattern.id2label = None  # the head is for the adapter with the most labels, not for this one's
    try:
        with quietly():
            base = _load_base(settings, task, [shapes for _, shapes in found])
        tokenizer = AutoTokenizer.from_pretrained(settings.base)
    except OSError as error:
        raise ValueError(f"the base '{settings.base}' cannot be loaded: {error}") from error
    length = settings.max_length or _longest(base, tokenizer)
    own: dict[str, Any] = {}
    if task is Embeddings:
        own = {"pooling": settings.pooling or _pooling_of(settings.base)}
    if task is Generation:
        own = {"max_new_tokens": settings.max_new_tokens, "max_seconds": settings.timeout}
    made = task(tokenizer, length, **own)
    if base.config.pad_token_id is None:  # by which a classifier finds the last token of each row
        base.config.pad_token_id = tokenizer.pad_token_id
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers for a property by its old name
        model = get_peft_model(base, pattern, adapter_name="none").eval()
    cache = AdapterCache(
        model,
        settings.adapters,
        max_bytes=settings.max_bytes,
        slots=settings.slots,
        timeout=settings.timeout,
    )
    return Batcher(
        cache,
        made,
        max_rows=settings.max_rows,
        max_tokens=settings.max_tokens,
        max_wait=settings.max_wait,
        max_waiting=settings.max_waiting,
    )


def _adapters_in(folder: Path) -> list[tuple[MaskConfig, Shapes]]:
    """Return what can be read of a folder's adapters; the others are refused when they are asked for."""
    if not folder.is_dir():
        raise ValueError(f"there is no folder '{folder}' to take adapters from.")
    found, refused = [], []
    for place in sorted(path.parent for path in folder.glob(f"*/{CONFIG}")):
        try:
            config = MaskConfig.from_pretrained(str(place))
            if not isinstance(config, MaskConfig):
                raise ValueError(f"it is of type {config.peft_type}")
            with safe_open(place / TENSORS, "pt") as file:
                shapes = {module_name(key): tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
            found.append((config, shapes))
        except (OSError, ValueError, TypeError, KeyError, RecursionError, SafetensorError) as error:
            refused.append(f"{place.name}: {error}")
    if not found:
        raise ValueError(f"'{folder}' holds no mask that can be read. {' '.join(refused[:3])}".rstrip())
    return found


def _is_for(task: type[Task], config: MaskConfig) -> bool:
    return config.task_type == task.task_type or (config.task_type is None and task is Embeddings)


def _task_of(adapters: Sequence[tuple[MaskConfig, Shapes]], settings: ServerSettings) -> type[Task]:
    if settings.task:
        return TASKS[settings.task]
    said = {str(config.task_type) for config, _ in adapters}
    found = [task for task in TASKS.values() if all(_is_for(task, config) for config, _ in adapters)]
    if not found:
        raise ValueError(
            f"the adapters in '{settings.adapters}' are for {sorted(said)}: say which task to serve, one of {[*TASKS]}."
        )
    return found[0]


@contextmanager
def quietly() -> Iterator[None]:
    """Let transformers not advise to train the head, which each adapter brings."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)


def _load_base(settings: ServerSettings, task: type[Task], files: Sequence[Shapes]) -> Any:
    config = AutoConfig.from_pretrained(settings.base)
    has_labels = task in (Classification, Tagging)
    labels = settings.num_labels or (widest_head(_AUTO[task], config, files) if has_labels else 0)
    # a head that the base brings along may have another number of labels: each adapter has its own
    wanted = {"num_labels": labels, "ignore_mismatched_sizes": True} if labels and labels != config.num_labels else {}
    return _AUTO[task].from_pretrained(settings.base, dtype=settings.dtype, **wanted).to(settings.device)


def widest_head(auto: Any, config: Any, files: Sequence[Shapes]) -> int:
    """Return the largest number of labels of some adapters' heads; 0 if they have none of their own.

    Args:
        auto: transformers' class for the task, such as `AutoModelForSequenceClassification`.
        config: of the base model.
        files: of each adapter, the shapes of its tensors by name in the base model.
    """
    with torch.device("meta"):
        shapes = [
            {name: tuple(own.shape) for name, own in auto.from_config(_with(config, labels)).named_parameters()}
            for labels in (3, 5)
        ]
    outputs = {name for name, shape in shapes[0].items() if shape != shapes[1][name]}
    return max((shape[0] for file in files for name, shape in file.items() if name in outputs and shape), default=0)


def _with(config: Any, labels: int) -> Any:
    changed = type(config).from_dict(config.to_dict())
    changed.num_labels = labels
    return changed


def _longest(base: Any, tokenizer: Any) -> int | None:
    """Return how many tokens a base can take; None if nobody says."""
    places = getattr(base.config, "max_position_embeddings", None)
    for module in base.modules():
        positions = getattr(module, "position_embeddings", None)
        if places and isinstance(positions, nn.Embedding) and positions.padding_idx is not None:
            places -= positions.padding_idx + 1  # RoBERTa's first places are for padding
            break
    said = [limit for limit in (places, tokenizer.model_max_length) if limit and limit < 1 << 20]
    return min(said, default=None)


def _pooling_of(base: str) -> Any:
    """Return what a folder of sentence-transformers says of pooling; the mean if it says nothing."""
    path = Path(base) / "1_Pooling" / "config.json"
    said = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    modes = {"pooling_mode_cls_token": "cls", "pooling_mode_lasttoken": "last"}
    return next((name for key, name in modes.items() if said.get(key)), "mean")
