"""Read image files into arrays of pixels."""

from pathlib import Path

import numpy as np

# An allowlist: Pillow would pass an EPS file to Ghostscript, whatever its name is.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM", "WEBP", "TIFF", "AVIF", "JPEG2000")
EXIF_ORIENTATION = 0x0112  # tag number


def open_image(path: str | Path):
    """Open an image file with Pillow, without decoding its pixels. Raises the exceptions of `PIL.Image.open`."""
    from PIL import Image

    Image.preinit()  # registers the common formats; without it, `formats` makes Pillow import all its plugins
    return Image.open(path, formats=FORMATS)


def load_image(path: str | Path, size: int) -> np.ndarray:
    """Load an image as (H, W, 3) uint8 RGB, with its EXIF orientation applied.

    A large JPEG is decoded at a reduced scale, with sides of at least `size` pixels. Transparent areas become white,
    and 16-bit values are scaled to 8 bits. Raises OSError if the file is not an image, is truncated, or has more
    pixels than Pillow accepts.
    """
    from PIL import UnidentifiedImageError

    try:
        with open_image(path) as image:
            image.draft("RGB", (size, size))  # the JPEG decoder skips detail that resizing would discard
            return np.asarray(_to_rgb(_apply_orientation(image)))
    except (UnidentifiedImageError, KeyError):  # KeyError: a format that an older Pillow lacks
        raise OSError(f"{path}: not an image, or not in a supported format") from None
    except MemoryError:
        raise
    except Exception as error:  # decoders raise exceptions of any type
        raise OSError(f"{path}: {getattr(error, 'strerror', None) or error or type(error).__name__}") from None


def _apply_orientation(image):
    """Apply the EXIF orientation. `ImageOps.exif_transpose` also rewrites other tags, and fails on mistyped ones."""
    from PIL.Image import Transpose

    methods = {2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM}
    methods |= {5: Transpose.TRANSPOSE, 6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE, 8: Transpose.ROTATE_90}
    image.load()  # for a TIFF, this applies the orientation and removes its tag
    method = methods.get(image.getexif().get(EXIF_ORIENTATION))
    return image if method is None else image.transpose(method)


def _to_rgb(image):
    from PIL import Image

    if image.mode.startswith("I") or image.mode == "F":  # 16 bits or float; Pillow's conversion would clip at 255
        values = np.asarray(image, dtype=np.float32)
        max_value = 65535 if image.mode.startswith("I") else max(1.0, values.max(initial=0))
        image = Image.fromarray((values * (255 / max_value)).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
