"""CUDA graphs without a GPU: what a backend queues is recorded, and queued again with the same pointers.

As in a real graph, nothing runs while it is recorded, and nothing of Python runs in a replay.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor

from qpilots_fast.backends.captured import CapturedSampler

Record = Callable[[Callable[[], object]], None]


class RecordedGraph:
    """`Graph` over a place where launches can be caught.

    Args:
        catch: replaces what launches by a function that calls back with each launch, until what it returns is called.
        warm_up: whether the function runs once before it is recorded, as on a GPU.
    """

    def __init__(self, catch: Callable[[Record], Callable[[], object]], warm_up: bool = True) -> None:
        self._catch, self._warm_up, self.launches = catch, warm_up, list[Callable[[], object]]()

    def record(self, enqueue: Callable[[], Any]) -> Any:
        if self._warm_up:
            enqueue()
        release = self._catch(self.launches.append)
        try:
            return enqueue()
        finally:
            release()

    def replay(self) -> None:
        for launch in self.launches:
            launch()


def tensors_in(value: Any) -> Iterable[Tensor]:
    """Every tensor that a value refers to through tuples, lists, dicts and dataclasses, and objects of ours."""
    seen: set[int] = set()
    todo = [value]
    while todo:
        value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            todo += value.values()
        elif isinstance(value, (list, tuple, set)):
            todo += value
        elif dataclasses.is_dataclass(value) or type(value).__module__.startswith("qpilots_fast"):
            todo += vars(value).values()


def not_held(captured: CapturedSampler, ranges: Iterable[tuple[int, int, str]]) -> list[str]:
    """Names of the (address, bytes, name) that lie in no memory which the captured sampler keeps alive."""
    storages: Sequence[Any] = [
        tensor.untyped_storage() for tensor in tensors_in((captured.holds, captured._actions, captured._inputs))
    ]
    spans = [(storage.data_ptr(), storage.data_ptr() + storage.nbytes()) for storage in storages]
    return [
        name for start, size, name in ranges if not any(begin <= start and start + size <= end for begin, end in spans)
    ]
