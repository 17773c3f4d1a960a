"""The sparsity study: its numbers, its maps, its folder, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vision_plugin as vp
from tests.metrics._steerability_reference import standard_sae, topk_sae
from vision_plugin.cli import main
from vision_plugin.evaluation import (
    FILES,
    SAEStudy,
    SparsityStudyConfig,
    figure_of,
    labels_of,
    sparsity_study,
    table_of,
    text_of,
)
from vision_plugin.images import open_images

HOOKS = ("blocks.2.hook_resid_post", "blocks.0.mlp.hook_post")
WIDTHS = (32, 64)
K, D_SAE, N = 2, 40, 14
SHIFT = 0.5
ROWS = {"cls": slice(0, 1), "patch": slice(1, 17), "all": slice(0, 17)}


@pytest.fixture(scope="module")
def world(tiny_clip: str, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("saes")
    saes = {}
    for seed, (hook, width) in enumerate(zip(HOOKS, WIDTHS, strict=True)):
        sae = topk_sae(hook, width, d_sae=D_SAE, seed=seed)
        sae.cfg.metadata.model_name = tiny_clip
        with torch.no_grad():  # some of the activation is explained
            sae.W_enc.copy_(sae.W_dec.T / sae.W_dec.square().sum(1))
            sae.b_enc.mul_(0.1).sub_(seed * SHIFT)  # of the second, fewer than k are positive
            sae.b_dec.mul_(0.1)
        sae.save_model(str(folder / f"sae{seed}"))
        saes[str(folder / f"sae{seed}")] = sae
    return SimpleNamespace(
        clip=tiny_clip,
        model=vp.load_model(tiny_clip),
        saes=saes,
        images=open_images(f"demo:{N}@3"),
    )


def study(world: SimpleNamespace, saes: dict[str, Any] | None = None, **changes: Any) -> Any:
    saes = saes or world.saes
    changes = {"output_path": None, **changes}
    cfg = SparsityStudyConfig(saes=tuple(saes), images=f"demo:{N}@3", **changes)
    return sparsity_study(cfg, model=world.model, saes=saes, images=world.images)


@pytest.fixture(scope="module")
def result(world: SimpleNamespace) -> Any:
    return study(world, batch_size=4)


@pytest.fixture(scope="module")
def cached(world: SimpleNamespace) -> dict[str, np.ndarray]:
    """Activations of all images by hook, from the bridge, in float64."""
    pixels = world.model.preprocess([world.images[i] for i in range(N)])
    _, cache = world.model.run_with_cache(pixels)
    return {hook: cache[hook].detach().double().numpy() for hook in HOOKS}


def topk_by_hand(sae: Any, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Latents and reconstruction of one token."""
    W_enc, W_dec, b_enc, b_dec = (
        getattr(sae, name).detach().double().numpy()
        for name in ("W_enc", "W_dec", "b_enc", "b_dec")
    )
    norms = (
        np.linalg.norm(W_dec, axis=1) if sae.cfg.rescale_acts_by_decoder_norm else np.ones(D_SAE)
    )
    before = ((x - b_dec * sae.cfg.apply_b_dec_to_input) @ W_enc + b_enc) * norms
    latents = np.zeros(D_SAE)
    for latent in np.argsort(before)[-K:]:
        latents[latent] = max(before[latent], 0.0)
    return latents, (latents / norms) @ W_dec + b_dec


def reference(sae: Any, x: np.ndarray) -> dict[str, Any]:
    """The study's numbers for tokens ``[images, tokens, d]``, a token at a time."""
    fired = np.zeros((*x.shape[:2], D_SAE), dtype=bool)
    error, cosines = 0.0, []
    for image, token in np.ndindex(*x.shape[:2]):
        latents, decoded = topk_by_hand(sae, x[image, token])
        fired[image, token] = latents != 0
        error += float(((x[image, token] - decoded) ** 2).sum())
        lengths = np.linalg.norm(x[image, token]) * np.linalg.norm(decoded)
        cosines.append(float(x[image, token] @ decoded / lengths))
    flat = x.reshape(-1, x.shape[-1])
    frequency = fired.mean((0, 1))
    return {
        "l0": fired.sum(2).mean(),
        "l0_by_place": fired.sum(2).mean(0),
        "explained_variance": 1 - error / float(((flat - flat.mean(0)) ** 2).sum()),
        "cosine": float(np.mean(cosines)),
        "n_dead": int((frequency == 0).sum()),
        "n_dense": int((frequency > 0.1).sum()),
    }


