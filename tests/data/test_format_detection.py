"""Every supported format is read as downloaded or made by hand; broken rows are reported and skipped."""

import csv
import json
import re
import shutil

import numpy as np
import pytest
from helpers import unused_cache
from PIL import Image

from data.format_detection import read_layout
from data.loading import open_dataset, read_captions

RNG = np.random.default_rng(0)  # one generator for all photos, so that no two in a test are equal
ROW_ERROR = re.compile(r".+(, (line|entry|image|annotation) \d+): expected .+, found .+; .+")


def write_photos(folder, names):
    """Write small photos, all different."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(RNG.integers(0, 255, (8, 8, 3), np.uint8)).save(folder / name, format="PNG")


def write(path, text, encoding="utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding))


def load(path, **options):
    return open_dataset(str(path), **{"data_dir": None, "cache_dir": unused_cache(), "split_seed": 0} | options)


def captions_by_photo(data):
    """Return {photo path relative to the data set: captions}, and check that every photo exists."""
    captions = {}
    for name in ("train", "val", "test"):
        split = data.split(name)
        for row, caption in zip(split.caption_image_ids, split.captions, strict=True):
            assert split.paths[row].is_file()
            captions.setdefault(split.paths[row].relative_to(data.image_root).as_posix(), []).append(caption)
    return captions


def photos_by_split(data):
    return {split: {path.name for path in data.split(split).paths} for split in ("train", "val", "test")}


def photo_names(count):
    return [f"{1000 + k}_ab.jpg" for k in range(count)]


@pytest.fixture(autouse=True)
def data_folder_stays_unchanged(tmp_path, monkeypatch, tmp_path_factory):
    monkeypatch.chdir(tmp_path_factory.mktemp("work"))
    yield
    assert not list(tmp_path.rglob("*.lock"))


def test_kaggle_flickr8k_is_read(tmp_path):
    write_photos(tmp_path / "Images", photo_names(8))
    with (tmp_path / "captions.txt").open("w", newline="") as file:
        rows = [(name, f"a dog , wet , number {k}") for name in photo_names(8) for k in range(5)]
        csv.writer(file, lineterminator="\n").writerows([("image", "caption"), *rows])
    data = load(tmp_path)
    assert captions_by_photo(data) == {
        f"Images/{n}": [f"a dog , wet , number {k}" for k in range(5)] for n in photo_names(8)
    }
    assert data.format == "table with commas" and data.bad_rows == []


def write_original_flickr8k(folder):
    """Write both archives side by side; one image name has no photo of exactly that name."""
    write_photos(folder / "Flickr8k_Dataset" / "Flicker8k_Dataset", photo_names(9))
    lines = [f"{name}#{k}\tA dog number {k} runs ." for name in photo_names(8) for k in range(5)]
    lines += [f"{photo_names(9)[8]}.1#{k}\tA cat number {k} ." for k in range(5)]
    write(folder / "Flickr8k_text" / "Flickr8k.token.txt", "\n".join(lines) + "\n")
    write(folder / "Flickr8k_text" / "Flickr8k.lemma.token.txt", "\n".join(lines).replace("runs", "run") + "\n")
    for split, images in (("train", photo_names(6)[:5]), ("dev", photo_names(6)[5:]), ("test", photo_names(8)[6:])):
        write(folder / "Flickr8k_text" / f"Flickr_8k.{split}Images.txt", "\n".join(images) + "\n")
    write(folder / "Flickr8k_text" / "readme.txt", "If you publish work based on these data, please cite ...\n")


def test_original_flickr8k_is_read_with_its_split_lists(tmp_path):
    write_original_flickr8k(tmp_path)
    data = load(tmp_path)
    assert data.format == "lines of photo.jpg#number and caption"
    assert photos_by_split(data) == {
        "train": set(photo_names(5)),
        "val": {photo_names(6)[5]},
        "test": {*photo_names(8)[6:]},
    }
    assert captions_by_photo(data)[f"Flickr8k_Dataset/Flicker8k_Dataset/{photo_names(1)[0]}"] == [
        f"A dog number {k} runs ." for k in range(5)
    ]
    assert "1 images are in no split list" in data.describe() and data.missing == []


def test_split_lists_are_found_even_if_two_folders_contain_them(tmp_path):
    from data.format_detection import has_published_split
    from data.storage import list_files

    write_original_flickr8k(tmp_path)
    shutil.copytree(tmp_path / "Flickr8k_text", tmp_path / "copy", ignore=lambda _, files: set(files) & {"readme.txt"})
    for path in (tmp_path / "copy").glob("*token*"):
        path.unlink()
    assert has_published_split(list_files(tmp_path), "dataset_flickr8k.json")
    assert load(tmp_path).split_source.startswith("official")
    (tmp_path / "other").mkdir()
    for split in ("train", "val", "test"):
        write(tmp_path / "other" / f"flickr30k_{split}Images.txt", "1.jpg")
    assert not has_published_split(list_files(tmp_path / "other"), "dataset_flickr30k.json")


def test_name_ending_in_jpg_1_refers_to_the_photo_without_the_number(tmp_path):
    write_original_flickr8k(tmp_path)
    for path in (tmp_path / "Flickr8k_text").glob("*Images.txt"):
        path.unlink()
    assert len(captions_by_photo(load(tmp_path))[f"Flickr8k_Dataset/Flicker8k_Dataset/{photo_names(9)[8]}"]) == 5


def test_caption_file_can_be_passed_instead_of_its_folder(tmp_path):
    write_original_flickr8k(tmp_path)
    data = load(tmp_path / "Flickr8k_text" / "Flickr8k.lemma.token.txt")
    assert "A dog number 0 run ." in data.split("train").captions
    assert len(data.split("train").paths) == 5  # the split lists are found as well


def test_broken_lines_of_the_original_flickr8k_are_reported(tmp_path):
    write_original_flickr8k(tmp_path)
    path = tmp_path / "Flickr8k_text" / "Flickr8k.token.txt"
    lines = path.read_text().splitlines()
    lines[3], lines[7] = "no name here", f"{photo_names(2)[1]}#2"
    write(path, "\n".join(lines))
    errors = load(tmp_path).bad_rows
    assert all(map(ROW_ERROR.fullmatch, errors)) and [re.search(r"line (\d+)", error)[1] for error in errors] == [
        "4",
        "8",
    ]


def write_flickr30k(folder):
    """Write Kaggle's archive: the nested folder, and the row in which number and caption share a cell."""
    write_photos(folder / "flickr30k_images" / "flickr30k_images", photo_names(12))
    rows = [f'{name}| {k}| A "big" dog , number {k} .' for name in photo_names(12) for k in range(5)]
    rows[9] = f"{photo_names(2)[1]}| 4   A dog runs across the grass ."
    write(folder / "flickr30k_images" / "results.csv", "\n".join(["image_name| comment_number| comment", *rows]) + "\n")


