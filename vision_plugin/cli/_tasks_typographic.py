"""``vision-plugin tasks typographic``: printed words that fool a model, and what mends that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from vision_plugin._paths import local_path
from vision_plugin.cli._console import console
from vision_plugin.cli._tasks_training import LEAST, TrainsSAE, given_latents, train_saes

PAIRS = ("train_pairs", "validation_pairs", "test_pairs")


@dataclass(frozen=True, kw_only=True)
class TypographicConfig(TrainsSAE):
    """A model, an SAE, and the images of a typographic attack."""

    model_name: str = "demo"
    """Model, as ``vp.load_model`` takes it, with a text tower."""
    sae: str | None = None
    """Folder of the SAE, or any checkpoint that ``vp.load_sae`` reads. By default one is trained on
    images of which half carry a word: an SAE that never saw print has no latents for it."""
    images: str | None = None
    """Labelled images to print words on, as ``vp.open_images`` takes them; the word is the label of
    other images. Or a local copy of SCAM, whose photographs have clean twins. By default images are
    drawn."""
    label_column: str | None = None
    """Column of the labels; by default ``label``, or the names of sub-folders."""
    template: str = "a photo of a {}."
    """Sentence about a label, for images that are not drawn."""
    published: tuple[str, ...] = ()
    """Local copies of RTA-100, PAINT, Disentangling or SCAM to report on, too."""
    kinds: tuple[str, ...] = ("shape", "colour")
    """What the words on drawn images name: ``shape``, ``colour``, or both."""
    train_pairs: int = 600
    """Pairs of images in which latents, directions and heads are found."""
    validation_pairs: int = 400
    """Pairs on which rule, size and layer are chosen."""
    test_pairs: int = 1000
    """Pairs that are reported on."""
    cap: float = 0.02
    """Largest loss of clean accuracy on validation."""
    latents: tuple[int | str, ...] = ()
    """Latents of ``--sae`` to suppress in place of those that rules find: by number, or as
    ``name:WORD`` for all whose name in ``names.json`` beside the SAE has that word."""
    sizes: tuple[int, ...] = (10, 20, 50, 100, 200)
    """Numbers of latents to try."""
    unseen_words: bool = True
    """Leave half of the words out, too, and report on them."""
    hook_name: str = "blocks.1.hook_resid_post"
    """Hook of the SAE that is trained."""
    training_images: int = 6000
    """Images that the SAE is trained on; labelled ones come again with other words."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.kinds or not set(self.kinds) <= {"shape", "colour"}:
            raise ValueError("--kinds must be shape, colour, or both")
        self.check_at_most(*PAIRS)
        self.check_at_least(LEAST, *PAIRS)


def compute_typographic(cfg: TypographicConfig) -> tuple[Any, Any]:
    """Return the result, and the SAE or where it lies."""
    from vision_plugin.formats import load_sae
    from vision_plugin.models import load_model
    from vision_plugin.tasks import (
        TypographicSettings,
        check_reads_text,
        read_published,
        typographic,
    )

    out = console()
    settings = TypographicSettings(
        sizes=cfg.sizes, cap=cfg.cap, unseen_words=cfg.unseen_words, seed=cfg.seed
    )
    model = load_model(cfg.model_name, device=cfg.device)
    check_reads_text(model)
    published = [
        one for path in cfg.published for one in read_published(model, path, template=cfg.template)
    ]
    few = [one for one in published if len(one.attack) < LEAST]
    if few:
        raise ValueError(
            f"{few[0].name} has {len(few[0].attack)} images, too few for an interval, which needs "
            f"{LEAST}: leave it out of --published"
        )
    given = None if cfg.sae is None else load_sae(cfg.sae, device=cfg.device)
    latents = given_latents(cfg.latents, [] if given is None else [given], (cfg.sae or "",))
    settings = replace(settings, latents=latents)
    out.print("Making pairs of images with and without a word")
    pairs, for_training = open_data(cfg, model)
    if given is None:
        images = for_training()
        out.print(f"Training an SAE at {cfg.hook_name} on {len(images)} images, half with a word")
        (sae,) = train_saes(
            cfg, model, [cfg.hook_name], images, model_name=cfg.model_name,
            images=cfg.images or "drawn images, half of them with a word",
        )  # fmt: skip
    else:
        sae = given
    result = typographic(
        model, sae, pairs, settings=settings, published=published, name=cfg.sae or "sae",
        announce=out.print,
    )  # fmt: skip
    for one in published:
        if one.without_clean:
            out.print(f"{one.name}: no figures on clean images, as {one.without_clean}")
    return result, sae if cfg.sae is None else str(local_path(cfg.sae).absolute())


def open_data(cfg: TypographicConfig, model: Any) -> tuple[list[Any], Callable[[], list[Any]]]:
    """Return the pairs of each kind, and what makes the images to train an SAE on.

    Raises:
        ValueError: the images have no labels, too few classes or no clean twins, or are too few.
    """
    from vision_plugin.demo import draw
    from vision_plugin.demo.attacks import typographic_data
    from vision_plugin.tasks import LabelledImages, is_published, read_published

    sizes = {"train": cfg.train_pairs, "validation": cfg.validation_pairs, "test": cfg.test_pairs}
    if cfg.images is None:
        named: tuple[Literal["shape", "colour"], ...] = ("shape", "colour")
        drawn = [
            typographic_data(model, kind, **sizes, seed=1000 + 10 * cfg.seed)
            for kind in named
            if kind in cfg.kinds
        ]
        return drawn, lambda: list(draw(cfg.training_images, seed=11 + cfg.seed, words=0.5).images)
    if is_published(cfg.images):
        if cfg.sae is None:
            raise ValueError(
                f"{cfg.images} is a published attack, too few images to train an SAE on: name one "
                "that has seen print with sae="
            )
        sets = read_published(model, cfg.images, template=cfg.template)
        return [one.data(**sizes, seed=cfg.seed) for one in sets], list
    labelled = LabelledImages(
        model, cfg.images, label_column=cfg.label_column, template=cfg.template,
        train=cfg.train_pairs, validation=cfg.validation_pairs, test=cfg.test_pairs, seed=cfg.seed,
    )  # fmt: skip
    return [labelled.data()], lambda: labelled.for_training(cfg.training_images)
