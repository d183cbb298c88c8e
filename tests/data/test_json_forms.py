"""Captions are read from every JSON form that people bring, and what is unclear is an error with one line."""

import json

import pandas as pd
import pytest

from data.json_reader import read_json
from data.loading import read_captions
from data.records import ColumnNames

A, B = ("a.jpg", "a dog"), ("b.jpg", "a cat")
PAIRS = [("a.jpg", "a dog", None), ("b.jpg", "a cat", None)]


def read(tmp_path, content, name="data.json", **columns):
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    (tmp_path / name).write_text(text, "utf-8")
    return read_json(tmp_path / name, ColumnNames(**columns))


def error(tmp_path, content, **columns):
    with pytest.raises(ValueError) as raised:
        read(tmp_path, content, **columns)
    message = str(raised.value)
    assert "\n" not in message and message.startswith(str(tmp_path))
    return message


FORMS = {
    "JSON list": [{"image": "a.jpg", "caption": "a dog"}, {"image": "b.jpg", "caption": ["a cat"]}],
    "JSON list of images": {
        "images": [{"file_name": "a.jpg", "captions": ["a dog"]}, {"file_name": "b.jpg", "captions": ["a cat"]}]
    },
    "JSON columns of pandas": {"image": {"0": "a.jpg", "1": "b.jpg"}, "caption": {"0": "a dog", "1": "a cat"}},
    "JSON table with columns and data": {
        "columns": ["caption", "image"],
        "data": [["a dog", "a.jpg"], ["a cat", "b.jpg"]],
    },
    "JSON entries by key": {
        "0": {"file_name": "a.jpg", "text": "a dog"},
        "1": {"file_name": "b.jpg", "text": "a cat"},
    },
    "JSON lists": {"image": ["a.jpg", "b.jpg"], "caption": ["a dog", ["a cat"]]},
    "JSON rows": [["a.jpg", "a dog"], ["b.jpg", "a cat"]],
    "JSON by photo": {"a.jpg": {"captions": ["a dog"]}, "b.jpg": "a cat"},
    "COCO annotations": {
        "images": [{"id": "7", "file_name": "a.jpg"}, {"id": 8, "file_name": "b.jpg"}],
        "annotations": [{"image_id": 7, "caption": "a dog"}, {"image_id": "8", "caption": "a cat"}],
    },
    "VGG Image Annotator": {
        "_via_settings": {},
        "_via_img_metadata": {
            "a.jpg12": {"filename": "a.jpg", "size": 12, "regions": [], "file_attributes": {"caption": "a dog"}},
            "b.jpg9": {"filename": "b.jpg", "size": 9, "regions": [], "file_attributes": {"caption": "a cat"}},
        },
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_captions_and_is_named(tmp_path, form):
    records = read(tmp_path, FORMS[form])
    assert (records.rows, records.bad_rows, records.format) == (PAIRS, [], form)


@pytest.mark.parametrize("wrapper", ["data", "annotations", "items", "photos"])
def test_wrappers_around_the_entries_are_opened(tmp_path, wrapper):
    content = {"version": 2, "info": {"year": 2024}, wrapper: FORMS["JSON list"]}
    assert read(tmp_path, content).rows == PAIRS
    assert read(tmp_path, {wrapper: {"a.jpg": "a dog", "b.jpg": ["a cat"]}}).rows == PAIRS


@pytest.mark.parametrize("words", [("train", "val"), ("training", "test"), ("Train", "dev")])
def test_keys_that_are_splits_become_the_split(tmp_path, words):
    content = {words[0]: FORMS["JSON list"], words[1]: {"c.jpg": ["a bird"]}, "info": {"by": "me"}}
    records = read(tmp_path, content)
    split = {"test": "test"}.get(words[1], "val")
    assert [row[2] for row in records.rows] == ["train", "train", split] and "by split" in records.format


def test_an_unknown_split_key_is_an_error_that_names_it(tmp_path):
    assert "found probe beside train" in error(tmp_path, {"train": FORMS["JSON list"], "probe": [{"image": "c.jpg"}]})


def test_unknown_words_in_a_split_key_are_an_error(tmp_path):
    entries = [{"image": "a.jpg", "caption": "a dog", "split": word} for word in ("train", "quarantine")]
    assert "'quarantine'" in error(tmp_path, entries)


def test_synonyms_of_splits_are_read_and_other_groups_ignored(tmp_path):
    words = ["Train", "eval", "train", "test"]
    entries = [{"image": f"{n}.jpg", "caption": "a dog", "subset": word} for n, word in enumerate(words)]
    assert [row[2] for row in read(tmp_path, entries).rows] == ["train", "val", "train", "test"]
    records = read(tmp_path, [entry | {"subset": "holiday"} for entry in entries])
    assert {row[2] for row in records.rows} == {None} and "subset has no words for train" in records.notes[0]
    records = read(tmp_path, entries, split="none")
    assert {row[2] for row in records.rows} == {None}


def test_one_language_of_several_keys_is_read(tmp_path):
    entries = [{"image": "a.jpg", "caption_en": "a dog", "caption_ko": "개", "caption_zh": "狗"}]
    records = read(tmp_path, entries)
    assert [row[1] for row in records.rows] == ["a dog"] and "caption_ko" in records.notes[0]
    assert [row[1] for row in read(tmp_path, entries, caption="ko").rows] == ["개"]
    assert [row[1] for row in read(tmp_path, entries, caption="caption_en, caption_zh").rows] == ["a dog", "狗"]
    assert "found the columns" in error(tmp_path, [{"image": "a.jpg", "caption_ko": "개", "caption_zh": "狗"}])


def test_a_description_of_the_file_is_not_taken_for_an_entry(tmp_path):
    content = {"name": "my set", "description": "photos of 2024", "data": FORMS["JSON list"]}
    assert read(tmp_path, content).rows == PAIRS


def test_split_of_an_entry_by_photo_is_read(tmp_path):
    content = {
        "x/a.jpg": {"captions": ["a dog", "two"], "split": "train"},
        "b.jpg": {"caption": "a cat", "split": "val"},
    }
    assert [(row[0], row[2]) for row in read(tmp_path, content).rows] == [
        ("x/a.jpg", "train"),
        ("x/a.jpg", "train"),
        ("b.jpg", "val"),
    ]


@pytest.mark.parametrize("key", ["text", "raw", "caption", "sentence", "value"])
def test_captions_that_are_objects_are_unwrapped(tmp_path, key):
    entries = [
        {"image": "a.jpg", "captions": [{key: "a dog", "id": 4}]},
        {"image": "b.jpg", "captions": {key: ["a cat"]}},
    ]
    assert read(tmp_path, entries).rows == PAIRS


def test_nested_annotations_are_captions(tmp_path):
    images = [
        {"file_name": "a.jpg", "annotations": [{"caption": "a dog", "id": 1}]},
        {"file_name": "b.jpg", "annotations": [{"caption": "a cat", "id": 2}]},
    ]
    assert read(tmp_path, {"images": images}).rows == PAIRS and read(tmp_path, images).rows == PAIRS


def test_english_is_chosen_among_languages_and_another_can_be_named(tmp_path):
    entries = [{"image": "a.jpg", "captions": [{"text": "a dog", "language": "en"}, {"text": "犬", "language": "ja"}]}]
    records = read(tmp_path, entries)
    assert [row[1] for row in records.rows] == ["a dog"] and "en is read" in records.notes[0]
    assert [row[1] for row in read(tmp_path, entries, caption="ja").rows] == ["犬"]
    by_language = [{"image": "a.jpg", "caption": {"fr": "un chien", "de": "ein Hund"}}]
    assert "found de, fr; choose one with --caption-column" in error(tmp_path, by_language)


def test_doccano_is_read_by_its_label_and_not_by_its_empty_comments(tmp_path):
    lines = [{"id": 1, "text": "a.jpg", "label": ["a dog"], "Comments": []}]
    lines += [{"id": 2, "text": "b.jpg", "label": ["a cat"], "Comments": []}]
    assert read(tmp_path, "\n".join(map(json.dumps, lines)), "all.jsonl").rows == PAIRS
    lines = [{"id": n, "filename": name, "label": [text], "Comments": []} for n, (name, text) in enumerate([A, B])]
    assert read(tmp_path, "\n".join(map(json.dumps, lines)), "admin.jsonl").rows == PAIRS


@pytest.mark.parametrize(
    "values", [("https://x.org/1", "https://x.org/2"), ("2024-05-01", "2024-05-02"), (17, 4), ("1.mp4", "2.mp4")]
)
def test_urls_dates_numbers_and_file_names_are_never_captions(tmp_path, values):
    entries = [{"image": f"{n}.jpg", "caption": value} for n, value in enumerate(values)]
    assert "expected texts in caption" in error(tmp_path, entries)
    records = read(tmp_path, [entry | {"title": "a dog runs"} for entry in entries])
    assert [row[1] for row in records.rows] == ["a dog runs"] * 2 and "caption" in records.notes[0]


@pytest.mark.parametrize("orient", ["split", "records", "index", "columns", "table"])
def test_data_frames_are_read_in_every_orientation(tmp_path, orient):
    frame = pd.DataFrame({"n": [5, 6], "caption": ["a dog", "a cat"], "image": ["a.jpg", "b.jpg"]}, index=["x", "y"])
    records = read(tmp_path, frame.to_json(orient=orient))
    assert records.rows == PAIRS and "n" in records.notes[0].rpartition("keys not used: ")[2]


def test_rows_of_lists_may_have_the_caption_in_front_but_not_more_cells(tmp_path):
    assert read(tmp_path, [["a dog", "a.jpg"], ["a cat", "b.jpg"]]).rows == PAIRS
    assert "expected rows of an image and its caption" in error(tmp_path, [["a.jpg", "a dog", "2024-01-01"]])


def test_numbered_captions_of_an_object_are_read(tmp_path):
    assert [row[1] for row in read(tmp_path, {"a.jpg": {"captions": {"0": "one", "1": "two"}}}).rows] == ["one", "two"]


def test_keys_that_the_user_names_are_read(tmp_path):
    entries = [{"photo": "x.jpg", "datei": "a.jpg", "caption": "wrong", "satz": "a dog", "teil": "val"}]
    records = read(tmp_path, entries, image="datei", caption="satz", split="teil")
    assert records.rows == [("a.jpg", "a dog", "val")]
    records = read(tmp_path, entries, caption="absent")
    assert records.rows == [] and "expected the keys image and absent" in records.bad_rows[0]
    columns = {"datei": ["a.jpg", "b.jpg"], "satz": ["a dog", "a cat"]}
    assert read(tmp_path, columns, image="datei", caption="satz").rows == PAIRS


def test_lists_of_unequal_length_are_an_error_with_both_lengths(tmp_path):
    assert "found 2 in image, 1 in caption" in error(tmp_path, {"image": ["a.jpg", "b.jpg"], "caption": ["a dog"]})


def test_two_lists_of_captions_are_an_error_that_names_both(tmp_path):
    assert "found old, new" in error(tmp_path, {"old": FORMS["JSON list"], "new": FORMS["JSON list"]})


def test_half_an_emoji_refuses_only_its_row(tmp_path):
    text = '[{"image": "a.jpg", "caption": "a dog"}, {"image": "c.jpg", "caption": "smile \\ud83d"}, %s]'
    records = read(tmp_path, text % '{"image": "b.jpg", "caption": "a cat"}')
    assert records.rows == PAIRS and len(records.bad_rows) == 1
    assert "entry 2: expected text, found half of an emoji" in records.bad_rows[0]
    coco = {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1, "caption": "a dog"}]}
    broken = json.dumps(coco).replace("a dog", "\\ude00")
    assert "half of an emoji" in read(tmp_path, broken).bad_rows[0]
    whole = '{"a.jpg": "a \\ud83d\\ude00"}'
    assert read(tmp_path, whole).rows == [("a.jpg", "a 😀", None)]


