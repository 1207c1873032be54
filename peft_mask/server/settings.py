"""What the command line, and a configuration of Ray Serve, can say."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from peft_mask.server.tasks import TASKS
from peft_mask.server.tasks.embeddings import Pooling

TOKEN = "PEFT_MASK_SERVER_TOKEN"  # environment variable: what is secret stands on no command line

DType = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass
class ServerSettings:
    """A server's settings, of which only the first two have to be said."""

    base: str = field(metadata={"help": "Folder of the base model, or its id on the Hub."})
    adapters: str = field(metadata={"help": "Folder of adapters' folders."})
    task: str | None = field(
        default=None, metadata={"help": f"One of {', '.join(TASKS)}; by default what the adapters are for."}
    )
    dtype: str = field(default="auto", metadata={"help": f"One of {', '.join(get_args(DType))}."})
    device: str = field(default="cpu", metadata={"help": "Where the model computes, such as cuda."})
    threads: int = field(default=0, metadata={"help": "Threads of a replica's torch; 0 leaves them as they are."})
    num_labels: int = field(
        default=0, metadata={"help": "Labels that an adapter may have; by default those of the widest one there is."}
    )
    pooling: str | None = field(
        default=None,
        metadata={"help": f"Of embeddings: {', '.join(get_args(Pooling))}; by default what the base's folder says."},
    )
    max_length: int = field(default=0, metadata={"help": "Tokens of a text; 0 for as many as the base can take."})
    max_bytes: str = field(default="2GB", metadata={"help": "What coded adapters may take in memory."})
    max_new_tokens: int = field(default=512, metadata={"help": "Tokens that an answer of generation may have."})
    slots: int = field(default=64, metadata={"help": "Adapters that may be in use at a time."})
    max_rows: int = field(default=32, metadata={"help": "Rows of a batch."})
    max_tokens: int = field(default=16_384, metadata={"help": "Tokens of a batch, padding included."})
    max_wait: float = field(default=0.0, metadata={"help": "Seconds that a batch waits for more rows."})
    max_waiting: int = field(default=1024, metadata={"help": "Rows that may wait; one more is refused (503)."})
    max_questions: int = field(default=256, metadata={"help": "Rows of one request."})
    max_body: int = field(default=4_000_000, metadata={"help": "Bytes of one request."})
    timeout: float = field(default=60.0, metadata={"help": "Seconds until a request is given up (504)."})
    replicas: int = field(default=1, metadata={"help": "Processes with a model each; above 1 needs Ray Serve."})
    affinity: bool = field(
        default=False, metadata={"help": "Send an adapter's requests to the same replica, for bases with large masks."}
    )
    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen on."})
    port: int = field(default=8000, metadata={"help": "Port to listen on."})

    def __post_init__(self) -> None:
        choices_of = {"task": [*TASKS, None], "dtype": get_args(DType), "pooling": [*get_args(Pooling), None]}
        for name, choices in choices_of.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {[*choices]}, got {getattr(self, name)!r}.")
        for name in (
            "slots",
            "max_rows",
            "max_tokens",
            "max_waiting",
            "max_questions",
            "max_body",
            "max_new_tokens",
            "replicas",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("threads", "num_labels", "max_length", "max_wait"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}.")
        if self.max_questions > self.max_waiting:
            raise ValueError(
                f"max_questions must be at most max_waiting, which is {self.max_waiting}: got {self.max_questions}. So "
                "large a request would never fit."
            )
        if self.timeout <= 0:
            raise ValueError(f"timeout must be above 0 seconds, got {self.timeout}.")


def token() -> str | None:
    """Return what requests have to say, from the environment; None if nothing is to be said.

    Raises:
        ValueError: it is empty, as a variable is that was meant to be set.
    """
    if (said := os.environ.get(TOKEN)) is not None and not said.strip():
        raise ValueError(f"{TOKEN} is empty: give it a value, or unset it for a server that asks for no token.")
    return said


def settings_of(said: dict[str, Any]) -> ServerSettings:
    """Return the settings that a configuration says, whose values may be strings, as on Ray's command line.

    Raises:
        ValueError: a name is unknown, one is missing, or a value is not of its kind.
    """
    fields = {each.name: each for each in dataclasses.fields(ServerSettings)}
    if unknown := sorted(said.keys() - fields.keys()):
        raise ValueError(f"there is no setting {unknown[0]!r}: expected some of {sorted(fields)}.")
    if missing := [name for name in ("base", "adapters") if name not in said]:
        raise ValueError(f"the setting {missing[0]!r} is missing.")
    return ServerSettings(**{name: _converted(name, value, fields[name].default) for name, value in said.items()})


def _converted(name: str, value: Any, default: Any) -> Any:
    if not isinstance(value, str) or isinstance(default, str) or default in (None, dataclasses.MISSING):
        return value
    if isinstance(default, bool):
        if value.lower() not in ("true", "false"):
            raise ValueError(f"{name} must be true or false, got {value!r}.")
        return value.lower() == "true"
    try:
        return type(default)(value)
    except ValueError:
        raise ValueError(f"{name} must be a {type(default).__name__}, got {value!r}.") from None
