"""Data sets of Hugging Face `datasets`: photos and captions come out as they went in, their folder stays as it was."""

import io
import sys
from unittest import mock

import numpy as np
import pytest
from PIL import Image

datasets = pytest.importorskip("datasets")

from data import hf_reader  # noqa: E402
from data.loading import open_dataset  # noqa: E402


@pytest.fixture
def opened(tmp_path):
    def opened(path):
        return open_dataset(str(path), data_dir=None, cache_dir=str(tmp_path / "cache"), split_seed=0)

    return opened


def rows(count, first=0):
    """`count` photos in memory, with one to three captions each."""
    noise = np.random.default_rng(first)
    photos = [Image.fromarray(noise.integers(0, 255, (9, 7, 3), np.uint8)) for _ in range(count)]
    captions = [[f"photo {first + k}, caption {n}" for n in range(1 + k % 3)] for k in range(count)]
    return photos, captions


def made(count, first=0):
    photos, captions = rows(count, first)
    features = datasets.Features(
        {"image": datasets.Image(), "caption": datasets.List(datasets.Value("string")), "id": datasets.Value("int64")}
    )
    return datasets.Dataset.from_dict({"image": photos, "caption": captions, "id": list(range(count))}, features)


def check(part, count, first=0):
    photos, captions = rows(count, first)
    assert len(part.paths) == count and part.captions == [text for texts in captions for text in texts]
    for path, photo in zip(part.paths, photos, strict=True):
        assert np.array_equal(np.asarray(Image.open(path)), np.asarray(photo))


def test_a_saved_data_set_with_parts(opened, tmp_path):
    parts = {"train": made(9), "validation": made(3, 100), "test": made(4, 200)}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "saved").rglob("*")}
    data = opened(tmp_path / "saved")
    for split, count, first in (("train", 9, 0), ("val", 3, 100), ("test", 4, 200)):
        check(data.split(split), count, first)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "saved").rglob("*")} == before


def test_photos_are_written_to_the_cache_once(opened, tmp_path):
    made(12).save_to_disk(tmp_path / "saved")
    paths = opened(tmp_path / "saved").split("train").paths
    times = [path.stat().st_mtime_ns for path in paths]
    assert [path.stat().st_mtime_ns for path in opened(tmp_path / "saved").split("train").paths] == times
    assert all((tmp_path / "cache") in path.parents for path in paths)


def test_parquet_files_as_the_hub_keeps_them(opened, tmp_path):
    for part, count, first in (("train", 9, 0), ("test", 4, 200)):
        (tmp_path / "hub" / "data").mkdir(parents=True, exist_ok=True)
        made(count, first).to_parquet(tmp_path / "hub" / "data" / f"{part}-00000-of-00001.parquet")
    data = opened(tmp_path / "hub")
    check(data.split("test"), 4, 200)
    assert len(data.split("train").paths) + len(data.split("val").paths) == 9


def test_a_name_on_the_hub_goes_through_the_same_code(opened, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda name, **_: datasets.DatasetDict({"train": made(12)}))
    assert sum(len(opened("owner/name").split(split).paths) for split in ("train", "val", "test")) == 12


def test_photos_that_have_files_are_left_where_they_are(opened, tmp_path, monkeypatch):
    photos, captions = rows(12)
    for k, photo in enumerate(photos):
        (tmp_path / "pictures").mkdir(exist_ok=True)
        photo.save(tmp_path / "pictures" / f"{k:02d}.png")
    files = [str(tmp_path / "pictures" / f"{k:02d}.png") for k in range(12)]
    table = datasets.Dataset.from_dict({"image": files, "text": [texts[0] for texts in captions]})
    table = table.cast_column("image", datasets.Image())
    monkeypatch.setattr(datasets, "load_dataset", lambda name, **_: table)
    data = opened("owner/name")
    assert data.image_root == tmp_path / "pictures" and not list((tmp_path / "cache").rglob("*.png"))


