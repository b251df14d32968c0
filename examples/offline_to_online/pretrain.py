"""The behaviour-cloned flow, and QPILOTS-M's posterior, once for a dataset: every method, task and seed shares them.

    python -m examples.offline_to_online.pretrain --task cube-single-play-singletask-task1-v0 --out out/cube.safetensors
    python -m examples.offline_to_online.run --preset bench --pretrained out/cube.safetensors --method qpilots_u ...

Only observations and actions are read, so any task of the dataset gives the same file. Weights are running averages.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from qpilots_fast import FlowMLP, MetaFlowMap
from qpilots_fast.files import fill, read_tensors, write_tensors, write_text
from qpilots_fast.objectives import flow_matching_loss, meta_flow_map_loss, polyak_update

from .config import Config, config_of, make_parser, split_task
from .tasks import ReplayBuffer, dataset_path, normalisation

AVERAGE = 0.002  # rate of the running average


def new_flow(config: Config, obs_dim: int, action_dim: int) -> FlowMLP:
    """The base policy of every method."""
    return FlowMLP(obs_dim, action_dim, (config.hidden_dim,) * config.hidden_layers)


def new_posterior(config: Config, obs_dim: int, action_dim: int) -> MetaFlowMap:
    """The posterior that QPILOTS-M draws from."""
    hidden = (config.hidden_dim,) * config.hidden_layers
    return MetaFlowMap(obs_dim, action_dim, hidden, time_embedding="fourier", time_embedding_dim=16)


def holds(path: str | Path, name: str) -> bool:
    """Whether the file has that network."""
    return any(key.startswith(f"{name}.") for key in read_tensors(Path(path))[0])


def load_pretrained(path: str | Path, networks: dict[str, nn.Module]) -> None:
    """Fills flow and, where there is one, posterior.

    Raises:
        ValueError: where the file has other shapes, or no posterior for a method that needs one.
    """
    tensors, about = read_tensors(Path(path))
    try:
        fill({f"{name}.": network for name, network in networks.items()}, tensors, Path(path))
    except ValueError as error:
        raise ValueError(
            f"{error} It was made with {about.get('config', '?')}; give pretrain.py the same --chunk, --hidden-dim and "
            "--hidden-layers, and no --posterior-steps 0."
        ) from None


def _behaviour(config: Config) -> ReplayBuffer:
    """The dataset's chunks without any reward."""
    file = np.load(dataset_path(config))
    rows = {key: np.asarray(file[key], np.float32) for key in ("observations", "actions", "terminals")}
    if config.normalise_obs:
        mean, std = normalisation(rows["observations"])
        rows["observations"] = ((rows["observations"] - mean) / std).astype(np.float32)
    rows["masks"], rows["rewards"] = np.ones_like(rows["terminals"]), np.zeros_like(rows["terminals"])
    return ReplayBuffer(rows, config.action_chunk, config.discount, 0, config.seed)


def _train(
    name: str, network: nn.Module, loss_of: Callable[[Tensor, Tensor], Tensor], buffer: ReplayBuffer, steps: int,
    batch_size: int, learning_rate: float,
) -> list[tuple[int, float]]:  # fmt: skip
    """Adam with a short warm-up and a cosine down; `network` ends as the running average of its weights."""
    average = copy.deepcopy(network)
    optimiser = torch.optim.Adam(network.parameters(), learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min(1.0, (step + 1) / 200) * (0.52 + 0.48 * float(np.cos(np.pi * step / max(steps, 1))))
    )
    curve, total = [], 0.0
    for step in tqdm(range(1, steps + 1), desc=name, mininterval=5):
        batch = buffer.sample(batch_size)
        loss = loss_of(batch.obs, batch.actions)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
        polyak_update(average, network, max(AVERAGE, 1 / step))
        total += float(loss.detach())
        if step % 500 == 0:
            curve.append((step, total / 500))
            total = 0.0
    network.load_state_dict(average.state_dict())
    return curve


def pretrain(config: Config, out: Path, steps: int, posterior_steps: int, batch_size: int, rate: float) -> None:
    """Writes flow.* and posterior.* to `out`, and the losses beside it."""
    start = time.perf_counter()
    torch.manual_seed(config.seed)
    buffer = _behaviour(config)
    generator = torch.Generator().manual_seed(config.seed)
    obs_dim = buffer.rows["observations"].shape[1]
    action_dim = config.action_chunk * buffer.rows["actions"].shape[1]
    flow, posterior = new_flow(config, obs_dim, action_dim), new_posterior(config, obs_dim, action_dim)

    def flow_loss(obs: Tensor, actions: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=config.autocast):
            return flow_matching_loss(flow, obs, actions, generator=generator)

    def posterior_loss(obs: Tensor, actions: Tensor) -> Tensor:
        return meta_flow_map_loss(posterior, flow, obs, actions, generator=generator)

    curves = {"flow": _train("flow", flow, flow_loss, buffer, steps, batch_size, rate)}
    tensors = {f"flow.{key}": value for key, value in flow.state_dict().items()}
    if posterior_steps:
        flow.requires_grad_(False)
        curves["posterior"] = _train("posterior", posterior, posterior_loss, buffer, posterior_steps, batch_size, rate)
        tensors |= {f"posterior.{key}": value for key, value in posterior.state_dict().items()}
    kept = ("chunk", "hidden_dim", "hidden_layers", "normalise_obs", "seed")
    about = {key: value for key, value in dataclasses.asdict(config).items() if key in kept}
    about |= {"dataset": split_task(config.task)[1], "steps": steps, "posterior_steps": posterior_steps}
    about["chunk"], about["seconds"] = config.action_chunk, round(time.perf_counter() - start, 1)
    write_tensors(out, tensors, {"config": json.dumps(about)})
    lines = [f"{name},{step},{loss:.5f}" for name, curve in curves.items() for step, loss in curve]
    write_text(out.with_suffix(".csv"), "\n".join(["network,step,loss", *lines]) + "\n")
    print(f"{out}: {json.dumps(about)}")


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__.splitlines()[0], skip=("out", "batch_size", "learning_rate"))
    parser.add_argument("--out", type=Path, required=True, help="a .safetensors file")
    parser.add_argument("--steps", type=int, default=15_000)
    parser.add_argument("--posterior-steps", type=int, default=5_000, help="0: no posterior, so no qpilots_m")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    args = vars(parser.parse_args(argv))
    own = [args.pop(name) for name in ("out", "steps", "posterior_steps", "batch_size", "learning_rate")]
    config = config_of(args)
    torch.set_num_threads(config.threads)
    pretrain(config, *own)


if __name__ == "__main__":
    main()
