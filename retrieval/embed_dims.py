"""Search with the first values of embeddings, for runs that were trained with --nested-dims (arXiv 2205.13147)."""

from pathlib import Path

from runtime.run_dir import read_config


def check_embed_dims(folder: Path, dims: int | None) -> int | None:
    """Return how many values of a run's embeddings to use, None for all of them.

    Raises ValueError for a width that the run was not trained with.
    """
    config = read_config(folder)
    if dims is None or (config.embed_dim_applies and dims == config.embed_dim):
        return None
    if dims in config.nested_dims:
        return dims
    if config.nested_dims:
        widths = " ".join(map(str, config.nested_dims))
        raise ValueError(
            f"--embed-dims {dims}: {folder} was trained with --nested-dims {widths}: choose one of these, or leave out "
            "--embed-dims for all values"
        )
    raise ValueError(
        f"--embed-dims {dims}: {folder} was trained without --nested-dims, so a part of its embeddings is not meant to "
        "be searched alone: leave out --embed-dims"
    )
