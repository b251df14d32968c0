"""Integers as users hold them: Python's, numpy's, and others that say they are one."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np


def as_int(value: Any) -> Any:
    """An int where the value says that it is one and is no bool; anything else as it is, for the caller to refuse."""
    if isinstance(value, (bool, np.bool_)):
        return value
    try:
        return operator.index(value)
    except TypeError:  # a float, or an array of several
        return value
