"""The Python of README and docs runs: the blocks of a page one after the other, after what the page takes as given."""

from __future__ import annotations

import importlib.util
import re
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", *sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").glob("*.md"))]
SOURCES = ("qpilots_fast/**/*.py", "csrc/include/**/*.h")

# what the text around a block says is there, by the block's first line
GIVEN = {
    "sampler.warm_up()  # no slow first call": """
        class Env:
            def reset(self):
                return torch.zeros(40).numpy(), {}
            def step(self, action):
                assert action.shape == (25,)
                return torch.zeros(40).numpy(), 0.0, False, False, {}
        env = Env()
    """,
    "import logging": """
        flow, critic = FlowMLP(4, 2, hidden_dims=(8,)), CriticEnsemble(4, 2, 2, hidden_dims=(8,))
        obs, sampler = torch.randn(3, 4), SteeredSampler(flow, critic, Steering.qpilots_u())
    """,
    "x = torch.randn(len(obs), 25)": """
        obs, noise = torch.randn(3, 40), torch.randn(3, 25)
        expected = sampler(obs, noise=noise)
        torch.randn = lambda *shape: noise
    """,
    'flow = as_flow(policy, call=lambda policy, obs, x, t: policy(x, t, cond=obs)["velocity"])': """
        class Policy(FlowMLP):
            def forward(self, x, t, cond):
                return {"velocity": super().forward(cond, x, t)}
        policy, (q1, q2) = Policy(17, 6, hidden_dims=(8,)), [CriticEnsemble(17, 6, 1, (8,)) for _ in range(2)]
        map1, map2 = [MetaFlowMap(17, 6, hidden_dims=(8,)) for _ in range(2)]
    """,
    'flow = from_module(my_flow, "flow")  # forward(obs, noisy_actions, t)': """
        my_flow = FlowMLP(17, 6, hidden_dims=(8,))
        q1, q2 = [torch.nn.Sequential(torch.nn.Linear(23, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1)) for _ in range(2)]
    """,
    "from qpilots_fast.heads import C51": """
        class LogitsCritic(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.net = torch.nn.Sequential(torch.nn.Linear(23, 8), torch.nn.ReLU(), torch.nn.Linear(8, 51))
            def forward(self, obs, actions):
                return self.net(torch.cat([obs, actions], -1))
        logits_critic = LogitsCritic()
    """,
    "from qpilots_fast.integrations.flax import from_flax": """
        from types import SimpleNamespace
        import numpy as np
        def dense(*shape):
            return {"kernel": np.random.randn(*shape).astype("f4"), "bias": np.zeros((*shape[:-2], shape[-1]), "f4")}
        norm = {"scale": np.ones((2, 8), "f4"), "bias": np.zeros((2, 8), "f4")}
        agent = SimpleNamespace(network=SimpleNamespace(params={
            "modules_actor_bc_flow": {"Dense_0": dense(7 + 5 + 1, 8), "Dense_1": dense(8, 5)},
            "modules_critic": {"Dense_0": dense(2, 7 + 5, 8), "LayerNorm_0": norm, "Dense_1": dense(2, 8, 1)},
        }))
    """,
    "dims = real_dims(50, 32, 7)": """
        class Expert(torch.nn.Module):
            def denoise_step(self, obs, x, tau):
                return -x
        expert, critic = Expert(), CriticEnsemble(9, 350, 2, hidden_dims=(8,))
    """,
    "guided = ClassifierFreeGuidance(flow, null_obs=torch.zeros(40), weight=1.5)  # v_null + 1.5 (v_obs - v_null)": """
        flow, critic = FlowMLP(40, 6, hidden_dims=(8,)), CriticEnsemble(40, 6, 2, hidden_dims=(8,))
    """,
    'x = ops.steer_step(x, u, tau, dt, obs=obs, critic=critic, convention="noise_at_one")  # dt = -1 / K': """
        obs, x, u, tau, dt = torch.randn(3, 40), torch.randn(3, 6), torch.randn(3, 6), 0.9, -0.1
    """,
    "a = ops.clean_actions(x, v, t).detach().clamp(-1, 1).requires_grad_()  "
    "# noise_at_one: clean_actions(x, -v, 1 - t)": """
        v, t, dt = torch.randn(3, 6), 0.1, 0.1
    """,
    "import copy": """
        obs_dim, action_dim = 5, 3
        flow, critic = FlowMLP(5, 3, hidden_dims=(8,)), CriticEnsemble(5, 3, 2, hidden_dims=(8,))
        batches = [(torch.randn(4, 5), torch.rand(4, 3))]
        optimiser = torch.optim.SGD(flow.parameters(), 1e-3)
    """,
    "for parameter in sampler.parameters():": """
        import tempfile
        import torch.distributed
        torch.distributed.init_process_group("gloo", f"file://{tempfile.mktemp()}", rank=0, world_size=1)
        sampler = SteeredSampler(FlowMLP(5, 3, hidden_dims=(8,)), None, Steering.unsteered())
    """,
}
# what holds after a block
HOLDS = {
    "x = torch.randn(len(obs), 25)": "torch.testing.assert_close(actions, expected, rtol=1e-4, atol=1e-4)",
    "for parameter in sampler.parameters():": "torch.distributed.destroy_process_group()",
}
# blocks that need a framework; tests/frameworks runs what they show
FRAMEWORKS = (
    "qpilots_fast.integrations.diffusers",
    "qpilots_fast.integrations.torchrl",
    "qpilots_fast.integrations.lerobot",
)
IMPORTS = """
from dataclasses import replace
import torch
from qpilots_fast import *
from qpilots_fast import critic_outputs, reference
from qpilots_fast.integrations import ClassifierFreeGuidance, ReversedTimeFlow, real_dims
"""


def blocks(page: str, language: str = "python") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


def dedented(code: str) -> str:
    lines = code.splitlines()
    margin = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
    return "\n".join(line[margin:] for line in lines)


def runnable() -> list[str]:
    return [page for page in PAGES if page != "docs/adding.md" and blocks(page)]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("page", runnable())
def test_the_python_of_a_page_runs(page: str, monkeypatch: pytest.MonkeyPatch):
    import torch

    monkeypatch.setattr(torch, "randn", torch.randn)  # a page's own noise ends with it
    names: dict[str, object] = {}
    exec(IMPORTS, names)
    ran = 0
    for block in blocks(page):
        first = block.splitlines()[0]
        if first.startswith("from ") and first.split()[1] in FRAMEWORKS:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of networks at random
            exec(dedented(GIVEN.get(first, "")), names)
            exec(compile(block, f"{page}: {first}", "exec"), names)
            exec(HOLDS.get(first, ""), names)
        ran += 1
    assert ran > 0


def test_what_is_given_is_given_to_a_block_that_stands():
    firsts = {block.splitlines()[0] for page in PAGES for block in blocks(page)}
    assert set(GIVEN) | set(HOLDS) <= firsts
    assert all(importlib.util.find_spec(name) is not None for name in FRAMEWORKS)


@pytest.mark.parametrize("language", ["python", "cpp"])
def test_the_code_that_the_guide_shows_stands_in_the_sources(language: str):
    lines = {
        line.strip() for pattern in SOURCES for file in ROOT.glob(pattern) for line in file.read_text().splitlines()
    }
    shown = [
        line.strip()
        for block in re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs/adding.md").read_text(), re.DOTALL)
        for line in block.splitlines()
    ]
    assert len(shown) > 3 and not [line for line in shown if line and line not in lines]
