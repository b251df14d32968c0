"""SteeredSampler: a frozen flow policy, steered by a critic while it samples."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, overload

import numpy as np
import torch
from torch import Tensor

from . import backends
from .bounds import DEFAULT_HIGH, DEFAULT_LOW, as_operands, box_of
from .draws import Seeds
from .finish import Finish, empty_sample
from .info import Explanation, SampleInfo
from .inputs import as_tensor, reader_of
from .networks import PackableNetwork
from .recognition import how_each_runs
from .sampler_state import SamplerState
from .settings import DEFAULT_STEPS, check_num_steps
from .steering import Steering
from .trees import map_leaves
from .untraced import untraced
from .warming import warm_up

_log = logging.getLogger("qpilots_fast")

Network = PackableNetwork | Callable[..., Any]


class SteeredSampler(SamplerState):
    """actions = sampler(obs): K Euler steps of a flow policy, each steered by a critic ensemble.

    An nn.Module of yours is tried with `from_module` once, where it is given; one line of the logger "qpilots_fast"
    (INFO) says whether it runs packed or as a callable, and why. It stays what `sampler.flow` is and what is saved.

    Args:
        flow: FlowMLP, `from_module(...)`, or any callable (obs, noisy_actions [B, A], t [B, 1]) -> velocity [B, A].
        critic: CriticEnsemble, `from_module(...)`, or any callable (obs, actions) -> q_values [E, B], or [B, E],
            [B, 1], [B], [E, B, 1], a list or tuple of these; or a list of such modules; None where no critic is asked.
        steering: how to steer; see Steering.
        posterior: MetaFlowMap or callable (obs, xbar, noisy_actions, t) -> [B, A]; for estimate="mfm" alone.
        num_steps: K >= 1 even steps.
        time_grid: K + 1 increasing times from 0 to 1, in place of num_steps.
        backend: "auto", or "reference", "cpu", "triton", "cuda".
        precision: of weights and products: "float32" or "bfloat16" (float32 accumulation and state); "tf32" and
            "float16" where the backend offers them; "float64" on the reference backend.
        action_low: lower bounds of the actions, and of the estimates where the steering clips them: a number, None
            or infinities for no clip, or one per dimension, [A], [D] or [C, D], as a tensor, array or sequence (a
            gymnasium Box's low as it is).
        action_high: the upper bounds, likewise.
        critic_layout: of a callable critic's output: "members_first" [E, B] or "batch_first" [B, E]; "auto" reads it
            from the shape, and asks a critic that returned [B, B] once more at another batch size.
        chunk_shape: (C, D) where an action is a chunk: drawn noise and its actions are [B, C, D], and callables see
            [B, C, D] whatever noise's shape; packed networks read the flat A = C D.

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
        num_steps: int = DEFAULT_STEPS,
        backend: str = "auto",
        precision: str = "float32",
        action_low: Any = DEFAULT_LOW,
        action_high: Any = DEFAULT_HIGH,
        critic_layout: str = "auto",
        chunk_shape: tuple[int, int] | None = None,
        time_grid: Sequence[float] | Tensor | np.ndarray | None = None,
    ) -> None:
        super().__init__()
        self.flow, self.critic, self.posterior = flow, critic, posterior
        self.steering = steering
        self.num_steps = num_steps
        self.time_grid: tuple[float, ...] | None = time_grid  # type: ignore[assignment]
        check_num_steps(num_steps, self.num_steps)
        self.backend = backend
        self.precision = precision
        self.action_low, self.action_high = action_low, action_high
        self.critic_layout = critic_layout
        self.chunk_shape = chunk_shape
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
        *,
        seeds: Seeds | None = ...,
        alpha: Tensor | None = ...,
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
        seeds: Seeds | None = ...,
        alpha: Tensor | None = ...,
    ) -> tuple[Tensor, SampleInfo]: ...

    def forward(
        self,
        obs: Any,
        noise: Tensor | None = None,
        posterior_noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        return_info: bool = False,
        *,
        seeds: Seeds | None = None,
        alpha: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, SampleInfo]:
        """Samples one action per observation; not tracked by autograd.

        B stands for obs's leading dimensions. float64 obs and noise are cast to float32 unless networks or precision
        are float64.

        Args:
            obs: [B, S], or [S] for one, or [B, T, S] and so on, as a tensor or numpy array; any object where flow and
                critic are callables that read it (then noise gives B and A).
            noise: [B, A] start of the flow; drawn where None. Chunks [B, C, D] with A = C D: actions then are too,
                and callables see them so. With num_candidates = n > 1 also [B, n, A] and [B, n, C, D]; from [B, A]
                the candidates start at n fixed rotations of the noise, so that the result stays a function of it.
            posterior_noise: [K, B, N, A] or [K, B, N, C, D], entry k serves step k; drawn where None and needed.
            generator: for what is drawn.
            return_info: also return a SampleInfo.
            seeds: B integers, or B CPU generators, in place of generator: what row i draws (on the CPU) follows from
                its seed alone, in any batch and on any device. Beside noise, for posterior_noise alone.
            alpha: [B] >= 0, the strength of each row in place of Steering.alpha: a sweep in one batch.

        Returns:
            actions in [action_low, action_high], of noise's shape (where noise is drawn, [B, A], or [B, C, D] with a
            chunk_shape), or (actions, SampleInfo).

        Raises:
            ValueError, TypeError: wrong shapes, dtypes, devices, or non-finite obs or noise.
        """
        if torch.compiler.is_compiling() and self._is_untraceable(obs, noise):
            return _untraced_call(self, obs, noise, posterior_noise, generator, return_info, seeds=seeds, alpha=alpha)
        run = self._run
        plain = generator is None and seeds is None and not return_info
        if plain and not torch.compiler.is_compiling():  # traced: no guard on it
            quick = run.quick(self.backend)
            actions = None if quick is None else quick(obs, noise, posterior_noise, alpha)
            if actions is not None:
                if self._remarks.calls_left:
                    self._remarks.on_actions(actions, self.action_low, self.action_high)
                chunk = self.chunk_shape
                return actions if chunk is None or noise is not None else actions.unflatten(1, chunk)
        with torch.no_grad():
            run, networks = self._current(obs, noise)
            inputs = reader_of(self, networks).read(obs, noise, posterior_noise, generator, seeds, alpha)
            layout = inputs.layout
            box = box_of(self.action_low, self.action_high, layout.action_dim, layout.chunk or layout.action)
            bounds = as_operands(*box, inputs.noise)
            if inputs.noise.shape[0] == 0:  # len() would make a symbolic size a number
                raw, q_values = empty_sample(networks["critic"], inputs.noise, self.num_steps)
            else:
                try:
                    raw = run.sample(networks, self.backend, inputs, bounds, return_info)
                except Exception as error:
                    self._check_unread(obs, error)
                    raise
                critic = run.finishing_critic(networks["critic"])
                finish = Finish(critic, self.steering, self.precision, self.backend, self.critic_layout)
                raw, q_values = finish(inputs, raw, bounds, return_info)
                if not torch.compiler.is_compiling() and self._remarks.calls_left:  # traced: no guard on it
                    self._remarks.on_actions(raw.actions, self.action_low, self.action_high)
            actions = layout.unfold(raw.actions, *layout.action)
            if not return_info:
                return actions
            return actions, SampleInfo.of(raw, q_values, layout)

    def act(self, obs: Any, seeds: Seeds | None = None) -> np.ndarray:
        """What an environment loop calls: actions as a float32 array, not tracked by autograd.

        Args:
            obs: as in a call ([S], [B, S] or more), an array, or a tensor on any device.
            seeds: one integer for each observation, [s] for one.

        Returns:
            [A] for one observation, [B, A] for B; chunks where a chunk_shape says so.

        Raises:
            ValueError, TypeError: as a call.
        """
        device = self._device()

        def ready(leaf: Any) -> Any:
            if isinstance(leaf, np.ndarray) and leaf.dtype.kind in "fiub":  # texts stay what they are
                return as_tensor("obs", leaf, device)
            return leaf.to(device) if isinstance(leaf, Tensor) else leaf

        obs = as_tensor("obs", obs, device) if isinstance(obs, np.ndarray) else map_leaves(ready, obs)
        actions = self(obs, seeds=seeds)
        return actions.to("cpu", torch.float32).numpy()

    def freeze(self) -> SteeredSampler:
        """Packs the weights at the next call and keeps them: later changes of the parameters are not seen.

        A setting assigned later, a .to() and a copy pack the parameters as they then are; the log says so. Inside
        torch.compile the current parameters are read all the same.
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

    def warm_up(self, batch_sizes: Sequence[int] = (1,), obs: Any = None) -> SteeredSampler:
        """Does now what the first calls would do (allocate, pack, compile), so that the next one at any of these batch
        sizes is as fast as those after it. Draws nothing from torch's generators.

        Args:
            batch_sizes: each >= 1. `explain` says how many of them the backend keeps ready.
            obs: a batch of observations to call with, where the networks are callables that read any obs; else zeros.

        Raises:
            ValueError, TypeError: for sizes that are not integers >= 1, and where no network tells a width.
        """
        left, self._remarks.calls_left = self._remarks.calls_left, 0  # these actions are nobody's
        try:
            warm_up(self, batch_sizes, obs)
        finally:
            self._remarks.calls_left = left
        return self

    def explain(self, batch_size: int = 1) -> Explanation:
        """Which networks run packed, and why the others do not; which backend runs a batch of this size, why the
        others do not, and the exact cost of a call.

        Raises:
            ValueError: for a batch_size that is no integer >= 1.
        """
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size is {batch_size!r}; expected an integer >= 1.")
        found = self._current()[0].explain(self.backend, self._device(), batch_size)
        return replace(found, networks=how_each_runs(self._given(), self._own, self.steering))

    def capture(self, batch_size: int) -> Callable[..., Tensor]:
        """A CUDA graph of the whole call at a fixed batch size: returns f(obs, noise, posterior_noise=None) -> actions.

        Every replay reads what the parameters' memory holds then (frozen: the weights packed once). f draws nothing
        itself, and takes float32 tensors of the networks' device in just these shapes: [B, S], [B, A], [K, B, N, A].

        Raises:
            BackendUnavailable: where the chosen backend has no graphs (they exist on GPUs alone), and for
                num_candidates > 1.
        """
        return self._current()[0].capture(self.backend, self._device(), batch_size)


@untraced
def _untraced_call(sampler: SteeredSampler, *arguments: Any, **named: Any) -> Any:
    """sampler(...): a loop around users' callables is theirs to compile, network by network."""
    return sampler(*arguments, **named)
