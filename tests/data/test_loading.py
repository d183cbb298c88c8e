"""Caption files and splits: what is read is exactly what was written, and a fault is named with its file and line."""

import codecs
import csv
import json
import re
import shutil
import sys
import types

import numpy as np
import pandas as pd
import pytest
from helpers import write_image_folder

from data.format_detection import read_layout
from data.image_lookup import find_duplicates
from data.loading import CaptionData, open_dataset, read_captions
from runtime.text import format_examples


def rows_of(tmp_path, text):
    path = tmp_path / "captions.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return list(read_captions(path).itertuples(index=False, name=None))


def fault_of(tmp_path, text):
    with pytest.raises(ValueError) as error:
        rows_of(tmp_path, text)
    assert str(error.value).startswith(str(tmp_path / "captions.txt"))
    return str(error.value).removeprefix(str(tmp_path / "captions.txt"))


def opened(folder, **options):
    return open_dataset(str(folder), **{"data_dir": None, "cache_dir": "unused", "split_seed": 0} | options)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path_factory, monkeypatch):
    """A working folder for what a cache leaves."""
    monkeypatch.chdir(tmp_path_factory.mktemp("work"))


def image_names(part):
    return {path.name for path in part.paths}


def rewrite(folder, change):
    """Pass the lines of the caption file below its header through `change`."""
    header, *lines = (folder / "captions.txt").read_text().splitlines()
    (folder / "captions.txt").write_text("\n".join([header, *change(lines)]) + "\n")


def test_quoted_commas_and_quotes_belong_to_the_caption(tmp_path):
    text = 'image,caption\na.jpg,"a dog, wet, runs"\nb.jpg,"he says ""stay"""\n'
    assert rows_of(tmp_path, text) == [("a.jpg", "a dog, wet, runs"), ("b.jpg", 'he says "stay"')]


