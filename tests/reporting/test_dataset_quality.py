"""The report of dataset.py on repeated captions, equal photos and photos that cannot be opened."""

import shutil

import numpy as np
from helpers import run_in_process, write_image_folder

from data.loading import open_dataset
from reporting import dataset_quality
from reporting.dataset_quality import describe_repeated, describe_unreadable


def report(folder, tmp_path, monkeypatch, *flags):
    monkeypatch.chdir(tmp_path)
    done = run_in_process("reporting.dataset_report.py", folder, "--out", tmp_path / "x.png", *flags)
    assert done.returncode == 0, done.stderr
    return dict(line.split(": ", 1) for line in done.stdout.splitlines() if ": " in line)


def main(folder):
    return open_dataset(str(folder), data_dir=None, cache_dir="cache", split_seed=0)


def test_report_counts_repeated_captions_equal_photos_and_unreadable_photos(tmp_path, monkeypatch):
    folder = write_image_folder(tmp_path / "photos", 20, captions=1)
    rows = [f"photo_{n:02d}.png,{'A man is  playing' if n % 2 else 'a man is playing'}" for n in range(6)]
    rows += [f"photo_{n:02d}.png,a boat" for n in range(4, 8)] + ["photo_09.png,a boat", "photo_09.png,a kite"]
    rows += ["photo_10.png,a kite", "photo_11.png,at one photo", "photo_11.png,at one photo"]
    with (folder / "captions.txt").open("a") as file:
        file.write("\n".join(rows))
    shutil.copy(folder / "Images" / "photo_12.png", folder / "Images" / "photo_13.png")
    (folder / "Images" / "photo_14.png").write_bytes(b"<html>not found</html>")
    lines = report(folder, tmp_path, monkeypatch)
    assert lines["repeated captions"] == (
        "13 of 35 captions (37.1 %) are at several photos, most often 'a man is playing' at 6 photos, "
        "'a boat' at 5 photos, 'a kite' at 2 photos"
    )
    assert lines["equal photos"] == (
        "1 of 20 photos, each with the bytes of another: Images/photo_13.png = Images/photo_12.png"
    )
    assert lines["unreadable photos"] == "1 of 20 photos cannot be opened: Images/photo_14.png (headers only)"


def test_report_of_clean_data_has_none_of_them(photos, tmp_path, monkeypatch):
    lines = report(photos, tmp_path, monkeypatch)
    assert lines["equal photos"] == "none of 30 photos"
    assert lines["unreadable photos"] == "none of 30 photos (headers only)"


def test_repeats_are_ordered_by_the_number_of_photos_and_shown_escaped_and_shortened(tmp_path):
    folder = write_image_folder(tmp_path / "photos", 12, captions=1)
    texts = ["x\x1b[2J" + "y" * 90] * 3 + ["only once"] + [f"text {n}" for n in range(8)]
    rows = [f'photo_{n:02d}.png,"{text}"' for n, text in enumerate(texts)]
    (folder / "captions.txt").write_text("\n".join(["image,caption", *rows]))
    data = main(folder)
    described = describe_repeated(data, np.unique(data.table.caption, return_inverse=True)[1])
    assert described.startswith("3 of 12 captions (25.0 %)") and "\x1b" not in described and len(described) < 200
    assert describe_repeated(data, np.arange(12)) == "none is at several photos"


def test_of_many_photos_a_sample_is_opened(photos, monkeypatch):
    monkeypatch.setattr(dataset_quality, "MAX_OPENED", 7)
    assert describe_unreadable(main(photos)) == "none of 7 photos (a sample of 30) (headers only)"
