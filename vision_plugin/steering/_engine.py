"""Steering for scores: the model below the hook runs once, the rest once per latent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vision_plugin._allocator import freed_memory_kept
from vision_plugin.models.dictionary import Dictionary, join_heads
from vision_plugin.models.site import Site, in_eval_mode
from vision_plugin.steering._cached_pass import (
    CachedPass,
    Prepared,
    check_images,
    check_texts_differ,
    repeat,
)
from vision_plugin.steering._editor import LatentEditor, Reading
from vision_plugin.steering._head import ClassTokenHead

_LATENT_ELEMENTS = 2**26
"""Most latents held for a batch of images, zeros included: a bound however many are active."""

_LOGIT_ELEMENTS = {"cpu": 2**19, "cuda": 2**27}
"""Most logits computed at once: what fits a CPU's cache, and what keeps a GPU busy."""


@dataclass(frozen=True)
class Spread:
    """Spread over the images of one batch of what steering does to them, float64 ``[k]``.

    Attributes:
        squares: sum over images of the squared norm of the change.
        agreement: sum over images of the squared deviation of ``h_i``, the mean inner product of
            one image's change with the changes of the batch's other images.

    Examples:
        >>> same = torch.ones(1, 4, 2, dtype=torch.float64)
        >>> spread = vp.steering.Spread.of(same)
        >>> spread.squares, spread.agreement
        (tensor([8.], dtype=torch.float64), tensor([0.], dtype=torch.float64))
    """

    squares: Tensor
    agreement: Tensor

    @classmethod
    def of(cls, change: Tensor) -> Spread:
        """Return the spread of changes ``[k, n, concepts]``."""
        total = change.sum(1)
        squares = change.square().sum(2)
        with_all = torch.bmm(change, total.unsqueeze(2)).squeeze(2)
        others = ((with_all - squares) / max(1, change.shape[1] - 1)).double()
        agreement = (others - others.mean(1, keepdim=True)).square().sum(1)
        return cls(squares.sum(1, dtype=torch.float64), agreement)


@dataclass(frozen=True)
class Shift:
    """Effect of steering, summed over images.

    Attributes:
        total: sum over images of the change of each concept's probability, ``[k, concepts]``.
        spread: spread over the images; None where it was not asked for.
        n_images: number of images.

    Examples:
        >>> texts = model.encode_text(["a red circle", "a blue square"])
        >>> steering = vp.steering.Steering(model, sae, texts)
        >>> (prepared,) = steering.prepare(pixels)
        >>> shift = steering.shift(prepared, torch.tensor([12, 13]), 50.0)
        >>> shift.n_images, shift.total.shape
        (8, torch.Size([2, 2]))
    """

    total: Tensor
    spread: Spread | None
    n_images: int


