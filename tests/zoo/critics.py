"""Critics in the shapes of public codebases."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qpilots_fast.activations import ACTIVATIONS

from .entries import A, Entry, H, S, mlp


class Cat(nn.Module):
    """A network of [obs, action], and what is read from its output."""

    def __init__(self, *layers: nn.Module, read: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.net, self.read = nn.Sequential(*layers), read

    def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        out = self.net(torch.cat([obs, actions], -1))
        return out if self.read is None else self.read(out)


class Several(nn.Module):
    """Members asked one after the other; stacked, or as a tuple."""

    def __init__(self, member: Callable[[], nn.Module], count: int = 2, stacks: bool = False) -> None:
        super().__init__()
        self.members, self.stacks = nn.ModuleList(member() for _ in range(count)), stacks

    def forward(self, obs: Tensor, actions: Tensor):
        values = tuple(member(obs, actions) for member in self.members)
        return torch.stack([value.squeeze(-1) for value in values]) if self.stacks else values


class Residual(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def plain(**kwargs) -> Callable[[], nn.Module]:
    return lambda: Cat(mlp(S + A, 1, **kwargs))


def twice(member: Callable[[], nn.Module], **kwargs) -> Callable[[], nn.Module]:
    return partial(Several, member, **kwargs)


def quantile_mean(count: int) -> Callable[[], nn.Module]:
    return lambda: Cat(mlp(S + A, count), read=lambda out: out.mean(-1, keepdim=True))


class Atoms(nn.Module):
    """A categorical critic's expectation over a support in a buffer."""

    def __init__(self, atoms: int = 21, symexp: bool = False, net: nn.Module | None = None) -> None:
        super().__init__()
        self.net = net or mlp(S + A, atoms)
        self.symexp = symexp
        self.register_buffer("support", torch.linspace(-5, 5, atoms))

    def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        p = F.softmax(self.net(torch.cat([obs, actions], 1)), dim=1)
        value = (p * self.support).sum(1)
        return torch.sign(value) * (torch.exp(value.abs()) - 1) if self.symexp else value


class Bins(Atoms):
    """The expectation as a product with the bins."""

    def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        return self.net(torch.cat([obs, actions], -1)).softmax(-1) @ self.support


class HLGauss(nn.Module):
    """Centres between the edges of bins, which a buffer holds."""

    def __init__(self, bins: int = 15) -> None:
        super().__init__()
        self.net = mlp(S + A, bins, nn.GELU)
        self.register_buffer("edges", torch.linspace(-3, 3, bins + 1))

    def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        p = self.net(torch.cat([obs, actions], -1)).softmax(-1)
        return (p * ((self.edges[:-1] + self.edges[1:]) / 2)).sum(-1, keepdim=True)


class PerCritic(nn.Module):
    """Each critic's lowest quantiles averaged."""

    def __init__(self, quantiles: int = 12, dropped: int = 2) -> None:
        super().__init__()
        self.nets = nn.ModuleList(mlp(S + A, quantiles) for _ in range(2))
        self.count = quantiles - dropped

    def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        z = torch.stack([net(torch.cat([obs, actions], -1)) for net in self.nets], 1)
        return z.sort(-1).values[..., : self.count].mean(-1)


class Pooled(PerCritic):
    """TQC's target: the quantiles of all critics sorted together."""

    def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        z = torch.stack([net(torch.cat([obs, actions], -1)) for net in self.nets], 1)
        return z.flatten(1).sort(-1).values[:, : self.count].mean(-1, keepdim=True)


class Pessimistic(Several):
    def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        return torch.min(self.members[0](obs, actions), self.members[1](obs, actions))


class Attributes(nn.Module):
    """Layers as attributes, activations as calls."""

    def __init__(self, act: Callable[[Tensor], Tensor] = F.relu) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(S + A, H), nn.Linear(H, H), nn.Linear(H, 1)
        self.act = act

    def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        x = self.act(self.fc1(torch.cat([obs, actions], 1)))
        return self.fc3(self.act(self.fc2(x)))


class BroNet(nn.Module):
    """BRO's critic: Linear, LayerNorm, ReLU, then blocks with a LayerNorm after each Linear."""

    def __init__(self, blocks: int = 2, quantiles: int = 1) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(S + A, H), nn.LayerNorm(H), nn.ReLU())
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(H, H), nn.LayerNorm(H), nn.ReLU(), nn.Linear(H, H), nn.LayerNorm(H))
            for _ in range(blocks)
        )
        self.last = nn.Linear(H, quantiles)

    def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        x = self.first(torch.cat([obs, actions], -1))
        for block in self.blocks:
            x = x + block(x)
        return self.last(x).mean(-1, keepdim=True) if self.last.out_features > 1 else self.last(x)


