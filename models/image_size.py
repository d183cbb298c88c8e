"""Check that an image tower accepts an image size."""

import torch

from modules import ImageEncoder


def require_image_size(encoder: ImageEncoder, name: str, *, advice: str, size: int | None = None) -> None:
    """Encode one gray image, and raise ValueError if the backbone does not accept its size.

    size None is the size of the tower's preprocessing. The encoder is left in eval mode.
    """
    size = size or encoder.preprocess.size
    try:
        with torch.no_grad():
            encoder.eval()(torch.full((1, 3, size, size), 0.5))
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ValueError(f"{name} does not take images of {size} pixels ({reason}): try {advice}") from None
