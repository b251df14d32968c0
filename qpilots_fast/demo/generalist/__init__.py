"""A small language-conditioned policy for six Meta-World tasks, in pi0's shape: what `--policy generalist` steers."""
