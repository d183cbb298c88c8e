"""Searching one's own photos: what infer.py answers, and that nothing is computed twice."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, one_line_error, run_in_process, write_image_folder
from PIL import Image
from tiny_dual_encoders import clip

from models.checkpoint import load_state, save_state
from retrieval import searcher
from retrieval.embedding_store import list_images
from retrieval.encoder import load_encoder, load_pretrained_encoder
from retrieval.model_key import weights_key
from retrieval.searcher import combine_queries, search_captions
from retrieval.zero_shot import classify

TRAINING = ["--image-size", 32, "--embed-dim", 16, "--batch-size", 8, "--precision", "float32", "--num-workers", 0]
IMAGE_PATTERN = "holiday/Images/photo_03.png"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, image_tower, text_tower):
    """A folder with a finished run in runs/first, trained on my_photos/."""
    place = tmp_path_factory.mktemp("search")
    write_image_folder(place / "my_photos", 30)
    words = ["--dataset", place / "my_photos", "--image-encoder", image_tower, "--text-encoder", text_tower]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        done = run_in_process("train.py", *words, *TRAINING, "--epochs", 1, "--name", "first")
    assert done.returncode == 0, done.stderr
    return place


@pytest.fixture
def place(trained, tmp_path, monkeypatch):
    """That run in a working folder of its own, with other photos in holiday/."""
    shutil.copytree(trained / "runs", tmp_path / "runs")
    write_image_folder(tmp_path / "holiday", 12)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def encoded(monkeypatch):
    """Counts the photos that are encoded."""
    from retrieval import encoder

    counted, real = [], encoder.Encoder.encode_image_batches

    def counting(encoder, paths, progress):
        counted.extend(paths)
        return real(encoder, paths, progress)

    monkeypatch.setattr(encoder.Encoder, "encode_image_batches", counting)
    return counted


def infer(*words):
    done = run_in_process("infer.py", *words, "--precision", "float32")
    assert done.returncode == 0, done.stderr
    return done


def answers(*words):
    """The JSON lines of infer.py."""
    return [json.loads(line) for line in infer(*words, "--json").stdout.splitlines()]


def found(*words):
    (answer,) = answers(*words)
    return answer["matches"]


def exact(query, folder, run="runs/first"):
    """Every photo of a folder by its cosine with a query (D,), in plain steps: the oracle."""
    encoder, _ = load_encoder(searcher.Path(run), device="cpu", precision="float32")
    paths = [folder / name for name in list_images(folder).stamps]
    rows, _ = encoder.encode_images(paths, "")
    return sorted(((float(row @ query), str(path)) for row, path in zip(rows, paths, strict=True)), reverse=True)


def same_order(matches, expected):
    assert len(matches) == len(expected)
    for match, (score, _) in zip(matches, expected, strict=True):
        assert match["score"] == pytest.approx(score, abs=2e-3)  # rows are kept in float16
    assert matches[0]["photo"] == expected[0][1]


def test_a_sentence_finds_photos_in_any_folder_and_the_second_time_encodes_nothing(place, encoded):
    first = found("red on the left", "--gallery", "holiday", "--top-k", 100)
    assert len(encoded) == 12
    again = found("red on the left", "--gallery", "holiday", "--top-k", 100)
    assert len(encoded) == 12 and again == first
    encoder, _ = load_encoder(place / "runs" / "first", device="cpu", precision="float32")
    expected = exact(encoder.encode_captions(["red on the left"], "")[0], searcher.Path("holiday"))
    same_order(first, expected)


def test_a_photo_finds_itself_first_among_photos(place):
    (best, *_) = found("--image", IMAGE_PATTERN, "--gallery", "holiday", "--top-k", 3)
    assert best["photo"] == IMAGE_PATTERN and best["score"] == pytest.approx(1, abs=2e-3)


def test_a_photo_finds_captions_and_other_photos_of_the_runs_data_set(place):
    matches = found("--image", IMAGE_PATTERN, "--top-k", 50)
    assert len(matches) == 12 and all(" " in match["caption"] for match in matches)
    assert matches == found("--image", IMAGE_PATTERN, "--top-k", 50)
    assert all("my_photos" in match["photo"] for match in found("--image", IMAGE_PATTERN, "--find", "photos"))


def test_a_sentence_finds_captions_and_first_the_one_it_is(place):
    caption = found("--image", IMAGE_PATTERN, "--top-k", 1)[0]["caption"]
    (best, *_) = found(caption, "--find", "captions")
    assert best["caption"] == caption and best["score"] == pytest.approx(1, abs=2e-3)


def test_a_photo_with_a_sentence_is_the_normalised_sum_of_both(place):
    encoder, _ = load_encoder(place / "runs" / "first", device="cpu", precision="float32")
    photo, sentence = (
        encoder.encode_images([place / IMAGE_PATTERN], "")[0][0],
        encoder.encode_captions(["in white"], "")[0],
    )
    expected = (photo + sentence) / (photo + sentence).norm()
    matches = found("in white", "--image", IMAGE_PATTERN, "--gallery", "holiday", "--top-k", 100)
    same_order(matches, exact(expected, searcher.Path("holiday")))
    torch.testing.assert_close(combine_queries(sentence[None], photo[None])[0], expected)
    assert combine_queries(None, photo[None])[0] is not None and torch.equal(
        combine_queries(sentence[None], None)[0], sentence
    )


def test_labels_are_ranked_by_probability(place):
    (answer,) = answers("--image", IMAGE_PATTERN, "--labels", "red and blue", "white", "green beside black")
    chances = [match["score"] for match in answer["matches"]]
    assert sum(chances) == pytest.approx(1, abs=1e-5) and chances == sorted(chances, reverse=True)
    encoder, model = load_encoder(place / "runs" / "first", device="cpu", precision="float32")
    expected, _ = classify(
        encoder, [place / IMAGE_PATTERN], ["white", "red and blue"], temperature=model.temperature.item()
    )
    (two,) = answers("--image", IMAGE_PATTERN, "--labels", "white", "red and blue")
    assert {match["label"]: match["score"] for match in two["matches"]} == pytest.approx(
        {"white": expected[0, 0].item(), "red and blue": expected[0, 1].item()}, abs=1e-5
    )


def test_a_file_of_queries_is_answered_line_by_line(place):
    (place / "queries.txt").write_text("red on the left\n\n  blue beside white \n", "utf-8")
    both = answers("--queries", "queries.txt", "--gallery", "holiday", "--out", "grid.png")
    assert [answer["query"] for answer in both] == ["red on the left", "blue beside white"]
    for answer in both:
        alone = found(answer["query"], "--gallery", "holiday")
        assert [match["photo"] for match in alone] == [match["photo"] for match in answer["matches"]]
    with Image.open("grid.png") as picture:
        assert min(picture.size) > 100
    (place / "gb.txt").write_text("红色在左边\n", "gb18030")
    assert [answer["query"] for answer in answers("--queries", "gb.txt", "--gallery", "holiday")] == ["红色在左边"]
    (place / "cp1252.txt").write_bytes("red\nun café\n".encode("cp1252"))
    line = one_line_error(run_in_process("infer.py", "--queries", "cp1252.txt", "--gallery", "holiday"))
    assert "cp1252.txt, line 2" in line and "UTF-8" in line


def test_a_photo_whose_name_is_no_utf8_is_drawn(tmp_path):
    from reporting.plots import plot_photos
    from retrieval.searcher import Match

    path = tmp_path / os.fsdecode(b"caf\xe9.png")
    Image.new("RGB", (20, 20)).save(path)
    plot_photos([("a café", path, [Match(0.5, path)])], tmp_path / "found.png")
    assert (tmp_path / "found.png").is_file()


def test_a_photo_whose_name_is_no_utf8_is_asked_for(place):
    shutil.copy(IMAGE_PATTERN, asked := os.fsdecode(b"caf\xe9.png"))
    infer("--image", asked, "--gallery", "holiday", "--out", "found.png")
    assert (place / "found.png").is_file()


def test_for_a_person_ranks_scores_and_names_stand_in_columns_and_a_picture_is_drawn(place):
    done = infer("red on the left", "--gallery", "holiday", "--top-k", 12)
    title, *rows, last = done.stdout.splitlines()
    assert title == "red on the left" and len(rows) == 12
    assert len({row.index("holiday") for row in rows}) == 1
    picture = last.removeprefix("picture: ")
    assert (place / picture).is_file() and picture.startswith("runs/first/matches/")


def test_json_is_all_that_is_printed_and_no_picture_is_drawn_unasked(place):
    infer("red on the left", "--gallery", "holiday", "--json")
    assert not (place / "runs" / "first" / "matches").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["--image", IMAGE_PATTERN],
        ["red", "--find", "captions"],
        ["red", "--image", IMAGE_PATTERN],
        ["--image", IMAGE_PATTERN, "--labels", "a", "b"],
    ],
)
def test_every_kind_of_answer_can_be_drawn(place, words):
    infer(*words, "--out", "x.png")
    with Image.open("x.png") as picture:
        assert min(picture.size) > 100


def test_a_sentence_longer_than_the_model_reads_is_told_and_still_answered(place):
    done = infer("red and blue " * 60, "--gallery", "holiday")
    assert "the model reads 64 of the sentence's 182 tokens" in done.stderr and "photo_" in done.stdout


def test_broken_photos_of_a_folder_are_named_and_the_rest_is_searched(place):
    (place / "holiday" / "broken.jpg").write_bytes(b"garbage")
    whole = (place / IMAGE_PATTERN).read_bytes()
    (place / IMAGE_PATTERN).write_bytes(whole[: len(whole) // 2])
    done = infer("red", "--gallery", "holiday", "--top-k", 100)
    assert "2 photos could not be read" in done.stderr and "broken.jpg: not an image" in done.stderr
    assert len(done.stdout.splitlines()) == 1 + 11 + 1


def test_a_decompression_bomb_in_a_folder_is_left_out_without_being_unpacked(place):
    Image.new("1", (13_500, 13_500)).save(place / "holiday" / "bomb.png")
    done = infer("red", "--gallery", "holiday", "--top-k", 100)
    assert "bomb.png" in done.stderr and "decompression bomb" in done.stderr and "bomb.png" not in done.stdout


@pytest.mark.parametrize("words", [["red", "--gallery", "bad"], ["--image", "bad/x.jpg", "--gallery", "holiday"]])
def test_photos_that_are_none_are_one_line(place, words):
    (place / "bad").mkdir()
    (place / "bad" / "x.jpg").write_bytes(b"garbage")
    assert "not an image" in one_line_error(run_in_process("infer.py", *words))


def test_nothing_is_written_beside_the_photos(place):
    before = {path: path.stat().st_mtime_ns for path in (place / "holiday").rglob("*")}
    infer("red on the left", "--gallery", "holiday")
    assert {path: path.stat().st_mtime_ns for path in (place / "holiday").rglob("*")} == before


def test_a_cache_that_cannot_be_written_is_one_line(place):
    (place / "full").write_text("no folder")
    line = one_line_error(run_in_process("infer.py", "red", "--gallery", "holiday", "--cache-dir", "full"))
    assert "full" in line and "--cache-dir" in line


def test_other_weights_have_a_gallery_of_their_own(place, encoded):
    first = weights_key(place / "runs" / "first")
    infer("red", "--gallery", "holiday")
    state = load_state(Path("runs/first/best.pt"))
    state["model"]["image_head.norm.bias"][0] += 0.5
    save_state(Path("runs/first/best.pt"), state)
    assert weights_key(place / "runs" / "first") != first
    infer("red", "--gallery", "holiday")
    assert len(encoded) == 24


def test_a_pretrained_pair_searches_without_a_run_and_has_galleries_of_its_own(place, encoded, tmp_path):
    folder = tmp_path / "clip"
    torch.manual_seed(0)
    for part in clip():
        part.save_pretrained(folder)
    words = ["red on the left", "--gallery", "holiday", "--top-k", 100]
    found(*words)
    matches = found(*words, "--model", folder, "--cache-dir", "cache")
    assert len(encoded) == 24 and matches == found(*words, "--model", folder) and len(encoded) == 24
    encoder, _ = load_pretrained_encoder(str(folder), max_tokens=64, device="cpu", precision="float32")
    rows, _ = encoder.encode_images([searcher.Path(match["photo"]) for match in matches], "")
    scores = rows @ encoder.encode_captions(["red on the left"], "")[0]
    assert [match["score"] for match in matches] == pytest.approx(scores.tolist(), abs=2e-3)
    assert len(found("--image", IMAGE_PATTERN, "--model", folder, "--labels", "a", "b")) == 2
    infer(*words, "--model", folder)
    assert (place / "cache" / "matches" / "red-on-the-left.png").is_file()
    before = len(encoded)
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    infer(*words, "--model", folder)
    assert len(encoded) == before + 12


def test_a_run_that_was_copied_finds_its_galleries(place, encoded):
    infer("red", "--gallery", "holiday")
    shutil.copytree("runs/first", "runs/copy")
    infer("red", "--gallery", "holiday", "--run", "runs/copy")
    assert len(encoded) == 12


def test_ties_and_k_beyond_the_gallery_are_the_searchs_own(place):
    rows = np.eye(3, dtype=np.float16)[[0, 1, 0]]
    (matches,) = search_captions(torch.eye(3)[:1], rows, ["a", "b", "c"], 9)
    assert [match.item for match in matches] == ["a", "c", "b"]


@pytest.mark.parametrize("module", ["infer", "retrieval.searcher", "retrieval.embedding_store"])
def test_what_a_search_need_not_load_is_not_loaded_before_it_is_needed(module):
    heavy = {"torch", "transformers", "timm", "pandas", "matplotlib", "albumentations", "scipy"}
    code = f"import sys, {module}; print(*(set(sys.modules) & {heavy}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
