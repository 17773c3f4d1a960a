"""One word about a white image, and about images, with one latent clamped.

The protocol of Pach et al. 2025 (arXiv 2504.02821, Table 3): a latent of the tower is set to a high
value, the model says in one word what it sees, and the word's text embedding is compared with the
embeddings of the images on which the latent is strongest. Beside it stand the two readings of
CB-SAE (arXiv 2512.10805): ``white_image`` reads the SAE's reconstruction with the one latent
changed, ``unit_vector`` sets all other latents to 0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from vision_plugin._intervals import cell
from vision_plugin._rich import Table
from vision_plugin.models.dictionary import Dictionary
from vision_plugin.models.site import Site
from vision_plugin.steering import LatentEditor
from vision_plugin.tasks._answers import AnswerPass
from vision_plugin.tasks._clustered import clustered
from vision_plugin.tasks._measure import Figure, unit
from vision_plugin.tasks._reading import PatchReading

PROMPT = "What is shown in this image? Use exactly one word!"
READINGS = ("clamp", "white_image", "unit_vector")
_ASKED = "one word"


@dataclass(frozen=True)
class OneWordRow:
    """How close words come to what latents stand for.

    Attributes:
        image: ``"white"``, ``"images"``, or ``"bound"``.
        method: ``"none"``, one of ``READINGS``, ``"random"`` or ``"label"``.
        score: Mean cosine of word and images.
        over_none: Mean difference to the unchanged model's words; None where there are none.

    Examples:
        >>> row = vp.tasks.OneWordRow("white", "random", vp.tasks.Figure(0.2, 0.1, 0.3))
        >>> row.to_dict()["score"]
        {'value': 0.2, 'low': 0.1, 'high': 0.3}
    """

    image: str
    method: str
    score: Figure
    over_none: Figure | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the row ready for JSON."""
        over = {} if self.over_none is None else {"over_none": self.over_none.to_dict()}
        return {
            "image": self.image, "method": self.method, "score": self.score.to_dict(), **over,
        }  # fmt: skip


@dataclass(frozen=True, eq=False)
class OneWordResult:
    """Rows, and the words that were said.

    Attributes:
        alpha: Value that latents were set to.
        rows: Mean scores with 95% bootstrap intervals, latents (or images) drawn.
        words: What is said about a white image, by latent: ``"none"`` and each reading.

    Examples:
        >>> labels = [scene.colour for scene in world.scenes]
        >>> limits = {"n_latents": 30, "n_latents_on_images": 0, "max_new_tokens": 1}
        >>> found = vp.tasks.one_word(vlm, sae, world.images, labels, clip=model, **limits)
        >>> found.alpha, len(found.words)
        (100.0, 30)
    """

    alpha: float
    rows: Sequence[OneWordRow]
    words: Mapping[int, Mapping[str, str]]

    def row(self, image: str, method: str) -> OneWordRow:
        """Return one row.

        Raises:
            KeyError: there is none.
        """
        for row in self.rows:
            if (row.image, row.method) == (image, method):
                return row
        raise KeyError(f"no row of {method!r} for {image!r}")

    def table(self) -> Table:
        """Return the rows for ``rich`` to print."""
        table = Table(title=f"one word, a latent at {self.alpha:g}")
        for heading in ("image", "method"):
            table.add_column(heading)
        for heading in ("score", "over none"):
            table.add_column(heading, justify="right")
        for row in self.rows:
            table.add_row(row.image, row.method, cell(row.score), cell(row.over_none))
        return table

    def to_dict(self) -> dict[str, Any]:
        """Return the result ready for JSON."""
        return {
            "alpha": self.alpha,
            "rows": [row.to_dict() for row in self.rows],
            "said_about_white": {
                method: dict(Counter(said[method] for said in self.words.values()).most_common())
                for method in ("none", *READINGS)
            },
        }


