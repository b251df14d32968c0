"""Flows in the shapes of public codebases."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .entries import A, Entry, H, S, mlp
from .time_networks import LearnedFourier, SinusoidalMLP


class Cat(nn.Module):
    """A network of its inputs side by side, in an order, with what a time network makes of t."""

    def __init__(self, net: nn.Module, time: nn.Module | None = None, order: str = "oxt") -> None:
        super().__init__()
        self.net, self.time, self.order = net, time or nn.Identity(), order

    def forward(self, obs: Tensor, actions: Tensor, t: Tensor) -> Tensor:
        named = {"o": obs, "x": actions, "t": self.time(t)}
        return self.net(torch.cat([named[name] for name in self.order], -1))


class LNResnetBlock(nn.Module):
    """IDQL's MLPResNetBlock: dropout, LayerNorm, a wide Linear, activation, Linear, and the row itself."""

    def __init__(self, act: Callable[[Tensor], Tensor] = F.mish, dropout: float = 0.1) -> None:
        super().__init__()
        self.dropout, self.norm = nn.Dropout(dropout), nn.LayerNorm(H)
        self.fc1, self.fc2, self.act = nn.Linear(H, 4 * H), nn.Linear(4 * H, H), act

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(self.act(self.fc1(self.norm(self.dropout(x)))))


class LNResnet(nn.Module):
    """IDQL's LN_Resnet on [action, observation, time features]."""

    def __init__(
        self, act: Callable[[Tensor], Tensor] = F.mish, time: Callable[[], nn.Module] = LearnedFourier
    ) -> None:
        super().__init__()
        self.time, self.act = time(), act
        self.first = nn.Linear(S + A + self.time.width, H)
        self.blocks = nn.ModuleList(LNResnetBlock(act) for _ in range(3))
        self.last = nn.Linear(H, A)

    def forward(self, obs: Tensor, actions: Tensor, t: Tensor) -> Tensor:
        x = self.first(torch.cat([actions, obs, self.time(t)], -1))
        for block in self.blocks:
            x = block(x)
        return self.last(self.act(x))


