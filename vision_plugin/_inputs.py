"""What every command that scores, steers or shows an SAE opens: the images, the model, the SAE."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any

from vision_plugin._device import check_device


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
    check_model: bool = True
    """Refuse an SAE that was trained on a model with other weights."""

    def __post_init__(self) -> None:
        check_device(self.device)

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

        Without ``check_model`` its metadata no longer say which model it was trained on, so that
        it fits any.

        Raises:
            ValueError: no SAE is found, or its format is unknown.
        """
        if isinstance(sae, (str, Path)):
            from vision_plugin.formats import load_sae

            sae = load_sae(str(sae), device=self.device)
        if self.check_model or sae.cfg.metadata.get("model_signature") is None:
            return sae
        of_any = copy.copy(sae)
        of_any.cfg = copy.deepcopy(sae.cfg)
        of_any.cfg.metadata["model_signature"] = None
        return of_any


def sentences(template: str, names: Iterable[object], *, argument: str) -> list[str]:
    """Return a sentence about each name.

    Args:
        template: Sentence with one ``{}``, the place of the name.
        names: Concepts or classes.
        argument: Name of the argument that holds the template, for errors.

    Raises:
        ValueError: the template does not have one place for the name.
    """
    check_template(template, argument=argument)
    return [template.format(name) for name in names]


def check_template(template: str, *, argument: str) -> None:
    """Raise ValueError unless a template has one place for a name, ``{}``."""
    try:
        fields = [field for _, field, _, _ in Formatter().parse(template) if field is not None]
    except ValueError:
        fields = []
    if fields not in ([""], ["0"]):
        raise ValueError(
            f"{argument}={template!r} must have one {{}}, where the name goes, as in "
            "'a photo of a {}'; without it every name would become the same sentence"
        )


def named(value: Any) -> str:
    """Return an input's name for records: its path or name, or the type of an object."""
    return str(value) if isinstance(value, (str, Path)) else type(value).__name__
