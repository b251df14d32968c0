"""Critics whose weights are made of others at each call, whose heads are unusual, or which are no chain at all."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from .critics import Cat, SharedTrunk
from .entries import A, Entry, H, S, mlp


class Made(nn.Module):
    """Its first weight is a function of several tensors."""

    def __init__(self, weight: Callable[[Made], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.weight = nn.Linear(S + A, H), nn.Linear(H, 1), weight
        self.mean, self.std = nn.Parameter(torch.randn(H, S + A) / 4), nn.Parameter(torch.rand(H, S + A) / 10)
        self.down, self.up = nn.Parameter(torch.randn(2, S + A) / 4), nn.Parameter(torch.randn(H, 2))
        self.register_buffer("noise", torch.randn(H, S + A))
        self.register_buffer("mask", (torch.rand(H, S + A) > 0.3).float())

    def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        return self.last(F.relu(F.linear(torch.cat([obs, actions], -1), self.weight(self), self.first.bias)))


class Convex(nn.Module):
    """Weights of the last layer above zero."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(S + A, H), nn.Linear(H, 1)

    def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        x = F.relu(self.first(torch.cat([obs, actions], -1)))
        return F.linear(x, F.softplus(self.last.weight), self.last.bias)


class Tied(nn.Module):
    """A layer, the layer itself again, and its transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.tied, self.last = nn.Linear(S + A, H), nn.Linear(H, H), nn.Linear(H, 1)

    def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        x = self.tied(F.relu(self.tied(F.relu(self.first(torch.cat([obs, actions], -1))))))
        return self.last(F.relu(F.linear(F.relu(x), self.tied.weight.T)))


class MembersFirst(SharedTrunk):
    """More heads than are taken for members without being told: [E, B] tells."""

    def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        return super().forward(obs, actions).T


class Scaled(nn.Module):
    """Residual branches behind a trained factor: one number, or one for each unit."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.block, self.last = nn.Linear(S + A, H), nn.Linear(H, H), nn.Linear(H, 1)
        self.factor = nn.Parameter(0.1 * torch.rand(width))

    def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        x = F.relu(self.first(torch.cat([obs, actions], -1)))
        return self.last(x + self.factor * F.relu(self.block(x)))


class Where(nn.Module):
    """A LeakyReLU as a choice between two rows."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x > 0, x, 0.2 * x)


class ByFormula(nn.Module):
    """GELU's tanh form, written out, without affine LayerNorm of another eps before it."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x, (H,), eps=1e-3)
        return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


class TwoBranches(nn.Module):
    """Two rows of the same inputs, put together by a function."""

    def __init__(self, together: Callable[[Tensor, Tensor], Tensor], second_reads_obs: bool = False) -> None:
        super().__init__()
        self.a, self.b = mlp(S + A, H), mlp(S if second_reads_obs else S + A, H)
        self.last, self.together, self.second_reads_obs = nn.Linear(H, 1), together, second_reads_obs

    def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        both = torch.cat([obs, actions], -1)
        return self.last(self.together(self.a(both), self.b(obs if self.second_reads_obs else both)))


def normed(norm: Callable[[nn.Linear], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: Cat(norm(nn.Linear(S + A, H)), nn.ReLU(), nn.Linear(H, 1)).eval()


def made(weight: Callable[[Made], Tensor]) -> Callable[[], nn.Module]:
    return partial(Made, weight)


def batch_normed(is_training: bool) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        net = Cat(nn.BatchNorm1d(S + A), nn.Linear(S + A, H), nn.BatchNorm1d(H), nn.ReLU(), nn.Linear(H, 1))
        net(torch.randn(64, S), torch.randn(64, A))
        return net.train(is_training)

    return build


CRITICS_OF_WEIGHTS = (
    Entry("CrossQ", "Critic, in eval mode", "critic", batch_normed(False)),
    Entry("CrossQ", "Critic, in training mode", "critic", batch_normed(True), "BatchNorm1d in training mode"),
    Entry("SN-DDPG", "spectral norm, in eval mode", "critic", normed(parametrizations.spectral_norm)),
    Entry("variation", "weight norm", "critic", normed(parametrizations.weight_norm)),
    Entry("variation", "orthogonal weights", "critic",
          lambda: Cat(nn.Linear(S + A, H), nn.ReLU(), parametrizations.orthogonal(nn.Linear(H, H)), nn.ReLU(),
                      nn.Linear(H, 1))),
    Entry("NoisyNet", "NoisyLinear between two draws", "critic", made(lambda m: m.mean + m.std * m.noise)),
    Entry("MADE", "masked weights", "critic", made(lambda m: m.first.weight * m.mask)),
    Entry("LoRA", "merged", "critic", made(lambda m: m.first.weight + 2 * m.up @ m.down)),
    Entry("variation", "rows of weights of length one", "critic", made(lambda m: F.normalize(m.first.weight, dim=1))),
    Entry("WGAN", "weights clamped in the call", "critic", made(lambda m: m.first.weight.clamp(-0.1, 0.1))),
    Entry("ICNN", "positive last layer", "critic", Convex),
    Entry("variation", "a layer twice, and transposed", "critic", Tied),
    Entry("ReZero", "trained factor of a residual branch", "critic", partial(Scaled, 1)),
    Entry("CaiT", "LayerScale", "critic", partial(Scaled, H)),
    Entry("Bootstrapped DQN", "30 heads, members first", "critic", partial(MembersFirst, 30)),
    Entry("Bootstrapped DQN", "30 heads, batch first", "critic", partial(SharedTrunk, 30), "which could be the atoms"),
    Entry("Bootstrapped DQN", "30 heads, output=lambda q: q.T", "critic", partial(SharedTrunk, 30),
          hints={"output": lambda q: q.T}),
    Entry("variation", "LeakyReLU by torch.where", "critic",
          lambda: Cat(nn.Linear(S + A, H), Where(), nn.Linear(H, 1))),
    Entry("variation", "GELU by its formula", "critic", lambda: Cat(nn.Linear(S + A, H), ByFormula(), nn.Linear(H, 1))),
    Entry("LLaMA", "SwiGLU", "critic", partial(TwoBranches, lambda a, b: F.silu(a) * b), "puts two rows together"),
    Entry("Randomized Prior Functions", "a trained network and a frozen one", "critic",
          partial(TwoBranches, lambda a, b: a + 3 * b), "of which neither is made of the other"),
    Entry("Contrastive RL", "product with what obs makes", "critic",
          partial(TwoBranches, lambda a, b: a * b, True), "multiplied by what follows obs"),
)  # fmt: skip
