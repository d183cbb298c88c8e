"""How a photo becomes the square of pixels that an image tower reads."""

import os
from dataclasses import dataclass
from typing import Literal

import numpy as np


@dataclass(frozen=True)
class Preprocess:
    """A photo is squeezed whole into a square, or with `shortest_edge` resized to that and its middle cut out.

    The weights decide: a tower sees best what it was trained to see. (H, W, 3) uint8 → (size, size, 3) uint8.
    """

    size: int = 224  # pixels
    shortest_edge: int | None = None  # pixels
    interpolation: Literal["area", "nearest", "bilinear", "bicubic", "lanczos"] = "area"

    @property
    def draft_size(self) -> int:
        """What each side of the photo needs at least before it is resized, in pixels."""
        return self.shortest_edge or self.size

    def resized(self, size: int | None) -> "Preprocess":
        """The same for another size; None leaves it."""
        edge = self.shortest_edge and size and round(self.shortest_edge * size / self.size)
        return self if size is None else Preprocess(size, edge, self.interpolation)

    def scaled(self, factor: float) -> "Preprocess":
        """The same, so many times larger."""
        return self.resized(round(self.size * factor))

    @classmethod
    def from_specification(cls, specification: dict) -> "Preprocess":
        """The preprocessing that a run's towers/image.json describes; runs before 2.0 called it "view"."""
        return cls(**specification.get("preprocess", specification.get("view", {})))

    def cache_key(self) -> str:
        """Text for the keys of caches. It never changes, so that cached features and images stay usable."""
        return f"View(size={self.size}, shortest_edge={self.shortest_edge}, interpolation={self.interpolation!r})"

    def __call__(self, image: np.ndarray) -> np.ndarray:
        if self.shortest_edge is None:
            return self._resize(image, self.size, self.size)
        height, width = image.shape[:2]
        short = min(height, width)
        # Rounded as transformers' and torchvision's processors round.
        image = self._resize(image, *(int(side * self.shortest_edge / short) for side in (width, height)))
        top, left = ((side - self.size) // 2 for side in image.shape[:2])
        return image[top : top + self.size, left : left + self.size]

    def _resize(self, image, width, height):
        if self.interpolation == "area":
            import cv2

            cv2.setNumThreads(0)  # loader processes are the parallelism
            return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
        from PIL import Image  # its filters widen when they shrink, as those of torch's processors do; OpenCV's do not

        method = getattr(Image.Resampling, self.interpolation.upper())
        return np.asarray(Image.fromarray(image).resize((width, height), method))


def random_crop_transform(size: int, *, min_crop: float = 1.0):
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
