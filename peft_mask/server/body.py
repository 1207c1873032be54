"""A limit on what a request sends, held while it is received."""

from __future__ import annotations

import json
from typing import Any


class LimitedBody:
    """ASGI middleware that refuses requests of more than so many bytes, whether or not they say how many they have.

    Args:
        app: what is behind it.
        most: bytes.
    """

    def __init__(self, app: Any, most: int) -> None:
        self.app, self.most = app, most

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        said = dict(scope["headers"]).get(b"content-length", b"0")
        size = int(said) if said.isdigit() else 0
        body, more = bytearray(), True
        while more and size <= self.most:
            message = await receive()
            if message["type"] != "http.request":
                return  # who asked has gone
            body += message.get("body", b"")
            size, more = max(size, len(body)), message.get("more_body", False)
        if size > self.most:
            await self._refuse(send)
            return
        whole = iter([{"type": "http.request", "body": bytes(body), "more_body": False}])

        async def replay() -> Any:
            return next(whole, None) or await receive()

        await self.app(scope, replay, send)

    async def _refuse(self, send: Any) -> None:
        message = f"the request is too large: expected at most {self.most:,} bytes."
        body = json.dumps({"error": {"message": message, "type": "InvalidInputError", "code": 413}}).encode()
        headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
        await send({"type": "http.response.start", "status": 413, "headers": headers})
        await send({"type": "http.response.body", "body": body})
