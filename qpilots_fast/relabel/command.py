"""`qpilots-fast relabel`: its options, its progress, and what it says where something is missing."""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import rows
from .store import Store, parts_of

_NAME = "qpilots-fast relabel"
_PARTS_WANTED, _PART_ROWS = 64, (256, 4096)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=_NAME,
        description="Observations in, steered actions and the critics' values before and after out. Row i is sampled "
        "with seed + i, whatever the batch and the worker. Run it again, and it goes on where it was stopped.",
    )
    parser.add_argument("--data", type=Path, required=True, metavar="IN", help=".npz, .parquet, or a folder of Parquet")
    parser.add_argument("--out", type=Path, required=True, help="a folder of Parquet files, or one new .parquet file")
    parser.add_argument("--sampler", required=True, metavar="FILE.py:FUNCTION", help="FUNCTION() returns the sampler")
    parser.add_argument("--obs-key", default="obs", help="the observations' column (default obs)")
    parser.add_argument("--batch-size", type=int, default=256, metavar="N", help="rows of one call (default 256)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--part-rows", type=int, help="rows of one output file (default 256 to 4096, by the data)")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--local", action="store_true", help="in this process, without Ray")
    where.add_argument("--address", metavar="ADDR", help="of a Ray cluster (default: Ray is started on this machine)")
    parser.add_argument("--workers", type=int, help="Ray workers (default: all that fit)")
    parser.add_argument("--cpus-per-worker", type=float, default=1.0, metavar="N")
    parser.add_argument("--gpus-per-worker", type=float, default=0.0, metavar="N")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Relabels; returns the exit status: 0 done, 1 stopped by an error or no row left, 2 not begun, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = _parser().parse_args(arguments)
    needed = ("pyarrow",) if args.local else ("pyarrow", "ray")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"{_NAME} needs {' and '.join(missing)}, which this Python does not have.\n"
            'Install with:  pip install "qpilots-fast[relabel]"'
            + ("" if args.local or "pyarrow" in missing else "   (--local runs in one process, without ray)"),
            file=sys.stderr,
        )
        return 2
    for name, low in (("batch_size", 1), ("part_rows", 1), ("workers", 1)):
        value = getattr(args, name)
        if value is not None and value < low:
            print(f"{_NAME}: --{name.replace('_', '-')} is {value}; expected at least {low}.", file=sys.stderr)
            return 2
    if min(args.cpus_per_worker, args.gpus_per_worker) < 0 or args.cpus_per_worker + args.gpus_per_worker == 0:
        got = f"{args.cpus_per_worker:g} and {args.gpus_per_worker:g}"
        print(f"{_NAME}: --cpus-per-worker and --gpus-per-worker are {got}; expected one above 0.", file=sys.stderr)
        return 2
    try:
        return _relabel(args)
    except KeyboardInterrupt:
        again = shlex.join(["qpilots-fast", "relabel", *arguments])
        print(f"{_NAME}: stopped. What is done stays; go on with:  {again}", file=sys.stderr)
        return 130
    except Exception as error:
        said = error if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: {error}"
        print(f"{_NAME}: {said}", file=sys.stderr)
        return 1


def _relabel(args: argparse.Namespace) -> int:
    from rich.console import Console

    from .worker import Job, Worker

    console = Console(stderr=True)
    source, store = rows.open_source(args.data, args.obs_key), Store(args.out)
    total = source.num_rows
    low, high = _PART_ROWS
    part_rows = args.part_rows or store.part_rows() or min(max(-(-total // _PARTS_WANTED), low), high)
    manifest = store.begin(
        {"rows": total, "part_rows": part_rows, "seed": args.seed, "obs_key": args.obs_key,
         "files": rows.fingerprint(args.data)}
    )  # fmt: skip
    if manifest.get("complete"):
        console.print(f"{args.out} is complete: {_said(manifest)}; nothing was left to do.", soft_wrap=True)
        return 0
    job = Job(str(args.data.resolve()), str(args.out.resolve()), _absolute(args.sampler), args.obs_key,
              args.batch_size, args.seed)  # fmt: skip
    parts = parts_of(total, part_rows)
    open_parts = [part for part in parts if not store.has(part)]
    if len(open_parts) < len(parts):
        console.print(f"{len(parts) - len(open_parts)} of {len(parts)} parts were there: going on.", soft_wrap=True)
    with _progress(console) as progress:
        bar = progress.add_task("relabel", total=total, completed=total - sum(p.stop - p.start for p in open_parts))
        if args.local:
            worker = Worker(job)
            for part in open_parts:
                worker(part, lambda done: progress.advance(bar, done))
        elif open_parts:
            from . import ray_job

            made = ray_job.run(job, open_parts, args.address, args.workers, args.cpus_per_worker, args.gpus_per_worker)
            for part in made:
                progress.advance(bar, part.stop - part.start)
    manifest = store.finish(parts, manifest)
    console.print(f"{args.out}: {_said(manifest)}", soft_wrap=True)
    if manifest["set_aside"]:
        console.print(f"the rows set aside, with their reasons: {store.set_aside}", soft_wrap=True)
    return int(not manifest["relabelled"])


def _absolute(function: str) -> str:
    file, colon, name = function.rpartition(":")
    return f"{Path(file).resolve()}{colon}{name}" if file else function


def _said(manifest: dict[str, Any]) -> str:
    return f"{manifest['relabelled']} rows relabelled, {manifest['set_aside']} set aside"


def _progress(console: Any) -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
    )