def test_kaggle_flickr30k_is_read_with_its_broken_row_repaired(tmp_path):
    write_flickr30k(tmp_path)
    data = load(tmp_path)
    captions = captions_by_photo(data)
    assert len(captions) == 12 and data.bad_rows == [] and data.format == "table with pipes"
    assert captions[f"flickr30k_images/flickr30k_images/{photo_names(2)[1]}"][3:] == [
        'A "big" dog , number 3 .',
        "A dog runs across the grass .",
    ]


def test_other_broken_rows_of_flickr30k_are_reported(tmp_path):
    write_flickr30k(tmp_path)
    path = tmp_path / "flickr30k_images" / "results.csv"
    lines = path.read_text().splitlines()
    lines[5], lines[11] = f"{photo_names(1)[0]}|", f"{photo_names(3)[2]}| 0| "
    write(path, "\n".join(lines))
    errors = load(tmp_path).bad_rows
    assert all(map(ROW_ERROR.fullmatch, errors)) and [re.search(r"line (\d+)", error)[1] for error in errors] == [
        "6",
        "12",
    ]


def karpathy_json(splits, *, filepath=None):
    """Return the JSON of a Karpathy file for {name: split}."""
    images = [
        {
            **({"filepath": filepath} if filepath else {}),
            "sentids": [2 * k, 2 * k + 1],
            "imgid": k,
            "sentences": [
                {"tokens": ["a", "dog"], "raw": f"A dog, {k}.", "imgid": k, "sentid": 2 * k},
                {"tokens": ["a", "cat"], "raw": f"A cat, {k}.", "imgid": k, "sentid": 2 * k + 1},
            ],
            "split": split,
            "filename": name,
        }
        for k, (name, split) in enumerate(splits.items())
    ]
    return {"images": images, "dataset": "any"}


