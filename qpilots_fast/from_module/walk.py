"""A recorded call, read operation by operation: which rows the moving actions pass through."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .codes import Codes, Rows, Weights
from .held import Applied, Held
from .recording import Operation, Recording, tensors_in
from .refusal import Refused
from .sources import Source
from .states import (
    Columns,
    Given,
    Linear,
    Pointwise,
    Sorted,
    State,
)

_LAYOUT = {
    "view", "_unsafe_view", "reshape", "t", "transpose", "permute", "expand", "unsqueeze", "squeeze", "slice", "select",
    "clone", "alias", "detach", "split", "split_with_sizes", "chunk", "unbind", "cat", "stack", "repeat", "index",
    "index_select", "unfold", "_reshape_alias", "_to_copy", "flatten", "lift_fresh", "view_as", "expand_as", "movedim",
}  # fmt: skip
Handler = Callable[["Walk", Operation], Any]  # codes of each tensor that it gives; None: of one that is not followed
_POOLS = {"min", "max", "amin", "amax", "minimum", "maximum", "median", "mean", "sum", "logsumexp", "var", "std"}


_BESIDE_INPUTS = "{} reads hidden rows beside the network's inputs (a skip connection by concatenation?)"


class Fixed:
    """What is known of a tensor that the moving actions do not reach.

    Args:
        follows: the inputs that it follows. expression: of the module's tensors, where it follows no input.
        codes: of its elements among Weights.
    """

    def __init__(self, follows: frozenset[str], expression: Any = None, codes: Tensor | None = None) -> None:
        self.follows, self.expression, self.codes = follows, expression, codes


class Walk:
    """Reads a recording.

    Args:
        blocks: the inputs of the call by name. moving: the name of the actions that move.
        sources: the module's own tensors.
        handlers: what operations on whole rows give, by name. number_by_number: what those on single numbers give.
        late: whether what happens to the actions alone before the first Linear is
            taken as a change of the columns; else it is an operation of the network.

    After construction, `columns` [B, D] is what the network reads and `codes_of(tensor)` where an output comes from.

    Raises:
        Refused: with the operation that no packed network has.
    """

    def __init__(
        self, recording: Recording, blocks: dict[str, Tensor], moving: str, sources: Sequence[tuple[Source, Tensor]],
        handlers: Mapping[str, Handler], number_by_number: Handler, late: bool,
    ) -> None:  # fmt: skip
        self.late, self._handlers, self._number_by_number = late, handlers, number_by_number
        self.batch = len(blocks[moving])
        self.codes = Codes(self.batch)
        self.columns: Tensor | None = None
        self.root: Columns | None = None
        self._kept: list[Tensor] = []  # so that no id is used twice
        self._moving: dict[int, Tensor] = {}
        self._fixed: dict[int, Fixed] = {}
        self._slices: dict[tuple[int, int, int], State] = {}
        for source, tensor in sources:
            self._fixed[id(tensor)] = Fixed(frozenset(), source, self.codes.of_tensor(Weights(source, tensor)))
        for name, block in blocks.items():
            if name == moving:
                self._moving[id(block)] = self.codes.of_tensor(Given(block, True))
            else:
                self._fixed[id(block)] = Fixed(frozenset([name]))
        for operation in recording.operations:
            self._read(operation)

    def codes_of(self, tensor: Tensor) -> Tensor:
        """The codes of a tensor that the moving actions reach.

        Raises:
            Refused: where they do not.
        """
        if id(tensor) not in self._moving:
            raise Refused("its output does not follow the actions, or follows them by what no operation showed")
        return self._moving[id(tensor)]

    def moves(self, tensor: Tensor) -> bool:
        """Whether the moving actions reach a tensor."""
        return id(tensor) in self._moving

    def moving_codes(self, tensor: Tensor) -> Tensor:
        return self._moving[id(tensor)]

    def take(self, tensor: Tensor, codes: Tensor) -> None:
        """Follows a tensor that no operation gave."""
        self._kept.append(tensor)
        self._moving[id(tensor)] = codes

    def _read(self, operation: Operation) -> None:
        tensors = tensors_in([operation.args, operation.kwargs])
        self._kept += [*tensors, *tensors_in(operation.output)]
        moving = [tensor for tensor in tensors if id(tensor) in self._moving]
        if not moving:
            self._read_fixed(operation, tensors)
            return
        name = operation.name
        if name in _LAYOUT:
            made = self._layout(operation)
        elif name in self._handlers:
            made = self._handlers[name](self, operation)
        elif torch.Tag.pointwise in operation.function.tags:
            made = self._number_by_number(self, operation)
        else:
            raise Refused(f"it has {shown(operation)}, which is no operation of a packed network{why(name)}")
        for tensor, codes in zip(tensors_in(operation.output), made if isinstance(made, list) else [made]):
            if codes is not None:
                if codes.shape != tensor.shape:
                    raise Refused(f"its {shown(operation)} gives rows in a layout that is not followed")
                self._moving[id(tensor)] = codes
                self._fixed.pop(id(tensor), None)

    # ------------------------------------------------------------ what the actions do not reach

    def known(self, tensor: Tensor) -> Fixed:
        found = self._fixed.get(id(tensor))
        if found is None:  # made outside, or an attribute of something that is no module
            self._kept.append(tensor)
            found = self._fixed[id(tensor)] = Fixed(frozenset(), tensor)
        return found

    def _read_fixed(self, operation: Operation, tensors: list[Tensor]) -> None:
        follows = frozenset().union(*(self.known(tensor).follows for tensor in tensors))
        outputs = tensors_in(operation.output)
        name = operation.name
        same = name == "mul" and not isinstance(operation.args[1], Tensor) and operation.args[1] == 1
        if same or (name in _LAYOUT and len(tensors) == 1 and not follows):
            codes = self._fixed[id(tensors[0])].codes
            if codes is not None and tensors[0].is_floating_point():
                made = codes if same or name == "_to_copy" else operation.function(codes, *operation.args[1:])
                for output, part in zip(outputs, made if isinstance(made, (list, tuple)) else [made]):
                    self._fixed[id(output)] = Fixed(follows, None, part)
                return
        for output in outputs:
            if follows:
                self._fixed[id(output)] = Fixed(follows)
                continue
            expressions = [self.expression(tensor) for tensor in tensors]
            if all(isinstance(e, Tensor) for e in expressions):
                self._fixed[id(output)] = Fixed(follows, output.clone())
            else:
                full = plain_name(operation)
                args, kwargs = self._as_expressions(operation.args), self._as_expressions(operation.kwargs)
                several = not isinstance(operation.output, Tensor)
                which = next(i for i, made in enumerate(operation.output) if made is output) if several else None
                self._fixed[id(output)] = Fixed(follows, Applied(full, args, kwargs, which))

    def _as_expressions(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.expression(value)
        if isinstance(value, (list, tuple)):
            return type(value)(self._as_expressions(entry) for entry in value)
        return {k: self._as_expressions(v) for k, v in value.items()} if isinstance(value, dict) else value

    def expression(self, tensor: Tensor) -> Any:
        """A Source, a constant, or what is made of these."""
        known = self.known(tensor)
        if known.expression is None and known.codes is not None:
            operand = self.codes.operand(known.codes)
            if operand is None:
                raise Refused(f"it makes weights {list(tensor.shape)} of its tensors in a way that is not followed")
            known.expression = operand.source if isinstance(operand.source, Source) else operand.value
            if isinstance(operand.source, Held) and not operand.source.is_constant:
                raise Refused(f"it makes weights {list(tensor.shape)} of its tensors in a way that is not followed")
        return known.expression

    def weights(self, tensor: Tensor) -> Tensor:
        """The codes of a tensor that follows no input.

        Raises:
            Refused: where it does.
        """
        known = self.known(tensor)
        if known.follows:
            raise Refused(f"it multiplies by weights that follow {' and '.join(sorted(known.follows))}")
        if known.codes is None:
            known.codes = self.codes.of_tensor(Weights(known.expression, tensor.detach().clone()))
        return known.codes

    # ------------------------------------------------------------ layouts and rows

    def _layout(self, operation: Operation) -> Any:
        name = operation.name

        def as_codes(value: Any) -> Any:
            if isinstance(value, Tensor):
                if id(value) in self._moving:
                    return self._moving[id(value)]
                if not value.is_floating_point():
                    return value  # indices
                return self.codes.of_tensor(Given(value, False))
            return type(value)(map(as_codes, value)) if isinstance(value, (list, tuple)) else value

        if name == "_to_copy":
            return as_codes(operation.args[0])
        made = operation.function(*as_codes(operation.args), **operation.kwargs)
        return list(made) if isinstance(made, (list, tuple)) else made

    def rows(self, tensor: Tensor, what: str) -> Rows:
        """A tensor as rows of the network, the columns among them.

        Raises:
            Refused: where it is none.
        """
        codes = self._moving[id(tensor)]
        entries = self.codes.entries(codes)
        if all(isinstance(entry, Given) for entry in entries):
            codes = self._moving[id(tensor)] = self._as_columns(tensor, codes, what)
        elif any(isinstance(entry, Given) for entry in entries):
            raise Refused(_BESIDE_INPUTS.format(what))
        return self.rows_of(codes, what)

    def rows_of(self, codes: Tensor, what: str) -> Rows:
        """Codes of States as rows."""
        rows = self.codes.rows(codes)
        if rows is None:
            states = [entry for entry in self.codes.entries(codes) if isinstance(entry, State)]
            if any(isinstance(state, Columns) for state in states) and len(states) > 1:
                raise Refused(_BESIDE_INPUTS.format(what))
            several = len(states) > 1 and len({state.width for state in states}) == 1
            because = (
                "it takes the numbers of several rows together (several hidden rows, or members of an ensemble: a "
                "sampler pools over critics itself, so give each member's own value)"
                if several
                else "its last axis is no row"
            )
            raise Refused(f"{what} of {list(codes.shape)}: {because}")
        width = 1 if rows.is_unsqueezed or rows.is_spread else codes.shape[-1]
        rows.states = [self._slice(state, column, width) for state, column in self.codes.slices]
        return rows

    def _slice(self, state: State, column: int, width: int) -> State:
        """Some columns of a row, side by side."""
        if width == state.width:
            return state
        key = (id(state), column, width)
        if key not in self._slices:
            self._slices[key] = self._make_slice(state, column, width)
        return self._slices[key]

    def _make_slice(self, state: State, column: int, width: int) -> State:
        if isinstance(state, Sorted) and column == 0:
            return Sorted(width, state.parents)
        if isinstance(state, Linear):
            ends = slice(column, column + width)
            weight, bias = (
                None if operand is None or operand.codes is None else self.codes.operand(operand.codes[ends])
                for operand in (state.weight, state.bias)
            )
            if weight is not None and (bias is None) == (state.bias is None):
                return Linear(width, state.parents, weight, bias)
        if isinstance(state, Pointwise):
            parents = tuple(self._slice(parent, column, width) for parent in state.parents)
            return Pointwise(width, parents, state.function, state.name)
        raise Refused(f"it goes on with columns {column} to {column + width - 1} of a row of {state.width} alone")

    def _as_columns(self, tensor: Tensor, codes: Tensor, what: str) -> Tensor:
        """Codes of the columns in place of those of the inputs."""
        width = tensor.shape[-1]
        flat, values = codes.reshape(-1, width), tensor.reshape(-1, width)
        batch = []
        for row in flat.tolist():
            found = None
            for code in row:
                entry, element = self.codes.entry(code)
                if isinstance(entry, Given) and entry.moves:
                    found = element // (entry.tensor.numel() // self.batch)
                    break
            if found is None:
                raise Refused(f"{what} reads rows without the actions beside rows with them")
            batch.append(found)
        at = torch.tensor(batch)
        order = [batch.index(row) if row in batch else -1 for row in range(self.batch)]
        if min(order) < 0:
            raise Refused(f"{what} reads some rows of the batch alone")
        columns = values[order]
        if not torch.equal(columns[at], values) or (self.columns is not None and not _equal(self.columns, columns)):
            raise Refused(
                f"{what} reads several different rows of its inputs for one of the batch (tokens, "
                "or inputs that are read again beside the network?)"
            )
        if self.root is None:
            self.root, self.columns = Columns(width), columns
        return self.codes.of_state(self.root)[at].view(codes.shape)


def plain_name(operation: Operation) -> str:
    return f"{operation.name}.{operation.function._overloadname}"


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


def shown(operation: Operation) -> str:
    shapes = ", ".join(str(list(tensor.shape)) for tensor in tensors_in(operation.args)[:3])
    return f"{operation.name} of {shapes}"


def why(name: str) -> str:
    if name in _POOLS:
        return " (does it pool over its critics? a sampler does that itself: return each member's value)"
    if "norm" in name:
        return " (of norms, LayerNorm and RMSNorm are)"
    return " (a convolution?)" if "conv" in name else ""
