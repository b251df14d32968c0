"""How a user's module is called, and how its output becomes ours."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..callables import is_list
from ..critic_outputs import Layout, describe, layout_of, read_output
from ..spec import INPUT_ORDER
from ..times import time_features
from .refusal import Refused

BLOCKS_OF_KIND = INPUT_ORDER  # our forward takes the blocks in this order, whatever the order of the columns
TIMES = ("t", "s", "u")
ACTIONS = ("actions", "noisy_actions", "xbar")
SCALES = (1.0, 4.0, 40.0)  # of random inputs: larger ones find a clip inside the module


@dataclass(frozen=True)
class UserCall:
    """Calls a module on the blocks of its kind.

    Args:
        kind: "flow", "critic" or "meta_flow_map".
        style: "separate": module(obs, actions, t [B, 1]); "flat_time": t [B]; "concatenated": module(columns).
        custom: the user's own adaptor (module, *blocks) -> output; overrides style.
        input_order, time_embedding, time_embedding_dim: of the columns, for "concatenated".
        chunk: (C, D) where the module takes actions [B, C, D], and a flow or map returns such.
        obs: what the module is shown in place of obs, a function of obs.
        dims: of the flow's actions, those that the critic is shown, in this order; None: all.
        action_scale, action_shift: the critic is shown actions * scale + shift; read at each call.
        output: which part of what it returns is the output: a key, an attribute's name, or a function of it.
        dtype: what the module is called in, where it casts to that itself; None: the inputs' own.
    """

    kind: str
    style: str = "separate"
    custom: Callable[..., Any] | None = None
    input_order: tuple[str, ...] = ()
    time_embedding: str = "raw"
    time_embedding_dim: int = 1
    chunk: tuple[int, int] | None = None
    obs: Callable[[Any], Any] | None = None
    dims: tuple[int, ...] | None = None
    action_scale: Tensor | float | None = None
    action_shift: Tensor | float | None = None
    output: Any = None
    dtype: torch.dtype | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """Tensors of its own that what the module is shown follows."""
        return [value for value in (self.action_scale, self.action_shift) if isinstance(value, Tensor)]

    def __call__(self, module: nn.Module, blocks: Sequence[Tensor]) -> Any:
        blocks = self._shown(blocks)
        if self.chunk is not None:
            names = BLOCKS_OF_KIND[self.kind]
            blocks = [b.unflatten(-1, self.chunk) if name in ACTIONS else b for name, b in zip(names, blocks)]
        if self.custom is not None:
            output = self.custom(module, *blocks)
        elif is_list(module):
            output = [self._call(member, blocks) for member in module]
        else:
            output = self._call(module, blocks)
        if self.output is not None:
            output = _part(output, self.output)
        if self.chunk is None or self.kind == "critic" or not isinstance(output, Tensor):
            return output
        return output.flatten(1)

    def _shown(self, blocks: Sequence[Tensor]) -> list[Any]:
        """The blocks as the module is shown them."""
        obs, actions, *times = blocks if self.dtype is None else [block.to(self.dtype) for block in blocks]
        if self.obs is not None:
            obs = _features(self.obs, obs)
        if self.dims is not None:
            actions = actions[..., list(self.dims)]
        if self.action_scale is not None:
            actions = actions * _beside(self.action_scale, actions)
        if self.action_shift is not None:
            actions = actions + _beside(self.action_shift, actions)
        return [obs, actions, *times]

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
        if self.style == "concatenated":
            return "module(torch.cat([" + ", ".join(self.input_order) + "], -1))"
        times = " [B]" if self.style == "flat_time" else " [B, 1]"
        actions = "" if self.chunk is None else " [B, C, D]"
        names = [name + (times if name in TIMES else actions * (name in ACTIONS)) for name in BLOCKS_OF_KIND[self.kind]]
        return ("module(" if self.custom is None else "call(module, ") + ", ".join(names) + ")"


def _part(output: Any, which: Any) -> Any:
    """A function of an output, its entry by key, or its attribute.

    Raises:
        Refused: where it has no such part.
    """
    if callable(which):
        return which(output)
    try:
        is_attribute = isinstance(which, str) and not hasattr(output, "keys") and hasattr(output, which)
        return getattr(output, which) if is_attribute else output[which]
    except (KeyError, IndexError, TypeError):
        raise Refused(
            f"it returns {describe(output)}, which has no part {which!r}; expected output to be a key or an attribute "
            "of it, or a function",
            "Give the hint output a key or an attribute of what it returns, or a function of that.",
        ) from None


def _features(function: Callable[[Any], Any], obs: Tensor) -> Any:
    """function(obs) in obs's dtype; a function that holds float32 networks is asked in float32."""
    with torch.no_grad():
        try:
            made = function(obs)
        except RuntimeError:
            if obs.dtype != torch.float64:
                raise
            made = function(obs.float())
    return made.to(obs.dtype) if isinstance(made, Tensor) and made.is_floating_point() else made


