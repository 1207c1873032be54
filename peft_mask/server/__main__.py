"""Answer for a folder of adapters over HTTP: `python -m peft_mask.server --base BASE --adapters FOLDER`."""

from __future__ import annotations

import os

from transformers import HfArgumentParser

from peft_mask.server.settings import ServerSettings, token


def main(argv: list[str] | None = None) -> None:
    """Serve until Ctrl-C.

    Raises:
        SystemExit: a setting is wrong, a package is missing, or nothing can be loaded.
    """
    parser = HfArgumentParser(ServerSettings, prog="python -m peft_mask.server", description=__doc__)
    try:
        (settings,) = parser.parse_args_into_dataclasses(argv)
        (_serve_replicas if settings.replicas > 1 else _serve)(settings)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    except ModuleNotFoundError as error:
        raise SystemExit(f"error: {error.name} is missing: pip install 'peft-mask[serve]'.") from error


def _serve(settings: ServerSettings) -> None:
    import uvicorn

    from peft_mask.server.http import Limits, create_app
    from peft_mask.server.loading import load_batcher
    from peft_mask.server.service import Service

    batcher = load_batcher(settings)
    app = create_app(Service(batcher), type(batcher.task), Limits.of(settings), token())
    print(
        f"{batcher.task.name}: {len(batcher.cache.names())} adapters at http://{settings.host}:{settings.port}/",
        flush=True,
    )
    uvicorn.run(app, host=settings.host, port=settings.port, log_level="warning")


def _serve_replicas(settings: ServerSettings) -> None:
    import dataclasses

    import ray
    from ray import serve

    from peft_mask.server.cluster import build

    application = build(dataclasses.asdict(settings))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # cores are shared by what computes and what listens: Ray shall start them all the same
    cores = max(os.cpu_count() or 1, settings.replicas + 2)
    own = {"_node_ip_address": settings.host} if settings.host == "127.0.0.1" else {}
    ray.init(num_cpus=cores, include_dashboard=False, **own)
    serve.start(http_options={"host": settings.host, "port": settings.port})
    print(f"{settings.replicas} replicas at http://{settings.host}:{settings.port}/ once they are loaded", flush=True)
    serve.run(application, name="peft-mask", blocking=True)


if __name__ == "__main__":
    main()