def test_what_the_csv_module_writes_reads_back(tmp_path):
    written = [
        ("a.jpg", 'He said "hi", then left .'),
        ("b c.jpg", "只狗，在雪地里"),
        ("d.jpg", "it's 5\" long, really"),
    ]
    with (tmp_path / "captions.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("image", "caption"), *written])
    assert list(read_captions(tmp_path).itertuples(index=False, name=None)) == written


def test_a_byte_order_mark_is_skipped(tmp_path):
    assert rows_of(tmp_path, codecs.BOM_UTF8 + b"image,caption\na.jpg,a dog\n") == [("a.jpg", "a dog")]


def test_backslashes_in_a_file_name_become_slashes_and_stay_in_a_caption(tmp_path):
    assert rows_of(tmp_path, "image,caption\nx\\a.jpg,left\\right\n") == [("x/a.jpg", "left\\right")]


def test_blank_lines_crlf_and_a_missing_last_newline_do_not_matter(tmp_path):
    text = "image,caption\r\n\r\na.jpg,a dog\r\n\r\nb.jpg,a cat"
    assert rows_of(tmp_path, text) == [("a.jpg", "a dog"), ("b.jpg", "a cat")]


def test_header_and_cells_may_have_spaces_and_capitals(tmp_path):
    assert rows_of(tmp_path, "Image , Caption\n a.jpg , a dog \n") == [("a.jpg", "a dog")]


def test_captions_keep_their_order_and_repeat_as_written(tmp_path):
    text = "image,caption\nb.jpg,2\na.jpg,1\nb.jpg,2\n"
    assert rows_of(tmp_path, text) == [("b.jpg", "2"), ("a.jpg", "1"), ("b.jpg", "2")]


@pytest.mark.parametrize("header", ["", "caption,image\n", "image,caption,split\n", "Bild,Text\n", "图片,描述\n"])
def test_columns_are_found_by_their_names_or_by_what_they_hold(tmp_path, header):
    row = "a red dog,b.jpg" if header.startswith("caption") else "b.jpg,a red dog"
    assert rows_of(tmp_path, f"{header}{row}\n{row}\n") == [("b.jpg", "a red dog")] * 2


def test_a_file_of_something_else_is_named_with_what_was_expected(tmp_path):
    fault = fault_of(tmp_path, "Dear diary,\ntoday it rained.\n")
    assert fault.startswith(", line 1: expected a header such as image,caption") and "'Dear diary,'" in fault


def test_a_wrong_number_of_columns_is_named_with_its_line(tmp_path):
    fault = fault_of(tmp_path, "image,caption\na.jpg,a dog\n\nb.jpg\n")
    assert fault.startswith(", line 4: expected 2 columns, found 1")


def test_commas_without_quotes_belong_to_the_caption(tmp_path):
    assert rows_of(tmp_path, "image,caption\nb.jpg,a dog, wet\n") == [("b.jpg", "a dog, wet")]


def test_line_numbers_count_the_lines_inside_a_quoted_caption(tmp_path):
    fault = fault_of(tmp_path, 'image,caption\na.jpg,"a dog\nand a cat"\nb.jpg\n')
    assert fault.startswith(", line 4:")
    text = 'image,caption\na.jpg,"a dog\nand a cat"\nb.jpg,a bird\n'
    assert rows_of(tmp_path, text) == [("a.jpg", "a dog and a cat"), ("b.jpg", "a bird")]


def test_an_empty_caption_is_named_with_its_line(tmp_path):
    assert fault_of(tmp_path, "image,caption\na.jpg,a dog\nb.jpg,  \n").startswith(
        ", line 3: expected a file name and a caption, found that the caption is empty"
    )


def test_an_empty_file_name_is_named_with_its_line(tmp_path):
    assert fault_of(tmp_path, "image,caption\n,a dog\n").startswith(
        ", line 2: expected a file name and a caption, found that the file name is empty"
    )


def test_a_quote_left_open_is_named_with_the_line_where_it_opens(tmp_path):
    fault = fault_of(tmp_path, 'image,caption\na.jpg,a dog\nb.jpg,"a cat\nc.jpg,a bird\n')
    assert fault.startswith(", line 3:") and "quote" in fault


def test_a_quote_left_open_costs_its_own_row_alone(tmp_path):
    rows = [f"photo_{n:03}.jpg,a caption of some length" for n in range(100)]
    rows[17] = 'photo_017.jpg,"a caption whose quote never ends'
    (tmp_path / "captions.csv").write_text("\n".join(["image,caption", *rows]))
    read = read_layout(tmp_path / "captions.csv").captions
    assert [row[0] for row in read.rows] == [f"photo_{n:03}.jpg" for n in range(100) if n != 17]
    assert len(read.bad) == 1 and "line 19: expected a closing quote" in read.bad[0]


def test_a_file_that_is_not_utf8_is_named(tmp_path):
    fault = fault_of(tmp_path, "image,caption\na.jpg,ein Hund im Grünen\n".encode("latin-1"))
    assert "not UTF-8" in fault


@pytest.mark.parametrize("text", ["", "image,caption\n", "\n\n"])
def test_a_file_without_captions_is_an_error(tmp_path, text):
    assert re.search("expected captions, found no line|holds no captions", fault_of(tmp_path, text))


def test_a_missing_file_and_a_folder_without_one_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.csv"):
        read_captions(tmp_path / "none.csv")
    with pytest.raises(FileNotFoundError, match=r"captions\.txt or captions\.csv.*found nothing"):
        read_captions(tmp_path)


def test_a_missing_folder_or_unknown_name_is_told_with_what_would_do(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"'flickr9k'.*sample, flickr8k"):
        opened("flickr9k")
    with pytest.raises(FileNotFoundError, match=r"nowhere \(--data-dir\)"):
        opened("flickr8k", data_dir=tmp_path / "nowhere")


def test_data_dir_wins_over_the_name(tmp_path):
    write_image_folder(tmp_path / "photos", 10)
    assert opened("sample", data_dir=tmp_path / "photos").image_root == tmp_path / "photos"


@pytest.mark.parametrize("place", ["Images", "images", "."])
def test_images_are_found_in_any_of_the_usual_places(tmp_path, place):
    folder = write_image_folder(tmp_path / "photos", 10)
    for path in list((folder / "Images").iterdir()):
        (folder / place).mkdir(exist_ok=True)
        path.rename(folder / place / path.name)
    data = opened(folder)
    assert all(path.is_file() for split in ("train", "val", "test") for path in data.split(split).paths)


def test_images_in_subfolders_are_found(tmp_path):
    folder = write_image_folder(tmp_path / "photos", 10)
    (folder / "Images").rename(folder / "deep")
    rewrite(folder, lambda lines: [f"deep\\{line}" for line in lines])
    assert len(opened(folder).table) == 20


def test_missing_images_are_counted_and_left_out(tmp_path):
    folder = write_image_folder(tmp_path / "photos", 20)
    gone = ["photo_03.png", "photo_07.png"]
    for name in gone:
        (folder / "Images" / name).unlink()
    data = opened(folder)
    assert data.missing == gone
    assert not {f"Images/{name}" for name in gone} & set(data.table.image)
    assert "2 images have captions but no file, left out: photo_03.png, photo_07.png" in data.describe()


def test_all_images_missing_is_an_error_that_says_where_it_looked(tmp_path):
    folder = write_image_folder(tmp_path / "photos", 10)
    for path in (folder / "Images").iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match=rf"none of the 10 images.*'photo_00\.png' in {folder}"):
        opened(folder)


