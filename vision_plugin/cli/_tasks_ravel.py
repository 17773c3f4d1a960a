"""``vision-plugin tasks ravel``: swap one attribute of images, and leave the others."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from vision_plugin._paths import local_path
from vision_plugin.cli._console import console
from vision_plugin.cli._tasks_groups import train_drawn
from vision_plugin.cli._tasks_training import LEAST, TrainsSAE, given_latents

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, kw_only=True)
class RavelConfig(TrainsSAE):
    """A model, SAEs, and images whose attributes are known."""

    model_name: str = "demo"
    """Model, as ``vp.load_model`` takes it, with or without a text tower."""
    sae: tuple[str, ...] = ()
    """Folders of SAEs, or any checkpoints that ``vp.load_sae`` reads; validation chooses among
    several. By default one is trained behind each of ``--layers`` on drawn images."""
    images: str | None = None
    """Images with a column for each attribute, as ``vp.open_images`` takes them: such as a Parquet
    file, with ``--factors group subgroup``. By default images are drawn."""
    factors: tuple[str, ...] = ()
    """Columns of the attributes. Of drawn images shape, colour, texture and background by default;
    position and size with probes."""
    templates: tuple[str, ...] = ()
    """Sentence about a value of each attribute, with ``{}`` for it, to read images of yours
    zero-shot. By default a linear probe is fitted for each attribute on images of their own."""
    least: int = 30
    """Fewest images of yours with a value; rarer values are left out."""
    probes: bool = False
    """Read drawn images by linear probes on the final embedding, and not zero-shot; a model without
    a text tower is always read by probes."""
    readers: int = 600
    """Images that probes are fitted on."""
    train: int = 400
    """Images in which latents, directions and rotations are found."""
    validation: int = 200
    """Images on which rules, sizes and layers are chosen."""
    test: int = 500
    """Images that are reported on."""
    tokens: str = "cls"
    """Kind of token whose values are swapped, and on which SAEs are trained."""
    latents: tuple[int | str, ...] = ()
    """Latents of ``--sae`` to swap in place of those that rules find: by number, or as
    ``name:WORD`` for all whose name in ``names.json`` beside the SAE has that word."""
    sizes: tuple[int, ...] = (1, 2, 5, 10, 20, 50, 100)
    """Numbers of latents, neurons and principal components to try."""
    ranks: tuple[int, ...] = (4, 8, 16)
    """Numbers of directions to try, for subspaces and learned rotations."""
    steps: int = 100
    """Steps that a rotation is trained for."""
    layers: tuple[int, ...] = (2, 3)
    """Blocks behind which SAEs are trained."""
    training_images: int = 6000
    """Images that the SAEs are trained on."""
    training_tokens: int = 400_000
    """Activations that the SAEs are trained on, with repetition."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_at_most("readers", *SPLITS)
        self.check_at_least(LEAST, *SPLITS)
        if not self.sae and not self.layers:
            raise ValueError("--layers is empty: name the blocks to train SAEs behind, or --sae")
        if self.images is not None and not self.factors:
            raise ValueError(
                "--images needs --factors: name the columns of the attributes, two or more"
            )
        if self.images is not None and not self.sae:
            raise ValueError(
                "--images needs --sae: the SAEs that are trained here see drawn images alone"
            )
        if self.templates and len(self.templates) != len(self.factors):
            raise ValueError(
                f"--templates has {len(self.templates)} sentences for {len(self.factors)} factors: "
                "give one for each, in the same order"
            )


def compute_ravel(cfg: RavelConfig) -> tuple[Any, Any]:
    """Return the result, and the SAE of its swaps or where that lies."""
    from vision_plugin.formats import load_sae
    from vision_plugin.models import load_model
    from vision_plugin.tasks import RavelSettings, ravel

    out = console()
    settings = RavelSettings(
        sizes=cfg.sizes, ranks=cfg.ranks, steps=cfg.steps, tokens=cfg.tokens, seed=cfg.seed
    )
    model = load_model(cfg.model_name, device=cfg.device)
    places = [str(local_path(place).absolute()) for place in cfg.sae]
    given = [load_sae(place, device=cfg.device) for place in cfg.sae]
    settings = replace(settings, latents=given_latents(cfg.latents, given, cfg.sae))
    out.print("Reading images" if cfg.images else "Drawing images")
    data = _images(cfg, model)
    if given:
        saes, names = given, ", ".join(cfg.sae)
    else:
        hooks = [f"blocks.{layer}.hook_resid_post" for layer in cfg.layers]
        out.print(f"Training SAEs at {', '.join(hooks)} on {cfg.training_images} drawn images")
        saes = train_drawn(cfg, model, hooks, tokens=cfg.tokens)
        names = ", ".join(hooks)
    result = ravel(model, saes, data, settings=settings, name=names, announce=out.print)
    used = result.edit.dictionaries or saes[:1]
    return result, dict(zip(places, given, strict=True)) if given else used


def _images(cfg: RavelConfig, model: Any) -> Any:
    sizes = {name: getattr(cfg, name) for name in SPLITS}
    if cfg.images is None:
        from vision_plugin.demo.attributes import NAMED, factor_data

        by_probes = cfg.probes or not model.adapter.has_joint_space
        return factor_data(
            model, factors=cfg.factors or NAMED, **sizes, readers=cfg.readers if by_probes else 0,
            seed=3000 + 10 * cfg.seed,
        )  # fmt: skip
    from vision_plugin.tasks import read_factors

    prompts = dict(zip(cfg.factors, cfg.templates, strict=True)) if cfg.templates else None
    return read_factors(
        model, cfg.images, cfg.factors, prompts=prompts, least=cfg.least, readers=cfg.readers,
        **sizes, seed=cfg.seed,
    )  # fmt: skip
