"""CSV exports of annotation tools keep their captions in objects, and Label Studio gives uploads other names."""

import csv
import json

import pytest

from data.annotation_tools import resolve_uploads
from data.caption_rows import CaptionRows
from data.format_detection import read_layout
from data.records import CaptionRecords, ColumnNames


def write_csv(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def test_csv_of_label_studio_is_read_with_its_uploaded_names(tmp_path):
    (tmp_path / "sea.jpg").write_bytes(b"x")
    rows = [["image", "id", "caption", "annotator", "annotation_id", "lead_time"]]
    rows += [["/data/upload/3/12345678-sea.jpg", 1, json.dumps({"text": ["the sea", "big waves"]}), 1, 5, 3.2]]
    rows += [["/data/upload/3/12345678-sea.jpg", 1, "a windy day", 2, 6, 1.2]]
    write_csv(tmp_path / "project-3.csv", rows)
    captions = read_layout(tmp_path).captions
    assert [row[:2] for row in captions.rows] == [("sea.jpg", t) for t in ("the sea", "big waves", "a windy day")]


def test_csv_of_vgg_image_annotator_is_read(tmp_path):
    header = "filename file_size file_attributes region_count region_id region_shape_attributes region_attributes"
    rows = [[f"{k}.jpg", 10, json.dumps({"caption": f"a dog number {k}"}), 0, 0, "{}", "{}"] for k in range(3)]
    write_csv(tmp_path / "via_export.csv", [header.split(), *rows])
    captions = read_layout(tmp_path, columns=ColumnNames(caption="file_attributes")).captions
    assert [row[:2] for row in captions.rows] == [(f"{k}.jpg", f"a dog number {k}") for k in range(3)]


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("/data/upload/1/0a1b2c3d-dog_1.jpg", "dog_1.jpg"),
        ("data/upload/1/deadbeef-dog%201.jpg", "dog 1.jpg"),
        ("https://studio.example/data/upload/22/deadbeef-a-b.png?x=1", "a-b.png"),
        ("/data/upload/1/12345678-kept.jpg", "12345678-kept.jpg"),
        ("/data/upload/1/plain.jpg", "plain.jpg"),
        ("/data/local-files/?d=set/one/dog.jpg", "set/one/dog.jpg"),
        ("/data/local-files/?d=C%3A%5Cset%5Cdog.jpg", "C:/set/dog.jpg"),
        ("images/deadbeef-dog.jpg", "images/deadbeef-dog.jpg"),
    ],
)
def test_addresses_of_label_studio_become_file_names(address, name):
    records = CaptionRecords("JSON list", [], rows=CaptionRows([(address, "a dog", None)]))
    resolve_uploads(records, ["x/12345678-kept.jpg"])
    assert records.rows == [(name, "a dog", None)]
