"""Observations of any shape: dicts, lists, tuples and dataclasses of tensors, however nested."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any


def _is_branch(tree: Any) -> bool:
    return isinstance(tree, (Mapping, list, tuple)) or (dataclasses.is_dataclass(tree) and not isinstance(tree, type))


def _with_children(tree: Any, function: Callable[[Any], Any]) -> Any:
    """The branch with function(child) in place of each child, of the same type; itself where no child changed."""
    if isinstance(tree, (list, tuple)):
        entries = [function(entry) for entry in tree]
        if all(new is old for new, old in zip(entries, tree)):
            return tree
        return type(tree)(*entries) if hasattr(tree, "_fields") else type(tree)(entries)
    of_mapping = isinstance(tree, Mapping)
    names = list(tree) if of_mapping else [field.name for field in dataclasses.fields(tree)]
    olds = {name: tree[name] if of_mapping else getattr(tree, name, None) for name in names}
    changed = {name: new for name, old in olds.items() if (new := function(old)) is not old}
    if changed:
        tree = copy.copy(tree)
        for name, value in changed.items():
            if of_mapping:
                tree[name] = value
            else:
                object.__setattr__(tree, name, value)  # frozen ones too
    return tree


def map_leaves(function: Callable[[Any], Any], tree: Any) -> Any:
    """The tree with function(leaf) in place of each leaf; the same object where no leaf changed.

    Mappings, lists, tuples (named ones too) and dataclasses are branches; anything else is a leaf.
    """
    if _is_branch(tree):
        return _with_children(tree, lambda child: map_leaves(function, child))
    return function(tree)


def common_rows(tree: Any) -> int | None:
    """The first dimension that all tensors and arrays of the tree share, some of them with further ones; else None."""
    shapes: list[tuple[int, ...]] = []

    def visit(value: Any) -> Any:
        if not _is_branch(value):
            shapes.append(tuple(getattr(value, "shape", ())))
            return value
        return _with_children(value, visit)

    visit(tree)
    shapes = [shape for shape in shapes if shape]
    first = {shape[0] for shape in shapes}
    return first.pop() if len(first) == 1 and any(len(shape) > 1 for shape in shapes) else None


def with_rows(tree: Any, size: int, other: int) -> Any:
    """The tree with `other` rows in place of `size`: the last ones left out, or the first one repeated.

    Rows are the first dimension of a tensor or array where it is size, and the entries of a list or tuple of length
    size that holds no such tensor (one text an observation). What has no rows stays as it is.
    """
    rows = [index if index < size else 0 for index in range(other)]

    def visit(value: Any) -> Any:
        if not _is_branch(value):
            shape = getattr(value, "shape", None)
            return value[rows] if shape is not None and len(shape) and shape[0] == size else value
        new = _with_children(value, visit)
        if new is value and type(value) in (list, tuple) and len(value) == size:
            return type(value)(value[row] for row in rows)
        return new

    return visit(tree)
