"""Read image files into arrays of pixels."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data.storage import HEIF_SUFFIXES, open_binary

if TYPE_CHECKING:
    from PIL.Image import Image

# An allowlist: Pillow would pass an EPS file to Ghostscript, whatever its name is.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM", "WEBP", "TIFF", "AVIF", "JPEG2000")
EXIF_ORIENTATION = 0x0112  # tag number
START_OF_SCAN = b"\xff\xda"  # marker; within compressed data 0xff is followed by 0 or a restart marker
MAX_SCANS = 100
CHUNK = 2**20  # bytes
BIT_DEPTHS = (10, 12, 14, 16)  # of scanners and cameras, stored in 16 bits


@contextmanager
def open_image(path: str | Path) -> Iterator["Image"]:
    """Open an image file, or a member of an archive, without decoding its pixels; `with` closes it.

    Raises OSError if it is no regular file, and the exceptions of `PIL.Image.open`.
    """
    from PIL import Image

    Image.preinit()  # registers the common formats; without it, `formats` makes Pillow import all its plugins
    formats = FORMATS
    if os.fspath(path).lower().endswith(HEIF_SUFFIXES):
        _register_heif(path)
        formats += ("HEIF",)
    with open_binary(path) as file, Image.open(file, formats=formats) as image:
        yield image


def _register_heif(path):
    try:
        import pillow_heif
    except ImportError:
        raise OSError(f"{path}: a .heic photo needs: pip install pillow-heif") from None
    pillow_heif.register_heif_opener()


def _check_scans(image):
    """Refuse a JPEG with hundreds of scans: decoding takes as long for each of them as for a whole photo."""
    if image.format not in ("JPEG", "MPO"):
        return
    file, position, scans = image.fp, image.fp.tell(), 0
    file.seek(0)
    last = b""
    while block := file.read(CHUNK):
        scans += (last + block).count(START_OF_SCAN)
        last = block[-1:]
    file.seek(position)
    if scans > MAX_SCANS:
        raise OSError(f"a JPEG with {scans:,} scans; at most {MAX_SCANS} are decoded: save it again")


def load_image(path: str | Path, size: int) -> np.ndarray:
    """Load an image as (H, W, 3) uint8 RGB, with its EXIF orientation applied.

    A large JPEG is decoded at a reduced scale, with sides of at least `size` pixels. Transparent areas become white,
    and values of 10, 12, 14 or 16 bits, whichever the largest one needs, are scaled to 8 bits. Raises OSError if the
    file is not an image, is truncated, has more pixels than Pillow accepts, or more than MAX_SCANS JPEG scans.
    """
    from PIL import UnidentifiedImageError

    try:
        with open_image(path) as image:
            _check_scans(image)
            image.draft("RGB", (size, size))  # the JPEG decoder skips detail that resizing would discard
            return np.asarray(to_rgb(_apply_orientation(image)))
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


def to_rgb(image):
    """Convert a Pillow image of any mode to RGB: 16 bits to 8, transparent areas to white."""
    from PIL import Image

    if image.mode.startswith("I") or image.mode == "F":  # 16 bits or float; Pillow's conversion would clip at 255
        values = np.asarray(image, dtype=np.float32)
        largest = values.max(initial=0)
        max_value = _range_of(largest) if image.mode.startswith("I") else max(1.0, largest)
        image = Image.fromarray((values * (255 / max_value)).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _range_of(largest):
    """Return the largest value of the smallest bit depth that holds this one; 16 bits for larger ones."""
    return next((2**bits - 1 for bits in BIT_DEPTHS if largest < 2**bits), 65535)
