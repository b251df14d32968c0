"""The one reader of critic outputs, in the sampler, in best of n, in the objectives."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import qpilots_fast
from qpilots_fast import SteeredSampler, Steering, from_module
from qpilots_fast.critic_outputs import ask_critic
from qpilots_fast.heads import C51
from qpilots_fast.objectives import iql_loss, td_loss
from qpilots_fast.testing import assert_close, make_case

E, B, S, A = 3, 5, 4, 2

# a critic's q_values [E, B] as users' critics return them
SPELLINGS = {
    "[E, B]": lambda q: q,
    "[B, E]": lambda q: q.T,
    "[E, B, 1]": lambda q: q.unsqueeze(-1),
    "[B, E, 1]": lambda q: q.T.unsqueeze(-1),
    "list of [B, 1]": lambda q: [row.unsqueeze(-1) for row in q],
    "tuple of [B]": lambda q: tuple(q),
    "tuple of [1, B]": lambda q: tuple(row.unsqueeze(0) for row in q),
    "list of lists": lambda q: [[row, row] for row in q],
}
ONE_MEMBER = {"[B]": lambda q: q[0], "[B, 1]": lambda q: q[0].unsqueeze(-1), "[1, B]": lambda q: q[:1]}


def linear_critic(members: int = E):
    weights = torch.randn(members, S + A)
    return lambda obs, actions: weights @ torch.cat([obs, actions], -1).T


@pytest.mark.parametrize("batch_size", [1, 2, E, B])
@pytest.mark.parametrize("spelling", [*SPELLINGS, *ONE_MEMBER])
def test_every_spelling_is_read_alike(spelling, batch_size):
    spell, q = {**SPELLINGS, **ONE_MEMBER}[spelling], linear_critic(1 if spelling in ONE_MEMBER else E)
    obs, actions = torch.randn(batch_size, S), torch.randn(batch_size, A)
    expected = q(obs, actions)
    if spelling == "list of lists":
        expected = expected.repeat_interleave(2, 0)
    assert torch.equal(ask_critic(lambda o, a: spell(q(o, a)), obs, actions), expected)


@dataclass
class Observation:
    state: torch.Tensor
    rest: object


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"deep": [{"state": state}]},
        lambda state: Observation(state, {"texts": ["one"] * len(state), "shared": torch.zeros(7)}),
        lambda state: (state.numpy(), None),
    ],
)
@pytest.mark.parametrize("spelling", ["[E, B]", "[B, E]", "tuple of [1, B]"])
@pytest.mark.parametrize("members", [2, 6])
def test_a_square_output_is_settled_by_another_batch_size(wrap, spelling, members):
    """Also where obs is a tree, some of whose entries have rows."""

    def state_of(obs):
        if isinstance(obs, Observation):
            assert len(obs.rest["texts"]) == len(obs.state)
            return obs.state
        return obs["deep"][0]["state"] if isinstance(obs, dict) else torch.as_tensor(obs[0])

    q, sizes = linear_critic(members), []
    state, actions = torch.randn(members, S), torch.randn(members, A)

    def critic(obs, a):
        sizes.append(len(a))
        return SPELLINGS[spelling](q(state_of(obs), a))

    for _ in range(2):
        assert torch.equal(ask_critic(critic, wrap(state), actions), q(state, actions))
    assert len(sizes) == (2 if spelling == "tuple of [1, B]" else 3)  # the probe is asked once a critic


def test_the_probe_draws_nothing():
    q, drawn = linear_critic(2), torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    obs, actions = torch.randn(2, S), torch.randn(2, A)
    ask_critic(lambda o, a: q(o, a) * torch.rand(1), obs, actions)
    expected = [torch.randn(2, S, generator=drawn), torch.randn(2, A, generator=drawn), torch.rand(1, generator=drawn)]
    assert torch.equal(obs, expected[0]) and torch.equal(torch.rand(3), torch.rand(3, generator=drawn))


def test_what_cannot_be_settled_raises_with_the_cure():
    class Sealed:
        state = torch.randn(E, S)

    q, actions = linear_critic(E), torch.randn(E, A)
    for layout, spell in (("members_first", lambda q: q), ("batch_first", lambda q: q.T)):

        def critic(obs, a, spell=spell):
            return spell(q(obs.state, a))

        with pytest.raises(ValueError, match=f"did not tell .*RuntimeError.*critic_layout='{layout}'"):
            ask_critic(critic, Sealed(), actions)
        assert torch.equal(ask_critic(critic, Sealed(), actions, layout), q(Sealed.state, actions))


@pytest.mark.parametrize(
    ("output", "layout", "message"),
    [
        (torch.zeros(B - 1), "auto", r"critic returned shape \[4\] for 5 rows; expected \[E, 5\], \[5, E\]"),
        (torch.zeros(B, 1, 51), "auto", r"shape \[5, 1, 51\]"),
        (torch.zeros(()), "auto", r"shape \[\]"),
        (torch.zeros(B, 2), "members_first", "with critic_layout='members_first'; expected"),
        (torch.zeros(2, B), "batch_first", "with critic_layout='batch_first'; expected"),
        ([], "auto", "list of nothing; expected at least one member"),
        ((torch.zeros(B), torch.zeros(B).double()), "auto", "all of one shape and dtype"),
        ((torch.zeros(B), torch.zeros(B, 1)), "auto", "all of one shape and dtype"),
        ({"q": torch.zeros(B)}, "auto", "returned dict; expected a Tensor.*as_critic"),
        (None, "auto", "returned NoneType"),
    ],
)
def test_what_is_no_critic_output_raises(output, layout, message):
    with pytest.raises((ValueError, TypeError), match=message):
        ask_critic(lambda o, a: output, torch.zeros(B, S), torch.zeros(B, A), layout)


@pytest.mark.parametrize("spelling", list(SPELLINGS)[:-1])
@pytest.mark.parametrize("members", [4, 17])  # make_case has 17 rows
def test_sampler_reads_every_spelling(spelling, members, backend):
    case = make_case(num_critics=members)

    def critic(obs, actions):
        return SPELLINGS[spelling](case.critic(obs, actions))

    sampler = SteeredSampler(case.flow, critic, case.steering, backend=backend)
    actions, info = sampler(case.obs, case.noise, return_info=True)
    assert_close(actions, case.expected())
    torch.testing.assert_close(info.q_values, case.critic(case.obs, actions), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spelling", ["[B, E]", "[E, B, 1]", "list of [B, 1]"])
def test_best_of_n_reads_every_spelling(spelling):
    case = make_case(Steering.best_of_n(4), num_critics=17)
    sampler = SteeredSampler(case.flow, lambda o, a: SPELLINGS[spelling](case.critic(o, a)), case.steering)
    assert_close(sampler(case.obs, case.noise), case.expected())


def test_sampler_follows_critic_layout():
    case = make_case(num_critics=17)
    turned = SteeredSampler(case.flow, lambda o, a: case.critic(o, a).T, case.steering, critic_layout="batch_first")
    assert_close(turned(case.obs, case.noise), case.expected())
    turned.critic_layout = "members_first"
    assert (turned(case.obs, case.noise) - case.expected()).abs().max() > 1e-3
    with pytest.raises(ValueError, match="critic_layout is 'rows'; expected one of 'auto', 'members_first'"):
        turned.critic_layout = "rows"


# ---------------------------------------------------------------- columns that may be no members


class Columns(nn.Module):
    """n outputs of one Linear; of an activation that packs, or of one that does not."""

    def __init__(self, n, packs):
        super().__init__()
        case = make_case()
        width = case.critic.spec.obs_dim + case.critic.spec.action_dim
        self.first, self.last, self.packs = nn.Linear(width, 16), nn.Linear(16, n), packs

    def forward(self, obs, actions):
        hidden = self.first(torch.cat([obs, actions], -1))
        return self.last(torch.relu(hidden) if self.packs else torch.cos(hidden))


def actions_of(critic, **settings):
    case = make_case()
    return SteeredSampler(case.flow, critic, case.steering, **settings)(case.obs, case.noise)


def cured(message, critic):
    advice = r"(qpilots_fast\.as_critic\(.*\)) with head = (qpilots_fast\.heads\.C51\(v_min, v_max, \d+\))\."
    code, head = re.search(advice, message).groups()
    names = {"qpilots_fast": qpilots_fast, "critic": critic, "v_min": -3.0, "v_max": 3.0}
    return eval(code, {**names, "head": eval(head, names)})


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("container", [list, nn.ModuleList])
def test_atoms_of_listed_critics_are_no_members(packs, container):
    critics = container([Columns(51, packs), Columns(51, packs)])
    with pytest.raises(ValueError, match="51 numbers a row may be the atoms of a distribution") as error:
        actions_of(critics)
    head = C51(-3.0, 3.0, 51)
    values = actions_of(lambda o, a: [head.values(q(o, a)) for q in critics])
    assert_close(actions_of(cured(str(error.value), critics)), values)
    members = actions_of(lambda o, a: torch.cat([q(o, a) for q in critics], 1).T)
    assert_close(actions_of(critics, critic_layout="batch_first"), members)
    assert (values - members).abs().max() > 1e-3


def test_the_hint_says_of_listed_critics_that_columns_are_members():
    critics, dims = [Columns(51, True), Columns(51, True)], make_case().critic.spec
    dims = {"obs_dim": dims.obs_dim, "action_dim": dims.action_dim}
    with pytest.raises(ValueError, match="the hint output=lambda qs") as error:
        from_module(critics, "critic", **dims)
    hint = eval(re.search(r"the hint output=(lambda qs: \[.*?\])", str(error.value))[1])
    packed = from_module(critics, "critic", **dims, output=hint)
    assert packed.spec.num_members == 102
    assert_close(actions_of(packed), actions_of(critics, critic_layout="batch_first"))


@pytest.mark.parametrize("packs", [True, False])
def test_a_critic_of_many_columns_is_spoken_of_once(packs):
    critic = Columns(51, packs)
    with pytest.warns(UserWarning, match="51 numbers a row may be the atoms of a distribution") as said:
        members = actions_of(critic)
    assert sum("atoms" in str(warning.message) for warning in said) == 1
    head = C51(-3.0, 3.0, 51)
    message = next(str(warning.message) for warning in said if "atoms" in str(warning.message))
    assert_close(actions_of(cured(message, critic)), actions_of(lambda o, a: head.values(critic(o, a)).unsqueeze(0)))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*atoms")
        assert_close(actions_of(critic), members)  # said before
        assert_close(actions_of(Columns.__call__.__get__(critic), critic_layout="batch_first"), members)


@pytest.mark.parametrize("packs", [True, False])
def test_a_list_of_critics_with_several_values_each_names_the_ensemble(packs):
    critics = [Columns(2, packs), Columns(2, packs)]
    with pytest.warns(UserWarning, match=r"a list of 2 modules .* ensemble of E = 4 members") as said:
        got = actions_of(critics)
    assert sum("ensemble" in str(warning.message) for warning in said) == 1
    assert_close(got, actions_of(lambda o, a: torch.cat([q(o, a) for q in critics], 1).T))


@pytest.mark.parametrize("packs", [True, False])
def test_ensembles_are_not_spoken_of(packs):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(atoms|ensemble of E)")
        for critic in (Columns(20, packs), [Columns(1, packs)] * 3, [Columns(1, packs) for _ in range(30)]):
            actions_of(critic)
        critic = Columns(30, packs)
        actions_of(lambda o, a: critic(o, a).T)


# ---------------------------------------------------------------- objectives


@pytest.fixture
def batch():
    return {
        "obs": torch.randn(B, S), "actions": torch.randn(B, A), "rewards": torch.randn(B),
        "discounts": torch.full((B,), 0.9), "next_obs": torch.randn(B, S),
    }  # fmt: skip


def losses(critic, batch, **arguments):
    value = lambda obs: obs.sum(-1, keepdim=True)  # noqa: E731
    td = td_loss(critic, critic, **batch, next_actions=batch["actions"], **arguments)
    return torch.stack([td, *iql_loss(critic, critic, value, **batch, **arguments)])


@pytest.mark.parametrize("spelling", [*SPELLINGS, *ONE_MEMBER])
def test_objectives_read_every_spelling(batch, spelling):
    q = linear_critic(1 if spelling in ONE_MEMBER else B)  # as many members as rows
    spell = {**SPELLINGS, **ONE_MEMBER}[spelling]
    torch.testing.assert_close(losses(lambda o, a: spell(q(o, a)), batch), losses(q, batch))


def test_objectives_follow_critic_layout(batch):
    q = linear_critic(B)
    turned = losses(lambda o, a: q(o, a).T, batch, critic_layout="batch_first")
    torch.testing.assert_close(turned, losses(q, batch))


def test_columns_of_rewards_and_discounts_are_vectors(batch):
    q = linear_critic()
    columns = {**batch, "rewards": batch["rewards"][:, None], "discounts": batch["discounts"][:, None]}
    torch.testing.assert_close(losses(q, columns), losses(q, batch))
    whole = {**batch, "rewards": batch["rewards"] > 0}
    torch.testing.assert_close(losses(q, whole), losses(q, {**batch, "rewards": whole["rewards"].float()}))
    with pytest.raises(ValueError, match=r"rewards has shape \(5, 5\); expected \(5,\) or \(5, 1\)"):
        losses(q, {**batch, "rewards": torch.zeros(B, B)})
    with pytest.raises(ValueError, match=r"value\(next_obs\) has shape \(5, 4\)"):
        iql_loss(q, q, lambda obs: obs, **batch)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_dones_are_no_discounts(batch, dtype):
    dones = torch.zeros(B, dtype=dtype)
    with pytest.raises(TypeError, match=r"looks like dones; expected .* discount = gamma \* \(1 - done\)"):
        td_loss(linear_critic(), linear_critic(), **{**batch, "discounts": dones}, next_actions=batch["actions"])
    with pytest.raises(TypeError, match="looks like dones"):
        iql_loss(linear_critic(), linear_critic(), lambda o: o[:, 0], **{**batch, "discounts": dones})
