"""Training in several processes: weights that are broadcast into live samplers, rows shared out by their seeds."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from qpilots_fast import CriticEnsemble, FlowMLP, SteeredSampler, Steering

ROWS, RANKS = 10, 2


def new_sampler(seed: int) -> SteeredSampler:
    torch.manual_seed(seed)
    flow, critic = FlowMLP(5, 3, (16,)), CriticEnsemble(5, 3, 2, (16,))
    return SteeredSampler(flow, critic, Steering.qpilots_u(0.5), action_low=-1.0, action_high=1.0)


def observations() -> torch.Tensor:
    return torch.randn(ROWS, 5, generator=torch.Generator().manual_seed(0))


def rank_main(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    sampler, obs, mine = new_sampler(rank), observations(), list(range(rank, ROWS, RANKS))
    before = sampler(obs[mine], seeds=mine)
    for parameter in sampler.parameters():
        dist.broadcast(parameter.data, src=0)
    live = sampler(obs[mine], seeds=mine)
    frozen = sampler.freeze()(obs[mine], seeds=mine)
    torch.save((before, live, frozen), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_ranks_sample_with_broadcast_weights_what_one_process_does(tmp_path: Path):
    mp.spawn(rank_main, (str(tmp_path),), nprocs=RANKS)
    expected = new_sampler(0)(observations(), seeds=range(ROWS))
    for rank in range(RANKS):
        before, live, frozen = torch.load(tmp_path / f"{rank}.pt")
        wanted = expected[rank::RANKS]
        assert torch.equal(live, wanted) and torch.equal(frozen, wanted)
        assert torch.equal(before, wanted) == (rank == 0), "the second rank's own weights are others"
