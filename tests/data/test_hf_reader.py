"""Hugging Face data sets are read without loss, and nothing is written outside the cache."""

import io
import sys
from unittest import mock

import numpy as np
import pytest
from PIL import Image

datasets = pytest.importorskip("datasets")

from data import hf_reader  # noqa: E402
from data.loading import open_dataset  # noqa: E402
from data.records import ColumnNames  # noqa: E402


@pytest.fixture
def load(tmp_path):
    def load(path):
        return open_dataset(str(path), data_dir=None, cache_dir=str(tmp_path / "cache"), split_seed=0)

    return load


def photos_and_captions(count, first=0):
    """Return `count` random photos and, for each, a list of one to three captions."""
    rng = np.random.default_rng(first)
    photos = [Image.fromarray(rng.integers(0, 255, (9, 7, 3), np.uint8)) for _ in range(count)]
    captions = [[f"photo {first + k}, caption {n}" for n in range(1 + k % 3)] for k in range(count)]
    return photos, captions


def make_dataset(count, first=0):
    photos, captions = photos_and_captions(count, first)
    features = datasets.Features(
        {"image": datasets.Image(), "caption": datasets.List(datasets.Value("string")), "id": datasets.Value("int64")}
    )
    return datasets.Dataset.from_dict({"image": photos, "caption": captions, "id": list(range(count))}, features)


def check_split(split, count, first=0):
    photos, captions = photos_and_captions(count, first)
    assert len(split.paths) == count and split.captions == [text for texts in captions for text in texts]
    for path, photo in zip(split.paths, photos, strict=True):
        assert np.array_equal(np.asarray(Image.open(path)), np.asarray(photo))


def test_saved_data_set_with_splits_is_read_and_left_unchanged(load, tmp_path):
    splits = {"train": make_dataset(9), "validation": make_dataset(3, 100), "test": make_dataset(4, 200)}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "saved").rglob("*")}
    data = load(tmp_path / "saved")
    for split, count, first in (("train", 9, 0), ("val", 3, 100), ("test", 4, 200)):
        check_split(data.split(split), count, first)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "saved").rglob("*")} == before


def test_photos_are_written_to_the_cache_only_once(load, tmp_path):
    make_dataset(12).save_to_disk(tmp_path / "saved")
    paths = load(tmp_path / "saved").split("train").paths
    times = [path.stat().st_mtime_ns for path in paths]
    assert [path.stat().st_mtime_ns for path in load(tmp_path / "saved").split("train").paths] == times
    assert all((tmp_path / "cache") in path.parents for path in paths)


def test_parquet_files_in_the_hub_layout_are_read(load, tmp_path):
    for split, count, first in (("train", 9, 0), ("test", 4, 200)):
        (tmp_path / "hub" / "data").mkdir(parents=True, exist_ok=True)
        make_dataset(count, first).to_parquet(tmp_path / "hub" / "data" / f"{split}-00000-of-00001.parquet")
    data = load(tmp_path / "hub")
    check_split(data.split("test"), 4, 200)
    assert len(data.split("train").paths) + len(data.split("val").paths) == 9


def test_name_on_the_hub_is_loaded(load, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda name, **_: datasets.DatasetDict({"train": make_dataset(12)}))
    assert sum(len(load("owner/name").split(split).paths) for split in ("train", "val", "test")) == 12


def test_photos_that_are_files_are_used_in_place(load, tmp_path, monkeypatch):
    photos, captions = photos_and_captions(12)
    for k, photo in enumerate(photos):
        (tmp_path / "pictures").mkdir(exist_ok=True)
        photo.save(tmp_path / "pictures" / f"{k:02d}.png")
    files = [str(tmp_path / "pictures" / f"{k:02d}.png") for k in range(12)]
    table = datasets.Dataset.from_dict({"image": files, "text": [texts[0] for texts in captions]})
    table = table.cast_column("image", datasets.Image())
    monkeypatch.setattr(datasets, "load_dataset", lambda name, **_: table)
    data = load("owner/name")
    assert data.image_root == tmp_path / "pictures" and not list((tmp_path / "cache").rglob("*.png"))


def test_rows_without_a_caption_or_photo_are_reported(load, tmp_path):
    photos, captions = photos_and_captions(60)
    captions[7], photos[9] = [], None
    captions[11] = [None]
    datasets.Dataset.from_dict(
        {"image": photos, "caption": captions},
        datasets.Features(image=datasets.Image(), caption=datasets.List(datasets.Value("string"))),
    ).save_to_disk(tmp_path / "saved")
    errors = load(tmp_path / "saved").bad_rows
    assert [error.split("row ")[1].split(":")[0] for error in errors] == ["7", "9", "11"]
    assert all("expected" in error and "found" in error for error in errors)


def test_error_for_a_data_set_without_captions_lists_its_columns(load, tmp_path):
    photos, _ = photos_and_captions(4)
    datasets.Dataset.from_dict({"image": photos, "digit": [1, 2, 3, 4]}).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"expected a column of images and one of captions, found image, digit"):
        load(tmp_path / "saved")


