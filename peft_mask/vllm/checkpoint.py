"""A base checkpoint as it lies on disk: names, shapes and values of its weights, without a model."""

from __future__ import annotations

import json
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from peft_mask.format.mask_file import BIAS

_INDEX = "model.safetensors.index.json"


class Checkpoint:
    """The weights of a model's folder, read when they are asked for.

    Args:
        folder: where its safetensors files lie.

    Raises:
        ValueError: it has none, or one that is damaged.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._files = self._names_by_file()

    @classmethod
    def of(cls, model: str, revision: str | None = None, cache: str | None = None) -> Checkpoint:
        """Find the checkpoint of a model that was loaded already.

        Args:
            model: its folder, or its id on the Hub.
            revision: which one of the Hub.
            cache: where downloads lie, if not in the usual place.

        Raises:
            ValueError: it is in neither place, or has no safetensors files.
        """
        if Path(model).is_dir():
            return cls(model)
        from huggingface_hub import snapshot_download

        try:
            return cls(snapshot_download(model, revision=revision, cache_dir=cache, local_files_only=True))
        except OSError as error:
            raise ValueError(
                f"the base checkpoint '{model}' is no folder and was not downloaded ({error}), so the weights that a "
                "mask takes away cannot be read again: serve the model from a folder."
            ) from error

    def weight_name(self, mask: str) -> str:
        """Return what the weight that a mask is for is called in the checkpoint.

        A model with a head has its backbone under a name of its own, which some checkpoints leave out and others add.

        Args:
            mask: name of the mask, as in the adapter's file.

        Raises:
            ValueError: no weight has that name, or several may be meant.
        """
        owner = mask.removesuffix(BIAS)
        name = f"{owner}.weight" if owner == mask else f"{owner}.bias"
        if name in self._files:
            return name
        found = [known for known in self._files if known.endswith(f".{name}") or name.endswith(f".{known}")]
        if len(found) != 1:
            raise ValueError(
                f"the base checkpoint in '{self.folder}' has {'several weights' if found else 'no weight'} "
                f"'{name}' (it has {(found or sorted(self._files))[:3]}): the mask is of another model, or of a weight "
                "that is stored in another way than it is computed with. Serve it merged."
            )
        return found[0]

    def weight(self, name: str) -> Tensor:
        """Return a weight of the checkpoint, in its dtype."""
        with safe_open(self.folder / self._files[name], framework="pt") as file:
            return file.get_tensor(name)

    def _names_by_file(self) -> dict[str, str]:
        index = self.folder / _INDEX
        try:
            if index.is_file():
                return dict(json.loads(index.read_text("utf-8"))["weight_map"])
            found: dict[str, str] = {}
            for path in sorted(self.folder.glob("*.safetensors")):
                with safe_open(path, framework="pt") as file:
                    found |= dict.fromkeys(file.keys(), path.name)
        except (SafetensorError, ValueError, LookupError, TypeError) as error:
            raise ValueError(f"the base checkpoint in '{self.folder}' cannot be read ({error}).") from error
        if not found:
            raise ValueError(
                f"the base checkpoint in '{self.folder}' has no safetensors files, from which the weights that a mask "
                "takes away are read again: save it with save_pretrained."
            )
        return found
