"""Parameters of a packed network that are no tensor of the user's module: constants, and what follows its tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .sources import Source, Strided


class Applied(NamedTuple):
    """An operation of PyTorch's core on expressions.

    Args:
        name: as "mul.Tensor". output: which one, of an operation that gives several.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: int | None = None


Expression = Source | Tensor | Applied
_OF_A_DTYPE = ("dtype", "device", "layout", "pin_memory")


def evaluate(expression: Any, module: nn.Module, like: Tensor) -> Any:
    """The expression's value now; constants as `like` in dtype and device."""
    if isinstance(expression, Source):
        return expression.find(module)
    if isinstance(expression, Tensor):
        return expression.to(like) if expression.is_floating_point() else expression.to(like.device)
    if isinstance(expression, Applied):
        args = [evaluate(arg, module, like) for arg in expression.args]
        if expression.name.startswith(("_to_copy", "detach")):
            return args[0]
        kwargs = {name: value for name, value in expression.kwargs.items() if name not in _OF_A_DTYPE}
        packet, overload = expression.name.split(".")
        value = getattr(getattr(torch.ops.aten, packet), overload)(*args, **kwargs)
        return value if expression.output is None else value[expression.output]
    if isinstance(expression, (list, tuple)):
        return [evaluate(entry, module, like) for entry in expression]
    return expression


def sources_of(expression: Any) -> Iterator[Source]:
    """The tensors of the module that an expression reads."""
    if isinstance(expression, Source):
        yield expression
    elif isinstance(expression, Applied):
        yield from sources_of([*expression.args, *expression.kwargs.values()])
    elif isinstance(expression, (list, tuple)):
        for entry in expression:
            yield from sources_of(entry)


def _vector(tensor: Tensor) -> Tensor:
    return tensor


FORMS: dict[str, Callable[[Tensor], Tensor]] = {"": _vector, "diagonal": torch.diag}


@dataclass(frozen=True)
class Held:
    """A parameter that the packed network holds itself, computed anew from the module's tensors at every call.

    Args:
        expression: of these tensors; one without any is a constant.
        view: of the expression's value. form: what is made of that view, of FORMS.
    """

    expression: Expression
    view: Strided
    form: str = ""
    path: tuple[str, ...] = ()

    def __str__(self) -> str:
        read = ", ".join(dict.fromkeys(map(str, sources_of(self.expression))))
        return f"made of {read}" if read else "constant"

    @property
    def is_constant(self) -> bool:
        return next(sources_of(self.expression), None) is None

    def compute(self, module: nn.Module, like: Tensor) -> Tensor:
        """Its value now, in like's dtype, on its device."""
        value = evaluate(self.expression, module, like)
        return FORMS[self.form](self.view.of(value.contiguous().to(like)))

    def find(self, module: nn.Module) -> Tensor:
        """Its value now, from the root module."""
        like = next((p for p in module.parameters() if p.is_floating_point()), None)
        return self.compute(module, torch.empty(()) if like is None else like)
