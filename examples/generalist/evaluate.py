"""Plays the six tasks with every method, a round at a time; --report writes the README's table and the picture.

    python examples/generalist/evaluate.py --rounds 5                  # more rounds are added to those on file
    python examples/generalist/evaluate.py --phrasings held-out --methods unsteered identity --rounds 2
    python examples/generalist/evaluate.py --lerobot lerobot/pi0_base  # a checkpoint of LeRobot's behind the same lines

All methods meet the same starts, phrasings and noise. The strengths are the library's default 0.2 and both ends of the
paper's grid, 0.1 and 0.5; QGF's weight and the gate come from observations alone.
"""

from __future__ import annotations

import argparse
import csv
import re
import statistics
import time
from collections import defaultdict
from pathlib import Path

import torch

from qpilots_fast.demo.generalist.critics import GeneralistCritics
from qpilots_fast.demo.generalist.instructions import ASSETS, HELD_OUT, TASKS, TRAINED
from qpilots_fast.demo.generalist.methods import Method, methods, steered
from qpilots_fast.demo.generalist.policy import CHUNK, PADDED_DIM, GeneralistPolicy
from qpilots_fast.demo.generalist.tasks import Batch, Tasks, seen
from qpilots_fast.demo.generalist.weights import load_critics, load_policy
from qpilots_fast.demo.ogbench_cube import wilson_interval
from qpilots_fast.files import replacing, write_figure, write_text

RESULTS = Path(__file__).parent / "results"
SEED = 5000  # of these episodes; rollouts.py's are others
TABLE = re.compile(r"(?<=<!-- table -->\n).*(?=<!-- end of table -->)", re.DOTALL)  # in the page beside the results
COPIES = 10  # episodes of each task in a round
COLUMNS = ("phrasings", "method", "round", "task", "sentence", "success", "steps")

# what was told on purpose: each task in another's words
SWAPPED = {task: TRAINED[other] for task, other in zip(TASKS, (*TASKS[1:], TASKS[0]))}
PHRASINGS = {"trained": TRAINED, "held-out": HELD_OUT, "swapped": SWAPPED}

Rows = list[dict[str, str]]


def read_rows(path: Path) -> Rows:
    """The episodes on file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, rows: Rows, names: list[str]) -> None:
    """The episodes, by phrasings, by method in this order, by round."""
    phrasings = list(PHRASINGS)
    rows.sort(key=lambda row: (phrasings.index(row["phrasings"]), names.index(row["method"]), int(row["round"])))
    with replacing(path) as new, new.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def play(
    policy: GeneralistPolicy, critics: GeneralistCritics, tasks: Tasks, method: Method, number: int, phrasings: str
) -> Rows:
    """One round of one method."""
    with steered(policy, critics, method.steering, seed=number) as act:
        episodes = tasks.rollout(act, 1, SEED + number, phrasings=PHRASINGS[phrasings])
    return [
        dict(zip(COLUMNS, (phrasings, method.name, str(number), e.task, e.sentence, str(int(e.success)), str(e.steps))))
        for e in episodes
    ]


def milliseconds(policy: GeneralistPolicy, critics: GeneralistCritics, method: Method, batch: Batch) -> float:
    """Median processor milliseconds of one chunk for one robot, on one thread: other programs hardly show in them."""
    one = {name: value[:1] for name, value in batch.items()}
    noise, times = torch.randn(1, CHUNK, PADDED_DIM), []
    with steered(policy, critics, method.steering) as act:
        for _ in range(12):
            start = time.process_time()
            act(one, noise)
            times.append(1e3 * (time.process_time() - start))
    return statistics.median(times[2:])


def percent(successes: list[int]) -> str:
    return f"{100 * sum(successes) / len(successes):.0f} %" if successes else ""


def table(rows: Rows, took: dict[str, float]) -> str:
    """Success of every method on every task and in all, with its 95 % Wilson interval."""
    head = ["phrasings", "method", "episodes", "success", "95 % interval", *(task[:-3] for task in TASKS), "ms a chunk"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    found: dict[tuple[str, str], dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        found[row["phrasings"], row["method"]][row["task"]].append(int(row["success"]))
    for (phrasings, method), by_task in found.items():
        every = [success for successes in by_task.values() for success in successes]
        low, high = wilson_interval(sum(every), len(every))
        ms = f"{took[method]:.1f}" if method in took else ""
        cells = [phrasings, method, str(len(every)), percent(every), f"{100 * low:.0f} % to {100 * high:.0f} %"]
        lines.append("| " + " | ".join([*cells, *(percent(by_task[task]) for task in TASKS), ms]) + " |")
    return "\n".join(lines) + "\n"


def plot(rows: Rows, path: Path) -> None:
    """Success over all tasks with its interval, one bar a method, trained phrasings."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    found: dict[str, list[int]] = defaultdict(list)
    for row in rows:
        if row["phrasings"] == "trained":
            found[row["method"]].append(int(row["success"]))
    rates = [sum(s) / len(s) for s in found.values()]
    bounds = [wilson_interval(sum(s), len(s)) for s in found.values()]
    errors = [[rate - low for rate, (low, _) in zip(rates, bounds)], [high - r for r, (_, high) in zip(rates, bounds)]]
    figure, axis = plt.subplots(figsize=(8, 0.4 * len(found) + 1), constrained_layout=True)
    axis.barh(list(found), rates, xerr=errors, capsize=3, color="tab:blue", alpha=0.6)
    axis.axvline(rates[0], color="gray", linestyle="--")
    axis.invert_yaxis()
    axis.set_xlim(0, 1)
    counts = [len(successes) for successes in found.values()]
    axis.set_xlabel(f"success on six Meta-World tasks, {min(counts)} to {max(counts)} episodes a method")
    write_figure(path, figure, dpi=100)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, default=ASSETS)
    parser.add_argument("--rounds", type=int, default=5, help=f"of {COPIES} episodes a task, those on file included")
    parser.add_argument("--phrasings", choices=list(PHRASINGS), default="trained")
    parser.add_argument("--methods", nargs="*", default=[""], help="words, of which a method's name has one")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--report", action="store_true", help="plays nothing: table, picture, times")
    parser.add_argument("--lerobot", metavar="CHECKPOINT", help="one steered chunk of a LeRobot policy instead")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.lerobot:
        from lerobot_checkpoint import try_checkpoint

        try_checkpoint(args.lerobot)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "episodes.csv"
    policy, critics = load_policy(args.weights), load_critics(args.weights)
    batch = seen(Tasks(1).rollout(policy.predict_action_chunk, 1, SEED - 1))
    every = methods(policy, critics, batch)
    rows = read_rows(path)
    if not args.report:
        tasks = Tasks(COPIES)
        for number in range(args.rounds):
            for method in every:
                wanted = any(word in method.name for word in args.methods)
                on_file = any(
                    row["method"] == method.name and row["round"] == str(number) and row["phrasings"] == args.phrasings
                    for row in rows
                )
                if not wanted or on_file:
                    continue
                played = play(policy, critics, tasks, method, number, args.phrasings)
                rows += played
                done = percent([int(row["success"]) for row in played])
                print(f"{args.phrasings}, round {number}, {method.name}: {done}", flush=True)
                write_rows(path, rows, [method.name for method in every])
        return
    took = {method.name: milliseconds(policy, critics, method, batch) for method in every}
    text = table(rows, took)
    page = args.out.parent / "README.md"
    if page.exists():
        write_text(page, TABLE.sub(lambda found: text, page.read_text()))
    plot(rows, args.out / "success.png")
    print(text)


if __name__ == "__main__":
    main()
