"""How a user's module is called, and how its output becomes ours."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..spec import INPUT_ORDER
from ..times import time_features
from .refusal import Refused

BLOCKS_OF_KIND = INPUT_ORDER  # our forward takes the blocks in this order, whatever the order of the columns
TIMES = ("t", "s", "u")


@dataclass(frozen=True)
class UserCall:
    """Calls a module on the blocks of its kind.

    Args:
        kind: "flow", "critic" or "meta_flow_map".
        style: "separate": module(obs, actions, t [B, 1]); "flat_time": t [B]; "concatenated": module(columns).
        custom: the user's own adaptor (module, *blocks) -> output; overrides style.
        input_order, time_embedding, time_embedding_dim: of the columns, for "concatenated".
    """

    kind: str
    style: str = "separate"
    custom: Callable[..., Any] | None = None
    input_order: tuple[str, ...] = ()
    time_embedding: str = "raw"
    time_embedding_dim: int = 1

    def __call__(self, module: nn.Module, blocks: Sequence[Tensor]) -> Any:
        if self.custom is not None:
            return self.custom(module, *blocks)
        if isinstance(module, nn.ModuleList):
            return [self._call(member, blocks) for member in module]
        return self._call(module, blocks)

    def _call(self, module: nn.Module, blocks: Sequence[Tensor]) -> Any:
        names = BLOCKS_OF_KIND[self.kind]
        if self.style == "concatenated":
            named = dict(zip(names, blocks))
            return module(torch.cat([self._column(name, named[name], blocks[1]) for name in self.input_order], dim=-1))
        if self.style == "flat_time":
            blocks = [block.squeeze(-1) if name in TIMES else block for name, block in zip(names, blocks)]
        return module(*blocks)

    def _column(self, name: str, block: Tensor, like: Tensor) -> Tensor:
        if name not in TIMES:
            return block
        return time_features(block, self.time_embedding, self.time_embedding_dim).to(like.dtype)

    def __str__(self) -> str:
        if self.custom is not None:
            return "call(module, " + ", ".join(BLOCKS_OF_KIND[self.kind]) + ")"
        if self.style == "concatenated":
            return "module(torch.cat([" + ", ".join(self.input_order) + "], -1))"
        time = "[B]" if self.style == "flat_time" else "[B, 1]"
        names = [f"{name} {time}" if name in TIMES else name for name in BLOCKS_OF_KIND[self.kind]]
        return "module(" + ", ".join(names) + ")"


_ARGUMENT_NAMES = {
    "obs": ("obs", "observation", "observations", "state", "states", "s", "o"),
    "actions": ("action", "actions", "act", "acts", "a", "noisy_action", "noisy_actions", "x", "x_t", "xbar"),
    "t": ("t", "time", "times", "timestep", "timesteps", "tau"),
}


def check_argument_order(module: nn.Module, kind: str) -> None:
    """Raises Refused where the names of forward's arguments contradict (obs, actions, t), which numbers cannot tell."""
    if isinstance(module, nn.ModuleList):
        for member in module:
            check_argument_order(member, kind)
        return
    if kind == "meta_flow_map":
        return
    names = [
        p.name
        for p in inspect.signature(module.forward).parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    roles = [next((role for role, known in _ARGUMENT_NAMES.items() if n.lower() in known), None) for n in names]
    ranks = [list(_ARGUMENT_NAMES).index(role) for role in roles if role is not None]
    if ranks != sorted(ranks):
        wanted = ", ".join(BLOCKS_OF_KIND[kind])
        raise Refused(
            f"its forward takes ({', '.join(names)}), and is called with ({wanted}); give the hint call, e.g. "
            f"call=lambda m, {wanted}: m(...)"
        )


@dataclass(frozen=True)
class OutputLayout:
    """How a module's output becomes velocity [B, A], mapped points [B, A], or q_values [E, B].

    Args:
        form: "plain" (flow, meta flow map), "list" (E tensors [B] or [B, 1]), "member_first" ([E, B] or [E, B, 1]),
            "batch_first" ([B, E] or [B, E, 1]), "single" ([B]).
        is_velocity: a meta flow map that returns vhat rather than the mapped point.
    """

    form: str
    is_velocity: bool = False

    def apply(self, output: Any) -> Tensor:
        if self.form == "plain":
            return output
        if self.form == "list":
            return torch.stack([value.squeeze(-1) if value.ndim == 2 else value for value in output])
        if self.form == "single":
            return output.unsqueeze(0)
        if output.ndim == 3:
            output = output.squeeze(-1)
        return output if self.form == "member_first" else output.transpose(0, 1)


def describe(output: Any) -> str:
    """An output's structure, for messages."""
    if isinstance(output, Tensor):
        return str(list(output.shape))
    if isinstance(output, (list, tuple)):
        return f"{type(output).__name__} of " + ", ".join(describe(value) for value in output)
    return type(output).__name__


def critic_layout(output: Any, batch_size: int, members: int | None = None) -> tuple[OutputLayout, int] | None:
    """The layout of a critic's output, and its number of members; batch_size must be no plausible E."""
    if isinstance(output, (list, tuple)):
        if not output or not all(
            isinstance(value, Tensor) and tuple(value.shape) in ((batch_size,), (batch_size, 1)) for value in output
        ):
            return None
        return OutputLayout("list"), len(output)
    if not isinstance(output, Tensor):
        return None
    shape = tuple(output.shape)
    if shape == (batch_size,):
        return OutputLayout("single"), 1
    if len(shape) == 3 and shape[-1] == 1:
        shape = shape[:2]
    if len(shape) != 2 or (shape[0] == batch_size) == (shape[1] == batch_size):
        return None
    first = shape[1] == batch_size
    count = shape[0] if first else shape[1]
    if members is not None and count != members:
        return None
    return OutputLayout("member_first" if first else "batch_first"), count
