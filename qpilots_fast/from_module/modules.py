"""The user's module as a PackableNetwork."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..networks import PackableNetwork, Slots, module_slots
from ..spec import BoundNetwork, NetworkSpec
from .calling import OutputLayout, UserCall
from .held import Held
from .own_columns import ModuleColumns, OwnRecognition
from .python_state import Fact, fact_slots
from .sources import Source, part_at, submodule


@dataclass(frozen=True)
class Recognition:
    """What a module was proved to be; holds nothing of the module itself.

    Args:
        spec: its structure.
        sources: where each entry of flat_parameters lives.
        call, layout: how it is called, and how its output is read.
        modes: (path, training) of all its parts, where its output follows these; empty where it does not.
        own: where spec.own_columns says that the module computes some.
        facts: plain attributes of its parts that its output follows.
    """

    spec: NetworkSpec
    sources: tuple[Source | Held, ...]
    call: UserCall
    layout: OutputLayout
    modes: tuple[tuple[str, bool], ...] = ()
    own: OwnRecognition | None = None
    facts: tuple[Fact, ...] = ()

    def network(self, module: nn.Module) -> ModuleNetwork:
        """The module packed: a FlowModule, CriticModule or MetaFlowMapModule."""
        kinds = {"flow": FlowModule, "critic": CriticModule, "meta_flow_map": MetaFlowMapModule}
        return kinds[self.spec.kind](module, self)


class ModuleNetwork(PackableNetwork):
    """A packed view of the user's module: its forward calls the module, its parameters are the module's own.

    Args:
        module: the user's module; registered as `.module`.
        found: what `from_module` proved it to be.
    """

    def __init__(self, module: nn.Module, found: Recognition) -> None:
        super().__init__()
        self.module = module
        self.spec = found.spec
        sources = found.sources
        self._paths = tuple(dict.fromkeys(source.path for source in sources))
        # (owner, source, whether it is a parameter as it is)
        self._entries = tuple((self._paths.index(s.path), s, _is_parameter(module, s)) for s in sources)
        self._held = {index: f"_held_{index}" for index, s in enumerate(sources) if isinstance(s, Held)}
        for index, name in self._held.items():
            self.register_buffer(name, sources[index].find(module).detach(), persistent=False)
        self._call_module = found.call
        self._layout = found.layout
        self._dropouts = dropouts(module)
        self._modes = [(part_at(module, path), training) for path, training in found.modes]
        self._structure, self._facts = _structure(module), found.facts
        self._own = None if found.own is None else ModuleColumns(module, found.call, found.spec, found.own)
        self.training = module.training  # not self.train(): parts of the module may be in another mode

    def slots(self) -> Slots | None:
        slots = module_slots(self)
        for _, source, plain in self._entries:
            if isinstance(source, Held):
                if not source.is_constant:
                    return None  # computed anew at every call
            elif source.keys:
                return None  # a mapping may give another tensor at any call
            elif not plain:  # a view stays while the tensor that it is of does
                holder = source.holder(submodule(self.module, source.path))
                slots.append((holder, source.name, holder[source.name]))
        slots += [
            (layer.__dict__, name, getattr(layer, name)) for layer in self._dropouts for name in ("training", "p")
        ]
        slots += [(part.__dict__, "training", training) for part, training in self._modes]
        for part in self.module.modules():
            slots += [(hooks, None, len(hooks)) for hooks in (part._forward_hooks, part._forward_pre_hooks)]
            slots.append((vars(part), "forward", vars(part).get("forward")))
        for path, name, _ in self._facts:
            slots += fact_slots(part_at(self.module, path), name)
        return slots + ([] if self._own is None else self._own.slots())

    def mode_refusal(self) -> str | None:
        """Why the module, in the mode that it is in now, is not what the packed network computes; None where it is."""
        for layer in self._dropouts:
            if layer.training and layer.p > 0:
                return (
                    f"{layer} of {type(self.module).__name__} is in training mode, and the packed network has no "
                    "dropout; call .eval() on the module before sampling"
                )
        for part, training in self._modes:
            if part.training is not training:
                now, then = ("training", "eval") if part.training else ("eval", "training")
                return (
                    f"{type(part).__name__} is in {now} mode, which changes what {type(self.module).__name__} returns, "
                    f"and was in {then} mode when from_module read it; call .{'train' if training else 'eval'}() on "
                    "the module before sampling"
                )
        return None

    def bound(self) -> BoundNetwork:
        now = _structure(self.module)
        if now != self._structure:
            edited = next(path for path in {**self._structure, **now} if self._structure.get(path) != now.get(path))
            raise ValueError(
                f"{type(self.module).__name__}.{edited} was {self._structure.get(edited, 'absent')} when from_module "
                f"read the module, and is {now.get(edited, 'absent')} now; call from_module again."
            )
        for path, name, then in self._facts:
            value = getattr(part_at(self.module, path), name, None)
            if value != then:
                whole = ".".join(filter(None, (type(self.module).__name__, path, name)))
                was, now_is = (getattr(v, "__name__", repr(v)) for v in (then, value))
                raise ValueError(
                    f"{whole} was {was} when from_module read the module, and is {now_is} now; call from_module "
                    "again, or give the sampler the module itself, which it reads anew where it changed."
                )
        if self._own is None:
            return super().bound()
        places = [(tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()) for tensor in self._own.followed()]
        plain, cached = super().bound(), self.__dict__.get("_own_bound_cache")
        if cached is None or cached[0] is not plain or cached[1] != places:
            cached = (plain, places, replace(plain, own=self._own))
            self.__dict__["_own_bound_cache"] = cached
        return cached[2]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "_own_bound_cache"}

    def flat_parameters(self) -> list[Tensor]:
        """The user's live parameters, or views of them, layer by layer."""
        refusal = self.mode_refusal()
        if refusal is not None:
            raise ValueError(f"{refusal}, or give the sampler the module itself, which runs as it is in any mode.")
        return self.live_parameters()

    def live_parameters(self) -> list[Tensor]:
        """The same, whatever mode the module is in."""
        owners = [submodule(self.module, path) for path in self._paths]  # each once: ensembles have hundreds
        if not self._held:
            return [
                owners[index]._parameters[source.name] if plain else source.resolve(owners[index])  # type: ignore[union-attr]
                for index, source, plain in self._entries
            ]
        like = next(p for p in self.module.parameters() if p.is_floating_point())
        return [
            self._computed(place, source, like) if isinstance(source, Held) else source.resolve(owners[index])
            for place, (index, source, _) in enumerate(self._entries)
        ]

    def _computed(self, place: int, source: Held, like: Tensor) -> Tensor:
        """A parameter that this network holds, as it is now; its memory stays while its device and dtype do."""
        held = self._buffers[self._held[place]]
        assert held is not None
        if source.is_constant and (held.device, held.dtype) == (like.device, like.dtype):
            return held
        value = source.compute(self.module, like)
        if value.requires_grad:
            return value
        if (held.device, held.dtype) != (like.device, like.dtype):
            self._buffers[self._held[place]] = held = value.detach().clone()
        elif not torch.equal(held, value):
            held.copy_(value)
        return held

    def _run(self, *blocks: Tensor) -> Tensor:
        return self._layout.apply(self._call_module(self.module, blocks))


