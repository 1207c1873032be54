"""The rows, a file for each part of the table."""

from tests.situations import changing, saving, serving, targets, training
from tests.situations.table import SITUATIONS

__all__ = ["SITUATIONS", "changing", "saving", "serving", "targets", "training"]
