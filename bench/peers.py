"""The PyTorch loops that qpilots_fast is measured against, each as fast as its user could write it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from qpilots_fast import Steering

from .cases import Workload
from .stacked import StackedNetwork

Run = Callable[[], Tensor]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Contestant:
    """One way to run a workload.

    Args:
        name: "torch eager", "qpilots_fast cpu", ...
        build: makes a function without arguments that runs one call and returns actions [B, A].
        ours: whether this is qpilots_fast.
        frozen: for ours, whether weights are packed once.
        compile_s: seconds its first call usually takes, for the estimate printed at the start.
    """

    name: str
    precision: str
    build: Callable[[Workload], Run]
    ours: bool = False
    frozen: bool = False
    compile_s: float = 0.1

    @property
    def key(self) -> str:
        return f"{self.name}, {self.precision}"


class Fixed(NamedTuple):
    """What stays the same during one call."""

    flow: Tensor  # [B, H]
    critic: Tensor  # [E, B*N, H]
    posterior: Tensor | None  # [B, H]
    eps: Tensor | None  # [K, B*N, A]
    eps_first: Tensor | None  # [K, B*N, H], the first layer's share of eps


class TorchLoop:
    """The steered loop on stacked networks; its gradients are with respect to x (or the clean action) alone.

    State, norms and the critics' statistics stay in float32; bfloat16 is for weights and activations.

    Args:
        functional: gradients by torch.func (for torch.compile) rather than torch.autograd.grad.
    """

    def __init__(self, workload: Workload, dtype: torch.dtype, functional: bool = False) -> None:
        steering = workload.steering
        if steering.estimate not in ("tweedie", "mfm") or steering.scale == "gaf" or steering.q_scale is not None:
            raise ValueError(f"the peers have no {steering}; expected estimate tweedie or mfm, norm_match or absolute.")
        self.steering: Steering = steering
        self.num_steps = workload.num_steps
        self.dtype = dtype
        self.functional = functional
        self.flow = StackedNetwork(workload.flow.bound(), self.num_steps, dtype)
        self.critic = StackedNetwork(workload.critic.bound(), self.num_steps, dtype)
        self.posterior = None
        if workload.posterior is not None:
            self.posterior = StackedNetwork(workload.posterior.bound(), self.num_steps, dtype)

    # ------------------------------------------------------------ once a call

    def fixed(self, obs: Tensor, posterior_noise: Tensor | None) -> Fixed:
        """obs through every first layer, and for M the noise of all steps."""
        flow = self.flow.fixed("obs", obs)
        critic = self.critic.fixed("obs", obs)
        if self.posterior is None or posterior_noise is None:
            return Fixed(flow, critic, None, None, None)
        draws = posterior_noise.shape[2]
        eps = posterior_noise.flatten(1, 2)
        return Fixed(
            flow, critic.repeat_interleave(draws, dim=1), self.posterior.fixed("obs", obs), eps,
            eps.to(self.dtype) @ self.posterior.first["xbar"],
        )  # fmt: skip

    # ------------------------------------------------------------ one step

    def velocity(self, x: Tensor, fixed_flow: Tensor, time: Tensor) -> Tensor:
        """v(obs, x, t) [B, A], float32."""
        z = self.flow.linear(fixed_flow + time, x.to(self.dtype), self.flow.first["noisy_actions"])
        return self.flow.rest(z).float()

    def draws(self, x: Tensor, fixed_posterior: Tensor, time: Tensor, eps: Tensor, eps_first: Tensor) -> Tensor:
        """a_n = X(obs, eps_n; t, x), [B*N, A]; the product with x is shared by the N draws."""
        assert self.posterior is not None
        count = self.steering.num_samples
        z = self.posterior.linear(fixed_posterior + time, x.to(self.dtype), self.posterior.first["noisy_actions"])
        z = z.unsqueeze(1) + eps_first.unflatten(0, (-1, count))
        return eps + self.posterior.rest(z.flatten(0, 1)).float()

    def clip(self, a: Tensor) -> Tensor:
        """The estimate inside the action bounds, with the gradient that the steering asks for."""
        if self.steering.clip == "none":
            return a
        clipped = a.clamp(-1, 1)
        return a + (clipped - a).detach() if self.steering.clip == "straight_through" else clipped

    def value(self, a: Tensor, fixed_critic: Tensor) -> Tensor:
        """Qbar(obs, a) [rows]."""
        steering = self.steering
        z = self.critic.linear(fixed_critic, a.to(self.dtype), self.critic.first["actions"])
        q = self.critic.rest(z).squeeze(-1).float()  # [E, rows]
        if steering.aggregation == "min":
            return q.amin(0)
        if steering.aggregation == "mean":
            return q.mean(0)
        variance, mean = torch.var_mean(q, 0, correction=0)
        return mean - steering.rho * variance.sqrt()

    def objective(
        self, x: Tensor, fixed: Fixed, k: int, times: tuple[Tensor | None, ...], remaining: float | Tensor
    ) -> tuple[Tensor, Tensor]:
        """The steering objective summed over the rows, and v; to be differentiated with respect to x."""
        steering = self.steering
        flow_time, posterior_time = times
        assert flow_time is not None
        if steering.estimate == "tweedie":
            v = self.velocity(x, fixed.flow, flow_time)
            return steering.tau * self.value(self.clip(x + remaining * v), fixed.critic).sum(), v
        assert fixed.posterior is not None and posterior_time is not None
        assert fixed.eps is not None and fixed.eps_first is not None
        with torch.no_grad():  # v is not part of the objective of M
            v = self.velocity(x.detach(), fixed.flow, flow_time)
        a = self.draws(x, fixed.posterior, posterior_time, fixed.eps[k], fixed.eps_first[k])
        q = self.value(self.clip(a), fixed.critic).unflatten(0, (-1, steering.num_samples))
        return torch.logsumexp(steering.tau * q, dim=1).sum(), v

    def gradient(
        self, x: Tensor, fixed: Fixed, k: int, times: tuple[Tensor | None, ...], remaining: float | Tensor
    ) -> tuple[Tensor, Tensor]:
        """g and v, both [B, A]."""
        if self.steering.jacobian == "identity":
            assert times[0] is not None
            v = self.velocity(x, fixed.flow, times[0])
            a = self.clip(x + remaining * v)
            return self._differentiate(lambda at: (self.steering.tau * self.value(at, fixed.critic).sum(), v), a)
        return self._differentiate(lambda at: self.objective(at, fixed, k, times, remaining), x)

    def _differentiate(self, function: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor) -> tuple[Tensor, Tensor]:
        if self.functional:
            return torch.func.grad(function, has_aux=True)(x)
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            objective, v = function(x)
        (g,) = torch.autograd.grad(objective, x)
        return g, v.detach()

    def steered_step(
        self, x: Tensor, fixed: Fixed, k: int, times: tuple[Tensor | None, ...], remaining: float | Tensor
    ) -> Tensor:
        """x after one steered Euler step."""
        steering = self.steering
        g, v = self.gradient(x, fixed, k, times, remaining)
        scale: Tensor | float = steering.alpha
        if steering.scale == "norm_match":
            norms = [torch.linalg.vector_norm(vector, dim=1, keepdim=True) for vector in (v, g)]
            scale = steering.alpha * norms[0] / (norms[1] + steering.eps)
        return x + (v + scale * g) / self.num_steps

    # ------------------------------------------------------------ the loop

    def times(self, k: int) -> tuple[Tensor | None, ...]:
        assert self.flow.time is not None
        posterior = None if self.posterior is None or self.posterior.time is None else self.posterior.time[k]
        return self.flow.time[k], posterior

    def sample(self, obs: Tensor, noise: Tensor, posterior_noise: Tensor | None) -> Tensor:
        """Actions [B, A]: the K steps, then the clip."""
        fixed = self.fixed(obs, posterior_noise)
        x = noise
        for k in range(self.num_steps):
            if k == 0 and not self.steering.steer_first_step:
                time = self.times(0)[0]
                assert time is not None
                x = x + self.velocity(x, fixed.flow, time) / self.num_steps
            else:
                x = self.steered_step(x, fixed, k, self.times(k), 1 - k / self.num_steps)
        return x.clamp(-1, 1)


def build_eager(workload: Workload, precision: str) -> Run:
    """Eager PyTorch: stacked ensemble, torch.autograd.grad with respect to x alone."""
    loop = TorchLoop(workload, DTYPES[precision])

    def run() -> Tensor:
        with torch.no_grad():
            return loop.sample(workload.obs, workload.noise, workload.posterior_noise)

    return run


def build_compiled_loop(workload: Workload, precision: str, mode: str = "default") -> Run:
    """torch.func + torch.compile of the whole call, its K steps unrolled into one graph."""
    loop = TorchLoop(workload, DTYPES[precision], functional=True)
    compiled = torch.compile(loop.sample, dynamic=False, fullgraph=True, mode=None if mode == "default" else mode)

    def run() -> Tensor:
        with torch.no_grad():
            actions = compiled(workload.obs, workload.noise, workload.posterior_noise)
            # reduce-overhead reuses its output memory at the next call
            return actions.clone() if mode == "reduce-overhead" else actions

    return run


def build_compiled_step(workload: Workload, precision: str) -> Run:
    """torch.func + torch.compile of one step, called K times: a tenth of the compile time."""
    loop = TorchLoop(workload, DTYPES[precision], functional=True)
    device = workload.obs.device
    compiled_step = torch.compile(loop.steered_step, dynamic=False, fullgraph=True)
    compiled_velocity = torch.compile(loop.velocity, dynamic=False, fullgraph=True)
    steps = range(loop.num_steps)
    remaining = [torch.tensor(1 - k / loop.num_steps, device=device) for k in steps]  # tensors: one graph for all steps
    times = [loop.times(k) for k in steps]

    def run() -> Tensor:
        with torch.no_grad():
            fixed = loop.fixed(workload.obs, workload.posterior_noise)
            x = workload.noise
            for k in steps:
                if k == 0 and not loop.steering.steer_first_step:
                    time = times[0][0]
                    assert time is not None
                    x = x + compiled_velocity(x, fixed.flow, time) / loop.num_steps
                    continue
                here = fixed
                if fixed.eps is not None and fixed.eps_first is not None:
                    here = fixed._replace(eps=fixed.eps[k : k + 1], eps_first=fixed.eps_first[k : k + 1])
                x = compiled_step(x, here, 0, times[k], remaining[k])
            return x.clamp(-1, 1)

    return run


def build_cuda_graph(workload: Workload, precision: str) -> Run:
    """The eager loop recorded once as a CUDA graph; a call is one replay."""
    run = build_eager(workload, precision)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actions = run()

    def replay() -> Tensor:
        graph.replay()
        return actions

    return replay
