"""The `qpilots-fast` command: info, demo, bench, profile, relabel, build-cuda."""

from __future__ import annotations

import argparse
import importlib
import platform
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from . import __version__

_COMMANDS = {
    "info": "versions, processor, GPU, every backend with available / why not, and a self-check",
    "demo": "a real policy in a real environment, unsteered and steered",
    "bench": "speed against the best PyTorch and JAX versions of the same loop",
    "profile": "where the time of one call goes",
    "relabel": "a data set of observations in, steered actions and Q before / after out",
    "build-cuda": "compile the CUDA kernels with nvcc",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="qpilots-fast",
        description="Fused sampling for flow policies steered by a critic.",
        epilog="commands:\n"
        + "\n".join(f"  {name:<11} {text}" for name, text in _COMMANDS.items())
        + "\n\n`qpilots-fast COMMAND --help` tells more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"qpilots-fast {__version__}")
    parser.add_argument("command", choices=list(_COMMANDS), metavar="COMMAND", help=", ".join(_COMMANDS))
    command = parser.parse_args(arguments[:1]).command
    rest = arguments[1:]
    if command == "info":
        return info(rest)
    if command == "demo":
        from .demo import command as demo

        return demo.main(rest)
    if command == "relabel":
        from .relabel import command as relabel

        return relabel.main(rest)
    if command == "build-cuda":
        return _build_cuda(rest)
    return _from_clone("bench", ["profile", *rest] if command == "profile" else rest)


def _from_clone(package: str, arguments: list[str]) -> int:
    """Runs the harness, which lives in the repository and not in the wheel."""
    for root in (Path(__file__).resolve().parent.parent, Path.cwd()):
        if (root / package / "__main__.py").exists():
            sys.path.insert(0, str(root))
            return importlib.import_module(f"{package}.__main__").main(arguments)
    print(
        f"qpilots-fast {package}: the {package}/ folder was not found. It belongs to the repository, not to the wheel: "
        "clone the repository and run this command in it.",
        file=sys.stderr,
    )
    return 2


def _build_cuda(arguments: list[str]) -> int:
    from .backends.cuda.build import build

    parser = argparse.ArgumentParser(prog="qpilots-fast build-cuda", description="Compile the CUDA kernels with nvcc.")
    parser.add_argument(
        "--arch", nargs="+", metavar="SM", help="e.g. sm_80 sm_90 (default: the visible GPU, else all supported)"
    )
    archs = parser.parse_args(arguments).arch
    try:
        build(archs)
    except (OSError, RuntimeError, ValueError) as error:
        print(f"qpilots-fast build-cuda: {error}", file=sys.stderr)
        return 1
    return 0


# ---------------------------------------------------------------- info


def info(arguments: Sequence[str] = ()) -> int:
    """Prints what runs here and why the rest does not; exit status 1 where a backend fails its self-check."""
    from rich.console import Console
    from rich.table import Table

    argparse.ArgumentParser(prog="qpilots-fast info", description=_COMMANDS["info"]).parse_args(list(arguments))
    console = Console()
    machine = Table(show_header=False, box=None)
    for name, value in _machine():
        machine.add_row(name, value)
    console.print(machine)
    table = Table(title="Backends", show_lines=False)
    for column in ("backend", "available", "precisions", "self-check: max |actions - float64 reference|"):
        table.add_column(column)
    failed = False
    for name, state, precisions, check, ok in _backend_rows():
        failed |= not ok
        table.add_row(name, state, precisions, check)
    console.print(table)
    return int(failed)


def _machine() -> list[tuple[str, str]]:
    import torch

    from . import backends
    from .backends import native

    def version(package: str) -> str:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return "not installed"

    rows = [
        ("qpilots_fast", f"{__version__} (Python {platform.python_version()})"),
        ("torch", f"{torch.__version__}, {torch.get_num_threads()} threads"),
        ("triton", version("triton")),
        ("processor", f"{platform.machine()}, {_processor_name()}"),
    ]
    if backends.unavailable_reason("cpu") is None:
        module = native.load_module()
        rows.append(
            (
                "CPU paths",
                ", ".join(module.cpu_isa_paths()) + f" (running {module.cpu_isa('')}; {native.ISA_VARIABLE} selects)",
            )
        )
        refusal = native.write_watch_refusal()
        how = f"read at every call ({refusal})" if refusal else "watched for writes by the kernel"
        rows.append(("live weights", how))
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    rows.append(("GPU", ", ".join(gpus) if gpus else "none visible to torch"))
    return rows


def _processor_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def _backend_rows() -> list[tuple[str, str, str, str, bool]]:
    import torch

    from . import backends
    from .steering import Steering
    from .testing import TOLERANCES, compare, make_case

    rows = []
    for name in backends.BACKENDS:
        reason = backends.unavailable_reason(name)
        if reason is not None:
            rows.append((name, f"no: {reason}", "", "", True))
            continue
        backend = backends.get(name)
        checks = {}
        for method, steering in {"U": Steering.qpilots_u(), "M": Steering.qpilots_m()}.items():
            case = make_case(steering, batch_size=8, hidden_dims=(64, 48))
            device = torch.device("cpu") if name in ("cpu", "reference") or not torch.cuda.is_available() else "cuda"
            checks[method] = compare(case.to(device).run(name), case.expected())
        ok = all(check.passed for check in checks.values())
        verdict = ", ".join(f"{method} {check.max_error:.1e}" for method, check in checks.items())
        verdict += f" ({'<=' if ok else 'FAILED: expected <='} {TOLERANCES['float32'].max_error:.0e})"
        rows.append((name, "yes", ", ".join(backend.precisions), verdict, ok))
    return rows


if __name__ == "__main__":
    sys.exit(main())
