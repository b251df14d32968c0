"""What a sampler reports: about one call, and about what a call would cost."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .backends import Footprint
from .inputs import Layout
from .spec import RawSample


@dataclass(frozen=True)
class SampleInfo:
    """What happened in one call; B stands for the leading dimensions of obs: none for [S], two for [B, T, S].

    Args:
        q_values: [E, B], the critics at the returned actions; None without a critic.
        gradient_norms: [K, B], the norm of the steering gradient at each step; 0 at unsteered steps.
        nonfinite: [K, B] bool, where a row had no finite gradient and followed the unsteered flow for that step.
        q_std: [K, B], the critics' population std at the estimate (of several draws, their weighted mean); 0 at
            unsteered steps and where nonfinite.
        gated: [K, B] bool, where q_std exceeded Steering.max_disagreement and the row followed the unsteered flow.
    """

    q_values: Tensor | None
    gradient_norms: Tensor
    nonfinite: Tensor
    q_std: Tensor
    gated: Tensor

    @staticmethod
    def of(raw: RawSample, q_values: Tensor | None, layout: Layout) -> SampleInfo:
        """From a backend's rows."""
        assert raw.report is not None
        q_values = None if q_values is None else layout.unfold(q_values, first=1)
        return SampleInfo(q_values, *(layout.unfold(value, first=1) for value in raw.report))

    @property
    def nonfinite_rows(self) -> Tensor:
        """[B] bool, rows that met a non-finite gradient at any step."""
        return self.nonfinite.any(0)

    @property
    def nonfinite_count(self) -> int:
        """How many (step, row) pairs fell back to the unsteered flow."""
        return int(self.nonfinite.sum())

    @property
    def gated_count(self) -> int:
        """How many (step, row) pairs the gate on the critics' disagreement left unsteered."""
        return int(self.gated.sum())


@dataclass(frozen=True)
class Explanation:
    """Which backend runs a batch, why the others do not, and what a call costs; prints as text.

    networks: one line each: packed, or a callable and why.
    """

    backend: str
    not_used: dict[str, str]
    batch_size: int
    footprint: Footprint | None
    networks: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"backend {self.backend} for batches of {self.batch_size}", *map("  {}".format, self.networks)]
        lines += [f"  not {name}: {reason}" for name, reason in self.not_used.items()]
        f = self.footprint
        if f is None:
            return "\n".join([*lines, "  the networks include your own callables: their cost is not counted"])
        lines += [
            f"  launches        {f.launches}",
            f"  flops           {f.flops / 1e9:.3f} GFLOP",
            f"  packed weights  {f.weight_bytes / 2**20:.1f} MiB",
            f"  traffic         {f.traffic_bytes / 2**20:.1f} MiB",
            f"  workspace       {f.workspace_bytes / 2**20:.1f} MiB",
        ]
        if f.floor_s is not None:
            lines.append(f"  floor           {f.floor_s * 1e3:.3f} ms on this machine")
        return "\n".join([*lines, *(f"  note: {note}" for note in f.notes)])
