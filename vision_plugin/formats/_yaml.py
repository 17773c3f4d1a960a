"""YAML configs, in time and memory bounded by their text.

PyYAML's safe loader builds no foreign class, but it follows an alias as often as one is used, reads
base-60 numbers in quadratic time, and takes a second for each 50 kB.
"""

from __future__ import annotations

from typing import Any

import yaml

from vision_plugin.formats._errors import CorruptCheckpointError

MAX_YAML_BYTES = 1 << 16
_MAX_NODES = 2_000
_MAX_DEPTH = 32
_MAX_NUMBER = 64


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML ships no types
    """PyYAML's safe loader, without merging, without long numbers, and not deep.

    Its scanner looks at every open bracket again for each one more.
    """

    n_nodes = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Read a value, where there are not too many before it."""
        self.n_nodes += 1
        if self.n_nodes > _MAX_NODES:
            raise _too_many()
        return super().compose_node(parent, index)

    def fetch_flow_collection_start(self, token: Any) -> None:
        """Open a bracket, where not too many are open."""
        if self.flow_level >= _MAX_DEPTH:
            raise _too_deep()
        super().fetch_flow_collection_start(token)

    def add_indent(self, column: int) -> bool:
        """Indent a block, where not too many are indented."""
        if len(self.indents) >= _MAX_DEPTH:
            raise _too_deep()
        return bool(super().add_indent(column))

    def flatten_mapping(self, node: Any) -> None:
        """Refuse `<<`, whose copies of copies grow without limit."""
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                raise CorruptCheckpointError("it merges mappings with `<<`: write them out.")

    def construct_scalar(self, node: Any) -> Any:
        """Return a scalar's text, if it is not an endless number."""
        is_text = node.tag == "tag:yaml.org,2002:str"
        if not is_text and isinstance(node.value, str) and len(node.value) > _MAX_NUMBER:
            raise CorruptCheckpointError(f"it holds a number of {len(node.value)} digits.")
        return super().construct_scalar(node)


def parse_yaml(text: str) -> Any:
    """Return the value of a YAML document.

    Raises:
        CorruptCheckpointError: It is too large, too deep, or grows too much when it is read.
        yaml.YAMLError: It is not YAML.
    """
    if len(text) > MAX_YAML_BYTES:
        raise CorruptCheckpointError(
            f"it has {len(text):,} characters; YAML is read up to {MAX_YAML_BYTES:,}. Write it as "
            "JSON."
        )
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check_growth(node)
        return loader.construct_document(node)
    except RecursionError as error:
        raise _too_deep() from error
    finally:
        loader.dispose()


def _check_growth(root: Any) -> None:
    """Raise if the document has too many values, each counted as often as it is used."""
    level, n_nodes = [root], 0
    for _ in range(_MAX_DEPTH):
        n_nodes += sum(len(node.value) for node in level if isinstance(node, yaml.CollectionNode))
        if n_nodes > _MAX_NODES:
            raise _too_many()
        level = [inner for node in level for inner in _inside(node)]
        if not level:
            return
    raise _too_deep()


def _inside(node: Any) -> list[Any]:
    if isinstance(node, yaml.MappingNode):
        return [inner for pair in node.value for inner in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _too_many() -> CorruptCheckpointError:
    return CorruptCheckpointError(f"it has more than {_MAX_NODES:,} values, aliases followed.")


def _too_deep() -> CorruptCheckpointError:
    return CorruptCheckpointError(f"it is nested more than {_MAX_DEPTH} deep.")
