"""The two ways through a call: the whole loop on one backend, or the reference loop with users' callables in it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import backends, ops, reference
from .backends import Backend, ByBatchSize, Call, Choice, QuickCall, Request, Slots, capturing
from .bounds import Bounds, box_of
from .callables import out_of_inference, run_outside_inference
from .candidates import as_rows, side_by_side
from .errors import BackendUnavailable
from .evaluators import evaluators
from .info import Explanation
from .inputs import Inputs, check_actions, check_all_finite
from .networks import PackableNetwork
from .remarks import Remarks
from .spec import BoundNetworks, NetworkSpec, RawSample, SamplerSpec, StepReport
from .steering import Steering
from .times import Step
from .user_warning import warn

Networks = dict[str, Any]  # "flow", "critic" and "posterior" as calls ask them


def all_packed(networks: Networks, steering: Steering) -> bool:
    """Whether every network that the steering asks is packed."""
    return all(isinstance(net, PackableNetwork) for name, net in networks.items() if steering.asks(name))


_NOT_CAPTURED = (
    ("num_candidates", 1, "rank its actions by ops.pessimistic_q"),
    ("final_steps", 0, "move its actions by the gradient of ops.pessimistic_q"),
)


_CHOICES_KEPT = 256


class Choices:
    """The backend of each kind of call, asked for once; says once where "auto" falls back."""

    def __init__(self) -> None:
        self._chosen: dict[Any, Backend] = {}
        self._warned = False

    def backend(self, name: str, spec: SamplerSpec, noise: Tensor) -> Backend:
        # only on GPUs does the choice depend on the batch size
        key = (name, noise.device, noise.dtype, noise.shape[0] if noise.device.type == "cuda" else None)
        chosen = self._chosen.get(key)
        if chosen is None:
            choice = backends.choose(Request(name, spec.precision, noise.device, noise.dtype, spec, noise.shape[0]))
            if choice.fallback is not None and not self._warned:
                self._warned = True  # once a sampler, whatever it is called with
                warn(f"qpilots_fast falls back to the unfused reference backend ({choice.fallback}).")
            if len(self._chosen) >= _CHOICES_KEPT:
                self._chosen.clear()
            chosen = self._chosen[key] = choice.backend
        return chosen


class PackedRun:
    """Every network that takes part is packed: a call is one call of a backend.

    What it keeps between calls only grows, so that threads may share it: a sampler that must forget takes a new one.

    Args:
        networks: packed, those that the spec speaks of among them.
        slots: by name; these are the sampler's networks while they hold.
        frozen: whether weights are packed at the first call and kept.
    """

    def __init__(
        self,
        spec: SamplerSpec,
        networks: Networks,
        slots: dict[str, Slots],
        frozen: bool,
        choices: Choices,
        remarks: Remarks,
    ) -> None:
        self.spec = spec
        self._remarks = remarks
        self._networks: dict[str, PackableNetwork] = {name: networks[name] for name in spec.networks}
        self._slots = [slot for name in spec.networks for slot in slots[name]]
        self._frozen = frozen
        self._choices = choices
        self._packs: dict[str, tuple[BoundNetworks, Any]] = {}  # of a frozen sampler, by backend
        self._frozen_critic: PackableNetwork | None = None
        self._quick: tuple[str, tuple[Any, ...], QuickCall | None] | None = None  # backend asked for, made for, call

    def finishing_critic(self, critic: Any) -> Any:
        """Whom to ask about finished actions: the critic, or its copy as it was when a frozen sampler packed it."""
        if not self._frozen or not isinstance(critic, PackableNetwork):
            return critic
        if self._frozen_critic is None:
            self._frozen_critic = copy.deepcopy(critic)
        return self._frozen_critic

    @property
    def holds_weights(self) -> bool:
        """Whether a frozen sampler's weights are packed, whatever becomes of its networks."""
        return bool(self._packs)

    def fits(self, networks: Networks) -> bool:
        """Whether these are still the networks that the spec speaks of."""
        return all(networks[name] is network for name, network in self._networks.items())

    def bound(self) -> BoundNetworks:
        """Views of the parameters that a call reads: the current ones, or those that were packed."""
        if self._packs:
            return next(iter(self._packs.values()))[0]
        return BoundNetworks(**{name: network.bound() for name, network in self._networks.items()})

    def quick(self, backend: str) -> QuickCall | None:
        """The quick way of the backend asked for, where an earlier call made one."""
        made = self._quick
        return made[2] if made is not None and made[0] == backend else None

    def sample(self, networks: Networks, backend: str, inputs: Inputs, bounds: Bounds, return_info: bool) -> RawSample:
        """The loop from every candidate's noise at once: rows [B n]; bounds are the spec's."""
        count, action_dim = inputs.noise.shape[1:]
        obs, noise = as_rows(inputs.obs, count), inputs.noise.reshape(-1, action_dim)
        eps, alpha = as_rows(inputs.posterior_noise, count, dim=1), as_rows(inputs.alpha, count)
        if torch.compiler.is_compiling():  # traces the operator
            taking_part = (networks[name] for name in self.spec.networks)
            flat = [parameter for network in taking_part for parameter in network.flat_parameters()]
            traced, *report = ops.sample(obs, noise, eps, flat, self.spec, backend, alpha)
            return RawSample(traced, StepReport(*report))
        obs, noise = obs.to(noise.dtype).contiguous(), noise.contiguous()
        eps = None if eps is None else eps.contiguous()
        alpha = None if alpha is None else alpha.contiguous()
        if count == 1 and not return_info:  # what had to be cast or folded is plain now
            quick = self.quick(backend)
            actions = None if quick is None else quick(obs, noise, eps, alpha)
            if actions is not None:
                return RawSample(actions)
        bound = self.bound()
        check_all_finite(obs, noise, eps)
        chosen = self._choices.backend(backend, self.spec, noise)
        bound, packed = self._packed(chosen, bound)
        raw = chosen.sample(Call(self.spec, bound, obs, noise, eps, alpha, packed, return_info))
        check_actions(raw.actions)
        if bound.critic is not None:
            self._remarks.on_weights(bound.critic, self.spec.steering)
        if count == 1 and not self.spec.steering.final_steps and not capturing(noise.device):
            self._make_quick(backend, chosen, bound, packed, noise.shape[0])
        return raw

    def _packed(self, chosen: Backend, bound: BoundNetworks) -> tuple[BoundNetworks, Any]:
        """Of a frozen sampler, the weights that its first call on this backend packed; else None."""
        if not self._frozen:
            return bound, None
        if chosen.name not in self._packs:
            self._packs[chosen.name] = (bound, chosen.pack(self.spec, bound))
        return self._packs[chosen.name]

    def _make_quick(self, backend: str, chosen: Backend, networks: BoundNetworks, packed: Any, batch_size: int) -> None:
        """Lets the calls to come take the backend's quick way."""
        made_for = (chosen, packed, networks.flow, networks.critic, networks.posterior)
        known = self._quick if self._quick is not None and self._quick[0] == backend else None
        by_size = known[2] if known is not None and isinstance(known[2], ByBatchSize) else ByBatchSize()
        before = by_size.made_for(batch_size) if chosen.quick_by_batch_size else known and known[1]
        if before and all(a is b for a, b in zip(before, made_for)):
            return
        slots: Slots | None = []
        if packed is None:
            slots = [*self._slots]
            for network in self._networks.values():
                more = network.slots()
                slots = None if more is None or slots is None else [*slots, *more]
        quick = None if slots is None else chosen.quick_call(self.spec, networks, packed, slots, batch_size)
        if chosen.quick_by_batch_size:
            by_size.keep(batch_size, made_for, quick)
            self._quick = (backend, (), by_size)
        else:
            self._quick = (backend, made_for, quick)

    def explain(self, backend: str, device: torch.device, batch_size: int) -> Explanation:
        """Which backend runs batch_size observations on this device, and what it costs."""
        spec, rows = self.spec, batch_size * self.spec.steering.num_candidates
        choice = self._choice(backend, device, rows)
        chosen = choice.backend
        others = {
            name: backends.unavailable_reason(name) or "not asked for, or slower here"
            for name in backends.BACKENDS
            if name != chosen.name
        }
        cost = chosen.footprint(spec, rows)
        live = None if self._frozen else chosen.live_weights(spec, self.bound())
        if live is not None:
            cost = replace(cost, notes=(*cost.notes, f"live weights: {live}"))
        cost = replace(cost, notes=(*cost.notes, f"kept between calls: {chosen.keeps}"))
        if spec.steering.final_steps:
            cost = replace(cost, notes=(*cost.notes, f"{spec.steering.final_steps} final steps are not counted"))
        return Explanation(chosen.name, {**others, **choice.passed}, batch_size, cost)

    def capture(self, backend: str, device: torch.device, batch_size: int) -> Callable[..., Tensor]:
        """A CUDA graph of one call."""
        for name, expected, cure in _NOT_CAPTURED:
            value = getattr(self.spec.steering, name)
            if value != expected:
                raise BackendUnavailable(
                    f"a captured graph is the loop of one sample an observation, and this steering has {name}={value}; "
                    f"expected {expected}: capture such a sampler and {cure}."
                )
        chosen = self._choice(backend, device, batch_size).backend
        bound, packed = self._packed(chosen, self.bound())
        return chosen.capture(self.spec, bound, batch_size, packed)

    def _choice(self, backend: str, device: torch.device, rows: int) -> Choice:
        return backends.choose(Request(backend, self.spec.precision, device, torch.float32, self.spec, rows))


