"""Why a module cannot be packed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


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


def number(value: float) -> str:
    return f"{value:.3g}"


def first_line(error: BaseException) -> str:
    """What an error says, in short."""
    return (str(error).splitlines() or ["no message"])[0][:200]
