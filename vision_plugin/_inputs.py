"""What every command that scores, steers or shows an SAE opens: the images, the model, the SAE."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Images and a model, by name."""

    images: str
    """Folder, ``imagefolder:...``, Parquet file, data set name, tar shards, or ``demo:N``."""
    image_column: str | None = None
    """Column that holds the images; name it where a data set has several."""
    split: str | None = None
    """Split of a data set, or of files and folders named for splits; by default the only one."""
    model_name: str | None = None
    """Model, as ``vp.load_model`` takes it; by default the one that the SAE's metadata names."""
    device: str = "cpu"
    """Device that the model and the SAE run on."""

    def open_images(self, images: Any = None) -> Any:
        """Return an image source for the argument, or else for the field ``images``.

        Args:
            images: Whatever ``vp.open_images`` takes; None opens the field ``images``.

        Raises:
            FileNotFoundError: there is no such path.
            ValueError: the source holds no images, or a column or split is missing.
        """
        from vision_plugin.images import open_images

        source = self.images if images is None else images
        return open_images(source, column=self.image_column, split=self.split)

    def open_model(self, sae: Any, model: Any = None, *, where: str = "this SAE") -> Any:
        """Return ``model``, or load the VisionBridge that is named.

        Args:
            sae: SAE whose metadata names the model where ``model_name`` is None.
            model: A loaded VisionBridge; None loads one by name.
            where: Name of the SAE in errors.

        Raises:
            ValueError: nothing names a model, or it cannot be loaded.
        """
        if model is not None:
            return model
        from vision_plugin.models import load_model

        name = self.model_name or sae.cfg.metadata.get("model_name")
        if not name:
            raise ValueError(
                f"{where} does not say which model it was trained on: give model_name="
            )
        return load_model(str(name), device=self.device)

    def open_sae(self, sae: Any) -> Any:
        """Return ``sae`` as it is, or load the SAELens SAE at that path or of that name.

        Raises:
            ValueError: no SAE is found, or its format is unknown.
        """
        if not isinstance(sae, (str, Path)):
            return sae
        from vision_plugin.formats import load_sae

        return load_sae(str(sae), device=self.device)


def named(value: Any) -> str:
    """Return an input's name for records: its path or name, or the type of an object."""
    return str(value) if isinstance(value, (str, Path)) else type(value).__name__