KARPATHY_SPLITS = dict(
    zip(photo_names(8), ("train", "restval", "val", "test", "train", "test", "val", "restval"), strict=True)
)
PHOTOS_BY_SPLIT = {
    split: {name for name, word in KARPATHY_SPLITS.items() if word in words}
    for split, words in {"train": ("train", "restval"), "val": ("val",), "test": ("test",)}.items()
}


@pytest.mark.parametrize("dataset", ["flickr8k", "flickr30k", "coco"])
def test_karpathy_file_provides_captions_and_split_with_restval_in_train(tmp_path, dataset):
    write_photos(tmp_path / "images", photo_names(8))
    write(tmp_path / f"dataset_{dataset}.json", json.dumps(karpathy_json(KARPATHY_SPLITS)))
    data = load(tmp_path)
    assert photos_by_split(data) == PHOTOS_BY_SPLIT and captions_by_photo(data)[f"images/{photo_names(1)[0]}"] == [
        "A dog, 0.",
        "A cat, 0.",
    ]


def test_karpathy_file_beside_other_captions_provides_the_split_only(tmp_path):
    write_photos(tmp_path / "Images", photo_names(8))
    write(tmp_path / "captions.txt", "image,caption\n" + "".join(f"{name},一只狗\n" for name in photo_names(8)))
    write(tmp_path / "dataset_flickr8k.json", json.dumps(karpathy_json(KARPATHY_SPLITS)))
    data = load(tmp_path)
    assert photos_by_split(data) == PHOTOS_BY_SPLIT and set(data.table.caption) == {"一只狗"}


def test_of_several_karpathy_files_the_one_that_matches_the_photos_is_used(tmp_path):
    write_photos(tmp_path / "images", photo_names(8))
    write(tmp_path / "dataset_coco.json", json.dumps(karpathy_json({f"other{k}.jpg": "train" for k in range(20)})))
    write(tmp_path / "dataset_flickr30k.json", json.dumps(karpathy_json(KARPATHY_SPLITS)))
    assert photos_by_split(load(tmp_path)) == PHOTOS_BY_SPLIT


def test_broken_images_of_a_karpathy_file_are_reported(tmp_path):
    content = karpathy_json(KARPATHY_SPLITS)
    content["images"][2]["split"] = "minival"
    del content["images"][4]["sentences"]
    content["images"][5]["sentences"][0]["raw"] = " "
    write(tmp_path / "dataset_coco.json", json.dumps(content))
    errors = read_layout(tmp_path).captions.bad_rows
    assert all(map(ROW_ERROR.fullmatch, errors)) and [re.search(r"image (\d+)", error)[1] for error in errors] == [
        "3",
        "5",
        "6",
    ]


def write_coco(folder, year, *, train=range(20), val=range(20, 26)):
    """Write annotations and photos in the layout of cocodataset.org."""
    for split, ids in (("train", train), ("val", val)):
        prefix = f"COCO_{split}2014_" if year == 2014 else ""
        file_names = {k: f"{prefix}{k:012d}.jpg" for k in ids}
        write_photos(folder / f"{split}{year}", file_names.values())
        content = {
            "info": {"description": f"COCO {year} Dataset"},
            "licenses": [{"id": 1, "name": "Attribution"}],
            "images": [
                {"license": 1, "file_name": name, "height": 8, "width": 8, "id": k} for k, name in file_names.items()
            ],
            "annotations": [
                {"image_id": k, "id": 10 * k + n, "caption": f"A dog, {split} {k}, {n}.\n"} for n in (1, 2) for k in ids
            ],
        }
        write(folder / "annotations" / f"captions_{split}{year}.json", json.dumps(content))
        write(folder / "annotations" / f"instances_{split}{year}.json", json.dumps({"images": [], "annotations": []}))


