"""Presets: complete, of one definition with the flags, and honest about their source."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sae_lens import TrainingSAE

from tests.sae._runs import ARCHITECTURES, SHAPE
from vision_plugin.cli import main
from vision_plugin.cli._train import read_config
from vision_plugin.sae import VisionSAERunnerConfig, VisionSAETrainingRunner, presets
from vision_plugin.sae._sparse_register import sparse_config

NAMED = {
    *("clip-vit-b-32", "clip-vit-b-16", "clip-vit-l-14", "clip-vit-l-14-336"),
    *("siglip-b-16", "siglip-so400m-14-384", "dinov2-b-14", "dinov2-l-14"),
    *("dinov3-b-16", "vit-b-16", "dinov2-s-14", "emoji-clip", "demo"),
}


def test_every_backbone_and_architecture_has_one() -> None:
    pairs = {(one.name, one.architecture) for one in presets()}
    assert pairs == {(name, kind) for name in NAMED for kind in ARCHITECTURES if kind != "abstopk"}


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "abstopk"])
def test_each_is_a_configuration_that_makes_an_sae(architecture: str) -> None:
    for name in sorted(NAMED):
        cfg = VisionSAERunnerConfig.preset(name, architecture=architecture, images="photos/")
        assert cfg.images == "photos/"
        assert VisionSAERunnerConfig.from_dict(cfg.to_dict()) == cfg
        assert cfg.sae.d_sae > cfg.sae.d_in >= 128
        assert 0 < cfg.lr <= 4e-3
        assert cfg.total_training_steps > cfg.lr_warm_up_steps + cfg.lr_decay_steps
        assert len(cfg.hook_names) == (2 if "transcoder" in architecture else 1)
        with torch.device("meta"):
            small = {**cfg.sae.to_dict(), **SHAPE, "device": "cpu"}
            if "matryoshka_widths" in small:
                small["matryoshka_widths"] = [8, 32]
            if "d_out" in small:
                small["d_out"] = SHAPE["d_in"]
        TrainingSAE.from_dict(sparse_config(type(cfg.sae).from_dict(small)).to_dict())


def test_the_matryoshka_s_last_width_is_the_whole_dictionary() -> None:
    cfg = VisionSAERunnerConfig.preset("clip_vit_b_32", architecture="matryoshka_batchtopk")
    widths = cfg.sae.matryoshka_widths
    assert widths == sorted(widths)
    assert widths[-1] == cfg.sae.d_sae


def test_what_is_published_goes_before_ours_and_is_named() -> None:
    prisma = VisionSAERunnerConfig.preset("clip-vit-b-32", architecture="standard")
    assert (prisma.sae.d_sae, prisma.lr, prisma.lr_warm_up_steps) == (49152, 4e-4, 200)
    named = {
        "published": ("Prisma", "VISAEBench", "sae-for-vlm"),
        "measured": ("benchmarks/results/defaults.md", "benchmarks/results/trials.md"),
        "by rule": ("by rule",),
    }
    for one in presets():
        assert any(project in one.source for project in named[one.kind])
    assert {one.kind for one in presets()} == set(named)


def test_a_field_can_be_changed_and_a_wrong_one_is_refused() -> None:
    cfg = VisionSAERunnerConfig.preset("vit-b-16", architecture="topk", lr=1e-2, seed=3)
    assert (cfg.lr, cfg.seed) == (1e-2, 3)
    with pytest.raises(ValueError, match="did you mean clip-vit-b-32"):
        VisionSAERunnerConfig.preset("clip-vit-b32", architecture="topk")
    with pytest.raises(ValueError, match="no architecture is named 'topp'"):
        VisionSAERunnerConfig.preset("vit-b-16", architecture="topp")
    with pytest.raises(ValueError, match="no field 'learning_rate'"):
        VisionSAERunnerConfig.preset("vit-b-16", architecture="topk", learning_rate=1.0)


def test_without_images_the_runner_says_so(tmp_path: Path) -> None:
    cfg = VisionSAERunnerConfig.preset("vit-b-16", architecture="topk", output_path=str(tmp_path))
    with pytest.raises(ValueError, match="does not say what to train on: set images"):
        VisionSAETrainingRunner(cfg)


def test_the_command_takes_a_preset_and_flags_go_before_it() -> None:
    line = "--preset clip-vit-b-16 --architecture batchtopk --images photos --lr 0.5 --d_sae=99"
    cfg = read_config(line.split())
    plain = VisionSAERunnerConfig.preset("clip-vit-b-16", architecture="batchtopk")
    assert (cfg.lr, cfg.sae.d_sae, cfg.images) == (0.5, 99, "photos")
    assert (cfg.model_name, cfg.tokens, cfg.sae.k) == (plain.model_name, "patch", plain.sae.k)
    assert cfg.b_dec_init_method == "auto"
    assert {"d_sae", "k", "d_in"} == set(cfg.explicit)


def test_info_lists_them(capsys) -> None:
    assert main(["info", "presets"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in NAMED)
    assert len(out.splitlines()) < 50
    assert max(map(len, out.splitlines())) <= 80
    assert "by rule" in out


def test_the_table_is_read_without_the_hosts() -> None:
    script = (
        "import sys; from vision_plugin.sae import presets; "
        "assert len(presets()) == 117; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
