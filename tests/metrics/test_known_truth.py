"""What is known of the drawn world, the metrics find: factors, taxonomy, planted directions.

Two factors are mixed in ten steps, from latents that stand for one value each to latents that
cannot tell the two apart; every metric that claims to reward single meanings has to fall.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import vision_plugin as vp
from vision_plugin import metrics
from vision_plugin.demo import concept_vocabulary, draw, factor_codes
from vision_plugin.images import open_images

STEPS = torch.linspace(0, 0.5, 11).tolist()
N_DRAWN = 60


def codes(scenes: object, factor: str, n_values: int) -> Tensor:
    """The first values of a factor, one-hot."""
    return torch.as_tensor(factor_codes(scenes, factor)[0], dtype=torch.float64)[:, :n_values]


def factors(scenes: object, n_values: int) -> tuple[Tensor, Tensor]:
    """Latents for values of two factors, of random strength, and each one's partner to mix with."""
    generator = torch.Generator().manual_seed(0)
    own = torch.cat([codes(scenes, name, n_values) for name in ("shape", "colour")], 1)
    own = own * (0.5 + 0.5 * torch.rand(own.shape, generator=generator, dtype=torch.float64))
    return own, own.roll(n_values, dims=1)


@pytest.fixture(scope="module")
def world() -> SimpleNamespace:
    drawn = draw(900, seed=11)
    own, partner = factors(drawn.scenes, 8)
    embeddings = torch.cat([codes(drawn.scenes, name, 9) for name in ("shape", "colour")], 1)
    return SimpleNamespace(
        drawn=drawn,
        embeddings=embeddings,
        mixtures=[(1 - share) * own + share * partner for share in STEPS],
    )


def falls(scores: list[float]) -> bool:
    return all(later < earlier for earlier, later in pairwise(scores))


def test_monosemanticity_falls_as_two_factors_are_mixed(world: SimpleNamespace) -> None:
    scores = [
        metrics.monosemanticity(mixture, world.embeddings).summary()["mean_score"]
        for mixture in world.mixtures
    ]
    assert falls(scores), scores
    assert scores[0] > 0.5


def test_top_images_are_shared_more_and_more_as_two_factors_are_mixed(
    world: SimpleNamespace,
) -> None:
    tops = [metrics.top_images(mixture).images for mixture in world.mixtures]
    results = [metrics.uniqueness(top) for top in tops]
    assert falls([1 - result.mean_jaccard for result in results]), results
    assert results[0].share_above[5] == 0
    assert results[-1].share_above[9] == pytest.approx(8 / results[-1].n_pairs)


@pytest.mark.slow
def test_a_probe_on_one_latent_loses_its_class_as_two_factors_are_mixed() -> None:
    scenes = draw(8000, seed=12).scenes
    shapes, colours = (codes(scenes, name, 2).sum(1) > 0 for name in ("shape", "colour"))
    kept = [scene for scene, keep in zip(scenes, shapes & colours, strict=True) if keep]
    own, partner = factors(kept, 2)
    scores = []
    for share in STEPS:
        metric = metrics.SparseProbing(n_features=4, k_values=(1,), test_size=0.5)
        metric.update((1 - share) * own + share * partner, codes(kept, "shape", 1)[:, 0].long())
        scores.append(metric.compute().auc)
    assert scores[0] == 1
    assert scores[-1] < 0.85
    # While a threshold still tells the two apart nothing is lost; after that, every step costs.
    assert all(later <= earlier for earlier, later in pairwise(scores)), scores
    assert falls([score for score in scores if score < 1]), scores


