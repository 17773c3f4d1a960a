"""How features are named; the flags of ``vision-plugin name`` are these fields."""

from __future__ import annotations

from dataclasses import dataclass

from vision_plugin._inputs import Inputs, check_template
from vision_plugin.lens._dissect import DissectSettings
from vision_plugin.lens._name_labels import MIN_IMAGES
from vision_plugin.lens._name_says import WHAT_IS_SHARED, WHAT_IS_SHOWN

METHODS = ("decoder", "dissect", "labels", "steering", "caption")
"""Ways to make names, in the order in which equals are preferred."""


@dataclass(frozen=True, kw_only=True)
class NameSettings:
    """How names are made and checked.

    Examples:
        >>> vp.lens.NameSettings(methods=("decoder",)).check_share
        0.5
    """

    methods: tuple[str, ...] = ()
    """Ways to make names: ``decoder``, ``dissect``, ``labels``, ``steering``, ``caption``; by
    default those of the first three that the inputs allow."""
    labels: tuple[str, ...] = ()
    """Columns of labels as ``column:NAME``, of which each latent gets the label with the best
    average precision; by default the labels of the images, where they have some."""
    template: str = "{}"
    """Sentence around a word when it is embedded, for example ``a picture of {}``."""
    check_share: float = 0.5
    """Share of the images that names are checked on; they are made from the others."""
    confidence: float = 0.95
    """Coverage of the intervals of the checks."""
    min_images: int = MIN_IMAGES
    """Images that a label needs to be a name."""
    top_images: int = 100
    """Top images of a latent that ``dissect`` looks at."""
    sharpness: float = 10.0
    """Factor of the cosines in the softmax over words of ``dissect``."""
    latents: tuple[int, ...] = ()
    """Latents that ``steering`` and ``caption`` name, one after the other; all by default."""
    strength: float = 150.0
    """Value that ``steering`` sets a latent to; with a vision-language model, how much of its
    direction is added."""
    steering_images: int = 8
    """Images that latents are steered on."""
    steering_prompt: str = WHAT_IS_SHOWN
    """What a vision-language model is asked about an empty picture with a latent added."""
    caption_prompt: str = WHAT_IS_SHARED
    """What an image-text-to-text model is asked about a latent's top images."""
    tokens: str | None = None
    """Tokens to encode and steer; by default the kind that the SAE was trained on."""
    pooling: str = "max"
    """How tokens become one row per image: their ``max`` or their ``mean``."""
    batch_size: int = 64
    """Number of images per forward pass."""
    seed: int = 0
    """Seed of the split of the images, and of the names that are shuffled."""

    def __post_init__(self) -> None:
        unknown = [method for method in self.methods if method not in METHODS]
        if unknown:
            raise ValueError(
                f"methods={unknown[0]!r} is no way to make names: use {', '.join(METHODS)}"
            )
        if len(set(self.methods)) < len(self.methods):
            raise ValueError(f"methods={list(self.methods)} names one twice: give each one once")
        if self.pooling not in ("max", "mean"):
            raise ValueError(f"pooling={self.pooling!r}: use max or mean")
        for name in ("check_share", "confidence"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie between 0 and 1")
        for name in ("min_images", "steering_images", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.top_images < 1:
            raise ValueError(f"top_images={self.top_images} must be at least 1")
        check_template(self.template, argument="template")
        self.dissecting()

    def dissecting(self) -> DissectSettings:
        """Return the numbers in soft-WPMI."""
        return DissectSettings(n_images=self.top_images, sharpness=self.sharpness)


@dataclass(frozen=True, kw_only=True)
class NamesConfig(NameSettings, Inputs):
    """An SAE whose features are named, and the images, words and models to name them with.

    Examples:
        >>> vp.lens.NamesConfig(sae="runs/sae", images="demo:60").min_images
        5
    """

    sae: str
    """Folder of the SAE, or any checkpoint that ``vp.load_sae`` reads."""
    vocabulary: str | None = None
    """Text file of words, one a line; by default 5,400 words for things that can be seen, which
    come with the package."""
    judge: str | None = None
    """Model that compares images with texts, named as for ``model_name``; by default the model
    itself, where it reads text. A model without text needs one for ``dissect`` and for checks."""
    captioner: str | None = None
    """Local image-text-to-text model that is asked what top images share, for ``caption``."""
    vlm: str | None = None
    """Vision-language model around the SAE's tower that is asked what it sees in an empty picture,
    for ``steering``."""
    output_path: str | None = None
    """JSON file of the names; ``names.json`` beside the SAE by default."""

    def __post_init__(self) -> None:
        Inputs.__post_init__(self)
        NameSettings.__post_init__(self)
