"""Flows that differ in what they do with t."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .entries import A, Entry, H, S, mlp
from .flows import AddedTime, Cat


class OfTime(nn.Module):
    """Replaces the t that the network reads."""

    def __init__(self, change: Callable[[Tensor], Tensor], width: int = 1) -> None:
        super().__init__()
        self.net, self.change = mlp(S + A + width, A), change

    def forward(self, obs: Tensor, actions: Tensor, t: Tensor) -> Tensor:
        return self.net(torch.cat([obs, actions, self.change(t)], -1))


class Preconditioned(nn.Module):
    """c_skip x + c_out F(c_in x): EDM's form; consistency models leave out c_in."""

    def __init__(self, scales_inputs: bool) -> None:
        super().__init__()
        self.net, self.scales_inputs = mlp(S + A + 1, A), scales_inputs

    def forward(self, obs: Tensor, actions: Tensor, t: Tensor) -> Tensor:
        inputs = actions / (1 + t**2).sqrt() if self.scales_inputs else actions
        return (1 - t) * actions + t * self.net(torch.cat([obs, inputs, t], -1))


class OverRest(Cat):
    """The velocity of a clean action's prediction, or a velocity scaled by the time that is left."""

    def __init__(self, is_clean: bool = False) -> None:
        super().__init__(mlp(S + A + 1, A))
        self.is_clean = is_clean

    def forward(self, obs: Tensor, actions: Tensor, t: Tensor) -> Tensor:
        out = super().forward(obs, actions, t)
        return (out - actions if self.is_clean else out) / (1 - t).clamp(min=0.02)


class Schedule(Cat):
    """Another sign in the second half of the times, decided for the whole batch."""

    def forward(self, obs: Tensor, actions: Tensor, t: Tensor) -> Tensor:
        out = super().forward(obs, actions, t)
        return out if float(t.flatten()[0]) < 0.5 else -out


class Guided(nn.Module):
    """Classifier-free guidance inside: with the observation and without it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(S + A + 1, A)

    def forward(self, obs: Tensor, actions: Tensor, t: Tensor) -> Tensor:
        both = [self.net(torch.cat([o, actions, t], -1)) for o in (obs, torch.zeros_like(obs))]
        return 3 * both[0] - 2 * both[1]


class StepSize(nn.Module):
    """Shortcut models: the step's length beside t, here a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.step = mlp(S + A + 2, A), 0.1

    def forward(self, obs: Tensor, actions: Tensor, t: Tensor) -> Tensor:
        return self.net(torch.cat([obs, actions, t, torch.full_like(t, self.step)], -1))


class Task(nn.Module):
    """A row of a table of tasks in the place of time features."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.net = nn.Embedding(4, 8), mlp(S + A + 8, A)

    def forward(self, obs: Tensor, actions: Tensor, t: Tensor) -> Tensor:
        return self.net(torch.cat([obs, actions, self.table(torch.full((len(obs),), 2, device=obs.device))], -1))


class Subtracted(AddedTime):
    """A time network's outputs subtracted from a hidden row, and dividing the next."""

    def forward(self, obs: Tensor, actions: Tensor, t: Tensor) -> Tensor:
        x, at = self.first(torch.cat([obs, actions], -1)), self.time(t)
        return self.last(F.silu(self.second(F.silu(x - at)) / (1 + at.square())))


class SharedLayer(nn.Module):
    """One Linear in the time network and in the trunk."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared, self.last = nn.Linear(S + A + 1, H), nn.Linear(H, H), nn.Linear(H, A)

    def forward(self, obs: Tensor, actions: Tensor, t: Tensor) -> Tensor:
        x = F.relu(self.first(torch.cat([obs, actions, t], -1)))
        return self.last(F.relu(self.shared(x) + self.shared(t.expand(-1, H))))


class SkipByConcatenation(nn.Module):
    """A small UNet of dense layers."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.mid, self.up = nn.Linear(S + A + 1, H), nn.Linear(H, H), nn.Linear(2 * H, A)

    def forward(self, obs: Tensor, actions: Tensor, t: Tensor) -> Tensor:
        x = F.silu(self.down(torch.cat([obs, actions, t], -1)))
        return self.up(torch.cat([F.silu(self.mid(x)), x], -1))


class SkipByAddition(nn.Module):
    """A bottleneck around which the row goes as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.down, self.up = nn.Linear(S + A + 1, H), nn.Linear(H, 8), nn.Linear(8, H)
        self.last = nn.Linear(H, A)

    def forward(self, obs: Tensor, actions: Tensor, t: Tensor) -> Tensor:
        x = F.silu(self.first(torch.cat([obs, actions, t], -1)))
        return self.last(x + self.up(F.silu(self.down(x))))


def of(change: Callable[[Tensor], Tensor], width: int = 1) -> Callable[[], nn.Module]:
    return partial(OfTime, change, width)


FLOWS_OF_TIME = (
    Entry("variation", "t kept away from 0 and 1", "flow", of(lambda t: t.clamp(0.03, 0.97))),
    Entry("variation", "t = 0 replaced", "flow", of(lambda t: torch.where(t == 0, torch.full_like(t, 0.5), t))),
    Entry("variation", "step numbers of 1 - t", "flow", of(lambda t: ((1 - t) * 100).round())),
    Entry("variation", "t eight times", "flow", of(lambda t: t.repeat(1, 8), 8)),
    Entry("variation", "one t for the batch", "flow", of(lambda t: t.mean().expand_as(t)), "random inputs at t = 0"),
    Entry("variation", "a branch on t", "flow", lambda: Schedule(mlp(S + A + 1, A)), "random inputs at t = 0.5"),
    Entry("EDM", "EDMPrecond", "flow", partial(Preconditioned, True), "columns that are none of the inputs"),
    Entry("Consistency Policy", "c_skip x + c_out F", "flow", partial(Preconditioned, False),
          "read again beside the network"),
    Entry("variation", "velocity from a predicted clean action", "flow", partial(OverRest, True),
          "read again beside the network"),
    Entry("variation", "velocity over 1 - t", "flow", OverRest),
    Entry("CleanDiffuser", "guidance inside the flow", "flow", Guided, "several different rows of its inputs"),
    Entry("Shortcut Models", "step size beside t", "flow", StepSize),
    Entry("variation", "a task's embedding and no t", "flow", Task),
    Entry("FiLM", "by subtraction and division", "flow", Subtracted),
    Entry("variation", "one Linear in time network and trunk", "flow", SharedLayer),
    Entry("U-Net", "skip connection by concatenation", "flow", SkipByConcatenation, "several rows together"),
    Entry("U-Net", "skip connection by addition", "flow", SkipByAddition),
)  # fmt: skip
