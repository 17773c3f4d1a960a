"""Shared fixtures. Every jaxtyping annotation of the package is enforced while the tests run."""

from jaxtyping import install_import_hook

install_import_hook("vision_plugin", "beartype.beartype")
