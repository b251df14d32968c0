"""Random samplers and calls, each held to the reference: `python -m tests.fuzz --calls 20000` (`make fuzz N=20000`).

samplers and calls draw (hypothesis), judge compares, ledger lists what is tolerated and why, checkpoints alters files.
"""