@pytest.mark.parametrize("year", [2014, 2017])
def test_original_coco_is_read_and_its_val_is_used_as_test(tmp_path, year):
    write_coco(tmp_path, year)
    data = load(tmp_path)
    assert data.format == "COCO annotations" and len(data.files) == 2
    assert {path.parent.name for path in data.split("test").paths} == {f"val{year}"} and "its val is used as test" in (
        data.split_source
    )
    assert len(data.split("train").paths) == 18 and len(data.split("val").paths) == 2
    caption = data.split("test").captions[0]
    assert re.fullmatch(r"A dog, val \d+, 1\.", caption)


@pytest.mark.parametrize("year", [2014, 2017])
def test_karpathy_split_of_coco_matches_the_photos_of_both_years(tmp_path, year):
    write_coco(tmp_path, year)
    splits = {f"COCO_{'val' if k >= 20 else 'train'}2014_{k:012d}.jpg": "train" for k in range(26)}
    splits |= dict.fromkeys(list(splits)[-6:-3], "test") | dict.fromkeys(list(splits)[-3:], "val")
    write(tmp_path / "dataset_coco.json", json.dumps(karpathy_json(splits, filepath="val2014")))
    data = load(tmp_path)
    assert [len(data.split(split).paths) for split in ("train", "val", "test")] == [20, 3, 3]
    assert {path.name[-6:] for path in data.split("test").paths} == {"20.jpg", "21.jpg", "22.jpg"}
    assert data.split_source == "Karpathy split" and data.missing == []


