"""The line about a gallery that is being encoded, and searches that meanwhile wait for it."""

import threading
import types

import pytest

from retrieval.embedding_store import Gallery
from webui.catalog import Catalog
from webui.encoding import EncodingProgress, format_time_left


def test_line_names_the_share_and_the_time_left():
    now = [100.0]
    progress = EncodingProgress(clock=lambda: now[0])
    report = progress.reporter("key", "pictures")
    assert progress.status() == []
    report(0, 3_000)
    assert [status.text for status in progress.status()] == ["encoding 3,000 photos, once: 0 %"]
    now[0] += 16.4
    report(360, 3_000)
    ((text, share),) = progress.status()
    assert text == "encoding 3,000 photos, once: 12 %, 2 min left" and share == pytest.approx(0.12)
    now[0] += 60  # between two batches the time left falls
    assert progress.status()[0].text == "encoding 3,000 photos, once: 12 %, 1 min left"
    progress.reporter("other", "holiday")(1, 1)
    assert [status.text.partition(",")[0] for status in progress.status()] == [
        "encoding 3",
        "encoding 1 photo of holiday",
    ]
    assert progress.counts() == (361, 3_001)
    progress.finish("key")
    progress.finish("other")
    assert progress.status() == [] and progress.counts() == (0, 0)


def test_gallery_that_needs_no_encoding_has_no_line():
    progress = EncodingProgress()
    progress.reporter("key", "pictures")(0, 0)
    assert progress.status() == []


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "1 s"), (59.4, "59 s"), (59.6, "1 min"), (61, "1 min"), (3_570, "1 h 0 min"), (7_500, "2 h 5 min")],
)
def test_time_left_is_rounded_as_people_say_it(seconds, text):
    assert format_time_left(seconds) == text


@pytest.fixture
def catalog(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "pictures" / "a").mkdir(parents=True)
    for name in ("1.jpg", "a/2.jpg"):
        (tmp_path / "pictures" / name).write_bytes(b"x")
    settings = {"split": "test", "data_dir": None, "options": {}, "runs_dir": tmp_path / "none"}
    return Catalog(tmp_path / "run", [tmp_path / "pictures"], **settings)


def test_searches_wait_for_the_encoding_and_it_happens_once(catalog):
    started, release, calls = threading.Event(), threading.Event(), []

    def encode(photos, on_progress):
        calls.append(photos.name)
        on_progress(0, len(photos.stamps))
        started.set()
        release.wait(10)
        return Gallery(photos.root, list(photos.stamps), None, {}, photos.root, "1")

    catalog._searchers = lambda run: types.SimpleNamespace(gallery=encode)
    found = []
    threads = [threading.Thread(target=lambda: found.append(catalog.gallery(*catalog.first))) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert started.wait(10) and not catalog.is_open(*catalog.first) and not found
    assert catalog.encoding.status()[0].text == "encoding 2 photos, once: 0 %"
    release.set()
    for thread in threads:
        thread.join(10)
    assert len(found) == 3 and len(calls) == 1 and catalog.is_open(*catalog.first) and catalog.encoding.status() == []
    root, name = catalog.photo(*catalog.first, "a/2.jpg")
    assert catalog.folder_of("pictures", root, name) == "pictures/a"
    assert catalog.folder_of("pictures", root, "1.jpg") == "pictures"
    catalog.refresh()
    catalog.gallery(*catalog.first)
    assert len(calls) == 2  # photos that were added are found


def test_error_of_the_first_encoding_ends_the_page(catalog):
    import app

    def fail(photos, on_progress):
        on_progress(0, 2)
        raise ValueError("none of the 2 photos could be read")

    catalog._searchers = lambda run: types.SimpleNamespace(gallery=fail)
    errors, failed = [], threading.Event()
    app.encode_first(catalog, errors, failed)
    assert failed.is_set() and "none of the 2 photos" in str(errors[0]) and catalog.encoding.status() == []
