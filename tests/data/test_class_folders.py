"""Class folders as a data set: which folders are classes, their names, splits and captions, and what is refused."""

from collections import Counter

import pytest
from helpers import run_script
from PIL import Image

from data.class_folders import find_class_folders
from data.class_names import class_names
from data.format_detection import read_layout
from data.loading import open_dataset
from data.splits import random_split, stratified_split


def write_photos(folder, counts, suffix=".jpg"):
    """Write `counts[path]` empty files as photos into each path below the folder."""
    for path, count in counts.items():
        (folder / path).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            (folder / path / f"{number:03d}{suffix}").write_bytes(f"{path} {number}".encode())
    return folder


def open_folder(folder, **options):
    return open_dataset(str(folder), data_dir=None, cache_dir="cache", split_seed=0, **options)


def label_of(folder, counts):
    files = [f"{path}/{number}.png" for path, count in counts.items() for number in range(count)]
    return find_class_folders(folder, files)


def test_class_folders_are_a_data_set_with_captions_from_templates(tmp_path):
    write_photos(tmp_path, {"golden_retriever": 10, "Egyptian-Mau": 10, "owl": 10})
    data = open_folder(tmp_path)
    captions = data.table[data.table.image == "owl/003.jpg"].caption.tolist()
    assert captions == ["owl", "a photo of an owl", "a picture of an owl", "there is an owl in the photo"]
    assert "golden retriever" in set(data.table.caption) and data.classes["Egyptian-Mau/001.jpg"] == "Egyptian Mau"
    described = data.describe()
    assert "no caption file: read as 3 classes by folder name: Egyptian Mau, golden retriever, owl;" in described
    assert "stratified by class" in described


def test_a_random_split_has_the_same_share_of_each_class_as_of_all_photos():
    class_of = {f"{label}/{n}": label for label, count in {"a": 50, "b": 30, "c": 100}.items() for n in range(count)}
    split = stratified_split(class_of, seed=3)
    counts = Counter((class_of[image], name) for image, name in split.items())
    assert [counts[label, "test"] for label in "abc"] == [10, 6, 20]
    assert all(abs(counts[label, "val"] - size) <= 1 for label, size in (("a", 4), ("b", 2.4), ("c", 8)))
    assert Counter(split.values()) == Counter(random_split(sorted(class_of), 3).values())
    assert split == stratified_split(dict(reversed(class_of.items())), seed=3) != stratified_split(class_of, seed=4)


@pytest.mark.parametrize("folders", [("train", "val", "test"), ("Training", "valid", "testing")])
def test_split_folders_above_the_classes_are_the_split(tmp_path, folders):
    counts = {f"{split}/{label}": 3 for split in folders for label in ("rose", "tulip")}
    data = open_folder(write_photos(tmp_path, counts))
    for split, folder in zip(("train", "val", "test"), folders, strict=True):
        assert {path.relative_to(tmp_path).parts[0] for path in data.split(split).paths} == {folder}
    assert set(data.classes.values()) == {"rose", "tulip"}


def test_validation_photos_drawn_from_train_folders_are_stratified(tmp_path):
    counts = {f"{split}/{label}": 40 for split in ("train", "test") for label in ("rose", "tulip", "lily")}
    data = open_folder(write_photos(tmp_path, counts))
    assert Counter(path.parent.name for path in data.split("val").paths) == {"rose": 4, "tulip": 4, "lily": 4}


@pytest.mark.parametrize(
    ("counts", "labels"),
    [
        ({"n02085620-Chihuahua": 2, "n02085782-Japanese_spaniel": 2}, ["Chihuahua", "Japanese spaniel"]),
        (
            {"001.Black_footed_Albatross": 2, "200.Common_Yellowthroat": 2},
            ["Black footed Albatross", "Common Yellowthroat"],
        ),
        ({"1 - daisy": 2, "2 - sunflower": 2, "10 - aster": 2}, ["aster", "daisy", "sunflower"]),
        ({"7-eleven": 2, "Aldi": 2}, ["7 eleven", "Aldi"]),
        ({"car": 2, "bus": 2, "train": 2}, ["bus", "car", "train"]),
        ({"root/wrapper/cat": 2, "root/wrapper/dog": 2}, ["cat", "dog"]),
        ({"seg_train/seg_train/sea": 2, "seg_train/seg_train/ice": 2, "seg_test/seg_test/sea": 2}, ["ice", "sea"]),
        ({"狗": 2, "猫": 3}, ["狗", "猫"]),
        ({"dog": 2, "cat/kittens": 2, "cat": 1}, ["cat", "dog"]),
    ],
)
def test_names_of_classes_come_from_the_folders(tmp_path, counts, labels):
    assert label_of(tmp_path, counts).labels == sorted(labels)


