"""Data sets as they are downloaded or made: each form is read as it comes, and a broken row is named and left out."""

import csv
import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from data.format_detection import read_layout
from data.loading import open_dataset, read_captions

UNLIKE = np.random.default_rng(0)  # no two photos of a test may look alike
FAULT = re.compile(r".+(, (line|entry|image|annotation) \d+): expected .+, found .+; .+")


def photos(folder, names):
    """Small photos, all different."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(UNLIKE.integers(0, 255, (8, 8, 3), np.uint8)).save(folder / name, format="PNG")


def write(path, text, encoding="utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding))


def opened(path, **options):
    return open_dataset(str(path), **{"data_dir": None, "cache_dir": "unused", "split_seed": 0} | options)


def captions_of(data):
    """The captions by the path of their photo below the data set's folder; each photo must be there."""
    found = {}
    for split in ("train", "val", "test"):
        part = data.split(split)
        for row, caption in zip(part.caption_image_ids, part.captions, strict=True):
            assert part.paths[row].is_file()
            found.setdefault(part.paths[row].relative_to(data.image_root).as_posix(), []).append(caption)
    return found


def parts_of(data):
    return {split: {path.name for path in data.split(split).paths} for split in ("train", "val", "test")}


def names(count):
    return [f"{1000 + k}_ab.jpg" for k in range(count)]


@pytest.fixture(autouse=True)
def reading_changes_nothing(tmp_path, monkeypatch, tmp_path_factory):
    monkeypatch.chdir(tmp_path_factory.mktemp("work"))
    yield
    assert not list(tmp_path.rglob("*.lock")) and not (tmp_path / "unused").exists()


def test_flickr8k_from_kaggle(tmp_path):
    photos(tmp_path / "Images", names(8))
    with (tmp_path / "captions.txt").open("w", newline="") as file:
        rows = [(name, f"a dog , wet , number {k}") for name in names(8) for k in range(5)]
        csv.writer(file, lineterminator="\n").writerows([("image", "caption"), *rows])
    data = opened(tmp_path)
    assert captions_of(data) == {f"Images/{n}": [f"a dog , wet , number {k}" for k in range(5)] for n in names(8)}
    assert data.form == "table with commas" and data.bad == []


def flickr8k_original(folder):
    """The two archives beside each other; one name of the captions has no photo of exactly that name."""
    photos(folder / "Flickr8k_Dataset" / "Flicker8k_Dataset", names(9))
    lines = [f"{name}#{k}\tA dog number {k} runs ." for name in names(8) for k in range(5)]
    lines += [f"{names(9)[8]}.1#{k}\tA cat number {k} ." for k in range(5)]
    write(folder / "Flickr8k_text" / "Flickr8k.token.txt", "\n".join(lines) + "\n")
    write(folder / "Flickr8k_text" / "Flickr8k.lemma.token.txt", "\n".join(lines).replace("runs", "run") + "\n")
    for part, chosen in (("train", names(6)[:5]), ("dev", names(6)[5:]), ("test", names(8)[6:])):
        write(folder / "Flickr8k_text" / f"Flickr_8k.{part}Images.txt", "\n".join(chosen) + "\n")
    write(folder / "Flickr8k_text" / "readme.txt", "If you publish work based on these data, please cite ...\n")


def test_the_original_flickr8k(tmp_path):
    flickr8k_original(tmp_path)
    data = opened(tmp_path)
    assert data.form == "lines of photo.jpg#number and caption"
    assert parts_of(data) == {"train": set(names(5)), "val": {names(6)[5]}, "test": {*names(8)[6:]}}
    assert captions_of(data)[f"Flickr8k_Dataset/Flicker8k_Dataset/{names(1)[0]}"] == [
        f"A dog number {k} runs ." for k in range(5)
    ]
    assert "1 images are on no list" in data.describe() and data.missing == []


def test_the_lists_are_found_in_two_folders_too(tmp_path):
    from data.format_detection import has_published_split

    flickr8k_original(tmp_path)
    shutil.copytree(tmp_path / "Flickr8k_text", tmp_path / "copy", ignore=lambda _, files: set(files) & {"readme.txt"})
    for path in (tmp_path / "copy").glob("*token*"):
        path.unlink()
    assert has_published_split(tmp_path, "dataset_flickr8k.json") and opened(tmp_path).split_source.startswith(
        "official"
    )
    (tmp_path / "other").mkdir()
    for part in ("train", "val", "test"):
        write(tmp_path / "other" / f"flickr30k_{part}Images.txt", "1.jpg")
    assert not has_published_split(tmp_path / "other", "dataset_flickr30k.json")