def test_coco_annotations_of_the_year_of_the_photos_are_read(tmp_path):
    write_coco(tmp_path, 2014)
    write_coco(tmp_path / "elsewhere", 2017)
    for path in (tmp_path / "elsewhere" / "annotations").iterdir():
        path.rename(tmp_path / "annotations" / path.name)
    for path in sorted((tmp_path / "elsewhere").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    assert {path.name for path in load(tmp_path).files} == {"captions_train2014.json", "captions_val2014.json"}


def test_broken_annotations_of_coco_are_reported(tmp_path):
    write_coco(tmp_path, 2017)
    path = tmp_path / "annotations" / "captions_train2017.json"
    content = json.loads(path.read_text())
    content["annotations"][3]["image_id"] = 999
    content["annotations"][5]["caption"] = ""
    write(path, json.dumps(content))
    errors = load(tmp_path).bad_rows
    assert all(map(ROW_ERROR.fullmatch, errors)) and [re.search(r"annotation (\d+)", error)[1] for error in errors] == [
        "4",
        "6",
    ]


def test_coco_instances_are_not_mistaken_for_captions(tmp_path):
    content = {"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": [{"image_id": 1, "bbox": [0, 0, 1, 1]}]}
    write(tmp_path / "instances_val2017.json", json.dumps(content))
    with pytest.raises(ValueError, match=r"annotation 1: expected image_id and caption, found .*captions_\*\.json"):
        read_captions(tmp_path / "instances_val2017.json")


def write_json_lists(folder):
    """Write two languages with two splits each, and Windows path separators."""
    write_photos(folder / "images", photo_names(12))
    for language, text in (("en", "a dog"), ("cn", "一只狗")):
        for split, images in (("train", photo_names(8)), ("val", photo_names(12)[8:])):
            entries = [{"image": f"images\\{name}", "caption": [f"{text} {name}", f"{text} 2"]} for name in images]
            write(folder / f"{language}_{split}.json", json.dumps(entries, ensure_ascii=split == "val"))


def test_json_lists_with_windows_path_separators_are_read(tmp_path):
    write_json_lists(tmp_path)
    data = load(tmp_path)
    assert [path.name for path in data.files] == ["en_train.json", "en_val.json"]
    assert photos_by_split(data)["test"] == set(photo_names(12)[8:])
    assert captions_by_photo(data)[f"images/{photo_names(1)[0]}"] == [f"a dog {photo_names(1)[0]}", "a dog 2"]
    assert "cn_train.json" in data.describe()


def test_passing_one_file_of_another_language_reads_all_its_splits(tmp_path):
    write_json_lists(tmp_path)
    data = load(tmp_path / "cn_val.json")
    assert [path.name for path in data.files] == ["cn_train.json", "cn_val.json"]
    assert all(caption.startswith("一只狗") for caption in data.table.caption)


def test_broken_entries_of_a_json_list_are_reported(tmp_path):
    entries = [{"image": "a.jpg", "caption": "a dog"}] * 2
    entries += [
        {"image": "b.jpg"},
        "b.jpg",
        {"image": "b.jpg", "caption": ["a dog", None]},
        {"image": "", "caption": "x"},
    ]
    write(tmp_path / "captions.json", json.dumps(entries))
    errors = read_layout(tmp_path).captions.bad_rows
    assert all(map(ROW_ERROR.fullmatch, errors))
    assert [re.search(r"entry (\d+)", error)[1] for error in errors] == ["3", "4", "5", "6"]


def test_truncated_json_is_reported_with_its_line(tmp_path):
    write(tmp_path / "captions.json", '[{"image": "a.jpg",\n "caption": "a d')
    with pytest.raises(
        ValueError, match=r"captions\.json, line 2: expected JSON, found .*; check that the file is complete"
    ):
        read_captions(tmp_path)


@pytest.mark.parametrize("valid", ["valid", "val", "dev"])
def test_train_and_valid_folders_become_splits(tmp_path, valid):
    for split, count in (("train", 12), (valid, 3)):
        write_photos(tmp_path / split / "images", photo_names(count))  # equal names, different photos
        rows = "".join(f'{name},"{split}, a dog"\n{name},{split} two\n' for name in photo_names(count))
        write(tmp_path / split / "captions.csv", f"filename,caption\n{rows}")
    data = load(tmp_path)
    captions = captions_by_photo(data)
    assert len(captions) == 15 and all(texts[0].startswith(path.split("/")[0]) for path, texts in captions.items())
    assert {path.parent.parent.name for path in data.split("test").paths} == {valid}
    assert len(data.split("train").paths) == 11 and len(data.split("val").paths) == 1


FORMATS = {
    "captions.csv": "image,caption\n{a},a dog\n{a},two dogs\n{b},a cat\n{c},a bird\n",
    "captions.txt": "{a},a dog\n{a},two dogs\n{b},a cat\n{c},a bird\n",
    "my labels.tsv": "{a}\ta dog\n{a}\ttwo dogs\n{b}\ta cat\n{c}\ta bird\n",
    "notes.tsv": "photo\ttext\n{a}\ta dog\n{a}\ttwo dogs\n{b}\ta cat\n{c}\ta bird\n",
    "beschreibung.csv": "Bild;Text\n{a};a dog\n{a};two dogs\n{b};a cat\n{c};a bird\n",
    "captions.json": '{{"{a}": ["a dog", "two dogs"], "{b}": "a cat", "{c}": ["a bird"]}}',
    "all.json": '[{{"file_name": "{a}", "text": ["a dog", "two dogs"]}}, {{"file_name": "{b}", "text": "a cat"}},'
    '{{"file_name": "{c}", "text": "a bird"}}]',
    "captions.jsonl": '{{"image": "{a}", "captions": ["a dog", "two dogs"]}}\n\n'
    '{{"image": "{b}", "caption": "a cat"}}\n{{"image": "{c}", "caption": "a bird"}}\n',
    "metadata.csv": "file_name,caption_0,caption_1\n{a},a dog,two dogs\n{b},a cat,\n{c},a bird,\n",
    "wide.tsv": "file\tcaption 1\tcaption 2\n{a}\ta dog\ttwo dogs\n{b}\ta cat\t\n{c}\ta bird\t\n",
    "list.txt": "{a} a dog\n{a} two dogs\n{b} a cat\n{c} a bird\n",
    "annotations.csv": ',raw,filename\n0,"[""a dog"", ""two dogs""]",{a}\n1,"[""a cat""]",{b}\n2,"[""a bird""]",{c}\n',
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "gb18030"])
@pytest.mark.parametrize("file", FORMATS)
def test_own_folder_is_read_in_every_format_and_encoding(tmp_path, file, encoding):
    images = {"a": "海边 的小狗.jpg", "b": "my cat.PNG", "c": "第三张.webp"}
    write_photos(tmp_path, images.values())
    text = FORMATS[file].format(**images).replace("a dog", "一只小狗在海边奔跑")
    write(tmp_path / file, text, encoding)
    data = load(tmp_path)
    assert captions_by_photo(data) == {
        images["a"]: ["一只小狗在海边奔跑", "two dogs"],
        images["b"]: ["a cat"],
        images["c"]: ["a bird"],
    }
    assert data.bad_rows == []