def simba() -> nn.Module:
    def block() -> nn.Module:
        return Residual(nn.LayerNorm(H), nn.Linear(H, 4 * H), nn.ReLU(), nn.Linear(4 * H, H))

    return Cat(nn.Linear(S + A, H), block(), block(), nn.LayerNorm(H), nn.Linear(H, 1))


class Hyperspherical(nn.Module):
    """SimBaV2: rows of length one after every layer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(S + A, H, bias=False), nn.Linear(H, 1, bias=False)

    def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        return self.fc2(F.normalize(F.relu(self.fc1(torch.cat([obs, actions], -1))), dim=-1))


class SimNorm(nn.Module):
    """TD-MPC2's simplices: a softmax over groups of eight."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(S + A, H), nn.Linear(H, 1)

    def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        x = self.fc1(torch.cat([obs, actions], -1))
        return self.fc2(x.view(*x.shape[:-1], -1, 8).softmax(-1).view(*x.shape))


class Dense(nn.Module):
    """D2RL: each layer reads the inputs beside the hidden row."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(S + A, H), nn.Linear(H + S + A, H), nn.Linear(H, 1)

    def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        inputs = torch.cat([obs, actions], -1)
        x = F.relu(self.fc1(inputs))
        return self.fc3(F.relu(self.fc2(torch.cat([x, inputs], -1))))


class VectorizedLinear(nn.Module):
    """One Linear for each member, as stacked parameters."""

    def __init__(self, width_in: int, width_out: int, members: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(members, width_in, width_out) / width_in**0.5)
        self.bias = nn.Parameter(torch.zeros(members, 1, width_out))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class VectorizedCritic(nn.Module):
    """CORL's SAC-N and EDAC, with blocks where these are asked for."""

    def __init__(self, members: int = 3, norm: bool = False, residual: bool = False) -> None:
        super().__init__()
        self.members, self.norm, self.residual = members, norm, residual
        self.first, self.second, self.third = (
            VectorizedLinear(width_in, width_out, members) for width_in, width_out in ((S + A, H), (H, H), (H, 1))
        )

    def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        x = torch.cat([obs, actions], -1).unsqueeze(0).repeat_interleave(self.members, 0)
        x = F.relu(self.first(x))
        y = self.second(F.layer_norm(x, (H,)) if self.norm else x)
        return self.third(x + F.relu(y) if self.residual else F.relu(y)).squeeze(-1)


class Einsum(nn.Module):
    """An ensemble by einsum, as in REDQ's vectorised forms."""

    def __init__(self, members: int = 3) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(members, S + A, H) / 3)
        self.b1 = nn.Parameter(torch.randn(members, H))
        self.w2 = nn.Parameter(torch.randn(members, H, 1) / 3)
        self.b2 = nn.Parameter(torch.randn(members, 1))

    def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        h = torch.einsum("bi,eio->ebo", torch.cat([obs, actions], -1), self.w1) + self.b1[:, None]
        return (torch.einsum("ebi,eio->ebo", F.elu(h), self.w2) + self.b2[:, None]).squeeze(-1)


class SharedTrunk(nn.Module):
    """Bootstrapped heads on one trunk."""

    def __init__(self, heads: int = 5) -> None:
        super().__init__()
        self.trunk, self.heads = mlp(S + A, H), nn.Linear(H, heads)

    def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        return self.heads(F.relu(self.trunk(torch.cat([obs, actions], -1))))


class Clipped(nn.Module):
    """A running normaliser of both inputs, clipped."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.randn(S + A))
        self.register_buffer("var", torch.rand(S + A) + 0.5)
        self.net = mlp(S + A, 1, nn.ELU)

    def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        x = (torch.cat([obs, actions], -1) - self.mean) / torch.sqrt(self.var + 1e-5)
        return self.net(torch.clamp(x, -5.0, 5.0))


class SplitInputs(nn.Module):
    """DDPG as first published: the action enters at the second layer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(S, H), nn.Linear(H + A, H), nn.Linear(H, 1)

    def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        return self.fc3(F.relu(self.fc2(torch.cat([F.relu(self.fc1(obs)), actions], -1))))


class AddedInputs(nn.Module):
    """Projections of observation and action added to one hidden row."""

    def __init__(self) -> None:
        super().__init__()
        self.of_obs, self.of_action, self.last = nn.Linear(S, H), nn.Linear(A, H), nn.Linear(H, 1)

    def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        return self.last(F.relu(self.of_obs(obs) + self.of_action(actions)))


# of two-hot heads over symexp bins
SYMEXP = "" if "symexp" in ACTIVATIONS else "no activation of the table"


def droq() -> nn.Module:
    layers = [nn.Linear(S + A, H), nn.Dropout(0.01), nn.LayerNorm(H), nn.ReLU()]
    return Cat(*layers, nn.Linear(H, H), nn.Dropout(0.01), nn.LayerNorm(H), nn.ReLU(), nn.Linear(H, 1)).eval()


