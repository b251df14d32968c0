"""Diffusion policies: any Gaussian path x_s = alpha_s x1 + sigma_s e, whatever the network predicts.

Two ways to steer one. `DiffusionVelocity` makes the network a flow for SteeredSampler: every Gaussian path is the
linear path in other units, and DDIM is Euler there, step for step. `ddim_steered_sample` steers in DDIM's own
coordinates xbar = x / alpha, lambda = sigma / alpha, where d xbar = e d lambda (docs/method.md, "Diffusion policies").
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from .. import backends, reference
from ..backends import Request
from ..bounds import as_lists, as_operands
from ..evaluators import evaluators
from ..networks import PackableNetwork
from ..sampler import SampleInfo
from ..steering import Steering, check_choice

PREDICTIONS = ("epsilon", "clean", "v")
_IN_DIFFUSERS = {"sample": "clean", "v_prediction": "v"}


def prediction_of(owner: str, name: str) -> str:
    """One of PREDICTIONS, of its own name or of diffusers' (`scheduler.config.prediction_type`)."""
    prediction = _IN_DIFFUSERS.get(name, name)
    check_choice(f"{owner}: prediction", prediction, PREDICTIONS)
    return prediction


@dataclass(frozen=True)
class GaussianPath:
    """alpha and sigma of x_s = alpha_s x1 + sigma_s e at timesteps s, from clean to noise.

    Args:
        timesteps: what the network is told, strictly increasing (0 .. T-1, or continuous times).
        alphas: 0 or more, one a timestep, alpha / (alpha + sigma) strictly decreasing.
        sigmas: 0 or more, one a timestep.

    Raises:
        ValueError: for anything else.
    """

    timesteps: tuple[float, ...]
    alphas: tuple[float, ...]
    sigmas: tuple[float, ...]

    def __post_init__(self) -> None:
        lengths = {len(self.timesteps), len(self.alphas), len(self.sigmas)}
        if len(lengths) != 1 or len(self.timesteps) < 2:
            raise ValueError(
                f"GaussianPath: got {len(self.timesteps)} timesteps, {len(self.alphas)} alphas, {len(self.sigmas)} "
                "sigmas; expected equally many, at least 2."
            )
        if not all(math.isfinite(a) and math.isfinite(s) and min(a, s) >= 0 < a + s for a, s in self._levels()):
            raise ValueError("GaussianPath: expected alphas and sigmas finite and >= 0, not both 0 at once.")
        times = [a / (a + s) for a, s in self._levels()]
        if any(b <= a for a, b in pairwise(self.timesteps)) or any(b >= a for a, b in pairwise(times)):
            raise ValueError(
                "GaussianPath: expected timesteps that increase and alpha / (alpha + sigma) that decreases, "
                "entry by entry: from clean to noise."
            )
        object.__setattr__(self, "_times", tuple(reversed(times)))

    def _levels(self) -> list[tuple[float, float]]:
        return list(zip(self.alphas, self.sigmas))

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: Tensor | Sequence[float]) -> GaussianPath:
        """DDPM's table (diffusers: `scheduler.alphas_cumprod`): alpha^2 = abar_s, sigma^2 = 1 - abar_s."""
        table = torch.as_tensor(alphas_cumprod, dtype=torch.float64).tolist()
        alphas, sigmas = [math.sqrt(a) for a in table], [math.sqrt(max(1 - a, 0.0)) for a in table]
        return cls(tuple(float(s) for s in range(len(table))), tuple(alphas), tuple(sigmas))

    @classmethod
    def tabulate(
        cls, alpha: Callable[[float], float], sigma: Callable[[float], float], timesteps: Sequence[float]
    ) -> GaussianPath:
        """A continuous path at the timesteps given; between them `at_time` interpolates."""
        steps = tuple(float(s) for s in timesteps)
        return cls(steps, tuple(float(alpha(s)) for s in steps), tuple(float(sigma(s)) for s in steps))

    def at_time(self, t: float) -> tuple[float, float, float]:
        """(timestep, alpha, sigma) where alpha / (alpha + sigma) = t; the table's end beyond its range.

        Between entries the timestep and alpha^2 + sigma^2 (1 throughout for DDPM's) are interpolated linearly.
        """
        times: tuple[float, ...] = self._times  # type: ignore[attr-defined]
        t = min(max(t, times[0]), times[-1])
        right = min(max(bisect.bisect_left(times, t), 1), len(times) - 1)
        part = (t - times[right - 1]) / (times[right] - times[right - 1])
        noisier, cleaner = len(times) - right, len(times) - 1 - right  # indices of the table
        timestep = (1 - part) * self.timesteps[noisier] + part * self.timesteps[cleaner]
        size = [self.alphas[i] ** 2 + self.sigmas[i] ** 2 for i in (noisier, cleaner)]
        scale = math.sqrt(((1 - part) * size[0] + part * size[1]) / (t * t + (1 - t) * (1 - t)))
        return timestep, t * scale, (1 - t) * scale