def test_saes_come_in_the_order_of_their_layers(result: Any) -> None:
    assert [one.hook_name for one in result.saes] == [HOOKS[1], HOOKS[0]]
    assert [one.layer for one in result.saes] == [0, 2]


def test_the_numbers_are_those_of_a_loop_over_the_cache(
    world: SimpleNamespace, result: Any, cached: dict[str, np.ndarray]
) -> None:
    for one in result.saes:
        assert list(one.kinds) == ["cls", "patch", "all"]
        for kind, found in one.kinds.items():
            expected = reference(world.saes[one.sae], cached[one.hook_name][:, ROWS[kind]])
            assert found.sparsity.n_tokens == N * len(range(17)[ROWS[kind]])
            for name in ("l0", "n_dead", "n_dense"):
                assert getattr(found.sparsity, name) == expected[name], (one.hook_name, kind, name)
            for name in ("explained_variance", "cosine"):
                value = getattr(found.fidelity, name)
                assert value == pytest.approx(expected[name], rel=1e-4), (kind, name)
            if kind == "patch":
                expected_map = expected["l0_by_place"].reshape(4, 4)
                np.testing.assert_allclose(one.patch_map.numpy(), expected_map, rtol=1e-12)


def test_a_topk_sae_has_k_latents_on_cls_and_on_every_patch(result: Any) -> None:
    full = result.saes[1]
    assert full.kinds["cls"].sparsity.l0 == K
    assert full.patch_map.tolist() == [[K] * 4] * 4


def test_the_mean_of_the_patch_map_is_the_l0_of_patches(result: Any) -> None:
    sparse = result.saes[0]
    assert len(set(sparse.patch_map.flatten().tolist())) > 1  # a map with something to see
    for one in result.saes:
        assert float(one.patch_map.mean()) == pytest.approx(one.kinds["patch"].sparsity.l0)


def test_the_model_runs_once_a_batch_for_all_saes(world: SimpleNamespace) -> None:
    passes: list[int] = []
    block = world.model.native.vision_model.encoder.layers[0]
    handle = block.register_forward_hook(lambda *_: passes.append(1))
    try:
        study(world, batch_size=7)
    finally:
        handle.remove()
    assert len(passes) == N / 7


def test_an_sae_of_cls_tokens_has_one_kind_and_no_map(world: SimpleNamespace, result: Any) -> None:
    path, sae = next(iter(world.saes.items()))
    found = study(world, {path: sae}, tokens="cls").saes[0]
    assert list(found.kinds) == ["cls"]
    assert found.patch_map is None
    alone, beside = found.kinds["cls"], result.saes[1].kinds["cls"]
    assert alone.sparsity.to_dict() == beside.sparsity.to_dict()
    assert alone.fidelity.explained_variance == pytest.approx(beside.fidelity.explained_variance)
    figure_of(study(world, {path: sae}, tokens="cls")).canvas.draw()


def test_the_maps_share_one_colour_scale_and_have_a_title_each(result: Any) -> None:
    figure = figure_of(result)
    images = [image for axes in figure.axes for image in axes.images]
    assert len(images) == 2
    assert images[0].get_clim() == images[1].get_clim()
    values = torch.stack([one.patch_map for one in result.saes])
    assert images[0].get_clim() == (float(values.min()), float(values.max()))
    titles = [axes.get_title() for axes in figure.axes]
    assert {"L0", "explained variance", *labels_of(result.saes)} <= set(titles)


def test_the_map_shows_each_place_of_the_grid_where_it_is(result: Any) -> None:
    [drawn] = [axes.images[0] for axes in figure_of(result).axes if axes.get_title() == HOOKS[1]]
    np.testing.assert_array_equal(np.asarray(drawn.get_array()), result.saes[0].patch_map.numpy())


