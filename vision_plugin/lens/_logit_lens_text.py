"""CLIP's text lens: what each layer would say to texts, raw and with a fitted translator.

The raw lens puts a layer's residual stream through the model's own head. Early layers live in other
coordinates, so it is misaligned there. The tuned lens (Belrose et al. 2023, arXiv 2303.08112) first
carries the stream into the last layer's coordinates by an affine map; here the map is the ridge
regression of the last layer's tokens on the layer's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vision_plugin._inputs import check_template, sentences
from vision_plugin._progress import Progress
from vision_plugin.evaluation import class_of_images
from vision_plugin.images import open_images, read_batches
from vision_plugin.lens._logit_lens_text_result import TextLens, TextLensRow
from vision_plugin.lens._shares import mean_of, share_of
from vision_plugin.lens._splice_words import require_text
from vision_plugin.models.site import in_eval_mode

LEAST = 20
"""Fewest images that a translator is fitted on."""


@dataclass(frozen=True, kw_only=True)
class TextLensSettings:
    """What a text lens compares with, and how its translators are fitted.

    Examples:
        >>> vp.lens.TextLensSettings(labels="column:colour").fit_share
        0.5
    """

    labels: str | None = None
    """Classes of the images, as ``column:NAME``; by default the labels of the images, where they
    have some."""
    template: str = "{}"
    """Sentence around a text."""
    fit_share: float = 0.5
    """Share of the images that translators are fitted on; a fifth of these choose the ridge."""
    ridges: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    """Strengths of the pull towards the identity, as shares of the layer's mean variance."""
    batch_size: int = 64
    """Images per forward pass."""
    seed: int = 0
    """Seed of the split."""

    def __post_init__(self) -> None:
        check_template(self.template, argument="template")
        if not 0 < self.fit_share < 1:
            raise ValueError(f"fit_share={self.fit_share} must lie between 0 and 1")
        if not self.ridges or min(self.ridges) <= 0:
            raise ValueError(f"ridges={self.ridges}: give numbers above 0")
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size} must be at least 1")


