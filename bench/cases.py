"""Named workloads: whose networks they are, and how to build one with its inputs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from qpilots_fast import CriticEnsemble, FlowMLP, MetaFlowMap, SteeredSampler, Steering
from qpilots_fast.networks import PackableNetwork
from qpilots_fast.spec import NormPlacement

from . import structures

METHODS: dict[str, Steering] = {
    "U": Steering.qpilots_u(),
    "U-identity": Steering.qpilots_u(jacobian="identity"),
    "M": Steering.qpilots_m(),
    "QGF": Steering.qgf(weight=1.0),
}
BATCH_SIZES: tuple[int, ...] = (1, 16, 64, 256, 1024)
PRECISIONS: tuple[str, ...] = ("float32", "bfloat16")


@dataclass(frozen=True)
class Case:
    """Networks by their shape, and where the shape comes from.

    Args:
        flow_norm: LayerNorm of each hidden layer of the flow. critic_norm: of every hidden layer of the critics.
        methods: the keys of METHODS that this case is run with when none is asked for.
        structure: makes flow and critics of another structure from obs_dim, action_dim and num_critics; None: MLPs.
    """

    name: str
    source: str
    obs_dim: int
    action_dim: int
    hidden_dims: tuple[int, ...] = (512,) * 4
    num_critics: int = 10
    flow_norm: tuple[NormPlacement, ...] | None = None
    critic_norm: NormPlacement = "post"
    time_embedding: str = "raw"
    num_steps: int = 10
    methods: tuple[str, ...] = ("U", "M")
    structure: structures.Structure | None = None

    def networks(self, seed: int = 0, device: str = "cpu") -> tuple[PackableNetwork, ...]:
        """Randomly initialised flow, critics and (of MLPs) meta flow map, without gradients for their parameters."""
        if self.structure is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                made = self.structure(self.obs_dim, self.action_dim, self.num_critics)
            return tuple(n.requires_grad_(False).eval().to(device) for n in made)
        sizes = (self.obs_dim, self.action_dim, self.hidden_dims)
        timed = dict(layer_norm=self.flow_norm, time_embedding=self.time_embedding)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            flow = FlowMLP(*sizes, **timed)  # type: ignore[arg-type]
            critic = CriticEnsemble(
                self.obs_dim, self.action_dim, self.num_critics, self.hidden_dims, layer_norm=self.critic_norm
            )
            posterior = MetaFlowMap(*sizes, **timed)  # type: ignore[arg-type]
        return tuple(n.requires_grad_(False).eval().to(device) for n in (flow, critic, posterior))


CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case("paper", "QPILOTS (arXiv 2606.14801) on OGBench cube: 5-wide actions in chunks of 5", 40, 25),
        Case("humanoid", "QPILOTS networks on OGBench humanoidmaze (69-wide observations, 21 joints)", 69, 21),
        Case(
            "qgf", "QGF (arXiv 2606.11087): 2 critics, LayerNorm before the activation, sinusoidal time", 28, 5,
            num_critics=2, flow_norm=("pre", "pre", "pre", None), critic_norm="pre", time_embedding="sinusoidal",
            methods=("QGF",),
        ),
        Case(
            "residual",
            "IDQL's flow (3 blocks 256 -> 1024 -> 256, a learned time MLP), BroNet critics (2 blocks of 512)",
            40, 25, (256,) * 3, methods=("U",), structure=structures.residual,
        ),
        Case(
            "c51", "2 critics 512-256-128 with LayerNorm and 101 atoms, as FastTD3's; the paper's flow",
            40, 25, num_critics=2, methods=("U",), structure=structures.c51,
        ),
        Case("wide", "the paper's observation and action widths with QGF's 1024-wide layers", 40, 25, (1024,) * 4),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Workload:
    """One sampling problem: networks, steering and the inputs of one call, which every contestant shares."""

    case: Case
    method: str
    batch_size: int
    flow: PackableNetwork
    critic: PackableNetwork
    posterior: PackableNetwork | None
    steering: Steering
    obs: Tensor  # [B, S]
    noise: Tensor  # [B, A]
    posterior_noise: Tensor | None  # [K, B, N, A]

    @property
    def num_steps(self) -> int:
        return self.case.num_steps

    def sampler(self, backend: str = "auto", precision: str = "float32", frozen: bool = False) -> SteeredSampler:
        """Our sampler on this workload's networks."""
        sampler = SteeredSampler(
            self.flow, self.critic, self.steering, posterior=self.posterior, num_steps=self.num_steps,
            backend=backend, precision=precision, action_low=-1.0, action_high=1.0,
        )  # fmt: skip
        return sampler.freeze() if frozen else sampler

    def rows(self, index: Tensor) -> Workload:
        """The same networks on some rows of the batch."""
        eps = None if self.posterior_noise is None else self.posterior_noise[:, index]
        return replace(self, batch_size=len(index), obs=self.obs[index], noise=self.noise[index], posterior_noise=eps)

    @cached_property
    def checked_rows(self) -> Tensor:
        """Rows compared with the float64 reference: all up to 64, else 64: both ends and some between (all alike)."""
        if self.batch_size <= 64:
            return torch.arange(self.batch_size)
        middle = torch.randperm(self.batch_size - 32, generator=torch.Generator().manual_seed(0))[:32] + 16
        return torch.cat([torch.arange(16), middle.sort().values, torch.arange(self.batch_size - 16, self.batch_size)])

    @cached_property
    def expected(self) -> Tensor:
        """The float64 reference's actions at checked_rows, on the CPU, float64."""
        some = self.rows(self.checked_rows.to(self.obs.device))
        named = {"flow": self.flow, "critic": self.critic, "posterior": self.posterior}
        networks = {name: None if n is None else _to_cpu_double(n) for name, n in named.items()}
        sampler = replace(self, **networks).sampler("reference", "float64")  # type: ignore[arg-type]
        eps = None if some.posterior_noise is None else some.posterior_noise.cpu().double()
        return sampler(some.obs.cpu().double(), some.noise.cpu().double(), eps)


def _to_cpu_double(network: torch.nn.Module) -> torch.nn.Module:
    import copy

    return copy.deepcopy(network).cpu().double()


def make_workload(
    case: Case, method: str, batch_size: int, *, num_samples: int | None = None, seed: int = 0, device: str = "cpu"
) -> Workload:
    """Builds a workload with standard normal observations and noise.

    Args:
        method: a key of METHODS.
        num_samples: N, where it should differ from the method's own.
    """
    steering = METHODS[method]
    if num_samples is not None:
        steering = replace(steering, num_samples=num_samples)
    flow, critic, *maps = case.networks(seed, device)
    if steering.estimate == "mfm" and not maps:
        raise ValueError(f"case {case.name!r} has no meta flow map for {method}; expected one of {case.methods}.")
    drawn_by = maps[0] if steering.estimate == "mfm" else None
    draw = torch.Generator().manual_seed(seed + 1)
    obs = torch.randn(batch_size, case.obs_dim, generator=draw)
    noise = torch.randn(batch_size, case.action_dim, generator=draw)
    eps = None
    if steering.uses_posterior:
        eps = torch.randn(case.num_steps, batch_size, steering.num_samples, case.action_dim, generator=draw).to(device)
    inputs = (obs.to(device), noise.to(device), eps)
    return Workload(case, method, batch_size, flow, critic, drawn_by, steering, *inputs)
