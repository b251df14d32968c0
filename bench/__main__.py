"""`python -m bench`, the same as `qpilots-fast bench`; `python -m bench profile` is `qpilots-fast profile`."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark, or the profiler where the first argument says so; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["profile"]:
        from .profile import main as run
    else:
        from .cli import main as run
    return run(arguments[1:] if arguments[:1] == ["profile"] else arguments)


if __name__ == "__main__":
    sys.exit(main())
