"""One set of weights: the native module owns it, and the bridge's copy of its structure borrows it.

Whatever changes weights (``load_state_dict``, ``to``, ``half``, a copy, a pickle) changes the
native module's; the bridge then takes them from there, so that the two never part.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

_FLAGS = ("use_attn_result", "use_split_qkv_input", "use_attn_in", "use_hook_mlp_in")
"""TransformerLens's switches for hooks that cost time or memory."""


@dataclass(frozen=True)
class Loan:
    """A place in the bridge's copy that holds a tensor of the native module."""

    borrower: dict[str, Tensor | None]
    name: str
    owner: dict[str, Tensor | None]
    owner_name: str

    def renew(self) -> None:
        """Take the tensor that the native module has now."""
        if self.borrower.get(self.name) is not self.owner[self.owner_name]:
            self.borrower[self.name] = self.owner[self.owner_name]


class Weights:
    """The part of a bridge that holds weights; a base of VisionBridge."""

    adapter: Any
    cfg: Any
    hook_dict: Any
    native: nn.Module
    original_model: nn.Module
    revision: str | None
    image_processor: Any
    tokenizer: Any

    def _setup_weights(self) -> None:
        self._loans = loans(self.native, chain(self.original_model.modules(), self.modules()))  # type: ignore[attr-defined]
        self.register_load_state_dict_post_hook(_keep_own_names)  # type: ignore[attr-defined]

    def _renew_loans(self) -> None:
        """Take the native module's tensors, if something has replaced them since the last pass."""
        for loan in self._loans:
            loan.renew()

    # ------------------------------------------------------------------ names

    def state_dict(self, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """Return the native module's state, under the native module's names.

        So it is a checkpoint of the native library: ``module.load_state_dict`` takes it.
        """
        into = {} if destination is None else {"destination": destination}
        return self.native.state_dict(prefix=prefix, keep_vars=keep_vars, **into)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load a state into the native module, and so into the bridge.

        Args:
            state_dict: Tensors under the native module's names. Names that TransformerLens gives
                (``"blocks.0.ln1.weight"``) are understood where they mean one tensor.
            strict: Whether a missing or unknown name is an error.
            assign: Whether the given tensors replace the weights; otherwise they are copied.

        Returns:
            torch's pair of missing and unexpected names.

        Raises:
            RuntimeError: a shape differs, a name means two things, or ``strict`` is set and the
                names differ.
        """
        names = self._native_names(state_dict)
        native: OrderedDict[str, Any] = OrderedDict(
            (names.get(name, name), value) for name, value in state_dict.items()
        )
        if hasattr(state_dict, "_metadata"):
            native._metadata = state_dict._metadata  # type: ignore[attr-defined]
        result = self.native.load_state_dict(native, strict=strict, assign=assign)
        self._renew_loans()
        return result

    def _native_names(self, state_dict: Mapping[str, Any]) -> dict[str, str]:
        """Return native names by the names of a state that TransformerLens gives.

        Raises:
            RuntimeError: a name means one tensor to TransformerLens and another one natively.
        """
        meanings = self._lens_names()
        native = set(self.native.state_dict(keep_vars=True))
        translated = {n for n in state_dict if n not in native and len(meanings.get(n, ())) == 1}
        for name in sorted(native & meanings.keys() & state_dict.keys() if translated else ()):
            other = meanings[name] - {name}
            if other and not other & state_dict.keys():
                raise RuntimeError(
                    f"the state has names of TransformerLens ({min(translated)!r}), among which "
                    f"{name!r} means {min(other)!r}, but {self.cfg.model_name} has a weight of "
                    "that name too: rename the state's weights as in model.state_dict()"
                )
        return {name: next(iter(meanings[name])) for name in translated}

    def _lens_names(self) -> dict[str, set[str]]:
        """Return the tensors, by their native names, that TransformerLens's names may mean."""
        self._renew_loans()  # somebody may have assigned other tensors to the native module
        native = {id(t): name for name, t in self.native.state_dict(keep_vars=True).items()}
        structure = self.original_model.state_dict(keep_vars=True)
        names: dict[str, set[str]] = {}
        in_lens: dict[str, list[str]] = self._tl_key_to_actual_keys()  # type: ignore[attr-defined]
        for lens_name, paths in in_lens.items():
            for path in paths:
                for name in (lens_name, path, path.replace("._original_component", "")):
                    names.setdefault(name, set()).add(native[id(structure[path])])
        return names

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load this bridge's part of the state of a module that contains it."""
        del strict
        part = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
        assign = bool(local_metadata.get("assign_to_params_buffers", False))
        try:
            missing, unexpected = self.load_state_dict(part, strict=False, assign=assign)
        except RuntimeError as error:
            error_msgs.append(str(error))
            missing, unexpected = [], []
        missing_keys += [prefix + name for name in missing]
        unexpected_keys += [prefix + name for name in unexpected]
        self.__dict__["_n_known_names"] = len(missing_keys), len(unexpected_keys)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Yield the native module's parameters."""
        return self.native.parameters(recurse)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the native module's parameters with its names, as in :meth:`state_dict`."""
        return self.native.named_parameters(prefix, recurse, remove_duplicate)

    def buffers(self, recurse: bool = True) -> Iterator[Tensor]:
        """Yield the native module's buffers."""
        return self.native.buffers(recurse)

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the native module's buffers with its names."""
        return self.native.named_buffers(prefix, recurse, remove_duplicate)

    # ------------------------------------------------------------------ device and type

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.native.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return next(self.native.parameters()).dtype

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Move or cast the weights, text tower included, as torch's ``to`` does."""
        kwargs.pop("print_details", None)
        return nn.Module.to(self, *args, **kwargs)  # type: ignore[call-overload]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Change every tensor: torch's ``to``, ``half``, ``double`` and ``cuda`` all come here."""
        self.native._apply(fn, recurse)
        self._renew_loans()
        self.cfg.device, self.cfg.dtype = str(self.device), self.dtype
        return self

    # ------------------------------------------------------------------ copies

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Return a bridge over a copy of the native module, with copies of what is attached."""
        native, kept = copy.deepcopy((self.native, self._belongings()), memo)
        memo[id(self)] = again = bridge_again(type(self), native, kept)
        return again

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle a bridge as its native module and the hooks that users added.

        Raises:
            TypeError: an SAE is attached.
        """
        kept = self._belongings()
        if kept["splices"] or any(edit.dictionaries for edit in kept["edits"]):
            raise TypeError(
                f"{self.cfg.model_name} has SAEs attached, which SAELens does not let pickle: "
                "detach them with reset_saes() and reset_edits(), and save each with "
                "sae.save_model(path)"
            )
        return bridge_again, (type(self), self.native, kept)

    def _belongings(self) -> dict[str, Any]:
        """Return what a bridge has beside its native module."""
        return {
            "name": self.cfg.model_name,
            "architecture": self.cfg.architecture,
            "adapter_class": type(self.adapter),
            "dimensions": self.adapter.tower_dimensions,
            "image_processor": self.image_processor,
            "tokenizer": self.tokenizer,
            "revision": self.revision,
            "flags": [flag for flag in _FLAGS if getattr(self.cfg, flag, False)],
            "splices": self._spliced(),  # type: ignore[attr-defined]
            "edits": list(self._edits),  # type: ignore[attr-defined]
            "hooks": self._user_hooks(),  # type: ignore[attr-defined]
        }


def share_weights(module: nn.Module) -> nn.Module:
    """Return a copy of a module's structure that shares the module's parameters and buffers."""
    shared = {id(t): t for t in chain(module.parameters(), module.buffers())}
    return copy.deepcopy(module, shared)


def loans(native: nn.Module, borrowers: Iterator[nn.Module]) -> list[Loan]:
    """Return every place in some modules that holds a tensor of the native module."""
    places = {
        id(tensor): (tensors, name)
        for tensors in _tensors(native.modules())
        for name, tensor in tensors.items()
        if tensor is not None
    }
    return [
        Loan(tensors, name, *places[id(tensor)])
        for tensors in _tensors(borrowers)
        for name, tensor in tensors.items()
        if id(tensor) in places
    ]


def bridge_again(bridge_class: Any, native: nn.Module, kept: dict[str, Any]) -> Any:
    """Return a bridge over a copied or unpickled native module, see ``Weights._belongings``."""
    names = ("name", "architecture", "adapter_class")
    bridge = bridge_class.over(native, **{name: kept[name] for name in names})
    bridge.adapter.tower_dimensions = kept["dimensions"]
    bridge.image_processor, bridge.tokenizer = kept["image_processor"], kept["tokenizer"]
    bridge.revision = kept["revision"]
    for flag in kept["flags"]:
        getattr(bridge, f"set_{flag}")(True)
    for sae, tokens, use_error_term in kept["splices"]:
        bridge.add_sae(sae, use_error_term, tokens=tokens, check_model=False)
    for edit in kept["edits"]:
        bridge.add_edit(edit, check_model=False)
    for hook_name, direction, function, is_permanent in kept["hooks"]:
        bridge.hook_dict[hook_name].add_hook(function, dir=direction, is_permanent=is_permanent)
    return bridge


def _tensors(modules: Iterator[nn.Module]) -> Iterator[dict[str, Any]]:
    """Yield the tables of parameters and of buffers of some modules, each once."""
    for module in dict.fromkeys(modules):
        yield module._parameters
        yield module._buffers


def _keep_own_names(bridge: Any, names: Any) -> None:
    """Drop the names that torch misses in the bridge's parts, whose weights are loaded already."""
    n_missing, n_unexpected = bridge.__dict__.pop("_n_known_names")
    del names.missing_keys[n_missing:]
    del names.unexpected_keys[n_unexpected:]
