"""`MaskExtension`: what vLLM's workers learn, to put masks into their weights and take them out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peft_mask.vllm.checkpoint import Checkpoint
from peft_mask.vllm.off import Off, read_off
from peft_mask.vllm.patches import Patch, check_held, patches_between
from peft_mask.vllm.release import check_release

Report = dict[str, Any]  # what a worker answers: plain values, since it may be another process


@dataclass(frozen=True)
class _Prepared:
    """A mask that was read and checked, and what puts it in force."""

    off: Off
    patches: list[Patch]


class MaskExtension:
    """A worker extension that switches masks in place: `--worker-extension-cls peft_mask.vllm.MaskExtension`.

    It is called by `switch_mask` and its twins, which see to the order: prepare on all workers, empty the prefix cache
    with no request running, apply on all. What a mask takes away is read again from the base checkpoint, so that the
    base comes back to the bit.
    """

    vllm_config: Any  # these two are the worker's
    model_runner: Any

    _masks_in_force = Off()
    _mask_prepared: _Prepared | None = None
    _mask_broken: str | None = None  # why the weights are nobody's
    _mask_checkpoint: Checkpoint | None = None

    def mask_prepare(self, adapter: str | None) -> Report:
        """Read and check a mask, and what it takes to put it in force. Nothing changes.

        Args:
            adapter: its folder; None for the base.

        Returns:
            `{"zeros": ..., "changes": ..., "held": ...}`: weights that it has off, weights that would change, and how
            many of these this worker has; or `{"refused": reason}`, or `{"broken": reason}` after a failure.
        """
        self._mask_prepared = None
        if self._mask_broken:
            return {"broken": self._mask_broken}
        try:
            check_release()
            self._check_servable()
            if self._mask_checkpoint is None:
                config = self.vllm_config
                model = config.model_config
                self._mask_checkpoint = Checkpoint.of(model.model, model.revision, config.load_config.download_dir)
            off = Off() if adapter is None else read_off(adapter, self._mask_checkpoint)
            patches = list(patches_between(self._masks_in_force, off, self._mask_checkpoint))
            held = check_held(self.model_runner.get_model(), patches)
        except (ValueError, OSError, ImportError) as error:
            return {"refused": str(error)}
        self._mask_prepared = _Prepared(off, patches)
        return {"zeros": off.zeros, "changes": sum(len(each.indices) for each in patches), "held": sum(held.values())}

    def mask_apply(self, adapter: str | None) -> Report:
        """Put in force what was prepared last, while no request is running and the prefix cache is empty.

        Args:
            adapter: the one that was prepared.

        Returns:
            What `mask_in_force` does; `{"refused": reason}` if another one was prepared since, and nothing changed; or
            `{"broken": reason}` if the weights may be half of one mask and half of another.
        """
        prepared, self._mask_prepared = self._mask_prepared, None
        if prepared is None or prepared.off.adapter != adapter:
            return {"refused": "somebody else switched masks at the same time. Switch again."}
        from vllm.model_executor.model_loader.checkpoint_weight_patch import (
            CheckpointWeightPatch,
            load_checkpoint_weight_patches,
        )

        try:
            patches = [
                CheckpointWeightPatch(each.name, each.shape, each.after.dtype, each.after, each.indices)
                for each in prepared.patches
            ]
            load_checkpoint_weight_patches(self.model_runner.get_model(), patches)
        except Exception as error:
            what = f"switching to {adapter or 'the base'}"
            self._mask_broken = f"{what} stopped halfway ({error or type(error).__name__})."
            return {"broken": self._mask_broken}
        self._masks_in_force = prepared.off
        return self.mask_in_force()

    def mask_in_force(self) -> Report:
        """Return `{"adapter": folder or None, "digest": ..., "zeros": ...}`, or `{"broken": reason}`."""
        if self._mask_broken:
            return {"broken": self._mask_broken}
        off = self._masks_in_force
        return {"adapter": off.adapter, "digest": off.digest, "zeros": off.zeros}

    def _check_servable(self) -> None:
        """Refuse models whose layers compute with something else than their weights as they were loaded."""
        model, parallel = self.vllm_config.model_config, self.vllm_config.parallel_config
        if model.quantization is not None:
            raise ValueError(
                f"the base is quantized ({model.quantization}), and patches are of floating-point values: serve "
                "it in 16 or 32 bits, or the mask merged before it was quantized."
            )
        if model.use_mla:
            raise ValueError(
                "this model's attention (MLA) computes with matrices made of its weights when they were loaded, which "
                "no patch reaches: serve the mask merged."
            )
        if parallel.pipeline_parallel_size > 1 or parallel.enable_expert_parallel:
            raise ValueError(
                "its layers or experts are spread over workers (pipeline or expert parallelism), where it has not been "
                "tried: use tensor parallelism alone, or serve the mask merged."
            )
