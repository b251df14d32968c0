"""Inputs and tolerances for the tests and the benchmark harness: written once, used by both."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from .activations import ACTIVATIONS
from .networks import CriticEnsemble, FlowMLP, MetaFlowMap
from .sampler import SteeredSampler
from .steering import Steering


@dataclass(frozen=True)
class Tolerance:
    """Bounds on |actions - float64 reference| at K = 10, actions in [-1, 1]; None leaves a bound out."""

    max_error: float | None
    mean_error: float | None


# float32: K steps of products over up to 1024 terms, each with 2^-24 relative rounding, stay below 1e-4.
# 16-bit operands round each factor by 2^-9 (bfloat16) or 2^-12 (float16, tf32): single rows may amplify this where
# a steering gradient nearly vanishes, so the bound is on the mean.
TOLERANCES: dict[str, Tolerance] = {
    "float32": Tolerance(1e-4, 1e-5),
    "bfloat16": Tolerance(None, 5e-3),
    "float16": Tolerance(None, 1e-3),
    "tf32": Tolerance(None, 1e-3),
}

# bfloat16 actions are at most this many times as far off as those of the same loop in torch's own bfloat16
BFLOAT16_ERROR_OVER_TORCH = 1.5

PRESETS: dict[str, Steering] = {
    "qpilots_u": Steering.qpilots_u(),
    "qpilots_u_identity": Steering.qpilots_u(jacobian="identity"),
    "qpilots_m": Steering.qpilots_m(),
    "qgf": Steering.qgf(0.1),
    "qgf_jacobian": Steering.qgf(0.1, jacobian="full"),
    "noisy": Steering.noisy(0.1),
    "gaf": Steering.gaf(0.5),
    "best_of_n": Steering.best_of_n(3),
    "unsteered": Steering.unsteered(),
    "glass": Steering(estimate="glass", num_samples=2, glass_steps=2),
}


def settings_grid(*estimates: str) -> dict[str, Steering]:
    """Every rule of clipping, aggregation and scale beside each estimate."""
    rules = (
        ("straight_through", "pessimistic", "norm_match"),
        ("masked", "min", "absolute"),
        ("none", "mean", "gaf"),
        ("masked", "pessimistic", "gaf"),
    )
    settings = {}
    for estimate, (clip, aggregation, scale) in product(estimates, rules):
        steering = Steering(alpha=0.3, estimate=estimate, num_samples=2 if estimate in ("mfm", "glass") else 1, tau=1.7)  # type: ignore[arg-type]
        name = f"{estimate}-{clip}-{aggregation}-{scale}"
        settings[name] = replace(steering, clip=clip, aggregation=aggregation, scale=scale)  # type: ignore[arg-type]
    return settings


@dataclass(frozen=True)
class Case:
    """Networks, steering and inputs of one sampling call."""

    flow: FlowMLP
    critic: CriticEnsemble
    posterior: MetaFlowMap
    steering: Steering
    obs: Tensor
    noise: Tensor
    posterior_noise: Tensor | None
    num_steps: int
    bounds: tuple[Any, Any] = (-1.0, 1.0)
    time_grid: tuple[float, ...] | None = None

    def sampler(self, backend: str, precision: str = "float32") -> SteeredSampler:
        return SteeredSampler(
            self.flow, self.critic, self.steering, posterior=self.posterior, num_steps=self.num_steps, backend=backend,
            precision=precision, action_low=self.bounds[0], action_high=self.bounds[1], time_grid=self.time_grid,
        )  # fmt: skip

    def expected(self) -> Tensor:
        """Actions of the float64 reference, from the same (float32) weights and noise."""
        return self.double().run("reference")

    def run(self, backend: str, precision: str = "float32") -> Tensor:
        return self.sampler(backend, precision)(self.obs, self.noise, self.posterior_noise)

    def double(self) -> Case:
        """The same values in float64."""
        networks = {name: copy.deepcopy(getattr(self, name)).double() for name in ("flow", "critic", "posterior")}
        eps = None if self.posterior_noise is None else self.posterior_noise.double()
        return replace(self, **networks, obs=self.obs.double(), noise=self.noise.double(), posterior_noise=eps)

    def to(self, device: torch.device | str) -> Case:
        """The same case on another device."""
        networks = {name: copy.deepcopy(getattr(self, name)).to(device) for name in ("flow", "critic", "posterior")}
        eps = None if self.posterior_noise is None else self.posterior_noise.to(device)
        return replace(self, **networks, obs=self.obs.to(device), noise=self.noise.to(device), posterior_noise=eps)

    def with_steering(self, steering: Steering) -> Case:
        """Another steering of the same networks, with posterior noise of its shape."""
        generator = torch.Generator().manual_seed(1)
        return replace(self, steering=steering, posterior_noise=_draws(steering, self.num_steps, self.noise, generator))


def _draws(steering: Steering, num_steps: int, noise: Tensor, generator: torch.Generator) -> Tensor | None:
    if not (steering.steers and steering.uses_posterior):
        return None
    shape = (num_steps, noise.shape[0], steering.num_samples, noise.shape[1])
    return torch.randn(shape, generator=generator)


def make_case(
    steering: Steering | None = None,
    *,
    seed: int = 0,
    batch_size: int = 17,
    obs_dim: int = 7,
    action_dim: int = 5,
    num_critics: int = 3,
    hidden_dims: tuple[int, ...] = (37, 24),
    activation: str = "gelu_tanh",
    layer_norm: str | tuple[str | None, ...] | None = None,
    critic_layer_norm: str | tuple[str | None, ...] | None = "post",
    time_embedding: str = "raw",
    num_steps: int = 10,
) -> Case:
    """Random networks and inputs, float32, with LayerNorm weights and biases away from their initial 1 and 0."""
    generator = torch.Generator().manual_seed(seed)
    steering = Steering.qpilots_u() if steering is None else steering
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        common = dict(hidden_dims=hidden_dims, activation=activation)
        timed = dict(common, layer_norm=layer_norm, time_embedding=time_embedding)
        flow = FlowMLP(obs_dim, action_dim, **timed)  # type: ignore[arg-type]
        posterior = MetaFlowMap(obs_dim, action_dim, **timed)  # type: ignore[arg-type]
        critic = CriticEnsemble(obs_dim, action_dim, num_critics, layer_norm=critic_layer_norm, **common)  # type: ignore[arg-type]
    with torch.no_grad():
        for network in (flow, posterior, critic):
            for parameter in network.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    noise = torch.randn(batch_size, action_dim, generator=generator)
    obs = torch.randn(batch_size, obs_dim, generator=generator)
    eps = _draws(steering, num_steps, noise, generator)
    return Case(flow, critic, posterior, steering, obs, noise, eps, num_steps)


# not symexp, the scale of a value: e^e^z of two hidden layers is beyond any float
BETWEEN_LAYERS = tuple(name for name in ACTIVATIONS if name != "symexp")


def random_case(seed: int, *, batch_size: int | None = None) -> Case:
    """A case whose every choice (shape, activation, norms, steering) follows from the seed."""
    generator = torch.Generator().manual_seed(seed)

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    norms = (None, "pre", "post")
    presets = [steering for name, steering in PRESETS.items() if name != "best_of_n"]
    depth = pick(1, 4)
    return make_case(
        presets[pick(0, len(presets) - 1)],
        seed=seed,
        batch_size=pick(1, 40) if batch_size is None else batch_size,
        obs_dim=pick(1, 20),
        action_dim=pick(1, 30),
        num_critics=pick(1, 5),
        # LayerNorm over a few units is close to a sign function, which float32 cannot follow whoever computes it
        hidden_dims=tuple(pick(12, 90) for _ in range(depth)),
        activation=BETWEEN_LAYERS[pick(0, len(BETWEEN_LAYERS) - 1)],
        layer_norm=tuple(norms[pick(0, 2)] for _ in range(depth)),
        critic_layer_norm=tuple(norms[pick(0, 2)] for _ in range(depth)),
        time_embedding=("raw", "sinusoidal", "fourier")[pick(0, 2)],
        num_steps=pick(1, 10),
    )


@dataclass(frozen=True)
class Comparison:
    """How far a result is from what was expected; `words` say what is wrong with it, and are empty where it passed."""

    max_error: float
    mean_error: float
    words: str = ""

    @property
    def passed(self) -> bool:
        return not self.words


def compare(actual: Tensor, expected: Tensor, precision: str = "float32", scale: float = 1.0) -> Comparison:
    """Holds a result on any device to the precision's tolerance; scale widens it for larger quantities."""
    if actual.shape != expected.shape:
        wrong = f"shape {list(actual.shape)}, expected {list(expected.shape)}"
        return Comparison(float("inf"), float("inf"), wrong)
    error = (actual.detach().cpu().double() - expected.detach().cpu().double()).abs()
    worst, mean = error.max().item(), error.mean().item()
    tolerance = TOLERANCES[precision]
    for name, got, bound in (("max", worst, tolerance.max_error), ("mean", mean, tolerance.mean_error)):
        if bound is not None and not got <= bound * scale:  # "not <=" also catches NaN
            return Comparison(worst, mean, f"{precision}: {name} error {got:.1e}, expected <= {bound * scale:.1e}")
    return Comparison(worst, mean)


def assert_close(actual: Tensor, expected: Tensor, precision: str = "float32", scale: float = 1.0) -> None:
    """Raises AssertionError where `compare` does not pass."""
    compared = compare(actual, expected, precision, scale)
    assert compared.passed, compared.words
