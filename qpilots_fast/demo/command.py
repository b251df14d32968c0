"""`qpilots-fast demo`: its options, and what it says where a package is missing."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from pathlib import Path

from .. import backends
from ..errors import BackendUnavailable

NEEDED = {"ogbench": "ogbench", "rich": "rich", "matplotlib": "matplotlib", "safetensors": "safetensors"}
NEEDED_BY_GENERALIST = {"metaworld": '"qpilots-fast[generalist]"'}
POLICIES = ("cube", "generalist")


def missing_packages(policy: str) -> list[str]:
    """pip names of what that policy's demo needs and this interpreter lacks."""
    needed = NEEDED_BY_GENERALIST if policy == "generalist" else NEEDED
    return [pip for module, pip in needed.items() if importlib.util.find_spec(module) is None]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qpilots-fast demo",
        description="Steers one frozen policy through several tasks, without training.",
    )
    parser.add_argument(
        "--policy", default="cube", choices=POLICIES,
        help="cube: a cloned flow in OGBench's five cube-single tasks; generalist: a small language-conditioned policy "
        "in six Meta-World tasks",
    )  # fmt: skip
    parser.add_argument(
        "--episodes", type=int, default=None, help="per task and method (default 15, generalist 5; 2 with --quick)"
    )
    parser.add_argument("--out", type=Path, default=Path("."), help="folder of the cube's picture (default: here)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", default="auto", choices=("auto", *backends.BACKENDS), help="of the cube's sampler")
    parser.add_argument("--quick", action="store_true", help="a look in well under a minute: fewer alphas and episodes")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the demo; returns the process's exit status."""
    args = _parser().parse_args(argv)
    missing = missing_packages(args.policy)
    if missing:
        print(
            f"qpilots-fast demo needs {', '.join(missing)}, which this Python does not have.\n"
            f"Install with:  {Path(sys.executable).name} -m pip install {' '.join(missing)}",
            file=sys.stderr,
        )
        return 2
    if args.episodes is not None and args.episodes < 1:
        print(f"qpilots-fast demo: --episodes is {args.episodes}; expected at least 1.", file=sys.stderr)
        return 2
    run = importlib.import_module(".generalist.show" if args.policy == "generalist" else ".report", __package__).run
    try:
        return int(run(args))
    except (BackendUnavailable, OSError) as error:
        print(f"qpilots-fast demo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("qpilots-fast demo: stopped.", file=sys.stderr)
        return 130
