"""The logit lens of an image classifier: hidden states of every layer in class-embedding space.

*Analyzing vision transformers for image classification in class embedding space* (Vilas et al.
2023, arXiv 2310.18969): the classifier's own final norm and head read the tokens of every layer.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vision_plugin._intervals import cell
from vision_plugin._progress import Progress
from vision_plugin._rich import Table
from vision_plugin.images import open_images, read_batches
from vision_plugin.lens._result_folder import save_result
from vision_plugin.lens._shares import Share, mean_of, share_of
from vision_plugin.models.site import in_eval_mode

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

ELEMENTS = 2**24
"""Largest number of activations that go through a head at once."""


@dataclass(frozen=True, eq=False)
class LayerClasses:
    """What the tokens of one layer say about the class.

    Attributes:
        layer: Number of blocks that ran; 0 is the embedding.
        accuracy: Share of images whose class the model's head reads off the whole layer.
        agreement: Share of images for which it says what the model says in the end.
        identifiability: Mean over images of ``1 - rank / (classes - 1)`` of the class in what the
            head reads off the whole layer: 1 where it comes first, 0.5 by chance.
        tokens: The same mean over the tokens of each kind, each token read alone.
        patches: Mean identifiability by patch, row by row.
    """

    layer: int
    accuracy: Share
    agreement: Share
    identifiability: Share
    tokens: dict[str, Share]
    patches: Float[Tensor, " patches"] | None

    def to_dict(self) -> dict[str, Any]:
        """Return the figures ready for JSON."""
        return {
            "layer": self.layer,
            "accuracy": self.accuracy.to_dict(),
            "agreement": self.agreement.to_dict(),
            "identifiability": self.identifiability.to_dict(),
            "tokens": {kind: share.to_dict() for kind, share in self.tokens.items()},
            "patches": None if self.patches is None else self.patches.tolist(),
        }


@dataclass(frozen=True, eq=False)
class ClassLens:
    """The lens of a classifier over some images.

    Attributes:
        model: Name of the model.
        reference: ``"labels"``, or ``"model"`` where the class is what the model says in the end.
        n_classes: Number of classes.
        n_images: Number of images.
        grid: Rows and columns of patches.
        layers: The layers, the embedding first.

    Examples:
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        >>> config = ViTConfig(**sizes, image_size=64, patch_size=16, num_labels=7)
        >>> native = ViTForImageClassification(config).eval()
        >>> classifier = vp.wrap(native, image_processor=model.image_processor)
        >>> found = vp.lens.class_lens(classifier, world.images, progress=False)
        >>> found.n_classes, found.grid, found.reference
        (7, (4, 4), 'model')
    """

    model: str
    reference: str
    n_classes: int
    n_images: int
    grid: tuple[int, int]
    layers: Sequence[LayerClasses]

    def table(self) -> Table:
        """Return the layers for ``rich`` to print."""
        title = f"class lens: {self.model}, {self.n_images} images, classes of the {self.reference}"
        table = Table(title=title)
        kinds = list(self.layers[0].tokens)
        for heading in ("layer", "accuracy", "agreement", "identifiability", *kinds):
            table.add_column(heading, justify="right")
        for one in self.layers:
            shares = [one.accuracy, one.agreement, one.identifiability, *one.tokens.values()]
            table.add_row(str(one.layer), *map(cell, shares))
        return table

    def plot(self) -> dict[str, Figure]:
        """Return the curve over layers and a map of the patches by layer, by name."""
        from matplotlib.figure import Figure

        canvas = Figure(figsize=(5.2, 3.4), layout="constrained")
        axes = canvas.add_subplot()
        layers = [one.layer for one in self.layers]
        axes.plot(layers, [one.accuracy.value for one in self.layers], label="accuracy")
        for kind in self.layers[0].tokens:
            values = [one.tokens[kind].value for one in self.layers]
            axes.plot(layers, values, marker="o", markersize=3, label=f"{kind}: identifiability")
        axes.axhline(0.5, color="grey", linewidth=0.6)
        axes.set_xlabel("layer")
        axes.set_ylim(0, 1.02)
        axes.legend(fontsize=8)
        found = {"layers": canvas}
        maps = [(one.layer, one.patches) for one in self.layers if one.patches is not None]
        if maps:
            figure = Figure(figsize=(1.7 * len(maps), 2.0), layout="constrained")
            for place, (layer, patches) in enumerate(maps):
                own = figure.add_subplot(1, len(maps), place + 1)
                own.imshow(patches.reshape(self.grid).numpy(), vmin=0, vmax=1, cmap="viridis")
                own.set_title(f"layer {layer}", fontsize=8)
                own.set_axis_off()
            found["patches"] = figure
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return the result ready for JSON."""
        return {
            "schema": "vision_plugin.lens/classes/1",
            "model": self.model,
            "reference": self.reference,
            "n_classes": self.n_classes,
            "n_images": self.n_images,
            "grid": list(self.grid),
            "layers": [layer.to_dict() for layer in self.layers],
        }

    def save(self, folder: str | Path) -> Path:
        """Write results.json, table.txt and figures; earlier results of a lens are replaced.

        Raises:
            FileExistsError: something else has the name.
        """
        return save_result(folder, self.to_dict(), tables=[self.table()], figures=self.plot())


