"""What SECURITY.md says: no network, no pickle, nothing of the environment in `info`."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted([*(ROOT / "qpilots_fast").rglob("*.py"), *(ROOT / "examples").rglob("*.py"), ROOT / "setup.py"])
UNPICKLING = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
SOCKETS = {"socket", "urllib", "requests", "http", "ftplib", "smtplib", "ssl", "httpx", "aiohttp", "huggingface_hub"}


def imported(tree: ast.AST) -> set[str]:
    """The packages that a source imports, wherever in it."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


def calls(tree: ast.AST) -> list[ast.Call]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_unpickled_and_nothing_speaks_to_the_network(path):
    tree = ast.parse(path.read_text())
    assert not imported(tree) & UNPICKLING
    assert not imported(tree) & SOCKETS
    for call in calls(tree):
        name, named = ast.unparse(call.func), {k.arg: ast.unparse(k.value) for k in call.keywords}
        assert name not in ("torch.load", "torch.save", "os.system"), f"{name} in line {call.lineno}"
        if name in ("np.load", "numpy.load"):
            assert named.get("allow_pickle", "False") == "False"
        assert named.get("shell", "False") == "False"


NO_SOCKETS = """
import socket, sys
def refused(*arguments, **named):
    raise AssertionError("a socket was opened")
socket.socket.connect = socket.socket.connect_ex = socket.socket.bind = socket.getaddrinfo = refused
events = ("socket.connect", "socket.bind", "socket.getaddrinfo")
sys.addaudithook(lambda event, _: refused() if event in events else None)
"""


def test_import_and_run_open_no_socket():
    code = NO_SOCKETS + (
        "from qpilots_fast.cli import main\nfrom qpilots_fast.demo.ogbench_cube import CubePolicy\n"
        "import qpilots_fast.integrations, qpilots_fast.relabel.command, qpilots_fast.testing, torch\n"
        "from qpilots_fast import SteeredSampler, Steering\n"
        "policy = CubePolicy.load()\n"
        "SteeredSampler(policy.flow, policy.critic, Steering.qpilots_u())(torch.zeros(2, policy.flow.spec.obs_dim))\n"
        "sys.exit(main(['info']))"
    )
    secret = "a-value-that-nothing-prints"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "AWS_SECRET_ACCESS_KEY": secret, "MY_TOKEN": secret, "COLUMNS": "200"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    assert "Backends" in said and secret not in said
    leaks = {name for name, value in os.environ.items() if len(value) > 12 and "/" in value and value in said}
    assert not leaks