def test_a_name_that_ends_in_jpg_1_is_the_photo_without_it(tmp_path):
    flickr8k_original(tmp_path)
    for path in (tmp_path / "Flickr8k_text").glob("*Images.txt"):
        path.unlink()
    assert len(captions_of(opened(tmp_path))[f"Flickr8k_Dataset/Flicker8k_Dataset/{names(9)[8]}"]) == 5


def test_a_file_may_be_named_instead_of_its_folder_and_its_photos_lie_beside_it(tmp_path):
    flickr8k_original(tmp_path)
    data = opened(tmp_path / "Flickr8k_text" / "Flickr8k.lemma.token.txt")
    assert "A dog number 0 run ." in data.split("train").captions
    assert len(data.split("train").paths) == 5  # the lists are found from there too


def test_a_line_of_the_original_flickr8k_without_its_number_is_named(tmp_path):
    flickr8k_original(tmp_path)
    path = tmp_path / "Flickr8k_text" / "Flickr8k.token.txt"
    lines = path.read_text().splitlines()
    lines[3], lines[7] = "no name here", f"{names(2)[1]}#2"
    write(path, "\n".join(lines))
    bad = opened(tmp_path).bad
    assert all(map(FAULT.fullmatch, bad)) and [re.search(r"line (\d+)", fault)[1] for fault in bad] == ["4", "8"]


def flickr30k(folder):
    """As Kaggle gives it: the doubled folder, and the row without its second bar (here without its number's, too)."""
    photos(folder / "flickr30k_images" / "flickr30k_images", names(12))
    rows = [f'{name}| {k}| A "big" dog , number {k} .' for name in names(12) for k in range(5)]
    rows[9] = f"{names(2)[1]}| 4   A dog runs across the grass ."
    write(folder / "flickr30k_images" / "results.csv", "\n".join(["image_name| comment_number| comment", *rows]) + "\n")


def test_flickr30k_from_kaggle_with_its_broken_row(tmp_path):
    flickr30k(tmp_path)
    data = opened(tmp_path)
    found = captions_of(data)
    assert len(found) == 12 and data.bad == [] and data.form == "table with bars"
    assert found[f"flickr30k_images/flickr30k_images/{names(2)[1]}"][3:] == [
        'A "big" dog , number 3 .',
        "A dog runs across the grass .",
    ]


def test_other_broken_rows_of_flickr30k_are_named(tmp_path):
    flickr30k(tmp_path)
    path = tmp_path / "flickr30k_images" / "results.csv"
    lines = path.read_text().splitlines()
    lines[5], lines[11] = f"{names(1)[0]}|", f"{names(3)[2]}| 0| "
    write(path, "\n".join(lines))
    bad = opened(tmp_path).bad
    assert all(map(FAULT.fullmatch, bad)) and [re.search(r"line (\d+)", fault)[1] for fault in bad] == ["6", "12"]


def karpathy(chosen, *, filepath=None):
    """The JSON of Karpathy's archive for {name: split}."""
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
        for k, (name, split) in enumerate(chosen.items())
    ]
    return {"images": images, "dataset": "any"}


SPLITS = dict(zip(names(8), ("train", "restval", "val", "test", "train", "test", "val", "restval"), strict=True))
PARTS = {
    part: {name for name, split in SPLITS.items() if split in words}
    for part, words in {"train": ("train", "restval"), "val": ("val",), "test": ("test",)}.items()
}


@pytest.mark.parametrize("dataset", ["flickr8k", "flickr30k", "coco"])
def test_karpathys_file_gives_captions_and_split_and_restval_is_trained_on(tmp_path, dataset):
    photos(tmp_path / "images", names(8))
    write(tmp_path / f"dataset_{dataset}.json", json.dumps(karpathy(SPLITS)))
    data = opened(tmp_path)
    assert parts_of(data) == PARTS and captions_of(data)[f"images/{names(1)[0]}"] == ["A dog, 0.", "A cat, 0."]


