"""What backends keep between calls: the values used last, by key."""

from __future__ import annotations

import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

_T = TypeVar("_T")
_every: weakref.WeakSet[Cache] = weakref.WeakSet()


class Cache:
    """A few values by key, for several threads at once.

    A value is made outside the lock, so that nobody waits for another key's: of two threads that make the same one at
    once, both get the first.

    Args:
        size: values kept; the one used longest ago goes first.
    """

    def __init__(self, size: int) -> None:
        self._size, self._lock = size, threading.RLock()  # reentrant: an owner may die wherever the lock is held
        # (key, id of the owner or None) -> (what tells whether the owner lives, value)
        self._entries: OrderedDict[tuple[Hashable, int | None], tuple[weakref.ref | None, Any]] = OrderedDict()
        _every.add(self)

    def obtain(self, key: Hashable, make: Callable[[], _T], owner: object | None = None) -> _T:
        """The value of a key, made where there is none.

        Args:
            owner: an object that stands for itself in the key, by identity, where its hash would cost more than the
                call; its values go when it does, so they must not refer to it.
        """
        index = (key, None if owner is None else id(owner))
        found = self._find(index, owner)
        if found is None:
            alive = None if owner is None else weakref.ref(owner, lambda _: self._forget(index))
            made, dropped = (alive, make()), []  # what is dropped dies after the lock was let go
            with self._lock:
                found = self._find(index, owner) or made
                if found is made:
                    self._entries[index] = made
                    self._entries.move_to_end(index)
                while len(self._entries) > self._size:
                    dropped.append(self._entries.popitem(last=False))
        return found[1]

    def find(self, key: Hashable, owner: object | None = None) -> Any | None:
        """The value of a key; None where there is none (any more)."""
        found = self._find((key, None if owner is None else id(owner)), owner)
        return None if found is None else found[1]

    def take(self, wanted: Callable[[Any], bool]) -> Any | None:
        """Gives away the value of one wanted key: the cache makes another when next asked. None where there is none."""
        with self._lock:
            index = next((index for index in self._entries if wanted(index[0])), None)
            return None if index is None else self._entries.pop(index)[1]

    def values(self) -> list[Any]:
        """What is kept, the one used longest ago first."""
        with self._lock:
            return [value for _, value in self._entries.values()]

    def _find(self, index: tuple[Hashable, int | None], owner: object | None) -> tuple[weakref.ref | None, Any] | None:
        with self._lock:
            found = self._entries.get(index)
            if found is None or (found[0] is not None and found[0]() is not owner):
                return None  # an id may have a new object
            self._entries.move_to_end(index)
            return found

    def _forget(self, index: tuple[Hashable, int | None]) -> None:
        with self._lock:
            self._entries.pop(index, None)

    def _renew_lock(self) -> None:
        self._lock = threading.RLock()


def _renew_locks() -> None:
    for cache in _every:
        cache._renew_lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_locks)  # a thread that held one is not in the child