def test_too_few_photos_for_three_parts_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no images left for"):
        opened(write_image_folder(tmp_path / "photos", 2))


def test_the_fewest_photos_for_three_parts_are_three(tmp_path):
    data = opened(write_image_folder(tmp_path / "photos", 3))
    assert [len(data.split(split).paths) for split in ("train", "val", "test")] == [1, 1, 1]


def write_lists(folder, **lists):
    for name, numbers in lists.items():
        text = "".join(f"photo_{number:02d}.png\n" for number in numbers)
        (folder / f"Flickr_8k.{name}Images.txt").write_text(text)


def test_official_lists_decide_the_split_and_unlisted_images_are_not_used(tmp_path):
    folder = write_image_folder(tmp_path / "photos", 10)
    write_lists(folder, train=[1, 2, 3, 4], dev=[5, 6], test=[0, 9])
    (folder / "Images" / "photo_07.png").unlink()  # on no list, so not missed
    data = opened(folder)
    assert image_names(data.split("train")) == {f"photo_0{k}.png" for k in (1, 2, 3, 4)}
    assert image_names(data.split("val")) == {f"photo_0{k}.png" for k in (5, 6)}
    assert image_names(data.split("test")) == {f"photo_0{k}.png" for k in (0, 9)}
    assert data.missing == [] and "official" in data.describe()


def test_unlisted_images_are_counted_for_the_terminal(tmp_path):
    folder = write_image_folder(tmp_path / "photos", 10)
    write_lists(folder, train=[1, 2, 3, 4], dev=[5, 6], test=[0])
    assert "3 images are on no list" in opened(folder).describe()


def test_an_incomplete_set_of_lists_is_not_used(tmp_path):
    folder = write_image_folder(tmp_path / "photos", 20)
    write_lists(folder, train=range(18), test=[18])
    assert len(opened(folder).split("test").paths) == 4


def test_the_split_is_four_to_one_by_image(tmp_path):
    data = opened(write_image_folder(tmp_path / "photos", 30))
    sizes = {split: len(data.split(split).paths) for split in ("train", "val", "test")}
    assert sizes == {"train": 22, "val": 2, "test": 6}
    assert "4:1" in data.describe() and "seed 0" in data.describe()


def test_no_image_is_in_two_parts_and_none_is_lost(photos):
    parts = [image_names(opened(photos).split(split)) for split in ("train", "val", "test")]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 30


def test_the_split_follows_the_seed(photos):
    first, again, other = (opened(photos, split_seed=seed).split("test").paths for seed in (0, 0, 1))
    assert first == again
    assert set(first) != set(other)


def test_the_split_does_not_depend_on_the_order_of_rows(photos, tmp_path):
    shuffled = write_image_folder(tmp_path / "photos", 30)
    rewrite(shuffled, lambda lines: [lines[k] for k in np.random.RandomState(0).permutation(len(lines))])
    for split in ("train", "val", "test"):
        assert image_names(opened(photos).split(split)) == image_names(opened(shuffled).split(split))


