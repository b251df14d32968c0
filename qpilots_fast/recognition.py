"""Users' modules as a sampler holds them: packed where from_module recognises them, callables where it does not."""

from __future__ import annotations

import functools
import logging
import math
import types
import warnings
import weakref
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .callables import is_list, name_of, unwrapped
from .critic_outputs import warn_of_columns
from .from_module import ModuleNetwork, Recognition, cure_for, recognise
from .from_module.calling import ACTIONS
from .from_module.proof import batch_size_apart_from, random_blocks
from .from_module.python_state import check_functions, check_objects, fact_slots, hooks_of_all, surroundings
from .from_module.random_states import kept_random_states
from .from_module.refusal import NotCallable, Refused, first_line
from .from_module.sources import part_at
from .networks import PackableNetwork, Slots, module_slots, slots_hold
from .spec import POSTERIOR_DRAW
from .steering import Steering

_log = logging.getLogger("qpilots_fast")

KIND_OF = {"flow": "flow", "critic": "critic", "posterior": "meta_flow_map"}
LARGEST = 2**27  # numbers that are copied in float64 for a proof without being asked for: 1 GiB
TRIALS_KEPT = 8  # of one module, with other widths beside it, or edited in between
MOST_TRIALS = 32  # of one module: one that is edited at every call is not proved at every call

Dims = tuple[int | None, int | None]  # obs_dim, action_dim; None: not known


# ---------------------------------------------------------------- one trial of a module


@dataclass(frozen=True)
class _Trial:
    """What came of one trial: a recognition, or the reason why the module stays a callable; for as long as it holds.

    Args:
        asked: kind, dims and chunk that it was tried with.
        structure: path, class and forward of every part, name and shape of every parameter, as they were.
        members: the module, or the modules of a list.
        cure: what to do about the reason, where a sampler cannot call the module as it is.
        count: of the module's trials.
        around: what its forward runs through beside itself.
    """

    asked: tuple[str, Dims, tuple[int, int] | None]
    structure: tuple[Any, ...]
    members: tuple[weakref.ref[nn.Module], ...]
    found: Recognition | None
    reason: str = ""
    cure: str = ""
    count: int = 1
    around: Slots = field(default_factory=list)

    def holds(self, module: nn.Module) -> bool:
        """Whether the module is still the one that was tried."""
        members = _members(module)
        if len(members) != len(self.members) or any(ref() is not m for ref, m in zip(self.members, members)):
            return False
        if _structure(module) != self.structure or (self.found is not None and _hooked(module) is not None):
            return False
        if not slots_hold(self.around):
            return False
        facts = () if self.found is None else self.found.facts
        return all(getattr(part_at(module, path), name, None) == value for path, name, value in facts)


_trials: MutableMapping[nn.Module, list[_Trial]] = weakref.WeakKeyDictionary()  # by the first of the members


def _members(module: nn.Module) -> Sequence[nn.Module]:
    return list(module) if is_list(module) else [module]


def _structure(module: nn.Module) -> tuple[Any, ...]:
    parts = ((path, type(part), getattr(type(part), "forward", None)) for path, part in module.named_modules())
    return (*parts, *((name, tuple(parameter.shape)) for name, parameter in module.named_parameters()))


def _hooked(module: nn.Module) -> str | None:
    """The part that has hooks, which a packed network would not call."""
    if hooks_of_all():
        return "every module"
    for path, part in module.named_modules():
        if part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks:
            return path or type(part).__name__
    return None


def _tried(module: nn.Module, kind: str, dims: Dims, chunk: tuple[int, int] | None) -> _Trial:
    """Tries from_module once for a module, its structure, and what is asked."""
    asked = (kind, dims, chunk)
    members = _members(module)
    try:
        known = _trials.setdefault(members[0], [])
    except (IndexError, TypeError):  # an empty list; a class that is not hashable
        known = []
    for trial in known:
        if trial.asked == asked and trial.holds(module):
            return trial
    found, reason, cure, count = None, "", "", known[-1].count + 1 if known else 1
    around: Slots = []
    try:
        around = surroundings(module)
        if count > MOST_TRIALS:
            raise Refused(f"it was edited {MOST_TRIALS} times since it was first tried")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a copy's
            found = _try(module, kind, dims, chunk)
    except Refused as refusal:
        reason, cure = str(refusal), refusal.cure
    except Exception as error:  # whatever a user's class does while it is copied or read
        reason = f"it could not be read ({type(error).__name__}: {first_line(error)})"
    trial = _Trial(asked, _structure(module), tuple(map(weakref.ref, members)), found, reason, cure, count, around)
    known.append(trial)
    del known[:-TRIALS_KEPT]
    return trial


