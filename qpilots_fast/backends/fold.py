"""Which LayerNorms go into the product that follows them.

For "post", W (gamma xhat + beta) + b = rstd (W' y - mean u) + c with W' = W gamma, u = W' 1, c = W beta + b: the
product takes y as it is, and the norm is two numbers of a row. Both sums of its pullback are known before the product
that pulls back: sum_i d xhat_i = sum_o d z_o u_o, and sum_i d xhat_i xhat_i = sum_o d z_o (z_o - c_o).
"""

from __future__ import annotations

from ..spec import NetworkSpec


def folds(spec: NetworkSpec, layer: int) -> bool:
    """Whether the norm of this hidden layer is folded into the next layer's weights: every "post" one of critics.

    Rounding y instead of xhat to bfloat16 multiplies its error by |mean| / std. A critic's gradient hardly feels that,
    and less than in torch's own bfloat16, which rounds y as well. Error of random 4 x 512 critics against float64, in Q
    and in dQ/da, per cent:

        |mean| / std of y    0.4          1.5          3.2          7            14           28
        plain                0.54, 0.71   0.61, 0.58   0.53, 0.52   0.47, 0.50   0.54, 0.52   0.57, 0.55
        folded               0.62, 0.71   0.81, 0.61   1.02, 0.55   1.94, 0.60   4.36, 0.85   10.0, 1.56
        torch, bfloat16      0.92, 1.12   1.53, 1.01   2.22, 0.96   3.27, 0.90   4.96, 1.24   17.6, 2.56

    A flow's output is the velocity itself: with a 3 x 64 flow whose biases are near 4, actions would be off by 0.0039
    instead of 0.0015.
    """
    return spec.kind == "critic" and spec.layer_norm[layer] == "post"
