"""Decoding: ranges of 16-bit scans, JPEGs that take too long, HEIC."""

import io
import sys
import types

import numpy as np
import pytest
from PIL import Image

from data import image_io
from data.image_io import load_image, open_image


@pytest.mark.parametrize(("largest", "full"), [(1000, 1023), (4095, 4095), (12_000, 16_383), (65_535, 65_535)])
@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_scans_are_scaled_by_their_bit_depth(tmp_path, largest, full, suffix):
    values = np.linspace(0, largest, 64, dtype=np.uint16).reshape(8, 8)
    Image.fromarray(values).save(tmp_path / f"scan.{suffix}")
    pixels = load_image(tmp_path / f"scan.{suffix}", 8)[..., 0]
    np.testing.assert_allclose(pixels, values * (255 / full), atol=1)


def jpeg_with_scans(count):
    content = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)).save(
        content, "JPEG", progressive=True
    )
    data = content.getvalue()
    start = data.rindex(b"\xff\xda")
    return data[:-2] + data[start:-2] * count + b"\xff\xd9"


def test_jpeg_with_hundreds_of_scans_is_refused(tmp_path):
    (tmp_path / "slow.jpg").write_bytes(jpeg_with_scans(300))
    (tmp_path / "usual.jpg").write_bytes(jpeg_with_scans(0))
    with pytest.raises(OSError, match=r"slow\.jpg: a JPEG with 3\d\d scans; at most 100"):
        load_image(tmp_path / "slow.jpg", 32)
    assert load_image(tmp_path / "usual.jpg", 32).shape == (32, 32, 3)


def test_file_is_closed(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    with open_image(tmp_path / "a.png") as image:
        file = image.fp
    assert file.closed


def test_heic_is_registered_when_one_is_met(tmp_path, monkeypatch):
    (tmp_path / "a.heic").write_bytes(b"nothing")
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(OSError, match="needs: pip install pillow-heif"):
        load_image(tmp_path / "a.heic", 8)
    called = []
    library = types.SimpleNamespace(register_heif_opener=lambda: called.append(1))
    monkeypatch.setitem(sys.modules, "pillow_heif", library)
    with pytest.raises(OSError, match="not an image"):
        load_image(tmp_path / "a.heic", 8)
    assert called


def test_real_heic(tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.register_heif_opener()
    Image.new("RGB", (32, 24), (200, 30, 30)).save(tmp_path / "b.heif")
    assert load_image(tmp_path / "b.heif", 8).shape == (24, 32, 3)
    assert image_io.HEIF_SUFFIXES
