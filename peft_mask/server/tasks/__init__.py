"""The questions that a server answers, a file for each."""

from peft_mask.server.tasks.classification import Classification
from peft_mask.server.tasks.embeddings import Embeddings
from peft_mask.server.tasks.generation import Generation
from peft_mask.server.tasks.tagging import Tagging
from peft_mask.server.tasks.task import Batch, Row, Task

TASKS: dict[str, type[Task]] = {task.name: task for task in (Classification, Tagging, Embeddings, Generation)}

__all__ = ["TASKS", "Batch", "Classification", "Embeddings", "Generation", "Row", "Tagging", "Task"]