def test_text_file_beside_each_photo_is_read(tmp_path):
    write_photos(tmp_path, ["a.jpg", "deep/b c.png", "deep/猫.webp"])
    write(tmp_path / "a.txt", "a dog\n\ntwo dogs\n")
    write(tmp_path / "deep" / "b c.txt", "a cat")
    write(tmp_path / "deep" / "猫.txt", "一只猫坐在那里\n", "gb18030")
    write(tmp_path / "README.txt", "my photos")
    data = load(tmp_path)
    assert captions_by_photo(data) == {
        "a.jpg": ["a dog", "two dogs"],
        "deep/b c.png": ["a cat"],
        "deep/猫.webp": ["一只猫坐在那里"],
    }


def test_empty_text_file_beside_a_photo_is_reported(tmp_path):
    write_photos(tmp_path, [f"{k}.jpg" for k in range(4)])
    for k in range(4):
        write(tmp_path / f"{k}.txt", "a dog" if k else " \n")
    (error,) = load(tmp_path, allow_bad_rows=True).bad_rows
    assert ROW_ERROR.fullmatch(error) and "0.txt, line 1" in error


def test_names_may_differ_from_the_files_in_case_suffix_or_folder(tmp_path):
    write_photos(tmp_path / "pictures", ["IMG_1.JPG", "café.png", "3.jpeg", "4.jpg"])
    rows = ["img_1.jpg,a", "cafe\u0301.png,b", "3,c", "D:\\old place\\4.jpg,d"]
    write(tmp_path / "captions.csv", "image,caption\n" + "\n".join(rows))
    assert len(captions_by_photo(load(tmp_path))) == 4


def test_ambiguous_name_is_reported_and_not_guessed(tmp_path):
    write_photos(tmp_path, ["x/1.jpg", *(f"{k}.jpg" for k in range(2, 9))])
    write(tmp_path / "y" / "1.jpg", "another photo")
    write(tmp_path / "captions.csv", "image,caption\n" + "".join(f"{k}.jpg,a dog\n" for k in range(1, 9)))
    assert load(tmp_path, split_seed=1).missing == ["1.jpg (in several folders)"]


def test_different_photos_of_equal_size_are_not_taken_for_duplicates(tmp_path):
    write_photos(tmp_path, [f"{k}.jpg" for k in range(2, 9)])
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        Image.fromarray(RNG.integers(0, 255, (30, 30, 3), np.uint8)).save(tmp_path / folder / "1.bmp")
    write(tmp_path / "captions.csv", "image,caption\n1.bmp,a cat\n" + "".join(f"{k}.jpg,a dog\n" for k in range(2, 9)))
    assert load(tmp_path, split_seed=1).missing == ["1.bmp (in several folders)"]


