"""`qpilots-fast relabel`: a data set of observations in, steered actions and the critics' values of them out.

rows reads, worker samples, store keeps what was made, ray_job spreads the parts over workers, command is what is typed.
"""
