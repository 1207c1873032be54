"""What a request can be refused for, and the status that HTTP has for each."""

from __future__ import annotations

from peft_mask.serving.errors import AdapterRefusedError, NoRoomError, UnknownAdapterError


class InvalidInputError(ValueError):
    """A row of a request cannot be computed as it is: no text, an empty one, too long a one, a wrong option."""


class OverloadedError(RuntimeError):
    """As many rows wait as may wait; ask again later."""


class LostReplicaError(RuntimeError):
    """Each replica that was asked died before it had answered."""


# the first that an error is an instance of counts: an unknown adapter is a kind of refused one
_STATUS: tuple[tuple[type[Exception], int], ...] = (
    (InvalidInputError, 422),
    (UnknownAdapterError, 404),
    (AdapterRefusedError, 422),
    (NoRoomError, 503),
    (OverloadedError, 503),
    (LostReplicaError, 503),
    (TimeoutError, 504),
)
INTERNAL = 500


def status_of(error: BaseException) -> int:
    """Return the HTTP status of an error; 500 for one that is nobody's fault who asks."""
    return next((status for kind, status in _STATUS if isinstance(error, kind)), INTERNAL)


def as_data(error: BaseException) -> dict[str, object]:
    """Return what a client is told of an error, in the form that OpenAI's servers have.

    What is not a client's fault is told by its kind alone: its text may speak of the machine.
    """
    status = status_of(error)
    message = str(error) if status != INTERNAL else f"the server failed at this row ({type(error).__name__})."
    return {"message": message, "type": type(error).__name__, "code": status}
