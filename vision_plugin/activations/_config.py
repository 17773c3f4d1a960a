"""Configuration of an extraction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vision_plugin._device import check_device
from vision_plugin.activations._plan import MAX_IMAGES_WRITTEN


@dataclass(frozen=True)
class ExtractionConfig:
    """Run images through a model and store its activations in a folder.

    Examples:
        >>> cfg = vp.activations.ExtractionConfig(
        ...     model_name="demo",
        ...     images="demo:40",
        ...     hook_names=["blocks.2.hook_resid_post"],
        ...     output_path="acts",
        ... )
        >>> cfg.tokens, cfg.dtype
        ('all', 'float32')
    """

    model_name: str
    """Model: Hugging Face id or folder, ``open_clip:...``, ``timm:...`` or ``demo``."""
    images: str
    """Images: folder, ``imagefolder:...``, Parquet, dataset name, tars or ``demo:N``."""
    hook_names: Sequence[str]
    """Hook points to store, all read in one forward pass."""
    output_path: str
    """Folder of the store. An interrupted extraction in it continues."""
    overwrite: bool = False
    """Replace another extraction that the folder holds; nothing but a store is ever removed."""
    tokens: str = "all"
    """Tokens to keep: ``"cls"``, ``"patch"``, ``"register"``, ``"all"`` or ``"random:n"``."""
    dtype: str = "float32"
    """Stored type: ``"float32"``, ``"bfloat16"`` or ``"float16"``."""
    batch_size: int = 32
    """Images per forward pass."""
    images_per_shard: int | None = None
    """Images per file; by default about 128 MiB of activations, and less in a small store."""
    max_bad_images: int = 100
    """Unreadable images to leave out before the run stops. Raise it to continue a run."""
    seed: int = 0
    """Seed of the tokens that ``random:n`` draws."""
    image_column: str | None = None
    """Column that holds the images, needed where several do; for WebDataset tars the suffix."""
    split: str | None = None
    """Split of a data set, or of files and folders named for splits; by default the only one."""
    label_column: str | None = None
    """Column that holds the labels; by default sub-folders, ``label`` or ``cls``."""
    n_images: int | None = None
    """How many images to take from the front; by default all."""
    streaming: bool = False
    """Read a dataset of the hub without storing it."""
    n_workers: int | None = None
    """Processes that decode images, 0 for none; the default depends on the number of cores."""
    device: str | None = None
    """Device of the model; by default a GPU where there is one."""
    pretrained: str | None = None
    """Tag or file of weights for open_clip; a checkpoint file for timm."""
    revision: str | None = None
    """Branch, tag or commit of the model on the hub."""

    def __post_init__(self) -> None:
        names = (self.hook_names,) if isinstance(self.hook_names, str) else tuple(self.hook_names)
        object.__setattr__(self, "hook_names", names)
        check_device(self.device)
        if not names:
            raise ValueError("hook_names is empty: name at least one, 'blocks.5.hook_resid_post'")
        if len(set(names)) != len(names):
            raise ValueError(f"hook_names names a hook twice: {', '.join(names)}")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype={self.dtype!r}: use 'float32', 'bfloat16' or 'float16'")
        for name, least in (
            *(("batch_size", 1), ("images_per_shard", 1), ("n_images", 1)),
            *(("max_bad_images", 0), ("n_workers", 0), ("seed", 0)),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}={value}: use a whole number from {least} up")
            of_a_shard = name in ("batch_size", "images_per_shard")
            if of_a_shard and value is not None and value > MAX_IMAGES_WRITTEN:
                raise ValueError(f"{name}={value}: use at most {MAX_IMAGES_WRITTEN:,}")
