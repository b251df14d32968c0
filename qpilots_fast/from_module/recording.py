"""One call of a user's module, as the operations on tensors that it was made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from .calling import UserCall
from .refusal import Refused


class Operation(NamedTuple):
    """One operation of PyTorch's core, with what it was given and gave."""

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any

    @property
    def name(self) -> str:
        """Without namespace and overload: "addmm"; that of an operation in place has no underscore at its end."""
        name = self.function.overloadpacket.__name__
        return name[:-1] if name.endswith("_") and not name.startswith("_") else name


class Place(NamedTuple):
    """A tensor of a module's call, by the call of a function of torch that gives it or takes it.

    Args:
        call: which of the calls, counted from 0. function: its name, which must be the same again.
        is_output: whether it is among what the function returns; else among its arguments.
        number: which of these tensors.
    """

    call: int
    function: str
    is_output: bool
    number: int


@dataclass
class Recording:
    """What one call did.

    Args:
        operations: in their order. calls: (name, tensors given, tensors returned) of each function of torch.
    """

    operations: list[Operation] = field(default_factory=list)
    calls: list[tuple[str, list[Tensor], list[Tensor]]] = field(default_factory=list)
    output: Any = None

    def place_of(self, tensor: Tensor) -> Place | None:
        """Where a tensor of the call stands; None where no function of torch was called on it."""
        for is_output in (True, False):
            for number, (name, given, returned) in enumerate(self.calls):
                for index, seen in enumerate(returned if is_output else given):
                    if seen is tensor:
                        return Place(number, name, is_output, index)
        return None

    def tensors_like(self, value: Tensor) -> Iterator[Tensor]:
        """The tensors of the call that have these numbers."""
        for _, given, returned in self.calls:
            for tensor in (*returned, *given):
                if tensor.shape == value.shape and tensor.dtype == value.dtype and torch.equal(tensor, value):
                    yield tensor


def tensors_in(value: Any) -> list[Tensor]:
    """Every tensor of nested lists, tuples and dicts."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for entry in value for t in tensors_in(entry)] if isinstance(value, (list, tuple)) else []


def _name(function: Any) -> str:
    return getattr(function, "__name__", type(function).__name__)


class _Operations(TorchDispatchMode):
    def __init__(self, found: Recording) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self.found.operations.append(Operation(func, args, kwargs or {}, output))
        return output


class _Calls(TorchFunctionMode):
    def __init__(self, found: Recording) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = tensors_in((args, kwargs or {}))
        output = func(*args, **(kwargs or {}))
        self.found.calls.append((_name(func), given, tensors_in(output)))
        return output


def record(module: nn.Module, call: UserCall, blocks: Sequence[Tensor]) -> Recording:
    """Calls a copy of the module without gradients, and keeps every tensor on the way."""
    found = Recording()
    with torch.no_grad(), _Calls(found), _Operations(found):
        found.output = call(module, blocks)
    return found


@contextmanager
def undisturbed(device: str, compiled: bool) -> Iterator[None]:
    """A part of a user's call as it is by itself: without gradients, outside of inference mode and autocast.

    compiled: whether torch.compile runs a part of the module; it is then called without.
    """
    with ExitStack() as stack:  # each costs microseconds at every call
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        if torch.is_autocast_enabled(device):
            stack.enter_context(torch.autocast(device, enabled=False))
        if compiled:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.no_grad())
        yield


class _Reached(Exception):
    """Every place was passed: the rest of the module need not run."""


class _At(TorchFunctionMode):
    """Takes the tensors at these places, and ends the call after the last; of this thread alone."""

    def __init__(self, places: Sequence[Place]) -> None:
        super().__init__()
        self.places, self.passed, self.found = places, 0, {}  # type: ignore[var-annotated]
        self.last = max(place.call for place in places)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        here = [place for place in self.places if place.call == self.passed]
        self.passed += 1
        if any(place.function != _name(func) for place in here):
            raise Refused("which operations it runs differs from call to call")
        output = func(*args, **(kwargs or {}))
        for place in here:
            tensors = tensors_in(output) if place.is_output else tensors_in((args, kwargs or {}))
            self.found[place] = tensors[place.number].detach().clone()
        if self.passed > self.last:
            raise _Reached
        return output


def read_at(
    places: Sequence[Place], module: nn.Module, call: UserCall, blocks: Sequence[Tensor], compiled: bool = False
) -> list[Tensor]:
    """The tensors at these places when the module is called on these blocks.

    compiled: whether torch.compile runs a part of the module; it is then called without.
    """
    at = _At(places)
    with undisturbed(blocks[0].device.type, compiled):
        try:
            with at:
                call(module, blocks)
        except _Reached:
            pass
    if len(at.found) < len(set(places)):
        raise Refused("which operations it runs differs from call to call")
    return [at.found[place] for place in places]