def test_a_number_that_is_too_long_names_the_file_and_line(tmp_path):
    message = error(tmp_path, '[{"image": "a.jpg",\n"caption": "x", "size": %s}]' % ("9" * 5000))
    assert "data.json, line 2" in message and len(message) < 300
    lines = f'{{"image": "a.jpg", "caption": "a dog"}}\n{{"image": "b.jpg", "size": {"9" * 5000}}}'
    assert "line 2" in read(tmp_path, lines, "x.jsonl").bad_rows[0]


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000 + "1" + "}" * 100_000])
def test_deep_nesting_is_one_line(tmp_path, text):
    assert len(error(tmp_path, text)) < 400


def test_nesting_that_can_be_parsed_refuses_its_row_only(tmp_path):
    deep = "[" * 900 + "1" + "]" * 900
    text = f'[{{"image": "a.jpg", "caption": "a dog"}}, {{"image": "b.jpg", "caption": {deep}}}]'
    records = read(tmp_path, text)
    assert len(records.rows) == 1 and len(records.bad_rows) == 1 and len(records.bad_rows[0]) < 400


def test_a_photo_that_occurs_twice_as_a_key_is_reported(tmp_path):
    records = read(tmp_path, '{"a.jpg": "lost", "b.jpg": "a cat", "a.jpg": "a dog"}')
    assert len(records.rows) == 2 and "key 'a.jpg': expected each photo once" in records.bad_rows[0]