class Descent(nn.Module):
    """Blocks as steps of gradient descent: what a block makes is taken off the row, and once the row off it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(S + A + 1, H), nn.Linear(H, A)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(H), nn.Linear(H, H), nn.Mish()) for _ in range(3))

    def forward(self, obs: Tensor, actions: Tensor, t: Tensor) -> Tensor:
        x = self.first(torch.cat([obs, actions, t], -1))
        for place, block in enumerate(self.blocks):
            x = block(x) - x if place == 1 else x - block(x)
        return self.last(F.mish(x))


class TwoLayerPreActivation(nn.Module):
    """DPPO's block: activation, Linear, activation, Linear, and the row itself."""

    def __init__(self, act: type[nn.Module] = nn.Mish, norm: bool = False) -> None:
        super().__init__()
        self.l1, self.l2, self.act = nn.Linear(H, H), nn.Linear(H, H), act()
        self.norm1, self.norm2 = (nn.LayerNorm(H) if norm else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.l2(self.act(self.norm2(self.l1(self.act(self.norm1(x))))))


class ResidualMLP(nn.Module):
    """DPPO's ResidualMLP under FlowMLP: [action, time features, observation]."""

    def __init__(self, norm: bool = False, bound: bool = False) -> None:
        super().__init__()
        self.time, self.bound = SinusoidalMLP(), bound
        self.net = nn.Sequential(
            nn.Linear(A + self.time.width + S, H),
            *(TwoLayerPreActivation(norm=norm) for _ in range(2)),
            nn.Linear(H, A),
        )

    def forward(self, obs: Tensor, actions: Tensor, t: Tensor) -> Tensor:
        out = self.net(torch.cat([actions, self.time(t), obs], -1))
        return torch.tanh(out) if self.bound else out


class FilmFlow(nn.Module):
    """Scale and shift of hidden rows from a time network."""

    def __init__(self, blocks: int = 2, adaptive_norm: bool = False, one_plus: bool = True) -> None:
        super().__init__()
        self.time = SinusoidalMLP()
        self.first, self.last = nn.Linear(S + A, H), nn.Linear(H, A)
        self.blocks = nn.ModuleList(nn.Linear(H, H) for _ in range(blocks))
        self.films = nn.ModuleList(nn.Sequential(nn.SiLU(), nn.Linear(self.time.width, 2 * H)) for _ in range(blocks))
        self.adaptive_norm, self.one_plus = adaptive_norm, one_plus

    def forward(self, obs: Tensor, actions: Tensor, t: Tensor) -> Tensor:
        x, at = F.silu(self.first(torch.cat([obs, actions], -1))), self.time(t)
        for block, film in zip(self.blocks, self.films):
            scale, shift = film(at).chunk(2, -1)
            y = F.layer_norm(x, (H,)) if self.adaptive_norm else block(x)
            y = y * (1 + scale) + shift if self.one_plus else y * scale + shift
            x = x + F.silu(block(y) if self.adaptive_norm else y)
        return self.last(x)


class AdaLN(nn.Module):
    """DiT's block on one token: LayerNorm without parameters, modulation, a Linear pair behind a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.first, self.last = SinusoidalMLP(), nn.Linear(S + A, H), nn.Linear(H, A)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(self.time.width, 3 * H))
        self.norm = nn.LayerNorm(H, elementwise_affine=False, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(H, 2 * H), nn.GELU("tanh"), nn.Linear(2 * H, H))

    def forward(self, obs: Tensor, actions: Tensor, t: Tensor) -> Tensor:
        x = self.first(torch.cat([obs, actions], -1))
        shift, scale, gate = self.modulation(self.time(t)).chunk(3, -1)
        x = x + gate * self.mlp(self.norm(x) * (1 + scale) + shift)
        return self.last(x)


class AddedTime(nn.Module):
    """A time network's output added to the first hidden row."""

    def __init__(self, multiplied: bool = False) -> None:
        super().__init__()
        self.time = SinusoidalMLP(H)
        self.first, self.second, self.last = nn.Linear(S + A, H), nn.Linear(H, H), nn.Linear(H, A)
        self.multiplied = multiplied

    def forward(self, obs: Tensor, actions: Tensor, t: Tensor) -> Tensor:
        x = self.first(torch.cat([obs, actions], -1))
        x = x * self.time(t) if self.multiplied else x + self.time(t)
        return self.last(F.silu(self.second(F.silu(x))))


class FilmFromObs(AddedTime):
    """ChiUNet's conditioning: observation and time together modulate the rows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.of_obs = nn.Linear(A, H), nn.Linear(S, H)

    def forward(self, obs: Tensor, actions: Tensor, t: Tensor) -> Tensor:
        x = self.first(actions) + self.of_obs(obs) + self.time(t)
        return self.last(F.silu(self.second(F.silu(x))))


class Actor(nn.Module):
    """CleanRL's actor on a flow's inputs: tanh, scale and bias of the output, both in buffers."""

    def __init__(self, gaussian: bool = False) -> None:
        super().__init__()
        self.net, self.gaussian = mlp(S + A + 1, 2 * A if gaussian else A), gaussian
        self.register_buffer("action_scale", torch.rand(A) + 0.5)
        self.register_buffer("action_bias", torch.randn(A))

    def forward(self, obs: Tensor, actions: Tensor, t: Tensor) -> Tensor:
        out = self.net(torch.cat([obs, actions, t], -1))
        mean = out.chunk(2, -1)[0] if self.gaussian else out
        return torch.tanh(mean) * self.action_scale + self.action_bias


class Clamped(Cat):
    def forward(self, obs: Tensor, actions: Tensor, t: Tensor) -> Tensor:
        return super().forward(obs, actions, t).clamp(-2, 2)


class Conv(nn.Module):
    """Diffusion Policy's UNet in its smallest form: a convolution over the chunk."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv1d(1, 4, 3, padding=1), nn.Linear(4 * A + S + 1, A)

    def forward(self, obs: Tensor, actions: Tensor, t: Tensor) -> Tensor:
        x = F.mish(self.conv(actions.unsqueeze(1))).flatten(1)
        return self.last(torch.cat([x, obs, t], -1))


class Attention(nn.Module):
    """A transformer over action tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.last = nn.Linear(1 + S + 1, H), nn.Linear(H, 1)

    def forward(self, obs: Tensor, actions: Tensor, t: Tensor) -> Tensor:
        beside = torch.cat([obs, t], -1).unsqueeze(1).expand(-1, A, -1)
        x = self.embed(torch.cat([actions.unsqueeze(-1), beside], -1))
        x = x + (x @ x.transpose(1, 2)).softmax(-1) @ x
        return self.last(x).squeeze(-1)


class NestedResidual(nn.Module):
    """Residual connections inside one another."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(S + A + 1, H), nn.Linear(H, A)
        self.a, self.b, self.c = (nn.Linear(H, H) for _ in range(3))

    def forward(self, obs: Tensor, actions: Tensor, t: Tensor) -> Tensor:
        x = self.first(torch.cat([obs, actions, t], -1))
        y = F.relu(self.a(x))
        y = y + F.relu(self.b(y))
        return self.last(x + F.relu(self.c(y)))


FLOWS = (
    Entry("QGF, FQL", "ActorVectorField", "flow",
          lambda: Cat(mlp(S + A + 1, A, partial(nn.GELU, "tanh"), 4))),
    Entry("IDQL", "LN_Resnet, Mish", "flow", lambda: LNResnet().eval()),
    Entry("IDQL", "LN_Resnet, ReLU", "flow", lambda: LNResnet(F.relu).eval()),
    Entry("CleanDiffuser", "IDQLMlp", "flow", lambda: LNResnet(F.mish, SinusoidalMLP).eval()),
    Entry("CleanDiffuser", "DQLMlp", "flow",
          lambda: Cat(mlp(S + A + 8, A, nn.Mish, 3), SinusoidalMLP(), "xto")),
    Entry("Diffusion-QL", "MLP", "flow", lambda: Cat(mlp(S + A + 8, A, nn.Mish, 3), SinusoidalMLP(), "xto")),
    Entry("DPPO", "DiffusionMLP, plain", "flow",
          lambda: Cat(mlp(S + A + 8, A, nn.ReLU, 3), SinusoidalMLP(), "xto")),
    Entry("DPPO", "ResidualMLP", "flow", ResidualMLP),
    Entry("DPPO", "ResidualMLP with LayerNorm", "flow", partial(ResidualMLP, norm=True)),
    Entry("ReinFlow", "ResidualMLP with a bounded output", "flow", partial(ResidualMLP, bound=True)),
    Entry("CleanRL", "Actor: tanh, scale and bias", "flow", Actor),
    Entry("CleanRL", "SAC Actor, mean of the Gaussian", "flow", partial(Actor, gaussian=True)),
    Entry("rectified-flow", "velocity clamped", "flow", lambda: Clamped(mlp(S + A + 1, A))),
    Entry("DiT", "adaLN-zero block on one token", "flow", AdaLN),
    Entry("ConditionalUnet1D", "FiLM of dense blocks by t", "flow", FilmFlow),
    Entry("Simformer", "FiLM without the one", "flow", partial(FilmFlow, one_plus=False)),
    Entry("MaxInfoRL", "adaptive LayerNorm from t", "flow", partial(FilmFlow, adaptive_norm=True)),
    Entry("score_sde", "time added to the first hidden row", "flow", AddedTime),
    Entry("EDM toy", "time multiplied into the first hidden row", "flow", partial(AddedTime, multiplied=True)),
    Entry("LISTA", "blocks taken off their row", "flow", Descent),
    Entry("CleanDiffuser", "ChiUNet's conditioning on observation and time", "flow", FilmFromObs,
          "hidden rows are added to what follows obs"),
    Entry("Diffusion Policy", "ConditionalUnet1D", "flow", Conv, "convolution"),
    Entry("Diffusion Transformer", "attention over tokens", "flow", Attention,
          "reads several different rows of its inputs"),
    Entry("DenseNet", "nested residual connections", "flow", NestedResidual, "overlap or stand inside"),
)  # fmt: skip
