"""Why a module cannot be packed."""

from __future__ import annotations


class Refused(Exception):
    """Carries the reason; from_module turns it into a ValueError that names the module.

    Args:
        cure: what to do, where from_module should not find out by itself what a sampler makes of the module.
    """

    def __init__(self, reason: str, cure: str = "") -> None:
        super().__init__(reason)
        self.cure = cure


class FollowsOther(Refused):
    """What the first Linear reads, or the output, follows more than the inputs as they are."""


class NotCallable(Refused):
    """None of the calls tried was accepted."""


def number(value: float) -> str:
    return f"{value:.3g}"


def first_line(error: BaseException) -> str:
    """What an error says, in short."""
    return (str(error).splitlines() or ["no message"])[0][:200]
