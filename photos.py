"""Photos on disk to pixels."""

import os
from pathlib import Path

import numpy as np


def load_image(path: str | Path, size: int) -> np.ndarray:
    """The photo as (H, W, 3) uint8 RGB, upright; a large JPEG is decoded at a size not much above `size`.

    What is transparent is shown on white, and 16 bits are brought down to 8. Raises OSError where the file is no
    image, is cut off or is too large to be one.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            image.draft("RGB", (size, size))  # lets the JPEG decoder skip the detail that resizing would throw away
            return np.asarray(_to_rgb(ImageOps.exif_transpose(image)))
    except UnidentifiedImageError:
        raise OSError(f"{path}: not an image, or of a kind that cannot be read") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise OSError(f"{path}: {getattr(error, 'strerror', None) or error}") from None


def size_and_time(path: str | Path) -> tuple[int, int] | None:
    """What changes with a file: its bytes and its time of change in nanoseconds; None where there is none."""
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns


def _to_rgb(image):
    from PIL import Image

    if image.mode.startswith("I") or image.mode == "F":  # 16 bits; Pillow's own conversion would cut off at 255
        values = np.asarray(image, dtype=np.float32)
        top = 65535 if image.mode.startswith("I") else max(1.0, values.max(initial=0))
        image = Image.fromarray((values * (255 / top)).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def image_transform(size: int, *, min_crop: float = 1.0):
    """Resize to (size, size); where min_crop < 1, first cut out a random part of at least that share of the area."""
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # no question to the internet at import
    import albumentations as A
    import cv2

    cv2.setNumThreads(0)  # loader processes are the parallelism
    if min_crop == 1.0:
        return A.Compose([A.Resize(size, size, interpolation=cv2.INTER_AREA)])
    return A.Compose(
        [A.RandomResizedCrop((size, size), scale=(min_crop, 1.0), ratio=(0.8, 1.25), interpolation=cv2.INTER_AREA)]
    )
