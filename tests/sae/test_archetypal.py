"""Archetypal decoders: rows in the hull of data points, trained through the points' mixing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sae_lens import SAE
from scipy.optimize import linprog

from tests.activations._stores import D_MODEL, tiny_model
from tests.activations.conftest import one_thread
from tests.sae._runs import Killed, config, images, kill, runner, stop_at, weights
from vision_plugin.images import open_images
from vision_plugin.sae import train_many
from vision_plugin.sae._archetypal import ArchetypalDecoder, archetypes

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "standard", "transcoder"])
def test_rows_are_combinations_of_so_many_points(architecture: str, tmp_path: Path) -> None:
    n_points = D_MODEL // 2
    near = config(
        tmp_path / "near", architecture, archetypal_points=n_points, archetypal_relaxation=0.0
    )
    runner(near).run()
    runner(config(tmp_path / "free", architecture)).run()
    assert int(torch.linalg.matrix_rank(decoder(tmp_path / "near"), rtol=1e-4)) == n_points
    assert int(torch.linalg.matrix_rank(decoder(tmp_path / "free"), rtol=1e-4)) == D_MODEL


def decoder(path: Path) -> torch.Tensor:
    W_dec: torch.Tensor = SAE.load_from_disk(str(path)).W_dec.detach().double()
    return W_dec


def test_rows_stay_in_the_hull_while_the_optimiser_moves_them() -> None:
    generator = torch.Generator().manual_seed(0)
    points = archetypes(torch.randn(60, 6, generator=generator), 20, seed=0)
    assert float(points.norm(dim=1).mean()) == pytest.approx(1.0, abs=1e-5)
    sae = torch.nn.Module()
    sae.W_dec = torch.nn.Parameter(torch.zeros(9, 6))
    held = ArchetypalDecoder(sae, bound=0.25)
    optimizer = torch.optim.Adam(held.parameters().values(), lr=0.05)
    held.attach(optimizer)
    held.place(points, norm=2.0)
    assert torch.allclose(sae.W_dec.detach(), 2.0 * points[:9], atol=1e-6)
    wanted = torch.randn(9, 6, generator=generator)
    for _ in range(30):
        optimizer.zero_grad()
        (sae.W_dec - wanted).square().sum().backward()
        optimizer.step()
    scale = float(held.scale.detach().exp())
    far = [distance_from_hull(row / scale, points) for row in sae.W_dec.detach()]
    assert max(far) <= 0.25 * 6**0.5 + 1e-5  # in the L1 norm
    assert max(far) > 0.01  # it was pulled outside, and held


def distance_from_hull(row: torch.Tensor, points: torch.Tensor) -> float:
    """L1 distance of a point from a hull, as a linear programme."""
    n, d = points.shape
    A_eq = torch.zeros(d + 1, n + 2 * d)
    A_eq[:d, :n], A_eq[:d, n : n + d], A_eq[:d, n + d :] = points.T, torch.eye(d), -torch.eye(d)
    A_eq[d, :n] = 1
    cost = torch.cat([torch.zeros(n), torch.ones(2 * d)])
    found = linprog(
        cost.double().numpy(),
        A_eq=A_eq.double().numpy(),
        b_eq=torch.cat([row, torch.ones(1)]).double().numpy(),
    )
    assert found.status == 0
    return float(found.fun)


def test_a_step_is_that_of_autograd_through_the_mixing() -> None:
    generator = torch.Generator().manual_seed(1)
    points = torch.rand(5, 4, generator=generator) + 0.5
    sae = torch.nn.Module()
    sae.W_dec = torch.nn.Parameter(torch.zeros(5, 4))
    held = ArchetypalDecoder(sae, bound=10.0)
    held.place(points, norm=1.5)
    with torch.no_grad():
        held.mixing.copy_(torch.rand(5, 5, generator=generator).softmax(1))
        held.relaxation.copy_(torch.randn(5, 4, generator=generator) * 0.1)
    held.write()
    mixing, relaxation, scale = (
        p.detach().double().requires_grad_() for p in held.parameters().values()
    )
    wanted = torch.randn(5, 4, generator=generator)
    free = scale.exp() * (mixing @ points.double() + relaxation)
    (free - wanted).square().sum().backward()
    optimizer = torch.optim.SGD(held.parameters().values(), lr=1e-4)
    held.attach(optimizer)
    before = [p.detach().clone() for p in held.parameters().values()]
    (sae.W_dec - wanted).square().sum().backward()
    optimizer.step()
    assert sae.W_dec.grad is None
    for parameter, old, free_one in zip(
        held.parameters().values(), before, (mixing, relaxation, scale), strict=True
    ):
        if parameter is held.mixing:
            continue  # brought back to rows that sum to 1
        assert free_one.grad is not None
        step = (parameter.detach() - old) / -1e-4
        assert torch.allclose(step.double(), free_one.grad, rtol=5e-2, atol=5e-2)
    moved = (mixing - 1e-4 * mixing.grad).relu()
    moved = moved / moved.sum(1, keepdim=True)
    assert torch.allclose(held.mixing.detach().double(), moved, atol=1e-6)


def test_a_killed_run_goes_on_to_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"archetypal_points": 20, "encoder_lr_ratio": 0.3}
    runner(config(tmp_path / "straight", n_checkpoints=0, **changes)).run()
    cfg = config(tmp_path / "killed", n_checkpoints=3, **changes)
    with monkeypatch.context() as patched:
        stop_at(patched, 15, kill)
        with pytest.raises(Killed):
            runner(cfg).run()
    runner(cfg).run()
    assert weights(tmp_path / "killed") == weights(tmp_path / "straight")


def test_more_points_than_activations_are_refused() -> None:
    with pytest.raises(ValueError, match=r"archetypal_points=1000 is more than the \d+ activ"):
        runner(config(None, archetypal_points=1000)).run()


def test_a_decoder_that_is_the_encoder_is_refused() -> None:
    with pytest.raises(ValueError, match="archetypal_points=8: a matching_pursuit SAE"):
        runner(config(None, "matching_pursuit", archetypal_points=8)).run()


@pytest.mark.slow
def test_runs_that_share_a_pass_may_differ_in_it(tmp_path: Path) -> None:
    cfgs = {
        "near": config(None, archetypal_points=20),
        "looser": config(None, archetypal_points=20, archetypal_relaxation=0.5),
        "free": config(None),
    }
    made = train_many(
        cfgs, model=tiny_model(), images=open_images(images()), output_path=str(tmp_path)
    )
    alone = {name: runner(cfg).run() for name, cfg in cfgs.items()}
    for name, sae in made.items():
        assert torch.allclose(sae.W_dec, alone[name].W_dec, atol=1e-6)
        for other in alone.keys() - {name}:
            assert not torch.allclose(sae.W_dec, alone[other].W_dec, atol=1e-3)
