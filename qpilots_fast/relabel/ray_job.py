"""The parts on Ray Data: a pool of workers, each with its own frozen sampler."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import Any

from .store import Part
from .worker import Job, Worker


class _OnRay:
    """A worker as Ray Data calls it: a batch of one part in, its number out, and what went wrong there ("": nothing;
    raised, it would reach the user inside pages of Ray's). Ray starts a killed one anew, with its
    part; a part is whole or not there, so doing it twice does no harm."""

    def __init__(self, job: Job) -> None:
        self._worker = Worker(job)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        parts = [Part(int(i), int(a), int(b)) for i, a, b in zip(batch["index"], batch["start"], batch["stop"])]
        try:
            return {"index": [self._worker(part) for part in parts], "error": [""] * len(parts)}
        except ValueError as error:
            said = str(error)
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
        return {"index": [part.index for part in parts], "error": [said or "an error without a message"] * len(parts)}


def run(
    job: Job, parts: list[Part], address: str | None, workers: int | None, cpus: float, gpus: float
) -> Iterator[Part]:
    """Does the parts, and yields each when it is done.

    Args:
        address: of a running cluster ("auto", "ray://..."); None starts Ray on this machine, and ends it.
        workers: None: as many as fit the cluster's cores and GPUs.
        cpus, gpus: of one worker.

    Raises:
        ValueError: where so many workers do not fit, and what a worker met, in its words.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    import ray
    import ray.data

    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.WARNING)
    where: dict[str, Any] = {"address": address} if address else {"address": "local", "include_dashboard": False}
    ray.init(**where, log_to_driver=False, logging_level=logging.ERROR)
    try:
        there = ray.cluster_resources()
        fit = int(min(there.get(kind, 0) / each for kind, each in (("CPU", cpus), ("GPU", gpus)) if each))
        count = min(workers or fit, len(parts))
        if not 1 <= count <= fit:
            raise ValueError(
                f"{workers or 1} workers of {cpus:g} CPUs and {gpus:g} GPUs do not fit a cluster of "
                f"{there.get('CPU', 0):g} CPUs and {there.get('GPU', 0):g} GPUs; expected at most {fit} workers."
            )
        by_index = {part.index: part for part in parts}
        items = [{"index": part.index, "start": part.start, "stop": part.stop} for part in parts]
        done = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            _OnRay, fn_constructor_args=(job,), batch_size=1, compute=ray.data.ActorPoolStrategy(size=count),
            num_cpus=cpus, num_gpus=gpus,
        )  # fmt: skip
        for row in done.iter_rows():
            if row["error"]:
                raise ValueError(row["error"])
            yield by_index[int(row["index"])]
    finally:
        ray.shutdown()