def test_captions_of_interleaved_rows_keep_to_their_image(tmp_path):
    rows = [("b", "b1"), ("a", "a1"), ("c", "c1"), ("a", "a2"), ("b", "b2"), ("a", "a3")]
    table = pd.DataFrame(rows, columns=["image", "caption"]).assign(split="train")
    table.loc[2, "split"] = "test"
    part = CaptionData("x", tmp_path, table, "").split("train")
    assert part.paths == [tmp_path / "b", tmp_path / "a"]
    assert part.captions == ["b1", "b2", "a1", "a2", "a3"]
    assert part.caption_image_ids.tolist() == [0, 0, 1, 1, 1]


def test_every_caption_of_a_part_belongs_to_its_image(photos):
    table = read_captions(photos)
    written = set(zip(table.image, table.caption, strict=True))
    part = opened(photos).split("train")
    read = {(part.paths[row].name, text) for row, text in zip(part.caption_image_ids, part.captions, strict=True)}
    assert len(part.captions) == 2 * len(part.paths) and read <= written


def test_the_sample_set_is_drawn_into_the_cache(tmp_path, monkeypatch):
    from data import sample_set

    monkeypatch.setattr(sample_set, "write_sample_set", lambda folder: write_image_folder(folder, 10))
    data = open_dataset("sample", data_dir=None, cache_dir=str(tmp_path / "cache"), split_seed=0)
    assert data.image_root == tmp_path / "cache" / "sample"


def kaggle(monkeypatch, download):
    monkeypatch.setitem(sys.modules, "kagglehub", types.SimpleNamespace(dataset_download=download))


def karpathy(folder, names):
    """A split file for these photos, in three equal parts."""
    words = ["train", "val", "test"]
    images = [
        {"filename": name, "split": words[k % 3], "sentences": [{"raw": f"published {k}"}], "imgid": k}
        for k, name in enumerate(names)
    ]
    folder.mkdir(exist_ok=True)
    (folder / "dataset_flickr8k.json").write_text(json.dumps({"images": images, "dataset": "flickr8k"}))
    return folder / "dataset_flickr8k.json"


def test_a_named_data_set_is_downloaded_with_its_published_split(monkeypatch, photos, tmp_path):
    names, asked = sorted(path.name for path in (photos / "Images").iterdir()), []
    split = karpathy(tmp_path, names)
    kaggle(monkeypatch, lambda handle, path=None: asked.append((handle, path)) or str(split if path else photos))
    data = opened("flickr8k")
    assert asked == [("adityajn105/flickr8k", None), ("shtvkumar/karpathy-splits", "dataset_flickr8k.json")]
    assert image_names(data.split("test")) == set(names[2::3]) and "Karpathy" in data.describe()
    assert not any(caption.startswith("published") for caption in data.table.caption)


def test_a_published_split_beside_the_data_is_used_without_a_download(monkeypatch, tmp_path):
    kaggle(monkeypatch, lambda *_, **__: pytest.fail("downloaded"))
    folder = write_image_folder(tmp_path / "photos", 10)
    karpathy(folder, [f"photo_{k:02d}.png" for k in range(10)])
    assert image_names(opened("flickr8k", data_dir=folder).split("val")) == {f"photo_0{k}.png" for k in (1, 4, 7)}


def test_another_data_sets_split_file_does_not_stand_in_for_the_published_one(monkeypatch, tmp_path):
    folder, asked = write_image_folder(tmp_path / "photos", 10), []
    karpathy(folder, [f"photo_{k:02d}.png" for k in range(10)]).rename(folder / "dataset_coco.json")
    split = karpathy(tmp_path / "downloaded", [f"photo_{k:02d}.png" for k in range(10)])
    kaggle(monkeypatch, lambda handle, path=None: asked.append(path) or str(split))
    opened("flickr8k", data_dir=folder)
    assert asked == ["dataset_flickr8k.json"]


def test_other_photos_under_a_data_sets_name_are_not_split_by_chance(monkeypatch, tmp_path):
    folder = write_image_folder(tmp_path / "photos", 10)
    karpathy(folder, [f"other_{k:02d}.png" for k in range(10)])
    with pytest.raises(ValueError, match="not those of flickr8k's published split: pass the folder as --dataset"):
        opened("flickr8k", data_dir=folder)


def test_a_split_that_cannot_be_downloaded_is_never_replaced_by_chance(monkeypatch, photos):
    def download(handle, path=None):
        raise OSError("no network")

    kaggle(monkeypatch, download)
    with pytest.raises(ConnectionError, match=r"put dataset_flickr8k\.json beside.*--dataset to split it at random"):
        opened("flickr8k", data_dir=photos)


