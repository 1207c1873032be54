"""The same server over many processes and machines, on Ray Serve (2.60): `serve run peft_mask.server.cluster:build`.

Every replica can hold all adapters, so that any of them answers for any, and batches are mixed. An adapter is an
argument of the call and not Ray's multiplexed model id: `@serve.batch` splits batches by that, and Ray's own cache
evicts what others compute with.
"""

from __future__ import annotations

import asyncio
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from peft_mask.server.errors import LostReplicaError, OverloadedError, as_data
from peft_mask.server.http import Limits, create_app
from peft_mask.server.loading import load_batcher, task_of
from peft_mask.server.service import Outcome, Question, Service
from peft_mask.server.settings import TOKEN, ServerSettings, settings_of

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
        return await self._service.answers(questions, options)

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
        handle: of the deployment.
        affinity: whether an adapter's questions go to the same replica.
    """

    def __init__(self, handle: DeploymentHandle[Any], affinity: bool = False) -> None:
        self._handle = handle
        self._affinity = affinity

    async def answers(self, questions: Sequence[Question], options: Mapping[str, Any]) -> list[Outcome]:
        if not self._affinity:
            return await self._ask(questions, options, None)
        places: dict[str, list[int]] = defaultdict(list)
        for place, (name, _) in enumerate(questions):
            places[name].append(place)
        parts = await asyncio.gather(
            *(self._ask([questions[place] for place in own], options, name) for name, own in places.items())
        )
        found: dict[int, Outcome] = {}
        for own, part in zip(places.values(), parts, strict=True):
            found.update(zip(own, part, strict=True))
        return [found[place] for place in range(len(questions))]

    async def adapters(self) -> list[str]:
        return await self._tried(lambda: self._handle.adapters.remote())

    async def refresh(self, name: str) -> list[Outcome]:
        return [
            {"error": as_data(each)} if isinstance(each, Exception) else each[0]
            for each in await self._handle.broadcast("refresh", name).results_async(return_exceptions=True)
            if not isinstance(each, _LOST)  # what comes in its place reads the new version
        ]

    async def figures(self) -> list[dict[str, float]]:
        found = await self._handle.broadcast("figures").results_async(return_exceptions=True)
        return [each[0] for each in found if not isinstance(each, Exception)]

    async def check(self) -> None:
        await self._tried(lambda: self._handle.check_health.remote())

    async def _ask(self, questions: Sequence[Question], options: Mapping[str, Any], name: str | None) -> list[Outcome]:
        handle = self._handle if name is None else self._handle.options(session_id=name)
        return await self._tried(lambda: handle.answers.remote(list(questions), dict(options)))

    @staticmethod
    async def _tried(ask: Any) -> Any:
        for pause in _PAUSES:
            await asyncio.sleep(pause)
            try:
                return await ask()
            except BackPressureError:
                raise OverloadedError("all replicas have as many requests as they may have: ask again later.") from None
            except _LOST as error:
                last = error
        why = type(last).__name__
        raise LostReplicaError(f"{len(_PAUSES)} replicas died or were not there ({why}): ask again later.")


@serve.ingress()
class Ingress:
    """HTTP in front of the replicas.

    Args:
        handle: of the replicas.
        settings: the server's.
        token: what requests have to say; None for nothing.
    """

    def __init__(self, handle: DeploymentHandle[Any], settings: ServerSettings, token: str | None) -> None:
        self._handle, self._settings, self._token = handle, settings, token

    def __serve_build_asgi_app__(self) -> Any:
        backend = Replicas(self._handle, self._settings.affinity)
        return create_app(backend, task_of(self._settings), Limits.of(self._settings), self._token)


def build(args: dict[str, Any]) -> serve.Application:
    """Return the application for Ray: a builder for `serve run`, `serve build` and configurations.

    Deployments are `Replica` and `Ingress`; how many of each there are, on what machines and with how many cores and
    GPUs, is Ray's own configuration, and has the last word over `replicas`.

    Args:
        args: `ServerSettings` by name.

    Raises:
        ValueError: a setting is wrong.
    """
    settings = settings_of(args)
    router: dict[str, Any] = {}
    if settings.affinity:
        path = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
        router["request_router_config"] = RequestRouterConfig(request_router_class=path)
    replica = serve.deployment(Replica).options(
        num_replicas=settings.replicas,
        max_ongoing_requests=settings.max_waiting,
        max_queued_requests=settings.max_waiting,
        health_check_period_s=5,
        health_check_timeout_s=max(30, 2 * settings.timeout),
        **router,
    )
    ingress = serve.deployment(Ingress).options(max_ongoing_requests=settings.max_waiting * settings.replicas)
    return ingress.bind(replica.bind(settings), settings, os.environ.get(TOKEN))
