"""Check an image tower's input size before training does."""

import torch

from modules import ImageEncoder


def require_image_size(encoder: ImageEncoder, name: str, *, advice: str, size: int | None = None) -> None:
    """Encode one grey image, so that a size the backbone refuses is reported before training. Raises ValueError."""
    size = size or encoder.preprocess.size
    try:
        with torch.no_grad():
            encoder.eval()(torch.full((1, 3, size, size), 0.5))
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ValueError(f"{name} does not take images of {size} pixels ({reason}): try {advice}") from None