@torch.no_grad()
def one_word(
    vlm: Any,
    sae: Dictionary,
    images: Sequence[Image.Image],
    labels: Sequence[str],
    *,
    clip: Any,
    asked: Sequence[Image.Image] = (),
    prompt: str = PROMPT,
    alpha: float = 100.0,
    latents: Sequence[int] | None = None,
    n_latents: int = 1000,
    n_latents_on_images: int = 10,
    n_top: int = 16,
    max_new_tokens: int = 5,
    batch_size: int = 150,
    seed: int = 0,
) -> OneWordResult:
    """Clamp one latent after the other, and score the word that the model then says.

    Args:
        vlm: A VisionLanguageBridge that reads the output of one block of its tower.
        sae: An SAE at that output.
        images: Images on which each latent's strongest ones are found, mean over patches.
        labels: One word for each image, for the upper bound.
        clip: A VisionBridge with ``encode_image`` and ``encode_text``, for the scores.
        asked: Images that are asked about, beside a white one.
        prompt: What is asked; the first word of the answer counts.
        alpha: Value that a latent is set to on all patches; 100 is the paper's.
        latents: Latents to clamp; None takes the first ``n_latents`` that fire on the images.
        n_latents: Number of latents on the white image.
        n_latents_on_images: Number of the latents, from the first, on ``asked``.
        n_top: Number of strongest images per latent.
        max_new_tokens: Length of an answer.
        batch_size: Answers that run at once.
        seed: Seed of the random words and of the bootstrap.

    Raises:
        ValueError: images and labels differ in number, the SAE does not fit, or no latent fires.

    Examples:
        >>> labels = [scene.colour for scene in world.scenes]
        >>> limits = {"n_latents": 30, "n_latents_on_images": 0, "max_new_tokens": 1}
        >>> found = vp.tasks.one_word(vlm, sae, world.images, labels, clip=model, **limits)
        >>> [(row.image, row.method) for row in found.rows][:2]
        [('white', 'none'), ('white', 'clamp')]
    """
    if len(labels) != len(images):
        raise ValueError(f"{len(labels)} labels come with {len(images)} images: give one for each")
    site = Site.of(vlm.vision, sae)
    vlm.reach.check(site.hook_name_out, site.tokens)
    layout = vlm.vision.token_layout()
    first, editor = int(layout.n_cls + layout.n_registers), LatentEditor(sae)
    options = {"batch_size": batch_size, "max_new_tokens": max_new_tokens}

    def reading(some: Sequence[Image.Image]) -> tuple[AnswerPass, PatchReading]:
        answering = AnswerPass(vlm, some, {_ASKED: prompt}, **options)
        return answering, PatchReading(answering.stream, first, sae, editor)

    _, seen = reading(images)
    every = torch.arange(int(sae.cfg.d_sae))
    pooled = torch.cat([seen.values(some).mean(1) for some in every.split(256)], dim=1)
    chosen = _chosen(pooled, latents, n_latents)
    embedded = torch.cat(
        [unit(clip.encode_image(clip.preprocess(images[i : i + batch_size])))
         for i in range(0, len(images), batch_size)]
    )  # fmt: skip
    top = pooled[:, chosen].topk(min(n_top, len(images)), dim=0).indices.T.cpu()
    meant = unit(embedded[top].mean(1))  # [latents, d_embed]
    texts = _Texts(clip)
    side = images[0].size
    white, blank = reading([Image.new("RGB", side, "white")])
    words = {"none": [_first(white.answers()[_ASKED][0])] * len(chosen)}
    for method in READINGS:
        words[method] = []
        for some in chosen.split(batch_size):
            stream = _changed(blank, method, some, alpha)
            said = white.answers(stream, torch.zeros(len(some), dtype=torch.long))[_ASKED]
            words[method] += map(_first, said)
    rows = []
    plain = texts.scores(words["none"], meant)
    numbers = torch.arange(len(chosen))
    for method, said in words.items():
        rows.append(_row("white", method, texts.scores(said, meant), plain, numbers, seed))
    if len(asked):
        answering, own = reading(asked)
        few = chosen[:n_latents_on_images]
        rows += _on_images(answering, own, few, meant[: len(few)], texts, alpha, seed)
    random = torch.Generator().manual_seed(seed)
    names = sorted(set(labels))
    drawn = [names[i] for i in torch.randint(len(names), (len(chosen),), generator=random)]
    own_names = texts([labels[i] for i in top.flatten().tolist()]).view(*top.shape, -1)
    upper = (own_names * embedded[top]).sum(-1).mean(1)
    for method, scores in (("random", texts.scores(drawn, meant)), ("label", upper)):
        rows.append(OneWordRow("bound", method, clustered(scores, numbers, seed=seed)))
    return OneWordResult(
        alpha,
        rows,
        {int(latent): {method: said[place] for method, said in words.items()}
         for place, latent in enumerate(chosen.tolist())},
    )  # fmt: skip