def _is_parameter(module: nn.Module, source: Source | Held) -> bool:
    """Whether it is a parameter of the module as it is."""
    if isinstance(source, Held) or source.keys or source.views:
        return False
    return source.name in submodule(module, source.path)._parameters


def dropouts(module: nn.Module) -> list[Any]:
    """The dropout layers of a module that drop something in training mode."""
    return [
        layer for _, layer in module.named_modules() if isinstance(layer, nn.modules.dropout._DropoutNd) and layer.p > 0
    ]


def _structure(module: nn.Module) -> dict[str, str]:
    """What a module's parts run, by their paths: class, hooks, and a forward of their own."""
    found = {}
    for path, part in module.named_modules():
        hooks = len(part._forward_hooks) + len(part._forward_pre_hooks)
        more = [f"{hooks} hooks"] * bool(hooks) + ["a forward of its own"] * ("forward" in vars(part))
        found[path] = " with ".join([type(part).__name__, *more])
    return found


def _as_time(t: Tensor | float, like: Tensor) -> Tensor:
    """[B, 1] from a number, [1, 1] or [B, 1]."""
    t = torch.as_tensor(t, dtype=like.dtype, device=like.device)
    return t.reshape(-1, 1).expand(like.shape[0], 1)


class FlowModule(ModuleNetwork):
    """velocity = v(obs, noisy_actions, t), computed by the user's module."""

    def forward(self, obs: Tensor, noisy_actions: Tensor, t: Tensor | float) -> Tensor:
        """Returns the velocity [B, A] at obs [B, S], noisy_actions [B, A], t [B, 1] (or a number)."""
        return self._run(obs, noisy_actions, _as_time(t, noisy_actions))


class CriticModule(ModuleNetwork):
    """q_values [E, B], computed by the user's module."""

    def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        """Returns q_values [E, B] at obs [B, S], actions [B, A]."""
        return self._run(obs, actions)


class MetaFlowMapModule(ModuleNetwork):
    """The mapped point X_{s,u}(xbar; t, x), computed by the user's module."""

    def forward(
        self,
        obs: Tensor,
        xbar: Tensor,
        noisy_actions: Tensor,
        t: Tensor | float,
        s: Tensor | float = 0.0,
        u: Tensor | float = 1.0,
    ) -> Tensor:
        """Returns the mapped point [B, A]; xbar, noisy_actions [B, A]; t, s, u [B, 1] or numbers in [0, 1]."""
        t, s, u = (_as_time(value, xbar) for value in (t, s, u))
        output = self._run(obs, xbar, noisy_actions, t, s, u)
        return xbar + (u - s) * output if self._layout.is_velocity else output

    def average_velocity(
        self, obs: Tensor, xbar: Tensor, noisy_actions: Tensor, t: Tensor | float, s: Tensor | float, u: Tensor | float
    ) -> Tensor:
        """vhat [B, A]; where the module returns the mapped point, s and u must differ."""
        t, s, u = (_as_time(value, xbar) for value in (t, s, u))
        output = self._run(obs, xbar, noisy_actions, t, s, u)
        return output if self._layout.is_velocity else (output - xbar) / (u - s)
