"""Values that stand for a decision that the data and the run make."""

from __future__ import annotations

from typing import Literal

D_IN_OF_MODEL = 0
"""``sae.d_in``, or a transcoder's ``d_out``, of this value is replaced by the width at the hook."""
D_SAE_AUTO = 0
"""``sae.d_sae`` of this value is replaced by 8 times the width at the hook."""
Auto = Literal["auto"]
AUTO: Auto = "auto"
"""A field of this value follows from the data and the run; see ``_defaults.py``."""
