"""evaluate.py where captions repeat and on class folders: both readings, accuracy, and notes about small splits."""

import json
import re

import pytest
from helpers import COLOURS, one_line_error, run_in_process
from PIL import Image

TRAINING = ["--image-size", 32, "--embed-dim", 16, "--batch-size", 8, "--precision", "float32", "--num-workers", 0]


def train(dataset, image_tower, text_tower, name, *flags):
    towers = ["--image-encoder", image_tower, "--text-encoder", text_tower]
    done = run_in_process("train.py", "--dataset", dataset, *towers, *TRAINING, "--epochs", 1, "--name", name, *flags)
    assert done.returncode == 0, done.stderr
    return done


def write_colours(folder, count, *, prefix=""):
    """Write `count` photos of each colour into a folder per colour; sizes differ, so that no two files are equal."""
    for colour, rgb in COLOURS.items():
        (folder / f"{prefix}{colour}").mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (40, 30 + number), rgb).save(folder / f"{prefix}{colour}" / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, image_tower, text_tower):
    """A working folder with the run `classes` on class folders, and `repeats` on photos whose captions repeat."""
    folder = tmp_path_factory.mktemp("evaluate")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_colours(folder / "colours", 10)
        train("colours", image_tower, text_tower, "classes")
        write_colours(folder / "captioned", 5)
        rows = [
            f"{colour}/{n}.png,{'A picture of' if n % 2 else 'a  picture of'} {colour}"
            for colour in COLOURS
            for n in range(5)
        ]
        (folder / "captioned" / "captions.txt").write_text("\n".join(["image,caption", *rows]))
        train("captioned", image_tower, text_tower, "repeats")
    return folder


@pytest.fixture(autouse=True)
def _in_workdir(workdir, monkeypatch):
    monkeypatch.chdir(workdir)


def evaluate(*arguments):
    done = run_in_process("evaluate.py", *arguments, "--precision", "float32")
    assert done.returncode == 0, done.stderr
    return done.stdout


def saved_metrics(run):
    with open(f"runs/{run}/metrics.json") as file:
        return json.load(file)


def test_repeated_captions_are_reported_and_measured_in_both_readings():
    printed = evaluate("runs/repeats", "--split", "train")
    count = re.search(r"(\d+) of (\d+) captions \((\S+) %\) are at several photos: measured by photo", printed)
    assert count and count[1] == count[2] and float(count[3]) == 100
    metrics = saved_metrics("repeats")
    by_photo, by_text = metrics["train"], metrics["train, any photo with that text"]
    assert by_text["t2i_R@5"] > by_photo["t2i_R@5"] and by_photo.keys() - by_text.keys() <= {"batch32_loss"}
    assert printed.count("image → text") == 2 and "any photo with that text\n" in printed


def test_without_repeated_captions_only_the_papers_rule_is_measured(workdir, image_tower, text_tower, photos):
    printed = evaluate("runs/repeats", "--dataset", photos, "--split", "test")
    assert "several photos" not in printed and printed.count("image → text") == 1
    assert "test of photos, any photo with that text" not in saved_metrics("repeats")


def test_class_folders_have_accuracy_beside_recall():
    printed = evaluate("runs/classes", "--split", "test")
    test = saved_metrics("classes")["test"]
    assert {"top1", "mean_class_top1", "top5", "i2t_R@1"} <= test.keys()
    assert f"classified by the class names: top1 {test['top1']:.1f} %" in printed
    assert (test["top1"] * 12 / 100) == pytest.approx(round(test["top1"] * 12 / 100))  # 60 photos, a fifth is test
    assert "48 of 48 captions (100.0 %) are at several photos" in printed
    # The top-1 of zero-shot classification is the same question about the same photos.
    zero_shot = evaluate("runs/classes", "--zero-shot", "colours")
    assert "60 photos of 6 classes" in zero_shot


def test_a_split_of_few_photos_is_said_to_move_in_steps():
    assert (
        "the test split has only 12 photos: recall there moves in steps of 8.3 points for photos and 2.1"
        in evaluate("runs/classes")
    )


@pytest.mark.parametrize("names", [("train", "val"), ("Training", "Testing", "Validation")])
def test_zero_shot_over_split_folders_names_the_inner_folders(names, tmp_path):
    for name in names:
        write_colours(tmp_path / "set" / name, 2, prefix="001.")
    line = one_line_error(run_in_process("evaluate.py", "runs/classes", "--zero-shot", tmp_path / "set"))
    assert "are splits, not classes: pass one of them" in line
    assert all(str(tmp_path / "set" / name) in line for name in names)
    inner = evaluate("runs/classes", "--zero-shot", tmp_path / "set" / names[1])
    assert "12 photos of 6 classes" in inner


def test_zero_shot_refuses_folders_without_class_names(tmp_path):
    for name in ("n02085620", "n02085782"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (30, 30), "red").save(tmp_path / name / "1.png")
    line = one_line_error(run_in_process("evaluate.py", "runs/classes", "--zero-shot", tmp_path))
    assert "n02085620, n02085782 are WordNet ids" in line and "classes.txt" in line
    (tmp_path / "classes.txt").write_text("n02085620\tred\nn02085782\tblue\n")
    assert "class names from classes.txt" in evaluate("runs/classes", "--zero-shot", tmp_path)


def test_equal_photos_count_as_one_photo(tmp_path):
    write_colours(tmp_path / "twins", 4)
    rows = ["image,caption", *(f"{colour}/{n}.png,{colour} and {n}" for colour in COLOURS for n in range(4))]
    for number, colour in enumerate(COLOURS):
        for copy in range(3):  # three copies of a photo, each with a caption of its own
            Image.new("RGB", (50, 20 + number), COLOURS[colour]).save(tmp_path / "twins" / f"{colour}-{copy}.png")
            rows.append(f"{colour}-{copy}.png,{' '.join([colour] * (copy + 1))}")
    (tmp_path / "twins" / "captions.txt").write_text("\n".join(rows))
    printed = evaluate("runs/repeats", "--dataset", tmp_path / "twins", "--split", "train")
    assert re.search(r"are at several photos; \d+ photos are copies of others", printed)
