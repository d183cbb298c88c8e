"""Resize and crop images to the square input of an image tower."""

import os
from dataclasses import dataclass
from typing import Literal

import numpy as np


@dataclass(frozen=True)
class Preprocess:
    """Resize the whole image to a square, or resize its shorter side to `shortest_edge` and crop the center.

    Use the preprocessing that the pretrained weights were trained with. (H, W, 3) uint8 → (size, size, 3) uint8.
    """

    size: int = 224  # pixels
    shortest_edge: int | None = None  # pixels
    interpolation: Literal["area", "nearest", "bilinear", "bicubic", "lanczos"] = "area"

    @property
    def draft_size(self) -> int:
        """Minimum side length of an image before it is resized, in pixels."""
        return self.shortest_edge or self.size

    def resized(self, size: int | None) -> "Preprocess":
        """Return a copy for another size, with `shortest_edge` scaled in proportion; None returns this object."""
        edge = self.shortest_edge and size and round(self.shortest_edge * size / self.size)
        return self if size is None else Preprocess(size, edge, self.interpolation)

    def scaled(self, factor: float) -> "Preprocess":
        """Return a copy with the size multiplied by `factor`."""
        return self.resized(round(self.size * factor))

    @classmethod
    def from_specification(cls, specification: dict) -> "Preprocess":
        """Create the preprocessing from the contents of a run's towers/image.json; runs before 2.0 call it "view"."""
        return cls(**specification.get("preprocess", specification.get("view", {})))

    def cache_key(self) -> str:
        """Return a text for cache keys. It must never change, so that existing caches stay valid."""
        return f"View(size={self.size}, shortest_edge={self.shortest_edge}, interpolation={self.interpolation!r})"

    def __call__(self, image: np.ndarray) -> np.ndarray:
        if self.shortest_edge is None:
            return self._resize(image, self.size, self.size)
        height, width = image.shape[:2]
        shorter = min(height, width)
        # The same rounding as in the processors of transformers and torchvision.
        image = self._resize(image, *(int(side * self.shortest_edge / shorter) for side in (width, height)))
        top, left = ((side - self.size) // 2 for side in image.shape[:2])
        return image[top : top + self.size, left : left + self.size]

    def _resize(self, image, width, height):
        if self.interpolation == "area":
            import cv2

            cv2.setNumThreads(0)  # the loader processes already use all cores
            return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
        from PIL import Image  # antialiased when it shrinks an image, as torchvision is; OpenCV is not

        method = getattr(Image.Resampling, self.interpolation.upper())
        return np.asarray(Image.fromarray(image).resize((width, height), method))


def random_crop_transform(size: int, *, min_crop: float = 1.0):
    """Return an albumentations transform that resizes to (size, size).

    With min_crop < 1, it first takes a random crop of at least that share of the area.
    """
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # no version check over the network at import
    import albumentations as A
    import cv2

    cv2.setNumThreads(0)  # the loader processes already use all cores
    if min_crop == 1.0:
        return A.Compose([A.Resize(size, size, interpolation=cv2.INTER_AREA)])
    return A.Compose(
        [A.RandomResizedCrop((size, size), scale=(min_crop, 1.0), ratio=(0.8, 1.25), interpolation=cv2.INTER_AREA)]
    )
