"""Search in own photos with infer.py: results match plain code, and no photo is encoded twice."""

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
from retrieval.embedding_store import list_images
from retrieval.encoder import load_encoder, load_pretrained_encoder
from retrieval.model_key import weights_key
from retrieval.searcher import combine_queries, search_captions
from retrieval.zero_shot import classify

TRAINING = ["--image-size", 32, "--embed-dim", 16, "--batch-size", 8, "--precision", "float32", "--num-workers", 0]
QUERY_PHOTO = "holiday/Images/photo_03.png"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, image_tower, text_tower):
    """Return a folder with a finished run in runs/first, trained on my_photos/."""
    folder = tmp_path_factory.mktemp("search")
    write_image_folder(folder / "my_photos", 30)
    flags = ["--dataset", folder / "my_photos", "--image-encoder", image_tower, "--text-encoder", text_tower]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        done = run_in_process("train.py", *flags, *TRAINING, "--epochs", 1, "--name", "first")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def workdir(trained, tmp_path, monkeypatch):
    """Return a working folder with a copy of that run, and other photos in holiday/."""
    shutil.copytree(trained / "runs", tmp_path / "runs")
    write_image_folder(tmp_path / "holiday", 12)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def encoded(monkeypatch):
    """Return a list that collects the paths of all photos that are encoded."""
    from retrieval.encoder import Encoder

    encoded_paths, encode_image_batches = [], Encoder.encode_image_batches

    def recording(encoder, paths, desc):
        encoded_paths.extend(paths)
        return encode_image_batches(encoder, paths, desc)

    monkeypatch.setattr(Encoder, "encode_image_batches", recording)
    return encoded_paths


def infer(*flags):
    done = run_in_process("infer.py", *flags, "--precision", "float32")
    assert done.returncode == 0, done.stderr
    return done


def search_all(*flags):
    """Return the JSON lines of infer.py, one per query."""
    return [json.loads(line) for line in infer(*flags, "--json").stdout.splitlines()]


def search(*flags):
    """Return the matches of a single query."""
    (result,) = search_all(*flags)
    return result["matches"]


def rank_photos(query, folder, run="runs/first"):
    """Rank all photos of a folder by their cosine with a query (D,), without a Searcher: the oracle."""
    encoder, _ = load_encoder(Path(run), device="cpu", precision="float32")
    paths = [folder / name for name in list_images(folder).stamps]
    rows, _ = encoder.encode_images(paths, "")
    return sorted(((float(row @ query), str(path)) for row, path in zip(rows, paths, strict=True)), reverse=True)


def assert_ranking(matches, expected):
    assert len(matches) == len(expected)
    for match, (score, _) in zip(matches, expected, strict=True):
        assert match["score"] == pytest.approx(score, abs=2e-3)  # a gallery stores float16
    assert matches[0]["photo"] == expected[0][1]


def test_a_sentence_finds_photos_in_a_folder_and_a_second_search_encodes_nothing(workdir, encoded):
    first = search("red on the left", "--gallery", "holiday", "--top-k", 100)
    assert len(encoded) == 12
    again = search("red on the left", "--gallery", "holiday", "--top-k", 100)
    assert len(encoded) == 12 and again == first
    encoder, _ = load_encoder(workdir / "runs" / "first", device="cpu", precision="float32")
    expected = rank_photos(encoder.encode_captions(["red on the left"], "")[0], Path("holiday"))
    assert_ranking(first, expected)


def test_a_photo_finds_itself_first_among_photos(workdir):
    (best, *_) = search("--image", QUERY_PHOTO, "--gallery", "holiday", "--top-k", 3)
    assert best["photo"] == QUERY_PHOTO and best["score"] == pytest.approx(1, abs=2e-3)


def test_a_photo_finds_captions_and_photos_of_the_runs_data_set(workdir):
    matches = search("--image", QUERY_PHOTO, "--top-k", 50)
    assert len(matches) == 12 and all(" " in match["caption"] for match in matches)
    assert matches == search("--image", QUERY_PHOTO, "--top-k", 50)
    assert all("my_photos" in match["photo"] for match in search("--image", QUERY_PHOTO, "--find", "photos"))


