"""The one cache of the backends: bounded, by key or by an owner's identity, shared by threads and across a fork."""

from __future__ import annotations

import gc
import os
import signal
import threading
import weakref
from collections.abc import Callable

import pytest

from qpilots_fast.backends.caches import Cache


class Owner:
    """Equal to every other owner, and not to be hashed."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Owner)


class Value:
    pass


def must_not_make() -> Value:
    raise AssertionError("made what is there")


def test_a_value_is_made_once_a_key():
    cache = Cache(4)
    made = {key: cache.obtain(key, Value) for key in ("a", "b")}
    assert made["a"] is not made["b"]
    assert all(cache.obtain(key, must_not_make) is value for key, value in made.items())


def test_none_is_a_value():
    cache = Cache(2)
    assert cache.obtain("a", lambda: None) is None
    assert cache.obtain("a", must_not_make) is None


def test_the_value_used_longest_ago_goes_first():
    cache = Cache(2)
    first, second = (cache.obtain(key, Value) for key in "ab")
    cache.obtain("a", must_not_make)
    third = cache.obtain("c", Value)
    assert cache.values() == [first, third] and second not in cache.values()
    assert cache.obtain("b", Value) is not second


def test_what_is_dropped_may_use_the_cache_while_it_dies():
    cache, seen = Cache(1), []

    class Curious:
        def __del__(self) -> None:
            seen.append(len(cache.values()))

    cache.obtain("a", Curious)
    cache.obtain("b", Value)
    gc.collect()
    assert seen == [1]


def test_an_owner_counts_by_identity():
    cache, owners = Cache(4), (Owner(), Owner())
    made = [cache.obtain("k", Value, owner) for owner in owners]
    assert made[0] is not made[1]
    assert [cache.obtain("k", must_not_make, owner) for owner in owners] == made
    assert cache.obtain("l", Value, owners[0]) is not made[0]


def test_values_go_with_their_owner_at_once():
    cache, owner = Cache(4), Owner()
    values = [weakref.ref(cache.obtain(key, Value, owner)) for key in "ab"]
    kept = cache.obtain("a", Value)
    del owner
    assert [value() for value in values] == [None, None] and cache.values() == [kept]


def test_a_new_owner_at_an_old_address_gets_a_value_of_its_own():
    """The address of a dead owner is given to another before its values are forgotten."""
    cache, owner, other = Cache(4), Owner(), Owner()
    value = cache.obtain("k", Value, owner)
    (index,) = cache._entries
    cache._entries[("k", id(other))] = cache._entries.pop(index)
    assert cache.obtain("k", Value, other) is not value


def test_owners_are_bounded_too():
    cache, owners = Cache(3), [Owner() for _ in range(5)]
    made = [cache.obtain("k", Value, owner) for owner in owners]
    assert cache.values() == made[-3:]


def test_what_was_taken_is_made_anew():
    cache = Cache(4)
    made = {key: cache.obtain(key, Value) for key in (("x", 1), ("y", 1), ("x", 2))}
    taken = {cache.take(lambda key: key[0] == "x") for _ in range(2)}
    assert taken == {made["x", 1], made["x", 2]} and cache.take(lambda key: key[0] == "x") is None
    assert cache.obtain(("y", 1), must_not_make) is made["y", 1]
    assert cache.obtain(("x", 1), Value) not in taken


def in_threads(count: int, body: Callable[[int], None]) -> None:
    failures: list[BaseException] = []

    def run(index: int) -> None:
        try:
            body(index)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads) and not failures, failures


def test_two_threads_that_make_one_key_get_one_value():
    cache, both, found = Cache(4), threading.Barrier(2), [None, None]

    def make() -> Value:
        both.wait(timeout=30)  # both are making now
        return Value()

    in_threads(2, lambda i: found.__setitem__(i, cache.obtain("k", make)))
    assert found[0] is not None and found[0] is found[1] and cache.values() == found[:1]


def test_nobody_waits_for_another_key():
    cache, entered, release = Cache(4), threading.Event(), threading.Event()

    def slow() -> Value:
        entered.set()
        assert release.wait(timeout=30)
        return Value()

    def body(index: int) -> None:
        if index == 0:
            cache.obtain("slow", slow)
        else:
            assert entered.wait(timeout=30)
            cache.obtain("quick", Value)  # would wait for ever
            release.set()

    in_threads(2, body)


def test_threads_with_dying_owners():
    cache = Cache(8)

    def body(index: int) -> None:
        for i in range(2000):
            owner = Owner()
            value = cache.obtain(i % 3, Value, owner)
            assert cache.obtain(i % 3, must_not_make, owner) is value
            cache.obtain((index, i % 5), Value)
            cache.take(lambda key, i=i: key == (index, i % 5))
            assert len(cache.values()) <= 8

    in_threads(2, body)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_does_not_wait_for_a_thread_of_its_parent():
    cache, held, release = Cache(4), threading.Event(), threading.Event()
    cache.obtain("k", Value)

    def hold() -> None:
        with cache._lock:
            held.set()
            release.wait(timeout=60)

    holder = threading.Thread(target=hold)
    holder.start()
    assert held.wait(timeout=30)
    child = os.fork()
    if child == 0:
        signal.alarm(10)  # ends the child where it waits
        cache.obtain("k", Value)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    release.set()
    holder.join()
    assert status == 0
