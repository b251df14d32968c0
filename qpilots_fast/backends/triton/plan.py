"""How one sampler becomes launches: layouts, constants, workspace, and the order of the kernels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...spec import SamplerSpec, Step
from ..caches import Cache
from .evaluation import Evaluation, Given, Launch, Scratch, Tape
from .launch_table import LaunchTable, dot_mode
from .launcher import launch
from .layouts import NetworkLayout, padded_width, round_up, sampler_layouts
from .packing import OPERAND_DTYPES, PackedBuffers
from .row_pieces import scale_arguments

# The rows of a call go through its K steps in chunks, whose two planes that pass from launch to launch are at most this
# large: 1664 rows of ten 512-wide critics are 13 x 2 x 10 large programs, two waves of an H100. The planes just fit its
# L2 (50 MB); what leaves it takes less of HBM's time than a launch takes to issue its instructions. Smaller chunks pay
# for more boundaries between launches. Counted, not measured.
PLANE_BYTES = 34 << 20
_KEPT = 8  # programs kept per workspace: one for full chunks and one for the last, of each set of packed weights


def capability(device: torch.device) -> int:
    """10 major + minor; 0 where there is no GPU (the interpreter)."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def chunk_rows(layout: NetworkLayout, operand: torch.dtype) -> int:
    """Rows of a network that go through it together: whole large programs."""
    plane = layout.spec.num_members * layout.hidden_pad * operand.itemsize  # of one row
    return max(128, PLANE_BYTES // (2 * plane) // 128 * 128)


@dataclass
class Workspace:
    """Everything a call writes beside its result, for C rows of a chunk and their R = C N draws."""

    x: Tensor  # [C, A]
    v: Tensor  # [C, A]
    estimates: Tensor  # [R, A]; of GLASS draws, xbar until then
    q: Tensor  # [E, R]
    dq: Tensor  # [E, R, A]
    d_a: Tensor  # [R, A]
    q_std: Tensor  # [R]
    d_x: Tensor  # [R, A]: the gradient through the flow or the map
    drawn: Tensor  # [R, A]: the map's output
    glass: Tensor  # [4, R, A]: x*, v*, its cotangent, d x*
    alpha: Tensor  # [B], the steering's
    report: tuple[Tensor, Tensor, Tensor, Tensor]  # StepReport, [K, B] each; flags are int8
    scratch: Scratch
    tapes: dict[str, list[Tape]]  # of each network: one, or one for each inner step of GLASS draws
    programs: Cache = field(default_factory=lambda: Cache(_KEPT))

    @property
    def nbytes(self) -> int:
        parts = [value for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)]
        parts += [*self.report, *self.scratch.tensors]
        parts += [part for tapes in self.tapes.values() for tape in tapes for part in tape.tensors]
        return sum(part.nbytes for part in parts)


