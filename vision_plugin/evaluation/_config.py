"""What ``vision-plugin eval`` is asked for; its flags are these fields."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from vision_plugin._inputs import Inputs

Control = Literal["neurons", "pca", "random", "random_model"]


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(Inputs):
    """What to score an SAE on."""

    sae: str
    """Folder of the SAE, or any checkpoint that ``vp.load_sae`` reads."""
    metrics: tuple[str, ...] = ()
    """Registered metrics by name, those of other packages included, or ``all`` that the inputs
    allow; by default fvu, sparsity, monosemanticity, uniqueness and steerability."""
    metric_options: str | None = None
    """JSON object of further arguments by metric, for example
    ``{"localization": {"min_images": 10}}``."""
    controls: tuple[Control, ...] = ("neurons", "pca", "random", "random_model")
    """What stands beside the SAE in the table: the raw neurons, their principal components, random
    directions as sparse as the SAE, and the neurons of the same model with random weights."""
    embedder: tuple[str, ...] = ()
    """Models whose embeddings say which images are alike, as for ``--model-name``; ``model`` stands
    for the model itself, the default, which the result then marks, since an outside encoder is the
    stricter judge."""
    labels: str | None = None
    """Classes of the images: ``column:NAME``; by default the labels that they come with."""
    concepts: str | None = None
    """For steerability: ``labels`` or ``column:NAME`` of the images, or a text file, a concept a
    line."""
    concept_template: str = "{}"
    """Sentence around a concept or a class, for example ``a picture of {}``."""
    taxonomy: str | None = None
    """For hierarchy and absorption: ``column:BROAD,NARROW,NAME`` of the images, a JSON or CSV file
    by image id, or ``demo`` for that of the drawn images."""
    group_widths: tuple[int, ...] = ()
    """Cumulative widths of a Matryoshka SAE's groups, for hierarchy; by default those that the
    SAE's metadata names."""
    masks: str | None = None
    """For dissection: a folder with ``names.txt``, a concept a line, and one image per image,
    ``ID.png``, whose pixel values are the numbers of those lines, 0 for none; or ``demo``."""
    domain_images: tuple[str, ...] = ()
    """For cross_domain: labelled images unlike those that the SAE was trained on."""
    other_saes: tuple[str, ...] = ()
    """For stability: SAEs of the same activations from other seeds."""
    output_path: str | None = None
    """JSON file of the results; ``evaluation.json`` beside the SAE by default."""
    tokens: str | None = None
    """Which tokens to encode and steer; by default those the SAE was trained on."""
    pooling: str = "max"
    """Image-level latents are the ``max`` or the ``mean`` over tokens."""
    monosemanticity_definition: str = "all"
    """Over ``all`` images, or over the ``top16`` of each latent: the two definitions in use."""
    confidence: float | None = None
    """Coverage, such as 0.95, of a jackknife interval around each latent's and neuron's
    monosemanticity."""
    steering_images: int = 32
    """Images to steer on; 0 leaves steerability out."""
    strength: float = 150.0
    """Value that a latent, or neuron, is set to."""
    strengths: tuple[float, ...] = ()
    """For steerability as a curve of the SAE's latents: further values to set them to, for example
    ``-20 -5 0 5 10 20 50 150``."""
    adaptive: bool = False
    """Steer every latent on a few images, and go on only with those that could still count as
    steerable."""
    batch_size: int = 64
    """Images per forward pass."""
    seed: int = 0
    """Seed of the random controls."""

    def __post_init__(self) -> None:
        choices = {"pooling": ("max", "mean"), "monosemanticity_definition": ("all", "top16")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: use {' or '.join(allowed)}")
        for name in ("metrics", "controls", "embedder"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name}={list(values)} names one of them twice")
        if self.confidence is not None and self.monosemanticity_definition != "all":
            raise ValueError(
                f"confidence={self.confidence} goes with monosemanticity_definition='all' only: "
                "leaving out one of the top 16 images lets another one in"
            )
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size} must be at least 1")
        self.options()

    def options(self) -> dict[str, dict[str, Any]]:
        """Further constructor arguments by metric.

        Raises:
            ValueError: ``metric_options`` is not a JSON object of JSON objects.
        """
        try:
            given = json.loads(self.metric_options or "{}")
        except ValueError as error:
            raise ValueError(
                f"metric_options={self.metric_options!r} is not JSON: {error}"
            ) from None
        if not isinstance(given, dict) or not all(isinstance(v, Mapping) for v in given.values()):
            raise ValueError(
                f"metric_options={self.metric_options!r} must be a JSON object from metric to its "
                'arguments, such as {"localization": {"min_images": 10}}'
            )
        usual = {"definition": self.monosemanticity_definition, **given.get("monosemanticity", {})}
        return {**given, "monosemanticity": usual}
