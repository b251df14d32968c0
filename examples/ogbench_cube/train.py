"""Trains the demo's policy on play data: a behaviour-cloned flow, then an ensemble of goal-conditioned critics.

The flow learns what the play data does (no task, no reward). The critics learn the singletask reward for any goal
by implicit Q-learning with a pessimistic ensemble; actions are chunks of 5 steps. Steering joins the two only when
actions are sampled, so neither is trained again for another strength or another method.
"""

from __future__ import annotations

import argparse
import copy
import csv
import sys
import time
from pathlib import Path

import torch
from play_data import PlayData
from torch import Tensor, nn

from qpilots_fast.demo.ogbench_cube import OBS_DIM, STATE_DIM, CubePolicy, new_policy
from qpilots_fast.files import replacing
from qpilots_fast.objectives import IQLLosses, flow_matching_loss, iql_loss, polyak_update

LOG_EVERY = 200
CHECKPOINT_EVERY = 5000
INITIAL_VALUE = -40.0  # a goal some 50 steps away; the values need not climb down from 0 first


class Log:
    """Running means of what is logged, as CSV rows and on the screen; after > 0 keeps the rows up to that step."""

    def __init__(self, path: Path, fields: tuple[str, ...], after: int = 0) -> None:
        kept = [row for row in csv.DictReader(path.open()) if int(row["step"]) <= after] if after else []
        columns = ("step", "seconds", *fields)
        with replacing(path) as new, new.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(kept)
        self.file = path.open("a", newline="")
        self.writer = csv.DictWriter(self.file, columns)
        self.start = time.perf_counter() - (float(kept[-1]["seconds"]) if kept else 0.0)
        self.sums, self.count = dict.fromkeys(fields, 0.0), 0

    def add(self, step: int, **values: Tensor) -> None:
        self.count += 1
        for name, value in values.items():
            self.sums[name] += float(value.detach())
        if step % LOG_EVERY == 0:
            row = {name: round(total / self.count, 5) for name, total in self.sums.items()}
            row = {"step": step, "seconds": round(time.perf_counter() - self.start, 1), **row}
            self.writer.writerow(row)
            self.file.flush()
            print("  ".join(f"{k} {v}" for k, v in row.items()), flush=True)
            self.sums, self.count = dict.fromkeys(self.sums, 0.0), 0


