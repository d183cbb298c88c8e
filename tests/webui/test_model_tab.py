"""Recall in words: what is measured, what it means, and the command for what is missing."""

import json
import types

import pytest

from webui.model_tab import best_epoch, describe_pretrained, describe_run


def recall(t2i, i2t, **others):
    values = {"t2i": t2i, "i2t": i2t}
    keys = {f"{way}_R@{k}": value for way in values for k, value in zip((1, 5, 10), values[way], strict=True)}
    return keys | others


def write_log(folder, *records):
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def test_before_evaluation_the_best_epoch_is_shown_with_the_command_that_measures_the_rest(tmp_path):
    best = recall((21.5, 50.25, 70), (30, 60, 80), epoch=2, rsum=311.75)
    write_log(
        tmp_path, recall((1, 2, 3), (1, 2, 3), epoch=1, rsum=12), best, recall((2, 3, 4), (1, 2, 3), epoch=3, rsum=15)
    )
    html = describe_run(tmp_path, {})
    assert "epoch 2" in html and "21.5 %" in html and "80.0 %" in html and "validation" in html
    assert "of 100 sentences, 22 find" in html and "50 among the first 5" in html
    assert "python evaluate.py RUN --split test" in html and str(tmp_path) not in html
    assert best_epoch(tmp_path)["epoch"] == 2


def test_after_evaluation_its_splits_replace_the_log(tmp_path):
    write_log(tmp_path, recall((21.5, 50, 70), (30, 60, 80), epoch=1, rsum=311))
    measured = {"test": recall((11, 12, 13), (14, 15, 16)), "test, with CSLS": recall((17, 18, 19), (1, 2, 3))}
    html = describe_run(tmp_path, measured | {"zero-shot pets": {"top1": 90.0}})
    assert html.count("<table") == 2 and "with CSLS" in html and "11.0 %" in html
    assert "21.5" not in html and "evaluate.py" not in html and "pets" not in html
    assert "evaluate.py" in describe_run(tmp_path, {"val": recall((1, 2, 3), (4, 5, 6))})


@pytest.mark.parametrize("record", [{}, {"epoch": 1, "rsum": "high", "t2i_R@1": 3}])
def test_log_without_recall_is_said(tmp_path, record):
    write_log(tmp_path, *[record] * bool(record))
    assert "Nothing is measured yet" in describe_run(tmp_path, {}) and best_epoch(tmp_path) is None


def test_names_of_strangers_are_text_and_no_html(tmp_path):
    html = describe_run(tmp_path, {"<img src=x onerror=alert(1)>": recall((1, 2, 3), (4, 5, 6))})
    assert "<img" not in html and "&lt;img" in html
    html = describe_pretrained("<b>clip</b>")
    assert "<b>" not in html and "python evaluate.py --model" in html


def test_names_of_photos_are_text_and_no_html():
    from pathlib import Path

    from webui.search_tab import describe_photo, describe_search

    html = describe_photo('a/<script>"x"</script>\x1b.jpg', "<i>folder</i>", "original?name=%22&run=x")
    assert "<script>" not in html and "<i>" not in html and "\x1b" not in html and "name=%22&amp;run=x" in html
    gallery = types.SimpleNamespace(names=["a"] * 3_000, unreadable={"b": "cut off"})
    assert "2 more were found, but deleted" in describe_search(10, gallery, lost=2)
    html = describe_search(12, gallery, Path("/x/<b>.jpg"))
    assert "The best 12 photos like &lt;b&gt;.jpg of 3,000 photos searched; 1 photo could not be read" in html
