"""Switching masks from outside vLLM's workers: every step, in the one order in which no stale answer can come out."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from peft_mask.serving.errors import AdapterRefusedError

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.engine.protocol import EngineClient

Adapter = str | os.PathLike[str] | None


class SwitchFailedError(RuntimeError):
    """A switch stopped halfway: weights may be half of one mask and half of another. Restart vLLM."""


def switch_mask(llm: LLM, adapter: Adapter) -> dict[str, Any]:
    """Put a mask into the weights of an offline engine, in the place of the one before.

    The mask is read and checked by every worker before anything changes. Then the prefix cache is emptied, which holds
    keys and values of the old weights, and the weights change.

    Args:
        llm: made with `worker_extension_cls="peft_mask.vllm.MaskExtension"`.
        adapter: its folder, where all workers find it; None for the base, which comes back bit for bit.

    Returns:
        What `mask_in_force` does from then on.

    Raises:
        AdapterRefusedError: the adapter, or this engine, is not one to switch; the reason. Nothing has changed.
        RuntimeError: requests have not been finished, or the workers do not have the extension. Nothing has changed.
        SwitchFailedError: the switch stopped halfway, now or earlier. Restart vLLM.
    """
    folder = _folder(adapter)
    if llm.llm_engine.has_unfinished_requests():
        raise RuntimeError("requests have not been finished, and would go on with other weights: let them end first.")
    _check_prepared(folder, _call(llm.collective_rpc, "mask_prepare", folder))
    if not llm.reset_prefix_cache(reset_connector=True):
        raise RuntimeError("the prefix cache could not be emptied: is a request running? The weights are as before.")
    llm.reset_mm_cache()
    llm.llm_engine.reset_encoder_cache()
    return _in_force(folder, _call(llm.collective_rpc, "mask_apply", folder))


async def switch_mask_async(engine: EngineClient, adapter: Adapter) -> dict[str, Any]:
    """Put a mask into the weights of a running server's engine, in the place of the one before.

    Requests that are running end with the mask that they began with; those that come meanwhile wait. What is refused is
    refused before anybody waits. Once begun, a switch ends, even if the task that waits for it is cancelled.

    Args:
        engine: an `AsyncLLM` with `worker_extension_cls="peft_mask.vllm.MaskExtension"`.
        adapter: as for `switch_mask`.

    Returns:
        What `mask_in_force_async` does from then on.

    Raises:
        AdapterRefusedError: as for `switch_mask`.
        RuntimeError: the workers do not have the extension.
        SwitchFailedError: the switch stopped halfway, now or earlier. The engine stays paused: restart vLLM.
    """
    return await asyncio.shield(asyncio.ensure_future(_switched(engine, _folder(adapter))))


async def _switched(engine: EngineClient, folder: str | None) -> dict[str, Any]:
    async with _locks.setdefault(engine, asyncio.Lock()):
        _check_prepared(folder, await _call_async(engine.collective_rpc, "mask_prepare", folder))
        others = await engine.is_paused()  # who paused it will want it to stay so
        await engine.pause_generation(mode="wait", clear_cache=True)
        try:
            report = _in_force(folder, await _call_async(engine.collective_rpc, "mask_apply", folder))
        except AdapterRefusedError:
            if not others:
                await engine.resume_generation()
            raise
        except SwitchFailedError:
            raise
        except Exception as error:  # whoever cannot be asked may have changed or not
            raise SwitchFailedError(
                f"the workers did not answer ({error}). Restart vLLM, which stays paused."
            ) from error
        if not others:
            await engine.resume_generation()
        return report


_locks: WeakKeyDictionary[Any, asyncio.Lock] = WeakKeyDictionary()


def mask_in_force(llm: LLM) -> dict[str, Any]:
    """Return which mask an offline engine's weights are under.

    Returns:
        `{"adapter": folder or None, "digest": of its files, "zeros": weights that are off}`.

    Raises:
        RuntimeError: the workers do not have the extension.
        SwitchFailedError: a switch stopped halfway. Restart vLLM.
    """
    return _in_force(None, _call(llm.collective_rpc, "mask_in_force"))


async def mask_in_force_async(engine: EngineClient) -> dict[str, Any]:
    """Return which mask a server's weights are under; see `mask_in_force`."""
    return _in_force(None, await _call_async(engine.collective_rpc, "mask_in_force"))


def _folder(adapter: Adapter) -> str | None:
    return None if adapter is None else os.path.abspath(adapter)


def _call(rpc: Callable[..., list[Any]], method: str, *args: str | None) -> list[Any]:
    try:
        return rpc(method, args=args)
    except Exception as error:
        raise _explained(error, method) from error


async def _call_async(rpc: Callable[..., Awaitable[list[Any]]], method: str, *args: str | None) -> list[Any]:
    try:
        return await rpc(method, args=args)
    except Exception as error:
        raise _explained(error, method) from error


def _explained(error: Exception, method: str) -> Exception:
    said = str(error)  # all that comes from another process; vLLM has two ways to say it
    if f"'{method}' is not implemented" not in said and f"has no attribute '{method}'" not in said:
        return error
    return RuntimeError(
        "this engine's workers cannot switch masks: start vLLM with --worker-extension-cls "
        'peft_mask.vllm.MaskExtension, or LLM(..., worker_extension_cls="peft_mask.vllm.MaskExtension").'
    )


def _check_prepared(folder: str | None, reports: Sequence[dict[str, Any]]) -> None:
    """Raise unless all workers have prepared a mask, and each element of it is in one of them."""
    _check_whole(reports)
    _check_accepted(folder, reports)
    changes, held = reports[0]["changes"], sum(report["held"] for report in reports)
    if held < changes:
        raise AdapterRefusedError(
            folder or "the base",
            f"of {changes:,} weights that would change, vLLM's loader finds {held:,} in the model: it leaves some out.",
        )


def _check_accepted(folder: str | None, reports: Sequence[dict[str, Any]]) -> None:
    for report in reports:
        if "refused" in report:
            raise AdapterRefusedError(folder or "the base", report["refused"])


def _check_whole(reports: Sequence[dict[str, Any]]) -> None:
    for report in reports:
        if reason := report.get("broken"):
            raise SwitchFailedError(f"{reason} The weights are no mask's and not the base's: restart vLLM.")


def _in_force(folder: str | None, reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what all workers say is in force."""
    _check_whole(reports)
    if all("refused" in report for report in reports):
        _check_accepted(folder, reports)
    if any(report != reports[0] for report in reports):
        raise SwitchFailedError(f"the workers are under several masks, {reports}: restart vLLM.")
    return reports[0]
