"""Photos on disk to pixels."""

from pathlib import Path

import numpy as np

# What photos come in, and no more: Pillow would hand an EPS to Ghostscript, whatever its name is.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM", "WEBP", "TIFF", "AVIF", "JPEG2000")
ORIENTATION = 0x0112  # the EXIF tag


def open_image(path: str | Path):
    """The photo as Pillow opens it, not unpacked yet. Raises what Pillow raises."""
    from PIL import Image

    Image.preinit()  # the common formats, so that the list below does not load all there are
    return Image.open(path, formats=FORMATS)


def load_image(path: str | Path, size: int) -> np.ndarray:
    """The photo as (H, W, 3) uint8 RGB, upright; a large JPEG is decoded at a size not much above `size`.

    What is transparent is shown on white, and 16 bits are brought down to 8. Raises OSError where the file is no
    image, is cut off or is too large to be one.
    """
    from PIL import UnidentifiedImageError

    try:
        with open_image(path) as image:
            image.draft("RGB", (size, size))  # lets the JPEG decoder skip the detail that resizing would throw away
            return np.asarray(_to_rgb(_upright(image)))
    except (UnidentifiedImageError, KeyError):  # KeyError: of a format that an older Pillow does not know
        raise OSError(f"{path}: not an image, or of a kind that cannot be read") from None
    except MemoryError:
        raise
    except Exception as error:  # decoders raise what they like
        raise OSError(f"{path}: {getattr(error, 'strerror', None) or error or type(error).__name__}") from None


def _upright(image):
    """The image turned as its camera says. Pillow's own way writes the other tags anew, and fails at mistyped ones."""
    from PIL.Image import Transpose

    turns = {2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM}
    turns |= {5: Transpose.TRANSPOSE, 6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE, 8: Transpose.ROTATE_90}
    image.load()  # a TIFF is turned by this, and its tag is gone
    turn = turns.get(image.getexif().get(ORIENTATION))
    return image if turn is None else image.transpose(turn)


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