def test_the_part_of_the_data_set_that_is_searched_and_the_run_are_printed(workdir):
    others = "--split all or --gallery FOLDER for others"
    assert infer("red").stdout.startswith(f"searching the 6 test photos of 30 of runs/first; {others}\n")
    assert "searching the 2 val photos of 30 of runs/first" in infer("red", "--split", "val").stdout
    done = infer("red", "--split", "all", "--top-k", 99)
    assert done.stdout.startswith("searching all 30 photos of runs/first\n") and "  30  " in done.stdout
    captions = infer("--image", QUERY_PHOTO)
    assert "searching the 12 test captions of 60 of runs/first; --split all for others" in captions.stdout
    assert len(search("--image", QUERY_PHOTO, "--split", "all", "--top-k", 99)) == 60
    done = infer("red", "--json")
    assert "searching the 6 test photos" in done.stderr and "searching" not in done.stdout
    line = one_line_error(run_in_process("infer.py", "red", "--gallery", "holiday", "--split", "all"))
    assert "--split is a part of the run's data set" in line


def test_labels_may_be_a_folder_of_class_folders(workdir):
    for name in ("001.deep_blue", "002.red"):
        (workdir / "classes" / name).mkdir(parents=True)
        shutil.copy(QUERY_PHOTO, workdir / "classes" / name / "a.png")
    (result,) = search_all("--image", QUERY_PHOTO, "--labels", "classes")
    assert {match["label"] for match in result["matches"]} == {"deep blue", "red"}
    (workdir / "set").mkdir()
    for name in ("train", "val"):
        shutil.copytree(workdir / "classes", workdir / "set" / name)
    line = one_line_error(run_in_process("infer.py", "--image", QUERY_PHOTO, "--labels", "set"))
    assert "pass one of them, set/train or set/val" in line


def test_equal_captions_are_one_match(workdir):
    data = workdir / "twice"
    shutil.copytree(workdir / "holiday", data)
    lines = (data / "captions.txt").read_text().splitlines()
    (data / "captions.txt").write_text("\n".join([*lines, *(f"photo_{n:02d}.png,the same text" for n in range(12))]))
    config = json.loads((workdir / "runs" / "first" / "config.json").read_text()) | {"dataset": str(data)}
    (workdir / "runs" / "first" / "config.json").write_text(json.dumps(config))
    captions = [match["caption"] for match in search("--image", QUERY_PHOTO, "--split", "all", "--top-k", 99)]
    assert captions.count("the same text") == 1 and len(captions) == 25


def test_a_sentence_finds_the_caption_that_equals_it_first(workdir):
    caption = search("--image", QUERY_PHOTO, "--top-k", 1)[0]["caption"]
    (best, *_) = search(caption, "--find", "captions")
    assert best["caption"] == caption and best["score"] == pytest.approx(1, abs=2e-3)


def test_a_photo_with_a_sentence_is_the_normalised_sum_of_both(workdir):
    encoder, _ = load_encoder(workdir / "runs" / "first", device="cpu", precision="float32")
    image_emb, _ = encoder.encode_images([workdir / QUERY_PHOTO], "")
    text_emb = encoder.encode_captions(["in white"], "")
    expected = (image_emb[0] + text_emb[0]) / (image_emb[0] + text_emb[0]).norm()
    matches = search("in white", "--image", QUERY_PHOTO, "--gallery", "holiday", "--top-k", 100)
    assert_ranking(matches, rank_photos(expected, Path("holiday")))
    text_emb, image_emb = text_emb.numpy(), image_emb.numpy()
    np.testing.assert_allclose(combine_queries(text_emb, image_emb)[0], expected.numpy(), atol=1e-6)
    assert combine_queries(None, image_emb) is image_emb and combine_queries(text_emb, None) is text_emb


def test_labels_are_ranked_by_probability(workdir):
    (result,) = search_all("--image", QUERY_PHOTO, "--labels", "red and blue", "white", "green beside black")
    probs = [match["score"] for match in result["matches"]]
    assert sum(probs) == pytest.approx(1, abs=1e-5) and probs == sorted(probs, reverse=True)
    encoder, model = load_encoder(workdir / "runs" / "first", device="cpu", precision="float32")
    expected, _ = classify(
        encoder, [workdir / QUERY_PHOTO], ["white", "red and blue"], temperature=model.temperature.item()
    )
    (result,) = search_all("--image", QUERY_PHOTO, "--labels", "white", "red and blue")
    assert {match["label"]: match["score"] for match in result["matches"]} == pytest.approx(
        {"white": expected[0, 0].item(), "red and blue": expected[0, 1].item()}, abs=1e-5
    )


