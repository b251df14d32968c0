"""Command line of the fuzz run: `python -m tests.fuzz --calls N [--seed S]`."""

from __future__ import annotations

import argparse
import sys
import time

from tests.fuzz import checkpoints
from tests.fuzz.judge import Tally
from tests.fuzz.ledger import TOLERATED
from tests.fuzz.run import run


def main(argv: list[str] | None = None) -> int:
    """Prints what was met; 1 where something is neither right nor tolerated."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--calls", type=int, default=20_000)
    parser.add_argument("--seed", type=int, help="of the draws (default: from the clock; it is printed)")
    args = parser.parse_args(argv)
    seed = int(time.time()) if args.seed is None else args.seed
    print(f"{args.calls} calls, --seed {seed}", flush=True)
    start = time.perf_counter()
    tally = Tally()
    try:
        run(args.calls, seed, tally)
    finally:
        seconds, refused = time.perf_counter() - start, sum(tally.refused.values())
        print(f"{tally.calls} calls in {seconds:.0f} s: {tally.sampled} compared, {refused} samplers and calls refused")
        for entry, count in tally.tolerated.most_common():
            print(f"tolerated {count}: {entry}. {TOLERATED[entry]}")
    files = max(args.calls // 20, 1)
    print(f"{files} damaged checkpoints: {checkpoints.run(files, seed)} refused, the others read as they were written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