def test_a_failed_download_is_one_error_that_says_what_to_do(monkeypatch):
    class Refused(Exception):
        pass

    def download(handle):
        raise Refused("503 " + "long reason " * 100)

    kaggle(monkeypatch, download)
    with pytest.raises(ConnectionError, match=r"Refused: 503.*--data-dir") as error:
        opened("flickr8k")
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(("count", "text"), [(1, "0"), (5, "0, 1, 2, 3, 4"), (7, "0, 1, 2, 3, 4 and 2 more")])
def test_a_message_shows_the_first_five_names(count, text):
    assert format_examples([str(k) for k in range(count)]) == text


def with_copies(tmp_path):
    """Twenty photos, of which the last five are the first five under other names."""
    folder = write_image_folder(tmp_path / "photos", 20)
    for k in range(5):
        shutil.copy(folder / "Images" / f"photo_{k:02d}.png", folder / "Images" / f"photo_{15 + k}.png")
    return folder


@pytest.mark.parametrize("seed", range(5))
def test_a_photo_under_two_names_is_never_on_two_sides_of_a_random_split(tmp_path, seed):
    data = opened(with_copies(tmp_path), split_seed=seed)
    seen = [{path.read_bytes() for path in data.split(split).paths} for split in ("train", "val", "test")]
    assert sum(map(len, seen)) == len(set.union(*seen)) == 15
    assert data.table.image.nunique() == 20  # and none is lost


def test_a_published_test_part_stays_whole_and_train_goes_without_its_copies(tmp_path):
    folder = with_copies(tmp_path)
    write_lists(folder, train=range(12), dev=[12, 13, 14, 15], test=[16, 17, 18, 19])
    data = opened(folder)
    assert image_names(data.split("test")) == {f"photo_{k}.png" for k in (16, 17, 18, 19)}
    assert image_names(data.split("val")) == {f"photo_{k}.png" for k in (12, 13, 14, 15)}
    assert image_names(data.split("train")) == {f"photo_{k:02d}.png" for k in range(5, 12)}
    assert "5 images are left out, the same photo is held out: Images/photo_00.png" in data.describe()
    assert "on no list" not in data.describe()


def test_photos_of_one_size_but_other_bytes_are_no_copies(tmp_path):
    same_ends = [b"x" * 5000 + bytes([k]) + b"y" * 5000 for k in range(4)] + [b"z" * 10001]
    for k, data in enumerate([*same_ends, same_ends[2]]):
        (tmp_path / f"{k}.jpg").write_bytes(data)
    names = [str(tmp_path / f"{k}.jpg") for k in range(6)]
    assert find_duplicates([*names, str(tmp_path / "gone.jpg")]) == {names[5]: names[2]}


def few_bad(tmp_path, bad, good):
    folder = write_image_folder(tmp_path / "photos", 30, captions=3)
    rewrite(folder, lambda lines: [*lines[:good], *("photo_00.png" for _ in range(bad))])
    return folder


def test_up_to_a_twentieth_of_bad_rows_is_left_out_counted_and_shown(tmp_path):
    folder = few_bad(tmp_path, 4, 90)
    lines = opened(folder).describe().splitlines()
    place = lines.index("4 rows could not be used:")
    assert lines[place + 1] == (
        f"  {folder / 'captions.txt'}, line 92: expected 2 columns, found 1 in 'photo_00.png'; "
        "write a file name and a caption"
    )
    assert len(lines[place + 1 :]) == 4


def test_more_bad_rows_stop_the_run_unless_allowed_and_five_are_shown(tmp_path):
    folder = few_bad(tmp_path, 6, 90)
    with pytest.raises(ValueError, match=r"6 of 96 rows cannot be used.*--allow-bad-rows") as error:
        opened(folder)
    assert str(error.value).count("expected 2 columns") == 5
    data = opened(folder, allow_bad_rows=True)
    assert len(data.table) == 90 and "6 rows could not be used" in data.describe()


def test_nothing_is_written_into_the_data_folder(tmp_path):
    folder = with_copies(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    opened(folder)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
