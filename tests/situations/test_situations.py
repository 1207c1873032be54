"""Every row of the table ends as it says, with LoRA and with a mask, and the page is of the table as it is."""

import re
from pathlib import Path

import pytest

from tests.situations.methods import METHODS
from tests.situations.rows import SITUATIONS
from tests.situations.table import page

ROWS = [pytest.param(row, id=row.do.__name__, marks=[pytest.mark.slow] if row.slow else []) for row in SITUATIONS]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("row", ROWS)
def test_a_situation_ends_as_the_table_says(row, method):
    outcome, message = row.tried(method)
    assert outcome == getattr(row, method), message
    refusal = row.refusal_of(method)
    assert bool(refusal) == (outcome == "refused"), "a row has a pattern for each error, and none besides"
    assert re.search(refusal, message)


def test_the_page_is_of_the_table_as_it_is():
    written = (Path(__file__).parents[2] / "docs" / "situations.md").read_text("utf-8")
    assert written == page(SITUATIONS), "write it again: python -m tests.situations"
