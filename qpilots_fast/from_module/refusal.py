"""Why a module cannot be packed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor


class Refused(Exception):
    """Carries the reason; from_module turns it into a ValueError that names the module.

    Args:
        cure: what to do, where from_module should not find out by itself what a sampler makes of the module.
        hint: the one that could help; empty where none can.
        where: the part of the module at which recognition stopped; empty where it is the whole.
    """

    def __init__(self, reason: str, cure: str = "", hint: str = "") -> None:
        super().__init__(reason)
        self.cure, self.hint, self.where = cure, hint, ""


@contextmanager
def stopping_at(where: object) -> Iterator[None]:
    """Says of a refusal inside where it stopped, unless it says that itself."""
    try:
        yield
    except Refused as refusal:
        refusal.where = refusal.where or str(where)
        raise


class FollowsOther(Refused):
    """What the first Linear reads, or the output, follows more than the inputs as they are."""


class NotCallable(Refused):
    """None of the calls tried was accepted."""


class NotFinite(Refused):
    """A proof came upon NaN or an infinity, and so says nothing."""


def check_finite_numbers(what: str, value: Tensor) -> None:
    """Raises NotFinite where a number of a proof is none; what: "its outputs are"."""
    if not bool(value.isfinite().all()):
        raise NotFinite(
            f"{what} not finite where its tensors hold random numbers (a root or a logarithm of one, or a division?), "
            "so nothing can be proved of it"
        )


def number(value: float) -> str:
    return f"{value:.3g}"


def first_line(error: BaseException) -> str:
    """What an error says, in short."""
    return (str(error).splitlines() or ["no message"])[0][:200].rstrip(". ")
