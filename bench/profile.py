"""`qpilots-fast profile`: where the time of one call goes, as a table and a Chrome trace."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from qpilots_fast import BackendUnavailable, backends, reference
from qpilots_fast.backends import Call
from qpilots_fast.bounds import as_operands
from qpilots_fast.evaluators import evaluators, reference_evaluators
from qpilots_fast.files import write_text
from qpilots_fast.reference import Evaluators, Pullback
from qpilots_fast.spec import PRECISIONS

from .arguments import count
from .cases import CASES, METHODS, Workload, make_workload
from .machine import ROOT, header
from .report import milliseconds
from .timing import percentile


@dataclass
class Span:
    """One timed stretch; self_s leaves out what nested spans took."""

    phase: str
    what: str
    start_s: float
    seconds: float = 0.0
    nested_s: float = 0.0

    @property
    def self_s(self) -> float:
        return self.seconds - self.nested_s


@dataclass
class Recorder:
    """Collects nested spans; NVTX ranges and synchronisation where the tensors are on a GPU."""

    cuda: bool = False
    spans: list[Span] = field(default_factory=list)
    _open: list[Span] = field(default_factory=list)

    @contextmanager
    def __call__(self, phase: str, what: str) -> Iterator[None]:
        self._mark(f"{phase}: {what}")
        span = Span(phase, what, time.perf_counter())
        self._open.append(span)
        try:
            yield
        finally:
            self._mark(None)
            span.seconds = time.perf_counter() - span.start_s
            self._open.pop()
            if self._open:
                self._open[-1].nested_s += span.seconds
            self.spans.append(span)

    def _mark(self, label: str | None) -> None:
        if not self.cuda:
            return
        torch.cuda.synchronize()
        if label is None:
            torch.cuda.nvtx.range_pop()
        else:
            torch.cuda.nvtx.range_push(label)

    @property
    def in_gradient(self) -> bool:
        """Whether the innermost open span belongs to the steering gradient."""
        return any(span.phase == "gradient" for span in self._open)


def instrument(net: Evaluators, record: Recorder) -> Evaluators:
    """The same networks with every evaluation and pullback timed."""

    def timed(function: Callable[..., tuple[Tensor, Pullback]], name: str) -> Callable[..., tuple[Tensor, Pullback]]:
        def evaluate(*arguments: Any) -> tuple[Tensor, Pullback]:
            with record("gradient" if record.in_gradient else "denoise", f"{name} forward"):
                value, pullback = function(*arguments)

            def pull_back(cotangent: Tensor) -> Tensor:
                with record("gradient", f"{name} input gradient"):
                    return pullback(cotangent)

            return value, pull_back

        return evaluate

    return Evaluators(
        timed(net.flow, "flow"),
        None if net.critic is None else timed(net.critic, "critic"),
        None if net.posterior is None else timed(net.posterior, "meta flow map"),
    )


def record_loop(workload: Workload, backend: str, precision: str, record: Recorder) -> Tensor:
    """One call of the readable loop with the backend's own networks, every phase recorded."""
    sampler = workload.sampler(backend, precision)
    engine = backends.get(backend)
    with record("pack", "weights of all networks"):
        if backend == "reference":
            spec, networks = sampler._run.spec, sampler._run.bound()
            assert spec is not None
            net = reference_evaluators(networks, workload.obs, torch.float32, precision)
        else:
            net = evaluators(
                workload.flow, workload.critic, workload.posterior, workload.steering, engine, precision, workload.obs
            )

    def spanned(name: str, phase: str, what: str) -> Any:
        original = getattr(reference, name)

        def run(*arguments: Any, **named: Any) -> Any:
            with record(phase, what):
                return original(*arguments, **named)

        return mock.patch.object(reference, name, run)

    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(spanned("steering_gradient", "gradient", "weights and sums"))
        stack.enter_context(spanned("clean_actions", "project", "clean-action estimate"))
        stack.enter_context(spanned("steer_velocity", "update", "norms and the steered velocity"))
        stack.enter_context(record("update", "Euler steps and the clip"))
        bounds = as_operands(sampler.action_low, sampler.action_high, workload.noise)
        raw = reference.sample(
            instrument(net, record),
            workload.steering,
            workload.steering.schedule(workload.num_steps),
            workload.noise,
            workload.posterior_noise,
            bounds,
        )
    return raw.actions


