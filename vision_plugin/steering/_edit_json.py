"""Edits as JSON: read strictly, and tied to the SAE whose latents they name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, TypeAlias, get_args

import torch
from torch import Tensor

from vision_plugin._disk import write_json
from vision_plugin._ours import check_replaceable_file
from vision_plugin._paths import local_path
from vision_plugin._shown import MAX_TEXT, shown
from vision_plugin._untrusted import read_json
from vision_plugin.models.dictionary import Dictionary
from vision_plugin.models.site import hook_names
from vision_plugin.steering._basis import Basis, Directions, Latents, Neurons
from vision_plugin.steering._change import Change, Operation
from vision_plugin.steering._where import Where

KIND = "vision_plugin.edit/"
SCHEMA, WITH_PLACES = f"{KIND}1", f"{KIND}2"
"""The second one has changes that are made only where latents fire."""
_MOST = torch.finfo(torch.float32).max
_TOLERANCE = 0.01


Places: TypeAlias = str | Mapping[str, Dictionary] | None
"""Where the SAE of all latents lies, or SAEs by where they lie."""


def to_dict(changes: Sequence[Change], *, sae: Places = None) -> dict[str, Any]:
    """Return changes as a dictionary ready for JSON.

    Args:
        changes: The changes.
        sae: Where the SAEs of the latents lie.
    """
    return {
        "schema": WITH_PLACES if any(change.where for change in changes) else SCHEMA,
        "text": "\n".join(map(str, changes)),
        "changes": [_change_to_dict(change, sae) for change in changes],
    }


def write_changes(changes: Sequence[Change], path: str | Path, *, sae: Places) -> None:
    """Write changes to a JSON file; see :meth:`Edit.save`."""
    place = local_path(path)
    check_replaceable_file(place, KIND, name="path")
    write_json(to_dict(changes, sae=sae), place)


def read_changes(
    path: str | Path, *, sae: Any = None, device: str | torch.device = "cpu"
) -> tuple[Change, ...]:
    """Return the changes of a JSON file; see :meth:`Edit.load`."""
    place = local_path(path)
    content = read_json(place, strict=True)
    if not isinstance(content, dict) or not str(content.get("schema")).startswith(KIND):
        raise ValueError(f"{place} is not an edit: name a file that Edit.save wrote")
    if content["schema"] not in (SCHEMA, WITH_PLACES):
        raise ValueError(
            f"{place} has the schema {shown(content['schema'])}, and this version reads "
            f"{SCHEMA!r} and {WITH_PLACES!r}: update vision_plugin"
        )
    known = _Known(place, sae, device)
    try:
        return tuple(_change_from_dict(entry, known) for entry in content["changes"])
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(
            f"{place} does not hold what an edit holds ({type(error).__name__}: "
            f"{str(error)[:MAX_TEXT]}): save the edit again"
        ) from error
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def _change_to_dict(change: Change, sae: Places) -> dict[str, Any]:
    where = {} if change.where is None else {"where": _where_to_dict(change.where)}
    return {
        "operation": change.operation,
        "basis": _basis_to_dict(change.basis, sae),
        "targets": list(change.targets),
        "amounts": list(change.amounts),
        "maxima": None if change.maxima is None else list(change.maxima),
        "tokens": change.tokens,
        "patches": None if change.patches is None else list(change.patches),
        "above": change.above,
        "include_error": change.include_error,
        "keep_norm": change.keep_norm,
        **where,
    }


def _where_to_dict(where: Where) -> dict[str, Any]:
    return {
        "latents": list(where.above),
        "above": [float(threshold) for threshold in where.above.values()],
        "outside": where.outside,
    }


def _where_from_dict(entry: dict[str, Any] | None) -> Where | None:
    if entry is None:
        return None
    latents, above = map(_whole, entry["latents"]), map(_number, entry["above"])
    return Where(dict(zip(latents, above, strict=True)), _switch(entry["outside"]))


def _change_from_dict(entry: dict[str, Any], known: _Known) -> Change:
    above, operation = entry["above"], entry["operation"]
    if operation not in get_args(Operation):
        raise ValueError(
            f"operation={shown(operation)} is none of {', '.join(get_args(Operation))}"
        )
    return Change(
        operation=operation,
        basis=_basis_from_dict(entry["basis"], known),
        targets=tuple(_whole(target) for target in entry["targets"]),
        amounts=tuple(map(_number, entry["amounts"])),
        maxima=None if entry["maxima"] is None else tuple(map(_number, entry["maxima"])),
        tokens=str(entry["tokens"]),
        patches=None if entry["patches"] is None else tuple(map(_whole, entry["patches"])),
        above=None if above is None else _number(above),
        include_error=_switch(entry["include_error"]),
        keep_norm=_switch(entry["keep_norm"]),
        where=_where_from_dict(entry.get("where")),
    )


def _place_of(dictionary: Dictionary, sae: Places) -> str | None:
    if not isinstance(sae, Mapping):
        return sae
    return next((place for place, one in sae.items() if one is dictionary), None)


def _basis_to_dict(basis: Basis, sae: Places) -> dict[str, Any]:
    match basis:
        case Latents(dictionary):
            hook_name, hook_name_out = hook_names(dictionary)
            return {
                "kind": "latents",
                "hook_name": hook_name,
                "hook_name_out": hook_name_out,
                "sae": _place_of(dictionary, sae),
                "fingerprint": fingerprint(dictionary),
            }
        case Neurons(hook_name):
            return {"kind": "neurons", "hook_name": hook_name}
        case Directions(hook_name, vectors, readers, offset):
            return {
                "kind": "directions",
                "hook_name": hook_name,
                "vectors": vectors.tolist(),
                "readers": None if readers is None else readers.tolist(),
                "offset": None if offset is None else offset.tolist(),
            }


def _basis_from_dict(entry: dict[str, Any], known: _Known) -> Basis:
    match entry["kind"]:
        case "latents":
            return Latents(known.dictionary(entry))
        case "neurons":
            return Neurons(str(entry["hook_name"]))
        case "directions":
            return Directions(
                str(entry["hook_name"]),
                torch.tensor(entry["vectors"], dtype=torch.float32),
                _tensor(entry["readers"]),
                _tensor(entry["offset"]),
            )
        case kind:
            raise ValueError(f"{shown(kind)} is nothing that an edit counts in")


def fingerprint(dictionary: Dictionary) -> dict[str, Any]:
    """Return numbers that tell a dictionary from others, and its latents' order from another.

    They survive a change of dtype and device.

    Args:
        dictionary: An SAE or another dictionary.

    Examples:
        >>> sorted(vp.steering.fingerprint(sae))
        ['W_dec', 'W_enc', 'd_in', 'd_sae']
    """
    found: dict[str, Any] = {"d_in": int(dictionary.cfg.d_in), "d_sae": int(dictionary.cfg.d_sae)}
    for name in ("W_enc", "W_dec"):
        weights = getattr(dictionary, name, None)
        if isinstance(weights, Tensor):
            flat = weights.detach().double().flatten().cpu()
            wave = torch.arange(len(flat), dtype=torch.float64).add_(1).sqrt_().cos_()
            found[name] = [round(float(flat.norm()), 6), round(float(flat @ wave), 6)]
    return found


def same_dictionary(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    """Return whether two fingerprints are of the same weights.

    Args:
        ours: A fingerprint.
        theirs: Another.

    Examples:
        >>> ours = vp.steering.fingerprint(sae)
        >>> theirs = vp.steering.fingerprint(vp.load_sae("runs/sae"))
        >>> vp.steering.same_dictionary(ours, theirs)
        True
    """
    if any(ours.get(name) != theirs.get(name) for name in ("d_in", "d_sae")):
        return False
    for name in ours.keys() & theirs.keys() & {"W_enc", "W_dec"}:
        norm = max(abs(ours[name][0]), 1e-12)
        pairs = zip(ours[name], theirs[name], strict=True)
        if any(abs(a - b) > _TOLERANCE * norm for a, b in pairs):
            return False
    return True


class _Known:
    """The SAEs that a file's latents may belong to."""

    def __init__(self, place: Path, sae: Any, device: str | torch.device) -> None:
        self._place, self._device = place, device
        given = sae if isinstance(sae, (list, tuple)) else [] if sae is None else [sae]
        self._saes: list[Dictionary] = [_opened(one, device) for one in given]
        self._may_load = not self._saes

    def dictionary(self, entry: dict[str, Any]) -> Dictionary:
        """Return the SAE of an entry.

        Raises:
            ValueError: none was given and the file names none, or it is another one.
        """
        wanted = entry["fingerprint"]
        for sae in self._saes:
            if same_dictionary(wanted, fingerprint(sae)):
                return sae
        if self._may_load and entry["sae"] is None:
            raise ValueError("it does not say where its SAE lies: give the SAE with sae=")
        if self._may_load:
            where = local_path(str(entry["sae"]))
            beside = self._place.parent / where
            sae = _opened(str(beside if beside.exists() else where), self._device)
            if same_dictionary(wanted, fingerprint(sae)):
                self._saes.append(sae)
                return sae
        raise ValueError(
            f"it edits latents of an SAE of {shown(wanted['d_sae'])} latents at "
            f"{str(entry['hook_name'])[:MAX_TEXT]}, and the SAE that was given or named is "
            "another one: give the SAE that the latents were found in with sae="
        )


def _opened(sae: Dictionary | str | Path, device: str | torch.device) -> Dictionary:
    if not isinstance(sae, (str, Path)):
        return sae
    # ``formats`` knows more than this folder may: it is found by name, as a checkpoint is.
    opened: Dictionary = import_module("vision_plugin.formats").load_sae(
        str(sae), device=str(device)
    )
    return opened


def _tensor(values: Any) -> Tensor | None:
    return None if values is None else torch.tensor(values, dtype=torch.float32)


def _number(value: Any) -> float:
    if type(value) not in (int, float) or abs(value) > _MOST:
        raise ValueError(f"{shown(value)} is not a number that an activation can take")
    return float(value)


def _whole(value: Any) -> int:
    if type(value) is not int:
        raise ValueError(f"{shown(value)} is not the number of a latent")
    return value


def _switch(value: Any) -> bool:
    if type(value) is not bool:
        raise ValueError(f"{shown(value)} is neither true nor false")
    return value