def _noise_and_clean(
    network: Callable[..., Tensor],
    prediction: str,
    clip: float | None,
    obs: Any,
    x: Tensor,
    timestep: float,
    alpha: float,
    sigma: float,
) -> tuple[Tensor, Tensor]:
    """The network's estimates of e and of x1 at x = alpha x1 + sigma e; they always satisfy that equation."""
    steps = torch.full((x.shape[0],), timestep, dtype=x.dtype, device=x.device)
    predicted = network(obs, x, steps)
    noise, clean = (of(prediction, predicted, x, alpha, sigma) for of in (noise_of, clean_of))
    if clip is not None:
        clean = clean.clamp(-clip, clip)
        noise = _noise_from(x, clean, alpha, sigma)
    return noise, clean


def noise_of(prediction: str, predicted: Tensor, x: Tensor, alpha: float, sigma: float) -> Tensor:
    """e of what a network of this kind (see PREDICTIONS) predicts at x = alpha x1 + sigma e."""
    if prediction == "epsilon":
        return predicted
    if prediction == "clean":
        return _noise_from(x, predicted, alpha, sigma)
    return (sigma * x + alpha * predicted) / (alpha * alpha + sigma * sigma)  # v = alpha e - sigma x1


def clean_of(prediction: str, predicted: Tensor, x: Tensor, alpha: float, sigma: float) -> Tensor:
    """x1 of the same."""
    if prediction == "clean":
        return predicted
    if prediction == "epsilon":
        if alpha == 0:
            raise ValueError(
                "an epsilon network says nothing about the clean action where alpha = 0; start at alpha > 0."
            )
        return (x - sigma * predicted) / alpha
    return (alpha * x - sigma * predicted) / (alpha * alpha + sigma * sigma)


def _noise_from(x: Tensor, clean: Tensor, alpha: float, sigma: float) -> Tensor:
    if sigma == 0:
        raise ValueError("a clean-action network says nothing about the noise where sigma = 0; end at sigma > 0.")
    return (x - alpha * clean) / sigma


class DiffusionVelocity(nn.Module):
    """A diffusion network as a flow: velocity(obs, z, t) = E[x1] - E[e] at x = (alpha + sigma) z.

    z = t x1 + (1 - t) e with t = alpha / (alpha + sigma). Unsteered, SteeredSampler's Euler steps are DDIM's on the
    timesteps where t = k / K. Steering acts on the linear path's velocity; for DDIM's own coordinates see
    `ddim_steered_sample`.

    Args:
        network: (obs, x [B, A], timestep [B]) -> [B, A]; timesteps between the table's are fractional.
        path: alpha and sigma.
        prediction: what the network predicts: "epsilon", "clean" (diffusers: "sample"), or "v", which is
            alpha e - sigma x1 (diffusers: "v_prediction").
        clip: bound on |x1|; the noise is recomputed to match. Below the table's first t (t = 0 always is) the table's
            last timestep is used; there an epsilon network's clean estimate is a large multiple of its error, so
            give the bound that the policy was trained with.

    Raises:
        ValueError: for another prediction; in a call, where t differs between rows, and where the path's end leaves
            the estimate undefined (alpha = 0 for epsilon, sigma = 0 for clean).
    """

    def __init__(
        self, network: Callable[..., Tensor], path: GaussianPath, prediction: str = "epsilon", clip: float | None = None
    ) -> None:
        super().__init__()
        prediction = prediction_of("DiffusionVelocity", prediction)
        self.network = network
        self.path = path
        self.prediction = prediction
        self.clip = clip

    def forward(self, obs: Any, noisy_actions: Tensor, t: Tensor) -> Tensor:
        """Returns the velocity [B, A] at noisy_actions z [B, A] and t [B, 1], the same t in every row."""
        time = float(t.reshape(-1)[0])
        if not bool((t == t.reshape(-1)[0]).all()):
            raise ValueError(
                "DiffusionVelocity: t differs between rows; expected one t for the batch, as a sampler gives."
            )
        timestep, alpha, sigma = self.path.at_time(time)
        x = (alpha + sigma) * noisy_actions
        noise, clean = _noise_and_clean(self.network, self.prediction, self.clip, obs, x, timestep, alpha, sigma)
        return clean - noise


class _DDIMDrift:
    """u(obs, xbar) = -e, the drift toward data per unit of -lambda, at the level set last."""

    def __init__(self, network: Callable[..., Tensor], prediction: str, clip: float | None) -> None:
        self._network, self._prediction, self._clip = network, prediction, clip
        self.level = (0.0, 1.0, 0.0)

    def __call__(self, obs: Any, xbar: Tensor, _: Tensor) -> Tensor:
        timestep, alpha, sigma = self.level
        x = alpha * xbar
        return -_noise_and_clean(self._network, self._prediction, self._clip, obs, x, timestep, alpha, sigma)[0]


