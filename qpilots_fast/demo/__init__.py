"""A real policy in a real environment, unsteered and steered: `qpilots-fast demo`."""
