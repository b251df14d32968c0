"""Python values that a module's output may depend on: attributes, and what its functions read from outside it."""

from __future__ import annotations

import dis
import enum
import functools
import inspect
import logging
import types
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .refusal import Refused
from .sources import is_mapping, named_sources

Fact = tuple[str, str, Any]  # path of the part, name of its attribute, value

_OF_ANY_MODULE = frozenset(vars(nn.Module()))
_CONSTANTS = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device, enum.Enum, type, types.ModuleType)
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, functools.partial)


def own_attributes(module: nn.Module) -> Iterator[tuple[str, nn.Module, str, Any]]:
    """(path, part, name, value) of what users' classes keep beside parameters, buffers and submodules."""
    for path, part in module.named_modules():
        if not type(part).__module__.startswith("torch.") and not is_mapping(part):
            for name, value in list(vars(part).items()):
                if name not in _OF_ANY_MODULE:
                    yield path, part, name, value


# ---------------------------------------------------------------- functions


def check_functions(module: nn.Module) -> None:
    """Raises Refused where a function of the module reads what may change outside of it.

    A forward may read constants, functions and objects, but no tensors and arrays; a function held as an attribute
    (a call of qf.as_critic) no objects either.
    """
    for path, part in module.named_modules():
        if "forward" in vars(part):
            raise Refused(f"{path or 'it'} has a forward of its own, beside its class's")
        _refuse(type(part).forward, f"{type(part).__name__}.forward", (Tensor, np.ndarray, nn.Module))
    for _, _, name, value in own_attributes(module):
        if isinstance(value, _FUNCTIONS):
            _refuse(value, f"its function {name}", (object,))


def _refuse(function: Any, owner: str, changing: tuple[type, ...]) -> None:
    name = _read_from_outside(function, changing, set())
    if name is not None:
        raise Refused(f"{owner} reads {name}, which is no part of it and may change")


def _read_from_outside(function: Any, changing: tuple[type, ...], seen: set[int]) -> str | None:
    """The name of something of these types that a function reads from its surroundings."""
    if isinstance(function, functools.partial):
        values = {**dict(zip(map("its argument {}".format, count()), function.args)), **function.keywords}
        return _first_changing(values, changing, seen) or _read_from_outside(function.func, changing, seen)
    if isinstance(function, types.MethodType):
        return f"the object that {function.__name__} is bound to"
    if not isinstance(function, types.FunctionType) or id(function) in seen:
        return None
    if (function.__module__ or "").split(".")[0] == "torch":
        return None
    seen.add(id(function))
    try:
        read = inspect.getclosurevars(function)
    except ValueError:  # a cell that is still empty
        return "a variable that is not there yet"
    named = _global_names(function.__code__)  # inspect takes attributes for globals of the same name
    outside = {name: value for name, value in function.__globals__.items() if name in named}
    return _first_changing({**outside, **read.nonlocals}, changing, seen)


def _global_names(code: types.CodeType) -> set[str]:
    """The globals that a function's code reads, its inner functions' included."""
    names = {step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return names.union(*(_global_names(inner) for inner in code.co_consts if isinstance(inner, types.CodeType)))


def _first_changing(values: dict[str, Any], changing: tuple[type, ...], seen: set[int]) -> str | None:
    for name, value in values.items():
        if isinstance(value, _FUNCTIONS):
            inner = _read_from_outside(value, changing, seen)
            if inner is not None:
                return inner
        elif isinstance(value, changing) and not isinstance(value, (*_CONSTANTS, logging.Logger)):
            return name
    return None


# ---------------------------------------------------------------- attributes


def facts_read(probe: nn.Module, output: Callable[[], Tensor]) -> tuple[Fact, ...]:
    """The plain attributes (numbers, strings, tuples of these) that the output follows, or may follow.

    Args:
        probe: a copy of the user's module; its attributes are changed and put back.
        output: calls it.
    """
    expected = output()
    numbers: list[Fact] = []
    found: list[Fact] = []
    for path, _, name, value in own_attributes(probe):
        if isinstance(value, (int, float)):  # bool too
            numbers.append((path, name, value))
        elif isinstance(value, (str, tuple)) and _is_plain(value):
            found.append((path, name, value))
    if _follows(probe, numbers, output, expected):
        found += [fact for fact in numbers if _follows(probe, [fact], output, expected)]
    return tuple(found)


def _is_plain(value: Any) -> bool:
    return all(map(_is_plain, value)) if isinstance(value, tuple) else isinstance(value, (int, float, str, type(None)))


def _follows(probe: nn.Module, facts: list[Fact], output: Callable[[], Tensor], expected: Tensor) -> bool:
    """Whether other numbers in these places make another output."""
    holders = [(vars(probe.get_submodule(path)), name, value) for path, name, value in facts]
    for holder, name, value in holders:
        holder[name] = not value if isinstance(value, bool) else value + 1
    try:
        return not _same(output, expected)
    finally:
        for holder, name, value in holders:
            holder[name] = value


def check_objects(probe: nn.Module, output: Callable[[], Tensor]) -> None:
    """Raises Refused where the output follows numbers inside an attribute that is a list, dict, array or object.

    Tensors that `named_sources` finds were looked at before. Leaves the probe changed.
    """
    expected = output()
    tensors = {id(tensor) for _, tensor in named_sources(probe)}
    for _, _, name, value in own_attributes(probe):
        if isinstance(value, (Tensor, nn.Module, *_CONSTANTS, *_FUNCTIONS)):
            continue
        if _change_numbers(value, set(tensors)) and not _same(output, expected):
            raise Refused(
                f"its output depends on its attribute {name} ({type(value).__name__}), which a packed network would "
                "not follow when it changes"
            )


def _change_numbers(value: Any, seen: set[int]) -> bool:
    """Changes, in place, every number inside; whether there was any."""
    if id(value) in seen or len(seen) > 10_000 or isinstance(value, (nn.Module, *_FUNCTIONS, type, types.ModuleType)):
        return False
    seen.add(id(value))
    if isinstance(value, Tensor):
        changes = value.is_floating_point() and not value.is_meta
        if changes:
            with torch.no_grad():
                value.mul_(1.5).add_(0.75)
        return changes
    if isinstance(value, np.ndarray):
        if value.dtype.kind != "f" or not value.flags.writeable:
            return False
        value *= 1.5
        value += 0.75
        return True
    holder: Any = value if isinstance(value, (dict, list)) else getattr(value, "__dict__", None)
    if not isinstance(holder, (dict, list)):
        return False
    changed = False
    for key, entry in list(holder.items() if isinstance(holder, dict) else enumerate(holder)):
        if isinstance(entry, float) or (isinstance(entry, int) and not isinstance(entry, bool)):
            holder[key] = entry * 1.5 + 0.75
            changed = True
        else:
            changed |= _change_numbers(entry, seen)
    return changed


def _same(output: Callable[[], Tensor], expected: Tensor) -> bool:
    try:
        return torch.equal(output(), expected)
    except Exception:  # it could not even be called
        return False
