"""Encoding a gallery: the estimate before it, the number of decoding processes, and one precision per gallery."""

import json
from dataclasses import replace

import pytest
import torch
from helpers import tiny_model, write_image_folder

from retrieval import gallery_encoding
from retrieval.encoder import build_encoder
from retrieval.gallery_encoding import (
    GalleryEncoder,
    Speed,
    decoding_processes,
    measure_speed,
    seconds_per_photo,
)
from retrieval.gallery_settings import ReadingSettings, gallery_folder, record_precision, recorded_precision


@pytest.fixture(scope="module")
def encoder():
    options = {"image_size": 32, "max_tokens": 16, "device": "cpu", "precision": "float32", "num_workers": 0}
    model, tokenizer = tiny_model()
    return build_encoder(model.eval(), tokenizer, **options)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_image_folder(tmp_path_factory.mktemp("encoding") / "photos", 20) / "Images"


@pytest.mark.parametrize(
    ("decode", "encode", "cores", "on_cpu", "seconds", "processes"),
    [
        (0.002, 0.020, 2, True, 0.021, 1),  # small photos: one process decodes while the tower uses the rest
        (0.050, 0.015, 2, True, 0.040, 2),  # photos of a camera
        (0.008, 0.002, 16, True, 0.0025, 4),
        (0.010, 0.0005, 8, False, 0.00125, 8),  # a GPU waits for the cores
        (0.001, 0.002, 8, False, 0.002, 1),
        (0.010, 0.001, 1, True, 0.011, 1),
    ],
)
def test_as_many_processes_decode_as_pay(decode, encode, cores, on_cpu, seconds, processes):
    speed = Speed(decode, encode)
    assert seconds_per_photo(speed, 1, cores, on_cpu=on_cpu) == pytest.approx(seconds)
    assert decoding_processes(speed, 1, cores, on_cpu=on_cpu) == processes


def announced(encoder, root, store, names, capsys, monkeypatch, **environment):
    monkeypatch.setattr(gallery_encoding, "measure_speed", lambda *_: Speed(0.01, 0.1))
    monkeypatch.setattr(gallery_encoding, "usable_cores", lambda: 2)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    store.mkdir(exist_ok=True)
    gallery_encoder = GalleryEncoder(encoder, root, store)
    gallery_encoder.announce(names)
    return gallery_encoder, capsys.readouterr().err


def test_the_time_is_estimated_before_it_begins(encoder, root, tmp_path, capsys, monkeypatch):
    names = ["photo_00.png"] * 3000
    _, line = announced(encoder, root, tmp_path, names, capsys, monkeypatch)
    assert line == "encoding 3,000 photos: about 5 min\n"
    assert announced(encoder, root, tmp_path, names[:20], capsys, monkeypatch)[1] == ""


def test_the_price_of_mirrored_reading_is_printed(encoder, root, tmp_path, capsys, monkeypatch):
    mirrored = replace(encoder, tta_flip=True)
    _, line = announced(mirrored, root, tmp_path, ["photo_00.png"] * 3000, capsys, monkeypatch)
    expected = "encoding 3,000 photos: about 10 min, each of them mirrored too (about 5 min with --mirrored no)\n"
    assert line == expected


def test_of_several_processes_the_first_prints_the_time_of_all(encoder, root, tmp_path, capsys, monkeypatch):
    names, launched = ["photo_00.png"] * 3000, {"WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "2"}
    first, line = announced(encoder, root, tmp_path, names, capsys, monkeypatch, RANK="0", **launched)
    assert line == "encoding 3,000 photos: about 2 min\n"
    assert first.report().startswith("3,000 photos encoded by 3 processes in ")
    gallery_encoder, line = announced(encoder, root, tmp_path, names, capsys, monkeypatch, RANK="1", **launched)
    assert line == ""
    assert len(list(gallery_encoder(["photo_00.png"]))) == 1 and gallery_encoder.report() is None


def test_speed_is_measured_on_the_readable_photos(encoder, root, tmp_path):
    (tmp_path / "damaged.jpg").write_bytes(b"no photo")
    paths = [root / "photo_00.png", tmp_path / "damaged.jpg", tmp_path / "missing.png"]
    speed = measure_speed(encoder, paths)
    assert speed.decode > 0 and speed.encode > 0
    assert measure_speed(encoder, paths[1:]) is None


def test_rows_are_those_of_the_encoder_and_reasons_lack_the_folder(encoder, root, tmp_path):
    names = [path.name for path in sorted(root.iterdir())]
    gallery_encoder = GalleryEncoder(encoder, root, tmp_path)
    ((rows, reasons),) = gallery_encoder([*names, "missing.png"])
    expected, _ = encoder.encode_images([root / name for name in names], "")
    assert torch.equal(torch.from_numpy(rows), expected)
    assert reasons == [None] * 20 + ["No such file or directory"]
    gallery_encoder.announce(names)
    assert gallery_encoder.report().startswith("20 photos encoded in ")


def test_a_gallery_keeps_the_precision_of_its_first_photo(encoder, root, tmp_path):
    for precision, store in ((torch.bfloat16, tmp_path / "new"), (torch.float32, tmp_path / "old")):
        store.mkdir()
        if store.name == "old":  # of a version that recorded nothing
            (store / "1.jsonl").write_text("")
        GalleryEncoder(replace(encoder, precision=precision), root, store).announce(["photo_00.png"])
    assert recorded_precision(tmp_path / "new") == "bfloat16" and recorded_precision(tmp_path / "old") is None
    later = GalleryEncoder(encoder, root, tmp_path / "new")
    later.announce(["photo_01.png"])
    assert later.encoder.precision == torch.bfloat16


def test_a_chosen_precision_has_a_gallery_of_its_own(tmp_path):
    def folder(*settings):
        return gallery_folder(ReadingSettings(*settings), lambda *parts: tmp_path / "-".join(["gallery", *parts]))

    assert folder("auto").name == folder("float32").name == "gallery"  # whichever comes first
    (tmp_path / "gallery").mkdir()
    record_precision(tmp_path / "gallery", "bfloat16")
    assert folder("bfloat16").name == "gallery" and folder("float32").name == "gallery-float32"
    assert folder("auto", False).name == "gallery-mirrored=False"
    (tmp_path / "gallery-mirrored=True").mkdir()
    record_precision(tmp_path / "gallery-mirrored=True", "bfloat16")
    assert folder("float32", True).name == "gallery-mirrored=True-float32"


def test_a_gallery_without_a_record_is_used_with_any_precision(tmp_path, capsys):
    (tmp_path / "gallery").mkdir()
    (tmp_path / "gallery" / "1.jsonl").write_text("")
    for record in (None, "{}", json.dumps({"precision": "int4"})):
        if record is not None:
            (tmp_path / "gallery" / "encoding.json").write_text(record)
        settings = ReadingSettings("float32")
        assert gallery_folder(settings, lambda *parts: tmp_path / "-".join(["gallery", *parts])).name == "gallery"
