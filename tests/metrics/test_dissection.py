"""Heat maps against masks, and Moran's I of single maps."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from vision_plugin import metrics


def loop(latents, masks, grid, threshold):
    n, _, k = latents.shape
    c, height, width = masks.shape[1:]
    cell = (height // grid[0], width // grid[1])
    iou, pointing = np.full((k, c), np.nan), np.full((k, c), np.nan)
    for j in range(k):
        for concept in range(c):
            inter = union = hits = trials = 0
            for i in range(n):
                small = latents[i, :, j].reshape(grid)
                large = np.kron(small, np.ones(cell)) > threshold
                mask = masks[i, concept]
                inter += int((large & mask).sum())
                union += int((large | mask).sum())
                if mask.any() and small.max() > threshold:
                    row, column = np.unravel_index(small.argmax(), grid)
                    block = mask[
                        row * cell[0] : (row + 1) * cell[0],
                        column * cell[1] : (column + 1) * cell[1],
                    ]
                    trials += 1
                    hits += bool(block.any())
            iou[j, concept] = inter / union if union else math.nan
            pointing[j, concept] = hits / trials if trials else math.nan
    return iou, pointing


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), threshold=st.sampled_from([0.0, 0.5]))
def test_iou_and_pointing_are_the_loop_over_pixels(seed, threshold):
    rng = np.random.default_rng(seed)
    latents = (rng.random((4, 6, 3)) * (rng.random((4, 6, 3)) < 0.4)).astype(np.float32)
    masks = rng.random((4, 2, 6, 6)) < 0.2
    masks[:, 1] &= rng.random((4, 1, 1)) < 0.5
    metric = metrics.Dissection(n_features=3, n_concepts=2, grid_size=(2, 3), threshold=threshold)
    for i in range(0, 4, 3):
        metric.update(torch.from_numpy(latents[i : i + 3]), torch.from_numpy(masks[i : i + 3]))
    result = metric.compute()
    iou, pointing = loop(latents, masks, (2, 3), threshold)
    np.testing.assert_allclose(result.iou.numpy(), iou, atol=1e-12)
    np.testing.assert_allclose(result.pointing.numpy(), pointing, atol=1e-12)


def test_a_latent_that_draws_its_mask_is_found():
    masks = torch.zeros(5, 3, 8, 8, dtype=torch.bool)
    masks[:, 0, :4, :4] = True
    masks[:, 1, 4:, 4:] = True
    masks[:, 2, :, :2] = True
    maps = torch.nn.functional.avg_pool2d(masks.float(), 2).flatten(2).transpose(1, 2)
    maps = torch.cat([maps, torch.zeros(5, 16, 1)], dim=2)
    for upsample in ("nearest", "bilinear"):
        result = metrics.dissection(
            maps, masks, grid_size=(4, 4), threshold=0.49, upsample=upsample
        )
        assert result.best_concept.tolist() == [0, 1, 2, -1]
        assert float(result.best_iou[:3].min()) > 0.7
        assert result.pointing.diagonal().tolist() == [1, 1, 1]
    nearest = metrics.dissection(maps, masks, grid_size=(4, 4))
    assert nearest.best_iou[:3].tolist() == [1, 1, 1]
    assert nearest.chance.tolist() == [0.25, 0.25, 0.25]
    summary = nearest.summary()
    assert (summary["n_concepts_found"], summary["n_never_active"]) == (3, 1)


def test_quantile_thresholds_leave_the_share_above():
    latents = torch.rand(10, 100, 3)
    threshold = metrics.quantile_thresholds(latents, share=0.05)
    assert (latents > threshold).sum((0, 1)).tolist() == [50, 50, 50]


def test_masks_that_do_not_fit_are_refused():
    metric = metrics.Dissection(n_features=3, n_concepts=2, grid_size=(2, 2))
    masks = torch.zeros(4, 2, 4, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"expected \(4, 4, 3\)"):
        metric.update(torch.rand(4, 9, 3), masks)
    with pytest.raises(ValueError, match="multiple of 2"):
        metric.update(torch.rand(4, 4, 3), masks[:, :, :3])
    with pytest.raises(ValueError, match="threshold= has shape"):
        metrics.Dissection(n_features=3, n_concepts=2, grid_size=(2, 2), threshold=torch.zeros(2))


def loop_moran(grid):
    height, width = grid.shape
    c = grid - grid.mean()
    together = weight = 0.0
    for r in range(height):
        for q in range(width):
            for dr in (-1, 0, 1):
                for dq in (-1, 0, 1):
                    inside = 0 <= r + dr < height and 0 <= q + dq < width
                    if (dr or dq) and inside:
                        together += c[r, q] * c[r + dr, q + dq]
                        weight += 1
    return grid.size / weight * together / (c**2).sum()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), height=st.integers(1, 6), width=st.integers(2, 6))
def test_morans_i_is_the_loop_over_neighbours(seed, height, width):
    maps = np.random.default_rng(seed).random((3, height, width))
    score, varies = metrics.morans_i(torch.from_numpy(maps))
    assert bool(varies.all())
    np.testing.assert_allclose(score.numpy(), [loop_moran(m) for m in maps], atol=1e-10)


def test_blobs_are_localized_and_checkerboards_are_not():
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    blob = torch.exp(-((rows - 3) ** 2 + (columns - 4) ** 2) / 8) * (rows < 7)
    board = ((rows + columns) % 2 == 0).float()
    flat = torch.ones(8, 8) * (rows < 4)
    few = torch.zeros(8, 8)
    few[0, :3] = 1
    latents = torch.stack([blob, board, flat, few], -1).reshape(1, 64, 4).repeat(3, 1, 1)
    metric = metrics.Localization(n_features=4, grid_size=(8, 8), min_images=2)
    metric.update(latents)
    result = metric.compute()
    assert float(result.score[0]) > 0.7
    assert float(result.score[1]) < 0
    assert result.score[3].isnan()
    assert result.n_valid.tolist() == [3, 3, 3, 0]
    assert result.summary()["n_never_valid"] == 1


def test_localization_wants_patches_alone():
    metric = metrics.Localization(n_features=4, grid_size=(8, 8))
    with pytest.raises(ValueError, match="leave out CLS"):
        metric.update(torch.rand(2, 65, 4))
    with pytest.raises(ValueError, match="not whole images"):
        metric.update(torch.rand(65, 4))
