"""Python values that a module's output may depend on: attributes, and what its functions read from outside it."""

from __future__ import annotations

import dis
import enum
import functools
import gc
import inspect
import logging
import numbers
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .refusal import Refused
from .sources import is_mapping, named_sources

Fact = tuple[str, str, Any]  # path of the part, name of its attribute, value

_OF_ANY_MODULE = frozenset((*vars(nn.Module()), "_compiled_call_impl"))  # the last by .compile()
_NUMBERS = (numbers.Number, np.generic)  # none changes in place, and a copy may be the number itself
_CONSTANTS = (*_NUMBERS, str, bytes, type(None), torch.dtype, torch.device, enum.Enum, type, types.ModuleType)
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, functools.partial)


def own_attributes(module: nn.Module) -> Iterator[tuple[str, nn.Module, str, Any]]:
    """(path, part, name, value) of what users' classes keep beside parameters, buffers and submodules."""
    for path, part in module.named_modules():
        if not type(part).__module__.startswith("torch.") and not is_mapping(part):
            for name, value in list(vars(part).items()):
                if name not in _OF_ANY_MODULE:
                    yield path, part, name, value


# ---------------------------------------------------------------- surroundings


def surroundings(module: nn.Module) -> list[tuple[dict, str | None, Any]]:
    """Slots (see networks.Slots) that hold while what a forward runs through is what it is now.

    What a user's class defines, itself or by its bases, torch's own forwards, forwards of single parts, hooks of all
    modules, and the globals that functions read which a forward can reach.
    """
    slots: list[tuple[dict, str | None, Any]] = [(hooks, None, len(hooks)) for hooks in _HOOKS_OF_ALL]
    classes: dict[type, None] = {}
    for part in module.modules():
        methods = {"forward"}
        for cls in type(part).__mro__:
            if not cls.__module__.startswith("torch.") and cls is not object:
                hidden = (types.FunctionType, str, tuple, *_NUMBERS)
                methods |= {name for name, value in vars(cls).items() if isinstance(value, hidden)} - _KEPT_BY_PYTHON
        slots += [(vars(part), name, vars(part).get(name)) for name in sorted(methods)]  # an instance's own hides it
        classes.update(dict.fromkeys(type(part).__mro__))
    for cls in classes:
        held = _dict_of(cls)
        if cls.__module__.startswith("torch."):
            slots.append((held, "forward", held.get("forward")))
        elif cls is not object:
            slots += [(held, name, value) for name, value in held.items() if name not in _KEPT_BY_PYTHON]
            slots.append((held, None, len(held)))
    for function in _reached(type(part) for part in module.modules()):
        names = _global_names(function.__code__)
        slots += [(function.__globals__, name, function.__globals__.get(name)) for name in names]
    return slots


def hooks_of_all() -> bool:
    """Whether there are hooks that every module runs."""
    return any(_HOOKS_OF_ALL)


_HOOKS_OF_ALL: tuple[dict, ...] = (
    torch.nn.modules.module._global_forward_hooks,
    torch.nn.modules.module._global_forward_pre_hooks,
)
# Python itself changes these of a class, or they cannot matter to a forward
_KEPT_BY_PYTHON = frozenset(
    {"__doc__", "__annotations__", "__annotations_cache__", "__abstractmethods__", "__weakref__"}
)


def _dict_of(cls: type) -> dict[str, Any]:
    """The dict behind a class's read-only view of it."""
    found = gc.get_referents(vars(cls))
    return found[0] if found and isinstance(found[0], dict) else dict(vars(cls))


def _reached(classes: Iterable[type]) -> list[types.FunctionType]:
    """The forwards of users' classes, and what else of these classes they name: methods, properties and their like."""
    found: dict[int, types.FunctionType] = {}
    for cls in dict.fromkeys(classes):
        if cls.__module__.startswith("torch."):
            continue
        names, done = ["forward"], set[str]()
        while names:
            name = names.pop()
            if name in done:
                continue
            done.add(name)
            for function in _functions_of(inspect.getattr_static(cls, name, None)):
                if (function.__module__ or "").split(".")[0] != "torch":
                    found[id(function)] = function
                    names += _attribute_names(function.__code__)
    return list(found.values())


def _functions_of(value: Any) -> list[types.FunctionType]:
    """What runs when an attribute is read or called."""
    if isinstance(value, (staticmethod, classmethod)):
        value = value.__func__
    if isinstance(value, property):
        value = value.fget
    value = getattr(value, "func", value)  # cached_property, partialmethod
    value = inspect.unwrap(value) if callable(value) else value
    return [value] if isinstance(value, types.FunctionType) else []


def _attribute_names(code: types.CodeType) -> list[str]:
    inner = [name for c in code.co_consts if isinstance(c, types.CodeType) for name in _attribute_names(c)]
    return [*code.co_names, *inner]


# ---------------------------------------------------------------- functions