def warmup_cosine(
    optimizer: torch.optim.Optimizer, steps: int, warmup: int = 500
) -> torch.optim.lr_scheduler.LRScheduler:
    """Linear warm-up, then a half cosine down to a twentieth."""

    def factor(step: int) -> float:
        cosine = 0.5 * (1 + torch.cos(torch.tensor(torch.pi * min(1.0, step / steps))).item())
        return min(1.0, (step + 1) / warmup) * (0.05 + 0.95 * cosine)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def train_flow(policy: CubePolicy, data: PlayData, args: argparse.Namespace) -> None:
    """Behaviour cloning by flow matching; the goal's columns are zero here and so are their weights, for ever."""
    flow = policy.flow
    with torch.no_grad():
        flow.hidden[0].weight[:, STATE_DIM:OBS_DIM] = 0
    average = copy.deepcopy(flow)
    optimizer = torch.optim.Adam(flow.parameters(), lr=args.flow_lr, fused=True)
    schedule = warmup_cosine(optimizer, args.flow_steps)
    generator = torch.Generator().manual_seed(args.seed)
    log = Log(args.out / "flow_curve.csv", ("loss",))
    for step in range(1, args.flow_steps + 1):
        obs, actions = data.sample_behaviour(args.flow_batch)
        with torch.autocast("cpu", torch.bfloat16):
            loss = flow_matching_loss(flow, obs, actions, generator=generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        polyak_update(average, flow, 0.002)
        log.add(step, loss=loss)
    flow.load_state_dict(average.state_dict())


def train_critics(policy: CubePolicy, data: PlayData, args: argparse.Namespace) -> None:
    """Implicit Q-learning with hindsight goals; the slow copy is what is kept."""
    width, critic = args.hidden, policy.critic
    nn.init.constant_(critic.biases[-1], INITIAL_VALUE)
    target = copy.deepcopy(critic)
    value = nn.Sequential(
        nn.Linear(OBS_DIM, width), nn.GELU("tanh"), nn.LayerNorm(width),
        nn.Linear(width, width), nn.GELU("tanh"), nn.LayerNorm(width),
        nn.Linear(width, width), nn.GELU("tanh"), nn.LayerNorm(width), nn.Linear(width, 1),
    )  # fmt: skip
    nn.init.constant_(value[-1].bias, INITIAL_VALUE)

    def losses_of(*batch: Tensor) -> IQLLosses:
        with torch.autocast("cpu", torch.bfloat16):
            return iql_loss(critic, target, value, *batch, expectile=args.expectile, rho=args.rho)

    compute = losses_of if args.eager else torch.compile(losses_of)
    optimizer = torch.optim.Adam([*critic.parameters(), *value.parameters()], lr=args.critic_lr, fused=True)
    schedule = warmup_cosine(optimizer, args.critic_steps)
    log = Log(args.out / "critic_curve.csv", ("critic_loss", "value_loss", "q_mean", "q_std"))
    for step in range(1, args.critic_steps + 1):
        batch = data.sample(args.critic_batch)
        losses = compute(batch.obs, batch.actions, batch.rewards, batch.discounts, batch.next_obs)
        optimizer.zero_grad(set_to_none=True)
        (losses.critic + losses.value).backward()
        optimizer.step()
        schedule.step()
        polyak_update(target, critic, 0.005)
        if step % LOG_EVERY == 0 or step % 20 == 0:
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                q = target(batch.obs, batch.actions).float()
            spread = (q.mean(), q.std(0, correction=0).mean())
        elif step == 1:
            spread = (torch.zeros(()), torch.zeros(()))
        log.add(step, critic_loss=losses.critic, value_loss=losses.value, q_mean=spread[0], q_std=spread[1])
        if step % CHECKPOINT_EVERY == 0:
            kept = CubePolicy(policy.flow, target, policy.mean, policy.std)
            kept.save(args.out / "checkpoint", {"critic_steps": step})
    critic.load_state_dict(target.state_dict())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data/cube-single-play.npz"))
    parser.add_argument("--out", type=Path, default=Path("out/ogbench_cube"), help="curves and checkpoints")
    parser.add_argument("--weights", type=Path, help="where the finished policy goes (default: <out>/weights)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--flow-layers", type=int, default=4)
    parser.add_argument("--critic-layers", type=int, default=3)
    parser.add_argument("--num-critics", type=int, default=10)
    parser.add_argument("--flow-steps", type=int, default=30_000)
    parser.add_argument("--flow-batch", type=int, default=512)
    parser.add_argument("--flow-lr", type=float, default=1e-3)
    parser.add_argument("--critic-steps", type=int, default=40_000)
    parser.add_argument("--critic-batch", type=int, default=256)
    parser.add_argument("--critic-lr", type=float, default=5e-4)
    parser.add_argument("--discount", type=float, default=0.99, help="per environment step")
    parser.add_argument("--expectile", type=float, default=0.9)
    parser.add_argument("--eager", action="store_true", help="without torch.compile (slower, needs no C++ compiler)")
    parser.add_argument("--rho", type=float, default=0.5)
    parser.add_argument("--only", choices=("flow", "critic"), help="train one part; the other comes from --weights")
    args = parser.parse_args()
    args.weights = args.weights or args.out / "weights"

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    data = PlayData(args.data, discount=args.discount, seed=args.seed)
    print(f"{len(data.starts)} chunks of play, {len(data.places)} resting places of the cube", flush=True)
    policy = new_policy(
        (args.hidden,) * args.flow_layers, (args.hidden,) * args.critic_layers, args.num_critics, data.mean, data.std
    )
    if args.only:
        trained = CubePolicy.load(args.weights)
        if args.only == "flow":
            policy.critic = trained.critic
        else:
            policy.flow, policy.posterior = trained.flow, trained.posterior
    # each part seeds itself, so that --only gives what the whole run gives
    if args.only != "critic":
        train_flow(policy, data, args)
    if args.only != "flow":
        data.seed(args.seed + 1)
        torch.manual_seed(args.seed + 1)
        train_critics(policy, data, args)
    policy.save(args.weights, {"command": " ".join(sys.argv), "torch": torch.__version__})


if __name__ == "__main__":
    main()
