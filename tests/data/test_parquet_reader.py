"""Parquet under any name, without `datasets`: photos as bytes, as {bytes, path}, as paths."""

import io
import sys

import numpy as np
import pytest
from helpers import write_image_folder
from PIL import Image

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

from data.loading import open_dataset  # noqa: E402


@pytest.fixture(autouse=True)
def without_datasets(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)


def load(path, **options):
    cache = path.parent / "cache" if path.is_file() else path.with_name("cache")
    return open_dataset(str(path), data_dir=None, cache_dir=str(cache), split_seed=0, **options)


def png(number):
    content = io.BytesIO()
    Image.fromarray(np.full((6, 5, 3), number, np.uint8)).save(content, "PNG")
    return content.getvalue()


def write(path, count=12, first=0, kind="bytes", **extra):
    photos = [png(first + row) for row in range(count)]
    if kind == "struct":
        photos = [{"bytes": data, "path": f"../{row}.png"} for row, data in enumerate(photos)]
    captions = [f"picture {first + row}" for row in range(count)]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"jpg" if kind == "bytes" else "image": photos, "caption": captions, **extra}), path)
    return path


@pytest.mark.parametrize("kind", ["bytes", "struct"])
@pytest.mark.parametrize("name", ["photos.parquet", "part-00007.snappy.parquet", "sub/x.parquet"])
def test_any_name_and_photos_as_bytes(tmp_path, kind, name):
    write(tmp_path / "set" / name, kind=kind)
    data = load(tmp_path / "set")
    assert len(data.table) == 12
    for split in ("train", "val", "test"):
        for path, caption in zip(data.split(split).paths, data.split(split).captions, strict=True):
            assert f"picture {np.asarray(Image.open(path))[0, 0, 0]}" == caption
    assert len(load(tmp_path / "set" / name).table) == 12


@pytest.mark.parametrize(
    "layout", ["default/{}/0000.parquet", "default/partial-{}/0000.parquet", "data/{}-0-of-1.parquet"]
)
def test_splits_in_the_layouts_of_the_hub(tmp_path, layout):
    for split, first, count in (("train", 0, 7), ("validation", 50, 2), ("test", 90, 3)):
        write(tmp_path / "hub" / layout.format(split), count, first, "struct")
    data = load(tmp_path / "hub")
    assert [len(data.split(split).paths) for split in ("train", "val", "test")] == [7, 2, 3]
    assert "picture 90" in data.split("test").captions


def test_two_configurations_are_named(tmp_path):
    for language in ("en", "fr"):
        write(tmp_path / "hub" / language / "train" / "0000.parquet")
    with pytest.raises(ValueError, match=r"several data sets \(en/ and fr/\)"):
        load(tmp_path / "hub")


def test_paths_relative_to_the_folder(tmp_path):
    folder = write_image_folder(tmp_path / "set", 10)
    (folder / "captions.txt").unlink()
    names = sorted(path.name for path in (folder / "Images").iterdir())
    table = pa.table({"file_name": [f"Images/{name}" for name in names], "text": [f"text of {name}" for name in names]})
    pq.write_table(table, folder / "list.parquet")
    data = load(folder)
    assert sorted(data.table.caption) == [f"text of {name}" for name in names]
    assert data.split("train").paths[0].parent == folder / "Images"


def test_metadata_does_not_win_over_captions(tmp_path):
    folder = write_image_folder(tmp_path / "set", 10)
    pq.write_table(pa.table({"url": ["u"], "caption": ["wrong"]}), folder / "00000.parquet")
    data = load(folder)
    assert "wrong" not in set(data.table.caption) and any("00000.parquet" in note for note in data.notes)


def test_damaged_and_other_files(tmp_path):
    whole = write(tmp_path / "set" / "a.parquet").read_bytes()
    (tmp_path / "set" / "a.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"a\.parquet is truncated or no parquet file"):
        load(tmp_path / "set")
    pq.write_table(pa.table({"x": [1.0], "y": [2.0]}), tmp_path / "set" / "a.parquet")
    with pytest.raises(ValueError, match="expected a column of photos and one of captions, found x, y"):
        load(tmp_path / "set")


def test_without_pyarrow(tmp_path, monkeypatch):
    write(tmp_path / "set" / "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match="pip install pyarrow"):
        load(tmp_path / "set")


def test_rows_without_photo_are_named(tmp_path):
    path = write(tmp_path / "set" / "a.parquet", 40)
    columns = pq.read_table(path).to_pydict()
    columns["jpg"][3] = None
    pq.write_table(pa.table(columns), path)
    data = load(tmp_path / "set")
    assert len(data.bad_rows) == 1 and "row 3: expected a photo in jpg" in data.bad_rows[0]


def test_ignored_columns_are_named_and_txt_is_a_caption(tmp_path):
    photos = [png(row) for row in range(12)]
    columns = {"jpg": photos, "txt": [f"picture {k}" for k in range(12)], "__key__": [str(k) for k in range(12)]}
    (tmp_path / "set").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "set" / "0.parquet")
    assert "columns read: jpg, txt; ignored: __key__" in load(tmp_path / "set").describe()