def test_a_file_of_queries_gives_one_result_per_line(workdir):
    (workdir / "queries.txt").write_text("red on the left\n\n  blue beside white \n", "utf-8")
    results = search_all("--queries", "queries.txt", "--gallery", "holiday", "--out", "grid.png")
    assert [result["query"] for result in results] == ["red on the left", "blue beside white"]
    for result in results:
        matches = search(result["query"], "--gallery", "holiday")
        assert [match["photo"] for match in matches] == [match["photo"] for match in result["matches"]]
    with Image.open("grid.png") as picture:
        assert min(picture.size) > 100
    (workdir / "gb.txt").write_text("red 红色在左边\n", "gb18030")
    (result,) = search_all("--queries", "gb.txt", "--gallery", "holiday")
    assert result["query"] == "red 红色在左边"
    (workdir / "cp1252.txt").write_bytes("red\nun café\n".encode("cp1252"))
    line = one_line_error(run_in_process("infer.py", "--queries", "cp1252.txt", "--gallery", "holiday"))
    assert "cp1252.txt, line 2" in line and "UTF-8" in line


def test_a_photo_with_an_undecodable_name_is_plotted(tmp_path):
    from reporting.match_picture import plot_photos
    from retrieval.searcher import Match

    path = tmp_path / os.fsdecode(b"caf\xe9.png")
    Image.new("RGB", (20, 20)).save(path)
    plot_photos([("a café", path, [Match(0.5, path)])], tmp_path / "found.png")
    assert (tmp_path / "found.png").is_file()


def test_a_photo_with_an_undecodable_name_can_be_the_query(workdir):
    shutil.copy(QUERY_PHOTO, photo := os.fsdecode(b"caf\xe9.png"))
    infer("--image", photo, "--gallery", "holiday", "--out", "found.png")
    assert (workdir / "found.png").is_file()


def test_the_table_is_aligned_and_a_picture_is_saved(workdir):
    done = infer("red on the left", "--gallery", "holiday", "--top-k", 12)
    scope, title, *rows, last = done.stdout.splitlines()
    assert scope == "searching the 12 photos of holiday with runs/first"
    assert title == "red on the left" and len(rows) == 12
    assert len({row.index("holiday") for row in rows}) == 1
    picture = last.removeprefix("picture: ")
    assert (workdir / picture).is_file() and picture.startswith("runs/first/matches/")


def test_json_output_saves_no_picture_without_out(workdir):
    infer("red on the left", "--gallery", "holiday", "--json")
    assert not (workdir / "runs" / "first" / "matches").exists()


@pytest.mark.parametrize(
    "flags",
    [
        ["--image", QUERY_PHOTO],
        ["red", "--find", "captions"],
        ["red", "--image", QUERY_PHOTO],
        ["--image", QUERY_PHOTO, "--labels", "a", "b"],
    ],
)
def test_every_kind_of_result_can_be_plotted(workdir, flags):
    infer(*flags, "--out", "x.png")
    with Image.open("x.png") as picture:
        assert min(picture.size) > 100


def test_a_truncated_sentence_is_reported_and_still_searched(workdir):
    done = infer("red and blue " * 60, "--gallery", "holiday")
    assert "the sentence is truncated: the model reads 64 of its 182 tokens" in done.stderr and "photo_" in done.stdout


