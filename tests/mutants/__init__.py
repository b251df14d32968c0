"""Realistic faults, planted one after the other in a copy of the sources: `python -m tests.mutants` (`make mutants`).

faults lists them with the test files that are concerned; a fault that these files do not see is a hole in them.
"""
