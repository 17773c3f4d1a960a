"""Architecture adapters, one file per model family, imported as ``vision_plugin.hooks``.

TransformerLens finds them through the entry-point group ``transformer_lens.architectures``.
"""

if __name__ != "vision_plugin.hooks":
    raise ImportError(
        f"the adapters are the package 'vision_plugin.hooks', but were imported as {__name__!r}. "
        "Install the project (pip install -e .) and import vision_plugin.hooks."
    )

# TransformerLens first: its import loads every adapter, and must not find this package's modules
# half imported.
import transformer_lens  # noqa: F401
