"""Types of command line arguments."""

from __future__ import annotations

import argparse


def count(text: str) -> int:
    """An integer >= 1.

    Raises:
        argparse.ArgumentTypeError: for another text.
    """
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; expected an integer >= 1")
    return value
