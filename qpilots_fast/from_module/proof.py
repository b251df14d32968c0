"""Random inputs, and the comparison of a packed network with the user's module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..networks import bind
from ..reference import ReferenceNetwork
from ..spec import POSTERIOR_DRAW, BoundNetwork, NetworkSpec, OwnColumns
from .calling import BLOCKS_OF_KIND, SCALES, TIMES, OutputLayout, UserCall
from .held import Held
from .refusal import NotFinite, Refused, check_finite_numbers, number
from .sources import Source

TOLERANCE = {torch.float64: 1e-8, torch.float32: 2e-5}  # relative, of a module in a dtype against ours in float64
MOVING = {"flow": "noisy_actions", "critic": "actions", "meta_flow_map": "noisy_actions"}

_NEAR_THE_ENDS = (0.0, 0.003, 0.997)  # among any times: where a clamp, a schedule or a branch would show
# (inputs, weights): sizes at which a clip, a cut or a saturation shows that no usual number reaches; weights, since a
# network behind a tanh or a norm does not hear of large inputs. Outputs alone, and only roughly: what a norm leaves of
# large numbers has fewer digits, and gradients may cancel.
_FAR = ((1e4, 1.0), (1e8, 1.0), (1.0, 1e3), (1.0, 1e8))
_FAR_TOLERANCE = 1e-4
# of all rows at once, as samplers ask: a forward may branch on the time of one row, or average over them
_OF_ALL_ROWS = torch.tensor(
    [[0.0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99]], dtype=torch.float32
).T.double()


def random_blocks(
    kind: str, dims: tuple[int, int], batch_size: int, generator: torch.Generator, scale: float = 1.0
) -> dict[str, Tensor]:
    """The inputs of a kind, float64; times are float32 numbers in [0, 1), so that a cast inside changes nothing."""
    named = {}
    ends = torch.tensor(_NEAR_THE_ENDS, dtype=torch.float32)
    for name in BLOCKS_OF_KIND[kind]:
        if name in TIMES:
            times = torch.rand(batch_size, 1, generator=generator, dtype=torch.float32)
            times[: len(ends), 0] = ends.roll(TIMES.index(name))[:batch_size]
            named[name] = times.double()
        else:
            width = dims[0] if name == "obs" else dims[1]
            named[name] = scale * torch.randn(batch_size, width, generator=generator, dtype=torch.float64)
    return named


def batch_size_apart_from(members: int, offset: int = 0) -> int:
    """A batch size that cannot be mistaken for the number of members."""
    size = 6 + offset
    return size if size != members else size + 1


def ours(spec: NetworkSpec, flat: Sequence[Tensor]) -> ReferenceNetwork:
    """The recognised structure with these parameters."""
    return ReferenceNetwork(bind(spec, flat), torch.float64)


def evaluate(network: ReferenceNetwork, named: dict[str, Tensor], columns: Tensor | None) -> tuple:
    """Our output [E, B, out], and its pullback, from the blocks or from the columns that the user's module made."""
    spec = network.spec
    if columns is not None:
        return network([columns])
    blocks = {
        name: spec.embed_time(block, len(block), block.device) if name in TIMES else block
        for name, block in named.items()
    }
    return network(spec.ordered(blocks))


def _own_blocks(
    network: BoundNetwork, named: dict[str, Tensor], columns: Tensor, step: int | None
) -> dict[str, Tensor]:
    """The blocks among the first layer's columns, where the module computes some of them.

    columns: what its first Linear read, for the features of times that are not its own. step: where all rows have one
    time, which of _OF_ALL_ROWS: as backends do, all of these are asked in one call of the module.
    """
    spec = network.spec
    found = {**named, "obs": network.obs_input(named["obs"])}
    mapped = network.action_map(named["obs"])
    if mapped is not None:
        found["actions"] = mapped(named["actions"])
    if spec.time_embedding == "module" or spec.film_dim:
        times, count = (named["t"], len(columns)) if step is None else (_OF_ALL_ROWS, len(_OF_ALL_ROWS))
        of_times = network.time_inputs(times, count, columns.device)
        if step is not None:
            of_times = {name: rows[step].expand(len(columns), -1) for name, rows in of_times.items()}
        found |= of_times
    if spec.time_embedding == "module":
        return found
    return found | {name: columns[:, spec.block_slices[name]] for name in TIMES if name in named}


def to_module_output(spec: NetworkSpec, output: Tensor, named: dict[str, Tensor], layout: OutputLayout) -> Tensor:
    """Our [E, B, out] as the module's own output after layout.apply."""
    if spec.kind == "critic":
        return spec.head(output)[0]
    if spec.kind == "meta_flow_map" and not layout.is_velocity:
        return named["xbar"] + (named["u"] - named["s"]) * output[0]
    return output[0]


