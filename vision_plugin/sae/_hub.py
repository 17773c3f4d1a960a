"""Share an SAE on the Hugging Face hub: SAELens's format, a card, and no local paths."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from sae_lens import SAE, TrainingSAE
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, SPARSITY_FILENAME

from vision_plugin._disk import whole_folder, write_json
from vision_plugin._paths import local_path
from vision_plugin._private import Places
from vision_plugin._untrusted import read_json
from vision_plugin.formats import seal
from vision_plugin.sae._hub_card import card

EVALUATION, NAMES, CARD = "evaluation.json", "names.json", "README.md"
_REPO_ID = re.compile(r"[\w-][\w.-]{0,95}/[\w-][\w.-]{0,95}")
_SAE_ID = re.compile(r"[\w.-]+(/[\w.-]+)*")


def hub_folder(
    sae: SAE[Any] | str | Path,
    output_path: str | Path,
    repo_id: str,
    *,
    sae_id: str = "",
    evaluation: str | Path | Mapping[str, Any] | None = None,
    names: Mapping[int, str] | None = None,
    pictures: Sequence[str | Path] = (),
) -> Path:
    """Write the folder that :func:`push_to_hub` uploads, to look at it first.

    The folder has SAELens's files, the evaluation and the names if there are any, and a model card.
    Paths of this machine in the settings and the evaluation are cut to their last part.

    Args:
        sae: SAE of SAELens, or the folder of a saved one.
        output_path: Folder to write; it must not exist or be empty.
        repo_id: Repository that the card speaks of, ``owner/name``.
        sae_id: Folder of the SAE in the repository; empty puts it at the top.
        evaluation: ``evaluation.json`` of :func:`vision_plugin.evaluate`, or its content. By
            default the one that lies beside a saved SAE.
        names: Name of each latent that has one.
        pictures: Image files that the card shows, such as screenshots of a report.

    Returns:
        The folder.

    Raises:
        FileExistsError: something is in the folder.
        FileNotFoundError: the SAE, the evaluation or a picture is not there.
        ValueError: ``repo_id`` or ``sae_id`` is no name, or a name is of a latent that the SAE
            does not have.

    Examples:
        >>> folder = vp.sae.hub_folder("runs/sae", "to-upload", "me/demo-saes")
        >>> sorted(file.name for file in folder.iterdir())
        ['README.md', 'cfg.json', 'sae_weights.safetensors', 'sparsity.safetensors']
    """
    _check_place(repo_id, sae_id)
    place = local_path(output_path)
    scores = _shared(_evaluation_of(sae, evaluation))
    with whole_folder(place) as folder:
        _write_sae(sae, folder)
        config = json.loads((folder / SAE_CFG_FILENAME).read_text(encoding="utf-8"))
        config.pop("sha256", None)
        config = _without_paths(config, Places())
        (folder / SAE_CFG_FILENAME).write_text(json.dumps(config), encoding="utf-8")
        if scores is not None:
            write_json(scores, folder / EVALUATION)
        if names:
            _check_names(names, int(config["d_sae"]))
            write_json({str(latent): name for latent, name in sorted(names.items())},
                       folder / NAMES)  # fmt: skip
        shown = _copy_pictures(pictures, folder)
        text = card(
            config,
            repo_id=repo_id,
            sae_id=sae_id,
            evaluation=scores,
            names=names,
            pictures=shown,
        )
        (folder / CARD).write_text(text, encoding="utf-8")
        seal(folder)
    return place


def push_to_hub(
    sae: SAE[Any] | str | Path,
    repo_id: str,
    *,
    sae_id: str = "",
    evaluation: str | Path | Mapping[str, Any] | None = None,
    names: Mapping[int, str] | None = None,
    pictures: Sequence[str | Path] = (),
    revision: str = "main",
    private: bool = False,
    token: str | bool | None = None,
    endpoint: str | None = None,
) -> str:
    """Upload an SAE to the Hugging Face hub in one commit; make the repository if there is none.

    ``vp.load_sae(repo_id, sae_id)`` and SAELens's ``SAE.from_pretrained(repo_id, sae_id)`` load it
    from there (``"."`` for an SAE at the top in SAELens). See :func:`hub_folder` for what is
    uploaded, and for the arguments that are not below.

    Args:
        sae, evaluation, names, pictures: See :func:`hub_folder`.
        repo_id: Repository, ``owner/name``.
        sae_id: Folder of the SAE in the repository, for a repository of several SAEs.
        revision: Branch to commit to.
        private: Whether a new repository is private; one that exists stays as it is.
        token: Token of the hub; by default that of ``hf auth login``.
        endpoint: Address of the hub; by default the public one, or ``HF_ENDPOINT``.

    Returns:
        Address of the commit.

    Raises:
        ConnectionError: the hub does not answer, or refuses; the message says what it said.
        FileNotFoundError, ValueError: see :func:`hub_folder`.

    Examples:
        >>> try:
        ...     vp.push_to_hub(sae, "no owner")
        ... except ValueError:
        ...     print("not a repository's name")
        not a repository's name
    """
    _check_place(repo_id, sae_id)
    api = HfApi(endpoint=endpoint, token=token)
    with tempfile.TemporaryDirectory() as scratch:
        folder = hub_folder(
            sae,
            Path(scratch) / "sae",
            repo_id,
            sae_id=sae_id,
            evaluation=evaluation,
            names=names,
            pictures=pictures,
        )
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            done = api.upload_folder(
                folder_path=folder,
                path_in_repo=sae_id or None,
                repo_id=repo_id,
                revision=revision,
                commit_message=f"Add the SAE {sae_id or repo_id.rpartition('/')[2]}",
            )
        except (HfHubHTTPError, OSError) as error:
            said = " ".join(str(error).split())[:300]
            raise ConnectionError(
                f"{repo_id} was not uploaded to {api.endpoint}: {said}. Check the name, the token "
                "(hf auth login) and the connection, and run it again"
            ) from error
    return str(done.commit_url)


def _check_place(repo_id: str, sae_id: str) -> None:
    if not _REPO_ID.fullmatch(repo_id):
        raise ValueError(
            f"repo_id={repo_id!r} is no name of a repository: use owner/name, of letters, digits, "
            "'.', '_' and '-'"
        )
    if sae_id and (not _SAE_ID.fullmatch(sae_id) or ".." in sae_id.split("/")):
        raise ValueError(
            f"sae_id={sae_id!r} is no folder of a repository: use letters, digits, '.', '_', '-' "
            "and '/' between parts"
        )


def _evaluation_of(
    sae: SAE[Any] | str | Path, evaluation: str | Path | Mapping[str, Any] | None
) -> Mapping[str, Any] | None:
    if isinstance(evaluation, Mapping):
        return evaluation
    if evaluation is None:
        if isinstance(sae, SAE) or not (beside := local_path(sae) / EVALUATION).is_file():
            return None
        evaluation = beside
    content = read_json(local_path(evaluation))
    if not isinstance(content, dict) or not isinstance(content.get("summary"), dict):
        raise ValueError(f"{evaluation} is not an evaluation: name a file that vp.evaluate wrote")
    return content


def _write_sae(sae: SAE[Any] | str | Path, folder: Path) -> None:
    if isinstance(sae, TrainingSAE):
        sae.save_inference_model(str(folder))
        return
    if isinstance(sae, SAE):
        sae.save_model(str(folder))
        return
    place = local_path(sae)
    for name in (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME):
        if not (place / name).is_file():
            raise FileNotFoundError(
                f"{sae} has no {name}: name the folder of an SAE in SAELens's format "
                "(`vision-plugin convert` writes one from other formats)"
            )
    for name in (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, SPARSITY_FILENAME):
        if (place / name).is_file():
            shutil.copyfile(place / name, folder / name)


def _check_names(names: Mapping[int, str], d_sae: int) -> None:
    for latent in names:
        if not 0 <= latent < d_sae:
            raise ValueError(
                f"names has latent {latent}, and the SAE has latents 0 to {d_sae - 1}: give the "
                "names of this SAE"
            )


def _copy_pictures(pictures: Sequence[str | Path], folder: Path) -> list[str]:
    shown = []
    for number, picture in enumerate(pictures):
        place = local_path(picture)
        if not place.is_file():
            raise FileNotFoundError(f"the picture {picture} is not there")
        name = f"pictures/{number}{place.suffix.lower() or '.png'}"
        (folder / "pictures").mkdir(exist_ok=True)
        shutil.copyfile(place, folder / name)
        shown.append(name)
    return shown


def _shared(evaluation: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return an evaluation without paths of this machine."""
    if evaluation is None:
        return None
    places = Places()
    by_dictionary = {
        name: {places.score_name(key): item for key, item in evaluation[name].items()}
        for name in ("summary", "left_out")
        if isinstance(evaluation.get(name), Mapping)
    }
    shared: dict[str, Any] = _without_paths({**evaluation, **by_dictionary}, places)
    return shared


def _without_paths(value: Any, places: Places) -> Any:
    """Return a JSON value in which a path of this machine is its last part alone."""
    if isinstance(value, Mapping):
        return {
            places.name_of(str(key)): _without_paths(item, places) for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_without_paths(item, places) for item in value]
    return places.name_of(value) if isinstance(value, str) else value
