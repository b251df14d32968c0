"""Critics whose output is a distribution over returns: how it is read, and what it is trained towards.

A head stands for M atoms z_1 .. z_M, evenly spaced from v_min to v_max; a critic returns logits over them, and its
value is Q = sum_m softmax(logits)_m z_m.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .critic_outputs import describe
from .reference import aggregate
from .steering import check_number


@dataclass(frozen=True)
class Head(ABC):
    """M atoms from v_min to v_max. Use `C51` or `HLGauss`.

    Args:
        v_min: the first atom's return, in units of Q.
        v_max: the last atom's, > v_min.
        num_atoms: M >= 2.

    Raises:
        ValueError, TypeError: at construction, for anything else.
    """

    v_min: float
    v_max: float
    num_atoms: int

    def __post_init__(self) -> None:
        owner = type(self).__name__
        check_number(f"{owner}.v_min", self.v_min, -float("inf"))
        check_number(f"{owner}.v_max", self.v_max, self.v_min, strict=True)
        if isinstance(self.num_atoms, bool) or not isinstance(self.num_atoms, int) or self.num_atoms < 2:
            raise ValueError(f"{owner}.num_atoms is {self.num_atoms!r}; expected an integer >= 2.")

    @property
    def spacing(self) -> float:
        """Between two atoms, in units of Q."""
        return (self.v_max - self.v_min) / (self.num_atoms - 1)

    def atoms(self, like: Tensor) -> Tensor:
        """The returns [M] that the atoms stand for, of `like`'s dtype and device."""
        return torch.linspace(self.v_min, self.v_max, self.num_atoms, dtype=like.dtype, device=like.device)

    def values(self, logits: Tensor) -> Tensor:
        """Q [...] of logits [..., M]."""
        return torch.softmax(logits, -1) @ self.atoms(logits)

    def read(self, output: Any, batch_size: int, owner: str = "critic") -> Tensor:
        """Logits [E, B, M] of a critic's output: [E, B, M], [B, E, M], [B, M], or a list or tuple of [B, M].

        Raises:
            ValueError: for any other output.
        """
        rows, m = batch_size, self.num_atoms
        if isinstance(output, (list, tuple)) and output and all(isinstance(entry, Tensor) for entry in output):
            if all(entry.shape == (rows, m) for entry in output):
                return torch.stack(list(output))
        elif isinstance(output, Tensor):
            if output.shape == (rows, m):
                return output.unsqueeze(0)
            if output.ndim == 3 and output.shape[2] == m and rows in output.shape[:2]:
                if output.shape[0] == output.shape[1] > 1:
                    raise ValueError(
                        f"{owner} returned {list(output.shape)} for {rows} rows: [members, rows, atoms] or [rows, "
                        "members, atoms]? Return a list of [B, M], one for each member."
                    )
                return output if output.shape[1] == rows else output.transpose(0, 1)
        raise ValueError(
            f"{owner} returned {describe(output)} for {rows} rows; expected logits over {m} atoms: [E, {rows}, {m}], "
            f"[{rows}, {m}], or a list of these last."
        )

    @abstractmethod
    def target(self, returns: Tensor) -> Tensor:
        """Probabilities [B, M] that a return [B] is trained towards."""

    @abstractmethod
    def bootstrapped(self, logits: Tensor, rewards: Tensor, discounts: Tensor, aggregation: str, rho: float) -> Tensor:
        """Probabilities [B, M] for rewards + discounts * Qbar', Qbar' of the target critics' logits [E, B, M]."""

    def loss(self, logits: Tensor, probabilities: Tensor) -> Tensor:
        """Cross-entropy, the mean over members and rows: logits [E, B, M] against probabilities [B, M]."""
        return -(probabilities * F.log_softmax(logits, -1)).sum(-1).mean()


@dataclass(frozen=True)
class C51(Head):
    """Categorical returns (arXiv 1707.06887): the Bellman target is the next distribution, moved and projected.

    Of several target critics: "mean" takes the mixture of their distributions, "min" for each row that of the lowest Q
    (as FastTD3 does), "pessimistic" the mixture moved by -rho std, so that its mean is Qbar.
    """

    def target(self, returns: Tensor) -> Tensor:
        return self._project(returns.unsqueeze(-1), torch.ones_like(returns).unsqueeze(-1))

    def bootstrapped(self, logits: Tensor, rewards: Tensor, discounts: Tensor, aggregation: str, rho: float) -> Tensor:
        each, q_values = torch.softmax(logits, -1), self.values(logits)
        shift = torch.zeros_like(rewards)
        if aggregation == "min":
            probabilities = each[q_values.argmin(0), torch.arange(len(rewards), device=each.device)]
        else:
            probabilities = each.mean(0)
            shift = aggregate(q_values, aggregation, rho).to(rewards.dtype) - q_values.mean(0).to(rewards.dtype)
        support = rewards.unsqueeze(-1) + discounts.unsqueeze(-1) * (self.atoms(rewards) + shift.unsqueeze(-1))
        return self._project(support, probabilities.to(rewards.dtype))

    def _project(self, support: Tensor, probabilities: Tensor) -> Tensor:
        """Each point's probability shared by its two neighbours among the atoms: [B, J], [B, J] -> [B, M]."""
        place = (support.clamp(self.v_min, self.v_max) - self.v_min) / self.spacing
        distance = (place.unsqueeze(-1) - torch.arange(self.num_atoms, dtype=place.dtype, device=place.device)).abs()
        return (probabilities.unsqueeze(-1) * (1 - distance).clamp(min=0)).sum(-2)


@dataclass(frozen=True)
class HLGauss(Head):
    """A histogram of a Gaussian around the scalar target (arXiv 2403.03950).

    Args:
        sigma: its std in units of Q; None: 0.75 of the atoms' spacing, the paper's.
    """

    sigma: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sigma is not None:
            check_number("HLGauss.sigma", self.sigma, 0.0, strict=True)

    def target(self, returns: Tensor) -> Tensor:
        half, sigma = self.spacing / 2, 0.75 * self.spacing if self.sigma is None else self.sigma
        edges = torch.linspace(
            self.v_min - half, self.v_max + half, self.num_atoms + 1, dtype=returns.dtype, device=returns.device
        )
        inside = returns.clamp(self.v_min, self.v_max).unsqueeze(-1)
        mass = torch.special.ndtr((edges - inside) / sigma).diff(dim=-1)
        return mass / mass.sum(-1, keepdim=True)

    def bootstrapped(self, logits: Tensor, rewards: Tensor, discounts: Tensor, aggregation: str, rho: float) -> Tensor:
        q_bar = aggregate(self.values(logits), aggregation, rho)
        return self.target(rewards + discounts * q_bar.to(rewards.dtype))