class SamplerPlan:
    """One sampler on one kind of device. Holds constants, no per-call state.

    Args:
        sm: compute capability as 10 major + minor; None: the device's. chunk: rows of a chunk; None: by PLANE_BYTES.
    """

    def __init__(
        self,
        spec: SamplerSpec,
        device: torch.device,
        table: LaunchTable,
        sm: int | None = None,
        chunk: int | None = None,
    ) -> None:
        self.spec, self.device = spec, device
        self.capability = capability(device) if sm is None else sm
        self.layouts = sampler_layouts(spec, table, self.capability)
        self.num_draws = spec.num_draws
        self.operand = OPERAND_DTYPES[spec.precision]
        together = [
            max(1, chunk_rows(self._layout_of(name), self.operand) // times)
            for name, (_, times) in self.evaluations().items()
        ]
        self.chunk = min(together) if chunk is None else chunk
        self.action_pad = padded_width(spec.flow.action_dim)
        mask = torch.zeros(self.action_pad, dtype=torch.float32, device="cpu")
        mask[: spec.flow.action_dim] = 1.0
        if spec.steering.steered_dims is not None:
            mask.zero_()[list(spec.steering.steered_dims)] = 1.0
        bounds = torch.zeros(2, self.action_pad, dtype=torch.float32, device="cpu")
        bounds[:, : spec.flow.action_dim] = torch.tensor(spec.box)
        rows = [[1 - step.t, step.dt, step.weight] for step in spec.schedule]
        m = spec.steering.glass_steps
        glass = [[c.p_x, c.p_xbar, c.c_x / m, c.c_xbar / m, c.c_v / m] for row in spec.glass_table for c in row]
        self.dims, self.bounds = mask.to(device), bounds.to(device)
        # schedule [K, 3]: 1 - t, dt, weight; glass [K m, 5]: p_x, p_xbar, and c_x, c_xbar, c_v over m
        self.schedule = torch.tensor(rows, dtype=torch.float32, device="cpu").to(device)
        self.glass = torch.tensor(glass or [[0.0] * 5], dtype=torch.float32, device="cpu").to(device)

    @property
    def packed_layouts(self) -> list[NetworkLayout]:
        """In the order in which the networks are packed."""
        return list(self.layouts.values())

    # ------------------------------------------------------------ memory

    def evaluations(self) -> dict[str, tuple[int, int]]:
        """(tapes, rows for each row of the batch) of each network."""
        found = dict.fromkeys(self.layouts, (1, self.num_draws))
        glass = bool(self.spec.glass_table)
        return {
            **found,
            "flow": (1, 1),
            **({"glass": (self.spec.steering.glass_steps, self.num_draws)} if glass else {}),
        }

    def _layout_of(self, name: str) -> NetworkLayout:
        return self.layouts["flow" if name == "glass" else name]

    def workspace(self, batch_size: int, fill: float | None = None, device: torch.device | None = None) -> Workspace:
        """Allocates; fill overwrites what nothing promises to be initialised (tests pass NaN)."""
        spec, a, place = self.spec, self.spec.flow.action_dim, self.device if device is None else device
        rows = min(batch_size, self.chunk)
        draws = rows * self.num_draws
        critic = self.layouts.get("critic")
        members, steers = (0, 0) if critic is None else (critic.spec.num_members, draws)

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            tensor = torch.empty(shape, dtype=dtype, device=place)
            return tensor if fill is None else tensor.fill_(fill)

        tapes, layouts, capacities = {}, [], []
        for name, (count, times) in self.evaluations().items():
            layout = self._layout_of(name)
            capacity = round_up(rows * times, max(layout.tile.most_rows, layout.ends.block_b))
            tapes[name] = [Tape(layout, capacity, self.operand, empty) for _ in range(count)]
            layouts.append(layout)
            capacities.append(capacity)
        zeros = torch.zeros(2, spec.num_steps, batch_size, device=place)
        flags = torch.zeros_like(zeros, dtype=torch.int8)
        return Workspace(
            x=empty(rows, a), v=empty(rows, a), estimates=empty(steers, a), q=empty(members, draws),
            dq=empty(members, draws, a), d_a=empty(steers, a), q_std=empty(steers), d_x=empty(steers, a),
            drawn=empty(draws if "posterior" in tapes else 0, a), glass=empty(4, draws if "glass" in tapes else 0, a),
            alpha=torch.full((batch_size,), spec.steering.alpha, device=place),
            report=(zeros[0], flags[0], zeros[1], flags[1]),
            scratch=Scratch(layouts, capacities, self.operand, empty), tapes=tapes,
        )  # fmt: skip

    # ------------------------------------------------------------ the program

    def run(
        self, ws: Workspace, packed: PackedBuffers, obs: dict[str, Tensor], noise: Tensor, eps: Tensor | None,
        actions: Tensor, alpha: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Enqueues the whole call on the current stream; actions [B, A] receives the result; alpha [B]: of each row.

        Args:
            obs: each network's block of observations, [B, *].
        """
        batch_size = len(noise)
        eps, alpha = noise if eps is None else eps, ws.alpha if alpha is None else alpha
        given = {f"obs of {name}": seen for name, seen in obs.items()}
        given |= {"noise": noise, "eps": eps, "actions": actions, "alpha": alpha}
        for start in range(0, batch_size, self.chunk):
            rows = min(self.chunk, batch_size - start)

            def value(of: Given) -> Tensor | int:
                if of.name == "report_at":
                    return (of.step or 0) * batch_size + start  # noqa: B023
                tensor = given[of.name] if of.step is None else given[of.name][of.step]
                return tensor[start : start + rows]  # noqa: B023

            for item in ws.programs.obtain((packed, rows), partial(self._launches, ws, packed, rows)):
                launch(item.name, item.grid, **item.arguments, **{name: value(of) for name, of in item.given.items()})

    def _launches(self, ws: Workspace, packed: PackedBuffers, rows: int) -> list[Launch]:
        return list(self.program(ws, packed, rows))

    def program(self, ws: Workspace, packed: PackedBuffers, rows: int) -> Iterator[Launch]:
        """The launches of a chunk of so many rows."""
        spec, dot = self.spec, dot_mode(self.spec.precision, self.capability)
        nets = dict(zip(self.layouts, packed.networks))
        steered = set(spec.steered_steps)
        flow = Evaluation(nets["flow"], ws.tapes["flow"][0], ws.scratch, ws.v, rows, 1, dot)
        obs, last = Given("obs of flow"), spec.num_steps - 1
        x: Any = Given("noise")
        for k, step in enumerate(spec.schedule):
            tweedie = k in steered and spec.steering.estimate == "tweedie"
            yield from flow.forward(obs, x, time=k, add=(x, 1 - step.t, ws.estimates) if tweedie else None)
            if k in steered:
                yield from self._gradient(ws, nets, flow, k, x, dot)
            yield self._update(ws, rows, k, step, k in steered, x, Given("actions") if k == last else ws.x)
            x = ws.x

    def _gradient(
        self, ws: Workspace, nets: dict[str, Any], flow: Evaluation, k: int, x: Any, dot: str
    ) -> Iterator[Launch]:
        """The critics' gradient at step k pulled back to x; its sum over the draws of a row is for the update."""
        spec, steering, draws = self.spec, self.spec.steering, self.num_draws
        rows, a = flow.rows * draws, spec.flow.action_dim
        estimates = x if steering.estimate == "noisy" else ws.estimates
        inner: list[Evaluation] = []
        if steering.estimate == "mfm":
            inner = [Evaluation(nets["posterior"], ws.tapes["posterior"][0], ws.scratch, ws.drawn, rows, draws, dot)]
            eps = Given("eps", k)
            yield from inner[0].forward(Given("obs of posterior"), x, eps, time=k, add=(eps, 1.0, ws.estimates))
        elif steering.estimate == "glass":
            star, v_star, _, _ = ws.glass
            m = steering.glass_steps
            inner = [Evaluation(nets["flow"], tape, ws.scratch, v_star, rows, draws, dot) for tape in ws.tapes["glass"]]
            for i in range(m + 1):
                yield self._rowwise(
                    "glass_draw", rows, x_ptr=x, from_ptr=Given("eps", k) if i <= 1 else ws.estimates, v_ptr=v_star,
                    to_ptr=ws.estimates, star_ptr=star, glass_ptr=self.glass, num_draws=draws, index=k * m + i,
                    MOVE=i > 0, ASK=i < m,
                )  # fmt: skip
                if i < m:
                    yield from inner[i].forward(Given("obs of flow"), star, time=spec.num_steps + k * m + i)
        critic = Evaluation(nets["critic"], ws.tapes["critic"][0], ws.scratch, ws.q, rows, draws, dot)
        clipped = self.bounds if steering.clip != "none" else None
        yield from critic.forward(Given("obs of critic"), estimates, bounds=clipped)
        yield from critic.pull_back(None, ws.dq, critic.net.layout.first_action_column, a)
        yield self._rowwise(
            "combine", rows, q_ptr=ws.q, dq_ptr=ws.dq, a_ptr=estimates, bounds_ptr=self.bounds, d_a_ptr=ws.d_a,
            std_ptr=ws.q_std, num_draws=draws, rho=float(steering.rho), tilt=self._tilt,
            DRAWS=steering.draws_posterior, E=critic.net.layout.spec.num_members, AGG=steering.aggregation,
            MASKED=steering.clip == "masked" and steering.jacobian == "full",
        )  # fmt: skip
        if steering.estimate == "mfm":
            yield from inner[0].pull_back(ws.d_a, ws.d_x, inner[0].net.layout.first_action_column, a)
        elif steering.estimate == "glass":
            _, _, cotangent, d_star = ws.glass
            for i in reversed(range(-1, m)):
                yield self._rowwise(
                    "glass_pull", rows, d_xbar_ptr=ws.d_a, d_star_ptr=d_star, d_x_ptr=ws.d_x, cotangent_ptr=cotangent,
                    glass_ptr=self.glass, index=k * m + i, MOVE=i < m - 1, ASK=i >= 0,
                )  # fmt: skip
                if i >= 0:
                    yield from inner[i].pull_back(cotangent, d_star, inner[i].net.layout.first_action_column, a)
        elif spec.pulls_flow:
            yield from flow.pull_back(ws.d_a, ws.d_x, flow.net.layout.first_action_column, a)

    @property
    def _tilt(self) -> float:
        steering = self.spec.steering
        return float(steering.tau / (steering.q_scale if isinstance(steering.q_scale, (int, float)) else 1.0))

    def _update(
        self, ws: Workspace, rows: int, k: int, step: Step, steer: bool, x: Any, target: Any
    ) -> Launch:  # fmt: skip
        steering = self.spec.steering
        draws = steering.draws_posterior
        return self._rowwise(
            "update", rows, x_ptr=x, v_ptr=ws.v, g_ptr=ws.d_x if draws else ws.d_a, through_ptr=ws.d_x,
            std_ptr=ws.q_std,
            out_ptr=target, schedule_ptr=self.schedule, dims_ptr=self.dims, bounds_ptr=self.bounds,
            alpha_ptr=Given("alpha"), norm_ptr=ws.report[0], nonfinite_ptr=ws.report[1], row_std_ptr=ws.report[2],
            gated_ptr=ws.report[3], num_draws=self.num_draws, step=k, report_at=Given("report_at", k),
            tilt=self._tilt, **scale_arguments(steering),
            STEER=steer, THROUGH=steer and not draws and self.spec.pulls_flow, LAST=k == self.spec.num_steps - 1,
            SCALE=steering.scale,
        )  # fmt: skip

    def _rowwise(self, name: str, rows: int, **arguments: Any) -> Launch:
        """A launch over rows of actions: a warp takes 4 values a lane, so that few rows spread over many programs."""
        block = 16 if self.capability == 0 else max(1, 128 // self.action_pad)
        arguments |= dict(num_rows=rows, ACTION_DIM=self.spec.flow.action_dim, A_PAD=self.action_pad, BLOCK_B=block)
        return Launch.of(name, (-(-rows // block),), num_warps=1, **arguments)

    def check_size(self, batch_size: int) -> None:
        elements = batch_size * self.num_draws * self.spec.flow.action_dim
        if elements >= 2**31:
            raise ValueError(
                f"batch size {batch_size} makes {elements} elements of estimates; expected fewer than 2^31. "
                "Split the batch."
            )
