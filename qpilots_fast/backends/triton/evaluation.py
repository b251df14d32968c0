"""The launches that evaluate one packed network and pull a cotangent back through it: data, no kernel runs here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .chain_ops import MAX_OPS, chain_block, is_saved, kept_ops
from .layouts import NetworkLayout, padded_width
from .packing import PackedNetwork

_APPROXIMATED = ("gelu_tanh", "silu", "tanh")  # activations with a form by the hardware's tanh


@dataclass(frozen=True)
class Given:
    """A tensor of the call in a launch's arguments: its rows of the present chunk.

    Args:
        step: of tensors that have one axis of steps before the rows.
    """

    name: str
    step: int | None = None


@dataclass(frozen=True)
class Launch:
    """One launch.

    Args:
        name: of the kernel. arguments: tensors, numbers and options, by name. given: what the call has to fill in.
    """

    name: str
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    given: dict[str, Given]

    @staticmethod
    def of(name: str, grid: tuple[int, ...], **arguments: Any) -> Launch:
        """One whose arguments may be Given."""
        given = {key: value for key, value in arguments.items() if isinstance(value, Given)}
        return Launch(name, grid, {key: value for key, value in arguments.items() if key not in given}, given)


Make = Callable[..., Tensor]  # (*shape, dtype) -> an uninitialised tensor


class Tape:
    """What a pull-back needs of a forward.

    z [E, capacity, H_PAD] of each layer without a chain, and stat [L, E, tiles, 2, capacity]. Of chains: saves
    [E, capacity, H_PAD] of (layer, operation), and rstd [operations, E, capacity] of each layer.
    """

    def __init__(self, layout: NetworkLayout, capacity: int, operand: torch.dtype, make: Make) -> None:
        members, hidden = layout.spec.num_members, layout.hidden_pad
        self.capacity, self.operand = capacity, operand
        self.stat = make(layout.depth, members, hidden // layout.tile.block_n, 2, capacity)
        self.z: dict[int, Tensor] = {}
        self.saves: dict[tuple[int, int], Tensor] = {}
        self.rstd: dict[int, Tensor] = {}
        for layer in range(layout.depth):
            chain = layout.chain(layer)
            if chain is None:
                self.z[layer] = make(members, capacity, hidden, dtype=operand)
                continue
            self.rstd[layer] = make(len(chain), members, capacity)
            saved = (i for i, op in enumerate(chain) if is_saved(op))
            self.saves |= {(layer, i): make(members, capacity, hidden) for i in saved}

    @property
    def tensors(self) -> list[Tensor]:
        return [self.stat, *self.z.values(), *self.saves.values(), *self.rstd.values()]


class Scratch:
    """What passes from one launch to the next; networks share it one after another.

    planes and sums are in two halves that take turns; rows and kept are those of chains (chains.py).
    """

    def __init__(self, layouts: list[NetworkLayout], capacities: list[int], operand: torch.dtype, make: Make) -> None:
        sizes = [(n.spec.num_members * rows * n.hidden_pad, n) for n, rows in zip(layouts, capacities)]
        self.planes = make(2, max((size for size, _ in sizes), default=0), dtype=operand)
        self.sums = make(2, max((2 * size // n.tile.block_n for size, n in sizes), default=0))
        self.rows, self.kept = make(2, max((size for size, n in sizes if n.spec.chains), default=0))

    @property
    def tensors(self) -> list[Tensor]:
        return [self.planes, self.sums, self.rows, self.kept]


@dataclass(frozen=True)
class Evaluation:
    """One network on rows of a chunk.

    Args:
        net: packed. tape: written by `forward`, read by `pull_back`. out: [E, rows, out], the network's output.
        rows: evaluated. draws: rows that share a row of obs. dot: input_precision of the products.
    """

    net: PackedNetwork
    tape: Tape
    scratch: Scratch
    out: Tensor
    rows: int
    draws: int
    dot: str

    @property
    def _layout(self) -> NetworkLayout:
        return self.net.layout

    def _weights(self, layer: int, column: int = 0) -> Tensor:
        return self.net.weights[self._layout.weight_start(layer) + column :]

    def _vectors(self, layer: int) -> Tensor:
        return self.net.vectors[self._layout.vector_start(layer) :]

    def _width(self, layer: int) -> int:
        return self._layout.spec.hidden_dims[layer]

    def _activation(self, layer: int) -> str:
        """That a product's epilogue applies; any where a chain follows."""
        spec = self._layout.spec
        fused = bool(spec.chains) and self._layout.chain(layer) is None
        return self._form(spec.chains[layer][0].name if fused else spec.activation)

    def _form(self, name: str) -> str:
        """Of a row operation, as the kernels name it."""
        rounds = self.tape.operand == torch.bfloat16 and self.dot != "emulated"
        return f"{name}_approx" if rounds and name in _APPROXIMATED else name

    def _z(self, layer: int) -> Tensor:
        return self.tape.z.get(layer, self.scratch.rows)

    def _common(self) -> dict[str, Any]:
        layout = self._layout
        return dict(
            num_rows=self.rows, capacity=self.tape.capacity, norm_eps=float(layout.spec.layer_norm_eps),
            W_STRIDE=layout.member_weights, H_PAD=layout.hidden_pad, LD=layout.leading_dim, DOT=self.dot,
            STAT_N=layout.tile.block_n,
        )  # fmt: skip

    def _chain(self, layer: int, pull: bool, loads: bool, stores: bool, film: Tensor | None = None) -> Launch:
        """The operations of a layer's chain, or (pull) their pull-back.

        Args:
            loads, stores: whether the plane of kept rows is read first, and written last.
            film: scale and shift [width] of each row, or of all.
        """
        layout, unused = self._layout, self.net.vectors
        chain, columns = layout.chain(layer) or (), layout.padded(self._width(layer))
        block = chain_block(columns)
        names = [self._form(op.name) for op in chain] + ["none"] * (MAX_OPS - len(chain))
        by_row = film is not None and film.ndim == 2
        saves = {f"save{i}_ptr": self.tape.saves.get((layer, i), unused) for i in range(MAX_OPS)}
        return Launch.of(
            "chain", (-(-self.rows // block["BLOCK_B"]), layout.spec.num_members),
            rows_ptr=self.scratch.rows, kept_ptr=self.scratch.kept, h_ptr=self.scratch.planes[layer % 2],
            vec_ptr=self._vectors(layer), film_ptr=unused if film is None else film, rstd_ptr=self.tape.rstd[layer],
            **saves, num_rows=self.rows, capacity=self.tape.capacity, WIDTH=self._width(layer), COLUMNS=columns,
            **{f"OP{i}": name for i, name in enumerate(names)}, LOADS=loads, STORES=stores, PULL=pull,
            VEC_STRIDE=layout.member_vectors, FILM_STRIDE=layout.spec.film_dim if by_row else 0,
            H_PAD=layout.hidden_pad, **block,
        )  # fmt: skip

    def forward(
        self, obs: Any, x: Any = None, xbar: Any = None, bounds: Tensor | None = None, time: int | None = None,
        add: tuple[Any, float, Tensor] | None = None, film: Tensor | None = None,
    ) -> Iterator[Launch]:  # fmt: skip
        """Output into `out`.

        Args:
            obs: [*, OBS_DIM], one row for each of `draws`; of a network whose inputs are not split, all its inputs.
            x, xbar: action blocks, as _layer_kernel takes them. bounds: x is clipped into them.
            time: index of the first bias among those of the layout's times.
            add: (a, scale, sum): a + scale output, [E, rows, out], is written into sum.
            film: scales and shifts of each row, [rows, film_dim]; None: the layout's at this time.
        """
        layout, spec = self._layout, self._layout.spec
        tile, unused = layout.tile.for_rows(self.rows * spec.num_members), self.net.vectors
        split = layout.action_blocks > 0
        bias = self._vectors(0) if time is None else self.net.time_bias[time * layout.hidden_pad :]
        modulations, modulated = self.net.film[(time or 0) * spec.film_dim :] if film is None else film, 0
        for layer, width in enumerate(spec.hidden_dims):
            first, below, chain = layer == 0, layout.norm(layer - 1), layout.chain(layer)
            source = self.tape.z[layer - 1] if below == "pre" else self.scratch.planes[(layer - 1) % 2]
            columns = -(-layout.padded(width) // tile.block_n)
            yield Launch.of(
                "layer", (columns, -(-self.rows // tile.block_b), spec.num_members),
                obs_ptr=obs if first else unused, x_ptr=x if first and split else unused,
                xbar_ptr=xbar if first and xbar is not None else unused,
                bounds_ptr=unused if bounds is None else bounds,
                below_ptr=unused if first else source, below_stat_ptr=self.tape.stat[max(layer - 1, 0)],
                w_ptr=self._weights(layer), vec_ptr=self._vectors(layer),
                bias_ptr=bias if first else self._vectors(layer),
                z_ptr=self._z(layer), y_ptr=self.scratch.planes[layer % 2], stat_ptr=self.tape.stat[layer],
                num_draws=self.draws, depth=0 if first else layout.padded(self._width(layer - 1)),
                BELOW_WIDTH=0 if first else self._width(layer - 1), WIDTH=width,
                FIRST=first, OBS_DIM=spec.block_dim("obs") if split else spec.input_dim, ACTION_DIM=spec.action_dim,
                COLUMN=layout.first_action_column, A_PAD=layout.action_pad, BLOCKS=layout.action_blocks,
                CLIP=first and bounds is not None,
                BIAS_STRIDE=0 if first and time is not None else layout.member_vectors,
                VEC_STRIDE=layout.member_vectors, BELOW_NORM=below,
                NORM=layout.norm(layer) if chain is None else "chain", ACT=self._activation(layer),
                **self._common(), **tile.options(),
            )  # fmt: skip
            if chain is not None:
                names = kept_ops(chain)
                modulation = unused
                if any(op.name == "film" for op in chain):
                    modulation, modulated = modulations[..., modulated:], modulated + 2 * width
                yield self._chain(layer, False, names[:1] == ["add"], "keep" in names, modulation)
        last = layout.depth - 1
        ends = layout.ends
        yield Launch.of(
            "output", (-(-self.rows // ends.block_b), spec.num_members),
            below_ptr=self.tape.z[last] if layout.norm(last) == "pre" else self.scratch.planes[last % 2],
            stat_ptr=self.tape.stat[last], w_ptr=self._weights(layout.depth), vec_ptr=self._vectors(layout.depth),
            add_ptr=unused if add is None else add[0], out_ptr=self.out,
            sum_ptr=self.out if add is None else add[2],
            depth=layout.padded(self._width(last)), WIDTH=self._width(last), scale=1.0 if add is None else add[1],
            OUT_DIM=spec.output_dim, OUT_ROWS=layout.out_pad, ADD=add is not None,
            VEC_STRIDE=layout.member_vectors, BELOW_NORM=layout.norm(last), ACT=self._activation(last),
            **self._common(), **ends.with_columns(layout.out_pad).options(),
        )  # fmt: skip

    def pull_back(
        self, cotangent: Any, target: Tensor, column: int, columns: int, through: int | None = None
    ) -> Iterator[Launch]:
        """Into target [E, rows, columns]: the cotangent [E, rows, out] pulled back to inputs, after `forward`.

        Args:
            cotangent: None for 1 (of a critic).
            column: first packed input column. through: columns of a tile; None: all of them in one.
        """
        layout, spec, depth = self._layout, self._layout.spec, self._layout.depth
        tile, unused = layout.tile.for_rows(self.rows * spec.num_members), self.net.vectors
        pending = False  # whether an "add" above has left its cotangent for the "keep" that it reads
        for layer in reversed(range(depth)):
            chain = layout.chain(layer)
            top = "none" if layer < depth - 1 else "ones" if cotangent is None else "rows"
            above = min(layer + 1, depth - 1)
            yield Launch.of(
                "delta", (-(-layout.padded(self._width(layer)) // tile.block_n), -(-self.rows // tile.block_b),
                          spec.num_members),
                cotangent_ptr=cotangent if top == "rows" else unused, out_ptr=self.out,
                above_ptr=self.scratch.planes[(layer + 1) % 2], above_z_ptr=self._z(above),
                above_stat_ptr=self.tape.stat[above], above_sum_ptr=self.scratch.sums[(layer + 1) % 2],
                w_ptr=self._weights(layer + 1), above_vec_ptr=self._vectors(layer + 1),
                vec_ptr=self._vectors(layer),
                z_ptr=self._z(layer), stat_ptr=self.tape.stat[layer],
                d_ptr=self.scratch.planes[layer % 2] if chain is None else self.scratch.rows,
                sum_ptr=self.scratch.sums[layer % 2],
                depth=layout.padded(self._width(above)), ABOVE_WIDTH=self._width(above), WIDTH=self._width(layer),
                TOP=top, OUT_DIM=spec.output_dim, OUT_PAD=layout.out_pad, OUT_ROWS=layout.out_pad,
                VEC_STRIDE=layout.member_vectors, ABOVE_NORM=layout.norm(layer + 1),
                NORM=layout.norm(layer) if chain is None else "chain",
                BELOW_NORM=layout.norm(layer - 1), ACT=self._activation(layer), **self._common(), **tile.options(),
            )  # fmt: skip
            if chain is not None:
                names, loads = kept_ops(chain), pending
                pending = names[0] == "add" if names else pending
                yield self._chain(layer, True, bool(names) and loads, bool(names) and pending)
        ends = layout.ends.with_columns(through or padded_width(columns))
        yield Launch.of(
            "input_gradient", (-(-columns // ends.block_n), -(-self.rows // ends.block_b), spec.num_members),
            cotangent_ptr=unused if cotangent is None else cotangent, d_ptr=self.scratch.planes[0],
            z_ptr=self._z(0), stat_ptr=self.tape.stat[0], sum_ptr=self.scratch.sums[0],
            w_ptr=self._weights(0, column), out_ptr=target,
            depth=layout.padded(self._width(0)), WIDTH=self._width(0), RESCALE=cotangent is not None,
            OUT_DIM=spec.output_dim, OUT_PAD=layout.out_pad, COLUMNS=columns, NORM=layout.norm(0),
            **self._common(), **ends.options(),
        )  # fmt: skip
