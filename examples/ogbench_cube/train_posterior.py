"""Trains the meta flow map that QPILOTS-M steers with: one call draws a clean action of the frozen flow.

Only the flow and the play data enter, no critic and no goal. An interrupted run goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from play_data import PlayData
from torch import Tensor
from train import Log, warmup_cosine

from qpilots_fast import FlowMLP, MetaFlowMap
from qpilots_fast.demo.ogbench_cube import ACTION_DIM, OBS_DIM, STATE_DIM, CubePolicy
from qpilots_fast.files import fill, fill_optimiser, optimiser_tensors, read_tensors, write_tensors
from qpilots_fast.meta_flow_map import CONSISTENCIES
from qpilots_fast.objectives import meta_flow_map_loss, polyak_update
from qpilots_fast.times import time_features

CHECKPOINT_EVERY = 2000
TIME_DIM = 16
HELD_OUT = 10  # episodes at the end of the data, which the map never sees; check_posterior.py measures there
MAY_CHANGE = ("threads", "weights", "data", "out", "eager")  # between the parts of a resumed run


def new_posterior(flow: FlowMLP) -> MetaFlowMap:
    """A map whose hidden layers start as the flow's, which know the state, x and t already.

    The goal's columns are zero in the data and so are their weights, for ever.
    """
    posterior = MetaFlowMap(
        OBS_DIM, ACTION_DIM, flow.spec.hidden_dims, time_embedding="fourier", time_embedding_dim=TIME_DIM
    )
    grid = torch.linspace(0, 1, 101, dtype=torch.float64)[:, None]
    as_time = torch.linalg.pinv(time_features(grid, "fourier", TIME_DIM), rtol=1e-3) @ grid  # features @ as_time ~ t
    with torch.no_grad():
        for ours, theirs in zip(posterior.hidden, flow.hidden):
            ours.bias.copy_(theirs.bias)
            if ours.weight.shape == theirs.weight.shape:
                ours.weight.copy_(theirs.weight)
        first, theirs = posterior.hidden[0].weight, flow.hidden[0].weight
        x = OBS_DIM + ACTION_DIM  # the columns are obs, xbar, x, t, s, u; the flow's obs, x, t
        first[:, :OBS_DIM] = theirs[:, :OBS_DIM]
        first[:, x : x + ACTION_DIM] = theirs[:, OBS_DIM : OBS_DIM + ACTION_DIM]
        first[:, x + ACTION_DIM : x + ACTION_DIM + TIME_DIM] = theirs[:, -1:] * as_time.T.float()
        first[:, STATE_DIM:OBS_DIM] = 0
    return posterior


@dataclass
class Run:
    """Everything that a resumed run needs."""

    posterior: MetaFlowMap
    slow: MetaFlowMap
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    data: PlayData
    step: int = 0

    def save(self, path: Path, settings: dict[str, Any]) -> None:
        """An interrupted write leaves the previous file."""
        tensors = {"torch": torch.get_rng_state(), **optimiser_tensors("optimizer/", self.optimizer)}
        for name, network in (("posterior", self.posterior), ("slow", self.slow)):
            tensors |= {f"{name}.{key}": value for key, value in network.state_dict().items()}
        about = {
            "step": self.step, "settings": settings, "schedule": self.schedule.state_dict(),
            "sampling": self.data.rng.bit_generator.state,
        }  # fmt: skip
        write_tensors(path, tensors, {name: json.dumps(value, default=str) for name, value in about.items()})

    def load(self, path: Path, settings: dict[str, Any]) -> None:
        """Continues what `save` wrote under the same settings."""
        tensors, written = read_tensors(path)
        about = {name: json.loads(written[name]) for name in ("step", "settings", "schedule", "sampling")}
        asked = json.loads(json.dumps(settings, default=str))
        differing = [key for key, value in asked.items() if about["settings"].get(key) != value]
        if differing:
            raise SystemExit(f"{path} was written with other settings of {', '.join(differing)}; use another --out.")
        fill({"posterior.": self.posterior, "slow.": self.slow}, tensors, path)
        fill_optimiser(self.optimizer, tensors, "optimizer/")
        self.schedule.load_state_dict(about["schedule"])
        for group, rate in zip(self.optimizer.param_groups, self.schedule.get_last_lr()):
            group["lr"] = rate
        self.step = about["step"]
        self.data.rng.bit_generator.state = about["sampling"]
        torch.set_rng_state(tensors["torch"])


def train(policy: CubePolicy, data: PlayData, args: argparse.Namespace) -> MetaFlowMap:
    """Distils the flow's posterior draws; returns the slow copy."""
    torch.manual_seed(args.seed)
    posterior = new_posterior(policy.flow)
    optimizer = torch.optim.Adam(posterior.parameters(), lr=args.lr, fused=True)
    run = Run(posterior, copy.deepcopy(posterior), optimizer, warmup_cosine(optimizer, args.steps), data)
    checkpoint = args.out / "posterior_checkpoint.safetensors"
    settings = {key: value for key, value in vars(args).items() if key not in MAY_CHANGE}
    if checkpoint.exists():
        run.load(checkpoint, settings)
        print(f"continuing at step {run.step}", flush=True)

    def loss_of(obs: Tensor, actions: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return meta_flow_map_loss(
                posterior, policy.flow, obs, actions, consistency=args.consistency,
                consistency_weight=args.consistency_weight, endpoint_fraction=args.endpoint_fraction,
            )  # fmt: skip

    compute = loss_of if args.eager else torch.compile(loss_of)
    log = Log(args.out / "posterior_curve.csv", ("loss",), after=run.step)
    while run.step < args.steps:
        run.step += 1
        loss = compute(*data.sample_behaviour(args.batch))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(posterior.parameters(), 1.0)
        optimizer.step()
        run.schedule.step()
        polyak_update(run.slow, posterior, 1e-3)
        log.add(run.step, loss=loss)
        if run.step % CHECKPOINT_EVERY == 0 or run.step == args.steps:
            run.save(checkpoint, settings)
    return run.slow


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data/cube-single-play.npz"))
    parser.add_argument("--out", type=Path, default=Path("out/ogbench_cube"), help="curve and checkpoint")
    parser.add_argument("--weights", type=Path, help="policy that gets the map (default: <out>/weights)")
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--consistency", choices=CONSISTENCIES, default="semigroup")
    parser.add_argument("--consistency-weight", type=float, default=1.0)
    parser.add_argument("--endpoint-fraction", type=float, default=0.3, help="share of (s, u) = (0, 1) in training")
    parser.add_argument("--eager", action="store_true", help="without torch.compile (slower, needs no C++ compiler)")
    args = parser.parse_args()
    args.weights = args.weights or args.out / "weights"

    torch.set_num_threads(args.threads)
    policy = CubePolicy.load(args.weights)
    data = PlayData(args.data, seed=args.seed)
    data.keep_episodes(0, -HELD_OUT)
    policy.posterior = train(policy, data, args)
    about = json.loads((args.weights / "policy.json").read_text())["about"]
    policy.save(args.weights, about | {"posterior_command": " ".join(sys.argv)})


if __name__ == "__main__":
    main()
