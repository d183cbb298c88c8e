"""Output for people: plots of runs, metrics, matches and sweeps, and the report on a data set.

Plots results that other packages computed; computes no embeddings.
"""
