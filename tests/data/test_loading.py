"""Caption files are read exactly as written, errors name file and line, and splits never share a photo."""

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
from helpers import unused_cache, write_image_folder

from data.format_detection import read_layout
from data.image_lookup import find_duplicates
from data.loading import CaptionData, open_dataset, read_captions
from runtime.text import format_examples


def read_rows(tmp_path, text):
    path = tmp_path / "captions.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return list(read_captions(path).itertuples(index=False, name=None))


def error_message(tmp_path, text):
    with pytest.raises(ValueError) as error:
        read_rows(tmp_path, text)
    assert str(error.value).startswith(str(tmp_path / "captions.txt"))
    return str(error.value).removeprefix(str(tmp_path / "captions.txt"))


def load(folder, **options):
    return open_dataset(str(folder), **{"data_dir": None, "cache_dir": unused_cache(), "split_seed": 0} | options)


@pytest.fixture(autouse=True)
def run_in_empty_folder(tmp_path_factory, monkeypatch):
    """Change to an empty folder, because relative cache folders are created in the working folder."""
    monkeypatch.chdir(tmp_path_factory.mktemp("work"))


def image_names(split):
    return {path.name for path in split.paths}


def edit_caption_lines(folder, change):
    """Replace the lines below the header of the caption file with `change(lines)`."""
    header, *lines = (folder / "captions.txt").read_text().splitlines()
    (folder / "captions.txt").write_text("\n".join([header, *change(lines)]) + "\n")


def test_quoted_commas_and_quotes_belong_to_the_caption(tmp_path):
    text = 'image,caption\na.jpg,"a dog, wet, runs"\nb.jpg,"he says ""stay"""\n'
    assert read_rows(tmp_path, text) == [("a.jpg", "a dog, wet, runs"), ("b.jpg", 'he says "stay"')]


