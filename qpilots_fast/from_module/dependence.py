"""What a module's output depends on beside its inputs and the weights that were recognised."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor, nn

from ..callables import is_list
from .calling import OutputLayout, UserCall
from .modules import dropouts
from .own_columns import changed, others
from .refusal import FollowsOther, NotFinite, Refused, number


def check_other_tensors(
    probe: nn.Module, used: Collection[int], prove: Callable[[bool], None], generator: torch.Generator
) -> None:
    """Proves anew with every other tensor changed: one that enters the result would go unnoticed when it changes.

    Args:
        probe: a float64 copy of the user's module.
        used: ids of the tensors that the packed network reads.
        prove: its argument says whether time features are compared: what is not trained may make these.

    Raises:
        Refused: with the names of the tensors that enter the result.
    """
    found = [(name, tensor) for _, name, tensor in others(probe, used)]
    for trained in (True, False):
        group = [(name, tensor) for name, tensor in found if tensor.requires_grad is trained]
        if group and not _proves_without(group, lambda trained=trained: prove(trained), generator):  # type: ignore[misc]
            guilty = [
                name
                for name, tensor in group
                if not _proves_without([(name, tensor)], lambda trained=trained: prove(trained), generator)  # type: ignore[misc]
            ]
            raise FollowsOther(
                f"its output depends on {', '.join(guilty or [name for name, _ in group])} beside its layers' weights "
                "(a normalisation or scale?), which a packed network would not follow when they change"
            )


@torch.no_grad()
def _proves_without(group: Sequence[tuple[str, Tensor]], prove: Callable[[], None], generator: torch.Generator) -> bool:
    """Whether the proof holds while these tensors hold other numbers."""
    with changed([tensor for _, tensor in group], generator):
        try:
            prove()
        except NotFinite:
            raise
        except Exception:  # a shape or a solver may fail on random numbers: it depends on them, then
            return False
        return True


@torch.no_grad()
def followed_modes(
    probe: nn.Module, call: UserCall, layout: OutputLayout, blocks: Sequence[Tensor]
) -> tuple[tuple[str, bool], ...]:
    """(path, training) of every part where the output follows these, dropout layers' own mode apart; else nothing."""
    present = {path: part.training for path, part in probe.named_modules()}
    lists = {path for path, part in probe.named_modules() if is_list(part)}  # whose own mode nothing reads
    expected = layout.apply(call(probe, blocks))
    try:
        for training in (True, False):
            probe.train(training)
            for layer in dropouts(probe):
                layer.eval()
            if not torch.equal(layout.apply(call(probe, blocks)), expected):
                return tuple((path, mode) for path, mode in present.items() if path not in lists)
        return ()
    finally:
        for path, part in probe.named_modules():
            part.training = present[path]


@torch.no_grad()
def check_repeats(probe: nn.Module, call: UserCall, blocks: Sequence[Tensor]) -> None:
    """Raises Refused where two calls on the same inputs differ."""
    first, second = call(probe, blocks), call(probe, blocks)
    if isinstance(first, Tensor) and isinstance(second, Tensor) and first.shape == second.shape:
        gap = (first - second).abs().max().item() if first.numel() else 0.0
        if gap:
            raise Refused(
                f"its output is random: two calls on the same inputs differ by {number(gap)} (dropout as a function "
                "call? then call .eval() first)"
            )
