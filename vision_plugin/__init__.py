"""Sparse autoencoders for vision transformers, inside TransformerLens and SAELens.

Importing this package is quick: torch and the hosts are imported by the first attribute that
needs them.
"""

from __future__ import annotations

__version__ = "0.1.0"
