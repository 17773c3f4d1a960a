"""The features of ``dinov2.py`` that stand out, as strips of pictures with heat maps."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional

from benchmarks._dinov2_score import LEAST_PICTURES, N_TOP, Held, Read
from vision_plugin import metrics

N_SHOWN, N_PICTURES = 6, 8
SIDE, GAP, TEXT = 96, 4, 18
"""Pixels: of a picture, between pictures, and of the line above a strip."""
OUTSIDE = ("emoji CLIP", "folders")
"""Judges that choose; the model's own embedding has no say."""
HEAT = (230, 40, 30)
MOST = 0.2
"""A latent that fires on more than this share of the pictures is not shown."""


def standing_out(one: Read, held: Held) -> list[dict[str, Any]]:
    """Return the latents furthest above chance by both outside judges, and some from the middle.

    Latents are ranked by the smaller of their two distances from chance, in standard deviations
    under shuffling (``z``). One whose top pictures are mostly those of a chosen one is passed over.
    """
    judged = one.monosemanticity(held)
    results = {judge: judged["patches", judge] for judge in OUTSIDE}
    z = torch.stack([result.z for result in results.values()]).amin(0)
    n_active = results[OUTSIDE[0]].n_active
    fits = (n_active >= max(LEAST_PICTURES, N_TOP)) & (n_active <= MOST * len(held.folders))
    ranked = [k for k in z.argsort(descending=True).tolist() if fits[k] and not z[k].isnan()]
    top = metrics.top_images(one.latents["patches"], n_top=N_TOP).images
    best: list[int] = []
    for latent in ranked:
        own = set(top[latent].tolist())
        if all(len(own & set(top[other].tolist())) < N_TOP // 4 for other in best):
            best.append(latent)
        if len(best) == N_SHOWN:
            break
    middle = ranked[len(ranked) // 2 - N_SHOWN // 4 :][: N_SHOWN // 2]
    rows = []
    for place, latents in (("stands out", best), ("middle", middle)):
        for latent in latents:
            pictures = top[latent].tolist()
            folder, count = Counter(held.folders[i] for i in pictures).most_common(1)[0]
            rows.append(
                {
                    "latent": latent,
                    "place": place,
                    "pictures": pictures,
                    "folder": folder,
                    "n_of_folder": count,
                    "n_active": int(n_active[latent]),
                    "score": {judge: float(r.score[latent]) for judge, r in results.items()},
                    "z": {judge: float(r.z[latent]) for judge, r in results.items()},
                }
            )
    return rows


@torch.no_grad()
def draw(
    rows: list[dict[str, Any]],
    sae: Any,
    activations: Tensor,
    pictures: datasets.Dataset,
    file: Path,
) -> None:
    """Write a strip for each row: its top pictures, red where the latent fires.

    Args:
        rows: As :func:`standing_out` returns them.
        sae: The SAE.
        activations: All tokens of each picture, ``[n, tokens, d_in]``, class token first.
        pictures: The pictures, in that order.
        file: A webp.
    """
    height = SIDE + TEXT + 2 * GAP
    sheet = Image.new("RGB", (N_PICTURES * (SIDE + GAP) + GAP, len(rows) * height), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for row, found in enumerate(rows):
        chosen, latent = found["pictures"][:N_PICTURES], found["latent"]
        heat = sae.encode(activations[chosen][:, 1:].float())[..., latent]
        heat = heat / heat.amax().clamp(min=1e-9)
        side = round(heat.shape[1] ** 0.5)
        text = (
            f"{latent} ({found['place']}): {found['n_of_folder']} of {N_TOP} in "
            f"{found['folder']}; fires on {found['n_active']} pictures"
        )
        pen.text((GAP, row * height), text, fill="black", font=font)
        for column, (number, of_patches) in enumerate(zip(chosen, heat, strict=True)):
            picture = pictures[number]["image"].convert("RGB").resize((SIDE, SIDE))
            place = (GAP + column * (SIDE + GAP), row * height + TEXT)
            sheet.paste(_heated(picture, of_patches.view(side, side)), place)
            corner = (place[0] + SIDE - 1, place[1] + SIDE - 1)
            pen.rectangle((place, corner), outline=(200, 200, 200))
    sheet.save(file, quality=72, method=6)


def _heated(picture: Image.Image, heat: Tensor) -> Image.Image:
    """Return a picture with red laid over the patches, the denser the stronger the latent is."""
    smooth = functional.interpolate(heat[None, None], (SIDE, SIDE), mode="bilinear")[0, 0]
    mask = Image.fromarray((160 * smooth.clamp(0, 1)).byte().numpy(), mode="L")
    return Image.composite(Image.new("RGB", picture.size, HEAT), picture, mask)
