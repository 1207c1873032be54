"""The same server over many processes and machines, on Ray Serve (2.60): `serve run peft_mask.server:build`.

Every replica can hold all adapters, so that any of them answers for any, and batches are mixed. An adapter is an
argument of the call and not Ray's multiplexed model id: `@serve.batch` splits batches by that, and Ray's own cache
evicts what others compute with.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from itertools import cycle
from typing import Any

from ray import serve
from ray.exceptions import ActorDiedError, RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from peft_mask.server.errors import LostReplicaError, OverloadedError, as_data
from peft_mask.server.http import Limits, create_app
from peft_mask.server.loading import load_batcher, task_of
from peft_mask.server.service import Outcome, Question, Service
from peft_mask.server.settings import ServerSettings, settings_of, token

_LOST = (RayActorError, ReplicaUnavailableError, DeploymentUnavailableError)
_PAUSES = (0.0, 0.2, 1.0, 3.0)  # seconds before each try; the router learns of a death within the first


class Replica:
    """A model in a process of its own.

    Args:
        settings: the server's.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self._service = Service(load_batcher(settings))
        self._seconds = settings.timeout

    async def answers(self, questions: Sequence[Question], options: Mapping[str, Any]) -> list[Outcome]:
        return await asyncio.wait_for(
            self._service.answers(questions, options), self._seconds
        )  # who asked is gone then

    async def adapters(self) -> list[str]:
        return await self._service.adapters()

    async def refresh(self, name: str) -> list[Outcome]:
        return await self._service.refresh(name)

    async def figures(self) -> list[dict[str, float]]:
        return await self._service.figures()

    async def check_health(self) -> None:
        """Ray's question, some seconds apart: a replica that computes no row is replaced."""
        await asyncio.wait_for(self._service.check(), self._seconds)


class Replicas:
    """A `Backend` of replicas. What was in flight on one that dies is asked of another: questions change nothing.

    Args:
        handles: of one deployment whose replicas answer for all adapters, or of several that share them out.
    """

    def __init__(self, handles: Sequence[DeploymentHandle[Any]]) -> None:
        self._handles = handles

    async def answers(self, questions: Sequence[Question], options: Mapping[str, Any]) -> list[Outcome]:
        places: dict[int, list[int]] = defaultdict(list)
        for place, (name, _) in enumerate(questions):
            places[self._order(name)[0]].append(place)
        parts = await asyncio.gather(
            *(self._ask([questions[place] for place in own], options) for own in places.values()),
            return_exceptions=True,
        )
        found: dict[int, Outcome] = {}
        for own, part in zip(places.values(), parts, strict=True):
            if isinstance(part, BaseException):
                part = [{"error": as_data(part)}] * len(own)
            found.update(zip(own, part, strict=True))
        return [found[place] for place in range(len(questions))]

    async def adapters(self) -> list[str]:
        return await self._tried([*range(len(self._handles))], lambda handle: handle.adapters.remote())

    async def refresh(self, name: str) -> list[Outcome]:
        found: list[Outcome] = []
        for each in await self._everywhere("refresh", name):
            if isinstance(each, ActorDiedError):
                continue  # what comes in its place reads the new version
            if isinstance(each, _LOST):
                each = LostReplicaError(f"a replica could not be told ({type(each).__name__}): ask again later.")
            found.append({"error": as_data(each)} if isinstance(each, Exception) else each[0])
        if not found:
            raise LostReplicaError("no replica was there: ask again later.")
        return found

    async def figures(self) -> list[dict[str, float]]:
        return [each[0] for each in await self._everywhere("figures") if not isinstance(each, Exception)]

    async def check(self) -> None:
        for number in range(len(self._handles)):
            await self._tried([number], lambda handle: handle.check_health.remote())

    def _order(self, name: str) -> list[int]:
        """Return which handles to ask for an adapter, the first one first: as everybody else would, without a table."""

        def weight(number: int) -> bytes:
            return hashlib.blake2b(f"{number}/{name}".encode(), digest_size=8).digest()

        return sorted(range(len(self._handles)), key=weight)

    async def _ask(self, questions: Sequence[Question], options: Mapping[str, Any]) -> list[Outcome]:
        order = self._order(questions[0][0])
        return await self._tried(order, lambda handle: handle.answers.remote(list(questions), dict(options)))

    async def _tried(self, order: Sequence[int], ask: Callable[[DeploymentHandle[Any]], Awaitable[Any]]) -> Any:
        for number, pause in zip(cycle(order), _PAUSES):
            await asyncio.sleep(pause)
            try:
                return await ask(self._handles[number])
            except BackPressureError:
                raise OverloadedError("all replicas have as many requests as they may have: ask again later.") from None
            except _LOST as error:
                last = error
        why = type(last).__name__
        raise LostReplicaError(f"{len(_PAUSES)} replicas died or were not there ({why}): ask again later.")

    async def _everywhere(self, method: str, *args: Any) -> list[Any]:
        found = []
        for handle in self._handles:
            try:
                found += await handle.broadcast(method, *args).results_async(return_exceptions=True)
            except _LOST as error:
                found.append(error)
        return found


@serve.ingress()
class Ingress:
    """HTTP in front of the replicas.

    Args:
        handles: of the replicas.
        settings: the server's.
        token: what requests have to say; None for nothing.
    """

    def __init__(self, handles: Sequence[DeploymentHandle[Any]], settings: ServerSettings, token: str | None) -> None:
        self._handles, self._settings, self._token = handles, settings, token

    def __serve_build_asgi_app__(self) -> Any:
        return create_app(Replicas(self._handles), task_of(self._settings), Limits.of(self._settings), self._token)


def build(args: dict[str, Any]) -> serve.Application:
    """Return the application for Ray: a builder for `serve run` and for configurations.

    Deployments are `Replica` and `Ingress`; how many of each there are, on what machines and with how many cores and
    GPUs, is Ray's own configuration, and has the last word over `replicas`. With `affinity` there are deployments
    `Replica-0`, `Replica-1` and so on in the place of one. (Ray's `ConsistentHashRouter`, experimental in 2.60, left
    requests without an answer where several came at once.)

    Args:
        args: `ServerSettings` by name.

    Raises:
        ValueError: a setting is wrong.
    """
    settings = settings_of(args)
    names = [f"Replica-{number}" for number in range(settings.replicas)] if settings.affinity else ["Replica"]
    replicas = [
        serve.deployment(Replica).options(
            name=name,
            num_replicas=settings.replicas // len(names),
            max_ongoing_requests=settings.max_waiting,
            max_queued_requests=settings.max_waiting,
            health_check_period_s=5,
            health_check_timeout_s=max(30, 2 * settings.timeout),
        )
        for name in names
    ]
    ingress = serve.deployment(Ingress).options(max_ongoing_requests=settings.max_waiting * settings.replicas)
    return ingress.bind([each.bind(settings) for each in replicas], settings, token())
