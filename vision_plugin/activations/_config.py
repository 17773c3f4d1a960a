"""What an extraction is told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ExtractionConfig:
    """Images through a model, activations into a folder."""

    model_name: str
    """As for load_model: Hugging Face id or folder, ``open_clip:``, ``timm:``, or ``demo``."""
    images: str
    """As for open_images: folder, ``imagefolder:``, Parquet, dataset name, tars, ``demo:N``."""
    hook_names: Sequence[str]
    """Hook points, all taken in one forward pass."""
    output_path: str
    """Folder of the store. One that an interrupted extraction left behind is gone on with."""
    tokens: str = "all"
    """``"cls"``, ``"patch"``, ``"register"``, ``"all"`` or ``"random:n"``."""
    dtype: str = "float32"
    """Stored type: ``"float32"``, ``"bfloat16"`` or ``"float16"``."""
    batch_size: int = 32
    """Images per forward pass."""
    images_per_shard: int | None = None
    """Images per file; by default about 128 MiB of them, and less in a small store."""
    max_bad_images: int = 100
    """Images that may be unreadable before the run stops. It can be raised to go on."""
    seed: int = 0
    """Draws the tokens of ``random:n``."""
    image_column: str | None = None
    """Column with the images, where it cannot be told; of WebDataset tars the suffix."""
    split: str | None = None
    """Split of a dataset."""
    label_column: str | None = None
    """Column with the labels; sub-folders, ``label`` and ``cls`` are found without it."""
    n_images: int | None = None
    """Only the first so many."""
    streaming: bool = False
    """Read a dataset of the hub without storing it."""
    n_workers: int | None = None
    """Processes that decode images, 0 for none; by default by the number of cores."""
    device: str | None = None
    """Device of the model; a GPU where there is one."""
    pretrained: str | None = None
    """open_clip's tag or file of weights."""
    revision: str | None = None
    """Branch, tag or commit of the model on the hub."""

    def __post_init__(self) -> None:
        names = (self.hook_names,) if isinstance(self.hook_names, str) else tuple(self.hook_names)
        object.__setattr__(self, "hook_names", names)
        if not names:
            raise ValueError("hook_names is empty: name at least one, 'blocks.5.hook_resid_post'")
        if len(set(names)) != len(names):
            raise ValueError(f"hook_names names one twice: {', '.join(names)}")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype={self.dtype!r}: use 'float32', 'bfloat16' or 'float16'")
        for name, least in (
            *(("batch_size", 1), ("images_per_shard", 1), ("n_images", 1)),
            *(("max_bad_images", 0), ("n_workers", 0), ("seed", 0)),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}={value}: use a whole number from {least} up")
