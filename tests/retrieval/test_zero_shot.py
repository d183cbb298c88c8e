"""Zero-shot classification against plain loops, and its accuracy on class folders."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import one_line_error, run_in_process, tiny_model, write_image_folder
from PIL import Image

from retrieval.encoder import build_encoder
from retrieval.zero_shot import accuracy, class_embeddings, class_folders, classify, confusion, probabilities, prompts

TRAINING = ["--image-size", 32, "--embed-dim", 16, "--batch-size", 8, "--precision", "float32", "--num-workers", 0]


@pytest.fixture(scope="module")
def encoder():
    model, tokenizer = tiny_model()
    return build_encoder(
        model.eval(), tokenizer, image_size=32, max_tokens=16, device="cpu", precision="float32", num_workers=0
    )


def write_classes(folder, classes, *, photos=3):
    """Write a folder with one subfolder per class, of photos in its colour."""
    for name, colour in classes.items():
        (folder / name).mkdir(parents=True)
        for index in range(photos):
            Image.new("RGB", (40, 30 + index), colour).save(folder / name / f"{index}.png")
    return folder


@pytest.mark.parametrize(
    ("label", "prompt"),
    [
        ("dog", "a photo of a dog"),
        ("a dog", "a photo of a dog"),
        ("apple", "a photo of an apple"),
        ("an apple", "a photo of an apple"),
        ("The Eiffel tower", "a photo of The Eiffel tower"),
        ("two dogs", "a photo of two dogs"),
    ],
)
def test_the_article_of_a_label_replaces_that_of_the_template(label, prompt):
    assert prompts(label, ["a photo of a {}"]) == [prompt]


def test_chinese_labels_get_chinese_templates():
    assert prompts("狗")[1] == "一张狗的照片" and prompts("dog")[1] == "a photo of a dog"


@pytest.mark.parametrize("template", ["a photo", "{} and {}"])
def test_a_template_without_exactly_one_placeholder_raises(template):
    with pytest.raises(ValueError, match="needs one"):
        prompts("dog", [template])


def test_probabilities_are_the_softmax_of_cosines_over_the_temperature():
    generator = torch.Generator().manual_seed(0)
    image_emb, class_emb = (F.normalize(torch.randn(rows, 8, generator=generator), dim=1) for rows in (4, 3))
    probability = probabilities(image_emb, class_emb, 0.1)
    for row, image in enumerate(image_emb):
        exps = [math.exp(sum(a * b for a, b in zip(image, label, strict=True)) / 0.1) for label in class_emb]
        assert probability[row].tolist() == pytest.approx([value / sum(exps) for value in exps], rel=1e-4)


def test_a_class_is_the_mean_of_its_prompts(encoder):
    labels = ["red", "blue left"]
    rows = class_embeddings(encoder, labels, ["{}", "a picture of {}"])
    for label, row in zip(labels, rows, strict=True):
        mean = encoder.encode_captions([label, f"a picture of {label}"], "").mean(0)
        torch.testing.assert_close(row, mean / mean.norm(), atol=1e-5, rtol=0)


def test_photos_are_classified_in_order_and_unreadable_ones_are_skipped(encoder, tmp_path):
    photos = sorted((write_image_folder(tmp_path / "photos", 4) / "Images").iterdir())
    expected, readable = classify(encoder, photos, ["red", "blue"], temperature=0.07)
    assert readable.all() and expected.shape == (4, 2)
    torch.testing.assert_close(expected.sum(1), torch.ones(4))
    photos[1].write_bytes(b"no photo")
    probability, readable = classify(encoder, photos, ["red", "blue"], temperature=0.07)
    assert readable.tolist() == [True, False, True, True]
    torch.testing.assert_close(probability, expected[[0, 2, 3]], atol=1e-5, rtol=0)
    photos[0].write_bytes(b"")
    probability, readable = classify(encoder, photos[:2], ["red", "blue"], temperature=0.07)
    assert probability.shape == (0, 2) and not readable.any()


@pytest.mark.parametrize(("labels", "message"), [(["dog"], "two labels"), (["a", "a"], "twice"), (["a", " "], "empty")])
def test_one_label_and_equal_or_empty_labels_raise(encoder, labels, message):
    with pytest.raises(ValueError, match=message):
        class_embeddings(encoder, labels)


def test_accuracy_matches_loops_and_ties_count_against_the_model():
    generator = torch.Generator().manual_seed(1)
    probability = torch.rand(50, 7, generator=generator).mul(4).round()  # many ties
    truth = torch.randint(0, 7, (50,), generator=generator)
    rows = list(zip(probability, truth.tolist(), strict=True))
    ranks = [sum(bool(value >= row[label]) for value in row) for row, label in rows]
    metrics = accuracy(probability, truth)
    assert metrics["top1"] == pytest.approx(100 * sum(rank == 1 for rank in ranks) / 50)
    assert metrics["top5"] == pytest.approx(100 * sum(rank <= 5 for rank in ranks) / 50)
    by_class = [
        [rank == 1 for rank, label in zip(ranks, truth.tolist(), strict=True) if label == index] for index in range(7)
    ]
    class_accuracy = [sum(correct) / len(correct) for correct in by_class]
    assert metrics["mean_class_top1"] == pytest.approx(100 * sum(class_accuracy) / 7)
    assert accuracy(torch.ones(4, 2), torch.tensor([0, 1, 0, 1]))["top1"] == 0  # a collapsed model
    assert "top5" not in accuracy(torch.ones(4, 5), torch.tensor([0, 1, 2, 3]))


def test_confusion_has_true_classes_in_rows_and_predicted_ones_in_columns():
    probability = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.7, 0.1], [0.1, 0.8, 0.1], [0.0, 0.1, 0.9]])
    counts = confusion(probability, torch.tensor([0, 0, 1, 2]))
    assert counts.tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 1]]


def test_class_folders_gives_a_label_per_folder_and_a_class_index_per_photo(tmp_path):
    write_classes(tmp_path, {"golden_retriever": "yellow", "ice-cream": "white", ".hidden": "red"}, photos=2)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("no photo")
    (tmp_path / "ice-cream" / "notes.txt").write_text("no photo")
    labels, photos, truth, _ = class_folders(tmp_path)
    assert labels == ["golden retriever", "ice cream"] and truth.tolist() == [0, 0, 1, 1]
    assert [photo.parent.name for photo in photos] == ["golden_retriever"] * 2 + ["ice-cream"] * 2


def test_evaluate_zero_shot_reports_and_saves_the_accuracy_on_class_folders(
    photos, image_tower, text_tower, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    towers = ["--image-encoder", image_tower, "--text-encoder", text_tower]
    done = run_in_process("train.py", "--dataset", photos, *towers, *TRAINING, "--epochs", 1, "--name", "run")
    assert done.returncode == 0, done.stderr
    classes = write_classes(tmp_path / "colours", {"red": "red", "blue": "blue", "green": "green"})
    (classes / "red" / "broken.jpg").write_bytes(b"no photo")
    before = sorted(classes.rglob("*"))
    done = run_in_process("evaluate.py", "runs/run", "--zero-shot", classes, "--precision", "float32")
    assert "9 photos of 3 classes" in done.stdout and "1 photo could not be read" in done.stdout
    saved = json.loads((tmp_path / "runs" / "run" / "metrics.json").read_text())["zero-shot colours"]
    assert f"top1 {saved['top1']:.1f} %" in done.stdout
    assert saved["top1"] * 9 / 100 == pytest.approx(round(saved["top1"] * 9 / 100))
    with Image.open(tmp_path / "runs" / "run" / "zero-shot-colours.png") as picture:
        assert min(picture.size) > 100
    assert sorted(classes.rglob("*")) == before
    assert "nowhere" in one_line_error(run_in_process("evaluate.py", "runs/run", "--zero-shot", "nowhere"))
    assert "at least two" in one_line_error(run_in_process("evaluate.py", "runs/run", "--zero-shot", classes / "red"))
