"""Warnings that name the line of the user's program, however deep in this package they are raised."""

from __future__ import annotations

import sys
import warnings
from types import FrameType

_OURS = (__package__ or "qpilots_fast", "torch")  # torch: modules call forward


def warn(message: str) -> None:
    """A UserWarning at the innermost line outside of this package and torch."""
    level = 1
    frame: FrameType | None = sys._getframe(0)
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _OURS:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
