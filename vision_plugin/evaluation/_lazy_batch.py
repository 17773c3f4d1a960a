"""A batch for metrics of which each entry is made when a metric asks for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any


class LazyBatch(Mapping[str, Any]):
    """Values by name that are made when they are first read."""

    def __init__(self, makers: Mapping[str, Callable[[], Any]]) -> None:
        self._makers = dict(makers)
        self._made: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._made:
            self._made[name] = self._makers[name]()
        return self._made[name]

    def __contains__(self, name: object) -> bool:
        return name in self._makers

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)

    def plus(self, **values: Any) -> LazyBatch:
        """The same with more values; each of the others is still made once for both."""
        same = {name: partial(self.__getitem__, name) for name in self._makers}
        more = LazyBatch(same | dict.fromkeys(values, dict))
        more._made = values
        return more