class CallableRun:
    """Some network is a callable: the reference loop, with the packed networks among them on a backend."""

    spec = None
    holds_weights = False

    def fits(self, networks: Networks) -> bool:
        """Whether some network that is asked is still a callable."""
        return not all_packed(networks, self._steering)

    def __init__(
        self, steering: Steering, schedule: tuple[Step, ...], precision: str, critic_layout: str, remarks: Remarks,
        packed: tuple[NetworkSpec, ...],
    ) -> None:  # fmt: skip
        self._packed_specs = packed
        self._steering, self._schedule, self._precision = steering, schedule, precision
        self._critic_layout, self._remarks = critic_layout, remarks
        self._chosen: dict[tuple[str, torch.device, torch.dtype], Choice] = {}

    def finishing_critic(self, critic: Any) -> Any:
        """Whom to ask about finished actions."""
        return critic

    def quick(self, backend: str) -> QuickCall | None:
        return None

    def sample(self, networks: Networks, backend: str, inputs: Inputs, bounds: Bounds, return_info: bool) -> RawSample:
        """The loop from each candidate's noise, one after the other: rows [B n]; outside of any inference mode."""
        return run_outside_inference(lambda: self._sample(networks, backend, inputs, bounds, return_info))

    def _sample(self, networks: Networks, backend: str, inputs: Inputs, bounds: Bounds, return_info: bool) -> RawSample:
        given = (inputs.obs, inputs.noise, inputs.posterior_noise, inputs.alpha, *bounds)
        obs, noise, eps, alpha, *edges = map(out_of_inference, given)
        bounds = (edges[0], edges[1])
        check_all_finite(obs, noise, eps)
        chosen = self._choose(backend, noise.device, noise.dtype).backend
        net = evaluators(
            **networks, steering=self._steering, backend=chosen, precision=self._precision, obs=obs,
            critic_layout=self._critic_layout, chunk=inputs.layout.chunk,
        )  # fmt: skip
        net = self._remarks.watching(net, self._steering)

        def from_start(x: Tensor) -> RawSample:
            return reference.sample(net, self._steering, self._schedule, x, eps, bounds, alpha, return_info)

        raw = side_by_side([from_start(x) for x in noise.unbind(1)])
        check_actions(raw.actions)
        return raw

    def explain(self, backend: str, device: torch.device, batch_size: int) -> Explanation:
        chosen = self._choose(backend, device, torch.float32).backend
        return Explanation("reference loop, packed networks on " + chosen.name, {}, batch_size, None)

    def capture(self, backend: str, device: torch.device, batch_size: int) -> Callable[..., Tensor]:
        raise BackendUnavailable("capture needs packed networks; flow or critic is your own callable.")

    def _choose(self, backend: str, device: torch.device, dtype: torch.dtype) -> Choice:
        key = (backend, device, dtype)
        if key not in self._chosen:
            self._chosen[key] = backends.choose(
                Request(backend, self._precision, device, dtype, networks=self._packed_specs)
            )
        return self._chosen[key]