@dataclass(frozen=True, eq=False)
class Translator:
    """An affine map of a layer's tokens to the last layer's.

    Attributes:
        matrix: ``[d_model, d_model]``, applied from the right.
        bias: ``[d_model]``.
        ridge: Strength of the pull towards the identity; infinite where only the bias is fitted.

    Examples:
        >>> tokens = torch.randn(2, 8)
        >>> torch.equal(vp.lens.Translator.identity(8)(tokens), tokens)
        True
    """

    matrix: Float[Tensor, "d d"]
    bias: Float[Tensor, " d"]
    ridge: float

    def __call__(self, tokens: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """Return the tokens in the last layer's coordinates."""
        return (tokens.double() @ self.matrix + self.bias).to(tokens.dtype)

    @classmethod
    def identity(cls, width: int) -> Translator:
        """Return the map that changes nothing: the raw lens."""
        return cls(torch.eye(width).double(), torch.zeros(width).double(), 0.0)


class _Moments:
    """Sums over pairs of tokens, from which every ridge regression follows."""

    def __init__(self, width: int) -> None:
        self.n = 0
        self.x, self.y = (torch.zeros(width, dtype=torch.float64) for _ in range(2))
        self.xx, self.xy = (torch.zeros(width, width, dtype=torch.float64) for _ in range(2))

    def add(self, x: Float[Tensor, "m d"], y: Float[Tensor, "m d"]) -> None:
        """Count pairs of a layer's tokens and the last layer's."""
        x, y = x.double().cpu(), y.double().cpu()
        self.n += len(x)
        self.x += x.sum(0)
        self.y += y.sum(0)
        self.xx += x.T @ x
        self.xy += x.T @ y

    def fit(self, ridge: float) -> Translator:
        """Return the map that least squares give, pulled towards the identity."""
        width = len(self.x)
        mean_x, mean_y = self.x / self.n, self.y / self.n
        matrix = torch.eye(width, dtype=torch.float64)
        if ridge != float("inf"):
            cov = self.xx / self.n - torch.outer(mean_x, mean_x)
            cross = self.xy / self.n - torch.outer(mean_x, mean_y)
            pull = max(ridge * float(cov.trace()) / width, 1e-12)
            matrix = matrix + torch.linalg.solve(cov + pull * matrix, cross - cov)
        return Translator(matrix, mean_y - mean_x @ matrix, ridge)


@torch.no_grad()
def text_lens(
    model: Any,
    images: Any,
    texts: Sequence[str],
    *,
    settings: TextLensSettings | None = None,
    progress: bool = True,
) -> TextLens:
    """Compare every layer's stream with texts: raw, with a fitted bias, with a fitted translator.

    Translators are fitted on one part of the images; every figure is of the others. At the last
    layer the raw lens equals the model's own embedding.

    Args:
        model: A VisionBridge of a CLIP or SigLIP with its text tower.
        images: Whatever ``vp.open_images`` takes.
        texts: Texts to compare with; with labels, the classes, spelled as the labels are.
        settings: Labels, split and ridge.
        progress: Show how far the images are.

    Raises:
        ValueError: the model has no text tower, there are fewer than two texts or too few images.

    Examples:
        >>> found = vp.lens.text_lens(model, "demo:60", ["a star", "a circle"], progress=False)
        >>> found.n_fitted, len(found.rows)
        (24, 15)
    """
    cfg = settings or TextLensSettings()
    require_text(model)
    names = list(dict.fromkeys(" ".join(text.split()) for text in texts))
    if len(names) < 2:
        raise ValueError(f"texts= has {len(names)} texts: a lens compares at least two")
    source = open_images(images)
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(cfg.seed))
    n_fit = int(len(source) * cfg.fit_share)
    n_chooses = n_fit // 5
    fit, chooses, report = order.split([n_fit - n_chooses, n_chooses, len(source) - n_fit])
    if len(fit) < LEAST or len(report) < LEAST:
        raise ValueError(
            f"{len(source)} images leave {len(fit)} to fit translators on and {len(report)} to "
            f"report on, and each needs {LEAST}: give more images"
        )
    embedded = model.encode_text(sentences(cfg.template, names, argument="template"))
    lens = _Lens(model, embedded, cfg)
    with Progress(len(source), "reading", shown=progress) as shown:
        translators = lens.fitted(source, fit, chooses, shown)
        rows = lens.report(source, report, translators, _numbers(source, names, cfg), shown)
    return TextLens(
        model=str(model.cfg.model_name),
        texts=names,
        settings=cfg,
        n_fitted=len(fit),
        rows=rows,
        translators={layer: found for (name, layer), found in translators.items() if
                     name == "tuned"},
    )  # fmt: skip


def _numbers(source: Any, names: list[str], cfg: TextLensSettings) -> Int[Tensor, " n"] | None:
    """Return the text that is each image's class, -1 for none; None without labels."""
    if cfg.labels is None and (source.labels is None or not any(source.labels)):
        return None
    number = {name: place for place, name in enumerate(names)}
    found = [number.get(name, -1) for name in class_of_images(source, cfg.labels)]
    return torch.tensor(found) if max(found) >= 0 else None


