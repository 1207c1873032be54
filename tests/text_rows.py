"""Texts with labels, files of them, and the training on such files: for tests of several rooms."""

import json
from pathlib import Path
from typing import Any

from peft_mask.recipes import text_classification

ROWS = [{"text": f"{word} {i}", "label": label} for i in range(12) for word, label in (("cat", "pet"), ("oak", "tree"))]


def write_csv(file: Path, rows: list[dict[str, str]]) -> str:
    file.write_text("\n".join([",".join(rows[0]), *(",".join(row.values()) for row in rows)]))
    return str(file)


def write_jsonl(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return str(file)


def run_script(model: str, output: Path, *arguments: str) -> dict[str, float]:
    common = ["--model_name_or_path", model, "--output_dir", str(output), "--max_steps", "2", "--use_cpu", "true"]
    return text_classification.main([*common, "--disable_tqdm", "true", *arguments])
