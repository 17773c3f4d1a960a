"""Values of fields that nobody set; the run replaces them once it knows the data."""

from __future__ import annotations

from typing import Literal

D_IN_OF_MODEL = 0
"""Value of ``sae.d_in``, or of a transcoder's ``d_out``, that stands for the width at the hook.

Examples:
    >>> auto = TopKTrainingSAEConfig(d_in=vp.sae.D_IN_OF_MODEL, d_sae=256, k=8)
    >>> auto.d_in
    0
"""
D_SAE_AUTO = 0
"""Value of ``sae.d_sae`` that stands for 8 times the width at the hook.

Examples:
    >>> auto = TopKTrainingSAEConfig(d_in=128, d_sae=vp.sae.D_SAE_AUTO, k=8)
    >>> auto.d_sae
    0
"""
Auto = Literal["auto"]
AUTO: Auto = "auto"
"""Value of a field that the rules of ``_defaults.py`` fill in.

Examples:
    >>> cfg.lr == vp.sae.AUTO
    True
"""