def test_error_without_the_library_names_the_package_to_install(load, tmp_path, monkeypatch):
    make_dataset(3).save_to_disk(tmp_path / "saved")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install datasets"):
        load(tmp_path / "saved")


def test_failure_to_load_from_the_hub_is_a_connection_error(load):
    with pytest.raises(ConnectionError, match="could not load the data set owner/name: there is no such folder, and"):
        load("owner/name")


def test_mistyped_folder_is_not_requested_from_the_hub(load, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("requested from the Hub"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my").mkdir()
    with pytest.raises(FileNotFoundError, match="no data set or folder 'my/fotos'"):
        load("my/fotos")


@pytest.mark.parametrize(
    ("split", "photo"),
    [("../../../x", "y.pth"), ("train", "../../y.pth"), ("..", "y.py"), ("/etc", "a/b.png"), ("a\\b", "y.PTH")],
)
def test_no_name_in_a_data_set_determines_where_a_photo_is_written(load, tmp_path, split, photo):
    """Names in a data set are untrusted: Python executes, for instance, .pth files in its package folder."""
    content = io.BytesIO()
    Image.new("RGB", (8, 8)).save(content, "PNG")
    photos = [{"bytes": content.getvalue() + bytes([k]), "path": photo} for k in range(12)]
    dataset = datasets.Dataset.from_dict(
        {"image": photos, "caption": [f"photo {k}" for k in range(12)]},
        datasets.Features(image=datasets.Image(decode=False), caption=datasets.Value("string")),
    )
    source = tmp_path / "a" / "b" / "saved"
    dataset.save_to_disk(source / "0")
    loaded = {"0": datasets.load_from_disk(str(source / "0"))}
    before = {path for path in tmp_path.rglob("*") if (tmp_path / "cache") not in path.parents}
    layout = read_with_split_name(loaded, split, source, tmp_path / "cache")
    after = {path for path in tmp_path.rglob("*") if (tmp_path / "cache") not in path.parents}
    assert after - before <= {tmp_path / "cache"}
    written = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert len(written) == 12 and {path.suffix for path in written} <= {".png", ".jpg"}
    assert {path.parent for path in written} == {layout.folder}


def read_with_split_name(loaded, split, source, cache_dir):
    """Read a data set whose only split is named `split`, as dataset_dict.json may name it."""
    with mock.patch.object(hf_reader, "_load_splits", lambda *_: {split: loaded["0"]}):
        return hf_reader.read_hf_dataset(source, cache_dir)


def test_split_path_outside_the_data_set_folder_is_never_written_to(load, tmp_path):
    make_dataset(12).save_to_disk(tmp_path / "x")
    (tmp_path / "sets" / "saved").mkdir(parents=True)
    (tmp_path / "sets" / "saved" / "dataset_dict.json").write_text('{"splits": ["../../x"]}')
    before = {path for path in (tmp_path / "x", tmp_path / "sets") for path in path.rglob("*")}
    load(tmp_path / "sets" / "saved")
    assert {path for path in (tmp_path / "x", tmp_path / "sets") for path in path.rglob("*")} == before
    outside = [p for p in tmp_path.rglob("*.png") if tmp_path / "cache" not in p.parents]
    assert not outside


def test_columns_of_a_saved_data_set_are_chosen_or_an_error(tmp_path):
    photos, _ = photos_and_captions(20)
    others, _ = photos_and_captions(20, 100)
    columns = {"photo": photos, "thumb": others, "caption": [f"a {k}" for k in range(20)]}
    columns["remark"] = [f"b {k}" for k in range(20)]
    image = {"photo": datasets.Image(), "thumb": datasets.Image()}
    text = {"caption": datasets.Value("string"), "remark": datasets.Value("string")}
    datasets.Dataset.from_dict(columns, datasets.Features(image | text)).save_to_disk(tmp_path / "saved")

    def read(**names):
        return hf_reader.read_hf_dataset(tmp_path / "saved", tmp_path / "cache", ColumnNames(**names))

    with pytest.raises(ValueError, match="images in the columns photo, thumb; choose one with --image-column"):
        read()
    with pytest.raises(ValueError, match="no column remarks of --caption-column"):
        read(image="photo", caption="remarks")
    with pytest.raises(ValueError, match="expected images in remark"):
        read(image="remark")
    for name, expected in (("photo", photos), ("thumb", others)):  # the cache keeps them apart
        layout = read(image=name, caption="remark")
        file, caption, _ = layout.captions.rows[3]
        assert caption == "b 3"
        assert np.array_equal(np.asarray(Image.open(layout.folder / file)), np.asarray(expected[3]))


def test_eval_of_a_saved_data_set_is_its_test_part(load, tmp_path):
    datasets.DatasetDict({"train": make_dataset(9), "eval": make_dataset(4, 50)}).save_to_disk(tmp_path / "saved")
    check_split(load(tmp_path / "saved").split("test"), 4, 50)
