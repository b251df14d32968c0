"""SteeredSampler: a frozen flow policy, steered by a critic while it samples."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from . import backends, reference
from .backends import Backend, BoundNetworks, QuickCall, RawSample, Slots
from .composite import composite_evaluators
from .errors import BackendUnavailable
from .info import Explanation, SampleInfo
from .inputs import (
    check_actions,
    check_bound,
    check_finite,
    check_network,
    read_action_dim,
    read_inputs,
    start_noise,
    start_posterior_noise,
)
from .networks import PackableNetwork
from .spec import PRECISIONS, SamplerSpec
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
        if (
            not torch.compiler.is_compiling()
            and self._quick is not None
            and self.backend == self._quick_for[0]
            and generator is None
            and not return_info
        ):
            actions = self._quick(obs, noise, posterior_noise)
            if actions is not None:
                return actions
        with torch.no_grad():
            packed = next((n for n in (self.flow, self.critic, self.posterior) if isinstance(n, PackableNetwork)), None)
            networks = None if self._spec is None or torch.compiler.is_compiling() else self._networks()
            at = self._device() if networks is None else networks.flow.layers[0].weight[0].device
            batch_size, device, dtype = read_inputs(obs, noise, packed, at)
            action_dim = read_action_dim(noise, packed)
            candidates = self.steering.num_candidates
            noise = start_noise(noise, candidates, batch_size, action_dim, device, dtype, generator)
            eps = start_posterior_noise(
                posterior_noise, self.steering, self.num_steps, batch_size, action_dim, device, dtype, generator
            )
            if batch_size == 0:
                return self._empty(action_dim, device, dtype, return_info)
            if candidates == 1:
                raw = self._run(networks, obs, noise[:, 0], eps, return_info)
                q_values = self._q_values(obs, raw.actions) if return_info else None
            else:
                raw, q_values = self._best_candidate(networks, obs, noise, eps, return_info)
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
            chosen = backends.for_networks(self.backend, self.precision, self._device(), torch.float32)
            return Explanation("reference loop, packed networks on " + chosen.name, {}, batch_size, None)
        rows = batch_size * self.steering.num_candidates
        chosen, passed = backends.choose(self.backend, self._spec, self._device(), rows)
        others = {
            name: backends.unavailable_reason(name) or "not asked for, or slower here"
            for name in backends.BACKENDS
            if name != chosen.name
        }
        cost = chosen.footprint(self._spec, rows)
        live = None if self.frozen else chosen.live_weights(self._spec, self._networks())
        if live is not None:
            cost = replace(cost, notes=(*cost.notes, f"live weights: {live}"))
        return Explanation(chosen.name, {**others, **passed}, batch_size, cost)

    def capture(self, batch_size: int) -> Callable[..., Tensor]:
        """A CUDA graph of the whole call at a fixed batch size: returns f(obs, noise, posterior_noise=None) -> actions.

        Raises:
            BackendUnavailable: where the chosen backend has no graphs (they exist on GPUs alone).
        """
        if self._spec is None:
            raise BackendUnavailable("capture needs packed networks; flow or critic is your own callable.")
        chosen, _ = backends.choose(self.backend, self._spec, self._device(), batch_size)
        return chosen.capture(self._spec, self._networks(), batch_size)

    # ------------------------------------------------------------ checks and inputs

    def _make_spec(self) -> SamplerSpec | None:
        """The whole call as data, or None where a network that it needs is a callable."""
        needed: list[Any] = [self.flow]
        if self.steering.steers:
            needed.append(self.critic)
            if self.steering.estimate == "mfm":
                needed.append(self.posterior)
        if not all(isinstance(network, PackableNetwork) for network in needed):
            return None
        flow, critic, posterior = (
            network.spec if isinstance(network, PackableNetwork) else None
            for network in (self.flow, self.critic, self.posterior)
        )
        assert flow is not None
        for name, other in (("critic", critic), ("posterior", posterior)):
            if other is not None and (other.obs_dim, other.action_dim) != (flow.obs_dim, flow.action_dim):
                raise ValueError(
                    f"{name} has obs_dim={other.obs_dim}, action_dim={other.action_dim}, but flow has "
                    f"obs_dim={flow.obs_dim}, action_dim={flow.action_dim}; expected the same."
                )
        dims = self.steering.steered_dims
        if dims is not None and dims[-1] >= flow.action_dim:
            raise ValueError(
                f"Steering.steered_dims has {dims[-1]}; expected indices below action_dim={flow.action_dim}."
            )
        if not self.steering.steers:
            critic = None
        if critic is None or self.steering.estimate != "mfm":
            posterior = None
        return SamplerSpec(
            flow, critic, posterior, self.steering, self.num_steps, self.precision, self.action_low, self.action_high
        )

    def _networks(self) -> BoundNetworks:
        """Views of the parameters that a call reads: the current ones, or those that were packed."""
        if self._packs:
            return next(iter(self._packs.values()))[0]
        assert self._spec is not None and isinstance(self.flow, PackableNetwork)
        critic = self.critic.bound() if self._spec.critic is not None else None  # type: ignore[union-attr]
        posterior = self.posterior.bound() if self._spec.posterior is not None else None  # type: ignore[union-attr]
        return BoundNetworks(self.flow.bound(), critic, posterior)

    def _device(self) -> torch.device:
        parameter = next(self.parameters(), None)
        return torch.device("cpu") if parameter is None else parameter.device

    def _empty(
        self, action_dim: int, device: torch.device, dtype: torch.dtype, return_info: bool
    ) -> Tensor | tuple[Tensor, SampleInfo]:
        actions = torch.empty(0, action_dim, device=device, dtype=dtype)
        if not return_info:
            return actions
        members = self.critic.spec.num_members if isinstance(self.critic, PackableNetwork) else 1
        q_values = None if self.critic is None else torch.empty(members, 0, device=device, dtype=dtype)
        norms = torch.empty(self.num_steps, 0, device=device, dtype=dtype)
        return actions, SampleInfo(q_values, norms, torch.empty(self.num_steps, 0, device=device, dtype=torch.bool))

    # ------------------------------------------------------------ running

    def _run(
        self, networks: BoundNetworks | None, obs: Any, noise: Tensor, eps: Tensor | None, return_info: bool
    ) -> RawSample:
        if torch.compiler.is_compiling() and self._spec is not None:
            return self._run_traced(obs, noise, eps)
        check_finite("noise", noise)
        check_finite("posterior_noise", eps)
        if isinstance(obs, Tensor) and obs.is_floating_point():
            check_finite("obs", obs)
        if networks is None:
            raw = self._run_mixed(obs, noise, eps)
        else:
            raw = self._run_packed(networks, obs, noise, eps, return_info)
        check_actions(raw.actions)
        return raw

    def _run_traced(self, obs: Tensor, noise: Tensor, eps: Tensor | None) -> RawSample:
        from . import ops

        assert self._spec is not None
        used = (self._spec.flow, self._spec.critic, self._spec.posterior)
        flat: list[Tensor] = []
        for network, spec in zip((self.flow, self.critic, self.posterior), used):
            if spec is not None:
                flat += network.flat_parameters()  # type: ignore[union-attr]
        return RawSample(*ops.sample(obs, noise, eps, flat, self._spec, self.backend))

    def _run_packed(
        self, networks: BoundNetworks, obs: Tensor, noise: Tensor, eps: Tensor | None, return_info: bool
    ) -> RawSample:
        assert self._spec is not None
        chosen = self._backend(self._spec, noise)
        packed = None
        if self._frozen:
            if chosen.name not in self._packs:
                self._packs[chosen.name] = (networks, chosen.pack(self._spec, networks))
            packed = self._packs[chosen.name][1]
        eps = None if eps is None else eps.contiguous()
        raw = chosen.sample(
            self._spec, networks, obs.to(noise.dtype).contiguous(), noise.contiguous(), eps,
            packed=packed, return_info=return_info,
        )  # fmt: skip
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
            for name, spec in (
                ("flow", self._spec.flow), ("critic", self._spec.critic), ("posterior", self._spec.posterior)
            ):  # fmt: skip
                network = self._modules.get(name)
                if spec is None or slots is None:
                    continue
                assert isinstance(network, PackableNetwork)
                more = network.slots()
                slots = None if more is None else [*slots, (self._modules, name, network), *more]
        self._quick = None if slots is None else chosen.quick_call(self._spec, networks, packed, slots)
        self._quick_for = made_for

    def _run_mixed(self, obs: Any, noise: Tensor, eps: Tensor | None) -> RawSample:
        chosen = backends.for_networks(self.backend, self.precision, noise.device, noise.dtype)
        net = composite_evaluators(self.flow, self.critic, self.posterior, self.steering, chosen, self.precision, obs)
        bounds = (self.action_low, self.action_high)
        return reference.sample(net, self.steering, self.num_steps, noise, eps, bounds)

    def _backend(self, spec: SamplerSpec, noise: Tensor) -> Backend:
        # only on GPUs does the choice depend on the batch size
        key = (self.backend, noise.device, noise.dtype, noise.shape[0] if noise.device.type == "cuda" else None)
        if key not in self._choices:
            self._choices[key] = self._choose(spec, noise)
        return self._choices[key]

    def _choose(self, spec: SamplerSpec, noise: Tensor) -> Backend:
        if noise.dtype == torch.float64 and spec.precision != "float64":
            if self.backend not in ("auto", "reference"):
                raise TypeError(
                    f"obs or noise is float64, but backend {self.backend!r} computes in float32; expected float32 "
                    "inputs (.float()), or backend='reference'."
                )
            return backends.get("reference")
        chosen, passed = backends.choose(self.backend, spec, noise.device, noise.shape[0])
        if chosen.name == "reference" and self.backend == "auto" and not self._warned:
            self._warned = True  # once a sampler, whatever it is called with
            reasons = "; ".join(f"{name}: {reason}" for name, reason in passed.items())
            warnings.warn(f"qpilots_fast falls back to the unfused reference backend ({reasons}).", stacklevel=4)
        return chosen

    def _q_values(self, obs: Any, actions: Tensor) -> Tensor | None:
        if self.critic is None:
            return None
        if not isinstance(self.critic, PackableNetwork):
            return self.critic(obs, actions).detach().to(actions.dtype)
        if torch.compiler.is_compiling():
            from . import ops

            return ops.critic_values(obs, actions, self.critic, backend=self.backend)
        chosen = backends.for_networks(self.backend, self.precision, actions.device, actions.dtype)
        precision = self.precision
        handle = chosen.prepare(self.critic.bound(), precision)
        named = {"obs": obs.to(actions.dtype).contiguous(), "actions": actions.contiguous()}
        blocks = reference.ordered_blocks(self.critic.spec, named)
        return chosen.forward(handle, blocks, precision).squeeze(-1)

    def _best_candidate(
        self, networks: BoundNetworks | None, obs: Any, noise: Tensor, eps: Tensor | None, return_info: bool
    ) -> tuple[RawSample, Tensor | None]:
        """Runs [B, n, A] candidates and keeps, per row, the one that the critics value most."""
        batch_size, count, action_dim = noise.shape
        steering = self.steering
        if self._spec is not None:  # candidates are rows of one larger batch
            wide_eps = None if eps is None else eps.repeat_interleave(count, dim=1)
            wide_obs = obs.repeat_interleave(count, dim=0)
            raw = self._run(networks, wide_obs, noise.reshape(-1, action_dim), wide_eps, return_info)
            actions = raw.actions.view(batch_size, count, action_dim)
            raws = [raw]
        else:
            raws = [self._run(None, obs, noise[:, n], eps, return_info) for n in range(count)]
            actions = torch.stack([raw.actions for raw in raws], dim=1)
        if isinstance(obs, Tensor) and isinstance(self.critic, PackableNetwork):
            q = self._q_values(obs.repeat_interleave(count, dim=0), actions.reshape(-1, action_dim))
            assert q is not None
            q = q.view(q.shape[0], batch_size, count)
        else:
            values = [self._q_values(obs, actions[:, n]) for n in range(count)]
            q = torch.stack([value for value in values if value is not None], dim=-1)
        rank = reference.aggregate(q, steering.candidate_aggregation, steering.rho)
        best = torch.where(rank.isfinite(), rank, torch.full_like(rank, -math.inf)).argmax(-1)
        rows = torch.arange(batch_size, device=best.device)

        def chosen(per_step: list[Tensor | None]) -> Tensor | None:
            if any(value is None for value in per_step):
                return None
            columns = [value for value in per_step if value is not None]
            if len(columns) == 1:
                return columns[0].view(-1, batch_size, count)[:, rows, best]
            return torch.stack(columns, dim=-1)[:, rows, best]

        return (
            RawSample(
                actions[rows, best], chosen([r.gradient_norms for r in raws]), chosen([r.nonfinite for r in raws])
            ),
            q[:, rows, best],
        )

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
