"""What to do with a module that cannot be packed: tried on a copy before it is advised."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..callables import is_list, takes_one_tensor
from ..critic_outputs import describe, is_value, keys_of, taken_out
from .calling import TIMES
from .proof import batch_size_apart_from, random_blocks
from .random_states import kept_random_states
from .refusal import first_line

# how a sampler calls each kind of network that is a callable, and what for
_CALLS = {
    "flow": ("flow", "obs, noisy_actions, t", "the velocity [B, A]"),
    "critic": ("critic", "obs, actions", "q_values [E, B]"),
    "meta_flow_map": ("posterior", "obs, xbar, noisy_actions, t", "the mapped point [B, A]"),
}
_OTHER_CALLS = {
    "flow": ("obs, noisy_actions, t.squeeze(-1)", "torch.cat([obs, noisy_actions, t], -1)"),
    "critic": ("torch.cat([obs, actions], -1)",),
    "meta_flow_map": (
        "obs, xbar, noisy_actions, t, torch.zeros_like(t), torch.ones_like(t)",
        "torch.cat([obs, xbar, noisy_actions, t, torch.zeros_like(t), torch.ones_like(t)], -1)",
    ),
}
_AS_IT_IS = "give it to SteeredSampler as it is: it runs as a callable"
_ROUNDS = 9  # of a measurement
_BATCH = batch_size_apart_from(0)


def way_out(module: nn.Module, kind: str, dims: Sequence[tuple[int, int]], hints: dict[str, Any]) -> str:
    """A sentence that says how SteeredSampler takes the module.

    Args:
        dims: (obs_dim, action_dim) to try; none where they are not known.
        hints: of from_module.
    """
    name, arguments, wanted = _CALLS[kind]
    if hints.get("call") is not None:
        return f"SteeredSampler runs it as a callable through {_adapted(name, 'call=call')}, with the hint's call."
    with torch.inference_mode(False), torch.autocast("cpu", enabled=False), torch.device("cpu"), kept_random_states():
        tried = [call for pair in dims for call in _tried(module, kind, pair, hints)]
    if not tried:
        adapted = _adapted(name, f"call=lambda module, {arguments}: ...")
        return f"Where {name}({arguments}) of it is {wanted}, {_AS_IT_IS}; where not, give {adapted}, which makes that."
    works = next((call for call in tried if call.is_read), None)
    if works is None:
        adapted = _adapted(name, f"call=lambda module, {arguments}: ...")
        return (
            f"SteeredSampler runs it as a callable through {adapted}, with what makes {wanted} of it: "
            f"{name}({arguments}) of tensors {tried[0].outcome}. Where its obs are no tensors, {_AS_IT_IS}."
        )
    if not works.has_gradient:
        runs = "With jacobian='identity' SteeredSampler runs it as it is; else " if kind == "flow" else ""
        see = "let autograd see how its output follows from the actions (no detach, no write in place)."
        return f"{runs or 'To steer with it, '}{see}"
    adapted = _adapted(name, f"call=lambda module, {arguments}: {works.code}")
    through = f"SteeredSampler runs it as a callable through {adapted}"
    if works.members > 1:  # or atoms, or quantiles
        head = _adapted(name, f"call=lambda module, {arguments}: head.values({works.code})")
        return (
            f"Where its {works.members} outputs are members, {_AS_IT_IS if works is tried[0] else through}. Where they "
            f"are logits over atoms, give {head} with head = qpilots_fast.heads.C51(v_min, v_max, {works.members})."
        )
    return f"{_AS_IT_IS[0].upper()}{_AS_IT_IS[1:]}." if works is tried[0] and works.as_it_is else f"{through}."


def as_callable(
    module: nn.Module, kind: str, dims: Sequence[tuple[int, int]], hints: dict[str, Any]
) -> tuple[str, float | None]:
    """The line of Python that makes the sampler's network of the module, which stays PyTorch, and seconds a step.

    Seconds: of one forward and one backward at batch 1, on a copy; None where no call is read.
    """
    name, arguments, _ = _CALLS[kind]
    if hints.get("call") is not None:
        return f"{name} = {_adapted(name, 'call=call')}", None
    with torch.inference_mode(False), torch.autocast("cpu", enabled=False), torch.device("cpu"), kept_random_states():
        tried = [call for pair in dims for call in _tried(module, kind, pair, hints)]
        works = next((call for call in tried if call.is_read), None)
        if works is None:
            return f"{name} = {_adapted(name, f'call=lambda module, {arguments}: ...')}", None
        as_it_is = works.as_it_is and works is tried[0]
        line = "module" if as_it_is else _adapted(name, f"call=lambda module, {arguments}: {works.code}")
        return f"{name} = {line}", works.seconds()


def _adapted(name: str, call: str) -> str:
    return f"qpilots_fast.as_{name}(module, {call})"


class _Call:
    """One call of a copy of the module, and whether a sampler reads what it returns.

    Args:
        code: the call, as Python.
        action_shape: of one action.
    """

    def __init__(
        self, module: nn.Module, kind: str, code: str, blocks: dict[str, Tensor], shape: Sequence[int]
    ) -> None:
        self.code, self.as_it_is = code, True
        self._module, self._blocks = module, blocks
        self.is_read, self.has_gradient, self.members = False, False, 1
        moving = blocks["actions" if kind == "critic" else "noisy_actions"]
        try:
            with torch.enable_grad():
                output = eval(code, {"torch": torch, "module": module, **blocks})
        except Exception as error:
            self.outcome = f"raised {type(error).__name__}: {first_line(error)}"
            return
        self.outcome = f"returns {describe(output)}"
        if not _is_read(kind, output, shape):
            keys = keys_of(output, lambda entry: _is_read(kind, entry, shape))
            if not keys:
                return
            self.code, self.as_it_is = taken_out(code, keys), False
            output = output[keys[0]] if len(keys) == 1 else [output[key] for key in keys]
        self.is_read, self.has_gradient = True, _has_gradient(output, moving)
        if kind == "critic" and isinstance(output, Tensor) and output.ndim == 2 and output.shape[0] == _BATCH:
            self.members = output.shape[1]

    def seconds(self) -> float | None:
        """Of one forward and one backward on one row: the middle of several."""
        one = {name: block[:1].detach() for name, block in self._blocks.items()}
        moving = one["actions" if "actions" in one else "noisy_actions"].requires_grad_(self.has_gradient)
        times = []
        for _ in range(_ROUNDS):
            began = time.perf_counter()
            try:
                with torch.enable_grad():
                    output = eval(self.code, {"torch": torch, "module": self._module, **one})
                    if self.has_gradient:
                        total = torch.stack([tensor.sum() for tensor in _tensors(output)]).sum()
                        torch.autograd.grad(total, moving, allow_unused=True)
            except Exception:  # one row may be too few for it
                return None
            times.append(time.perf_counter() - began)
        return sorted(times)[_ROUNDS // 2]


def _tensors(output: Any) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else [t for entry in output for t in _tensors(entry)]


def _tried(module: nn.Module, kind: str, dims: tuple[int, int], hints: dict[str, Any]) -> list[_Call]:
    """The call that a sampler makes, then others; none where the module cannot be copied."""
    if min(dims) < 0 or dims[1] < 1:
        return []
    try:
        probe = copy.deepcopy(module).to("cpu")
        dtype = next((p.dtype for p in probe.parameters() if p.is_floating_point()), torch.float32)
    except Exception:
        return []
    shape = hints.get("chunk_shape") or (dims[1],)
    named = random_blocks(kind, dims, _BATCH, torch.Generator().manual_seed(0))
    named |= {name: named[name][:1].expand(_BATCH, 1) for name in TIMES if name in named}  # as a sampler gives it
    blocks = {
        name: block.to(dtype) if name in ("obs", "t") else block.to(dtype).unflatten(1, shape).requires_grad_()
        for name, block in named.items()
        if name not in ("s", "u")
    }
    calls = [f"module({arguments})" for arguments in (_CALLS[kind][1], *_OTHER_CALLS[kind])]
    if hints.get("input_order") and kind != "meta_flow_map":
        calls[-1] = f"module(torch.cat([{', '.join(hints['input_order'])}], -1))"
    elif all(map(takes_one_tensor, module if is_list(module) else [module])):  # a sampler joins the columns
        calls.insert(0, calls.pop())
    if is_list(module):
        calls = [f"[q{call[len('module') :]} for q in module]" for call in calls]
    return [_Call(probe, kind, code, blocks, shape) for code in calls]


def _is_row(output: Any) -> bool:
    return isinstance(output, (list, tuple))


def _is_read(kind: str, output: Any, action_shape: Sequence[int]) -> bool:
    """Whether a sampler reads such an output."""
    if kind != "critic":
        return isinstance(output, Tensor) and tuple(output.shape) == (_BATCH, *action_shape)
    return is_value(output, _BATCH)


def _has_gradient(output: Any, moving: Tensor) -> bool:
    if _is_row(output):
        return all(_has_gradient(entry, moving) for entry in output)
    if not output.requires_grad:
        return False
    try:
        return torch.autograd.grad(output.sum(), moving, allow_unused=True, retain_graph=True)[0] is not None
    except RuntimeError:  # what it changes in place, its own gradient needs
        return False
