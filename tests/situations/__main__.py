"""Writes docs/situations.md from the table."""

from pathlib import Path

from tests.situations import rows
from tests.situations.table import page

assert rows
(Path(__file__).parents[2] / "docs" / "situations.md").write_text(page(), "utf-8")
