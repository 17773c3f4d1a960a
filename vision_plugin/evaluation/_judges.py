"""Who says which images are alike: the model itself, other models, or the images' classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vision_plugin.evaluation._facts import Facts
from vision_plugin.evaluation._loop import embed
from vision_plugin.images import read_batches
from vision_plugin.models import VisionBridge, load_model

OWN = "model"
"""Name of the model under study among the judges."""
CLASSES = "labels"
"""Name of the images' classes among the judges."""
CENTRE_IMAGES = 256
"""Images that a mean embedding is taken over, before the pass over all."""


class Judges:
    """Unit embeddings of images by every judge.

    Attributes:
        models: Models by name; None for the images' classes, which embed an image as the unit
            vector of its class, so that images of one class have similarity 1 and others 0.
        centres: The mean embedding by name, which is subtracted before the embedding is scaled to
            norm 1; empty until :meth:`centre` is called.
    """

    def __init__(
        self, names: tuple[str, ...], model: VisionBridge, itself: set[Any], facts: Facts
    ) -> None:
        """Load the models.

        Args:
            names: What ``EvaluationConfig.embedder`` names; none for the model itself.
            model: The model under study.
            itself: Further names of the model under study.
            facts: What is known of the images.

        Raises:
            ValueError: a model cannot be loaded, or the images have no classes.
        """
        known = dict.fromkeys(OWN if name in itself else name for name in names or (OWN,))
        self.model, self.facts = model, facts
        self.models: dict[str, VisionBridge | None] = {}
        self.centres: dict[str, Tensor] = {}
        for name in known:
            if name == OWN:
                self.models[name] = model
            elif name == CLASSES:
                self.models[name] = None
                self.class_width = _n_classes(facts)
            else:
                self.models[name] = load_model(name, device=str(model.device))

    def widths(self) -> dict[str, int]:
        """Return the width of each judge's embeddings."""
        probe = [Image.new("RGB", (64, 64))]
        pixels = self.model.preprocess(probe)
        return {
            name: self.class_width
            if embedder is None
            else int(embed(embedder, self.model, probe, pixels).shape[1])
            for name, embedder in self.models.items()
        }

    def embed(self, images: Mapping[int, Any], pixels: Tensor) -> dict[str, Tensor]:
        """Return embeddings ``[n, d_embed]`` by judge, of norm 1; 0 for an image without a class.

        Args:
            images: PIL images by their places in the source.
            pixels: The same, as the model under study wants them.
        """
        found = {}
        for name, embedder in self.models.items():
            if embedder is None:
                labels = self.facts.labels[list(images)]
                hot = F.one_hot(labels.clamp(min=0), self.class_width).float()
                found[name] = hot * (labels >= 0)[:, None]  # what has no class is like nothing
            else:
                found[name] = embed(embedder, self.model, list(images.values()), pixels)
            if name in self.centres:
                moved = F.normalize(found[name] - self.centres[name], dim=1)
                found[name] = moved * found[name].any(dim=1, keepdim=True)
        return found

    def centre(self, batch_size: int) -> None:
        """Take the mean embedding over images spread over the source, to subtract from now on.

        Raises:
            ValueError: every one of those images is unreadable or has no class.
        """
        source = self.facts.images
        few = min(CENTRE_IMAGES, len(source))
        step = 1 if getattr(source, "sequential", False) else max(1, len(source) // few)
        chosen = range(0, len(source), step)[:few]
        parts: dict[str, list[Tensor]] = {name: [] for name in self.models}
        for images in read_batches(source, batch_size, {}, indices=chosen):
            pixels = self.model.preprocess(list(images.values()))
            for name, embedded in self.embed(images, pixels).items():
                parts[name].append(embedded[embedded.any(dim=1)])
        for name, found in parts.items():
            if not sum(map(len, found)):
                raise ValueError(
                    f"none of the images that embeddings of {name!r} are centred on could be read, "
                    "or has a class: leave out centre_embeddings="
                )
        self.centres = {name: torch.cat(found).mean(0) for name, found in parts.items()}


def _n_classes(facts: Facts) -> int:
    try:
        return len(facts.class_names)
    except ValueError as error:
        raise ValueError(f"embedder={CLASSES!r}: {error}") from None
