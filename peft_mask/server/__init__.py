"""A server for many adapters of one base: texts and the names of tasks in, answers out.

    python -m peft_mask.server --base BASE --adapters FOLDER

`Batcher` and the tasks need nothing beyond the package, `create_app` needs FastAPI, and `build`, which makes the
application for several replicas, Ray Serve: `pip install peft-mask[serve]`.
"""

from typing import TYPE_CHECKING, Any

from peft_mask.server.batcher import Batcher
from peft_mask.server.errors import InvalidInputError, OverloadedError
from peft_mask.server.loading import load_batcher
from peft_mask.server.service import Service
from peft_mask.server.settings import ServerSettings
from peft_mask.server.statistics import Statistics
from peft_mask.server.tasks import Classification, Embeddings, Generation, Tagging

if TYPE_CHECKING:
    from peft_mask.server.cluster import build
    from peft_mask.server.http import Limits, create_app

__all__ = [
    "Batcher",
    "Classification",
    "Embeddings",
    "Generation",
    "InvalidInputError",
    "Limits",
    "OverloadedError",
    "ServerSettings",
    "Service",
    "Statistics",
    "Tagging",
    "build",
    "create_app",
    "load_batcher",
]


def __getattr__(name: str) -> Any:  # FastAPI and Ray are for those who ask for them
    if name == "build":
        from peft_mask.server.cluster import build

        return build
    if name in ("Limits", "create_app"):
        from peft_mask.server import http

        return getattr(http, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
