"""SteeredSampler: a frozen flow policy, steered by a critic while it samples."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from . import backends, ops, reference
from .backends import Backend, Call, Choice, QuickCall, Request, Slots
from .candidates import as_rows, keep_best, side_by_side
from .errors import BackendUnavailable
from .evaluators import evaluators
from .info import Explanation, SampleInfo
from .inputs import (
    check_actions,
    check_all_finite,
    check_bound,
    check_network,
    read_action_dim,
    read_inputs,
    start_noise,
    start_posterior_noise,
)
from .networks import PackableNetwork
from .spec import PRECISIONS, BoundNetworks, RawSample, SamplerSpec
from .steering import Steering

_log = logging.getLogger("qpilots_fast")

Network = PackableNetwork | Callable[..., Tensor]


def _critic_is_needed(steering: Steering) -> bool:
    return steering.steers or steering.num_candidates > 1


class SteeredSampler(nn.Module):
    """actions = sampler(obs): K Euler steps of a flow policy, each steered by a critic ensemble.

    Args:
        flow: FlowMLP, `from_module(...)`, or any callable (obs, noisy_actions [B, A], t [B, 1]) -> velocity [B, A].
        critic: CriticEnsemble, `from_module(...)`, or any callable (obs, actions) -> q_values [E, B]; None where the
            steering asks no critic.
        steering: how to steer; see Steering.
        posterior: MetaFlowMap or callable (obs, xbar, noisy_actions, t) -> [B, A]; for estimate="mfm" alone.
        num_steps: K >= 1.
        backend: "auto", or "reference", "cpu", "triton", "cuda".
        precision: of weights and products: "float32" or "bfloat16" (float32 accumulation and state); "tf32" and
            "float16" where the backend offers them; "float64" on the reference backend.
        action_low, action_high: bounds of the actions, and of the estimates where the steering clips them.

    Raises:
        ValueError, TypeError: for arguments outside these, or networks that do not fit each other.
        BackendUnavailable: where a backend asked for by name cannot run.
    """

    def __init__(
        self,
        flow: Network,
        critic: Network | None,
        steering: Steering,
        *,
        posterior: Network | None = None,
        num_steps: int = 10,
        backend: str = "auto",
        precision: str = "float32",
        action_low: float = -1.0,
        action_high: float = 1.0,
    ) -> None:
        super().__init__()
        if not isinstance(steering, Steering):
            raise TypeError(f"steering is {type(steering).__name__}; expected a Steering, e.g. Steering.qpilots_u().")
        if isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 1:
            raise ValueError(f"num_steps is {num_steps!r}; expected an integer >= 1.")
        if precision not in PRECISIONS:
            raise ValueError(f"precision is {precision!r}; expected one of {', '.join(map(repr, PRECISIONS))}.")
        low, high = check_bound("action_low", action_low), check_bound("action_high", action_high)
        if not low < high:
            raise ValueError(f"action_low is {low:g} and action_high {high:g}; expected action_low < action_high.")
        for name, network, needed in (
            ("flow", flow, True),
            ("critic", critic, _critic_is_needed(steering)),
            ("posterior", posterior, steering.steers and steering.estimate == "mfm"),
        ):
            check_network(name, network, needed)
        self.flow = flow
        self.critic = critic
        self.posterior = posterior
        self.steering = steering
        self.num_steps = num_steps
        self.backend = backend
        self.precision = precision
        self.action_low, self.action_high = low, high
        self._frozen = False
        self._packs: dict[str, tuple[BoundNetworks, Any]] = {}  # by backend; filled by a frozen sampler's first call
        self._choices: dict[Any, Backend] = {}
        self._quick: QuickCall | None = None
        self._quick_for: tuple[Any, ...] = ()  # what it was made for
        self._warned = False
        self._spec = self._make_spec()
        if backend != "auto":
            backends.get(backend)

    # ------------------------------------------------------------ calls

    @overload
    def forward(
        self,
        obs: Any,
        noise: Tensor | None = ...,
        posterior_noise: Tensor | None = ...,
        generator: torch.Generator | None = ...,
        return_info: Literal[False] = ...,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        obs: Any,
        noise: Tensor | None = ...,
        posterior_noise: Tensor | None = ...,
        generator: torch.Generator | None = ...,
        *,
        return_info: Literal[True],
    ) -> tuple[Tensor, SampleInfo]: ...

    def forward(
        self,
        obs: Any,
        noise: Tensor | None = None,
        posterior_noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        return_info: bool = False,
    ) -> Tensor | tuple[Tensor, SampleInfo]:
        """Samples one action per observation; not tracked by autograd.

        Args:
            obs: [B, S]; any object where flow and critic are callables that read it (then noise gives B and A).
            noise: [B, A] start of the flow; drawn where None. With num_candidates = n > 1 also [B, n, A]; from
                [B, A] the candidates start at n fixed rotations of the noise, so that the result stays a function
                of it.
            posterior_noise: [K, B, N, A], entry k serves step k; drawn where None and needed.
            generator: for what is drawn.
            return_info: also return a SampleInfo.

        Returns:
            actions [B, A] in [action_low, action_high], or (actions, SampleInfo).

        Raises:
            ValueError, TypeError: wrong shapes, dtypes, devices, or non-finite obs or noise.
        """
        if torch.compiler.is_compiling() or generator is not None or return_info:  # asked first: no guard on _quick
            quick = None
        else:
            quick = self._quick_call
        if quick is not None:
            actions = quick(obs, noise, posterior_noise)
            if actions is not None:
                return actions
        with torch.no_grad():
            steering, packed = self.steering, self._a_packed_network()
            networks = None if self._spec is None or torch.compiler.is_compiling() else self._networks()
            device = self._device() if networks is None else networks.flow.device
            batch_size, device, dtype = read_inputs(obs, noise, packed, device)
            action_dim = read_action_dim(noise, packed)
            count = steering.num_candidates
            noise = start_noise(noise, count, batch_size, action_dim, device, dtype, generator)
            eps = start_posterior_noise(
                posterior_noise, steering, self.num_steps, batch_size, action_dim, device, dtype, generator
            )
            if batch_size == 0:
                raw, q_values = self._empty(action_dim, device, dtype)
            else:
                if self._spec is not None:  # candidates are rows of one larger batch
                    rows, wide_eps = noise.reshape(-1, action_dim), as_rows(eps, count, dim=1)
                    raw = self._run_packed(networks, as_rows(obs, count), rows, wide_eps, return_info)
                else:
                    raw = side_by_side([self._run_callables(obs, noise[:, n], eps) for n in range(count)])
                q_values = self._q_values(obs, raw.actions, count) if return_info or count > 1 else None
                if count > 1:
                    assert q_values is not None
                    raw, q_values = keep_best(raw, q_values, steering)
            if not return_info:
                return raw.actions
            assert raw.gradient_norms is not None and raw.nonfinite is not None
            return raw.actions, SampleInfo(q_values, raw.gradient_norms, raw.nonfinite)

    def freeze(self) -> SteeredSampler:
        """Packs the weights at the next call and keeps them: later changes of the parameters are not seen.

        Inside torch.compile the current parameters are read all the same.
        """
        self._frozen = True
        self._forget_packs()
        _log.info("SteeredSampler is frozen: it no longer follows its networks' parameters; unfreeze() undoes this.")
        return self

    def unfreeze(self) -> SteeredSampler:
        """Back to reading the current parameters at every call."""
        self._frozen = False
        self._forget_packs()
        return self

    @property
    def frozen(self) -> bool:
        """Whether calls use weights packed once rather than the current parameters."""
        return self._frozen

    def explain(self, batch_size: int = 1) -> Explanation:
        """Which backend runs a batch of this size, why the others do not, and the exact cost of a call."""
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size is {batch_size!r}; expected an integer >= 1.")
        if self._spec is None:
            choice = self._choose(None, self._device(), torch.float32)
            return Explanation("reference loop, packed networks on " + choice.backend.name, {}, batch_size, None)
        rows = batch_size * self.steering.num_candidates
        choice = self._choose(self._spec, self._device(), torch.float32, rows)
        chosen = choice.backend
        others = {
            name: backends.unavailable_reason(name) or "not asked for, or slower here"
            for name in backends.BACKENDS
            if name != chosen.name
        }
        cost = chosen.footprint(self._spec, rows)
        live = None if self.frozen else chosen.live_weights(self._spec, self._networks())
        if live is not None:
            cost = replace(cost, notes=(*cost.notes, f"live weights: {live}"))
        return Explanation(chosen.name, {**others, **choice.passed}, batch_size, cost)

    def capture(self, batch_size: int) -> Callable[..., Tensor]:
        """A CUDA graph of the whole call at a fixed batch size: returns f(obs, noise, posterior_noise=None) -> actions.

        Raises:
            BackendUnavailable: where the chosen backend has no graphs (they exist on GPUs alone).
        """
        if self._spec is None:
            raise BackendUnavailable("capture needs packed networks; flow or critic is your own callable.")
        choice = self._choose(self._spec, self._device(), torch.float32, batch_size)
        return choice.backend.capture(self._spec, self._networks(), batch_size)

    # ------------------------------------------------------------ checks and inputs

    def _make_spec(self) -> SamplerSpec | None:
        """The whole call as data, or None where a network that it needs is a callable."""
        named = {"flow": self.flow, "critic": self.critic, "posterior": self.posterior}
        if not all(isinstance(net, PackableNetwork) for name, net in named.items() if self.steering.asks(name)):
            return None
        specs = {name: net.spec if isinstance(net, PackableNetwork) else None for name, net in named.items()}
        return SamplerSpec(
            **specs,  # type: ignore[arg-type]
            steering=self.steering,
            num_steps=self.num_steps,
            precision=self.precision,
            action_low=self.action_low,
            action_high=self.action_high,
        )

    def _packables(self) -> dict[str, PackableNetwork]:
        """The networks that take part in a call, by name, in the order of the spec."""
        assert self._spec is not None
        return {name: self._modules[name] for name in self._spec.networks}  # type: ignore[misc]

    def _a_packed_network(self) -> PackableNetwork | None:
        """Any network that tells S and A."""
        return next((n for n in (self.flow, self.critic, self.posterior) if isinstance(n, PackableNetwork)), None)

    def _networks(self) -> BoundNetworks:
        """Views of the parameters that a call reads: the current ones, or those that were packed."""
        if self._packs:
            return next(iter(self._packs.values()))[0]
        return BoundNetworks(**{name: network.bound() for name, network in self._packables().items()})

    def _device(self) -> torch.device:
        parameter = next(self.parameters(), None)
        return torch.device("cpu") if parameter is None else parameter.device

    def _empty(self, action_dim: int, device: torch.device, dtype: torch.dtype) -> tuple[RawSample, Tensor | None]:
        members = self.critic.spec.num_members if isinstance(self.critic, PackableNetwork) else 1
        q_values = None if self.critic is None else torch.empty(members, 0, device=device, dtype=dtype)
        norms = torch.empty(self.num_steps, 0, device=device, dtype=dtype)
        return RawSample(torch.empty(0, action_dim, device=device, dtype=dtype), norms, norms > 0), q_values

    # ------------------------------------------------------------ running

    def _run_packed(
        self, networks: BoundNetworks | None, obs: Tensor, noise: Tensor, eps: Tensor | None, return_info: bool
    ) -> RawSample:
        """The loop on one backend; networks is None under torch.compile, which traces the operator."""
        assert self._spec is not None
        if networks is None:
            flat = [parameter for network in self._packables().values() for parameter in network.flat_parameters()]
            return RawSample(*ops.sample(obs, noise, eps, flat, self._spec, self.backend))
        check_all_finite(obs, noise, eps)
        chosen = self._backend(noise)
        packed = None
        if self._frozen:
            if chosen.name not in self._packs:
                self._packs[chosen.name] = (networks, chosen.pack(self._spec, networks))
            packed = self._packs[chosen.name][1]
        eps = None if eps is None else eps.contiguous()
        raw = chosen.sample(
            Call(self._spec, networks, obs.to(noise.dtype).contiguous(), noise.contiguous(), eps, packed, return_info)
        )
        check_actions(raw.actions)
        if self.steering.num_candidates == 1:
            self._make_quick(chosen, networks, packed)
        return raw

    def _make_quick(self, chosen: Backend, networks: BoundNetworks, packed: Any) -> None:
        """Lets the calls to come take the backend's quick way."""
        made_for = (self.backend, chosen, packed, networks.flow, networks.critic, networks.posterior)
        if len(self._quick_for) == len(made_for) and all(a is b for a, b in zip(self._quick_for, made_for)):
            return
        assert self._spec is not None
        slots: Slots | None = []
        if packed is None:
            for name, network in self._packables().items():
                more = network.slots()
                slots = None if more is None or slots is None else [*slots, (self._modules, name, network), *more]
        self._quick = None if slots is None else chosen.quick_call(self._spec, networks, packed, slots)
        self._quick_for = made_for

    @property
    def _quick_call(self) -> QuickCall | None:
        return self._quick if self._quick is not None and self.backend == self._quick_for[0] else None

    def _run_callables(self, obs: Any, noise: Tensor, eps: Tensor | None) -> RawSample:
        """The reference loop: callables in PyTorch, packed networks on a backend."""
        check_all_finite(obs, noise, eps)
        chosen = self._choose(None, noise.device, noise.dtype).backend
        net = evaluators(self.flow, self.critic, self.posterior, self.steering, chosen, self.precision, obs)
        bounds = (self.action_low, self.action_high)
        raw = reference.sample(net, self.steering, self.num_steps, noise, eps, bounds)
        check_actions(raw.actions)
        return raw

    def _backend(self, noise: Tensor) -> Backend:
        # only on GPUs does the choice depend on the batch size
        key = (self.backend, noise.device, noise.dtype, noise.shape[0] if noise.device.type == "cuda" else None)
        if key not in self._choices:
            choice = self._choose(self._spec, noise.device, noise.dtype, noise.shape[0])
            if choice.fallback is not None and not self._warned:
                self._warned = True  # once a sampler, whatever it is called with
                warnings.warn(
                    f"qpilots_fast falls back to the unfused reference backend ({choice.fallback}).", stacklevel=5
                )
            self._choices[key] = choice.backend
        return self._choices[key]

    def _choose(
        self, spec: SamplerSpec | None, device: torch.device, dtype: torch.dtype, batch_size: int | None = None
    ) -> Choice:
        return backends.choose(Request(self.backend, self.precision, device, dtype, spec, batch_size))

    def _q_values(self, obs: Any, actions: Tensor, count: int) -> Tensor | None:
        """q_values [E, B n] of finished actions [B n, A], count = n of them for each row of obs."""
        critic = self.critic
        if critic is None:
            return None
        if isinstance(critic, PackableNetwork) and isinstance(obs, Tensor):
            wide = as_rows(obs, count)
            return ops.critic_values(wide, actions, critic, precision=self.precision, backend=self.backend)
        of_each = [critic(obs, actions[n::count]).detach().to(actions.dtype) for n in range(count)]
        return torch.stack(of_each, dim=-1).flatten(1)

    # ------------------------------------------------------------ nn.Module plumbing

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SteeredSampler:
        self._forget_packs()  # moved parameters: pack again where they are now
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packs": {}, "_choices": {}, "_quick": None, "_quick_for": ()}

    def _forget_packs(self) -> None:
        self._packs, self._quick, self._quick_for = {}, None, ()

    def extra_repr(self) -> str:
        return (
            f"{self.steering}, num_steps={self.num_steps}, backend={self.backend!r}, precision={self.precision!r}"
            + (", frozen" if self._frozen else "")
        )