class ClassHead:
    """The final norm and the head of a classifier, on single tokens.

    A token is read as the head would read an image all of whose tokens are this one: whatever the
    head pools, it sees the token. Where norm and head are known parts, they run on the token alone;
    that way is used if it agrees with the whole head.

    Args:
        model: A VisionBridge of a classifier.
        sample: A residual stream ``[n, tokens, d_model]`` to compare the two ways on.

    Raises:
        ValueError: the model is no classifier.
    """

    def __init__(self, model: Any, sample: Float[Tensor, "n tokens d_model"]) -> None:
        self.model, self.n_layers = model, int(model.cfg.n_layers)
        logits = self.whole(sample[:1])
        if model.adapter.has_joint_space or logits.ndim != 2 or not _classifies(model):
            raise ValueError(
                f"{model.cfg.model_name} has no classes: load a classifier, such as a "
                "ViTForImageClassification, or use text_lens for a CLIP"
            )
        self.n_classes = int(logits.shape[1])
        tokens = sample.flatten(0, 1)[:: max(1, sample.shape[1] // 3)][:4]
        slow, quick = self._by_stream(tokens), self._by_parts(tokens)
        self.is_quick = False
        if quick is not None and quick.shape == slow.shape:
            self.is_quick = torch.allclose(quick, slow, atol=1e-4, rtol=1e-4)

    def whole(self, stream: Float[Tensor, "n tokens d_model"]) -> Tensor:
        """Return what the head reads off a whole residual stream, as if it were the last."""
        found: Tensor = self.model(stream, start_at_layer=self.n_layers)
        return found

    def tokens(self, vectors: Float[Tensor, "m d_model"]) -> Float[Tensor, "m classes"]:
        """Return the logits of single tokens."""
        found = self._by_parts(vectors) if self.is_quick else self._by_stream(vectors)
        assert found is not None
        return found

    def _by_parts(self, vectors: Tensor) -> Tensor | None:
        parts = [getattr(self.model, name, None) for name in ("ln_final", "unembed")]
        modules = [getattr(part, "original_component", None) for part in parts]
        if modules[1] is None:
            return None
        try:
            hidden = vectors if modules[0] is None else modules[0](vectors)
            found: Tensor = modules[1](hidden)
        except RuntimeError:  # a head on several tokens side by side has another width
            return None
        return found

    def _by_stream(self, vectors: Tensor) -> Tensor:
        n_tokens = int(self.model.token_layout().n_tokens)
        step = max(1, ELEMENTS // (n_tokens * vectors.shape[-1]))
        return torch.cat(
            [self.whole(some[:, None].expand(-1, n_tokens, -1)) for some in vectors.split(step)]
        )


@torch.no_grad()
def class_lens(
    model: Any,
    images: Any,
    *,
    labels: Sequence[int] | Int[Tensor, " n"] | None = None,
    batch_size: int = 32,
    progress: bool = True,
) -> ClassLens:
    """Read the class off every layer and token of an image classifier.

    At the last layer the lens on the whole stream equals the model's own logits.

    Args:
        model: A VisionBridge of a classifier.
        images: Whatever ``vp.open_images`` takes.
        labels: Number of each image's class, as the model's head counts classes; None takes what
            the model says in the end.
        batch_size: Images per forward pass.
        progress: Show how far the images are.

    Raises:
        ValueError: the model is no classifier, labels do not fit, or no image could be read.

    Examples:
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        >>> config = ViTConfig(**sizes, image_size=64, patch_size=16, num_labels=7)
        >>> native = ViTForImageClassification(config).eval()
        >>> classifier = vp.wrap(native, image_processor=model.image_processor)
        >>> found = vp.lens.class_lens(classifier, world.images, progress=False)
        >>> found.layers[-1].agreement.value
        1.0
    """
    source = open_images(images)
    truth = None if labels is None else torch.as_tensor(labels).long()
    if truth is not None and truth.shape != (len(source),):
        raise ValueError(f"labels= has shape {list(truth.shape)}: give one of {len(source)} images")
    layout, n_layers = model.token_layout(), int(model.cfg.n_layers)
    kinds = torch.tensor([{"cls": 0, "register": 1, "patch": 2}[kind] for kind in layout.kinds])
    names = [name for place, name in enumerate(("cls", "register", "patch")) if
             bool((kinds == place).any())]  # fmt: skip
    at = {name: kinds == {"cls": 0, "register": 1, "patch": 2}[name] for name in names}
    hooks = ["blocks.0.hook_resid_pre"] + [f"blocks.{i}.hook_resid_post" for i in range(n_layers)]
    seen: list[list[dict[str, Tensor]]] = [[] for _ in hooks]
    head: ClassHead | None = None
    bad: dict[str, str] = {}
    with in_eval_mode(model), Progress(len(source), "reading", shown=progress) as shown:
        for batch in read_batches(source, batch_size, bad):
            pixels = model.preprocess(list(batch.values()))
            found = model.harvest(pixels, hooks)
            if head is None:
                head = ClassHead(model, found[hooks[-1]])
                if truth is not None and not 0 <= int(truth.min()) <= int(truth.max()) < (
                    head.n_classes
                ):
                    raise ValueError(f"labels= must be from 0 to {head.n_classes - 1}")
            end = head.whole(found[hooks[-1]]).argmax(1)
            wanted = end if truth is None else truth[list(batch)].to(end.device)
            for place, hook in enumerate(hooks):
                seen[place].append(_read(head, found[hook], wanted, end, at))
            shown.advance(len(batch))
    if head is None:
        raise ValueError("none of the images could be read: mend images=")
    layers = [_layer(place, parts, names, at) for place, parts in enumerate(seen)]
    return ClassLens(
        model=str(model.cfg.model_name),
        reference="model" if truth is None else "labels",
        n_classes=head.n_classes,
        n_images=layers[0].accuracy.n,
        grid=(int(layout.grid[0]), int(layout.grid[1])),
        layers=layers,
    )


def _read(
    head: ClassHead, stream: Tensor, wanted: Tensor, end: Tensor, at: dict[str, Tensor]
) -> dict[str, Tensor]:
    whole = head.whole(stream)
    n, n_tokens = stream.shape[:2]
    of_tokens = head.tokens(stream.flatten(0, 1))
    rates = identifiability(of_tokens, wanted.repeat_interleave(n_tokens)).view(n, n_tokens)
    found = {
        "right": whole.argmax(1) == wanted,
        "same": whole.argmax(1) == end,
        "rate": identifiability(whole, wanted),
    }
    return {name: one.cpu() for name, one in {**found, "tokens": rates}.items()}


def _layer(
    layer: int, parts: list[dict[str, Tensor]], names: list[str], at: dict[str, Tensor]
) -> LayerClasses:
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    rates = whole["tokens"]
    return LayerClasses(
        layer=layer,
        accuracy=share_of(whole["right"]),
        agreement=share_of(whole["same"]),
        identifiability=mean_of(whole["rate"]),
        tokens={name: mean_of(rates[:, at[name]].mean(1)) for name in names},
        patches=rates[:, at["patch"]].mean(0) if "patch" in at else None,
    )


def identifiability(
    logits: Float[Tensor, "n classes"], wanted: Int[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """Return ``1 - rank / (classes - 1)`` of the wanted class: 1 where it comes first."""
    own = logits.gather(1, wanted[:, None])
    rank = (logits > own).sum(1).double()
    return 1 - rank / max(1, logits.shape[1] - 1)


def _classifies(model: Any) -> bool:
    """Return whether the native module's output is made by a head over classes."""
    config = getattr(model.native, "config", None)
    if type(model.native).__name__.find("ForImageClassification") >= 0:
        return True
    has_head = isinstance(getattr(model.native, "head", None), torch.nn.Linear)
    return config is None and has_head
