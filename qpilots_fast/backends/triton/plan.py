"""How one sampler becomes launches: tiles, constants, workspace, and the order of the kernels."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ...spec import SamplerSpec
from .launch_table import LaunchTable, Tile, dot_mode
from .launcher import launch
from .packing import OPERAND_DTYPES, PackedBuffers, PackedNetwork, launch_constants, padded_width, sampler_layouts

_INTERPRETER_SMS = 2


def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return _INTERPRETER_SMS
    return torch.cuda.get_device_properties(device).multi_processor_count


def capability(device: torch.device) -> int:
    """10 major + minor; 0 where there is no GPU (the interpreter)."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@dataclass
class Workspace:
    """Everything a call writes beside its result. Reused by every call of its batch size and stream."""

    x: Tensor  # [B, A]
    v: Tensor  # [B, A]
    estimates: Tensor  # [R, A]
    q: Tensor  # [E, R]
    dq: Tensor  # [E, R, A]
    q_bar: Tensor  # [R]
    q_std: Tensor  # [R]
    gx: Tensor  # [R, A]
    xbar: Tensor  # [glass_steps, R, A]
    alpha: Tensor  # [B], the steering's
    report: tuple[Tensor, Tensor, Tensor, Tensor]  # StepReport, [K, B] each; flags are int8
    step_h: Tensor
    step_z: Tensor
    step_stat: Tensor
    critic_h: Tensor
    critic_z: Tensor
    critic_stat: Tensor

    @property
    def nbytes(self) -> int:
        parts = [getattr(self, f.name) for f in fields(self) if f.name != "report"]
        return sum(part.nbytes for part in (*parts, *self.report))


@dataclass(frozen=True)
class StepLaunch:
    """One launch of the step kernel.

    Args:
        steered: the step that it finishes from the critics' answers; -1: none.
        plain_end: the unsteered steps up to here are taken.
        flow_end: the flow runs at the steps up to here: one more where it proposes for the next steered step.
        propose: whether it writes the estimates that the critics see next; else it writes the actions.
    """

    steered: int
    plain_end: int
    flow_end: int
    propose: bool

    @property
    def steer(self) -> bool:
        return self.steered >= 0

    @property
    def num_flows(self) -> int:
        return self.flow_end - self.steered - 1


@dataclass(frozen=True)
class Grid:
    """How a batch is cut: tiles over persistent programs."""

    rows_per_tile: int
    step_tiles: int
    step_programs: int
    critic_tiles: int
    critic_programs: int
    recompute: bool  # whether another tile overwrites a tile's activations before its pull-back


def scratch_sizes(layouts: Any, tile: Tile) -> tuple[int, int, int]:
    """Elements a program needs of h, z and stat to run any of the networks."""
    width = max(n.h_width for n in layouts)
    return tile.block_b * width, max(n.z_size for n in layouts), max(n.stat_size for n in layouts)