CRITICS = (
    Entry("CleanRL", "SoftQNetwork (sac_continuous_action)", "critic", Attributes),
    Entry("CleanRL", "QNetwork (td3, ddpg)", "critic", twice(Attributes)),
    Entry("CleanRL", "QNetwork (c51, over actions)", "critic", Atoms),
    Entry("stable-baselines3", "ContinuousCritic", "critic", twice(plain())),
    Entry("sb3-contrib", "TQC Critic, mean of quantiles", "critic", twice(quantile_mean(25))),
    Entry("sb3-contrib", "TQC, truncated critic by critic", "critic", PerCritic),
    Entry("sb3-contrib", "TQC, truncated over all critics", "critic", Pooled, "pools over critics"),
    Entry("d3rlpy", "ContinuousMeanQFunction", "critic", plain()),
    Entry("d3rlpy", "ContinuousQRQFunction", "critic", quantile_mean(32)),
    Entry("skrl", "deterministic Critic, ELU", "critic", plain(act=nn.ELU, layers=3)),
    Entry("tianshou", "Critic of Net", "critic", plain(layers=3)),
    Entry("TorchRL", "ValueOperator of MLP, Tanh", "critic", plain(act=nn.Tanh)),
    Entry("IQL", "TwinQ", "critic", twice(plain(), stacks=True)),
    Entry("IQL", "TwinQ, smaller of both", "critic", partial(Pessimistic, plain()), "pool over its critics"),
    Entry("ReBRAC", "Critic", "critic", twice(plain(layers=3, norm="post"), stacks=True)),
    Entry("FQL", "Value", "critic", twice(plain(act=partial(nn.GELU, "tanh"), layers=4, norm="post"), stacks=True)),
    Entry("REDQ", "Mlp, ten members", "critic", twice(plain(), count=10)),
    Entry("DroQ", "Critic with dropout, in eval mode", "critic", twice(droq)),
    Entry("D2RL", "QNetwork", "critic", Dense, "skip connection by concatenation"),
    Entry("BRO", "BroNet critic", "critic", twice(BroNet, stacks=True)),
    Entry("BRO", "BroNet, mean of quantiles", "critic",
          twice(partial(BroNet, 1, quantiles=20), stacks=True)),
    Entry("SimBa", "SimbaCritic", "critic", twice(simba)),
    Entry("SimBaV2", "hyperspherical critic", "critic", Hyperspherical, "linalg_vector_norm"),
    Entry("TD-MPC2", "Q, two-hot symexp, without SimNorm", "critic", partial(Atoms, symexp=True), SYMEXP),
    Entry("TD-MPC2", "SimNorm", "critic", SimNorm, "takes the numbers of several rows together"),
    Entry("DreamerV3", "critic head, symexp two-hot", "critic",
          lambda: Atoms(symexp=True, net=nn.Sequential(
              nn.Linear(S + A, H), nn.RMSNorm(H, eps=1e-4), nn.SiLU(), nn.Linear(H, 21))), SYMEXP),
    Entry("Stop Regressing", "HL-Gauss critic", "critic", HLGauss),
    Entry("D4PG", "distributional critic", "critic", Bins),
    Entry("CORL", "VectorizedCritic (SAC-N)", "critic", VectorizedCritic),
    Entry("CORL", "VectorizedCritic with residual LayerNorm", "critic",
          partial(VectorizedCritic, norm=True, residual=True)),
    Entry("EDAC", "einsum ensemble", "critic", Einsum),
    Entry("Bootstrapped DQN", "heads on a shared trunk", "critic", SharedTrunk),
    Entry("rl_games", "normalised and clipped inputs", "critic", Clipped),
    Entry("rsl_rl", "critic, ELU", "critic", plain(act=nn.ELU, layers=3)),
    Entry("CleanDiffuser", "DQLCritic: Tanh after LayerNorm, then Mish", "critic",
          lambda: Cat(nn.Linear(S + A, H), nn.LayerNorm(H), nn.Tanh(), nn.Linear(H, H), nn.Mish(), nn.Linear(H, 1))),
    Entry("Diffusion-QL", "Critic, Mish", "critic", twice(plain(act=nn.Mish, layers=3))),
    Entry("DrQ-v2", "Critic, LeakyReLU", "critic", twice(plain(act=nn.LeakyReLU))),
    Entry("Spinning Up", "MLPQFunction", "critic", plain()),
    Entry("DDPG", "critic with a late action", "critic", SplitInputs),
    Entry("AWAC", "projections added", "critic", AddedInputs, "hidden rows are added to what follows obs"),
    Entry("PARS", "value bounded by tanh", "critic",
          lambda: Cat(mlp(S + A, 1), read=lambda out: -50 + 50 * torch.tanh(out))),
)  # fmt: skip
