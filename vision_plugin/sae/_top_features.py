"""Log the most monosemantic features, with their top images, as a table in wandb."""

from __future__ import annotations

from vision_plugin import metrics
from vision_plugin.sae._validation import Validator
from vision_plugin.sae._wandb import WandbRun

N_FEATURES, N_IMAGES, IMAGE_SIZE = 20, 8, 96
TABLE = "validation/top_features"


def log_top_features(run: WandbRun, validator: Validator, *, prefix: str = "") -> None:
    """Log the latents with the highest monosemanticity at the last validation.

    Latents that fire on fewer than ten images come last. Without wandb the function does nothing.

    Args:
        run: Run to log to.
        validator: Scorer of held-out images that has been called at least once.
        prefix: Prefix of the table's name.
    """
    latents = validator.latents
    if not run.cfg.log_to_wandb or latents is None:
        return
    import wandb

    held = validator.held_out
    scores = metrics.monosemanticity(latents, held.embeddings)
    counts = scores.n_active
    order = (scores.score.nan_to_num(-1) + 2.0 * (counts >= 10)).argsort(descending=True)
    top = metrics.top_images(latents, n_top=N_IMAGES)
    images = [f"image {place + 1}" for place in range(N_IMAGES)]
    table = wandb.Table(columns=["latent", "monosemanticity", "fires on", *images])
    for latent in order[:N_FEATURES].tolist():
        if int(counts[latent]) == 0:
            continue
        shown = [
            _image(validator, held.indices[image], value)
            for image, value in zip(
                top.images[latent].tolist(), top.values[latent].tolist(), strict=True
            )
            if image >= 0
        ]
        shown += [None] * (N_IMAGES - len(shown))
        table.add_data(latent, float(scores.score[latent]), int(counts[latent]), *shown)
    run.log({f"{prefix}{TABLE}": table}, step=None)


def _image(validator: Validator, index: int, activation: float) -> object:
    import wandb

    image = validator.images[index].copy()
    image.thumbnail((IMAGE_SIZE, IMAGE_SIZE))
    return wandb.Image(image, caption=f"{validator.images.ids[index]}: {activation:.2f}")
