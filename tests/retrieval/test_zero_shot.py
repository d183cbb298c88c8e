"""Zero-shot classification: probabilities over labels, measured on class folders, against plain loops."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import one_line_error, run_in_process, tiny_model, write_image_folder
from PIL import Image

from retrieval.encoder import build_encoder
from retrieval.zero_shot import accuracy, class_embeddings, class_folders, classify, confusion, probabilities, prompts

SMALL = ["--image-size", 32, "--embed-dim", 16, "--batch-size", 8, "--precision", "float32", "--num-workers", 0]


@pytest.fixture(scope="module")
def encoder():
    model, tokenizer = tiny_model()
    return build_encoder(
        model.eval(), tokenizer, image_size=32, max_tokens=16, device="cpu", precision="float32", num_workers=0
    )


def write_classes(folder, classes, *, photos=3):
    """A folder of class folders, a colour each."""
    for name, colour in classes.items():
        (folder / name).mkdir(parents=True)
        for number in range(photos):
            Image.new("RGB", (40, 30 + number), colour).save(folder / name / f"{number}.png")
    return folder


@pytest.mark.parametrize(
    ("label", "sentence"),
    [
        ("dog", "a photo of a dog"),
        ("a dog", "a photo of a dog"),
        ("apple", "a photo of an apple"),
        ("an apple", "a photo of an apple"),
        ("The Eiffel tower", "a photo of The Eiffel tower"),
        ("two dogs", "a photo of two dogs"),
    ],
)
def test_a_label_keeps_its_own_article_in_a_prompt(label, sentence):
    assert prompts(label, ["a photo of a {}"]) == [sentence]


def test_chinese_labels_are_said_in_chinese():
    assert prompts("狗")[1] == "一张狗的照片" and prompts("dog")[1] == "a photo of a dog"


@pytest.mark.parametrize("template", ["a photo", "{} and {}"])
def test_a_template_without_one_place_for_the_label_is_refused(template):
    with pytest.raises(ValueError, match="needs one"):
        prompts("dog", [template])


def test_probabilities_are_the_softmax_of_cosines_over_the_temperature():
    generator = torch.Generator().manual_seed(0)
    image_emb, class_emb = (F.normalize(torch.randn(rows, 8, generator=generator), dim=1) for rows in (4, 3))
    chances = probabilities(image_emb, class_emb, 0.1)
    for row, image in enumerate(image_emb):
        exps = [math.exp(sum(a * b for a, b in zip(image, label, strict=True)) / 0.1) for label in class_emb]
        assert chances[row].tolist() == pytest.approx([value / sum(exps) for value in exps], rel=1e-4)


def test_a_class_is_the_mean_of_its_prompts(encoder):
    labels = ["red", "blue left"]
    rows = class_embeddings(encoder, labels, ["{}", "a picture of {}"])
    for label, row in zip(labels, rows, strict=True):
        mean = encoder.encode_captions([label, f"a picture of {label}"], "").mean(0)
        torch.testing.assert_close(row, mean / mean.norm(), atol=1e-5, rtol=0)


def test_photos_are_classified_in_their_order_and_broken_ones_left_out(encoder, tmp_path):
    photos = sorted((write_image_folder(tmp_path / "photos", 4) / "Images").iterdir())
    whole, readable = classify(encoder, photos, ["red", "blue"], temperature=0.07)
    assert readable.all() and whole.shape == (4, 2)
    torch.testing.assert_close(whole.sum(1), torch.ones(4))
    photos[1].write_bytes(b"no photo")
    left, readable = classify(encoder, photos, ["red", "blue"], temperature=0.07)
    assert readable.tolist() == [True, False, True, True]
    torch.testing.assert_close(left, whole[[0, 2, 3]], atol=1e-5, rtol=0)
    photos[0].write_bytes(b"")
    none, readable = classify(encoder, photos[:2], ["red", "blue"], temperature=0.07)
    assert none.shape == (0, 2) and not readable.any()


@pytest.mark.parametrize(("labels", "line"), [(["dog"], "two labels"), (["a", "a"], "twice"), (["a", " "], "empty")])
def test_labels_that_make_no_choice_are_refused(encoder, labels, line):
    with pytest.raises(ValueError, match=line):
        class_embeddings(encoder, labels)


def test_accuracy_against_loops_and_a_tie_counts_against_the_model():
    generator = torch.Generator().manual_seed(1)
    chances = torch.rand(50, 7, generator=generator).mul(4).round()  # many ties
    truth = torch.randint(0, 7, (50,), generator=generator)
    places = [sum(bool(c >= row[own]) for c in row) for row, own in zip(chances, truth.tolist(), strict=True)]
    found = accuracy(chances, truth)
    assert found["top1"] == pytest.approx(100 * sum(place == 1 for place in places) / 50)
    assert found["top5"] == pytest.approx(100 * sum(place <= 5 for place in places) / 50)
    by_class = [
        [place == 1 for place, own in zip(places, truth.tolist(), strict=True) if own == number] for number in range(7)
    ]
    assert found["mean_class_top1"] == pytest.approx(100 * sum(sum(part) / len(part) for part in by_class) / 7)
    assert accuracy(torch.ones(4, 2), torch.tensor([0, 1, 0, 1]))["top1"] == 0  # a collapsed model
    assert "top5" not in accuracy(torch.ones(4, 5), torch.tensor([0, 1, 2, 3]))


def test_confusion_counts_true_rows_and_taken_columns():
    chances = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.7, 0.1], [0.1, 0.8, 0.1], [0.0, 0.1, 0.9]])
    counts = confusion(chances, torch.tensor([0, 0, 1, 2]))
    assert counts.tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 1]]


def test_class_folders_become_labels_and_their_photos(tmp_path):
    write_classes(tmp_path, {"golden_retriever": "yellow", "ice-cream": "white", ".hidden": "red"}, photos=2)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("no photo")
    (tmp_path / "ice-cream" / "notes.txt").write_text("no photo")
    labels, photos, truth = class_folders(tmp_path)
    assert labels == ["golden retriever", "ice cream"] and truth.tolist() == [0, 0, 1, 1]
    assert [photo.parent.name for photo in photos] == ["golden_retriever"] * 2 + ["ice-cream"] * 2


def test_a_run_is_measured_on_class_folders_from_the_command_line(
    photos, image_tower, text_tower, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    towers = ["--image-encoder", image_tower, "--text-encoder", text_tower]
    done = run_in_process("train.py", "--dataset", photos, *towers, *SMALL, "--epochs", 1, "--name", "run")
    assert done.returncode == 0, done.stderr
    classes = write_classes(tmp_path / "colours", {"red": "red", "blue": "blue", "green": "green"})
    (classes / "red" / "broken.jpg").write_bytes(b"no photo")
    before = sorted(classes.rglob("*"))
    done = run_in_process("evaluate.py", "runs/run", "--zero-shot", classes, "--precision", "float32")
    assert "9 photos of 3 classes" in done.stdout and "1 photo could not be read" in done.stdout
    stored = json.loads((tmp_path / "runs" / "run" / "metrics.json").read_text())["zero-shot colours"]
    assert f"top1 {stored['top1']:.1f} %" in done.stdout
    assert stored["top1"] * 9 / 100 == pytest.approx(round(stored["top1"] * 9 / 100))
    with Image.open(tmp_path / "runs" / "run" / "zero-shot-colours.png") as picture:
        assert min(picture.size) > 100
    assert sorted(classes.rglob("*")) == before
    assert "nowhere" in one_line_error(run_in_process("evaluate.py", "runs/run", "--zero-shot", "nowhere"))
    assert "at least two" in one_line_error(run_in_process("evaluate.py", "runs/run", "--zero-shot", classes / "red"))
