"""HTTP in front of a backend: routes, limits, a token, metrics, a page."""
# FastAPI reads annotations as they are: those of a route name what was made for the task

import asyncio
import hmac
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Header, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException

from peft_mask.server.body import LimitedBody
from peft_mask.server.errors import INTERNAL, InvalidInputError, LostReplicaError, OverloadedError, as_data, status_of
from peft_mask.server.metrics import HttpMetrics
from peft_mask.server.schemas import question_model, rows_of
from peft_mask.server.service import Backend, Outcome, Question
from peft_mask.server.settings import ServerSettings
from peft_mask.server.tasks.task import Task
from peft_mask.serving.errors import AdapterRefusedError

_PAGE = Path(__file__).with_name("page.html")
_RETRY_AFTER = {"Retry-After": "1"}


@dataclass(frozen=True)
class Limits:
    """What one request may ask for.

    Attributes:
        questions: rows.
        body: bytes.
        seconds: until it is given up.
    """

    questions: int = 256
    body: int = 4_000_000
    seconds: float = 60.0

    @classmethod
    def of(cls, settings: ServerSettings) -> "Limits":
        """Return those of a server."""
        return cls(settings.max_questions, settings.max_body, settings.timeout)


def create_app(backend: Backend, task: type[Task], limits: Limits | None = None, token: str | None = None) -> FastAPI:
    """Return an ASGI application that answers for adapters.

    Args:
        backend: what computes.
        task: what it computes.
        limits: of a request.
        token: what `Authorization: Bearer` has to say for anything but the page, `/health` and the documentation of
            the interface; None for nothing.
    """
    limits = limits or Limits()
    app = FastAPI(title="peft-mask", description=f"{task.__name__} by many adapters of one base model.")
    metrics = HttpMetrics()
    app.add_middleware(LimitedBody, most=limits.body)
    _add_errors(app)
    guard = [Depends(_checking(token))]

    @app.middleware("http")
    async def count(request: Request, call: Callable[[Request], Awaitable[Response]]) -> Response:
        start, status = time.perf_counter(), INTERNAL
        try:
            response = await call(request)
            status = response.status_code
            return response
        finally:
            route = request.scope.get("route")  # not the address: anybody can make up new ones
            metrics.count(getattr(route, "path", "other"), status, time.perf_counter() - start)

    asked = question_model(task)

    @app.post(task.path, dependencies=guard, summary=(task.__doc__ or "").splitlines()[0])
    async def answer(request: asked) -> JSONResponse:  # type: ignore[valid-type]
        questions, options = rows_of(request, task, limits.questions)
        outcomes = await _in_time(backend.answers(questions, options), limits.seconds)
        return _answered(task, questions, outcomes, getattr(request, "encoding_format", None))

    @app.get("/v1/models", dependencies=guard, summary="The adapters there are.")
    async def models() -> dict[str, Any]:
        names = [*await _in_time(backend.adapters(), limits.seconds), *(["__base__"] if task.answers_base else [])]
        data = [{"id": name, "object": "model", "owned_by": "peft-mask"} for name in names]
        return {"object": "list", "task": task.name, "path": task.path, "data": data}

    @app.post("/v1/models/{name}/refresh", dependencies=guard, summary="Read an adapter anew, in all replicas.")
    async def refresh(name: str) -> JSONResponse:
        outcomes = await _in_time(backend.refresh(name), limits.seconds)
        if failed := [outcome["error"] for outcome in outcomes if "error" in outcome]:
            return JSONResponse({"error": failed[0]}, failed[0]["code"])
        return JSONResponse({"model": name, "changed": any(outcome["output"] for outcome in outcomes)})

    @app.get("/health", summary="Computes a row.")
    async def health() -> JSONResponse:
        try:
            await asyncio.wait_for(backend.check(), limits.seconds)
        except Exception as error:
            return JSONResponse({"status": "failing", "error": as_data(error)}, 503)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics", dependencies=guard, summary="Figures for Prometheus.")
    async def figures() -> Response:
        return Response(
            metrics.text(await _in_time(backend.figures(), limits.seconds)), media_type="text/plain; version=0.0.4"
        )

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(_PAGE.read_text(encoding="utf-8"))

    return app


def _answered(
    task: type[Task], questions: Sequence[Question], outcomes: Sequence[Outcome], encoding: str | None
) -> JSONResponse:
    """Return the answers; where there is none at all, with the status of the first error."""
    errors = [outcome["error"] for outcome in outcomes if "error" in outcome]
    if len(errors) == len(outcomes):
        status = errors[0]["code"]
        return JSONResponse({"error": errors[0]}, status, _RETRY_AFTER if status == 503 else None)
    entries = [
        {"index": index, "model": name, **_entry(task, outcome, encoding)}
        for index, ((name, _), outcome) in enumerate(zip(questions, outcomes, strict=True))
    ]
    return JSONResponse({"object": "list", task.entries: entries})


def _entry(task: type[Task], outcome: Outcome, encoding: str | None) -> dict[str, Any]:
    return outcome if "error" in outcome else task.entry(outcome["output"], encoding)


async def _in_time(work: Awaitable[Any], seconds: float) -> Any:
    try:
        return await asyncio.wait_for(work, seconds)
    except asyncio.TimeoutError:
        raise TimeoutError(f"the request was not answered within {seconds:g} seconds.") from None


def _checking(token: str | None) -> Callable[..., None]:
    def check(authorization: Annotated[str | None, Header()] = None) -> None:
        scheme, _, said = (authorization or "").partition(" ")
        is_right = (
            scheme.lower() == "bearer" and token is not None and hmac.compare_digest(said.encode(), token.encode())
        )
        if token is not None and not is_right:
            message = "send the server's token as 'Authorization: Bearer TOKEN'."
            raise HTTPException(401, message, {"WWW-Authenticate": "Bearer"})

    return check


def _add_errors(app: FastAPI) -> None:
    """Let every error have the same form."""

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"][1:])
        place = place if place and first["type"] != "json_invalid" else "body"
        return _error(422, "InvalidInputError", f"{place}: {first['msg']}.")

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        return _error(error.status_code, "HTTPException", str(error.detail), error.headers)

    async def told(request: Request, error: Exception) -> JSONResponse:
        status = status_of(error)
        return JSONResponse({"error": as_data(error)}, status, _RETRY_AFTER if status == 503 else None)

    # for Exception starlette logs the error after it was told
    for kind in (InvalidInputError, AdapterRefusedError, OverloadedError, LostReplicaError, TimeoutError, Exception):
        app.add_exception_handler(kind, told)


def _error(status: int, kind: str, message: str, headers: Any = None) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "type": kind, "code": status}}, status, headers)