def test_karpathys_file_beside_other_captions_gives_the_split_alone(tmp_path):
    photos(tmp_path / "Images", names(8))
    write(tmp_path / "captions.txt", "image,caption\n" + "".join(f"{name},一只狗\n" for name in names(8)))
    write(tmp_path / "dataset_flickr8k.json", json.dumps(karpathy(SPLITS)))
    data = opened(tmp_path)
    assert parts_of(data) == PARTS and set(data.table.caption) == {"一只狗"}


def test_of_several_of_karpathys_files_the_one_of_these_photos_is_taken(tmp_path):
    photos(tmp_path / "images", names(8))
    write(tmp_path / "dataset_coco.json", json.dumps(karpathy({f"other{k}.jpg": "train" for k in range(20)})))
    write(tmp_path / "dataset_flickr30k.json", json.dumps(karpathy(SPLITS)))
    assert parts_of(opened(tmp_path)) == PARTS


def test_broken_images_of_karpathys_file_are_named(tmp_path):
    content = karpathy(SPLITS)
    content["images"][2]["split"] = "minival"
    del content["images"][4]["sentences"]
    content["images"][5]["sentences"][0]["raw"] = " "
    write(tmp_path / "dataset_coco.json", json.dumps(content))
    bad = read_layout(tmp_path).captions.bad
    assert all(map(FAULT.fullmatch, bad)) and [re.search(r"image (\d+)", fault)[1] for fault in bad] == ["3", "5", "6"]


def coco(folder, year, *, train=range(20), val=range(20, 26)):
    """Annotations and photos as they come from cocodataset.org."""
    for part, ids in (("train", train), ("val", val)):
        prefix = f"COCO_{part}2014_" if year == 2014 else ""
        has_flag = {k: f"{prefix}{k:012d}.jpg" for k in ids}
        photos(folder / f"{part}{year}", has_flag.values())
        content = {
            "info": {"description": f"COCO {year} Dataset"},
            "licenses": [{"id": 1, "name": "Attribution"}],
            "images": [
                {"license": 1, "file_name": name, "height": 8, "width": 8, "id": k} for k, name in has_flag.items()
            ],
            "annotations": [
                {"image_id": k, "id": 10 * k + n, "caption": f"A dog, {part} {k}, {n}.\n"} for n in (1, 2) for k in ids
            ],
        }
        write(folder / "annotations" / f"captions_{part}{year}.json", json.dumps(content))
        write(folder / "annotations" / f"instances_{part}{year}.json", json.dumps({"images": [], "annotations": []}))


@pytest.mark.parametrize("year", [2014, 2017])
def test_coco_from_its_site(tmp_path, year):
    coco(tmp_path, year)
    data = opened(tmp_path)
    assert data.form == "COCO annotations" and len(data.files) == 2
    assert {path.parent.name for path in data.split("test").paths} == {f"val{year}"} and "its val is the test" in (
        data.split_source
    )
    assert len(data.split("train").paths) == 18 and len(data.split("val").paths) == 2
    caption = data.split("test").captions[0]
    assert re.fullmatch(r"A dog, val \d+, 1\.", caption)


@pytest.mark.parametrize("year", [2014, 2017])
def test_karpathys_split_of_coco_serves_the_photos_of_both_years(tmp_path, year):
    coco(tmp_path, year)
    of_2014 = {f"COCO_{'val' if k >= 20 else 'train'}2014_{k:012d}.jpg": "train" for k in range(26)}
    of_2014 |= dict.fromkeys(list(of_2014)[-6:-3], "test") | dict.fromkeys(list(of_2014)[-3:], "val")
    write(tmp_path / "dataset_coco.json", json.dumps(karpathy(of_2014, filepath="val2014")))
    data = opened(tmp_path)
    assert [len(data.split(split).paths) for split in ("train", "val", "test")] == [20, 3, 3]
    assert {path.name[-6:] for path in data.split("test").paths} == {"20.jpg", "21.jpg", "22.jpg"}
    assert data.split_source == "Karpathy split" and data.missing == []


