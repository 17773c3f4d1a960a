"""The configuration and the results of a sparsity study."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from vision_plugin.evaluation._config import SparsityStudyConfig
from vision_plugin.metrics import FVUResult, SparsityResult, to_json

SCHEMA = "vision_plugin.sparsity/1"
_LEFT_TO_THE_MAP = ("l0_by_kind", "l0_by_position", "frequency", "n_active")


@dataclass(frozen=True)
class KindStudy:
    """Sparsity and fidelity of an SAE on one kind of token.

    Attributes:
        kind: ``cls``, ``register``, ``patch``, or ``all`` for the selected tokens together.
        sparsity: L0, dead, rare and dense latents over these tokens alone.
        fidelity: fidelity of the reconstruction; explained variance is around these tokens' mean.

    Examples:
        >>> cfg = vp.evaluation.SparsityStudyConfig(
        ...     saes=("runs/sae",), images="demo:8", output_path=None
        ... )
        >>> study = vp.evaluation.sparsity_study(cfg, model=model)
        >>> study.saes[0].kinds["patch"].kind
        'patch'
    """

    kind: str
    sparsity: SparsityResult
    fidelity: FVUResult

    def to_dict(self) -> dict[str, Any]:
        """Return the study ready for JSON, without values per latent."""
        sparsity = self.sparsity.to_dict().items()
        return {
            "kind": self.kind,
            **{name: value for name, value in sparsity if name not in _LEFT_TO_THE_MAP},
            **self.fidelity.to_dict(),
        }


@dataclass(frozen=True)
class SAEStudy:
    """Results of one SAE on every kind of token that it was given.

    Attributes:
        sae: path of the SAE.
        hook_name: hook that it reads.
        layer: number of the hook's block; None for a hook outside the blocks.
        d_sae: number of latents.
        tokens: tokens that were selected.
        kinds: results by kind of token, in the order of the sequence, with ``all`` last.
        patch_map: mean L0 at each place of the patch grid; None where patches were not selected.

    Examples:
        >>> cfg = vp.evaluation.SparsityStudyConfig(
        ...     saes=("runs/sae",), images="demo:8", output_path=None
        ... )
        >>> (found,) = vp.evaluation.sparsity_study(cfg, model=model).saes
        >>> found.layer, list(found.kinds), found.patch_map.shape
        (2, ['cls', 'patch', 'all'], torch.Size([8, 8]))
    """

    sae: str
    hook_name: str
    layer: int | None
    d_sae: int
    tokens: str
    kinds: dict[str, KindStudy]
    patch_map: Float[Tensor, "rows columns"] | None

    def to_dict(self) -> dict[str, Any]:
        """Return the results ready for JSON."""
        return {
            "sae": self.sae,
            "hook_name": self.hook_name,
            "layer": self.layer,
            "d_sae": self.d_sae,
            "tokens": self.tokens,
            "kinds": [kind.to_dict() for kind in self.kinds.values()],
            "patch_map": None if self.patch_map is None else self.patch_map.tolist(),
        }


@dataclass(frozen=True)
class SparsityStudy:
    """Results of SAEs of one model, from the first layer to the last.

    Attributes:
        config: What was studied.
        model_name: Name of the model.
        n_images: Images that were read.
        saes: Results by SAE.

    Examples:
        >>> cfg = vp.evaluation.SparsityStudyConfig(
        ...     saes=("runs/sae",), images="demo:8", output_path=None
        ... )
        >>> study = vp.evaluation.sparsity_study(cfg, model=model)
        >>> study.n_images, len(study.saes)
        (8, 1)
    """

    config: SparsityStudyConfig
    model_name: str
    n_images: int
    bad_images: dict[str, str]
    """Reasons by id of the images that could not be read."""
    saes: tuple[SAEStudy, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the study ready for JSON, without values per latent."""
        found: dict[str, Any] = to_json(
            {
                "schema": SCHEMA,
                "config": asdict(self.config),
                "model_name": self.model_name,
                "n_images": self.n_images,
                "bad_images": self.bad_images,
                "saes": [sae.to_dict() for sae in self.saes],
            }
        )
        return found
