"""Writes docs/situations.md from the table."""

from pathlib import Path

from tests.situations.rows import SITUATIONS
from tests.situations.table import page

(Path(__file__).parents[2] / "docs" / "situations.md").write_text(page(SITUATIONS), "utf-8")