def test_labels_tell_saes_apart() -> None:
    def labels(*named: tuple[str, int]) -> list[str]:
        return labels_of(
            [
                SAEStudy(f"runs/{i}", hook, layer, D_SAE, "all", {}, None)
                for i, (hook, layer) in enumerate(named)
            ]
        )

    first, second = ("blocks.0.hook_resid_post", 0), ("blocks.1.hook_resid_post", 1)
    assert labels(first, second) == ["layer 0", "layer 1"]
    assert labels(first, ("blocks.1.hook_mlp_out", 1)) == [first[0], "blocks.1.hook_mlp_out"]
    assert labels(first, first) == [f"{first[0]}\n0", f"{first[0]}\n1"]


def test_the_command_writes_three_files_and_replaces_them(
    world: SimpleNamespace, result: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "study"
    line = ["sparsity", "--images", f"demo:{N}@3", "--output-path", str(out)]
    for _ in range(2):  # the second takes the place of the first
        assert main([*line, "--saes", *world.saes]) == 0
        assert sorted(path.name for path in out.iterdir()) == sorted(FILES)
        assert list(out.parent.iterdir()) == [out]
    printed = capsys.readouterr().out
    assert "patches" in printed
    assert "CLS" in printed
    written = json.loads((out / "sparsity.json").read_text())
    assert written["schema"] == "vision_plugin.sparsity/1"
    assert written["n_images"] == N
    found = result.to_dict()["saes"]
    assert [one["patch_map"] for one in written["saes"]] == [one["patch_map"] for one in found]
    assert [one["kinds"][0]["l0"] for one in written["saes"]] == [
        one["kinds"][0]["l0"] for one in found
    ]
    assert (out / "sparsity.txt").read_text().count("CLS") == 2
    with Image.open(out / "sparsity.png") as image:
        assert np.asarray(image.convert("L")).std() > 5  # something is drawn


def test_a_failure_while_drawing_leaves_the_earlier_study(
    result: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    from vision_plugin.evaluation import write_study

    out = tmp_path / "study"
    write_study(result, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Figure, "savefig", full)
    for folder in (out, tmp_path / "other"):
        with pytest.raises(OSError, match="no space left"):
            write_study(result, folder)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert list(tmp_path.iterdir()) == [out]


def test_a_folder_with_anything_else_in_it_is_left_alone(
    world: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    line = ["sparsity", "--images", "demo:2", "--output-path", str(tmp_path), "--saes"]
    assert main([*line, *world.saes]) == 2
    assert "'thesis.txt'" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_an_sae_of_another_model_or_hook_is_one_clear_error(
    world: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wide = standard_sae(HOOKS[0], 48)
    with pytest.raises(ValueError, match=r"^runs/wide: the SAE works on 48 dimensions"):
        study(world, {**world.saes, "runs/wide": wide})
    lost = standard_sae("blocks.9.hook_resid_post", 32)
    with pytest.raises(ValueError, match=r"^runs/lost: .*blocks\.9\.hook_resid_post"):
        study(world, {"runs/lost": lost})
    with pytest.raises(ValueError, match=r"no 'register' token"):
        study(world, tokens="register")
    other = standard_sae(HOOKS[0], 32)
    other.cfg.metadata.model_name = "another/clip"
    other.save_model(str(tmp_path / "other"))
    line = ["sparsity", "--images", "demo:2", "--output-path", str(tmp_path / "out"), "--saes"]
    assert main([*line, *world.saes, str(tmp_path / "other")]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert "was trained on another/clip, but" in error[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"saes": ()}, "at least one SAE"),
        ({"saes": ("a", "a")}, "twice"),
        ({"tokens": "random:4"}, "random tokens are of no known kind"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"dense_above": 2.0}, r"dense_above=2\.0"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(changes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparsityStudyConfig(**{"saes": ("a",), "images": "demo:2", **changes})


def test_the_table_has_a_row_for_each_sae_and_kind(result: Any) -> None:
    assert table_of(result).row_count == 6
    assert text_of(result).count("│ all ") == 2