def test_of_cocos_years_the_one_is_read_whose_photos_are_there(tmp_path):
    coco(tmp_path, 2014)
    coco(tmp_path / "elsewhere", 2017)
    for path in (tmp_path / "elsewhere" / "annotations").iterdir():
        path.rename(tmp_path / "annotations" / path.name)
    for path in sorted((tmp_path / "elsewhere").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    assert {path.name for path in opened(tmp_path).files} == {"captions_train2014.json", "captions_val2014.json"}


def test_broken_annotations_of_coco_are_named(tmp_path):
    coco(tmp_path, 2017)
    path = tmp_path / "annotations" / "captions_train2017.json"
    content = json.loads(path.read_text())
    content["annotations"][3]["image_id"] = 999
    content["annotations"][5]["caption"] = ""
    write(path, json.dumps(content))
    bad = opened(tmp_path).bad
    assert all(map(FAULT.fullmatch, bad)) and [re.search(r"annotation (\d+)", fault)[1] for fault in bad] == ["4", "6"]


def test_cocos_other_annotations_are_told_from_its_captions(tmp_path):
    content = {"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": [{"image_id": 1, "bbox": [0, 0, 1, 1]}]}
    write(tmp_path / "instances_val2017.json", json.dumps(content))
    with pytest.raises(ValueError, match=r"annotation 1: expected image_id and caption, found .*captions_\*\.json"):
        read_captions(tmp_path / "instances_val2017.json")


def json_lists(folder):
    """Two languages, two parts each, and Windows' separators."""
    photos(folder / "images", names(12))
    for language, text in (("en", "a dog"), ("cn", "一只狗")):
        for part, chosen in (("train", names(8)), ("val", names(12)[8:])):
            entries = [{"image": f"images\\{name}", "caption": [f"{text} {name}", f"{text} 2"]} for name in chosen]
            write(folder / f"{language}_{part}.json", json.dumps(entries, ensure_ascii=part == "val"))


def test_json_lists_with_windows_separators(tmp_path):
    json_lists(tmp_path)
    data = opened(tmp_path)
    assert [path.name for path in data.files] == ["en_train.json", "en_val.json"]
    assert parts_of(data)["test"] == set(names(12)[8:])
    assert captions_of(data)[f"images/{names(1)[0]}"] == [f"a dog {names(1)[0]}", "a dog 2"]
    assert "cn_train.json" in data.describe()


def test_naming_one_file_of_another_language_takes_its_parts(tmp_path):
    json_lists(tmp_path)
    data = opened(tmp_path / "cn_val.json")
    assert [path.name for path in data.files] == ["cn_train.json", "cn_val.json"]
    assert all(caption.startswith("一只狗") for caption in data.table.caption)


def test_broken_entries_of_a_json_list_are_named(tmp_path):
    entries = [{"image": "a.jpg", "caption": "a dog"}] * 2
    entries += [
        {"image": "b.jpg"},
        "b.jpg",
        {"image": "b.jpg", "caption": ["a dog", None]},
        {"image": "", "caption": "x"},
    ]
    write(tmp_path / "captions.json", json.dumps(entries))
    bad = read_layout(tmp_path).captions.bad
    assert all(map(FAULT.fullmatch, bad))
    assert [re.search(r"entry (\d+)", fault)[1] for fault in bad] == ["3", "4", "5", "6"]


def test_json_that_is_cut_off_is_named_with_its_line(tmp_path):
    write(tmp_path / "captions.json", '[{"image": "a.jpg",\n "caption": "a d')
    with pytest.raises(ValueError, match=r"captions\.json, line 2: expected JSON, found .*; is the file whole"):
        read_captions(tmp_path)


@pytest.mark.parametrize("valid", ["valid", "val", "dev"])
def test_train_and_valid_folders(tmp_path, valid):
    for part, count in (("train", 12), (valid, 3)):
        photos(tmp_path / part / "images", names(count))  # the same names in both, and other photos
        rows = "".join(f'{name},"{part}, a dog"\n{name},{part} two\n' for name in names(count))
        write(tmp_path / part / "captions.csv", f"filename,caption\n{rows}")
    data = opened(tmp_path)
    found = captions_of(data)
    assert len(found) == 15 and all(texts[0].startswith(path.split("/")[0]) for path, texts in found.items())
    assert {path.parent.parent.name for path in data.split("test").paths} == {valid}
    assert len(data.split("train").paths) == 11 and len(data.split("val").paths) == 1


OWN = {
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
    "wide.tsv": "{a}\ta dog\ttwo dogs\n{b}\ta cat\t\n{c}\ta bird\t\n",
    "list.txt": "{a} a dog\n{a} two dogs\n{b} a cat\n{c} a bird\n",
    "annotations.csv": ',raw,filename\n0,"[""a dog"", ""two dogs""]",{a}\n1,"[""a cat""]",{b}\n2,"[""a bird""]",{c}\n',
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "gb18030"])
@pytest.mark.parametrize("file", OWN)
def test_ones_own_folder_in_any_form_and_encoding(tmp_path, file, encoding):
    chosen = {"a": "海边 的小狗.jpg", "b": "my cat.PNG", "c": "第三张.webp"}
    photos(tmp_path, chosen.values())
    text = OWN[file].format(**chosen).replace("a dog", "一只小狗在海边奔跑")
    write(tmp_path / file, text, encoding)
    data = opened(tmp_path)
    assert captions_of(data) == {
        chosen["a"]: ["一只小狗在海边奔跑", "two dogs"],
        chosen["b"]: ["a cat"],
        chosen["c"]: ["a bird"],
    }
    assert data.bad == []


