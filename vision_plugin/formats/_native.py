"""SAELens's own folders, checked before SAELens reads them."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from sae_lens.loading.pretrained_sae_loaders import handle_config_defaulting, sae_lens_disk_loader
from sae_lens.registry import SAE_CLASS_REGISTRY
from sae_lens.saes.sae import SAEMetadata
from torch import Tensor

from vision_plugin._shown import listed, shown
from vision_plugin.formats._checkpoint import whole_number
from vision_plugin.formats._errors import CorruptCheckpointError
from vision_plugin.formats._files import damage_is_named, read_config, read_safetensors
from vision_plugin.formats._locate import NATIVE_CONFIG, NATIVE_WEIGHTS
from vision_plugin.formats._seal import KEY, check_loaded
from vision_plugin.formats._stock import require_finite, require_floating

_SIZES = ("d_in", "d_sae", "d_out")
_METADATA: dict[str, tuple[type, ...]] = {
    "model_name": (str,),
    "hook_name": (str,),
    "hook_name_out": (str,),
    "hook_head_index": (int,),
    "tokens": (str,),
    "sae_lens_version": (str,),
    "sae_lens_training_version": (str,),
    "model_from_pretrained_kwargs": (dict,),
    "model_signature": (list,),
    "matryoshka_widths": (list,),
}
_MAX_TEXT = 1_000


def read_native(
    path: Path, device: str, overrides: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the config and state dict of a folder that SAELens wrote.

    Raises:
        CorruptCheckpointError: The config, the weights or the two together are not those of an SAE,
            or were damaged after this package wrote them; it names the folder and the reason.
    """
    config = read_config(path / NATIVE_CONFIG)
    weights = read_safetensors(path / NATIVE_WEIGHTS)
    with damage_is_named(path):
        if "architecture" not in config and "d_in" not in config:
            raise CorruptCheckpointError(f"its {NATIVE_CONFIG} is not of an SAE.")
        _check_config(config, weights)
    check_loaded(path, config)
    with damage_is_named(path / NATIVE_WEIGHTS):
        require_floating(weights)
        require_finite(weights)
    with damage_is_named(path):
        result: tuple[dict[str, Any], dict[str, Tensor]] = sae_lens_disk_loader(
            path, device, overrides
        )
    result[0].pop(KEY, None)
    return result


def _check_config(config: dict[str, Any], weights: dict[str, Tensor]) -> None:
    metadata = config.get("metadata", {})
    if not isinstance(metadata, dict):
        raise CorruptCheckpointError(f"its metadata is {shown(metadata)}, not an object.")
    _check_metadata(metadata)
    _check_metadata({name: config[name] for name in _METADATA if name in config})
    # SAELens renames and adds what older versions of it wrote, in a copy.
    full = handle_config_defaulting({**config, "metadata": {**metadata}})
    architecture = full.get("architecture")
    if not isinstance(architecture, str) or architecture not in SAE_CLASS_REGISTRY:
        raise CorruptCheckpointError(
            f"its architecture is {shown(architecture)}; SAELens has {listed(SAE_CLASS_REGISTRY)}."
        )
    config_class = SAE_CLASS_REGISTRY[architecture][1]
    kinds = get_type_hints(config_class)
    for field in fields(config_class):
        if field.name in full and field.name not in ("metadata", "device"):
            _check_kind(field.name, full[field.name], kinds[field.name])
    for name in _SIZES:
        if name in full and whole_number(full[name], name) < 1:
            raise CorruptCheckpointError(f"its config has {name}={full[name]}; expected 1 or more.")
    _check_sizes(full, weights)


def _check_metadata(metadata: dict[str, Any]) -> None:
    for name, value in metadata.items():
        if name == "self" or hasattr(SAEMetadata, name):
            raise CorruptCheckpointError(f"its metadata has a value called {shown(name)}.")
        kinds = _METADATA.get(name)
        if kinds is None or value is None:
            continue
        if type(value) not in kinds or (isinstance(value, str) and len(value) > _MAX_TEXT):
            raise CorruptCheckpointError(f"its metadata has {name} = {shown(value)}.")


def _check_kind(name: str, value: object, kind: Any) -> None:
    """Raise if a value cannot be what a field of SAELens's is declared to hold."""
    if get_origin(kind) in (Union, UnionType):
        allowed = get_args(kind)
    elif get_origin(kind) is Literal:
        allowed = tuple({type(choice) for choice in get_args(kind)})
    else:
        allowed = (kind,)
    plain = [one for one in allowed if one in (bool, int, float, str, type(None))]
    if len(plain) < len(allowed):
        return
    if type(value) in plain or (type(value) is int and float in plain):
        return
    raise CorruptCheckpointError(f"its config has {name} = {shown(value)}.")


def _check_sizes(config: dict[str, Any], weights: dict[str, Tensor]) -> None:
    """Raise if sizes are not those of the weights, before SAELens makes anything of such a size."""
    d_in, d_sae = config.get("d_in"), config.get("d_sae")
    expected = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, config.get("d_out", d_in))}
    for name, shape in expected.items():
        if name in weights and tuple(weights[name].shape) != shape:
            raise CorruptCheckpointError(
                f"its {NATIVE_CONFIG} says that {name} has the shape {shape}, its weights have "
                f"{tuple(weights[name].shape)}. One of the two is of another SAE."
            )
    for name, tensor in weights.items():
        if 0 in tensor.shape:
            raise CorruptCheckpointError(f"{shown(name)} has the shape {tuple(tensor.shape)}.")
    k = config.get("k")
    if type(k) is int and not 1 <= k <= config["d_sae"]:
        raise CorruptCheckpointError(f"k is {shown(k)}; expected 1 to d_sae={config['d_sae']}.")
    layers = config.get("n_attn_layers")
    if type(layers) is int and layers > len(weights):
        raise CorruptCheckpointError(f"it has {shown(layers)} layers, more than weights.")
