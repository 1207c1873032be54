"""Many tasks of BERT-base on disk: counted from its shape, nothing is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from peft_mask import MaskConfig
from peft_mask.analysis import paper_config, storage
from peft_mask.analysis.plots import Line, plot_lines
from reproduction.models import Models
from reproduction.scale import Scale

TITLE = "Storage: BERT-base, 1 to 11 tasks"
NOTE = "MB; from shapes alone. The paper counts one bit a masked weight of blocks 2-11, pooler and classifier."


def run(models: Models, scale: Scale) -> dict[str, Any]:
    with torch.device("meta"):
        bert = AutoModelForSequenceClassification.from_config(AutoConfig.for_model("bert"))
    raw = storage(bert, paper_config())
    coded = storage(bert, MaskConfig(task_type="SEQ_CLS"), MaskConfig().target_sparsity)
    rows = [
        {
            "tasks": tasks,
            "fine-tuned models": round(raw.finetuning(tasks) / 1e6, 1),
            "masks, raw bits (paper)": round(raw.masking(tasks) / 1e6, 1),
            "masks, 0.5 % off, coded": round(coded.masking(tasks) / 1e6, 1),
        }
        for tasks in range(1, 12)
    ]
    return {"rows": rows, "mask_bytes_raw": raw.mask, "mask_bytes_coded": coded.mask}


def draw(result: dict[str, Any], path: Path) -> None:
    rows = result["rows"]
    names = [name for name in rows[0] if name != "tasks"]
    lines = {name: Line([row["tasks"] for row in rows], [row[name] for row in rows]) for name in names}
    plot_lines(path, lines, "tasks", "MB", TITLE)