def _chosen(pooled: Tensor, latents: Sequence[int] | None, most: int) -> Int[Tensor, " m"]:
    if latents is not None:
        return torch.tensor(list(latents), dtype=torch.long)[:most]
    found = (pooled > 0).any(0).nonzero()[:most, 0]
    if not len(found):
        raise ValueError("no latent fires on these images: give others, or name latents=")
    return found


class _Texts:
    """Text embeddings of words, each computed once."""

    def __init__(self, clip: Any) -> None:
        self.clip = clip
        self.known: dict[str, Tensor] = {}

    def __call__(self, words: Sequence[str]) -> Float[Tensor, "n d_embed"]:
        """Return unit embeddings."""
        new = sorted(set(words) - set(self.known))
        if new:
            self.known.update(zip(new, unit(self.clip.encode_text(new)), strict=True))
        return torch.stack([self.known[word] for word in words])

    def scores(self, words: Sequence[str], meant: Tensor) -> Float[Tensor, " n"]:
        """Return the cosine of each word with what is meant."""
        return (self(words) * meant).sum(-1)


def _changed(
    blank: PatchReading, method: str, latents: Int[Tensor, " n"], alpha: float
) -> Float[Tensor, "n tokens d"]:
    """Return the stream of one image with each of some latents set, one after the other."""
    rows = torch.zeros(len(latents), dtype=torch.long)
    if method == "unit_vector":
        blank = blank.emptied()
    amount = alpha - blank.values(latents)[0].T  # [n, patches]
    if blank.reading.gain is not None:
        amount = amount * blank.reading.gain[0, :, 0]
    change = amount.unsqueeze(-1) * blank.directions[latents].unsqueeze(1).to(amount.dtype)
    stream = blank.with_patches(blank.patches[rows] + change, rows)
    return stream if method != "white_image" else blank.without_error(stream, rows)


def _on_images(
    answering: AnswerPass,
    own: PatchReading,
    latents: Int[Tensor, " m"],
    meant: Tensor,
    texts: _Texts,
    alpha: float,
    seed: int,
) -> list[OneWordRow]:
    """Return the rows of real images: each with each latent clamped, and as they are."""
    every = torch.arange(len(answering))
    plain_words = [_first(said) for said in answering.answers()[_ASKED]]
    plain, after = [], []
    for latent, goal in zip(latents, meant, strict=True):
        stream = own.with_latents(latent[None], lambda old: torch.full_like(old, alpha), every)
        said = [_first(word) for word in answering.answers(stream)[_ASKED]]
        plain.append(texts.scores(plain_words, goal))
        after.append(texts.scores(said, goal))
    before, now = torch.cat(plain), torch.cat(after)
    images = every.repeat(len(latents))
    return [
        _row("images", "none", before, before, images, seed),
        _row("images", "clamp", now, before, images, seed),
    ]


def _row(
    image: str, method: str, scores: Tensor, plain: Tensor, clusters: Tensor, seed: int
) -> OneWordRow:
    over = None if method == "none" else clustered(scores - plain, clusters, seed=seed)
    return OneWordRow(image, method, clustered(scores, clusters, seed=seed), over)


def _first(answer: str) -> str:
    """Return an answer's first word, without punctuation."""
    words = answer.split()
    return words[0].strip(".,;:!?\"'") if words else ""