def _median_s(run: Callable[[], object], calls: int, cuda: bool) -> float:
    run()
    samples = []
    for _ in range(calls):
        start = time.perf_counter()
        run()
        if cuda:
            torch.cuda.synchronize()
        samples.append(time.perf_counter() - start)
    return percentile(samples, 50)


def fused_phases(workload: Workload, backend: str, precision: str, calls: int) -> dict[str, float] | None:
    """Median seconds of each phase inside the fused call, where the backend keeps such clocks."""
    engine = backends.get(backend)
    sample_phases = getattr(engine, "sample_phases", None)
    if sample_phases is None:
        return None
    sampler = workload.sampler(backend, precision)
    spec, networks = sampler._run.spec, sampler._run.bound()
    assert spec is not None
    call = Call(spec, networks, workload.obs, workload.noise, workload.posterior_noise)

    def once() -> dict[str, float]:
        return sample_phases(call)[1]

    once()
    measured = [once() for _ in range(calls)]
    return {phase: percentile([row[phase] for row in measured], 50) for phase in measured[0]}


# ---------------------------------------------------------------- output


def fused_table(phases: dict[str, float], live_s: float, frozen_s: float) -> Table:
    """The fused call's own clocks."""
    table = Table(title=f"inside one fused call ({milliseconds(live_s)} ms live, {milliseconds(frozen_s)} ms frozen)")
    for name in ("phase", "ms", "%"):
        table.add_column(name, justify="left" if name == "phase" else "right")
    total = sum(phases.values())
    for phase, seconds in phases.items():
        table.add_row(phase, milliseconds(seconds), f"{100 * seconds / total:.1f}" if total else "-")
    return table


def loop_table(spans: Sequence[Span], backend: str) -> Table:
    """Time by phase and network, of the loop that calls them one by one."""
    how = "their input gradients repeat the forward pass" if backend != "reference" else "unfused"
    table = Table(title=f"the same call network by network on {backend} ({how})")
    for name in ("phase", "what", "times", "ms", "%"):
        table.add_column(name, justify="left" if name in ("phase", "what") else "right")
    groups: dict[tuple[str, str], list[Span]] = {}
    for span in spans:
        groups.setdefault((span.phase, span.what), []).append(span)
    total = sum(span.self_s for span in spans)
    order = ("pack", "denoise", "project", "gradient", "update")
    for (phase, what), group in sorted(groups.items(), key=lambda item: order.index(item[0][0])):
        seconds = sum(span.self_s for span in group)
        table.add_row(phase, what, str(len(group)), milliseconds(seconds), f"{100 * seconds / total:.1f}")
    return table


def chrome_trace(spans: Sequence[Span], phases: dict[str, float] | None) -> dict[str, Any]:
    """Trace Event Format: the loop's spans on one row; the fused call's phases, end to end, on another."""
    origin = min(span.start_s for span in spans)
    events: list[dict[str, Any]] = [
        {
            "name": span.what, "cat": span.phase, "ph": "X", "pid": 1, "tid": 1,
            "ts": (span.start_s - origin) * 1e6, "dur": span.seconds * 1e6,
        }
        for span in spans
    ]  # fmt: skip
    names = {1: "network by network"}
    if phases:
        names[2] = "fused call, phases summed over its steps"
        at = 0.0
        for phase, seconds in phases.items():
            events.append({"name": phase, "cat": phase, "ph": "X", "pid": 1, "tid": 2, "ts": at, "dur": seconds * 1e6})
            at += seconds * 1e6
    for thread, name in names.items():
        events.append({"name": "thread_name", "ph": "M", "pid": 1, "tid": thread, "args": {"name": name}})
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def profile_gpu(workload: Workload, backend: str, precision: str, path: Path, console: Console) -> None:
    """A torch profiler trace of three calls, and the Nsight Compute command that looks into each kernel."""
    from torch.profiler import ProfilerActivity, profile

    sampler = workload.sampler(backend, precision)

    def run() -> Tensor:
        with torch.cuda.nvtx.range("qpilots_fast"):
            return sampler(workload.obs, workload.noise, workload.posterior_noise)

    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(3):
            run()
        torch.cuda.synchronize()
    profiler.export_chrome_trace(str(path))
    console.print(profiler.key_averages().table(sort_by="self_device_time_total", row_limit=12))
    console.print(f"saved {path}")
    console.print(
        "every kernel in depth:\n  ncu --set full --nvtx --nvtx-include qpilots_fast/ -o qpilots_fast "
        f"python -m qpilots_fast profile --gpu --backend {backend} --precision {precision} "
        f"--case {workload.case.name} --method {workload.method} --batch {workload.batch_size}",
        soft_wrap=True,
    )