def test_a_text_beside_each_photo(tmp_path):
    photos(tmp_path, ["a.jpg", "deep/b c.png", "deep/猫.webp"])
    write(tmp_path / "a.txt", "a dog\n\ntwo dogs\n")
    write(tmp_path / "deep" / "b c.txt", "a cat")
    write(tmp_path / "deep" / "猫.txt", "一只猫坐在那里\n", "gb18030")
    write(tmp_path / "README.txt", "my photos")
    data = opened(tmp_path)
    assert captions_of(data) == {
        "a.jpg": ["a dog", "two dogs"],
        "deep/b c.png": ["a cat"],
        "deep/猫.webp": ["一只猫坐在那里"],
    }


def test_an_empty_text_beside_a_photo_is_named(tmp_path):
    photos(tmp_path, [f"{k}.jpg" for k in range(4)])
    for k in range(4):
        write(tmp_path / f"{k}.txt", "a dog" if k else " \n")
    (fault,) = opened(tmp_path, allow_bad_rows=True).bad
    assert FAULT.fullmatch(fault) and "0.txt, line 1" in fault


def test_names_may_differ_from_the_files_in_capitals_ending_or_folder(tmp_path):
    photos(tmp_path / "pictures", ["IMG_1.JPG", "café.png", "3.jpeg", "4.jpg"])
    rows = ["img_1.jpg,a", "cafe\u0301.png,b", "3,c", "D:\\old place\\4.jpg,d"]
    write(tmp_path / "captions.csv", "image,caption\n" + "\n".join(rows))
    assert len(captions_of(opened(tmp_path))) == 4


def test_a_name_that_could_be_two_photos_is_not_guessed(tmp_path):
    photos(tmp_path, ["x/1.jpg", *(f"{k}.jpg" for k in range(2, 9))])
    write(tmp_path / "y" / "1.jpg", "another photo")
    write(tmp_path / "captions.csv", "image,caption\n" + "".join(f"{k}.jpg,a dog\n" for k in range(1, 9)))
    assert opened(tmp_path, split_seed=1).missing == ["1.jpg (in several folders)"]


def test_photos_of_one_size_are_not_taken_for_copies(tmp_path):
    photos(tmp_path, [f"{k}.jpg" for k in range(2, 9)])
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        Image.fromarray(UNLIKE.integers(0, 255, (30, 30, 3), np.uint8)).save(tmp_path / folder / "1.bmp")
    write(tmp_path / "captions.csv", "image,caption\n1.bmp,a cat\n" + "".join(f"{k}.jpg,a dog\n" for k in range(2, 9)))
    assert opened(tmp_path, split_seed=1).missing == ["1.bmp (in several folders)"]


