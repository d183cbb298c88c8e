"""Texts of one photo each and line-aligned files are matched with their photos; labels of detection are no captions."""

import json

import pytest
from helpers import write_image_folder

from data.format_detection import read_layout
from data.loading import open_dataset
from data.records import ColumnNames


def write(folder, files):
    """Write {path: text}; a text of None writes a file that only has the name of a photo."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"photo of " + name.encode() if text is None else text.encode())
    return folder


def read(folder, **columns):
    return read_layout(folder, columns=ColumnNames(**columns)).captions


def pairs(records):
    return sorted(row[:2] for row in records.rows)


def photos(names):
    return dict.fromkeys(names)


PAIRS = [("p/1.jpg", "a dog"), ("p/2.png", "a cat")]


@pytest.mark.parametrize(
    ("texts", "form"),
    [
        ({"p/1.txt": "a dog", "p/2.txt": "a cat"}, "*.txt"),
        ({"p/1.caption": "a dog\n", "p/2.caption": "a cat"}, "*.caption"),
        ({"p/1.captions": "a dog", "p/2.captions": "a cat"}, "*.captions"),
        ({"p/1.jpg.txt": "a dog", "p/2.png.txt": "a cat"}, "*.jpg.txt"),
        (
            {
                "p/1.json": '{"caption": "a dog", "key": "1", "url": "http://x/1.jpg"}',
                "p/2.json": '{"caption": "a cat"}',
            },
            "*.json",
        ),
        ({"p/1.json": '["a dog"]', "p/2.json": '{"text": ["a cat"], "width": 3}'}, "*.json"),
        ({"texts/1.txt": "a dog", "texts/2.txt": "a cat"}, "texts/*.txt"),
        ({"notes/beschreibung/1.txt": "a dog", "notes/beschreibung/2.txt": "a cat"}, "beschreibung/*.txt"),
        ({"captions/1.json": '{"caption": "a dog"}', "captions/2.json": '{"caption": "a cat"}'}, "captions/*.json"),
    ],
)
def test_texts_are_found_beside_the_photos_and_in_folders_of_their_own(tmp_path, texts, form):
    records = read(
        write(tmp_path, photos(["p/1.jpg", "p/2.png"]) | texts | {"README.txt": "hello", "classes.txt": "cat"})
    )
    assert pairs(records) == PAIRS and records.bad_rows == [] and form in records.format


def test_texts_in_split_folders_belong_to_the_photo_of_the_same_split(tmp_path):
    names = [f"{split}/{n}" for split in ("train", "val") for n in range(3)]
    files = {f"images/{name}.jpg": None for name in names} | {
        f"captions/{name}.txt": f"text of {name}" for name in names
    }
    records = read(write(tmp_path, files))
    assert {(image, split): text for image, text, split in records.rows} == {
        (f"images/{name}.jpg", name.partition("/")[0]): f"text of {name}" for name in names
    }
    files = {f"{split}/images/{n}.jpg": None for split in ("train", "test") for n in range(2)}
    files |= {f"{split}/texts/{n}.txt": f"{split} {n}" for split in ("train", "test") for n in range(2)}
    records = read(write(tmp_path / "other", files))
    assert all(image.startswith(f"{split}/") and text.startswith(split) for image, text, split in records.rows)
    assert len(records.rows) == 4


def test_photos_at_depth_eight_are_matched(tmp_path):
    files = {"a/b/c/d/e/f/g/1.jpg": None, "a/b/c/d/e/f/g/1.txt": "deep", "a/b/c/d/e/f/h/2.jpg": None}
    assert pairs(read(write(tmp_path, files))) == [("a/b/c/d/e/f/g/1.jpg", "deep")]


@pytest.mark.parametrize(
    "label",
    [
        "0 0.5 0.5 0.2 0.3",
        "3 0.1 0.2 0.3 0.4 0.5 0.6",
        "Car 0.00 0 -1.57 599.41 156.40 629.75 189.25",
        "7",
        "1e-3 2 .5 4 5",
    ],
)
@pytest.mark.parametrize("place", ["p/{}.txt", "labels/{}.txt"])
def test_label_files_of_detection_are_an_error_and_not_captions(tmp_path, label, place):
    files = photos([f"p/{n}.jpg" for n in range(4)]) | {place.format(n): f"{label}\n{label}\n" for n in range(3)}
    with pytest.raises(ValueError, match=r"lines of numbers, as in .*0\.txt, are labels of object detection") as error:
        read(write(tmp_path, files | {place.format(3): "", "classes.txt": "cat\ndog"}))
    assert "\n" not in str(error.value)


def test_captions_beside_label_files_are_read_and_the_labels_named(tmp_path):
    files = photos([f"images/{n}.jpg" for n in range(3)])
    files |= {f"labels/{n}.txt": "0 0.5 0.5 0.1 0.1" for n in range(3)} | {
        f"texts/{n}.txt": f"photo {n}" for n in range(3)
    }
    records = read(write(tmp_path, files))
    assert [row[1] for row in records.rows] == ["photo 0", "photo 1", "photo 2"]
    assert "labels/*.txt: lines of numbers" in records.notes[0]


def test_unusable_texts_are_bad_rows_with_their_file(tmp_path):
    files = photos([f"{n}.jpg" for n in range(6)]) | {f"{n}.txt": f"photo {n}" for n in range(3)}
    files |= {"3.txt": "", "4.txt": "long " * 20_000, "5.txt": "1 0.2 0.3 0.4 0.5"}
    bad = read(write(tmp_path, files)).bad_rows
    assert [row.partition(", line")[0].rpartition("/")[2] for row in bad] == ["3.txt", "4.txt", "5.txt"]
    assert "more than 65,536 bytes" in bad[1] and "label of object detection" in bad[2]


@pytest.mark.parametrize(
    ("encoding", "name", "texts"),
    [
        ("gb18030", "GB18030", ["一只小狗在海边奔跑", "猫", "蓝天下的草地和远处的群山", "两个孩子在公园里踢足球"]),
        (
            "cp949",
            "Korean",
            [
                "개 한 마리가 바닷가에서 뛰고 있다",
                "고양이",
                "푸른 하늘 아래 넓은 초원이 펼쳐져 있다",
                "두 아이가 공원에서 논다",
            ],
        ),
    ],
)
def test_the_encoding_of_many_short_texts_is_found_together(tmp_path, encoding, name, texts):
    write(tmp_path, photos([f"{n}.jpg" for n in range(5)]) | {"4.txt": "a plain text"})
    for n, text in enumerate(texts):
        (tmp_path / f"{n}.txt").write_bytes(text.encode(encoding))
    records = read(tmp_path)
    assert [row[1] for row in records.rows] == [*texts, "a plain text"] and name in records.notes[0]


def test_one_text_for_two_photos_is_refused(tmp_path):
    bad = read(write(tmp_path, photos(["a.jpg", "a.png", "b.jpg"]) | {"a.txt": "a dog", "b.txt": "a cat"})).bad_rows
    assert len(bad) == 1 and "found a.jpg and a.png" in bad[0]
    names = ["x/1.jpg", "y/1.jpg", "x/2.jpg"]
    bad = read(write(tmp_path / "other", photos(names) | {"t/u/v/1.txt": "a dog", "t/u/v/2.txt": "a cat"})).bad_rows
    assert len(bad) == 1 and "found x/1.jpg and y/1.jpg" in bad[0]


def test_equal_texts_of_two_kinds_are_read_once_and_different_ones_are_an_error(tmp_path):
    files = photos(["1.jpg", "2.jpg"]) | {"1.txt": "a dog\n", "1.json": '{"caption": "a dog"}', "2.caption": "a cat"}
    assert pairs(read(write(tmp_path, files))) == [("1.jpg", "a dog"), ("2.jpg", "a cat")]
    (tmp_path / "1.json").write_text('{"caption": "another"}')
    with pytest.raises(ValueError, match=r"1\.json and 1\.txt have different captions of 1\.jpg"):
        read(tmp_path)
    assert ("1.jpg", "another") in pairs(read(tmp_path, caption="json"))


def test_json_files_without_captions_beside_photos_are_not_captions(tmp_path):
    labelme = json.dumps({"version": "5", "shapes": [], "imagePath": "1.jpg", "imageData": None})
    files = photos(["1.jpg", "2.jpg"]) | {"1.json": labelme, "2.json": labelme}
    with pytest.raises(FileNotFoundError, match="no caption file"):
        read(write(tmp_path, files))
    assert pairs(read(write(tmp_path, {"1.txt": "a dog"}))) == [("1.jpg", "a dog")]


def test_folders_of_two_languages_are_told_apart(tmp_path):
    files = photos(["img/1.jpg", "img/2.jpg"])
    files |= {f"{folder}/{n}.txt": f"{folder} {n}" for folder in ("text_en", "text_fr") for n in (1, 2)}
    records = read(write(tmp_path, files))
    assert pairs(records) == [("img/1.jpg", "text_en 1"), ("img/2.jpg", "text_en 2")] and "text_fr" in records.notes[0]
    assert pairs(read(tmp_path, caption="text_fr"))[0] == ("img/1.jpg", "text_fr 1")
    files = photos(["img/1.jpg", "img/2.jpg"]) | {f"{who}/{n}.txt": who for who in ("anna", "ben") for n in (1, 2)}
    with pytest.raises(ValueError, match=r"anna/\*\.txt, ben/\*\.txt; choose one with --caption-column anna"):
        read(write(tmp_path / "other", files))


def test_a_caption_column_that_no_text_file_has_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"'title' \(--caption-column\) as a key, folder or suffix"):
        read(write(tmp_path, photos(["1.jpg"]) | {"1.txt": "a dog"}), caption="title")
    with pytest.raises(ValueError, match=r"captions in ja \(--caption-column\), found files for de"):
        read(write(tmp_path / "b", aligned(["de"])), caption="ja")
    assert "--image-column is not used" in read(tmp_path / "b", image="photo").notes[0]


def aligned(languages, *, lists="{}.txt", captions="{}.{}"):
    files = {}
    for split, count in (("train", 4), ("val", 2)):
        files |= {f"pics/{split}{n}.jpg": None for n in range(count)}
        files[lists.format(split)] = "".join(f"{split}{n}.jpg\n" for n in range(count))
        for language in languages:
            files[captions.format(split, language)] = "".join(f"{language} {split} {n}\n" for n in range(count))
    return files


@pytest.mark.parametrize(
    ("lists", "captions"),
    [("{}.txt", "{}.{}"), ("splits/{}.txt", "raw/{}.{}"), ("{}_images.txt", "{}_captions.{}"), ("{}.lst", "{}.1.{}")],
)
def test_line_aligned_files_are_read_in_english(tmp_path, lists, captions):
    records = read(write(tmp_path, aligned(["de", "en"], lists=lists, captions=captions)))
    assert sorted(records.rows)[0] == ("train0.jpg", "en train 0", "train") and len(records.rows) == 6
    assert {row[2] for row in records.rows} == {"train", "val"} and "in de" in records.notes[0]


def test_another_language_of_line_aligned_files_can_be_chosen(tmp_path):
    assert read(write(tmp_path, aligned(["de", "en"])), caption="de").rows[0][1] == "de train 0"
    only = read(write(tmp_path / "b", aligned(["cs"])))
    assert only.rows[0][1] == "cs train 0" and only.notes == []
    with pytest.raises(ValueError, match="found de, fr; choose one with --caption-column"):
        read(write(tmp_path / "c", aligned(["de", "fr"])))


def test_five_caption_files_of_a_list_are_all_read(tmp_path):
    files = aligned(["en"], captions="{}.1.{}") | {
        f"{split}.{k}.en": "".join(f"{k}\n" for _ in range(n))
        for k in (2, 3)
        for split, n in (("train", 4), ("val", 2))
    }
    assert len(read(write(tmp_path, files)).rows) == 18


def test_captions_without_names_belong_to_the_list_of_photos(tmp_path):
    files = photos(["p/x1.jpg", "p/x2.jpg"]) | {"images.txt": "x1\nx2\n", "captions.txt": "a dog runs\na cat\n"}
    assert pairs(read(write(tmp_path, files))) == [("x1", "a dog runs"), ("x2", "a cat")]


def test_files_with_different_numbers_of_lines_are_an_error_with_both(tmp_path):
    write(tmp_path, aligned(["en"]))
    (tmp_path / "val.en").write_text("one\n")
    with pytest.raises(ValueError, match=r"val\.en: expected 2 lines, one for each photo of val\.txt, found 1"):
        read(tmp_path)
    (tmp_path / "val.en").write_text("one\n\n")
    assert "val.en, line 2: expected a caption of val1.jpg" in read(tmp_path).bad_rows[0]


def test_texts_in_a_folder_of_their_own_train_like_any_other(tmp_path):
    folder = write_image_folder(tmp_path / "set", 10)
    rows = (folder / "captions.txt").read_text().splitlines()[1::2]
    (folder / "captions.txt").unlink()
    write(folder, {f"texts/{row.partition(',')[0][:-4]}.txt": row.partition(",")[2] for row in rows})
    data = open_dataset(str(folder), data_dir=None, cache_dir=str(tmp_path / "c"), split_seed=0)
    assert len(data.table) == 10 and "texts/*.txt" in data.describe_format()