def test_heat_maps_leave_their_masks_as_two_factors_are_mixed(world: SimpleNamespace) -> None:
    masks = torch.stack([torch.as_tensor(world.drawn.masks[i]) for i in range(N_DRAWN)])
    generator = torch.Generator().manual_seed(1)
    shown = torch.cat([codes(world.drawn.scenes, n, 8) for n in ("shape", "colour")], 1)[:N_DRAWN]
    of_concept = masks[:, None] & shown.bool()[:, :, None, None]
    touched = torch.nn.functional.max_pool2d(masks[:, None].float(), 16).flatten(1)
    strength = shown * torch.rand(shown.shape, generator=generator)
    ious = []
    for share in STEPS:
        mixture = (1 - share) * strength + share * strength.roll(8, dims=1)
        maps = touched[:, :, None] * mixture[:, None].float()
        result = metrics.dissection(maps, of_concept, grid_size=(8, 8), threshold=0.25)
        ious.append(float(result.iou.diagonal().nanmean()))
    assert all(later <= earlier for earlier, later in pairwise(ious)), ious
    assert falls(ious[::2]), ious
    assert ious[-1] < 0.7 * ious[0]


def test_a_planted_matryoshka_recovers_the_levels_of_the_worlds_taxonomy() -> None:
    """Groups of latents for groups of shapes, for shapes, and for shapes of one colour."""
    paths = draw(6000, seed=13).taxonomy_paths
    levels = []
    for depth in (1, 2, 3):
        nodes = {node: index for index, node in enumerate(sorted({p[:depth] for p in paths}))}
        of_image = torch.tensor([nodes[path[:depth]] for path in paths])
        levels.append(torch.nn.functional.one_hot(of_image, len(nodes)))
    widths = list(accumulate(level.shape[1] for level in levels))
    generator = torch.Generator().manual_seed(0)
    latents = torch.cat(levels, 1) * torch.rand(len(paths), widths[-1], generator=generator)
    metric = metrics.Hierarchy(
        n_features=widths[-1], taxonomy_paths=paths, groups=metrics.matryoshka_groups(widths)
    )
    for part in torch.split(latents, 1000):
        metric.update(part.to_sparse_csr())
    result = metric.compute()
    assert result.n_left_out == 0
    for group, depth in result.group_depth.items():
        assert group + 1 <= depth < group + 1.5
    shuffled = metrics.hierarchy(
        torch.randint(len(paths), (84, 16), generator=generator), paths
    ).summary()
    assert shuffled["mean_depth"] == pytest.approx(result.chance_depth, abs=0.05)
    common, rare = result.frequency_depth[-1], result.frequency_depth[-2]
    assert common < 2.5 < rare


def test_steerability_finds_the_planted_directions_and_no_others() -> None:
    """Beside directions that make the drawn world's CLIP say a concept, as long ones it cannot see.

    Its answer depends on the last block's CLS token through a centred linear map (LayerNorm and
    projection), so a concept's direction is that map's pseudo-inverse, and what the map sends to
    zero must not count whatever its length.
    """
    model = vp.load_model("demo")
    concepts = [concept.text for concept in concept_vocabulary()]
    texts = model.encode_text(concepts)
    head = model.native.visual_projection.weight * model.native.vision_model.post_layernorm.weight
    seen = head.detach().double() - head.detach().double().mean(1, keepdim=True)
    wanted = [0, 3, 20, 40, 60, 100, 120]
    planted = torch.linalg.pinv(seen) @ texts[wanted].double().T
    unseen = torch.linalg.svd(seen).Vh[len(seen) :][:20]
    directions = torch.cat([torch.nn.functional.normalize(planted.T, dim=1), unseen])
    order = torch.randperm(27, generator=torch.Generator().manual_seed(0))
    dictionary = metrics.ControlDictionary(
        "planted", directions[order].float(), hook_name="blocks.3.hook_resid_post"
    )
    pixels = model.preprocess(list(open_images("demo:12@5")))
    for adaptive in (False, True):
        result = metrics.steerability(
            model, dictionary, pixels, texts, concepts=concepts, adaptive=adaptive
        )
        assert torch.equal(result.steerable, order < 7)
        for latent, which in enumerate(order.tolist()):
            if which < 7:
                assert result.top_names[latent] == concepts[wanted[which]]
        assert result.coverage == 7
        assert float(result.score[order >= 7].max()) < 1e-4