@torch.no_grad()
def ddim_steered_sample(
    network: Callable[..., Tensor],
    critic: Any,
    steering: Steering,
    path: GaussianPath,
    obs: Any,
    noise: Tensor,
    *,
    num_steps: int = 10,
    timesteps: Sequence[int] | None = None,
    prediction: str = "epsilon",
    clip: float | None = None,
    action_low: Any = -1.0,
    action_high: Any = 1.0,
    backend: str = "auto",
    critic_layout: str = "auto",
) -> tuple[Tensor, SampleInfo]:
    """DDIM, each step steered: xbar += (lambda_k - lambda_k+1) (u + alpha ||u|| / (||g|| + eps) g), u = -e.

    g is the gradient of the steering objective with respect to xbar, taken at the clean estimate xbar + lambda u;
    norm match, pessimism, clip and Jacobian are those of SteeredSampler.

    Args:
        network: (obs, x [B, A], timestep [B]) -> [B, A].
        critic: CriticEnsemble, from_module(...), or any (obs, actions) -> q_values that SteeredSampler reads; None
            if unsteered.
        steering: with estimate="tweedie" and one candidate.
        path: alpha and sigma; alpha > 0 at the timesteps used.
        obs: any object that network and critic read.
        noise: x at the first timestep, [B, A].
        num_steps: K, at most as many as the path has.
        timesteps: K indices into the path, from noise to clean; by default spread evenly, from the last. The step
            after the last one ends at lambda = 0, the clean estimate.
        prediction: as DiffusionVelocity's.
        clip: as DiffusionVelocity's.
        action_low: lower bounds of the estimates (where the steering clips them) and of the result, as
            SteeredSampler's.
        action_high: the upper bounds of the same.
        backend: where a packed critic runs.
        critic_layout: of a callable critic's output, as SteeredSampler's.

    Returns:
        actions [B, A], and a SampleInfo (q_values None).

    Raises:
        ValueError: for other estimates, or a path with alpha = 0 at a timestep used.
    """
    prediction = prediction_of("ddim_steered_sample", prediction)
    if steering.steers and (steering.estimate != "tweedie" or steering.num_candidates != 1):
        raise ValueError(
            f"ddim_steered_sample: steering has estimate={steering.estimate!r} and "
            f"num_candidates={steering.num_candidates}; expected 'tweedie' and 1 (for others, run DiffusionVelocity in "
            "SteeredSampler)."
        )
    count = len(path.timesteps)
    if timesteps is None:
        if not 1 <= num_steps <= count:
            raise ValueError(
                f"ddim_steered_sample: num_steps is {num_steps}; expected 1 to {count}, the path's length."
            )
        spread = (count - 1) / num_steps if num_steps < count else 1
        timesteps = [round(count - 1 - k * spread) for k in range(num_steps)]
    levels = [(path.timesteps[i], path.alphas[i], path.sigmas[i]) for i in timesteps]
    if any(alpha == 0 for _, alpha, _ in levels):
        raise ValueError("ddim_steered_sample: alpha is 0 at a timestep used; x / alpha needs alpha > 0.")
    lambdas = [sigma / alpha for _, alpha, sigma in levels] + [0.0]
    if any(b >= a for a, b in pairwise(lambdas)):
        raise ValueError(f"ddim_steered_sample: timesteps is {list(timesteps)}; expected indices from noise to clean.")
    drift = _DDIMDrift(network, prediction, clip)
    packed = tuple(n.spec for n in (network, critic) if isinstance(n, PackableNetwork))
    chosen = backends.choose(Request(backend, "float32", noise.device, noise.dtype, networks=packed)).backend
    net = evaluators(drift, critic, None, steering, chosen, "float32", obs, critic_layout)
    low, high = as_lists(action_low, action_high, noise.shape[-1], noise.shape[1:])
    bounds = as_operands(low, high, noise)
    xbar = noise / levels[0][1]
    reports = []
    times = [alpha / (alpha + sigma) for _, alpha, sigma in levels]
    schedule = steering.schedule(len(levels), [*times, 1.0])
    for k, (level, step) in enumerate(zip(levels, schedule)):
        drift.level = level
        u, pullback = net.flow(xbar, 0.0)
        report = reference.unsteered_report(noise)
        if step.weight > 0:
            # the estimate xbar + lambda u is the linear path's x + (1 - t) v with 1 - t = lambda
            g, std = reference.steering_gradient(net, steering, xbar, u, pullback, 1 - lambdas[k], None, bounds)
            u, report = reference.steer_velocity(u, g, steering, std, steering.alpha * step.weight)
        reports.append(report)
        xbar = xbar + (lambdas[k] - lambdas[k + 1]) * u
    return xbar.clamp(*bounds), SampleInfo(None, *map(torch.stack, zip(*reports)))