def test_list_in_a_cell_is_read_in_json_python_and_numpy_notation(tmp_path):
    write_photos(tmp_path, photo_names(8))
    texts = ["a dog", "it's a cat"]
    cells = [json.dumps(texts), repr(texts), str(np.array(texts)), str(np.array(texts)).replace("' ", "'\n ")]
    rows = [[name, cells[k % 4]] for k, name in enumerate(photo_names(8))]
    with (tmp_path / "captions.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["image", "caption"], *rows])
    assert set(map(tuple, captions_by_photo(load(tmp_path)).values())) == {("a dog", "it's a cat")}


def test_file_of_a_single_split_does_not_replace_the_file_with_all_captions(tmp_path):
    write_photos(tmp_path, photo_names(20))
    for file, count in (("captions.csv", 20), ("captions_test.csv", 5)):
        write(tmp_path / file, "image,caption\n" + "".join(f"{name},a dog\n" for name in photo_names(count)))
    assert len(captions_by_photo(load(tmp_path))) == 20


def test_linked_caption_file_belongs_to_the_folder_of_its_link(tmp_path):
    write_photos(tmp_path / "data", photo_names(8))
    write(tmp_path / "blobs" / "0f3a", "image,caption\n" + "".join(f"{name},a dog\n" for name in photo_names(8)))
    (tmp_path / "data" / "captions.csv").symlink_to(tmp_path / "blobs" / "0f3a")
    assert captions_by_photo(load(tmp_path / "data" / "captions.csv")) == captions_by_photo(load(tmp_path / "data"))


def test_caption_file_in_a_linked_folder_finds_the_photos_beside_the_target(tmp_path):
    write_photos(tmp_path / "data" / "Images", photo_names(8))
    write(
        tmp_path / "data/text/captions.csv", "image,caption\n" + "".join(f"{name},a dog\n" for name in photo_names(8))
    )
    (tmp_path / "text").symlink_to(tmp_path / "data" / "text", target_is_directory=True)
    assert len(captions_by_photo(load(tmp_path / "text" / "captions.csv"))) == 8


def test_json_keys_with_any_image_suffix_are_recognised(tmp_path):
    images = [f"{k}.gif" for k in range(8)]
    write_photos(tmp_path, images)
    write(tmp_path / "labels.json", json.dumps({name: ["a dog"] for name in images}))
    assert set(captions_by_photo(load(tmp_path))) == set(images)


def test_split_column_decides_the_split(tmp_path):
    write_photos(tmp_path, photo_names(6))
    words = ["train", "train", "validation", "test", "training", "dev"]
    rows = "".join(f"{name},{word},a dog\n" for name, word in zip(photo_names(6), words, strict=True))
    write(tmp_path / "captions.csv", f"filename,split,caption\n{rows}")
    images = photo_names(6)
    assert photos_by_split(load(tmp_path)) == {
        "train": {images[0], images[1], images[4]},
        "val": {images[2], images[5]},
        "test": {images[3]},
    }


def test_lines_that_are_not_utf8_are_reported_and_the_others_read(tmp_path):
    rows = [f"{k}.jpg,a dog".encode() for k in range(40)]
    rows[20] = "20.jpg,ein Hund im Grünen".encode("latin-1")
    (tmp_path / "captions.csv").write_bytes(b"\n".join([b"image,caption", *rows]))
    captions = read_layout(tmp_path).captions
    assert len(captions.rows) == 39 and ROW_ERROR.fullmatch(captions.bad_rows[0])
    assert "line 22: expected UTF-8" in captions.bad_rows[0]


def test_error_for_a_folder_without_captions_lists_expected_and_existing_files(tmp_path):
    write_photos(tmp_path, ["a.jpg"])
    write(tmp_path / "notes.txt", "nothing of interest\n")
    with pytest.raises(
        FileNotFoundError, match=r"no caption file in .*expected captions\.txt.*found a\.jpg, notes\.txt"
    ):
        load(tmp_path)


def test_error_for_a_spreadsheet_suggests_csv(tmp_path):
    write_photos(tmp_path, ["a.jpg"])
    write(tmp_path / "captions.xlsx", "PK")
    with pytest.raises(FileNotFoundError, match=r"save captions\.xlsx as CSV, with the columns image and caption"):
        load(tmp_path)


def test_photo_passed_as_data_set_is_an_error(tmp_path):
    write_photos(tmp_path, ["a.jpg"])
    with pytest.raises(ValueError, match=r"expected a caption file \(\.json, .*found a\.jpg; pass its folder"):
        load(tmp_path / "a.jpg")


def test_linked_folders_are_followed_without_cycles(tmp_path):
    write_photos(tmp_path / "elsewhere", photo_names(5))
    write(tmp_path / "data" / "captions.csv", "image,caption\n" + "".join(f"{name},a dog\n" for name in photo_names(5)))
    try:
        (tmp_path / "data" / "Images").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
        (tmp_path / "data" / "again").symlink_to(tmp_path / "data", target_is_directory=True)
    except OSError:
        pytest.skip("links need rights that this user lacks")
    layout = read_layout(tmp_path / "data")
    assert (
        layout.files == sorted(["captions.csv", *(f"Images/{name}" for name in photo_names(5))])
        and layout.unused_files == []
    )
