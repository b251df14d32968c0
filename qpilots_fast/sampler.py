"""SteeredSampler: a frozen flow policy, steered by a critic while it samples."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from . import backends, ops
from .candidates import as_rows, keep_best
from .critic_outputs import ask_critic, check_layout
from .info import Explanation, SampleInfo
from .inputs import check_bound, check_network, read_inputs
from .networks import PackableNetwork
from .runs import CallableRun, Choices, PackedRun, all_packed
from .spec import PRECISIONS, RawSample, SamplerSpec
from .steering import Steering

_log = logging.getLogger("qpilots_fast")

Network = PackableNetwork | Callable[..., Any]

# what a run is made from: assigning one makes another
_SETTINGS = (
    "flow", "critic", "posterior", "steering", "num_steps", "precision", "action_low", "action_high", "critic_layout",
)  # fmt: skip


class SteeredSampler(nn.Module):
    """actions = sampler(obs): K Euler steps of a flow policy, each steered by a critic ensemble.

    Args:
        flow: FlowMLP, `from_module(...)`, or any callable (obs, noisy_actions [B, A], t [B, 1]) -> velocity [B, A].
        critic: CriticEnsemble, `from_module(...)`, or any callable (obs, actions) -> q_values [E, B], or [B, E],
            [B, 1], [B], [E, B, 1], or a list or tuple of these; None where the steering asks no critic.
        steering: how to steer; see Steering.
        posterior: MetaFlowMap or callable (obs, xbar, noisy_actions, t) -> [B, A]; for estimate="mfm" alone.
        num_steps: K >= 1.
        backend: "auto", or "reference", "cpu", "triton", "cuda".
        precision: of weights and products: "float32" or "bfloat16" (float32 accumulation and state); "tf32" and
            "float16" where the backend offers them; "float64" on the reference backend.
        action_low, action_high: bounds of the actions, and of the estimates where the steering clips them.
        critic_layout: of a callable critic's output: "members_first" [E, B] or "batch_first" [B, E]; "auto" reads it
            from the shape, and asks a critic that returned [B, B] once more at another batch size.

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
        critic_layout: str = "auto",
    ) -> None:
        super().__init__()
        self.flow = flow
        self.critic = critic
        self.posterior = posterior
        self.steering = steering
        self.num_steps = num_steps
        self.backend = backend
        self.precision = precision
        self.action_low, self.action_high = action_low, action_high
        self.critic_layout = critic_layout
        self._frozen = False
        self._choices = Choices()
        self._run = self._make_run()
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
        run = self._run
        if not (torch.compiler.is_compiling() or generator is not None or return_info):  # traced: no guard on it
            quick = run.quick(self.backend)
            actions = None if quick is None else quick(obs, noise, posterior_noise)
            if actions is not None:
                return actions
        with torch.no_grad():
            networks = self.networks
            if not run.fits(networks):
                run = self._run = self._make_run()
            inputs = read_inputs(
                obs,
                noise,
                posterior_noise,
                generator,
                steering=self.steering,
                num_steps=self.num_steps,
                packed=self._a_packed_network(),
                device=self._device(),
            )
            count, needs_values = inputs.noise.shape[1], return_info or inputs.noise.shape[1] > 1
            if len(inputs.noise) == 0:
                raw, q_values = self._empty(inputs.noise)
            else:
                raw = run.sample(networks, self.backend, inputs, return_info)
                q_values = self._q_values(obs, raw.actions, count) if needs_values else None
                if q_values is not None and count > 1:
                    raw, q_values = keep_best(raw, q_values, self.steering)
            if not return_info:
                return raw.actions
            assert raw.gradient_norms is not None and raw.nonfinite is not None
            return raw.actions, SampleInfo(q_values, raw.gradient_norms, raw.nonfinite)

    def freeze(self) -> SteeredSampler:
        """Packs the weights at the next call and keeps them: later changes of the parameters are not seen.

        Inside torch.compile the current parameters are read all the same.
        """
        self._frozen = True
        self._run = self._make_run()
        _log.info("SteeredSampler is frozen: it no longer follows its networks' parameters; unfreeze() undoes this.")
        return self

    def unfreeze(self) -> SteeredSampler:
        """Back to reading the current parameters at every call."""
        self._frozen = False
        self._run = self._make_run()
        return self

    @property
    def frozen(self) -> bool:
        """Whether calls use weights packed once rather than the current parameters."""
        return self._frozen

    def explain(self, batch_size: int = 1) -> Explanation:
        """Which backend runs a batch of this size, why the others do not, and the exact cost of a call."""
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size is {batch_size!r}; expected an integer >= 1.")
        return self._run.explain(self.backend, self._device(), batch_size)

    def capture(self, batch_size: int) -> Callable[..., Tensor]:
        """A CUDA graph of the whole call at a fixed batch size: returns f(obs, noise, posterior_noise=None) -> actions.

        Raises:
            BackendUnavailable: where the chosen backend has no graphs (they exist on GPUs alone).
        """
        return self._run.capture(self.backend, self._device(), batch_size)

    # ------------------------------------------------------------ what a call needs of the sampler

    @property
    def networks(self) -> dict[str, Any]:
        """The networks as they were given, by name: "flow", "critic", "posterior"."""
        return {"flow": self.flow, "critic": self.critic, "posterior": self.posterior}

    def _check_settings(self) -> None:
        if not isinstance(self.steering, Steering):
            raise TypeError(
                f"steering is {type(self.steering).__name__}; expected a Steering, e.g. Steering.qpilots_u()."
            )
        steering = self.steering
        if isinstance(self.num_steps, bool) or not isinstance(self.num_steps, int) or self.num_steps < 1:
            raise ValueError(f"num_steps is {self.num_steps!r}; expected an integer >= 1.")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision is {self.precision!r}; expected one of {', '.join(map(repr, PRECISIONS))}.")
        low, high = check_bound("action_low", self.action_low), check_bound("action_high", self.action_high)
        if not low < high:
            raise ValueError(f"action_low is {low:g} and action_high {high:g}; expected action_low < action_high.")
        check_layout(self.critic_layout)
        for name, network, needed in (
            ("flow", self.flow, True),
            ("critic", self.critic, steering.steers or steering.num_candidates > 1),
            ("posterior", self.posterior, steering.steers and steering.estimate == "mfm"),
        ):
            check_network(name, network, needed)

    def _make_run(self) -> PackedRun | CallableRun:
        """The way that calls take; made anew where what earlier calls kept must be forgotten."""
        self._check_settings()
        networks, steering, bounds = self.networks, self.steering, (float(self.action_low), float(self.action_high))
        if not all_packed(networks, steering):
            return CallableRun(steering, self.num_steps, self.precision, bounds, self.critic_layout)
        specs = {name: net.spec if isinstance(net, PackableNetwork) else None for name, net in networks.items()}
        spec = SamplerSpec(
            **specs,  # type: ignore[arg-type]
            steering=steering,
            num_steps=self.num_steps,
            precision=self.precision,
            action_low=bounds[0],
            action_high=bounds[1],
        )
        return PackedRun(spec, self._modules, self._frozen, self._choices)

    def _a_packed_network(self) -> PackableNetwork | None:
        """Any network that tells S and A."""
        return next((n for n in self.networks.values() if isinstance(n, PackableNetwork)), None)

    def _device(self) -> torch.device:
        parameter = next(self.parameters(), None)
        return torch.device("cpu") if parameter is None else parameter.device

    def _empty(self, noise: Tensor) -> tuple[RawSample, Tensor | None]:
        members = self.critic.spec.num_members if isinstance(self.critic, PackableNetwork) else 1
        q_values = None if self.critic is None else noise.new_empty(members, 0)
        norms = noise.new_empty(self.num_steps, 0)
        return RawSample(noise[:, 0], norms, norms > 0), q_values

    def _q_values(self, obs: Any, actions: Tensor, count: int) -> Tensor | None:
        """q_values [E, B n] of finished actions [B n, A], count = n of them for each row of obs."""
        critic = self.critic
        if critic is None:
            return None
        if isinstance(critic, PackableNetwork) and isinstance(obs, Tensor):
            wide = as_rows(obs, count)
            return ops.critic_values(wide, actions, critic, precision=self.precision, backend=self.backend)
        of_each = [ask_critic(critic, obs, actions[n::count], self.critic_layout) for n in range(count)]
        return torch.stack(of_each, dim=-1).flatten(1).detach().to(actions.dtype)

    # ------------------------------------------------------------ nn.Module plumbing

    def __setattr__(self, name: str, value: Any) -> None:
        before = getattr(self, name, None)
        super().__setattr__(name, value)
        if name in _SETTINGS and "_run" in self.__dict__:
            try:
                self._run = self._make_run()
            except Exception:
                super().__setattr__(name, before)  # type: ignore[arg-type]
                raise

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SteeredSampler:
        moved = super()._apply(fn, recurse)
        self._run = self._make_run()  # parameters may be elsewhere: pack again where they are now
        return moved

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_run", "_choices")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._choices = Choices()
        self._run = self._make_run()

    def extra_repr(self) -> str:
        return (
            f"{self.steering}, num_steps={self.num_steps}, backend={self.backend!r}, precision={self.precision!r}"
            + (", frozen" if self._frozen else "")
        )