def _beside(value: Tensor | float, actions: Tensor) -> Tensor | float:
    return value.detach().to(actions.device, actions.dtype) if isinstance(value, Tensor) else value


_ARGUMENT_NAMES = {
    "obs": ("obs", "observation", "observations", "state", "states", "s", "o"),
    "actions": ("action", "actions", "act", "acts", "a", "noisy_action", "noisy_actions", "x", "x_t", "xbar", "sample"),
    "t": ("t", "time", "times", "timestep", "timesteps", "tau"),
}
_WEAK_NAMES = ("x",)  # also what a network's only input is called


@dataclass(frozen=True)
class OtherOrder:
    """A forward whose arguments are not named in the order in which they are given.

    Args:
        takes: the names of its arguments.
        given: what it is called with.
        call: the hint that gives each argument what its name says.
        is_certain: the names contradict the order; else one of them stands in another place, which says less.
    """

    takes: str
    given: str
    call: str
    is_certain: bool


def other_order(module: nn.Module, kind: str, in_list: bool = False) -> OtherOrder | None:
    """What the names of forward's arguments say against (obs, actions, t), which numbers cannot tell; None: nothing."""
    if is_list(module):
        found = (other_order(member, kind, in_list=True) for member in module)
        return next((order for order in found if order is not None), None)
    if kind == "meta_flow_map":
        return None
    try:
        signature = inspect.signature(module.forward)
    except ValueError:  # a scripted module's
        return None
    wanted = BLOCKS_OF_KIND[kind]
    block = dict(zip(_ARGUMENT_NAMES, wanted))  # what each role is called
    positional = [p for p in signature.parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    taken = [p for place, p in enumerate(positional) if place < len(wanted) or p.default is p.empty]
    roles = [next((role for role, known in _ARGUMENT_NAMES.items() if p.name.lower() in known), None) for p in taken]
    ranks = [list(_ARGUMENT_NAMES).index(role) for role in roles if role is not None]
    strong = [role for role, p in zip(roles, taken) if p.name.lower() not in _WEAK_NAMES]
    misplaced = len(taken) == len(wanted) and any(
        role in strong and role in roles and roles[place] != role for place, role in enumerate(block)
    )
    if ranks == sorted(ranks) and not misplaced:
        return None
    needed = [block.get(role or "") for role, p in zip(roles, taken) if role in block or p.default is p.empty]
    unnamed = [name for name in wanted if name not in needed]
    if len(unnamed) == needed.count(None) == 1:  # what is left is the one whose name says nothing
        needed[needed.index(None)] = unnamed[0]
    in_order = ", ".join("..." if name is None else name for name in needed)
    called = f"[q({in_order}) for q in module]" if in_list else f"module({in_order})"
    return OtherOrder(
        ", ".join(p.name for p in positional),
        ", ".join(wanted),
        f"call=lambda module, {', '.join(wanted)}: {called}",
        ranks != sorted(ranks),
    )


def check_argument_order(module: nn.Module, kind: str) -> None:
    """Raises Refused where the names of forward's arguments contradict (obs, actions, t)."""
    order = other_order(module, kind)
    if order is not None and order.is_certain:
        raise Refused(
            f"its forward takes ({order.takes}), and is called with ({order.given})",
            f"Give the hint {order.call}; or, as a callable, give SteeredSampler qpilots_fast.as_{kind}(module, "
            f"{order.call}).",
        )


@dataclass(frozen=True)
class OutputLayout:
    """How a module's output becomes velocity [B, A], mapped points [B, A], or q_values [E, B].

    Args:
        of_critic: a critic's; None for a flow or a meta flow map, whose output is taken as it is.
        is_velocity: a meta flow map that returns vhat rather than the mapped point.
    """

    of_critic: Layout | None = None
    is_velocity: bool = False

    def apply(self, output: Any) -> Tensor:
        return output if self.of_critic is None else read_output(output, self.of_critic)


def read_layout(kind: str, output: Any, batch_size: int, members: int) -> OutputLayout:
    """How a module laid out its output for a batch.

    Raises:
        Refused: where it is none that is read.
    """
    if kind != "critic":
        if not isinstance(output, Tensor):
            raise Refused(
                f"it returns {describe(output)}; expected a tensor [B, action_dim] (use the hint call)", hint="call"
            )
        return OutputLayout()
    try:
        layout = layout_of(output, batch_size)
        found = len(read_output(output, layout))
    except (TypeError, ValueError):
        found = None
    if found != members:
        raise Refused(
            f"it returns {describe(output)} for a batch of {batch_size} and {members} member(s); expected [E, B], "
            "[B, E], [E, B, 1], or a list of [B, 1] (use the hint call)",
            hint="call",
        )
    return OutputLayout(layout)
