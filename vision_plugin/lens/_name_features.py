"""``vp.name_features``: candidate names for every latent, and a check of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vision_plugin._inputs import sentences
from vision_plugin._progress import Progress
from vision_plugin.images import open_images
from vision_plugin.lens._dissect import dissect
from vision_plugin.lens._name_checks import Check, Checker
from vision_plugin.lens._name_choice import agreement, chosen
from vision_plugin.lens._name_decoder import text_directions
from vision_plugin.lens._name_evidence import Evidence, gather
from vision_plugin.lens._name_labels import best_labels
from vision_plugin.lens._name_says import (
    TOP_IMAGES,
    open_captioner,
    said_name,
    said_of_nothing,
    steered_names,
)
from vision_plugin.lens._name_settings import METHODS, NameSettings
from vision_plugin.lens._names import FeatureNames, NameCandidates
from vision_plugin.lens._vocabulary import Vocabulary, read_vocabulary
from vision_plugin.models import load_model
from vision_plugin.models.dictionary import Dictionary
from vision_plugin.models.site import Site, signature
from vision_plugin.steering import fingerprint

_MEAN_OF = 32
"""Images whose mean a head is differentiated at."""
_BLOCK = 2**24


def name_features(
    model: Any,
    sae: Dictionary,
    images: Any,
    *,
    vocabulary: str | Path | Sequence[str] | Vocabulary | None = None,
    text_embeddings: Tensor | None = None,
    judge: Any = None,
    captioner: Any = None,
    output_path: str | Path | None = None,
    check_model: bool = True,
    progress: bool = True,
    **options: Any,
) -> FeatureNames:
    """Name the features of an SAE, and check each name on images that it was not made from.

    Methods: ``decoder``, the words nearest to the decoder's direction in the text space
    (Discover-then-Name, arXiv 2407.14499); ``dissect``, soft-WPMI of activations and image-text
    similarities (CLIP-Dissect, arXiv 2204.10965); ``labels``, the label with the best average
    precision; ``steering``, the word that setting the latent raises most, or what a vision-language
    model says of an empty picture with the direction added; ``caption``, what a model says that the
    top images share.

    A check is the AUROC of the text similarity of image and name for where the latent fires, with
    an interval, beside the same for the name of another latent.

    Args:
        model: A VisionBridge, or a VisionLanguageBridge, whose tower the SAE is in.
        sae: An SAE, a transcoder or any dictionary at one of the model's hooks.
        images: Whatever ``vp.open_images`` takes, labelled or not.
        vocabulary: A text file of words, one a line, or words; None takes the package's list.
        text_embeddings: Embeddings of these words that were made before, ``[words, d_embed]``.
        judge: VisionBridge, or its name, that compares images with texts; None takes the model.
        captioner: Function from a list of images to what they share, or an image-text-to-text
            model, for ``caption``.
        output_path: File to write the names to, or a folder for ``names.json``; None writes none.
        check_model: Refuse an SAE that was trained on another model.
        progress: Whether to show progress.
        **options: The fields of :class:`NameSettings`.

    Raises:
        ValueError: a method that was asked for lacks what it needs, no method has what it needs,
            the vocabulary is empty or embedded by another model, or the SAE does not fit the model.

    Examples:
        >>> settings = {"vocabulary": ["red", "blue"], "methods": ("dissect",), "progress": False}
        >>> names = vp.name_features(model, sae, "demo:60", **settings)
        >>> len(names.names), {name for name in names.names if name} <= {"red", "blue"}
        (256, True)
    """
    settings = NameSettings(**options)
    vlm = model if hasattr(model, "vision") and hasattr(model, "generate") else None
    tower = model if vlm is None else model.vision
    if isinstance(judge, (str, Path)):
        judge = load_model(str(judge), device=str(tower.device))
    judge = judge if judge is not None else tower if reads_text(tower) else None
    if judge is not None and not reads_text(judge):
        raise ValueError(
            f"judge={judge.cfg.model_name} has no text tower to compare images with names by: name "
            "a CLIP or SigLIP with its tokenizer"
        )
    site = Site.of(tower, sae, tokens=settings.tokens, check_model=check_model)
    naming = _Naming(
        site, sae, open_images(images), settings, judge, vlm, vocabulary, text_embeddings,
        captioner, check_model, progress,
    )  # fmt: skip
    names = naming.run()
    if output_path is not None:
        names.save(output_path)
    return names


def reads_text(model: Any) -> bool:
    """Return whether a model compares images with texts."""
    return model.tokenizer is not None and bool(model.adapter.has_joint_space)


@dataclass(frozen=True)
class _Made:
    """Names by latent, before they are checked."""

    names: list[str | None]
    scores: Tensor
    score_name: str
    note: str = ""


@dataclass
class _Naming:
    """Names under way."""

    site: Site
    sae: Dictionary
    images: Any
    settings: NameSettings
    judge: Any
    vlm: Any
    vocabulary_source: Any
    text_embeddings: Tensor | None
    captioner: Any
    check_model: bool
    progress: bool
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def d_sae(self) -> int:
        return int(self.sae.cfg.d_sae)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        return read_vocabulary(self.vocabulary_source)

    @cached_property
    def texts(self) -> Tensor:
        """Embeddings of the vocabulary, by the judge."""
        return self.vocabulary.embed(self.judge, self.settings.template, self.text_embeddings)

    @cached_property
    def evidence(self) -> Evidence:
        chosen, settings = self.settings, self.settings
        wanted = not chosen.methods or "labels" in chosen.methods or self.judge is None
        return gather(
            self.site, self.sae, self.images, judge=self.judge,
            labels=(settings.labels or None) if wanted else (), pooling=settings.pooling,
            check_share=settings.check_share, batch_size=settings.batch_size, seed=settings.seed,
            progress=self.progress,
        )  # fmt: skip

    def run(self) -> FeatureNames:
        makers: dict[str, Callable[[], _Made]] = {
            "decoder": self._decoder,
            "dissect": self._dissect,
            "labels": self._labels,
            "steering": self._steering,
            "caption": self._caption,
        }
        self._check_words()
        wanted = self.settings.methods or METHODS[:3]
        made: dict[str, _Made] = {}
        for method in sorted(wanted, key=METHODS.index):
            try:
                self._check_needs(method)
                made[method] = makers[method]()
            except ValueError as error:
                if self.settings.methods:
                    raise
                self.left_out[method] = str(error)
        if not made:
            raise ValueError(f"no method can name these features: {'; '.join(self._reasons())}")
        return self._checked(made)

    def _reasons(self) -> list[str]:
        return list(dict.fromkeys(self.left_out.values()))

    def _check_words(self) -> None:
        """Raise before the images are read where the words cannot be used."""
        needs_words = {"decoder", "dissect", "steering"} & set(self.settings.methods or METHODS)
        if self.vocabulary_source is not None or (needs_words and self.judge is not None):
            read = self.vocabulary  # an empty one raises
            if self.text_embeddings is not None and self.judge is not None:
                read.embed(self.judge, self.settings.template, self.text_embeddings)

    def _check_needs(self, method: str) -> None:
        """Raise ValueError where a method lacks what it needs."""
        name, own = self.site.model.cfg.model_name, self.judge is self.site.model
        if method == "dissect" and self.judge is None:
            raise ValueError(
                f"dissect compares images with words, and {name} has no text tower: give judge= "
                "a CLIP, or labels="
            )
        if method == "decoder" and not own:
            raise ValueError(
                f"decoder carries directions into the text space of the SAE's own model, and "
                f"{name} has none, or another judge= was given: use dissect"
            )
        if method == "steering" and not own and self.vlm is None:
            raise ValueError(
                f"steering looks at the words that a latent raises, and {name} has no text tower, "
                "or another judge= was given: give a vision-language model around it, or use "
                "dissect"
            )
        if method == "caption" and self.captioner is None:
            raise ValueError(
                "caption asks what top images share: give captioner= a function of a list of "
                "images, or the folder of an image-text-to-text model"
            )
        if method == "labels" and not self.evidence.labels:
            raise ValueError(
                "labels takes names from labels, and the images have none: name columns with "
                "labels=column:NAME"
            )

    # ------------------------------------------------------------------ methods

    def _decoder(self) -> _Made:
        evidence, site = self.evidence, self.site
        rows = evidence.made_on[:_MEAN_OF].tolist()
        pixels = site.model.preprocess([self.images[evidence.places[row]] for row in rows])
        directions, note = text_directions(site, self.sae, pixels)
        best, words = zip(
            *((directions_of @ self.texts.T).max(1) for directions_of in self._blocks(directions)),
            strict=True,
        )
        scores, places = torch.cat(best), torch.cat(words)
        lost = ~directions.norm(dim=-1).gt(0)
        names = self._named(places.masked_fill(lost, -1), self.vocabulary.words)
        return _Made(names, scores.masked_fill(lost, torch.nan), "cosine", note)

    def _blocks(self, directions: Tensor) -> tuple[Tensor, ...]:
        blocks: tuple[Tensor, ...] = directions.split(max(1, _BLOCK // len(self.texts)))
        return blocks

    def _dissect(self) -> _Made:
        evidence = self.evidence
        embedded = evidence.embedded(evidence.made_on)
        assert embedded is not None
        with Progress(len(self.texts), "dissecting", shown=self.progress, of="words") as shown:
            found = dissect(
                evidence.making, embedded, self.texts, settings=self.settings.dissecting(),
                watch=shown.advance,
            )  # fmt: skip
        names = self._named(found.words[:, 0], self.vocabulary.words)
        return _Made(names, found.scores[:, 0], "soft-WPMI")

    def _labels(self) -> _Made:
        evidence = self.evidence
        labels, found = best_labels(
            evidence.making, evidence.labelled(evidence.made_on),
            min_images=self.settings.min_images,
        )  # fmt: skip
        return _Made(self._named(found.labels, labels), found.precision, "average precision")

    def _steering(self) -> _Made:
        settings, site = self.settings, self.site
        if self.vlm is not None:
            said = said_of_nothing(
                self.vlm, self.sae, latents=self._asked(), strength=settings.strength,
                tokens=settings.tokens, prompt=settings.steering_prompt,
                check_model=self.check_model, progress=self.progress,
            )  # fmt: skip
            return _Made(self._spread(said), self._spread_scores({}), "", settings.steering_prompt)
        rows = self.evidence.made_on[: settings.steering_images].tolist()
        pixels = site.model.preprocess([self.images[self.evidence.places[row]] for row in rows])
        names, gains = steered_names(
            site.model, self.sae, pixels, self.texts, self.vocabulary.words,
            latents=self._asked(), strength=settings.strength, tokens=site.tokens,
            batch_size=settings.batch_size, progress=self.progress,
        )  # fmt: skip
        return _Made(self._spread(names), self._spread_scores(gains), "gain in probability")

    def _caption(self) -> _Made:
        device = str(self.site.model.device)
        ask = open_captioner(self.captioner, prompt=self.settings.caption_prompt, device=device)
        said: dict[int, str] = {}
        latents = self._asked()
        with Progress(len(latents), "captioning", shown=self.progress, of="latents") as shown:
            for latent in latents:
                top = self.evidence.top_images(latent, TOP_IMAGES)
                if top:
                    said[latent] = said_name(str(ask(top)))
                shown.advance(1)
        return _Made(self._spread(said), self._spread_scores({}), "", self.settings.caption_prompt)

    def _asked(self) -> list[int]:
        """Return the latents that are named one after the other: those that fire."""
        counts = self.evidence.making.counts
        chosen: Iterable[int] = self.settings.latents or range(self.d_sae)
        bad = [latent for latent in chosen if not 0 <= latent < self.d_sae]
        if bad:
            raise ValueError(f"latents={bad[0]} is out of range: there are {self.d_sae}, from 0")
        return [latent for latent in chosen if int(counts[latent])]

    def _named(self, places: Tensor, names: Sequence[str]) -> list[str | None]:
        return [names[place] if place >= 0 else None for place in places.tolist()]

    def _spread(self, said: dict[int, str]) -> list[str | None]:
        return [said.get(latent) or None for latent in range(self.d_sae)]

    def _spread_scores(self, scores: dict[int, float]) -> Tensor:
        found = torch.full((self.d_sae,), torch.nan, dtype=torch.float64)
        for latent, score in scores.items():
            found[latent] = score
        return found

    # ------------------------------------------------------------------ checks

    def _checked(self, made: dict[str, _Made]) -> FeatureNames:
        """Check every method's names, and choose among them."""
        evidence = self.evidence
        every = list(dict.fromkeys(n for one in made.values() for n in one.names if n))
        number = {name: place for place, name in enumerate(every)}
        words = {
            method: torch.tensor([-1 if n is None else number[n] for n in one.names])
            for method, one in made.items()
        }
        texts = self._embedded(every) if self.judge is not None and every else None
        making, checking = (
            Checker(
                evidence.fired(rows), evidence.embedded(rows), evidence.labelled(rows),
                self.settings.confidence, self.settings.seed,
            )
            for rows in (evidence.made_on, evidence.checked_on)
        )  # fmt: skip
        can = texts is not None or bool(evidence.labels)
        candidates = {}
        for method, one in made.items():
            of_making: Check | None = making.check(words[method], texts, every) if can else None
            candidates[method] = NameCandidates(
                names=tuple(one.names),
                scores=one.scores.double(),
                score_name=one.score_name,
                note=one.note,
                making_auroc=torch.full((self.d_sae,), torch.nan, dtype=torch.float64)
                if of_making is None
                else of_making.auroc,
                check=checking.check(words[method], texts, every) if can else None,
            )
        return FeatureNames(
            candidates=candidates,
            made_by=chosen(candidates),
            agreement=agreement(words, texts, self.settings.seed),
            sae={
                "hook_name": self.site.hook_name,
                "tokens": self.site.tokens,
                "fingerprint": fingerprint(self.sae),
            },
            model={
                "name": str(self.site.model.cfg.model_name),
                "signature": signature(self.site.model),
            },
            settings=self._settings(),
            left_out=self.left_out,
            n_made_on=len(evidence.made_on),
        )

    def _embedded(self, names: list[str]) -> Tensor:
        """Return the judge's unit embeddings of names; those of the vocabulary are there."""
        known: dict[str, Tensor] = {}
        if "texts" in self.__dict__:
            known = dict(zip(self.vocabulary.words, self.texts, strict=True))
        others = [name for name in names if name not in known]
        if others:
            made = self.judge.encode_text(
                sentences(self.settings.template, others, argument="template")
            )
            known |= dict(zip(others, made.float().cpu(), strict=True))
        return torch.stack([known[name] for name in names])

    def _settings(self) -> dict[str, Any]:
        used = self.judge is not None
        return {
            **{n: list(v) if isinstance(v, tuple) else v for n, v in asdict(self.settings).items()},
            "judge": str(self.judge.cfg.model_name) if used else None,
            "vocabulary": {
                "name": self.vocabulary.name,
                "n_words": len(self.vocabulary),
                "sha256": self.vocabulary.sha256,
            }
            if used
            else None,
            "n_bad_images": len(self.evidence.bad_images),
        }
