"""What `torchrun` or `accelerate launch` assigned to this process, read from its environment without PyTorch.

For processes that need no collective operations; `distributed` is for those that do.
"""

import os


def process_rank() -> int:
    """Return the number of this process among those of the launcher, from 0; without a launcher 0."""
    return int(os.environ.get("RANK", 0))


def num_processes() -> int:
    """Return how many processes the launcher started, on all machines; without a launcher 1."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1


def local_rank() -> int:
    """Return the number of this process among those of this machine, from 0; without a launcher 0."""
    return int(os.environ.get("LOCAL_RANK", 0))


def processes_on_this_machine() -> int:
    """Return how many processes the launcher started on this machine; without a launcher 1."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))
