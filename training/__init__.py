"""The training loop, and what makes it fast and exact: gradient caching, chunked losses, cached features.

`training.trainer.train` is the entry point; a step is in training/train_step.py.
"""
