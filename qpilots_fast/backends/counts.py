"""Exact flop and weight counts of a sampling call, shared by every backend, the harness and the docs."""

from __future__ import annotations

from ..spec import NetworkSpec, SamplerSpec


def network_macs(spec: NetworkSpec) -> int:
    """Multiply-accumulates of one member on one row."""
    return sum(fan_in * fan_out for fan_in, fan_out in spec.layer_dims)


def count_weights(spec: SamplerSpec) -> int:
    """Matrix elements of the networks that the call reads."""
    return sum(network_macs(n) * n.num_members for n in spec.networks.values())


def count_flops(spec: SamplerSpec, batch_size: int) -> int:
    """Useful flops (2 per multiply-accumulate) of one call, with what never changes counted once.

    The observation's columns of every first layer, and for mfm the inner noise's columns for all steps, are
    computed once a call; the columns of x are shared by the draws; time columns are shared by all rows; input
    gradients touch the action columns alone.
    """
    steering, steered, draws = spec.steering, len(spec.steered_steps), spec.num_draws
    forward, backward = _per_row(spec.flow)
    macs = _obs_macs(spec.flow) + spec.num_steps * forward
    if steered and spec.critic is not None:
        critic_forward, critic_backward = _per_row(spec.critic)
        members = spec.critic.num_members
        macs += members * (_obs_macs(spec.critic) + steered * draws * (critic_forward + critic_backward))
        if spec.pulls_flow:
            macs += steered * backward
        elif steering.estimate == "glass":
            macs += steered * draws * steering.glass_steps * (forward + backward)
        elif spec.posterior is not None:
            post = spec.posterior
            action_columns = post.action_dim * post.hidden_dims[0]
            body = network_macs(post) - post.input_dim * post.hidden_dims[0]
            macs += _obs_macs(post)
            # forward: eps columns and body per draw, x columns once; backward: body per draw, x columns once
            macs += steered * (draws * (action_columns + 2 * body) + 2 * action_columns)
    return 2 * macs * batch_size


def _obs_macs(spec: NetworkSpec) -> int:
    return spec.block_dim("obs") * spec.hidden_dims[0]


def _per_row(spec: NetworkSpec) -> tuple[int, int]:
    """(forward, input-gradient) multiply-accumulates a step of one member: the moving columns and the body."""
    first = spec.block_dim(spec.moving_block) * spec.hidden_dims[0]
    body = network_macs(spec) - spec.input_dim * spec.hidden_dims[0]
    return first + body, first + body