class Steering:
    """A model, an SAE and a vocabulary, ready to steer any latent on any images.

    Args:
        model: a VisionBridge with a joint space.
        sae: a ``sae_lens.SAE``, or any dictionary that encodes and decodes like one.
        texts: text embeddings ``[concepts, d_embed]``; they are scaled to norm 1 here.
        tokens: kind of token to steer.
        scale: factor of the cosine similarities; None for the model's own.
        batch_size: number of sequences per forward pass.
        closed_form: whether to use the algebra from the last block's MLP on where it applies.
        watch: called with the number of passes, one for each latent and image, as they are done.

    Examples:
        >>> texts = model.encode_text(["a red circle", "a blue square"])
        >>> steering = vp.steering.Steering(model, sae, texts)
        >>> (prepared,) = steering.prepare(pixels)
        >>> steering.shift(prepared, torch.tensor([12]), 50.0).total.shape
        torch.Size([1, 2])
    """

    def __init__(
        self,
        model: Any,
        sae: Dictionary,
        texts: Tensor,
        *,
        tokens: str = "all",
        scale: float | None = None,
        batch_size: int = 64,
        closed_form: bool = True,
        watch: Callable[[int], object] | None = None,
    ) -> None:
        self.model, self.sae = model, sae
        self.site = Site.of(model, sae, tokens=tokens)
        self.cached_pass = CachedPass(self.site)
        if self.site.selection.n_random is not None:
            raise ValueError(
                f"tokens={tokens!r} would steer other tokens on every pass: use 'cls', 'patch' or "
                "'all'"
            )
        if not model.adapter.has_joint_space:
            raise ValueError(
                f"{model.cfg.model_name} ({model.cfg.architecture}) has no space shared with text, "
                "so there are no concepts to steer towards; use a model with a text tower (CLIP)"
            )
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        self.texts = _unit_texts(texts).to(model.device)
        self.scale = float(model.logit_scale if scale is None else scale)
        self.batch_size = batch_size
        self.watch = watch or _unwatched
        self.editor = LatentEditor(sae)
        run = self.cached_pass
        behind_all = run.is_stream and run.start == run.n_layers
        self._into_stream = None if behind_all else run.into_final_stream()
        self._wants_head = closed_form and (behind_all or self._into_stream is not None)
        self._head: ClassTokenHead | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Steering:
        """Return this object, so that a copied metric steers the same model."""
        return self

    @property
    def uses_closed_form(self) -> bool:
        """Return whether the algebra after the last block is used; False before :meth:`prepare`."""
        return self._head is not None

    def prepare(self, pixels: Tensor) -> Iterator[Prepared]:
        """Yield images run up to the hook, in batches, each image once."""
        check_images(pixels)
        pixels = pixels.to(device=self.model.device, dtype=self.model.dtype)
        for batch in torch.split(pixels, self._images_at_once()):
            with in_eval_mode(self.model):
                prepared = self._prepare(batch)
            yield prepared

    @torch.no_grad()
    def _prepare(self, batch: Tensor) -> Prepared:
        head_is_of_use = self._wants_head or self._head is not None
        prepared = self.cached_pass.prepare(batch, keep_final=head_is_of_use)
        self._check_width(prepared.embedding)
        if self._wants_head:
            self._wants_head = False
            self._head = self._checked_head(prepared)
        return prepared

    def _checked_head(self, prepared: Prepared) -> ClassTokenHead | None:
        """Return the head's algebra if it agrees with the model on two images."""
        if prepared.final is None:
            return None
        final, target = prepared.final[:2], prepared.target[:2]
        head = ClassTokenHead.of(self.model, final, prepared.embedding[:2])
        if head is None or self._into_stream is None:
            return head
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(target.shape, generator=generator).to(target) * target.std()
        seen = self.cached_pass.finish_edited(prepared.entry[:2], target + noise)
        moved = final[:, head.row].double() + noise[:, head.row].double() @ self._into_stream
        return head if head.agrees(moved, seen) else None

    @torch.no_grad()
    def shift(
        self, prepared: Prepared, latents: Tensor, strength: float, *, spread: bool = False
    ) -> Shift:
        """Steer each of ``latents`` on each image and sum the changes of the probabilities.

        Raises:
            ValueError: the model gave NaN or infinity.
        """
        before = self._probabilities(prepared.embedding)
        if self._head is not None and self.editor_is_affine(prepared):
            shift = self._shift_of_head(self._head, prepared, latents, strength, before, spread)
        else:
            shift = self._shift_of_rest(prepared, latents, strength, before, spread)
        if not bool(shift.total.sum().isfinite()):
            bad = latents[(~shift.total.isfinite().all(dim=1)).to(latents.device)].tolist()
            raise ValueError(
                f"steering latent {bad[0]} ({len(bad)} of {len(latents)} latents) to {strength} "
                "gave NaN or infinite probabilities; check the SAE's and the model's weights, or "
                "use a smaller strength"
            )
        return shift

    def editor_is_affine(self, prepared: Prepared) -> bool:
        """Return whether the SAE's decoder passed the check for an affine one."""
        if self.editor.directions is None:
            self._read(prepared.source[:1])
        return self.editor.directions is not None

    # ------------------------------------------------------------------ the two ways

    def _shift_of_rest(
        self,
        prepared: Prepared,
        latents: Tensor,
        strength: float,
        before: Tensor,
        spread: bool,
    ) -> Shift:
        """Run the model above the hook for every latent and image."""
        totals, spreads = [], []
        reading = self._read(prepared.source)
        mask = self.site.mask(prepared.target)
        with freed_memory_kept():
            for some in torch.split(latents, max(1, self.batch_size // len(prepared))):
                edited = self._edited(prepared, reading, mask, some, strength)
                # A hook inside a block needs the entry repeated; an edited stream replaces it.
                entry = edited if self.cached_pass.is_stream else repeat(prepared.entry, len(some))
                embedding = self.cached_pass.finish_edited(entry, edited)
                after = self._probabilities(embedding)
                change = after.reshape(len(some), -1, after.shape[1]) - before
                totals.append(change.sum(1))
                if spread:
                    spreads.append(Spread.of(change))
                self.watch(len(some) * len(prepared))
        return Shift(torch.cat(totals), _join(spreads), len(prepared))

    def _edited(
        self,
        prepared: Prepared,
        reading: Reading,
        mask: Tensor | None,
        latents: Tensor,
        strength: float,
    ) -> Tensor:
        """Return activations edited by each of some latents, ``[k * n, ..., d]``."""
        target = prepared.target
        directions = self.editor.directions
        if directions is None:
            changes = [
                self.editor.change_by_decoding(reading, latent, strength)
                for latent in latents.tolist()
            ]
            change = torch.stack(changes).to(target.dtype).reshape(-1, *target.shape)
            edited = target + (change if mask is None else change * mask)
            return edited.flatten(0, 1)
        flat = join_heads(target, directions.shape[1])
        amount = self.editor.coefficients(reading, latents, strength).to(target.dtype)
        if mask is not None:
            amount = amount * mask.reshape(*mask.shape[:2], *[1] * (amount.ndim - 2))
        chosen = directions[latents].to(target.dtype)
        chosen = chosen.reshape(len(latents), *[1] * (flat.ndim - 1), -1)
        edited = torch.addcmul(flat, amount.movedim(-1, 0).unsqueeze(-1), chosen)
        return edited.flatten(0, 1)

    def _shift_of_head(
        self,
        head: ClassTokenHead,
        prepared: Prepared,
        latents: Tensor,
        strength: float,
        before: Tensor,
        spread: bool,
    ) -> Shift:
        """Steer from the last MLP on by algebra alone; see ``_head.py``."""
        if self.site.selection.kind not in ("all", "cls"):
            zero = torch.zeros(len(latents), dtype=torch.float64, device=before.device)
            total = before.new_zeros(len(latents), before.shape[1])
            return Shift(total, Spread(zero, zero) if spread else None, len(prepared))
        assert self.editor.directions is not None
        assert prepared.final is not None
        token, directions = prepared.final[:, head.row], self.editor.directions
        if self._into_stream is not None:
            directions = directions.double() @ self._into_stream
        reading = self._read(prepared.source[:, head.row])
        limit = _LOGIT_ELEMENTS.get(before.device.type, _LOGIT_ELEMENTS["cpu"])
        totals, spreads = [], []
        for some in torch.split(latents, max(1, limit // before.shape[1])):
            amount = self.editor.coefficients(reading, some, strength)
            images = head.steered_logits(token, directions[some], amount, self.texts, self.scale)
            self.watch(len(some) * len(prepared))
            if spread:
                after = torch.stack([torch.softmax(logits, dim=-1) for logits in images], dim=1)
                change = after.sub_(before)
                totals.append(change.sum(1))
                spreads.append(Spread.of(change))
                continue
            total = -before.sum(0).repeat(len(some), 1)
            for logits in images:
                total += torch.softmax(logits, dim=-1)
            totals.append(total)
        return Shift(torch.cat(totals), _join(spreads), len(prepared))

    # ------------------------------------------------------------------ parts

    def _read(self, activation: Tensor) -> Reading:
        return self.editor.read(join_heads(activation, int(self.sae.cfg.d_in)))

    def _probabilities(self, embedding: Tensor) -> Tensor:
        """Return probabilities of the concepts, ``[n, concepts]``, float32."""
        unit = functional.normalize(embedding.to(self.texts.dtype), dim=-1)
        return torch.softmax(self.scale * (unit @ self.texts.T), dim=-1)

    def _images_at_once(self) -> int:
        layout = self.model.token_layout()
        fitting = _LATENT_ELEMENTS // (int(layout.n_tokens) * int(self.sae.cfg.d_sae))
        return min(self.batch_size, max(1, fitting))

    def _check_width(self, embedding: Tensor) -> None:
        if embedding.shape[-1] != self.texts.shape[-1]:
            raise ValueError(
                f"text embeddings have width {self.texts.shape[-1]}, but "
                f"{self.model.cfg.model_name} embeds images in {embedding.shape[-1]} dimensions: "
                "embed the concepts with the text tower of the same model"
            )


def _join(parts: list[Spread]) -> Spread | None:
    if not parts:
        return None
    return Spread(
        torch.cat([part.squares for part in parts]), torch.cat([part.agreement for part in parts])
    )


def _unwatched(n: int) -> None:
    """Take no notice of how far the steering is."""


def _unit_texts(texts: Tensor) -> Tensor:
    if texts.ndim != 2 or texts.shape[0] < 2:
        raise ValueError(
            "text_embeddings= must be [concepts, d_embed] with at least two concepts, got "
            f"{list(texts.shape)}"
        )
    if not bool(texts.isfinite().all()):
        row = int((~texts.isfinite().all(dim=1)).nonzero()[0])
        raise ValueError(f"text_embeddings= hold NaN or infinity, first in row {row}")
    norms = texts.double().norm(dim=1, keepdim=True)
    if bool((norms == 0).any()):
        row = int((norms[:, 0] == 0).nonzero()[0])
        raise ValueError(
            f"the text embedding of concept {row} is zero: it has no direction; leave it out"
        )
    check_texts_differ(texts)
    unit: Tensor = texts.detach().double() / norms
    return unit.float()