def test_coco_images_of_one_id_and_captions_without_image_are_refused(tmp_path):
    content = {
        "images": [{"id": 1, "file_name": "a.jpg"}, {"id": "1", "file_name": "z.jpg"}],
        "annotations": [
            {"image_id": 1, "caption": "a dog"},
            {"image_id": 2, "caption": "x"},
            {"image_id": 1, "caption": None},
        ],
    }
    records = read(tmp_path, content)
    assert records.rows == PAIRS[:1] and len(records.bad_rows) == 3


LABEL_STUDIO = {
    "id": 1,
    "data": {"image": "/data/upload/1/0a1b2c3d-beach.jpg"},
    "annotations": [
        {"was_cancelled": False, "result": [{"type": "textarea", "value": {"text": ["two kids", "the sea"]}}]},
        {"was_cancelled": True, "result": [{"type": "textarea", "value": {"text": ["skipped"]}}]},
        {"result": [{"type": "choices", "value": {"choices": ["outdoor"]}}]},
    ],
}


def test_label_studio_full_and_minimal_exports_are_read(tmp_path):
    records = read(tmp_path, [LABEL_STUDIO])
    assert records.format == "Label Studio" and [row[1] for row in records.rows] == ["two kids", "the sea"]
    minimal = [{"image": "/data/upload/1/0a1b2c3d-beach.jpg", "id": 1, "caption": {"text": ["two kids", "the sea"]}}]
    assert [row[1] for row in read(tmp_path, minimal).rows] == ["two kids", "the sea"]