def make_run(
    sampler: Any, networks: Networks, slots: dict[str, Slots], frozen: bool, choices: Choices, remarks: Remarks
) -> PackedRun | CallableRun:
    """The way that the calls of a sampler with these settings take.

    Args:
        sampler: a SteeredSampler whose settings were checked.
        networks: those that its calls ask. slots: by name; these are its networks while they hold.
    """
    steering = sampler.steering
    bounds = sampler.action_low, sampler.action_high
    specs = {name: net.spec if isinstance(net, PackableNetwork) else None for name, net in networks.items()}
    tells = next((spec for spec in specs.values() if spec is not None), None)
    if tells is not None:  # refused here rather than at the first call
        bounds = box_of(*bounds, tells.action_dim, sampler.chunk_shape)
    if not all_packed(networks, steering):
        schedule = steering.schedule(sampler.num_steps, sampler.time_grid)
        packed = tuple(spec for spec in specs.values() if spec is not None)
        return CallableRun(steering, schedule, sampler.precision, sampler.critic_layout, remarks, packed)
    spec = SamplerSpec(
        **specs,  # type: ignore[arg-type]
        steering=steering,
        num_steps=sampler.num_steps,
        precision=sampler.precision,
        action_low=bounds[0],
        action_high=bounds[1],
        time_grid=sampler.time_grid,
    )
    return PackedRun(spec, networks, slots, frozen, choices, remarks)