class _Lens:
    """The model's head on any layer's stream."""

    def __init__(self, model: Any, texts: Tensor, cfg: TextLensSettings) -> None:
        self.model, self.texts, self.cfg = model, texts, cfg
        self.n_layers = int(model.cfg.n_layers)
        layout = model.token_layout()
        # The class token makes the embedding where there is one; pooling takes every patch.
        self.rows = layout.indices("cls" if layout.n_cls else "all").to(model.device)
        blocks = [f"blocks.{i}.hook_resid_post" for i in range(self.n_layers)]
        self.hooks = ["blocks.0.hook_resid_pre", *blocks]

    def streams(self, source: Any, places: Tensor, shown: Any) -> Any:
        bad: dict[str, str] = {}
        for batch in read_batches(source, self.cfg.batch_size, bad, indices=places.tolist()):
            pixels = self.model.preprocess(list(batch.values()))
            yield list(batch), self.model.harvest(pixels, self.hooks)
            shown.advance(len(batch))

    def embed(self, stream: Tensor, translator: Translator | None = None) -> Tensor:
        """Return unit embeddings of a stream in the last one's place."""
        if translator is not None:
            stream = stream.clone()
            stream[:, self.rows] = translator(stream[:, self.rows])
        with in_eval_mode(self.model):
            found: Tensor = self.model.encode_image(stream, start_at_layer=self.n_layers)
        return found

    def logits(self, embedding: Tensor) -> Tensor:
        found: Tensor = self.model.zero_shot_logits(embedding, self.texts)
        return found.double().cpu()

    def fitted(
        self, source: Any, fit: Tensor, chooses: Tensor, shown: Any
    ) -> dict[tuple[str, int], Translator]:
        """Return translators by name and layer."""
        width = int(self.model.cfg.d_model)
        moments = [_Moments(width) for _ in range(self.n_layers)]
        for _, found in self.streams(source, fit, shown):
            last = found[self.hooks[-1]][:, self.rows].flatten(0, 1)
            for own, hook in zip(moments, self.hooks, strict=False):
                own.add(found[hook][:, self.rows].flatten(0, 1), last)
        candidates = [[own.fit(ridge) for ridge in self.cfg.ridges] for own in moments]
        lost = torch.zeros(self.n_layers, len(self.cfg.ridges), dtype=torch.float64)
        for _, found in self.streams(source, chooses, shown):
            end = self.embed(found[self.hooks[-1]])
            for layer, tried in enumerate(candidates):
                for place, one in enumerate(tried):
                    near = (self.embed(found[self.hooks[layer]], one) * end).sum()
                    lost[layer, place] -= float(near)
        translators: dict[tuple[str, int], Translator] = {}
        for layer, own in enumerate(moments):
            translators["bias", layer] = own.fit(float("inf"))
            translators["tuned", layer] = candidates[layer][int(lost[layer].argmin())]
        for name in ("bias", "tuned"):
            translators[name, self.n_layers] = Translator.identity(width)
        return translators

    def report(
        self,
        source: Any,
        places: Tensor,
        translators: dict[tuple[str, int], Translator],
        truth: Tensor | None,
        shown: Any,
    ) -> list[TextLensRow]:
        """Return the figures of every lens and layer on images that nothing was fitted on."""
        kept: dict[tuple[str, int], list[dict[str, Tensor]]] = {}
        for batch, found in self.streams(source, places, shown):
            end = self.embed(found[self.hooks[-1]])
            wanted = None if truth is None else truth[batch]
            for name in ("raw", "bias", "tuned"):
                for layer, hook in enumerate(self.hooks):
                    embedding = self.embed(found[hook], translators.get((name, layer)))
                    part = self._compared(embedding, end, wanted)
                    kept.setdefault((name, layer), []).append(part)
        rows = []
        for (name, layer), parts in kept.items():
            whole = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
            right = whole.get("right")
            rows.append(
                TextLensRow(
                    lens=name,
                    layer=layer,
                    ridge=translators[name, layer].ridge if name == "tuned" else None,
                    cosine=mean_of(whole["cosine"]),
                    agreement=share_of(whole["same"]),
                    kl=mean_of(whole["kl"]),
                    accuracy=None if right is None or len(right) == 0 else share_of(right),
                )
            )
        return rows

    def _compared(self, embedding: Tensor, end: Tensor, wanted: Tensor | None) -> dict[str, Tensor]:
        mine, final = self.logits(embedding), self.logits(end)
        log_mine, log_final = (nn.functional.log_softmax(one, dim=1) for one in (mine, final))
        found = {
            "cosine": (embedding * end).sum(1).cpu(),
            "same": mine.argmax(1) == final.argmax(1),
            "kl": (log_final.exp() * (log_final - log_mine)).sum(1),
        }
        if wanted is not None:
            known = wanted >= 0
            found["right"] = mine.argmax(1)[known] == wanted[known]
        return found