def test_label_studio_names_are_matched_with_and_without_their_prefix(tmp_path):
    entries = [
        {"image": "/data/upload/7/0a1b2c3d-beach.jpg", "caption": "the sea"},
        {"image": "http://host:8080/data/upload/7/ffffffff-hill.jpg", "caption": "a hill"},
        {"image": "/data/local-files/?d=pics/my%20cat.png", "caption": "a cat"},
    ]
    for name in ("beach.jpg", "ffffffff-hill.jpg", "hill.jpg", "pics/my cat.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "export.json").write_text(json.dumps(entries))
    assert list(read_captions(tmp_path).image) == ["beach.jpg", "ffffffff-hill.jpg", "pics/my cat.png"]


def test_two_uploads_of_one_name_are_refused_and_named(tmp_path):
    names = [f"/data/upload/1/{prefix}-cat.jpg" for prefix in ("00000001", "00000002")]
    entries = [{"image": name, "caption": "a cat"} for name in names] + [{"image": "b.jpg", "caption": "b"}] * 40
    (tmp_path / "captions.json").write_text(json.dumps(entries))
    (tmp_path / "cat.jpg").write_bytes(b"x")
    from data.format_detection import read_layout

    captions = read_layout(tmp_path).captions
    assert (
        len(captions.rows) == 40 and "00000001-cat.jpg" in captions.bad_rows[0] and "00000002" in captions.bad_rows[0]
    )


def test_chinese_clip_texts_name_photos_of_their_tsv(tmp_path):
    from data.format_detection import read_layout

    for split, ids in (("train", [[1, 2], [3]]), ("valid", [["9"]]), ("test", [[]])):
        lines = [{"text_id": n, "text": f"文字 {n}", "image_ids": photos} for n, photos in enumerate(ids)]
        (tmp_path / f"{split}_texts.jsonl").write_text("\n".join(map(json.dumps, lines)))
        (tmp_path / f"{split}_imgs.tsv").write_text("1\tAAAA\n")
    layout = read_layout(tmp_path)
    assert sorted(layout.captions.rows) == [
        ("train_imgs.tsv/1.jpg", "文字 0", "train"),
        ("train_imgs.tsv/2.jpg", "文字 0", "train"),
        ("train_imgs.tsv/3.jpg", "文字 1", "train"),
        ("valid_imgs.tsv/9.jpg", "文字 0", "val"),
    ]
    assert layout.captions.bad_rows == [] and any("1 texts name no photo" in note for note in layout.captions.notes)


@pytest.mark.parametrize("content", [{}, [], 7, None, ["a.jpg", "b.jpg"], {"a": {"b": {"c": 1}}}])
def test_other_content_is_an_error_with_an_example(tmp_path, content):
    try:
        records = read(tmp_path, content)
    except ValueError as raised:
        assert "data.json, line 1" in str(raised) and "\n" not in str(raised)
    else:
        assert not records.rows and (records.bad_rows or content == {})


@pytest.mark.parametrize(
    ("word", "others", "part"), [("eval", (), "test"), ("hold-out", ("dev",), "test"), ("eval", ("test",), "val")]
)
def test_keys_that_mean_the_part_that_no_other_key_names(tmp_path, word, others, part):
    content = {key: [{"image": f"{key}.jpg", "caption": "a dog"}] for key in ("train", *others, word)}
    splits = {image: split for image, _, split in read(tmp_path, content).rows}
    assert splits["train.jpg"] == "train" and splits[f"{word}.jpg"] == part


def test_unclear_keys_of_splits_are_an_error(tmp_path):
    content = {key: [{"image": "a.jpg", "caption": "a dog"}] for key in ("train", "val", "test", "holdout")}
    assert "found holdout beside train, val, test" in error(tmp_path, content)


def test_parallel_lists_under_other_names(tmp_path):
    content = {"dateien": ["a.jpg", "b.jpg"], "texts": [["a dog"], ["a cat"]]}
    assert read(tmp_path, content).rows == PAIRS
    assert "2 in dateien, 1 in texts" in error(tmp_path, content | {"texts": ["a dog"]})
    assert "found dateien, thumbs; choose with --image-column dateien" in error(
        tmp_path, content | {"thumbs": ["ta.jpg", "tb.jpg"]}
    )
    assert read(tmp_path, content | {"thumbs": ["ta.jpg", "tb.jpg"]}, image="dateien").rows == PAIRS


@pytest.mark.parametrize("orient", ["split", "values", "records", "index", "columns", "table"])
@pytest.mark.parametrize("names", [("image", "caption"), ("img_path", "description")])
def test_exports_of_pandas_are_found_in_a_folder(tmp_path, orient, names):
    frame = pd.DataFrame([A, B], columns=list(names))
    frame.to_json(tmp_path / "export.json", orient=orient)
    (tmp_path / "a.jpg").write_bytes(b"a")
    table = read_captions(tmp_path, cache_dir=str(tmp_path / "cache"))
    assert list(zip(table.image, table.caption, strict=True)) == [A, B]
