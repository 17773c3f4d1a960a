"""Named releases and repositories through `SAE.from_pretrained`, from a hub cache."""

from __future__ import annotations

import re
import shutil
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from sae_lens import SAE
from sae_lens.loading.pretrained_sae_loaders import (
    NAMED_PRETRAINED_SAE_CONFIG_GETTERS,
    NAMED_PRETRAINED_SAE_LOADERS,
    load_sae_config_from_huggingface,
)
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

from tests.formats.test_samples import (
    DATA,
    EXACT,
    assert_same_numbers,
    expected,
    options_of,
)
from vision_plugin.formats import (
    RefusedCheckpointError,
    hub_converter,
    load_sae,
    read_releases,
    register,
)

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CLIP = "Prisma-Multimodal/sparse-autoencoder-clip-b-32-sae-vanilla-x64-layer-{}-hook_resid_post"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def publish(hub: Path, repo_id: str, sample: str, folder: str = "") -> Path:
    """Put a sample into the cache as the hub client lays it out."""
    repository = hub / ("models--" + repo_id.replace("/", "--"))
    target = repository / "snapshots" / COMMIT / folder
    ignored = shutil.ignore_patterns("expected*", "about.json")
    shutil.copytree(DATA / sample, target, ignore=ignored, dirs_exist_ok=True)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(COMMIT)
    return target


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("folder", ["", "clip/layer 11"])
def test_sae_lens_loads_a_repository_through_its_converter(
    hub: Path, name: str, folder: str
) -> None:
    publish(hub, "someone/saes", name, folder)
    converter = hub_converter(**options_of(name))
    sae = SAE.from_pretrained("someone/saes", folder, converter=converter)
    assert_same_numbers(sae, expected(name))


def test_load_sae_takes_a_repository_and_a_file_in_it(hub: Path) -> None:
    publish(hub, "someone/saes", "dl-topk", "run/trainer_0")
    assert_same_numbers(load_sae("someone/saes", "run/trainer_0"), expected("dl-topk"))
    assert_same_numbers(load_sae("someone/saes", "run/trainer_0/ae.pt"), expected("dl-topk"))


def test_the_release_of_the_readme_loads_by_name(hub: Path) -> None:
    register()
    publish(hub, CLIP.format(11) + "-l1-1e-05", "prisma-relu-pt")
    sae = SAE.from_pretrained("vision-clip-b-32-resid-post", "blocks.11")
    assert_same_numbers(sae, expected("prisma-relu-pt"))
    assert sae.cfg.metadata.release == "vision-clip-b-32-resid-post"
    assert_same_numbers(
        load_sae("vision-clip-b-32-resid-post", "blocks.11"), expected("prisma-relu-pt")
    )


@pytest.mark.parametrize("backbone", ["clip-b-16", "siglip-b-16", "dinov2-b-14", "mae-b-16"])
def test_a_visaebench_release_loads_by_name(hub: Path, backbone: str) -> None:
    register()
    release = read_releases()[f"vision-{backbone}-visaebench"]
    publish(hub, release["repo_id"], "visaebench-oc-batchtopk", "batchtopk_16x_k128")
    sae = SAE.from_pretrained(f"vision-{backbone}-visaebench", "batchtopk_16x_k128")
    assert_same_numbers(sae, expected("visaebench-oc-batchtopk"))
    assert sae.cfg.metadata.tokens == "patch"
    assert sae.cfg.metadata.model_name == release["model"]


def test_a_sae_for_vlm_release_loads_by_name(hub: Path) -> None:
    register()
    variant = "matroyshka_batch_top_k_20_x64"
    run = f"{variant}/imagenet_train_activations_clip-vit-large-patch14-336_22_post_mlp_residual_"
    target = publish(hub, "mateuszpach/sae-for-vlm", "dl-matroyshka", f"{run}{variant}/trainer_0")
    (target / "checkpoints").mkdir()
    (target / "ae.pt").rename(target / "checkpoints" / "ae_100000.pt")
    release = "vision-clip-l-14-336-resid-post-sae-for-vlm"
    sae = SAE.from_pretrained(release, f"blocks.22/{variant}")
    assert_same_numbers(sae, expected("dl-matroyshka"))
    assert sae.cfg.metadata.hook_name == "blocks.22.hook_resid_post"
    assert sae.cfg.metadata.model_name == "openai/clip-vit-large-patch14-336"
    assert sae.cfg.metadata.tokens == "cls"


