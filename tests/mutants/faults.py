"""The faults: where each is planted, and which tests should fail of it."""

from __future__ import annotations

from dataclasses import dataclass

REFERENCE = ("test_reference.py",)
BACKENDS = ("test_backends.py",)
FINISH = ("test_finish.py",)
OBJECTIVES = ("test_objectives.py", "test_meta_flow_map.py", "test_heads.py")
SAMPLER = ("test_sampler.py", "test_inputs.py", "test_bounds.py", "test_edits.py")
RECOGNISED = ("test_from_module.py",)
STEERING = ("test_steering.py",)
NATIVE = ("test_cpu_backend.py",)


@dataclass(frozen=True)
class Fault:
    """One edit.

    Args:
        file: below qpilots_fast, or of csrc. right: text that stands there once. wrong: what takes its place.
        tests: files of tests/ that run.
    """

    file: str
    right: str
    wrong: str
    tests: tuple[str, ...]

    @property
    def native(self) -> bool:
        return self.file.startswith("csrc/")


def _of(file: str, tests: tuple[str, ...], *edits: tuple[str, str]) -> list[Fault]:
    return [Fault(file, right, wrong, tests) for right, wrong in edits]


FAULTS: list[Fault] = [
    *_of(
        "qpilots_fast/reference.py", REFERENCE + BACKENDS + FINISH,
        ("return x + (1 - t if isinstance(t, Tensor) else _number(1 - t, v)) * v",
         "return x + (t if isinstance(t, Tensor) else _number(t, v)) * v"),
        ("return lowest / lowest.sum(0)", "return lowest"),
        ("return (one - _number(rho, std) * slope) / _number(count, std)",
         "return (one + _number(rho, std) * slope) / _number(count, std)"),
        ("return x.sum(0) / _number(x.shape[0], x)", "return x.sum(0) / _number(max(x.shape[0] - 1, 1), x)"),
        ("return torch.softmax(tau * q_values / scale, dim=0)", "return torch.softmax(q_values / scale, dim=0)"),
        ("scale, usable = strength * v_norm / (norm + _number(steering.eps, norm)), norm < infinity",
         "scale, usable = strength * v_norm / (norm + 1e-3), norm < infinity"),
        ("(steering.max_grad_norm / torch.where(norm > 0, norm, 1.0)).clamp(max=1)",
         "(steering.max_grad_norm / torch.where(norm > 0, norm, 1.0))"),
        ("gated = usable & (q_std.unsqueeze(-1) > steering.max_disagreement)",
         "gated = usable & (q_std.unsqueeze(-1) < steering.max_disagreement)"),
        ("d_a = torch.where((a >= low) & (a <= high), d_a, 0.0)", "d_a = torch.where((a >= low), d_a, 0.0)"),
        ("d_a = d_a + (1 - t) * flow_pullback(d_a)", "d_a = d_a + flow_pullback(d_a)"),
        ("v, reports[k] = steer_velocity(v, g, steering, std, strength * weight, report)",
         "v, reports[k] = steer_velocity(v, g, steering, std, strength, report)"),
        ("d_x = d_x + d_xbar * (c.c_x / num_steps) + c.p_x * d_star", "d_x = d_x + d_xbar * (c.c_x / num_steps)"),
    ),
    *_of(
        "qpilots_fast/objectives.py", OBJECTIVES,
        ("velocity = flow(obs, at * actions + (1 - at) * noise, t)",
         "velocity = flow(obs, (1 - at) * actions + at * noise, t)"),
        ("(velocity - (actions - noise)).square().mean()", "(velocity - (actions - noise)).square().sum()"),
        ("return rewards + discounts * next_q.to(rewards.dtype)", "return rewards + next_q.to(rewards.dtype)"),
        ("weight = torch.where(advantage < 0, 1 - expectile, expectile)",
         "weight = torch.where(advantage > 0, 1 - expectile, expectile)"),
        ("slow.lerp_(fast, rate)", "slow.lerp_(fast, 1 - rate)"),
    ),
    *_of(
        "qpilots_fast/candidates.py", FINISH + SAMPLER,
        ("* count + best", "* count + best.flip(0)"),
        ("rank.double() / steering.selection_temperature", "rank.double() * steering.selection_temperature"),
        ("usable = rank.isfinite()", "usable = ~rank.isinf()"),
    ),
    *_of(
        "qpilots_fast/inputs.py", ("test_callables.py", *STEERING, *SAMPLER),
        ("return noise.detach()  # a call", "return noise  # a call"),
        ("bad = ~(alpha.isfinite() & (alpha >= 0))", "bad = ~alpha.isfinite()"),
        ("obs = obs.to(dtype)", "obs = obs.to(dtype).abs()"),
    ),
    *_of(
        "qpilots_fast/bounds.py", SAMPLER,
        ("crossed = pair[0] > pair[1]", "crossed = pair[0] > pair[1] + 1"),
        ('_ABSENT = {"action_low": -math.inf, "action_high": math.inf}',
         '_ABSENT = {"action_low": -1e6, "action_high": 1e6}'),
    ),
    *_of(
        "qpilots_fast/steering.py", STEERING + BACKENDS,
        ("begin <= t < end and", "begin <= t <= end and"),
        ("weight * self.steers) for t, dt", "weight) for t, dt"),
    ),
    *_of(
        "qpilots_fast/sampler_state.py", SAMPLER,
        ("moved = super()._apply(fn, recurse)\n        self._run = self._make_run()",
         "moved = super()._apply(fn, recurse)\n        self._run"),
    ),
    *_of(
        "qpilots_fast/from_module/proof.py", RECOGNISED,
        ("if not gap <= tolerance:", "if not gap <= 1e3 * tolerance:"),
        ("_compare(what, expected_grad, their_grad, where, dtype)", "0.0"),
    ),
    *_of(
        "csrc/cpu/call/sample_phases.cpp", NATIVE,
        ("Estimate::kNoisy ? 0.0f : 1.0f - t;", "Estimate::kNoisy ? 0.0f : t;"),
        ("static_cast<float>(std::sqrt(squares / count) + 1e-6) : 1.0f",
         "static_cast<float>(std::sqrt(squares / (count + 1)) + 1e-6) : 1.0f"),
        ("row(g_, r)[c] += ahead * row(jg_, r)[c];", "row(g_, r)[c] = ahead * row(jg_, r)[c];"),
        ("clipped ? plan_.low.data() : nullptr, clipped ? plan_.high.data() : nullptr,", "nullptr, nullptr,"),
        ("(static_cast<std::ptrdiff_t>(j) * batch_ + (rows.begin + r) / draws_) * first",
         "(static_cast<std::ptrdiff_t>(j) * batch_ + (rows.begin + r) % draws_) * first"),
    ),
    *_of(
        "csrc/include/qpilots/steering.h", NATIVE,
        ("return strength * v_norm / (g_norm + s.eps);", "return strength * v_norm / (g_norm + 1e-3f);"),
        ("const bool gated = !bad && q_std > s.max_disagreement;", "const bool gated = !bad && q_std >= 0.0f;"),
        ("if (!is_finite(a)) return a;", "if (!is_finite(a)) continue;"),
        ("for (int j = 0; j < count; ++j) ties += q[j * stride] == lowest;", "ties = 1;"),
        ("if (steers && (mask == nullptr || mask[i])) drift", "if (steers) drift"),
    ),
]  # fmt: skip