def test_output_of_the_csv_module_is_read_unchanged(tmp_path):
    written = [
        ("a.jpg", 'He said "hi", then left .'),
        ("b c.jpg", "只狗，在雪地里"),
        ("d.jpg", "it's 5\" long, really"),
    ]
    with (tmp_path / "captions.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("image", "caption"), *written])
    assert list(read_captions(tmp_path).itertuples(index=False, name=None)) == written


def test_a_byte_order_mark_is_skipped(tmp_path):
    assert read_rows(tmp_path, codecs.BOM_UTF8 + b"image,caption\na.jpg,a dog\n") == [("a.jpg", "a dog")]


def test_backslashes_become_slashes_in_file_names_but_not_in_captions(tmp_path):
    assert read_rows(tmp_path, "image,caption\nx\\a.jpg,left\\right\n") == [("x/a.jpg", "left\\right")]


def test_blank_lines_crlf_and_a_missing_last_newline_are_ignored(tmp_path):
    text = "image,caption\r\n\r\na.jpg,a dog\r\n\r\nb.jpg,a cat"
    assert read_rows(tmp_path, text) == [("a.jpg", "a dog"), ("b.jpg", "a cat")]


def test_header_and_cells_may_have_spaces_and_capitals(tmp_path):
    assert read_rows(tmp_path, "Image , Caption\n a.jpg , a dog \n") == [("a.jpg", "a dog")]


def test_captions_keep_their_order_and_repetitions(tmp_path):
    text = "image,caption\nb.jpg,2\na.jpg,1\nb.jpg,2\n"
    assert read_rows(tmp_path, text) == [("b.jpg", "2"), ("a.jpg", "1"), ("b.jpg", "2")]


@pytest.mark.parametrize("header", ["", "caption,image\n", "image,caption,split\n", "Bild,Text\n", "图片,描述\n"])
def test_columns_are_found_by_header_or_by_content(tmp_path, header):
    row = "a red dog,b.jpg" if header.startswith("caption") else "b.jpg,a red dog"
    assert read_rows(tmp_path, f"{header}{row}\n{row}\n") == [("b.jpg", "a red dog")] * 2


def test_error_for_an_unrelated_file_names_it_and_the_expected_format(tmp_path):
    message = error_message(tmp_path, "Dear diary,\ntoday it rained.\n")
    assert message.startswith(", line 1: expected a header such as image,caption") and "'Dear diary,'" in message


def test_wrong_number_of_columns_is_reported_with_its_line(tmp_path):
    message = error_message(tmp_path, "image,caption\na.jpg,a dog\n\nb.jpg\n")
    assert message.startswith(", line 4: expected 2 columns, found 1")


def test_unquoted_commas_belong_to_the_caption(tmp_path):
    assert read_rows(tmp_path, "image,caption\nb.jpg,a dog, wet\n") == [("b.jpg", "a dog, wet")]


def test_line_numbers_include_the_lines_inside_a_quoted_caption(tmp_path):
    message = error_message(tmp_path, 'image,caption\na.jpg,"a dog\nand a cat"\nb.jpg\n')
    assert message.startswith(", line 4:")
    text = 'image,caption\na.jpg,"a dog\nand a cat"\nb.jpg,a bird\n'
    assert read_rows(tmp_path, text) == [("a.jpg", "a dog and a cat"), ("b.jpg", "a bird")]


def test_empty_caption_is_reported_with_its_line(tmp_path):
    assert error_message(tmp_path, "image,caption\na.jpg,a dog\nb.jpg,  \n").startswith(
        ", line 3: expected a file name and a caption, found an empty caption"
    )


def test_empty_file_name_is_reported_with_its_line(tmp_path):
    assert error_message(tmp_path, "image,caption\n,a dog\n").startswith(
        ", line 2: expected a file name and a caption, found an empty file name"
    )


def test_unclosed_quote_is_reported_with_the_line_where_it_opens(tmp_path):
    message = error_message(tmp_path, 'image,caption\na.jpg,a dog\nb.jpg,"a cat\nc.jpg,a bird\n')
    assert message.startswith(", line 3:") and "quote" in message


def test_unclosed_quote_loses_only_its_own_row(tmp_path):
    rows = [f"photo_{n:03}.jpg,a caption of some length" for n in range(100)]
    rows[17] = 'photo_017.jpg,"a caption whose quote never ends'
    (tmp_path / "captions.csv").write_text("\n".join(["image,caption", *rows]))
    captions = read_layout(tmp_path / "captions.csv").captions
    assert [row[0] for row in captions.rows] == [f"photo_{n:03}.jpg" for n in range(100) if n != 17]
    assert len(captions.bad_rows) == 1 and "line 19: expected a closing quote" in captions.bad_rows[0]


def test_file_that_is_not_utf8_is_reported(tmp_path):
    message = error_message(tmp_path, "image,caption\na.jpg,ein Hund im Grünen\n".encode("latin-1"))
    assert "not valid UTF-8" in message


@pytest.mark.parametrize("text", ["", "image,caption\n", "\n\n"])
def test_a_file_without_captions_is_an_error(tmp_path, text):
    assert re.search("expected captions, found no line|no captions found", error_message(tmp_path, text))


def test_missing_file_and_folder_without_captions_are_reported(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.csv"):
        read_captions(tmp_path / "none.csv")
    with pytest.raises(FileNotFoundError, match=r"captions\.txt or captions\.csv.*found nothing"):
        read_captions(tmp_path)


def test_error_for_an_unknown_name_or_missing_folder_lists_the_choices(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"'flickr9k'.*sample, flickr8k"):
        load("flickr9k")
    with pytest.raises(FileNotFoundError, match=r"nowhere \(--data-dir\)"):
        load("flickr8k", data_dir=tmp_path / "nowhere")


def test_data_dir_takes_precedence_over_the_name(tmp_path):
    write_image_folder(tmp_path / "photos", 10)
    assert load("sample", data_dir=tmp_path / "photos").image_root == tmp_path / "photos"


@pytest.mark.parametrize("subfolder", ["Images", "images", "."])
def test_images_are_found_in_every_usual_folder(tmp_path, subfolder):
    folder = write_image_folder(tmp_path / "photos", 10)
    for path in list((folder / "Images").iterdir()):
        (folder / subfolder).mkdir(exist_ok=True)
        path.rename(folder / subfolder / path.name)
    data = load(folder)
    assert all(path.is_file() for split in ("train", "val", "test") for path in data.split(split).paths)


def test_images_in_subfolders_are_found(tmp_path):
    folder = write_image_folder(tmp_path / "photos", 10)
    (folder / "Images").rename(folder / "deep")
    edit_caption_lines(folder, lambda lines: [f"deep\\{line}" for line in lines])
    assert len(load(folder).table) == 20


def test_missing_images_are_counted_and_skipped(tmp_path):
    folder = write_image_folder(tmp_path / "photos", 20)
    removed = ["photo_03.png", "photo_07.png"]
    for name in removed:
        (folder / "Images" / name).unlink()
    data = load(folder)
    assert data.missing == removed
    assert not {f"Images/{name}" for name in removed} & set(data.table.image)
    assert "2 images have captions but no file and are skipped: photo_03.png, photo_07.png" in data.describe()


def test_error_names_the_searched_folder_if_all_images_are_missing(tmp_path):
    folder = write_image_folder(tmp_path / "photos", 10)
    for path in (folder / "Images").iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match=rf"none of the 10 images.*'photo_00\.png' in {folder}"):
        load(folder)


def test_too_few_photos_for_three_splits_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no images left for"):
        load(write_image_folder(tmp_path / "photos", 2))


def test_three_photos_are_enough_for_three_splits(tmp_path):
    data = load(write_image_folder(tmp_path / "photos", 3))
    assert [len(data.split(split).paths) for split in ("train", "val", "test")] == [1, 1, 1]


def write_split_lists(folder, **lists):
    for name, numbers in lists.items():
        text = "".join(f"photo_{number:02d}.png\n" for number in numbers)
        (folder / f"Flickr_8k.{name}Images.txt").write_text(text)


def test_official_lists_decide_the_split_and_unlisted_images_are_not_used(tmp_path):
    folder = write_image_folder(tmp_path / "photos", 10)
    write_split_lists(folder, train=[1, 2, 3, 4], dev=[5, 6], test=[0, 9])
    (folder / "Images" / "photo_07.png").unlink()  # in no split list, so not missing
    data = load(folder)
    assert image_names(data.split("train")) == {f"photo_0{k}.png" for k in (1, 2, 3, 4)}
    assert image_names(data.split("val")) == {f"photo_0{k}.png" for k in (5, 6)}
    assert image_names(data.split("test")) == {f"photo_0{k}.png" for k in (0, 9)}
    assert data.missing == [] and "official" in data.describe()


def test_unlisted_images_are_counted_in_the_summary(tmp_path):
    folder = write_image_folder(tmp_path / "photos", 10)
    write_split_lists(folder, train=[1, 2, 3, 4], dev=[5, 6], test=[0])
    assert "3 images are in no split list" in load(folder).describe()


def test_an_incomplete_set_of_lists_is_not_used(tmp_path):
    folder = write_image_folder(tmp_path / "photos", 20)
    write_split_lists(folder, train=range(18), test=[18])
    assert len(load(folder).split("test").paths) == 4


def test_random_split_is_four_to_one_by_image(tmp_path):
    data = load(write_image_folder(tmp_path / "photos", 30))
    sizes = {split: len(data.split(split).paths) for split in ("train", "val", "test")}
    assert sizes == {"train": 22, "val": 2, "test": 6}
    assert "4:1" in data.describe() and "seed 0" in data.describe()


def test_no_image_is_in_two_splits_and_none_is_lost(photos):
    names = [image_names(load(photos).split(split)) for split in ("train", "val", "test")]
    assert sum(map(len, names)) == len(set.union(*names)) == 30


def test_equal_seeds_give_equal_splits_and_other_seeds_different_ones(photos):
    first, repeated, other = (load(photos, split_seed=seed).split("test").paths for seed in (0, 0, 1))
    assert first == repeated
    assert set(first) != set(other)


def test_split_does_not_depend_on_row_order(photos, tmp_path):
    shuffled = write_image_folder(tmp_path / "photos", 30)
    edit_caption_lines(shuffled, lambda lines: [lines[k] for k in np.random.RandomState(0).permutation(len(lines))])
    for split in ("train", "val", "test"):
        assert image_names(load(photos).split(split)) == image_names(load(shuffled).split(split))


def test_captions_in_interleaved_rows_stay_with_their_image(tmp_path):
    rows = [("b", "b1"), ("a", "a1"), ("c", "c1"), ("a", "a2"), ("b", "b2"), ("a", "a3")]
    table = pd.DataFrame(rows, columns=["image", "caption"]).assign(split="train")
    table.loc[2, "split"] = "test"
    train = CaptionData("x", tmp_path, table, "").split("train")
    assert train.paths == [tmp_path / "b", tmp_path / "a"]
    assert train.captions == ["b1", "b2", "a1", "a2", "a3"]
    assert train.caption_image_ids.tolist() == [0, 0, 1, 1, 1]


def test_every_caption_of_a_split_belongs_to_its_image(photos):
    table = read_captions(photos)
    expected = set(zip(table.image, table.caption, strict=True))
    train = load(photos).split("train")
    pairs = {(train.paths[row].name, text) for row, text in zip(train.caption_image_ids, train.captions, strict=True)}
    assert len(train.captions) == 2 * len(train.paths) and pairs <= expected


def test_sample_set_is_drawn_into_the_cache(tmp_path, monkeypatch):
    from data import sample_set

    monkeypatch.setattr(sample_set, "write_sample_set", lambda folder: write_image_folder(folder, 10))
    data = open_dataset("sample", data_dir=None, cache_dir=str(tmp_path / "cache"), split_seed=0)
    assert data.image_root == tmp_path / "cache" / "sample"


def mock_kagglehub(monkeypatch, download):
    monkeypatch.setitem(sys.modules, "kagglehub", types.SimpleNamespace(dataset_download=download))


def write_karpathy(folder, names):
    """Write a Karpathy file that assigns these photos to train, val and test in turn."""
    splits = ["train", "val", "test"]
    images = [
        {"filename": name, "split": splits[k % 3], "sentences": [{"raw": f"published {k}"}], "imgid": k}
        for k, name in enumerate(names)
    ]
    folder.mkdir(exist_ok=True)
    (folder / "dataset_flickr8k.json").write_text(json.dumps({"images": images, "dataset": "flickr8k"}))
    return folder / "dataset_flickr8k.json"


def test_named_data_set_is_downloaded_with_its_published_split(monkeypatch, photos, tmp_path):
    names, requests = sorted(path.name for path in (photos / "Images").iterdir()), []
    split_file = write_karpathy(tmp_path, names)
    mock_kagglehub(
        monkeypatch, lambda handle, path=None: requests.append((handle, path)) or str(split_file if path else photos)
    )
    data = load("flickr8k")
    assert requests == [("adityajn105/flickr8k", None), ("shtvkumar/karpathy-splits", "dataset_flickr8k.json")]
    assert image_names(data.split("test")) == set(names[2::3]) and "Karpathy" in data.describe()
    assert not any(caption.startswith("published") for caption in data.table.caption)


def test_published_split_in_the_data_folder_is_used_without_a_download(monkeypatch, tmp_path):
    mock_kagglehub(monkeypatch, lambda *_, **__: pytest.fail("downloaded"))
    folder = write_image_folder(tmp_path / "photos", 10)
    write_karpathy(folder, [f"photo_{k:02d}.png" for k in range(10)])
    assert image_names(load("flickr8k", data_dir=folder).split("val")) == {f"photo_0{k}.png" for k in (1, 4, 7)}


def test_split_file_of_another_data_set_is_not_used(monkeypatch, tmp_path):
    folder, requests = write_image_folder(tmp_path / "photos", 10), []
    write_karpathy(folder, [f"photo_{k:02d}.png" for k in range(10)]).rename(folder / "dataset_coco.json")
    split_file = write_karpathy(tmp_path / "downloaded", [f"photo_{k:02d}.png" for k in range(10)])
    mock_kagglehub(monkeypatch, lambda handle, path=None: requests.append(path) or str(split_file))
    load("flickr8k", data_dir=folder)
    assert requests == ["dataset_flickr8k.json"]


def test_other_photos_under_a_data_set_name_are_not_split_at_random(monkeypatch, tmp_path):
    folder = write_image_folder(tmp_path / "photos", 10)
    write_karpathy(folder, [f"other_{k:02d}.png" for k in range(10)])
    with pytest.raises(ValueError, match="do not match the published split of flickr8k; pass --split random"):
        load("flickr8k", data_dir=folder)


def test_failed_split_download_never_leads_to_a_random_split(monkeypatch, photos):
    def download(handle, path=None, **_):
        raise OSError("no network")

    mock_kagglehub(monkeypatch, download)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(ConnectionError, match=r"put dataset_flickr8k\.json next to.*--split random"):
        load("flickr8k", data_dir=photos)


def test_failed_download_is_one_short_error_with_a_next_step(monkeypatch):
    class ServiceUnavailable(Exception):
        pass

    def download(handle):
        raise ServiceUnavailable("503 " + "long reason " * 100)

    mock_kagglehub(monkeypatch, download)
    with pytest.raises(ConnectionError, match=r"ServiceUnavailable: 503.*--data-dir") as error:
        load("flickr8k")
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(("count", "text"), [(1, "0"), (5, "0, 1, 2, 3, 4"), (7, "0, 1, 2, 3, 4 and 2 more")])
def test_messages_show_the_first_five_names(count, text):
    assert format_examples([str(k) for k in range(count)]) == text


def folder_with_duplicates(tmp_path):
    """Write twenty photos, of which the last five are copies of the first five."""
    folder = write_image_folder(tmp_path / "photos", 20)
    for k in range(5):
        shutil.copy(folder / "Images" / f"photo_{k:02d}.png", folder / "Images" / f"photo_{15 + k}.png")
    return folder


@pytest.mark.parametrize("seed", range(5))
def test_photo_with_two_names_is_never_in_two_random_splits(tmp_path, seed):
    data = load(folder_with_duplicates(tmp_path), split_seed=seed)
    contents = [{path.read_bytes() for path in data.split(split).paths} for split in ("train", "val", "test")]
    assert sum(map(len, contents)) == len(set.union(*contents)) == 15
    assert data.table.image.nunique() == 20  # no photo is lost


def test_published_test_split_stays_complete_and_its_duplicates_leave_train(tmp_path):
    folder = folder_with_duplicates(tmp_path)
    write_split_lists(folder, train=range(12), dev=[12, 13, 14, 15], test=[16, 17, 18, 19])
    data = load(folder)
    assert image_names(data.split("test")) == {f"photo_{k}.png" for k in (16, 17, 18, 19)}
    assert image_names(data.split("val")) == {f"photo_{k}.png" for k in (12, 13, 14, 15)}
    assert image_names(data.split("train")) == {f"photo_{k:02d}.png" for k in range(5, 12)}
    assert "5 images are skipped, the same photo is in val or test: Images/photo_00.png" in data.describe()
    assert "in no split list" not in data.describe()


def test_photos_of_equal_size_but_different_bytes_are_no_duplicates(tmp_path):
    equal_ends = [b"x" * 5000 + bytes([k]) + b"y" * 5000 for k in range(4)] + [b"z" * 10001]
    for k, data in enumerate([*equal_ends, equal_ends[2]]):
        (tmp_path / f"{k}.jpg").write_bytes(data)
    names = [str(tmp_path / f"{k}.jpg") for k in range(6)]
    assert find_duplicates([*names, str(tmp_path / "missing.jpg")]) == {names[5]: names[2]}


def folder_with_bad_rows(tmp_path, n_bad, n_good):
    folder = write_image_folder(tmp_path / "photos", 30, captions=3)
    edit_caption_lines(folder, lambda lines: [*lines[:n_good], *("photo_00.png" for _ in range(n_bad))])
    return folder


def test_up_to_five_percent_bad_rows_are_skipped_counted_and_shown(tmp_path):
    folder = folder_with_bad_rows(tmp_path, 4, 90)
    lines = load(folder).describe().splitlines()
    index = lines.index("4 rows could not be used:")
    assert lines[index + 1] == (
        f"  {folder / 'captions.txt'}, line 92: expected 2 columns, found 1 in 'photo_00.png'; "
        "write a file name and a caption"
    )
    assert len(lines[index + 1 :]) == 4


def test_more_bad_rows_are_an_error_that_shows_five_unless_allowed(tmp_path):
    folder = folder_with_bad_rows(tmp_path, 6, 90)
    with pytest.raises(ValueError, match=r"6 of 96 rows cannot be used.*--allow-bad-rows") as error:
        load(folder)
    assert str(error.value).count("expected 2 columns") == 5
    data = load(folder, allow_bad_rows=True)
    assert len(data.table) == 90 and "6 rows could not be used" in data.describe()


def test_nothing_is_written_into_the_data_folder(tmp_path):
    folder = folder_with_duplicates(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    load(folder)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