def _try(module: nn.Module, kind: str, dims: Dims, chunk: tuple[int, int] | None) -> Recognition:
    """Recognises a module that may change unseen in fewer ways than from_module lets through."""
    _check_tensors(module)
    hooked = _hooked(module)
    if hooked is not None:
        raise Refused(f"{hooked} has hooks, which a packed network would not call")
    check_functions(module)
    hints: dict[str, Any] = {name: n for name, n in zip(("obs_dim", "action_dim"), dims) if n is not None}
    if chunk is None:
        found, probe = _recognised(module, kind, hints)
    else:  # as a callable it would be shown chunks
        hints["action_dim"] = math.prod(chunk)
        try:
            found, probe = _recognised(module, kind, {**hints, "chunk_shape": chunk})
        except NotCallable as refusal:
            try:
                found, probe = _recognised(module, kind, hints)
            except Refused:
                raise refusal from None
    with torch.no_grad(), torch.inference_mode(False), torch.autocast("cpu", enabled=False), torch.device("cpu"):
        with kept_random_states():
            _check_copy(probe, found)
    return found


def _recognised(module: nn.Module, kind: str, hints: dict[str, Any]) -> tuple[Recognition, nn.Module]:
    try:
        return recognise(module, kind, hints, in_eval_mode=True)
    except Refused as refusal:
        cure = cure_for(refusal, module, kind, hints)
        found = cure.startswith(("SteeredSampler runs it", "Give the hint call")) and "..." not in cure
        refusal.cure = cure if found else ""
        raise


def _check_tensors(module: nn.Module) -> None:
    tensors = [*module.parameters(), *module.buffers()]
    if not any(isinstance(tensor, nn.Parameter) for tensor in tensors):
        raise Refused("it has no parameters")
    floating = [tensor for tensor in tensors if tensor.is_floating_point()]
    dtypes, devices = {tensor.dtype for tensor in floating}, {tensor.device for tensor in floating}
    if len(dtypes) > 1 or not dtypes <= {torch.float32, torch.float64}:
        raise Refused(f"it holds {', '.join(sorted(map(str, dtypes)))}; expected float32, or float64, throughout")
    if len(devices) > 1:
        raise Refused(f"it is on several devices ({', '.join(sorted(map(str, devices)))})")
    count = sum(tensor.numel() for tensor in tensors)
    if count > LARGEST:
        raise Refused(f"it has {count / 1e6:.0f} million numbers, which are not copied for a proof unless asked for")


def _check_copy(probe: nn.Module, found: Recognition) -> None:
    """Raises Refused where the output depends on more than can be watched."""
    spec = found.spec
    generator = torch.Generator().manual_seed(0)
    named = random_blocks(
        spec.kind, (spec.obs_dim, spec.action_dim), batch_size_apart_from(spec.num_members), generator
    )
    if spec.kind == "meta_flow_map":
        named.update({name: torch.full_like(named[name], value) for name, value in POSTERIOR_DRAW.items()})
        _check_posterior_call(probe, found, named)

    def output() -> Tensor:
        return found.layout.apply(found.call(probe, list(named.values())))

    check_objects(probe, output)


def _check_posterior_call(probe: nn.Module, found: Recognition, named: dict[str, Tensor]) -> None:
    """Raises Refused where the call of four arguments that a sampler makes is none of the map at s = 0, u = 1."""
    chunk = found.call.chunk
    four = [
        block.unflatten(-1, chunk) if chunk is not None and name in ACTIONS else block
        for name, block in named.items()
        if name not in POSTERIOR_DRAW
    ]
    try:
        drawn = probe(*four)
    except Exception:  # not made for it, and so no other meaning either
        return
    mapped = found.call(probe, list(named.values()))
    if found.layout.is_velocity:
        mapped = named["xbar"] + mapped
    if not isinstance(drawn, Tensor) or not torch.allclose(drawn.reshape(mapped.shape), mapped):
        raise Refused(
            "called as posterior(obs, xbar, noisy_actions, t) it does not return the mapped point that it returns for "
            "s = 0 and u = 1"
        )


# ---------------------------------------------------------------- a module in its place