def prove(
    module: nn.Module,
    call: UserCall,
    layout: OutputLayout,
    spec: NetworkSpec,
    sources: Sequence[Source | Held],
    generator: torch.Generator,
    first_columns: object = None,
    scales: Sequence[float] = SCALES,
    own: OwnColumns | None = None,
    far: bool = False,
) -> float:
    """Compares outputs and input gradients on several batches; returns the largest relative difference.

    Args:
        module: a float64 copy of the user's module with random parameters.
        first_columns: function (named) -> the columns that the module's first Linear reads, where they are known:
            then the time features are compared apart, to the precision that the user computes them in.
        scales: of the inputs, one a batch; with all of SCALES also at single times.
        own: what the module computes of its columns, where it does; of this copy.
        far: outputs alone, and roughly.

    Raises:
        Refused: with the numbers, where they differ.
    """
    dims = (spec.obs_dim, spec.action_dim)
    with torch.no_grad():
        bound = replace(bind(spec, [source.find(module).double() for source in sources]), own=own)
        recognised = ReferenceNetwork(bound, torch.float64)

    def compare(named: dict[str, Tensor], where: str, step: int | None = None) -> float:
        if spec.time_embedding == "module":
            named |= {name: torch.full_like(named[name], at) for name, at in POSTERIOR_DRAW.items() if name in named}
        leaf = named[MOVING[spec.kind]].requires_grad_()
        with torch.enable_grad():
            theirs = layout.apply(call(module, list(named.values())))
        cotangent = torch.randn(theirs.shape, generator=generator, dtype=torch.float64)
        their_grad = _gradient(theirs, leaf, cotangent)
        with torch.no_grad():
            columns = first_columns(named) if callable(first_columns) else None
            if own is None or columns is None:
                output, pullback = evaluate(recognised, named, columns)
            else:
                output, pullback = recognised(spec.ordered(_own_blocks(bound, named, columns, step)))
            expected = to_module_output(spec, output, named, layout)
            d_output = cotangent.unsqueeze(-1) if spec.kind == "critic" else cotangent.unsqueeze(0)
            if spec.kind == "meta_flow_map" and not layout.is_velocity:
                d_output = d_output * (named["u"] - named["s"])
            d_columns = pullback(d_output).sum(0)
            d_moving, mapped = d_columns[:, spec.moving_columns], bound.action_map(leaf)
            expected_grad = d_moving if mapped is None else mapped.pull_back(d_moving, spec.action_dim)
        dtype = call.dtype or torch.float64
        # that with respect to obs is none of a sampler's business: an encoder may run under no_grad, or in float32
        what = f"gradient with respect to {MOVING[spec.kind]}"
        if far:
            return _compare("outputs", expected, theirs.detach(), where, dtype, _FAR_TOLERANCE)
        gap = _compare("outputs", expected, theirs.detach(), where, dtype)
        return max(gap, _compare(what, expected_grad, their_grad, where, dtype))

    worst = 0.0
    for offset, scale in enumerate(scales):
        size = batch_size_apart_from(spec.num_members, offset)
        named = random_blocks(spec.kind, dims, size, generator, scale)
        worst = max(worst, compare(named, f"random inputs of scale {scale:g}"))
    if spec.kind != "critic" and len(scales) == len(SCALES):
        for step, t in enumerate(_OF_ALL_ROWS.flatten().tolist()):
            named = random_blocks(spec.kind, dims, batch_size_apart_from(spec.num_members), generator)
            asked = {"t": t, **POSTERIOR_DRAW}
            named |= {name: torch.full_like(block, asked[name]) for name, block in named.items() if name in TIMES}
            worst = max(worst, compare(named, f"random inputs at t = {t:g}", step))
    return worst


def prove_far(module: nn.Module, used: set[int], prove_at: Callable[[float], object]) -> None:
    """The proof once more where inputs, or the network's parameters, are far larger than usual.

    Args:
        module: a copy, whose parameters are put back. used: ids of those that the network reads.
        prove_at: function (scale of the inputs) that proves.

    Raises:
        Refused: where it is something else there.
    """
    parameters = [parameter for parameter in module.parameters() if id(parameter) in used]
    before = [parameter.detach().clone() for parameter in parameters]
    for inputs, weights in _FAR:
        try:
            with torch.no_grad():
                for parameter in parameters:
                    parameter.mul_(weights)
            prove_at(inputs)
        except NotFinite:
            continue  # it has numbers in float32, say, that end before
        except Refused as refusal:
            what = f"its inputs are {number(inputs)}" if inputs > 1 else f"its weights are {number(weights)}"
            raise Refused(f"where {what} times as large as usual, {refusal} (does it clip or saturate?)") from None
        finally:
            with torch.no_grad():
                for parameter, value in zip(parameters, before):
                    parameter.copy_(value)


def _gradient(output: Tensor, leaf: Tensor, cotangent: Tensor) -> Tensor:
    if not output.requires_grad:
        raise Refused("its output carries no gradient (does it run under no_grad, or detach?)")
    (grad,) = torch.autograd.grad(output, leaf, cotangent.to(output.dtype), allow_unused=True)
    return torch.zeros_like(leaf) if grad is None else grad


def _compare(
    what: str, ours: Tensor, theirs: Tensor, where: str, dtype: torch.dtype, tolerance: float | None = None
) -> float:
    tolerance = TOLERANCE[dtype] if tolerance is None else tolerance
    if ours.shape != theirs.shape:
        raise Refused(f"its {what} have shape {list(theirs.shape)}, expected {list(ours.shape)}")
    check_finite_numbers(f"its {what} are", theirs)
    size = 1 + ours.abs().max().item()
    gap = (ours - theirs).abs().max().item() / size
    if not gap <= tolerance:
        raise Refused(
            f"its {what} differ from those of the recognised structure by {number(gap)} (relative, {_name(dtype)}; "
            f"allowed {number(tolerance)}) on {where}"
        )
    return gap


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