def test_rows_without_a_caption_or_photo_are_named(opened, tmp_path):
    photos, captions = rows(60)
    captions[7], photos[9] = [], None
    captions[11] = [None]
    datasets.Dataset.from_dict(
        {"image": photos, "caption": captions},
        datasets.Features(image=datasets.Image(), caption=datasets.List(datasets.Value("string"))),
    ).save_to_disk(tmp_path / "saved")
    bad = opened(tmp_path / "saved").bad
    assert [fault.split("row ")[1].split(":")[0] for fault in bad] == ["7", "9", "11"]
    assert all("expected" in fault and "found" in fault for fault in bad)


def test_a_data_set_without_captions_says_which_columns_it_has(opened, tmp_path):
    photos, _ = rows(4)
    datasets.Dataset.from_dict({"image": photos, "digit": [1, 2, 3, 4]}).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"expected a column of images and one of captions, found image, digit"):
        opened(tmp_path / "saved")


def test_without_the_library_the_error_says_what_to_install(opened, tmp_path, monkeypatch):
    made(3).save_to_disk(tmp_path / "saved")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install datasets"):
        opened(tmp_path / "saved")


def test_a_data_set_that_the_hub_refuses_is_one_error(opened):
    with pytest.raises(ConnectionError, match="could not load the data set owner/name: there is no such folder, and"):
        opened("owner/name")


def test_a_mistyped_folder_is_not_looked_for_on_the_hub(opened, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my").mkdir()
    with pytest.raises(FileNotFoundError, match="no data set or folder 'my/fotos'"):
        opened("my/fotos")


@pytest.mark.parametrize(
    ("split", "photo"),
    [("../../../x", "y.pth"), ("train", "../../y.pth"), ("..", "y.py"), ("/etc", "a/b.png"), ("a\\b", "y.PTH")],
)
def test_no_name_in_a_data_set_decides_where_a_photo_is_written(opened, tmp_path, split, photo):
    """The names of parts and photos come from whoever made the data set; a .pth file among Python's packages runs."""
    content = io.BytesIO()
    Image.new("RGB", (8, 8)).save(content, "PNG")
    photos = [{"bytes": content.getvalue() + bytes([k]), "path": photo} for k in range(12)]
    made_by_hand = datasets.Dataset.from_dict(
        {"image": photos, "caption": [f"photo {k}" for k in range(12)]},
        datasets.Features(image=datasets.Image(decode=False), caption=datasets.Value("string")),
    )
    source = tmp_path / "a" / "b" / "saved"
    made_by_hand.save_to_disk(source / "0")
    loaded = {"0": datasets.load_from_disk(str(source / "0"))}
    before = {path for path in tmp_path.rglob("*") if (tmp_path / "cache") not in path.parents}
    hub_data_read = read_hub_data_with(loaded, split, source, tmp_path / "cache")
    after = {path for path in tmp_path.rglob("*") if (tmp_path / "cache") not in path.parents}
    assert after - before <= {tmp_path / "cache"}
    written = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert len(written) == 12 and {path.suffix for path in written} <= {".png", ".jpg"}
    assert {path.parent for path in written} == {hub_data_read.folder}


def read_hub_data_with(loaded, split, source, cache_dir):
    """Read a data set whose only part has the name `split`, as a dataset_dict.json may give it."""
    with mock.patch.object(hf_reader, "_load", lambda *_: {split: loaded["0"]}):
        return hf_reader.read_hf_dataset(source, cache_dir)


def test_a_dataset_dict_with_a_split_outside_writes_nothing_there(opened, tmp_path):
    made(12).save_to_disk(tmp_path / "x")
    (tmp_path / "sets" / "saved").mkdir(parents=True)
    (tmp_path / "sets" / "saved" / "dataset_dict.json").write_text('{"splits": ["../../x"]}')
    before = {path for path in (tmp_path / "x", tmp_path / "sets") for path in path.rglob("*")}
    opened(tmp_path / "sets" / "saved")
    assert {path for path in (tmp_path / "x", tmp_path / "sets") for path in path.rglob("*")} == before
    outside = [p for p in tmp_path.rglob("*.png") if tmp_path / "cache" not in p.parents]
    assert not outside