@dataclass(eq=False)
class OwnModule:
    """A user's module in its place in a sampler.

    Args:
        given: what the sampler was given, wrappers included.
        module: without them.
        trial: what from_module found.
        network: what from_module made of it; None where it refused.
        slots: the module is what was tried while they hold, and its parameters keep their shapes.
    """

    name: str
    given: nn.Module
    module: nn.Module
    trial: _Trial
    network: ModuleNetwork | None = field(init=False, default=None)
    slots: Slots = field(init=False)

    def __post_init__(self) -> None:
        self.slots = module_slots(self.given, parameters=False) + self.trial.around
        if self.trial.found is None:
            return
        self.network = self.trial.found.network(self.module)
        layout, members = self.trial.found.layout.of_critic, self.network.spec.num_members
        if is_list(self.module) and isinstance(layout, tuple) and set(layout) == {"batch_first"}:
            if members > len(layout):
                warn_of_columns(self.name, len(layout), members)
        for part in self.module.modules():
            self.slots += [(hooks, None, 0) for hooks in (part._forward_hooks, part._forward_pre_hooks)]
        for path, name, _ in self.trial.found.facts:
            self.slots += fact_slots(part_at(self.module, path), name)

    @property
    def edited(self) -> bool:
        """Whether anything in the module was replaced, added or resized since it was tried."""
        if self.network is not None:
            try:
                shapes = [tuple(parameter.shape) for parameter in self.network.live_parameters()]
            except (AttributeError, KeyError):
                return True
            if shapes != list(self.network.spec.parameter_shapes):
                return True
        return not slots_hold(self.slots)

    @property
    def reason(self) -> str:
        """Why calls ask the module as a callable; empty where they ask the packed network."""
        return self.trial.reason or (self.network and self.network.mode_refusal()) or ""

    def as_callable(self) -> Callable[..., Any]:
        """The module as calls ask it where it is not packed."""
        if self.network is not None and self.trial.found is not None and self.trial.found.call.style != "separate":
            return self.network.forward  # flat times, or one tensor of columns
        return self.given

    def reads(self, obs: Any, noise: Any) -> bool:
        """Whether the packed network reads such obs as the module would: [..., S], with noise [..., A] beside it."""
        assert self.network is not None
        if isinstance(obs, np.ndarray):
            floating = obs.dtype.kind == "f"
        else:
            floating = isinstance(obs, Tensor) and obs.is_floating_point()
        if not floating or obs.ndim < 1 or obs.shape[-1] != self.network.spec.obs_dim:
            return False
        lead = tuple(obs.shape[:-1])
        return len(lead) < 2 or noise is None or tuple(getattr(noise, "shape", ())[: len(lead)]) == lead

    def __str__(self) -> str:
        """How it runs, in words."""
        words = f"{self.name} {name_of(self.module)} runs "
        if not self.reason:
            return f"{words}packed on native kernels (recognised by from_module)"
        words += f"as a callable: {self.reason}."
        if self.trial.cure:
            words += f" {self.trial.cure}"
        elif self.network is None:
            words += (
                f" from_module(module, {KIND_OF[self.name]!r}, ...) takes hints; its result goes in the module's place."
            )
        return words


def how_each_runs(given: dict[str, Any], own: dict[str, OwnModule], steering: Steering) -> tuple[str, ...]:
    """A line for each network: packed, or a callable and why."""
    lines = []
    for name, network in given.items():
        if network is None:
            continue
        if name in own and own[name].given is network:
            line = str(own[name])
        elif isinstance(network, PackableNetwork):
            line = f"{name} {name_of(network)} runs packed on native kernels"
        else:
            is_function = isinstance(network, (types.FunctionType, types.MethodType, functools.partial))
            why = "it is a function" if is_function else "it is no nn.Module"
            if isinstance(network, nn.Module):
                why = "Steering.critic_time asks Q(obs, a, t)"
            line = f"{name} {name_of(network)} runs as a callable: {why}"
        asked = steering.asks(name) or (name == "critic" and steering.needs_critic)
        lines.append(line if asked else f"{line} (this steering does not ask it)")
    return tuple(lines)


def recognised(
    given: dict[str, Any], steering: Steering, chunk: tuple[int, int] | None, before: dict[str, OwnModule]
) -> dict[str, OwnModule]:
    """The users' modules among a sampler's networks, by name; says in the log how those run that are new.

    Args:
        given: "flow", "critic", "posterior"; packed networks, modules, other callables, or None.
        steering: with critic_time the critic is another function, which is not packed.
        chunk: (C, D) where callables are shown chunks.
        before: what an earlier call returned.
    """
    own = {
        name: network
        for name, network in given.items()
        if isinstance(network, nn.Module)
        and not isinstance(network, PackableNetwork)
        and not (name == "critic" and steering.critic_time)
    }
    packed = [network.spec for network in given.values() if isinstance(network, PackableNetwork)]
    dims: Dims = (packed[0].obs_dim, packed[0].action_dim) if packed else (None, math.prod(chunk) if chunk else None)
    found: dict[str, OwnModule] = {}
    for _ in range(2):  # one that tells its widths tells them to those before it, too
        for name, network in own.items():
            earlier = found.get(name) or before.get(name)
            found[name] = _placed(name, network, dims, chunk, earlier)
            if None in dims and found[name].network is not None:
                spec = found[name].network.spec  # type: ignore[union-attr]
                dims = (spec.obs_dim, spec.action_dim)
    for name, module in found.items():
        earlier = before.get(name)
        if earlier is None or earlier.given is not module.given or str(earlier) != str(module):
            _log.info("%s", module)
    return found


def _placed(
    name: str, given: nn.Module, dims: Dims, chunk: tuple[int, int] | None, earlier: OwnModule | None
) -> OwnModule:
    if earlier is not None and earlier.given is given and not earlier.edited:
        _, dims_then, chunk_then = earlier.trial.asked
        if chunk_then == chunk and (earlier.network is not None or dims_then == dims):
            return earlier
    module = unwrapped(given)
    if is_list(module) and any(unwrapped(member) is not member for member in module):
        module = nn.ModuleList(map(unwrapped, module))
    return OwnModule(name, given, module, _tried(module, KIND_OF[name], dims, chunk))
