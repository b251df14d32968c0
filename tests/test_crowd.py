"""When a short call on several threads takes one instead: the rule of csrc/cpu/call/crowd.h, compiled on its own."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[1] / "csrc"
COMPILER = shutil.which("g++") or shutil.which("clang++")

# the first word of a line is what happens to a call: its wall time and the time lost, both in ms; prints the threads
# that the next call may use of 2
PROGRAM = r"""
#include <cstdio>
#include "call/crowd.h"
int main() {
  qpilots::cpu::Crowd crowd;
  double wall, lost;
  while (std::scanf("%lf %lf", &wall, &lost) == 2) {
    crowd.note(crowd.threads(2), {wall * 1e-3, lost * 1e-3});
    std::printf("%d", crowd.threads(2));
  }
}
"""


@pytest.fixture(scope="module")
def threads_after(tmp_path_factory):
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("crowd")
    (folder / "main.cpp").write_text(PROGRAM)
    include = [f"-I{CSRC / 'cpu'}", f"-I{CSRC / 'include'}"]
    subprocess.run(
        [COMPILER, "-std=c++17", "-Wall", "-Wextra", "-Werror", *include, "main.cpp", "-o", "crowd"],
        cwd=folder, check=True,
    )  # fmt: skip

    def run(calls: list[tuple[float, float]]) -> str:
        text = "\n".join(f"{wall} {lost}" for wall, lost in calls)
        return subprocess.run([folder / "crowd"], input=text, capture_output=True, text=True, check=True).stdout

    return run


QUIET, CROWDED = (3.0, 0.05), (20.0, 12.0)  # on two threads
BUSY_ALONE, CALM = (10.0, 4.0), (5.0, 0.01)  # on one


def test_one_crowded_call_changes_nothing(threads_after) -> None:
    assert threads_after([CROWDED, QUIET] * 4) == "2" * 8


def test_two_in_a_row_take_one_thread_until_calls_are_calm(threads_after) -> None:
    calls = [CROWDED, CROWDED, *[BUSY_ALONE] * 5, *[CALM] * 16]
    assert threads_after(calls) == "21" + "1" * 5 + "1" * 15 + "2"


def test_a_busy_call_begins_the_count_anew(threads_after) -> None:
    calls = [CROWDED, CROWDED, *[CALM] * 15, BUSY_ALONE, *[CALM] * 15]
    assert threads_after(calls) == "21" + "1" * 31


def test_returns_that_fail_are_tried_ever_later(threads_after) -> None:
    returned = [CROWDED, CROWDED, *[CALM] * 16]
    assert threads_after([*returned, CROWDED, CROWDED, *[CALM] * 31])[-1] == "1"
    assert threads_after([*returned, CROWDED, CROWDED, *[CALM] * 32])[-1] == "2"


def test_long_calls_and_short_losses_are_no_crowd(threads_after) -> None:
    assert threads_after([(200.0, 150.0)] * 6) == "2" * 6  # its threads take their items from a queue
    assert threads_after([(0.1, 0.08)] * 6) == "2" * 6  # waking a thread is no crowd
