"""The configuration of ``vision-plugin eval``; its flags are these fields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from vision_plugin._inputs import Inputs, check_template
from vision_plugin._untrusted import parse_json

Control = Literal["neurons", "pca", "random", "random_model"]
"""A dictionary, or a model, that an SAE is scored beside.

Examples:
    >>> from typing import get_args
    >>> get_args(vp.evaluation.Control)
    ('neurons', 'pca', 'random', 'random_model')
"""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(Inputs):
    """SAE to score, and the images, metrics and controls to score it with.

    Examples:
        >>> cfg = vp.evaluation.EvaluationConfig(sae="runs/sae", images="demo:40", metrics=("fvu",))
        >>> cfg.controls, cfg.pooling
        (('neurons', 'pca', 'random', 'random_model'), 'max')
    """

    sae: str
    """Folder of the SAE, or any checkpoint that ``vp.load_sae`` reads."""
    metrics: tuple[str, ...] = ()
    """Names of registered metrics, also from other packages, or ``all`` that the inputs allow; by
    default fvu, sparsity, monosemanticity, uniqueness and steerability."""
    metric_options: str | None = None
    """JSON object of further arguments by metric, for example
    ``{"localization": {"min_images": 10}}``."""
    controls: tuple[Control, ...] = ("neurons", "pca", "random", "random_model")
    """Controls beside the SAE in the table: the raw neurons, their principal components, random
    directions as sparse as the SAE, and the neurons of the same model with random weights."""
    embedder: tuple[str, ...] = ()
    """Models whose embeddings say which images are alike, named as for ``model_name``; ``labels``
    calls images of one class alike and all others not. Default: the model itself, ``model``, which
    favours random directions: an outside encoder or the classes judge more fairly."""
    centre_embeddings: bool = False
    """Subtract the mean embedding, over up to 256 images, before similarities are taken. It lets
    differences show where an encoder finds all images alike."""
    labels: str | None = None
    """Classes of the images, as ``column:NAME``; by default the labels of the images."""
    concepts: str | None = None
    """For steerability: ``labels`` or ``column:NAME`` of the images; a text file, one concept a
    line; or ``demo`` for every factor of drawn images, whose labels are their shapes alone."""
    concept_template: str = "{}"
    """Sentence around a concept or a class, for example ``a picture of {}``."""
    taxonomy: str | None = None
    """For hierarchy and absorption: ``column:BROAD,NARROW,NAME`` of the images, a JSON or CSV file
    by image id, or ``demo`` for the taxonomy of the drawn images."""
    group_widths: tuple[int, ...] = ()
    """For hierarchy: cumulative widths of a Matryoshka SAE's groups; by default those in the SAE's
    metadata."""
    masks: str | None = None
    """For dissection: a folder with ``names.txt``, a concept a line, and a file ``ID.png`` for each
    image, whose pixel values are line numbers, 0 for no concept; or ``demo``."""
    domain_images: tuple[str, ...] = ()
    """For cross_domain: labelled images unlike the training images of the SAE."""
    domain_split: str | None = None
    """For cross_domain: split of ``domain_images``, where they have several."""
    other_saes: tuple[str, ...] = ()
    """For stability: SAEs of the same activations from other seeds."""
    output_path: str | None = None
    """JSON file of the results; ``evaluation.json`` beside the SAE by default."""
    tokens: str | None = None
    """Tokens to encode and steer; by default the kind that the SAE was trained on."""
    pooling: str = "max"
    """How tokens become one row per image: their ``max`` or their ``mean``."""
    monosemanticity_definition: str = "all"
    """Images that monosemanticity compares: ``all``, or the ``top16`` of each latent."""
    confidence: float | None = None
    """Coverage, such as 0.95, of a jackknife interval around each latent's and neuron's
    monosemanticity."""
    steering_images: int = 32
    """Number of images to steer on; 0 leaves steerability out."""
    strength: float = 150.0
    """Value that a latent or neuron is set to for steerability."""
    strengths: tuple[float, ...] = ()
    """For a curve of the SAE's steerability: further values to set latents to, for example
    ``-20 -5 0 5 10 20 50 150``."""
    adaptive: bool = False
    """Steer every latent on a few images, and continue only with those that could still be
    steerable."""
    batch_size: int = 64
    """Number of images per forward pass."""
    seed: int = 0
    """Seed of the random controls."""

    def __post_init__(self) -> None:
        super().__post_init__()
        choices = {"pooling": ("max", "mean"), "monosemanticity_definition": ("all", "top16")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: use {' or '.join(allowed)}")
        for name in ("metrics", "controls", "embedder"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name}={list(values)} names one twice: give each one once")
        if self.confidence is not None and self.monosemanticity_definition != "all":
            raise ValueError(
                f"confidence={self.confidence} needs monosemanticity_definition='all': leaving out "
                "one of the top 16 images lets another one in"
            )
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size} must be at least 1")
        check_template(self.concept_template, argument="concept_template")
        self.options()

    def options(self) -> dict[str, dict[str, Any]]:
        """Return further constructor arguments by metric.

        Raises:
            ValueError: ``metric_options`` is not a JSON object of JSON objects.
        """
        text = self.metric_options or "{}"
        shown = f"metric_options={text if len(text) <= 60 else f'{text[:57]}...'!r}"
        given = parse_json(text.encode(), shown)
        if not isinstance(given, dict) or not all(isinstance(v, Mapping) for v in given.values()):
            raise ValueError(
                f"{shown} must be a JSON object from metric to its "
                'arguments, such as {"localization": {"min_images": 10}}'
            )
        usual = {"definition": self.monosemanticity_definition, **given.get("monosemanticity", {})}
        return {**given, "monosemanticity": usual}


@dataclass(frozen=True, kw_only=True)
class SparsityStudyConfig(Inputs):
    """SAEs and images to study.

    Examples:
        >>> vp.evaluation.SparsityStudyConfig(saes=("runs/sae",), images="demo:40").dense_above
        0.1
    """

    saes: tuple[str, ...]
    """Folders of the SAEs, or any checkpoints that ``vp.load_sae`` reads: one or several, at any
    hooks of one model."""
    output_path: str | None = "sparsity"
    """Folder of the table, the plot and the JSON; it replaces an earlier study there. None, in
    Python, writes nothing."""
    tokens: str | None = None
    """Tokens to encode: ``cls``, ``register``, ``patch`` or ``all``; by default the kind that each
    SAE was trained on."""
    dense_above: float = 0.1
    """Firing frequency, as a share of tokens, above which a latent counts as dense."""
    batch_size: int = 64
    """Number of images per forward pass."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.saes:
            raise ValueError("saes= is empty: name at least one SAE, as in saes=runs/layer3")
        if len(set(self.saes)) < len(self.saes):
            raise ValueError(f"saes={list(self.saes)} names one SAE twice: give each one once")
        if self.tokens not in (None, "cls", "register", "patch", "all"):
            raise ValueError(
                f"tokens={self.tokens!r}: use cls, register, patch or all; random tokens are of "
                "no known kind"
            )
        if self.batch_size < 1 or not 0 <= self.dense_above <= 1:
            raise ValueError(
                f"batch_size={self.batch_size} must be at least 1 and "
                f"dense_above={self.dense_above} between 0 and 1"
            )
