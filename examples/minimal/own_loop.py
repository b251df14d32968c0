"""Keep your own Euler loop: `ops.steer_step` replaces its one update line."""

from __future__ import annotations

import torch

from qpilots_fast import CriticEnsemble, FlowMLP, Steering, ops


def main() -> None:
    torch.manual_seed(0)
    obs_dim, action_dim, batch_size, num_steps = 17, 6, 32, 10
    flow = FlowMLP(obs_dim, action_dim, hidden_dims=(64, 64))  # stands for any model of yours
    critic = CriticEnsemble(obs_dim, action_dim, num_critics=5, hidden_dims=(64, 64))
    obs, noise = torch.randn(batch_size, obs_dim), torch.randn(batch_size, action_dim)
    steering = Steering.qpilots_u(alpha=0.5, jacobian="identity")  # the loop has no Jacobian of your model

    @torch.no_grad()
    def sample(steered: bool) -> torch.Tensor:
        x, dt = noise.clone(), 1 / num_steps
        for k in range(num_steps):
            t = k * dt
            v = flow(obs, x, torch.full((batch_size, 1), t))
            if steered and k > 0:  # at t = 0 the estimate does not depend on the noise drawn
                x = ops.steer_step(x, v, t, dt, obs=obs, critic=critic, steering=steering)
            else:
                x = x + dt * v
        return x.clamp(-1, 1)

    @torch.no_grad()
    def sample_with_own_gradient() -> torch.Tensor:
        """The same, with a critic gradient that you compute: any model, any objective."""
        x, dt = noise.clone(), 1 / num_steps
        for k in range(num_steps):
            t = k * dt
            v = flow(obs, x, torch.full((batch_size, 1), t))
            if k == 0:
                x = x + dt * v
                continue
            with torch.enable_grad():
                clean = ops.clean_actions(x, v, t).clamp(-1, 1).requires_grad_()
                q = critic(obs, clean)
                pessimistic = q.mean(0) - 0.5 * q.std(0, unbiased=False)
                (q_grad,) = torch.autograd.grad(pessimistic.sum(), clean)
            x = ops.steer_step(x, v, t, dt, q_grad=q_grad, steering=steering)
        return x.clamp(-1, 1)

    plain, steered, own = sample(False), sample(True), sample_with_own_gradient()
    torch.testing.assert_close(steered, own, rtol=1e-4, atol=1e-4)
    print(f"plain Q = {critic(obs, plain).mean():+.4f}   steered Q = {critic(obs, steered).mean():+.4f}")


if __name__ == "__main__":
    main()