@pytest.mark.parametrize(
    ("counts", "reason"),
    [
        ({"n02085620": 9, "n02085782": 9}, "n02085620, n02085782 are WordNet ids"),
        ({"0": 9, "1": 9}, "0, 1 are numbers"),
        ({"2023-05": 9, "2023-06 Rome": 9}, "are dates"),
        ({"20230514": 9, "cats": 9}, "20230514 is "),
        ({"DCIM/100CANON": 9, "DCIM/101MSDCF": 9}, "100CANON, 101MSDCF are camera folders"),
        ({"images": 9, "masks": 9}, "images, masks are folders of storage"),
        ({"batch_1": 9, "batch_2": 9}, "are folders of storage"),
        ({"class 3": 9, "class 4": 9}, "are folders of storage"),
        ({"3f2504e0-4f89": 9, "9a0c21b7ffee": 9}, "are ids"),
        ({"train": 9, "val": 9}, "train.*without class folders"),
        ({"train/dog": 9, "train/cat": 9, "test1": 9}, "test1/: a split folder with photos, but without class folders"),
        ({"train/dog": 9, "train/cat": 9, "owls": 9}, "train may be splits, owls are not"),
        ({"train": 9, "tram": 9}, "train may be splits, tram are not"),
        ({"animals/dog": 9, "animals/cat": 9, "vehicles/car": 9}, "the classes may be animals or animals/cat"),
        ({"dog": 9}, "contains 1 folders with photos"),
        ({"dog": 9, "cat": 9, ".": 9}, "9 of 27 photos are outside the class folders"),
        ({"dog": 9, "Dog": 9}, "both the class"),
        ({"big_dog": 9, "big dog": 9}, "the folders big dog and big_dog are both the class 'big dog'"),
    ],
)
def test_folders_that_may_be_no_classes_are_refused_with_the_reason(tmp_path, counts, reason):
    with pytest.raises(FileNotFoundError, match=f"no caption file in .*not read as class folders: .*{reason}"):
        read_layout(write_photos(tmp_path, counts))


def test_a_folder_for_each_photo_is_no_class(tmp_path):
    write_photos(tmp_path, {f"product {letter}x": 1 for letter in "abcdefgh"})
    with pytest.raises(FileNotFoundError, match=r"8 folders with 1\.0 photos each are no classes"):
        read_layout(tmp_path)


@pytest.mark.parametrize(
    ("file", "text", "folders", "labels"),
    [
        ("words.txt", "n02085620\tChihuahua\nn02085782\tJapanese spaniel, Japan\nn1\tx", ["n02085620", "n02085782"], 2),
        ("LOC_synset_mapping.txt", "n01440764 tench, Tinca tinca\nn01443537 goldfish", ["n01440764", "n01443537"], 2),
        ("classes.txt", "0 airplane\n1 bird", ["0", "1"], 2),
        ("labels.txt", "fire truck\nowl\nant\n", ["0", "1", "2"], 3),
        ("classes.txt", "pink primrose\nrose\n", ["1", "2"], 2),
        ("classes.txt", "2023-05\tspring\n2023-07\tsummer", ["2023-05", "2023-07"], 2),
    ],
)
def test_class_names_are_read_from_a_file_beside_the_folders(tmp_path, file, text, folders, labels):
    write_photos(tmp_path, dict.fromkeys(folders, 3))
    (tmp_path / file).write_text(text, "utf-8")
    captions = read_layout(tmp_path).captions
    found = set(captions.classes.values())
    assert len(found) == labels and all(any(name in line for line in text.splitlines()) for name in found)
    assert "Japanese spaniel, Japan" not in found and f"class names from {file}" in captions.notes
    assert captions.classes[f"{folders[0]}/000.jpg"] == text.splitlines()[0].split("\t")[-1].partition(",")[0].lstrip(
        "n0123456789 "
    )


def test_a_list_of_names_that_lacks_a_folder_is_an_error_and_one_without_any_is_ignored(tmp_path):
    write_photos(tmp_path, {"001.Albatross": 3, "002.Auklet": 3})
    (tmp_path / "classes.txt").write_text("1 001.Albatross\n2 002.Auklet\n")  # CUB's list names the folders
    assert set(read_layout(tmp_path).captions.classes.values()) == {"Albatross", "Auklet"}
    (tmp_path / "classes.txt").write_text("001.Albatross\talbatross\n")
    with pytest.raises(FileNotFoundError, match=r"has no line for 002\.Auklet"):
        read_layout(tmp_path)


def test_captions_win_over_folder_names(tmp_path):
    write_photos(tmp_path, {"cats": 4, "dogs": 4})
    (tmp_path / "captions.csv").write_text("image,caption\n" + "".join(f"cats/00{n}.jpg,cat {n}\n" for n in range(4)))
    captions = read_layout(tmp_path).captions
    assert captions.classes == {} and [row[1] for row in captions.rows] == [f"cat {n}" for n in range(4)]


def test_loose_photos_and_classes_without_training_photos_are_reported(tmp_path):
    counts = {"train/lily": 30, "train/rose": 30, "test/lily": 5, "test/moss": 5, "train": 2}
    notes = label_of(tmp_path, counts).notes
    assert notes == [
        "classes without training photos: moss",
        "2 photos outside the class folders are not used: train/0.png, train/1.png",
    ]


def test_numbers_are_kept_where_not_all_folders_are_numbered():
    assert class_names(["3_door_car", "bus"]) == {"3_door_car": "3 door car", "bus": "bus"}
    assert class_names(["5 euro", "5_cent"]) == {"5 euro": "5 euro", "5_cent": "5 cent"}  # equal numbers: no numbering


def test_report_of_class_folders_names_the_classes(tmp_path):
    for colour in ("red", "teal", "navy"):
        (tmp_path / "flags" / colour).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (30, 20 + number), colour).save(tmp_path / "flags" / colour / f"{number}.png")
    done = run_script("dataset.py", "flags", cwd=tmp_path)
    assert "read as 3 classes by folder name: navy, red, teal" in done.stdout