def test_sae_lens_reads_a_releases_config_alone(hub: Path) -> None:
    register()
    publish(hub, CLIP.format(3) + "-l1-1e-05", "prisma-topk-hub")
    config = load_sae_config_from_huggingface("vision-clip-b-32-resid-post", "blocks.3")
    assert (config["architecture"], config["k"], config["d_sae"]) == ("topk", 8, 96)


def test_the_dtype_that_sae_lens_asks_for_is_the_one_that_comes(hub: Path) -> None:
    publish(hub, "someone/saes", "prisma-gated-hub")
    sae = SAE.from_pretrained("someone/saes", "", dtype="bfloat16", converter=hub_converter())
    assert str(sae.W_enc.dtype) == "torch.bfloat16"


def test_what_is_not_cached_is_an_error_that_names_it(hub: Path) -> None:
    register()
    with pytest.raises(FileNotFoundError, match="Prisma-Multimodal/sparse-autoencoder"):
        SAE.from_pretrained("vision-clip-b-32-resid-post", "blocks.0")
    publish(hub, "someone/saes", "dl-topk")
    with pytest.raises(FileNotFoundError, match="someone/saes has no elsewhere"):
        load_sae("someone/saes", "elsewhere")


@pytest.mark.parametrize("path", ["../../other", "/etc", "a/../../b"])
def test_no_path_leaves_its_repository(hub: Path, path: str) -> None:
    publish(hub, "someone/saes", "dl-topk")
    with pytest.raises((RefusedCheckpointError, FileNotFoundError), match=r"leads out|has no"):
        load_sae("someone/saes", path)


def test_registering_twice_changes_nothing() -> None:
    register()
    loader = NAMED_PRETRAINED_SAE_LOADERS["vision_plugin"]
    directory = dict(get_pretrained_saes_directory())
    register()
    assert NAMED_PRETRAINED_SAE_LOADERS["vision_plugin"] is loader
    assert set(NAMED_PRETRAINED_SAE_CONFIG_GETTERS) >= {"vision_plugin", "sae_lens"}
    assert get_pretrained_saes_directory() == directory


def test_a_release_has_what_saelens_says_of_each_sae() -> None:
    """Of every SAE that it does not show, SAELens's own table says that Neuronpedia has none."""
    register()
    for name in read_releases():
        release = get_pretrained_saes_directory()[name]
        of_each = (release.expected_l0, release.expected_var_explained, release.neuronpedia_id)
        for known in of_each:
            assert known.keys() == release.saes_map.keys(), name
        assert set(release.neuronpedia_id.values()) == {None}


def test_registering_leaves_someone_elses_entry_alone() -> None:
    directory = get_pretrained_saes_directory()
    register()
    name = "vision-dino-b-resid-post"
    ours = directory[name]
    theirs: Any = object()
    directory[name] = theirs
    try:
        register()
        assert directory[name] is theirs
    finally:
        directory[name] = ours


def test_every_release_is_well_formed() -> None:
    releases = read_releases()
    sizes = {name: len(release["saes"]) for name, release in releases.items()}
    assert sum(n for name, n in sizes.items() if name.endswith("visaebench")) == 60
    assert sizes["vision-clip-b-32-resid-post"] == sizes["vision-clip-b-32-mlp-out"] == 12
    seen: set[str] = set()
    for name, release in releases.items():
        assert re.fullmatch(r"vision-[a-z0-9-]+", name)
        assert release["source"]
        assert len({sae["id"] for sae in release["saes"]}) == len(release["saes"])
        for sae in release["saes"]:
            owner_and_name = (
                "/".join(sae["path"].removeprefix("hf://").split("/")[:2])
                if sae["path"].startswith("hf://")
                else release["repo_id"]
            )
            huggingface_hub.utils.validate_repo_id(owner_and_name)
            place = f"{owner_and_name} {sae['path']}"
            assert place not in seen
            seen.add(place)
            layer = re.search(r"blocks\.(\d+)", sae["id"])
            if layer is not None:  # the id's layer is the repository's
                assert re.search(rf"[-_]{layer[1]}[-_]", sae["path"])


def test_visaebenchs_repositories_are_those_that_its_package_names() -> None:
    description = str(metadata("visaebench").get_payload())
    named = set(re.findall(r"`(visaebench/[\w-]+)`", description))
    ours = {
        release["repo_id"]
        for name, release in read_releases().items()
        if name.endswith("visaebench")
    }
    assert ours == named
