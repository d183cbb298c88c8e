"""What people look at: plots of runs, metrics, matches and sweeps, and the report on a data set.

Draws what it is given; computes no embeddings.
"""
