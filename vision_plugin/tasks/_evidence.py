"""What rules for finding latents look at: latents of two kinds of images, and gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vision_plugin.images import open_images
from vision_plugin.kernels import SparseLatents
from vision_plugin.models.dictionary import Dictionary, encode, join_heads
from vision_plugin.models.site import Site
from vision_plugin.steering import EditPass, LatentEditor


@dataclass(frozen=True, eq=False)
class Evidence:
    """Latents of the images that have something, and of those that lack it.

    Attributes:
        present: Mean of each latent over the tokens of each image that has it.
        absent: The same for the images that lack it.
        active: Whether each latent is active at any token.
        tokens: Kind of token that was read.
        labels: True classes of the images that have it, and of those that lack it.
        blame: Gradient of the wrong answer's lead times the latent's change from clean, summed.
        to_mean: The same with the latent's distance to its clean mean in place of the change.
        merit: Gradient of the right answer's lead on clean images times that distance, summed.
    """

    present: Float[Tensor, "n d_sae"]
    absent: Float[Tensor, "m d_sae"]
    active: Bool[Tensor, " d_sae"]
    tokens: str
    labels: tuple[Int[Tensor, " n"], Int[Tensor, " m"]] | None = None
    blame: Float[Tensor, " d_sae"] | None = None
    to_mean: Float[Tensor, " d_sae"] | None = None
    merit: Float[Tensor, " d_sae"] | None = None

    def labels_of(self, rule: str) -> tuple[Tensor, Tensor]:
        """Return the classes of both kinds of images; raise ValueError where nobody gave them."""
        if self.labels is None:
            raise ValueError(f"rule={rule!r} compares images of one class: give labels=")
        return self.labels

    def blame_of(self, rule: str) -> Tensor:
        """Return the blame; raise ValueError where there is none."""
        if self.blame is None:
            raise ValueError(f"rule={rule!r} {_NEEDS}")
        return self.blame

    def shares_of(self, rule: str) -> tuple[Tensor, Tensor]:
        """Return blame to the mean and merit; raise ValueError where there are none."""
        if self.to_mean is None or self.merit is None:
            raise ValueError(f"rule={rule!r} {_NEEDS}")
        return self.to_mean, self.merit


_NEEDS = (
    "compares each image with the same image without it: give clean=, labels= (true classes), "
    "wrong= (classes that mislead) and texts= (embeddings of the classes)"
)


def as_pixels(model: Any, images: Any) -> Float[Tensor, "n channels height width"]:
    """Return pixels of images: a batch of pixels itself, or whatever ``vp.open_images`` takes."""
    if isinstance(images, Tensor):
        model.check_pixels(images)
        return images.to(device=model.device, dtype=model.dtype)
    source = open_images(images)
    parts = [
        model.preprocess([source[i] for i in range(start, min(start + 256, len(source)))])
        for start in range(0, len(source), 256)
    ]
    return torch.cat(parts)


def as_run(model: Any, images: Any, batch_size: int) -> EditPass:
    """Return images ready to be read: a pass itself, or a pass of whatever is taken as images."""
    if isinstance(images, EditPass):
        return images
    return EditPass(model, as_pixels(model, images), batch_size=batch_size)


def gather(
    site: Site,
    sae: Dictionary,
    images: Any,
    *,
    present: Sequence[bool] | Tensor | None,
    clean: Any,
    labels: Sequence[int] | Tensor | None,
    wrong: Sequence[int] | Tensor | None,
    texts: Tensor | None,
    with_gradients: bool,
    batch_size: int,
) -> Evidence:
    """Read the latents that rules look at; see :func:`vision_plugin.find_latents`.

    Raises:
        ValueError: the two kinds of images cannot be told apart, or numbers of images differ.
    """
    model = site.model
    if (present is None) == (clean is None):
        raise ValueError(
            "say which images lack what is looked for: present= for each image, or clean= with the "
            "same images without it"
        )
    have, lack, pairs = _both(model, images, present, clean, labels, batch_size)
    reader = Reader(site, sae, batch_size)
    if not with_gradients:
        present_means, absent_means = reader.means(have), reader.means(lack)
        return Evidence(
            present_means.cpu(), absent_means.cpu(), reader.active.cpu(), site.tokens, pairs
        )
    if clean is None or pairs is None or wrong is None or texts is None:
        raise ValueError(f"attribution {_NEEDS}")
    right, misleads = pairs[0], _classes(wrong, len(have), "wrong")
    for name, given in (("labels", right), ("wrong", misleads)):
        if int(given.max()) >= len(texts) or int(given.min()) < 0:
            raise ValueError(f"{name}= names a class that texts= has no row for: {len(texts)} rows")
    asked = _Asked(model, texts, right, misleads)
    blame = have.slopes(site, asked.misled, "wrong answer's lead")
    merit = lack.slopes(site, asked.right, "right answer's lead")
    return reader.paired(have, lack, blame, merit, pairs)


def _both(
    model: Any, images: Any, present: Any, clean: Any, labels: Any, batch_size: int
) -> tuple[EditPass, EditPass, tuple[Tensor, Tensor] | None]:
    """Return the images that have it and those that lack it, and the classes of both."""
    if clean is not None:
        have, lack = (as_run(model, each, batch_size) for each in (images, clean))
        if len(lack) != len(have):
            raise ValueError(
                f"clean= has {len(lack)} images for {len(have)}: give each image once without "
                "what is looked for, in the same order"
            )
        classes = None if labels is None else _classes(labels, len(have), "labels")
        return have, lack, None if classes is None else (classes, classes)
    pixels = as_pixels(model, images)
    classes = None if labels is None else _classes(labels, len(pixels), "labels")
    has = torch.as_tensor(present).bool()
    if len(has) != len(pixels):
        raise ValueError(f"present= has {len(has)} entries for {len(pixels)} images")
    if bool(has.all()) or not bool(has.any()):
        raise ValueError("present= has one value only: give images of both kinds")
    have, lack = (as_run(model, pixels[kind], batch_size) for kind in (has, ~has))
    return have, lack, None if classes is None else (classes[has], classes[~has])


@dataclass(frozen=True, eq=False)
class _Asked:
    """The leads of answers whose gradients are followed."""

    model: Any
    texts: Tensor
    labels: Tensor
    wrong: Tensor

    def misled(self, embedding: Tensor, some: slice) -> Tensor:
        """Return the lead of the wrong answer over the right one."""
        logits = self._logits(embedding)
        rows = torch.arange(len(logits))
        lead: Tensor = logits[rows, self.wrong[some]] - logits[rows, self.labels[some]]
        return lead

    def right(self, embedding: Tensor, some: slice) -> Tensor:
        """Return the lead of the right answer over the next one."""
        logits = self._logits(embedding)
        rows = torch.arange(len(logits))
        right = self.labels[some]
        others = logits.clone()
        others[rows, right] = -torch.inf
        lead: Tensor = logits[rows, right] - others.amax(1)
        return lead

    def _logits(self, embedding: Tensor) -> Tensor:
        logits: Tensor = self.model.zero_shot_logits(embedding, self.texts.to(embedding))
        return logits


class Reader:
    """Reads latents and gradients at a site, batch by batch.

    Args:
        site: The site.
        sae: The SAE whose latents are read.
        batch_size: Images that run at once, fewer where they do not fit in memory.

    Raises:
        ValueError: the site has other tokens in every pass.
    """

    def __init__(self, site: Site, sae: Dictionary, batch_size: int) -> None:
        if site.selection.n_random is not None:
            raise ValueError(
                f"tokens={site.tokens!r} would look at other tokens in every pass: use 'cls', "
                "'patch' or 'all'"
            )
        self.site, self.sae = site, sae
        self.batch_size = site.images_at_once(int(sae.cfg.d_sae), batch_size)
        self.active = torch.zeros(int(sae.cfg.d_sae), dtype=torch.bool, device=site.model.device)
        self._editor = LatentEditor(sae)
        self._rescales: bool | None = None

    @torch.no_grad()
    def means(self, run: EditPass) -> Tensor:
        """Return the mean of each latent over an image's tokens, ``[n, d_sae]``."""
        return torch.cat([self._seen(latents).mean(1) for latents in self.latents(run)])

    @torch.no_grad()
    def latents(self, run: EditPass) -> Iterator[Float[Tensor, "b tokens d_sae"]]:
        """Yield the latents of the images as the model is, its hooks included, in batches."""
        for activation in run.activations(self.site.hook_name).split(self.batch_size):
            of_hooks = dict.fromkeys(self.site.hook_names, activation)
            yield self._latents(self.site.read(of_hooks).source)

    @torch.no_grad()
    def pushes(self, run: EditPass, slope: Tensor) -> Float[Tensor, "n d_sae"]:
        """Return each latent times the gradient through it, summed over an image's tokens."""
        return torch.cat(
            [
                (self.through(part, run, place) * latents).sum(1)
                for place, (latents, part) in enumerate(
                    zip(self.latents(run), slope.split(self.batch_size), strict=True)
                )
            ]
        )

    @torch.no_grad()
    def swapped(self, base: EditPass, source: EditPass, slope: Tensor) -> Float[Tensor, "n d_sae"]:
        """Return each latent's change from base to source times the gradient at the base."""
        return torch.cat(
            [
                (self.through(part, base, place) * (theirs - own)).sum(1)
                for place, (own, theirs, part) in enumerate(
                    zip(
                        self.latents(base),
                        self.latents(source),
                        slope.split(self.batch_size),
                        strict=True,
                    )
                )
            ]
        )

    @torch.no_grad()
    def paired(
        self,
        have: EditPass,
        lack: EditPass,
        blame: Tensor,
        merit: Tensor,
        pairs: tuple[Tensor, Tensor],
    ) -> Evidence:
        """Return the evidence of pairs of images, with gradients at the site.

        Args:
            have: The images that have what is looked for.
            lack: The same images without it.
            blame: Gradient of the wrong answer's lead in the first, ``[n, ..., d]``.
            merit: Gradient of the right answer's lead in the second.
            pairs: True classes of both.
        """
        present, absent = [], []
        # Latents times slopes, and slopes: distances to the clean mean follow from both.
        sums = {
            name: torch.zeros(int(self.sae.cfg.d_sae), dtype=torch.float64, device=blame.device)
            for name in ("misled", "plain", "slope", "right", "right slope")
        }
        batches = zip(
            self.latents(have), self.latents(lack),
            *(every.split(self.batch_size) for every in (blame, merit)), strict=True,
        )  # fmt: skip
        for place, (misled, plain, wrong_slope, right_slope) in enumerate(batches):
            present.append(self._seen(misled).mean(1))
            absent.append(self._seen(plain).mean(1))
            through = self.through(wrong_slope, have, place)
            kept = self.through(right_slope, lack, place)
            for name, product in (
                ("misled", through * misled), ("plain", through * plain), ("slope", through),
                ("right", kept * plain), ("right slope", kept),
            ):  # fmt: skip
                sums[name] += product.sum((0, 1), dtype=torch.float64)
        without = torch.cat(absent)
        mean = without.mean(0).double()
        return Evidence(
            torch.cat(present).cpu(), without.cpu(), self.active.cpu(), self.site.tokens, pairs,
            blame=(sums["misled"] - sums["plain"]).float().cpu(),
            to_mean=(sums["misled"] - sums["slope"] * mean).float().cpu(),
            merit=(sums["right"] - sums["right slope"] * mean).float().cpu(),
        )  # fmt: skip

    def through(self, slope: Tensor, run: EditPass, place: int) -> Float[Tensor, "b tokens d_sae"]:
        """Return the gradient through each latent, of one at the hook."""
        some = slice(place * self.batch_size, (place + 1) * self.batch_size)
        source = self.site.read(
            dict.fromkeys(self.site.hook_names, run.activations(self.site.hook_name)[some])
        ).source
        at_tokens = self.site.read(dict.fromkeys(self.site.hook_names, slope)).target
        gain = self._gain(source)
        directions = self._editor.directions
        if directions is None:
            raise ValueError(
                "attribution follows the decoder's directions, and this SAE's decoder is not "
                "affine in its latents: use another rule="
            )
        through = at_tokens @ directions.T.to(at_tokens)
        return through if gain is None else through * gain

    def _gain(self, source: Tensor) -> Tensor | None:
        """Return the decoder's gain at each token; the first call examines the decoder."""
        if self._rescales is False:
            return None
        gain = self._editor.read(source).gain
        self._rescales = gain is not None
        return gain

    def _seen(self, latents: Tensor) -> Tensor:
        self.active |= (latents != 0).flatten(0, 1).any(0)
        return latents

    def _latents(self, source: Tensor) -> Tensor:
        rows = encode(self.sae, join_heads(source, int(self.sae.cfg.d_in)))
        dense = rows.to_dense() if isinstance(rows, SparseLatents) else rows
        return dense.view(*source.shape[:2], -1).float()


def _classes(values: Sequence[int] | Tensor, n: int, name: str) -> Tensor:
    classes = torch.as_tensor(values).long()
    if classes.shape != (n,):
        raise ValueError(f"{name}= has {len(classes)} entries for {n} images")
    return classes