def test_a_list_in_a_cell_is_read_as_json_python_or_numpy_writes_it(tmp_path):
    photos(tmp_path, names(8))
    texts = ["a dog", "it's a cat"]
    cells = [json.dumps(texts), repr(texts), str(np.array(texts)), str(np.array(texts)).replace("' ", "'\n ")]
    rows = [[name, cells[k % 4]] for k, name in enumerate(names(8))]
    with (tmp_path / "captions.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["image", "caption"], *rows])
    assert set(map(tuple, captions_of(opened(tmp_path)).values())) == {("a dog", "it's a cat")}


def test_a_lone_file_of_one_part_does_not_stand_for_all(tmp_path):
    photos(tmp_path, names(20))
    for file, count in (("captions.csv", 20), ("captions_test.csv", 5)):
        write(tmp_path / file, "image,caption\n" + "".join(f"{name},a dog\n" for name in names(count)))
    assert len(captions_of(opened(tmp_path))) == 20


def test_a_linked_caption_file_is_where_its_link_is(tmp_path):
    photos(tmp_path / "data", names(8))
    write(tmp_path / "blobs" / "0f3a", "image,caption\n" + "".join(f"{name},a dog\n" for name in names(8)))
    (tmp_path / "data" / "captions.csv").symlink_to(tmp_path / "blobs" / "0f3a")
    assert captions_of(opened(tmp_path / "data" / "captions.csv")) == captions_of(opened(tmp_path / "data"))


def test_a_caption_file_in_a_linked_folder_finds_the_photos_beside_that_folder(tmp_path):
    photos(tmp_path / "data" / "Images", names(8))
    write(tmp_path / "data/text/captions.csv", "image,caption\n" + "".join(f"{name},a dog\n" for name in names(8)))
    (tmp_path / "text").symlink_to(tmp_path / "data" / "text", target_is_directory=True)
    assert len(captions_of(opened(tmp_path / "text" / "captions.csv"))) == 8


def test_captions_by_the_names_of_photos_of_any_kind_are_recognised(tmp_path):
    of = [f"{k}.gif" for k in range(8)]
    photos(tmp_path, of)
    write(tmp_path / "labels.json", json.dumps({name: ["a dog"] for name in of}))
    assert set(captions_of(opened(tmp_path))) == set(of)


def test_a_column_may_say_the_split(tmp_path):
    photos(tmp_path, names(6))
    words = ["train", "train", "validation", "test", "training", "dev"]
    rows = "".join(f"{name},{word},a dog\n" for name, word in zip(names(6), words, strict=True))
    write(tmp_path / "captions.csv", f"filename,split,caption\n{rows}")
    n = names(6)
    assert parts_of(opened(tmp_path)) == {"train": {n[0], n[1], n[4]}, "val": {n[2], n[5]}, "test": {n[3]}}


def test_lines_that_are_not_utf8_are_named_and_the_others_read(tmp_path):
    rows = [f"{k}.jpg,a dog".encode() for k in range(40)]
    rows[20] = "20.jpg,ein Hund im Grünen".encode("latin-1")
    (tmp_path / "captions.csv").write_bytes(b"\n".join([b"image,caption", *rows]))
    captions = read_layout(tmp_path).captions
    assert len(captions.rows) == 39 and FAULT.fullmatch(captions.bad[0])
    assert "line 22: expected UTF-8" in captions.bad[0]


def test_a_folder_without_captions_says_what_was_expected_and_what_is_there(tmp_path):
    photos(tmp_path, ["a.jpg"])
    write(tmp_path / "notes.txt", "nothing of interest\n")
    with pytest.raises(
        FileNotFoundError, match=r"no caption file in .*expected captions\.txt.*found a\.jpg, notes\.txt"
    ):
        opened(tmp_path)


def test_a_spreadsheet_is_told_to_be_saved_as_csv(tmp_path):
    photos(tmp_path, ["a.jpg"])
    write(tmp_path / "captions.xlsx", "PK")
    with pytest.raises(FileNotFoundError, match=r"save captions\.xlsx as CSV, with the columns image and caption"):
        opened(tmp_path)


def test_a_photo_given_as_data_set_is_refused(tmp_path):
    photos(tmp_path, ["a.jpg"])
    with pytest.raises(ValueError, match=r"expected a caption file \(\.json, .*found a\.jpg; pass its folder"):
        opened(tmp_path / "a.jpg")


def test_linked_folders_are_followed_but_not_in_circles(tmp_path):
    photos(tmp_path / "elsewhere", names(5))
    write(tmp_path / "data" / "captions.csv", "image,caption\n" + "".join(f"{name},a dog\n" for name in names(5)))
    try:
        (tmp_path / "data" / "Images").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
        (tmp_path / "data" / "again").symlink_to(tmp_path / "data", target_is_directory=True)
    except OSError:
        pytest.skip("links need rights that this user lacks")
    layout = read_layout(tmp_path / "data")
    assert layout.files == sorted(["captions.csv", *(f"Images/{name}" for name in names(5))]) and layout.others == []