def build_parser() -> argparse.ArgumentParser:
    """The options of `qpilots-fast profile`."""
    parser = argparse.ArgumentParser(prog="qpilots-fast profile", description="Where the time of one call goes.")
    parser.add_argument("--case", choices=tuple(CASES), default="paper")
    parser.add_argument("--method", choices=tuple(METHODS), default="U")
    parser.add_argument("--batch", type=count, default=1)
    parser.add_argument("--backend", choices=("auto", *backends.BACKENDS), default="auto")
    parser.add_argument("--precision", choices=PRECISIONS, default="float32")
    parser.add_argument("--calls", type=count, default=10, help="repetitions of the fused call")
    parser.add_argument("--gpu", action="store_true", help="torch profiler trace and the Nsight Compute command")
    parser.add_argument("--out", type=Path, default=ROOT / "out", help="folder of the trace (default out)")
    return parser


def _unused_path(folder: Path, stem: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    names = (f"{stem}{suffix}.trace.json" for suffix in ("", *(f"_{n}" for n in range(1, 1000))))
    return next(folder / name for name in names if not (folder / name).exists())


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the tables and writes the trace; the exit status is 2 where the backend or GPU is not there."""
    options = build_parser().parse_args(sys.argv[1:] if argv is None else argv)
    console = Console(width=max(Console().width, 120))
    cuda = options.backend in ("triton", "cuda") or options.gpu
    if cuda and not torch.cuda.is_available():
        console.print(
            f"profile: {'--gpu' if options.gpu else options.backend} needs an NVIDIA GPU; torch sees none here."
        )
        return 2
    workload = make_workload(CASES[options.case], options.method, options.batch, device="cuda" if cuda else "cpu")
    try:
        live = workload.sampler(options.backend, options.precision)
        backend = live.explain(options.batch).backend
        frozen = workload.sampler(backend, options.precision, frozen=True)
    except BackendUnavailable as error:
        console.print(f"profile: {error}")
        return 2
    date = header("profile", [], None)["date"][:19].replace(":", "").replace("-", "")
    stem = f"{date}_profile_{options.case}_{options.method}_{backend}_{options.precision}_B{options.batch}"
    path = _unused_path(options.out, stem)
    if options.gpu:
        profile_gpu(workload, backend, options.precision, path, console)
        return 0
    inputs = (workload.obs, workload.noise, workload.posterior_noise)
    live_s, frozen_s = (_median_s(lambda s=s: s(*inputs), options.calls, cuda) for s in (live, frozen))  # type: ignore[misc]
    console.print(
        f"{options.case}, {options.method}, B={options.batch}, {backend} {options.precision}: "
        f"{milliseconds(live_s)} ms live, {milliseconds(frozen_s)} ms frozen, median of {options.calls} calls"
    )
    phases = fused_phases(workload, backend, options.precision, options.calls)
    if phases:
        console.print(fused_table(phases, live_s, frozen_s))
    record_loop(workload, backend, options.precision, Recorder(cuda))  # first calls pack and warm up
    record = Recorder(cuda)
    record_loop(workload, backend, options.precision, record)
    console.print(loop_table(record.spans, backend))
    write_text(path, json.dumps(chrome_trace(record.spans, phases)))
    console.print(f"saved {path} (open in chrome://tracing or ui.perfetto.dev)", soft_wrap=True)
    return 0