class SamplerPlan:
    """One sampler on one kind of device. Holds constants, no per-call state."""

    def __init__(
        self, spec: SamplerSpec, device: torch.device, table: LaunchTable, sms: int | None = None, sm: int | None = None
    ) -> None:
        self.spec, self.device = spec, device
        steering = spec.steering
        self.sms = multiprocessors(device) if sms is None else sms
        self.capability = capability(device) if sm is None else sm
        action_pad = padded_width(spec.flow.action_dim)
        widest = [max(n.hidden_dims) for name, n in spec.networks.items() if name != "critic"]
        self.step_tile = table.tile("step", spec.precision, self.capability, action_pad).narrowed(max(widest))
        self.critic_tile = table.tile("critic", spec.precision, self.capability, action_pad)
        if spec.critic is not None:
            self.critic_tile = self.critic_tile.narrowed(max(spec.critic.hidden_dims))
        self.layouts = sampler_layouts(spec, self.critic_tile, self.step_tile)
        self.flow_layout = self.layouts[0]
        self.critic_layout = self.layouts[1] if len(self.layouts) > 1 else None
        self.posterior_layout = self.layouts[2] if len(self.layouts) > 2 else None
        self.num_draws = spec.num_draws
        self.operand = OPERAND_DTYPES[spec.precision]
        mask = torch.zeros(action_pad, dtype=torch.float32, device="cpu")
        mask[: spec.flow.action_dim] = 1.0
        if steering.steered_dims is not None:
            mask.zero_()[list(steering.steered_dims)] = 1.0
        self.dims = mask.to(device)
        bounds = torch.zeros(2, action_pad, dtype=torch.float32, device="cpu")
        bounds[:, : spec.flow.action_dim] = torch.tensor(spec.box)
        self.bounds = bounds.to(device)
        rows = [[1 - step.t, step.dt, step.weight] for step in spec.schedule]
        self.schedule = torch.tensor(rows, dtype=torch.float32, device="cpu").to(device)
        self.glass = torch.tensor(self._glass_table(), dtype=torch.float32, device="cpu").to(device)

    def _glass_table(self) -> list[list[list[float]]]:
        """[K, glass_steps, 5]: p_x, p_xbar, c_x / m, c_xbar / m, c_v / m."""
        m = self.spec.steering.glass_steps
        table = [[[c.p_x, c.p_xbar, c.c_x / m, c.c_xbar / m, c.c_v / m] for c in row] for row in self.spec.glass_table]
        return table or [[[0.0]]]

    def step_layouts(self) -> list[Any]:
        return [n for n in (self.flow_layout, self.posterior_layout) if n is not None]

    def grid(self, batch_size: int) -> Grid:
        """Tiles and programs for a batch. Which rows share a tile does not change any row's arithmetic."""
        block_b, draws = self.step_tile.block_b, self.num_draws
        programs = self.sms * self.step_tile.programs_per_sm
        rows = block_b
        if draws > 1 and -(-batch_size // block_b) < programs:
            rows = max(1, block_b // draws)  # few rows: the draws of a row side by side rather than one after another
        tiles = -(-batch_size // rows)
        step_programs = min(tiles, programs)
        critic_tiles = critic_programs = 0
        if self.critic_layout is not None:
            row_blocks = -(-batch_size * draws // self.critic_tile.block_b)
            critic_tiles = row_blocks * self.critic_layout.spec.num_members
            critic_programs = min(critic_tiles, self.sms * self.critic_tile.programs_per_sm)
        recompute = tiles > step_programs or rows * draws > block_b
        return Grid(rows, tiles, step_programs, critic_tiles, critic_programs, recompute)

    def workspace(self, batch_size: int, fill: float | None = None) -> Workspace:
        """Allocates; fill overwrites what nothing promises to be initialised (tests pass NaN)."""
        steering, a, grid = self.spec.steering, self.spec.flow.action_dim, self.grid(batch_size)
        draws = batch_size * self.num_draws
        members = 0 if self.critic_layout is None else self.critic_layout.spec.num_members
        steers = self.critic_layout is not None
        virtual = draws if steering.draws_posterior else 0
        inner = steering.glass_steps if self.spec.glass_table else 0

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            tensor = torch.empty(shape, dtype=dtype, device=self.device)
            return tensor if fill is None else tensor.fill_(fill)

        def scratch(layouts: list[Any], tile: Tile, programs: int) -> list[Tensor]:
            if not layouts or not programs:
                return [empty(0, dtype=self.operand), empty(0, dtype=self.operand), empty(0)]
            h, z, stat = scratch_sizes(layouts, tile)
            return [
                empty(programs, h, dtype=self.operand),
                empty(programs, z, dtype=self.operand),
                empty(programs, stat),
            ]

        step = scratch(self.step_layouts(), self.step_tile, grid.step_programs)
        critic = scratch([self.critic_layout] if self.critic_layout else [], self.critic_tile, grid.critic_programs)
        zeros = torch.zeros(2, self.spec.num_steps, batch_size, device=self.device)
        flags = torch.zeros_like(zeros, dtype=torch.int8)
        alpha = torch.full((batch_size,), steering.alpha, device=self.device)
        return Workspace(
            empty(batch_size, a), empty(batch_size, a), empty(draws if steers else 0, a), empty(members, draws),
            empty(members, draws, a), empty(virtual), empty(virtual), empty(virtual, a), empty(inner, virtual, a),
            alpha, (zeros[0], flags[0], zeros[1], flags[1]), *step, *critic,
        )  # fmt: skip

    def check_size(self, batch_size: int) -> None:
        members = 1 if self.critic_layout is None else self.critic_layout.spec.num_members
        elements = batch_size * self.num_draws * self.spec.flow.action_dim * members
        if elements >= 2**31:
            raise ValueError(
                f"batch size {batch_size} makes {elements} critic gradients; expected fewer than 2^31. Split the batch."
            )

    # ------------------------------------------------------------ launching

    def step_launches(self) -> list[StepLaunch]:
        """The launches of the step kernel of one call; the critics are asked before each that steers."""
        steps = self.spec.num_steps
        return [
            StepLaunch(before, k, min(k + 1, steps), k < steps)
            for before, k in pairwise((-1, *self.spec.steered_steps, steps))
        ]

    def run(
        self, ws: Workspace, packed: PackedBuffers, obs: Tensor, noise: Tensor, eps: Tensor | None, actions: Tensor,
        alpha: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Enqueues the whole call on the current stream; actions [B, A] receives the result; alpha [B]: of each row."""
        grid = self.grid(len(noise))
        for step in self.step_launches():
            if step.steer:
                self._critic(ws, packed, grid, obs)
            x_in, x_out = ws.x if step.steer else noise, ws.x if step.propose else actions
            self._step(ws, packed, grid, obs, x_in, x_out, eps, alpha, step)

    def critic_arguments(self) -> dict[str, Any]:
        """Constexpr arguments and options of the critic kernel."""
        layout, tile = self.critic_layout, self.critic_tile
        assert layout is not None
        return dict(
            OBS_DIM=layout.spec.obs_dim, ACTION_DIM=layout.spec.action_dim, COLUMN=layout.first_action_column,
            A_PAD=layout.action_pad, LDH=layout.h_width, OUT_ROWS=layout.out_rows,
            CLIP=self.spec.steering.clip != "none", DOT=dot_mode(self.spec.precision, self.capability),
            **tile.options(), **launch_constants(layout),
        )  # fmt: skip

    def step_arguments(self, step: StepLaunch, recompute: bool) -> dict[str, Any]:
        """Constexpr arguments and options of the step kernel."""
        steering, tile, flow = self.spec.steering, self.step_tile, self.flow_layout
        posterior = self.posterior_layout or flow
        _, z_size, stat_size = scratch_sizes(self.step_layouts(), tile)
        return dict(
            STEER=step.steer, PROPOSE=step.propose, FLOW=step.num_flows > 0, RECOMPUTE=recompute and step.steer,
            ESTIMATE=steering.estimate,
            FULL=steering.jacobian == "full", MASKED=steering.clip == "masked" and steering.jacobian == "full",
            AGG=steering.aggregation, SCALE=steering.scale,
            E=1 if self.critic_layout is None else self.critic_layout.spec.num_members,
            GLASS_STEPS=steering.glass_steps, NUM_STEPS=self.spec.num_steps,
            OBS_DIM=flow.spec.obs_dim, ACTION_DIM=flow.spec.action_dim, COLUMN=flow.first_action_column,
            A_PAD=flow.action_pad, LDH=max(n.h_width for n in self.step_layouts()), Z_SIZE=z_size, STAT_SIZE=stat_size,
            **launch_constants(flow, "FLOW_"), **launch_constants(posterior, "POSTERIOR_"),
            OUT_ROWS=flow.out_rows, DOT=dot_mode(self.spec.precision, self.capability),
            **tile.options(),
        )  # fmt: skip

    def _critic(self, ws: Workspace, packed: PackedBuffers, grid: Grid, obs: Tensor) -> None:
        net = packed.networks[1]
        launch(
            "critic", (grid.critic_programs,), obs_ptr=obs, a_ptr=ws.estimates, q_ptr=ws.q, dq_ptr=ws.dq,
            w_ptr=net.weights, vec_ptr=net.vectors, layer_ptr=net.layers,
            h_ptr=ws.critic_h, z_ptr=ws.critic_z, stat_ptr=ws.critic_stat,
            num_rows=len(ws.estimates), num_draws=self.num_draws, num_tiles=grid.critic_tiles,
            bounds_ptr=self.bounds, norm_eps=float(net.layout.spec.layer_norm_eps), **self.critic_arguments(),
        )  # fmt: skip

    def _step(
        self, ws: Workspace, packed: PackedBuffers, grid: Grid, obs: Tensor, x_in: Tensor, x_out: Tensor,
        eps: Tensor | None, alpha: Tensor | None, step: StepLaunch,
    ) -> None:  # fmt: skip
        steering, net = self.spec.steering, packed.networks[0]
        posterior: PackedNetwork = packed.networks[2] if self.posterior_layout is not None else net
        tilt = steering.tau / (steering.q_scale if isinstance(steering.q_scale, (int, float)) else 1.0)
        launch(
            "step", (grid.step_programs,), x_in_ptr=x_in, x_out_ptr=x_out, v_ptr=ws.v, a_ptr=ws.estimates, q_ptr=ws.q,
            dq_ptr=ws.dq, q_bar_ptr=ws.q_bar, q_std_ptr=ws.q_std, gx_ptr=ws.gx, xbar_ptr=ws.xbar, obs_ptr=obs,
            eps_ptr=x_in if eps is None else eps,
            flow_w_ptr=net.weights, flow_vec_ptr=net.vectors, flow_bias_ptr=net.time_bias, flow_layer_ptr=net.layers,
            posterior_w_ptr=posterior.weights, posterior_vec_ptr=posterior.vectors,
            posterior_bias_ptr=posterior.time_bias,
            posterior_layer_ptr=posterior.layers, h_ptr=ws.step_h, z_ptr=ws.step_z, stat_ptr=ws.step_stat,
            schedule_ptr=self.schedule, glass_ptr=self.glass, dims_ptr=self.dims, bounds_ptr=self.bounds,
            alpha_ptr=ws.alpha if alpha is None else alpha, norm_ptr=ws.report[0], nonfinite_ptr=ws.report[1],
            row_std_ptr=ws.report[2], gated_ptr=ws.report[3],
            num_rows=len(obs), num_draws=self.num_draws, rows_per_tile=grid.rows_per_tile, num_tiles=grid.step_tiles,
            step=max(step.steered, 0), flow_begin=step.steered + 1, flow_end=step.flow_end, plain_end=step.plain_end,
            gain=1.0 / steering.gaf_beta, rho=float(steering.rho), tilt=float(tilt), floor=float(steering.eps),
            max_grad_norm=float(steering.max_grad_norm), gaf_decay=float(steering.gaf_decay),
            gaf_min=float(steering.gaf_min),
            max_disagreement=math.inf if steering.max_disagreement is None else float(steering.max_disagreement),
            flow_norm_eps=float(net.layout.spec.layer_norm_eps),
            posterior_norm_eps=float(posterior.layout.spec.layer_norm_eps), **self.step_arguments(step, grid.recompute),
        )  # fmt: skip
