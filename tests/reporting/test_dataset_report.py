"""`python dataset.py PATH`: the report is correct, the figure is written, and the data set's folder is unchanged."""

import re

from helpers import one_line_error, run_in_process, run_script, write_image_folder
from PIL import Image


def modification_times(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_report_prints_a_summary_and_plots_examples(tmp_path):
    folder = write_image_folder(tmp_path / "my photos", 30)
    lines = (folder / "captions.txt").read_text().splitlines()
    lines += ["photo_03.png,a third caption", "photo_03.png", "missing.png,a caption without a photo"]
    (folder / "captions.txt").write_text("\n".join(lines))
    (folder / "Images" / "photo_04.png").write_bytes(b"not an image")
    before = modification_times(folder)
    done = run_script("dataset.py", "my photos", cwd=tmp_path)
    for line in (
        "format: table with commas, captions.txt",
        "images: 30 in my photos",
        "captions: 61; per image at least 2, on average 2.0, at most 3",
        "\n1 images have captions but no file and are skipped: missing.png\n",
        "line 63: expected 2 columns, found 1 in 'photo_03.png'",
        "bad rows: 1 of 62, skipped",
    ):
        assert line in done.stdout, done.stdout
    assert re.search(r"^split: .*train 2\d images.*4:1 by image, seed 0", done.stdout, re.MULTILINE)
    assert re.search(r"^longest caption: \d+ tokens \(tokenizer trained on", done.stdout, re.MULTILINE)
    with Image.open(tmp_path / "runs" / "data_sets" / "my photos.png") as figure:
        assert min(figure.size) > 500 and len(set(figure.convert("RGB").resize((60, 40)).getdata())) > 50
    assert modification_times(folder) == before and done.stderr == ""


def test_report_run_inside_the_data_set_writes_nothing_there(tmp_path, text_tower):
    folder = write_image_folder(tmp_path / "photos", 10)
    (folder / "captions.txt").write_text((folder / "captions.txt").read_text() + "photo_01.png\n" * 5)
    before = modification_times(folder)
    done = run_script("dataset.py", ".", "--text-encoder", text_tower, cwd=folder, TMPDIR=str(tmp_path))
    assert "bad rows: 5, 20 %: training stops here without --allow-bad-rows" in done.stdout
    assert f"({text_tower})" in done.stdout
    assert modification_times(folder) == before and list(tmp_path.glob("*/here.png"))


def test_errors_are_one_line_and_help_does_not_import_torch(tmp_path):
    assert "no data set given" in one_line_error(run_script("dataset.py", cwd=tmp_path, check=False))
    assert "no data set or folder 'nowhere'" in one_line_error(
        run_script("dataset.py", "nowhere", cwd=tmp_path, check=False)
    )
    assert "--out must end in" in one_line_error(
        run_script("dataset.py", ".", "--out", "x.txt", cwd=tmp_path, check=False)
    )
    help_ = run_script("-X", "importtime", "dataset.py", "--help", cwd=tmp_path)
    assert "--split-seed" in help_.stdout
    assert "import time" in help_.stderr and not re.search(r"\| +(torch|transformers)$", help_.stderr, re.M)


def test_training_with_cached_images_gives_the_same_losses(tmp_path, monkeypatch, image_tower, text_tower):
    monkeypatch.chdir(tmp_path)
    write_image_folder(tmp_path / "photos", 30)
    flags = ["--dataset", "photos", "--image-encoder", image_tower, "--text-encoder", text_tower, "--image-size", 32]
    flags += ["--embed-dim", 16, "--batch-size", 8, "--precision", "float32", "--num-workers", 0, "--epochs", 2]
    cached = run_in_process("train.py", *flags, "--min-crop", 1, "--name", "cached", "--cache-images")
    assert cached.returncode == 0, cached.stderr
    assert (tmp_path / "cache" / "photos").is_dir()
    uncached = run_in_process("train.py", *flags, "--min-crop", 1, "--name", "uncached")
    losses = [re.findall(r"^epoch \d/2 +(\d+\.\d+)", done.stdout, re.MULTILINE) for done in (cached, uncached)]
    assert losses[0] == losses[1] and len(losses[0]) == 2
    assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 2  # train and val
