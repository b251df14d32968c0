"""What the fuzz run tolerates, each with its reason; every run counts them."""

from __future__ import annotations

TOLERATED: dict[str, str] = {
    "ill-conditioned": (
        "A row beyond the tolerance whose float64 actions move as far when weights and inputs move by a few roundings "
        "of the precision (a ReLU's kink, a clip's edge, the smaller of two critics, a gradient that cancels): no "
        "order of float32 operations gives it back."
    ),
    "beyond float32": (
        "Observations of 1e4 and more, or weights of thousands: float32 (or bfloat16) overflows where float64 does "
        "not: a velocity of inf is clipped to the bounds, one of NaN raises 'velocity is not finite', and a step "
        "without a finite gradient follows the flow."
    ),
    "float32's own error": (
        "A row on which the reference, run in the sampler's precision, is as far from float64 as the backend."
    ),
}
