"""`vllm serve`'s own door to switching: which mask is in force, and another one, over HTTP."""

from __future__ import annotations

import json
import os
from argparse import Namespace
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_mask.serving.errors import AdapterRefusedError, UnknownAdapterError
from peft_mask.serving.source import check_name, locator, names_of, without_place
from peft_mask.vllm.release import check_release
from peft_mask.vllm.switching import SwitchFailedError, mask_in_force_async, switch_mask_async

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.requests import Request
    from starlette.responses import JSONResponse
    from vllm.engine.protocol import EngineClient

FOLDER = "PEFT_MASK_ADAPTERS"  # environment variable: the folder of adapters' folders; no request reaches out of it
ROUTE = "/v1/peft_mask"  # below /v1, where vLLM asks for its --api-key
_LONGEST = 4096  # bytes of a request


class MaskEndpoint:
    """vLLM's endpoint plugin `peft_mask`: `VLLM_PLUGINS=peft_mask PEFT_MASK_ADAPTERS=adapters vllm serve ...`.

    `GET /v1/peft_mask` answers `{"adapter": name or null, "digest": ..., "zeros": ..., "adapters": [names]}`, and
    `POST` of `{"adapter": name or null}` switches and answers the same. Errors are `{"error": reason}`: 400 for what is
    no such request, 404 for an unknown adapter, 422 for a refused one, 503 if vLLM has to be restarted, 501 if it was
    started without `--worker-extension-cls peft_mask.vllm.MaskExtension`.

    Raises:
        ImportError: this vLLM is of another minor release.
        ValueError: the folder of adapters is not named, or is not there.
    """

    name = "peft_mask"
    required_tasks: tuple[str, ...] | None = None  # whatever the model does

    def __init__(self) -> None:
        check_release()
        root = os.environ.get(FOLDER)
        if not root:
            raise ValueError(f"set {FOLDER} to the folder that has the adapters' folders.")
        self._folder_of = locator(root)
        self._root = Path(root)
        self._engine: EngineClient | None = None

    def attach_router(self, app: FastAPI) -> None:
        """Add the two routes."""
        app.add_route(ROUTE, self._answer(self.in_force), methods=["GET"])
        app.add_route(ROUTE, self._answer(self.switch), methods=["POST"])

    async def init_state(self, engine_client: EngineClient | None, state: Any, args: Namespace) -> None:
        """Keep the engine; a server that only renders has none."""
        self._engine = engine_client

    async def in_force(self, engine: EngineClient, body: bytes) -> dict[str, Any]:
        """Answer which mask is in force."""
        return self._named(await mask_in_force_async(engine))

    async def switch(self, engine: EngineClient, body: bytes) -> dict[str, Any]:
        """Switch to the mask that a request names, and answer the same."""
        name = _asked_for(body)
        folder = None if name is None else self._folder_of(check_name(name))
        try:
            return self._named(await switch_mask_async(engine, folder))
        except AdapterRefusedError as error:
            raise AdapterRefusedError(name or "the base", error.reason) from error  # who asks need not know the folder

    def _named(self, report: dict[str, Any]) -> dict[str, Any]:
        folder = report["adapter"]
        name = None if folder is None else Path(folder).name
        return {**report, "adapter": name, "adapters": names_of(self._root)}

    def _answer(self, what: Callable[[EngineClient, bytes], Awaitable[dict[str, Any]]]) -> Callable[..., Any]:
        from starlette.responses import JSONResponse

        async def answer(request: Request) -> JSONResponse:
            body = b""
            async for part in request.stream():
                if len(body := body + part) > _LONGEST:
                    break
            content, status = await self.respond(what, body)
            return JSONResponse(content, status)

        return answer

    async def respond(
        self, what: Callable[[EngineClient, bytes], Awaitable[dict[str, Any]]], body: bytes
    ) -> tuple[dict[str, Any], int]:
        """Return what a request is answered, and the HTTP status."""
        try:
            if self._engine is None:
                raise NotImplementedError("this server has no engine.")
            return await what(self._engine, body), 200
        except Exception as error:
            status = next((status for kind, status in _STATUS.items() if isinstance(error, kind)), None)
            if status is None:
                raise
            return {"error": without_place(str(error), self._root)}, status


class _BadRequestError(ValueError):
    pass


# the first that fits
_STATUS: dict[type[Exception], int] = {
    _BadRequestError: 400,
    UnknownAdapterError: 404,
    AdapterRefusedError: 422,
    SwitchFailedError: 503,
    NotImplementedError: 501,
    RuntimeError: 501,  # the workers do not have the extension
}


def _asked_for(body: bytes) -> str | None:
    """Return the name in a request, None for the base."""
    if len(body) > _LONGEST:
        raise _BadRequestError(f"a request has at most {_LONGEST} bytes.")
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        asked = None
    if not isinstance(asked, dict) or asked.keys() != {"adapter"} or not isinstance(asked["adapter"], str | None):
        raise _BadRequestError('a request is {"adapter": "name"}, or {"adapter": null} for the base.')
    name: str | None = asked["adapter"]
    return name
