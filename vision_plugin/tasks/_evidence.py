"""What rules for finding latents look at: latents of two kinds of images, and gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vision_plugin.images import open_images
from vision_plugin.kernels import SparseLatents
from vision_plugin.models.dictionary import Dictionary, encode, join_heads
from vision_plugin.models.site import Site, hooked, in_eval_mode
from vision_plugin.steering import LatentEditor


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
    pixels = as_pixels(model, images)
    if (present is None) == (clean is None):
        raise ValueError(
            "say which images lack what is looked for: present= for each image, or clean= with the "
            "same images without it"
        )
    classes = None if labels is None else _classes(labels, len(pixels), "labels")
    if clean is not None:
        without = as_pixels(model, clean)
        if len(without) != len(pixels):
            raise ValueError(
                f"clean= has {len(without)} images for {len(pixels)}: give each image once without "
                "what is looked for, in the same order"
            )
        pairs = None if classes is None else (classes, classes)
    else:
        has = torch.as_tensor(present).bool()
        if len(has) != len(pixels):
            raise ValueError(f"present= has {len(has)} entries for {len(pixels)} images")
        if bool(has.all()) or not bool(has.any()):
            raise ValueError("present= has one value only: give images of both kinds")
        pixels, without = pixels[has], pixels[~has]
        pairs = None if classes is None else (classes[has], classes[~has])
    asked = None
    if with_gradients:
        if clean is None or classes is None or wrong is None or texts is None:
            raise ValueError(f"attribution {_NEEDS}")
        misleads = _classes(wrong, len(pixels), "wrong")
        for name, given in (("labels", classes), ("wrong", misleads)):
            if int(given.max()) >= len(texts) or int(given.min()) < 0:
                raise ValueError(
                    f"{name}= names a class that texts= has no row for: {len(texts)} rows"
                )
        asked = classes, misleads, texts
    reader = Reader(site, sae, batch_size)
    have, lack = reader.means(pixels), reader.means(without)
    gradients: dict[str, Tensor] = {}
    if asked is not None:
        right, false, answers = asked
        mean = lack.mean(0)
        blame, to_mean = reader.blame(pixels, without, right, false, answers, mean)
        merit = reader.merit(without, right, answers, mean)
        gradients = {"blame": blame.cpu(), "to_mean": to_mean.cpu(), "merit": merit.cpu()}
    return Evidence(have.cpu(), lack.cpu(), reader.active.cpu(), site.tokens, pairs, **gradients)


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

    @torch.no_grad()
    def means(self, pixels: Tensor) -> Tensor:
        """Return the mean of each latent over an image's tokens, ``[n, d_sae]``."""
        parts = []
        for batch in pixels.split(self.batch_size):
            latents = self._read(batch)
            self.active |= (latents != 0).flatten(0, 1).any(0)
            parts.append(latents.mean(1))
        return torch.cat(parts)

    def blame(
        self,
        pixels: Tensor,
        clean: Tensor,
        classes: Tensor,
        wrong: Tensor,
        texts: Tensor,
        mean: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return the latents' shares in the wrong answer's lead: by change, and to the mean."""
        by_change, to_mean = torch.zeros_like(mean), torch.zeros_like(mean)
        batches = zip(
            *(every.split(self.batch_size) for every in (pixels, clean, classes, wrong)),
            strict=True,
        )
        for misled, plain, right, false in batches:

            def lead(embedding: Tensor, right: Tensor = right, false: Tensor = false) -> Tensor:
                logits = self._logits(embedding, texts)
                rows = torch.arange(len(logits))
                return logits[rows, false] - logits[rows, right]

            latents, slope = self.slopes(misled, lead)
            before = self._read(plain)
            by_change += (slope * (latents - before)).sum((0, 1))
            to_mean += (slope * (latents - mean)).sum((0, 1))
        return by_change, to_mean

    def merit(self, clean: Tensor, classes: Tensor, texts: Tensor, mean: Tensor) -> Tensor:
        """Return the latents' shares in the right answer's lead over the next one."""
        total = torch.zeros_like(mean)
        for plain, right in zip(
            clean.split(self.batch_size), classes.split(self.batch_size), strict=True
        ):

            def lead(embedding: Tensor, right: Tensor = right) -> Tensor:
                logits = self._logits(embedding, texts)
                rows = torch.arange(len(logits))
                others = logits.clone()
                others[rows, right] = -torch.inf
                return logits[rows, right] - others.amax(1)

            latents, slope = self.slopes(plain, lead)
            total += (slope * (latents - mean)).sum((0, 1))
        return total

    def _logits(self, embedding: Tensor, texts: Tensor) -> Tensor:
        logits: Tensor = self.site.model.zero_shot_logits(embedding, texts.to(embedding))
        return logits

    def slopes(
        self, pixels: Tensor, lead: Callable[[Tensor], Tensor]
    ) -> tuple[Float[Tensor, "n tokens d_sae"], Float[Tensor, "n tokens d_sae"]]:
        """Return latents, and the gradient through each of a number per image.

        Args:
            pixels: Images.
            lead: Returns the number ``[n]`` from the images' unit embeddings.
        """
        site, model = self.site, self.site.model
        seen: dict[str, Tensor] = {}

        def keep(activation: Tensor, hook: Any) -> None:
            del hook
            seen[site.hook_name] = activation.detach()

        def start_here(activation: Tensor, hook: Any) -> Tensor:
            del hook
            leaf = activation.detach().requires_grad_()
            seen[site.hook_name_out] = leaf.detach()
            seen["leaf"] = leaf
            return leaf

        with torch.enable_grad(), in_eval_mode(model):
            functions = {site.hook_name: keep, site.hook_name_out: start_here}
            with hooked(model, functions):
                embedding = model.image_features(pixels)
            (gradient,) = torch.autograd.grad(lead(embedding).sum(), seen["leaf"])
        with torch.no_grad():
            read = site.read(seen)
            slope = site.read({**seen, site.hook_name_out: gradient}, read.rows).target
            reading = self._editor.read(read.source)
            if self._editor.directions is None:
                raise ValueError(
                    "attribution follows the decoder's directions, and this SAE's decoder is not "
                    "affine in its latents: use another rule="
                )
            through = slope @ self._editor.directions.T.to(slope)
            through = through if reading.gain is None else through * reading.gain
            return self._latents(read.source), through

    @torch.no_grad()
    def _read(self, pixels: Tensor) -> Tensor:
        """Return latents ``[n, tokens, d_sae]`` of the model as it is, its hooks included."""
        names = self.site.hook_names
        with in_eval_mode(self.site.model):
            _, found = self.site.model.run_with_cache(
                pixels, names_filter=names, return_cache_object=False
            )
        return self._latents(self.site.read(found).source)

    def _latents(self, source: Tensor) -> Tensor:
        rows = encode(self.sae, join_heads(source, int(self.sae.cfg.d_in)))
        dense = rows.to_dense() if isinstance(rows, SparseLatents) else rows
        return dense.view(*source.shape[:2], -1).float()


def _classes(values: Sequence[int] | Tensor, n: int, name: str) -> Tensor:
    classes = torch.as_tensor(values).long()
    if classes.shape != (n,):
        raise ValueError(f"{name}= has {len(classes)} entries for {n} images")
    return classes