def check_functions(module: nn.Module) -> None:
    """Raises Refused where a function of the module reads what may change outside of it.

    A forward may read constants, functions and objects, but no tensors and arrays; a function held as an attribute
    (a call of qf.as_critic) no objects either.
    """
    for path, part in module.named_modules():
        if "forward" in vars(part):
            raise Refused(f"{path or 'it'} has a forward of its own, beside its class's")
        for function in _reached([type(part)]):
            owner = f"{type(part).__name__}.{function.__name__}"
            _refuse(function, owner, (Tensor, np.ndarray, nn.Module))
            for name in sorted(_global_names(function.__code__)):
                if _holds_numbers(function.__globals__.get(name)):
                    raise Refused(f"{owner} reads {name}, which is no part of it and may change")
    for _, _, name, value in own_attributes(module):
        if isinstance(value, _FUNCTIONS):
            _refuse(value, f"its function {name}", (object,))


def _holds_numbers(value: Any) -> bool:
    """Whether a value from outside is a collection or an object whose numbers may change while it stays the same."""
    if isinstance(value, (Tensor, nn.Module, logging.Logger, *_CONSTANTS, *_FUNCTIONS, tuple)):
        return False
    entries = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, set)) else None
    if entries is None:
        entries = [entry for _, entry in _numbers_of(value)]
    return any(isinstance(entry, (int, float)) or _holds_numbers(entry) for entry in entries)


def _numbers_of(value: Any) -> list[tuple[str, Any]]:
    """The numbers that an object's attributes are: its own, those in its slots, and those of its classes."""
    names = dict.fromkeys(vars(value)) if hasattr(value, "__dict__") else {}
    for cls in type(value).__mro__:
        if cls.__module__ != "builtins" and not cls.__module__.startswith("torch"):
            names |= dict.fromkeys(name for name in vars(cls) if not name.startswith("__"))
    found = [(name, inspect.getattr_static(value, name, None)) for name in names]
    found = [(n, getattr(value, n, None) if isinstance(e, types.MemberDescriptorType) else e) for n, e in found]
    return [(n, e) for n, e in found if isinstance(e, (int, float)) and not isinstance(e, (bool, enum.Enum))]


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
    """The plain attributes (numbers, strings, tuples of these, functions) that the output follows, or may follow.

    Functions, and the numbers and names that torch's own layers work with (eps, a slope), are not tried one by one.

    Args:
        probe: a copy of the user's module; its attributes are changed and put back.
        output: calls it.
    """
    expected = output()
    tried: list[Fact] = []
    found: list[Fact] = [
        (path, name, value)
        for path, part in probe.named_modules()
        if type(part).__module__.startswith("torch.") and not isinstance(part, nn.modules.dropout._DropoutNd)
        for name, value in vars(part).items()
        if name not in _OF_ANY_MODULE and isinstance(value, (float, str))
    ]
    for path, _, name, value in own_attributes(probe):
        if value is None or isinstance(value, _NUMBERS):
            tried.append((path, name, value))
        elif isinstance(value, (types.FunctionType, types.BuiltinFunctionType)):
            found.append((path, name, value))
        elif isinstance(value, (str, tuple)) and _is_plain(value):
            found.append((path, name, value))
    for path, part in probe.named_modules():
        names = dict.fromkeys(_numbers_of_classes(part)) if not is_mapping(part) else {}
        values = {name: inspect.getattr_static(part, name) for name in names if name not in vars(part)}
        tried += [(path, name, value) for name, value in values.items() if isinstance(value, _NUMBERS)]
    if _follows(probe, tried, output, expected):
        found += [fact for fact in tried if _follows(probe, [fact], output, expected)]
    return tuple(found)


def _numbers_of_classes(part: nn.Module) -> Iterator[str]:
    """The names of numbers that the user's classes of a part hold."""
    for cls in type(part).__mro__:
        if not cls.__module__.startswith("torch.") and cls is not object:
            yield from (name for name, value in vars(cls).items() if isinstance(value, _NUMBERS))


def fact_slots(part: nn.Module, name: str) -> list[tuple[dict, str | None, Any]]:
    """Slots (see networks.Slots) that hold while a part's attribute, its own or its class's, is what it is now."""
    own = vars(part)
    slots: list[tuple[dict, str | None, Any]] = [(own, name, own.get(name))]
    cls = next((cls for cls in type(part).__mro__ if name in vars(cls)), None)
    if name not in own and cls is not None:
        slots.append((_dict_of(cls), name, vars(cls)[name]))
    return slots


def _is_plain(value: Any) -> bool:
    return all(map(_is_plain, value)) if isinstance(value, tuple) else isinstance(value, (int, float, str, type(None)))


def _follows(probe: nn.Module, facts: list[Fact], output: Callable[[], Tensor], expected: Tensor) -> bool:
    """Whether other numbers in these places make another output."""
    holders = [(vars(probe.get_submodule(path)), name) for path, name, _ in facts]
    before = [dict(holder) for holder, _ in holders]
    for (holder, name), (_, _, value) in zip(holders, facts):
        holder[name] = 1.0 if value is None else not value if isinstance(value, (bool, np.bool_)) else value + 1
    try:
        return not _same(output, expected)
    finally:
        for (holder, name), was in zip(holders, before):
            holder.pop(name)
            if name in was:
                holder[name] = was[name]


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
    changed = False
    if not isinstance(value, (dict, list)):
        for name, number in _numbers_of(value):  # in its slots, and of its class
            if not isinstance(holder, dict) or name not in holder:
                try:
                    setattr(value, name, number * 1.5 + 0.75)
                    changed = True
                except Exception:  # it takes no assignment: nothing that changes
                    continue
    if not isinstance(holder, (dict, list)):
        return changed
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