def test_unreadable_photos_are_reported_and_the_rest_is_searched(workdir):
    (workdir / "holiday" / "broken.jpg").write_bytes(b"garbage")
    data = (workdir / QUERY_PHOTO).read_bytes()
    (workdir / QUERY_PHOTO).write_bytes(data[: len(data) // 2])
    done = infer("red", "--gallery", "holiday", "--top-k", 100)
    assert "2 photos could not be read" in done.stderr and "broken.jpg: not an image" in done.stderr
    assert len(done.stdout.splitlines()) == 1 + 1 + 11 + 1


def test_a_decompression_bomb_is_skipped_without_being_decoded(workdir):
    Image.new("1", (13_500, 13_500)).save(workdir / "holiday" / "bomb.png")
    done = infer("red", "--gallery", "holiday", "--top-k", 100)
    assert "bomb.png" in done.stderr and "decompression bomb" in done.stderr and "bomb.png" not in done.stdout


@pytest.mark.parametrize("flags", [["red", "--gallery", "bad"], ["--image", "bad/x.jpg", "--gallery", "holiday"]])
def test_files_that_are_no_images_give_a_one_line_error(workdir, flags):
    (workdir / "bad").mkdir()
    (workdir / "bad" / "x.jpg").write_bytes(b"garbage")
    assert "not an image" in one_line_error(run_in_process("infer.py", *flags))


def test_search_does_not_write_to_the_photo_folder(workdir):
    before = {path: path.stat().st_mtime_ns for path in (workdir / "holiday").rglob("*")}
    infer("red on the left", "--gallery", "holiday")
    assert {path: path.stat().st_mtime_ns for path in (workdir / "holiday").rglob("*")} == before


def test_a_cache_that_cannot_be_written_gives_a_one_line_error(workdir):
    (workdir / "full").write_text("no folder")
    line = one_line_error(run_in_process("infer.py", "red", "--gallery", "holiday", "--cache-dir", "full"))
    assert "full" in line and "--cache-dir" in line


def test_changed_weights_get_a_new_gallery(workdir, encoded):
    first = weights_key(workdir / "runs" / "first")
    infer("red", "--gallery", "holiday")
    state = load_state(Path("runs/first/best.pt"))
    state["model"]["image_head.norm.bias"][0] += 0.5
    save_state(Path("runs/first/best.pt"), state)
    assert weights_key(workdir / "runs" / "first") != first
    infer("red", "--gallery", "holiday")
    assert len(encoded) == 24


def test_a_pretrained_model_searches_without_a_run_and_has_its_own_galleries(workdir, encoded, tmp_path):
    folder = tmp_path / "clip"
    torch.manual_seed(0)
    for component in clip():
        component.save_pretrained(folder)
    flags = ["red on the left", "--gallery", "holiday", "--top-k", 100]
    search(*flags)
    matches = search(*flags, "--model", folder, "--cache-dir", "cache")
    assert len(encoded) == 24 and matches == search(*flags, "--model", folder) and len(encoded) == 24
    encoder, _ = load_pretrained_encoder(str(folder), max_tokens=64, device="cpu", precision="float32")
    rows, _ = encoder.encode_images([Path(match["photo"]) for match in matches], "")
    scores = rows @ encoder.encode_captions(["red on the left"], "")[0]
    assert [match["score"] for match in matches] == pytest.approx(scores.tolist(), abs=2e-3)
    assert len(search("--image", QUERY_PHOTO, "--model", folder, "--labels", "a", "b")) == 2
    infer(*flags, "--model", folder)
    assert (workdir / "cache" / "matches" / "red-on-the-left.png").is_file()
    num_encoded = len(encoded)
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    infer(*flags, "--model", folder)
    assert len(encoded) == num_encoded + 12


def test_a_copied_run_reuses_the_galleries(workdir, encoded):
    infer("red", "--gallery", "holiday")
    shutil.copytree("runs/first", "runs/copy")
    infer("red", "--gallery", "holiday", "--run", "runs/copy")
    assert len(encoded) == 12


def test_ties_are_ordered_by_index_and_k_may_exceed_the_number_of_captions():
    rows = np.eye(3, dtype=np.float16)[[0, 1, 0]]
    (matches,) = search_captions(np.eye(3, dtype=np.float32)[:1], rows, ["a", "b", "c"], 9)
    assert [match.item for match in matches] == ["a", "c", "b"]


@pytest.mark.parametrize("module", ["infer", "retrieval.searcher", "retrieval.embedding_store"])
def test_importing_search_loads_no_heavy_library(module):
    heavy = {"torch", "transformers", "timm", "pandas", "matplotlib", "albumentations", "scipy"}
    code = f"import sys, {module}; print(*(set(sys.modules) & {heavy}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_sentence_without_a_known_word_is_refused_and_unknown_words_are_named(workdir):
    line = one_line_error(run_in_process("infer.py", "一只狗", "--gallery", "holiday"))
    assert "the model knows no word of the sentence '一只狗'" in line and "bert-base-chinese" in line
    (workdir / "some.txt").write_text("red on the left\nсобака\n", "utf-8")
    line = one_line_error(run_in_process("infer.py", "--queries", "some.txt", "--gallery", "holiday"))
    assert "'собака'" in line
    done = infer("red on the left 狗", "--gallery", "holiday", "--json")
    assert "does not know these words of the sentence: 狗" in done.stderr
    assert "does not know" not in infer("red on the left", "--gallery", "holiday").stderr
    line = one_line_error(run_in_process("infer.py", "--image", QUERY_PHOTO, "--labels", "red", "犬"))
    assert "no word of the label '犬'" in line


def test_labels_are_drawn_as_bars_and_captions_as_a_list(workdir, monkeypatch):
    from reporting import list_picture

    drawn = []
    monkeypatch.setattr(list_picture, "plot_labels", lambda rows, path: drawn.append(("labels", rows)))
    monkeypatch.setattr(list_picture, "plot_captions", lambda rows, path: drawn.append(("captions", rows)))
    for flags in (["--labels", "red", "white"], ["--find", "captions"]):
        done = run_in_process("infer.py", "--image", QUERY_PHOTO, *flags, "--out", "list.png")
        assert done.returncode == 0, done.stderr
    assert [kind for kind, _ in drawn] == ["labels", "captions"]
    assert {match.item for match in drawn[0][1][0][2]} == {"red", "white"}
