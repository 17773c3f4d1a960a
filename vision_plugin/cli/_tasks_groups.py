"""``vision-plugin tasks background`` and ``attribute``: worst groups, and what mends them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from vision_plugin._extras import require_sklearn
from vision_plugin._paths import local_path
from vision_plugin.cli._console import console
from vision_plugin.cli._tasks_training import LEAST, TrainsSAE, given_latents, train_saes


@dataclass(frozen=True, kw_only=True)
class GroupConfig(TrainsSAE):
    """A model, SAEs, and images in groups: drawn ones, or a published data set's."""

    model_name: str = "demo"
    """Model, as ``vp.load_model`` takes it, with or without a text tower."""
    sae: tuple[str, ...] = ()
    """Folders of SAEs, or any checkpoints that ``vp.load_sae`` reads; validation chooses among
    several. By default one is trained at each of ``--layers`` on drawn images."""
    images: str | None = None
    """Folder of a local copy in its published layout: Waterbirds (``metadata.csv``) for the
    background, CelebA (``list_attr_celeba``) for the attribute. By default images are drawn."""
    label: str = "Blond_Hair"
    """CelebA's attribute that the probe is asked."""
    nuisance: str = "Male"
    """CelebA's attribute that goes along with it."""
    most: int = 2000
    """Most images of a split of a local copy, drawn at random; a validation or test split has as
    many of each group."""
    usual: int = 300
    """Drawn training images of each class with the nuisance that goes along with it."""
    unusual: int | None = None
    """Drawn training images of each class with the other nuisance: the fewer, the stronger the
    confound. By default 16 for the background and 8 for the attribute."""
    validation: int = 80
    """Drawn validation images of each group."""
    test: int = 250
    """Drawn test images of each group."""
    cap: float = 0.02
    """Largest loss of average accuracy on validation."""
    latents: tuple[int | str, ...] = ()
    """Latents of ``--sae`` to suppress in place of those that rules find: by number, or as
    ``name:WORD`` for all whose name in ``names.json`` beside the SAE has that word."""
    sizes: tuple[int, ...] = (2, 5, 10, 20, 50)
    """Numbers of latents to try."""
    rules: tuple[str, ...] = ("difference", "auroc", "attribution")
    """Rules that find latents; ``net_attribution`` is another one."""
    layers: tuple[int, ...] = (0, 1)
    """Blocks behind which SAEs are trained."""
    training_images: int = 2000
    """Images that the SAEs are trained on."""
    training_tokens: int = 400_000
    """Activations that the SAEs are trained on, with repetition."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_at_most("most", "usual", "unusual", "validation", "test")
        for name, least in (("usual", 1), ("unusual", 1), ("validation", 1), ("test", LEAST)):
            given = getattr(self, name)
            if given is not None and given < least:
                why = "too few for an interval" if name == "test" else "too few for a group"
                raise ValueError(f"--{name} {given} is {why}: at least {least}")
        if not self.sae and not self.layers:
            raise ValueError("--layers is empty: name the blocks to train SAEs behind, or --sae")


def compute_groups(cfg: GroupConfig, *, task: str) -> tuple[Any, Any]:
    """Return the result, and the SAE of its edit or where that lies."""
    from vision_plugin.formats import load_sae
    from vision_plugin.models import load_model
    from vision_plugin.tasks import GroupSettings, attribute, background

    require_sklearn("probes on image embeddings")
    out = console()
    settings = GroupSettings(sizes=cfg.sizes, rules=cfg.rules, cap=cfg.cap, seed=cfg.seed)
    model = load_model(cfg.model_name, device=cfg.device)
    places = [str(local_path(place).absolute()) for place in cfg.sae]
    given = [load_sae(place, device=cfg.device) for place in cfg.sae]
    settings = replace(settings, latents=given_latents(cfg.latents, given, cfg.sae))
    data = _images(cfg, task, model)
    if given:
        saes, names = given, ", ".join(cfg.sae)
    else:
        hooks = [f"blocks.{layer}.hook_resid_post" for layer in cfg.layers]
        out.print(f"Training SAEs at {', '.join(hooks)} on {cfg.training_images} drawn images")
        saes, names = train_drawn(cfg, model, hooks), ", ".join(hooks)
    repair = background if task == "background" else attribute
    result = repair(model, saes, data, settings=settings, name=names, announce=out.print)
    used = result.edit.dictionaries or saes[:1]
    return result, dict(zip(places, given, strict=True)) if given else used


def _images(cfg: GroupConfig, task: str, model: Any) -> Any:
    if cfg.images is None:
        from vision_plugin.demo.groups import group_data

        console().print("Drawing images in four groups")
        return group_data(
            model, task, usual=cfg.usual, unusual=cfg.unusual, validation=cfg.validation,
            test=cfg.test, seed=2000 + 10 * cfg.seed,
        )  # fmt: skip
    from vision_plugin.tasks import read_celeba, read_waterbirds

    if task == "background":
        return read_waterbirds(model, cfg.images, most=cfg.most, seed=cfg.seed)
    return read_celeba(
        model, cfg.images, label=cfg.label, nuisance=cfg.nuisance, most=cfg.most, seed=cfg.seed
    )


def train_drawn(cfg: Any, model: Any, hook_names: list[str], *, tokens: str = "all") -> list[Any]:
    """Return an SAE at each hook, all trained on drawn images."""
    from vision_plugin.demo import draw

    drawn = draw(cfg.training_images, seed=11 + cfg.seed).images
    return train_saes(
        cfg, model, hook_names, drawn, model_name=cfg.model_name, images="drawn images",
        tokens=tokens,
    )  # fmt: skip
