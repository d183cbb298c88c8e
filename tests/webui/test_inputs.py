"""The checks of visitors' text, numbers, choices and pictures."""

import time
import types
import warnings

import pytest
from PIL import Image

from webui import inputs
from webui.checks import check_inputs, public_error
from webui.inputs import VisitorError, check_choice, check_count, check_labels, check_sentence, load_picture


def test_sentence_is_limited_before_it_is_tokenized():
    assert check_sentence("  a dog \n") == "a dog" and check_sentence(None) == ""
    assert len(check_sentence("é" * 2_000)) == 2_000
    for sentence in ("y" * 2_001, " " * 50_000_000, "犬" * 3_000):
        with pytest.raises(VisitorError, match=r"characters; the maximum is 2,000"):
            check_sentence(sentence)
    for sentence in (3, True, ["a"], {"path": "/etc/passwd"}, "half \ud800"):
        with pytest.raises(VisitorError, match="the sentence"):
            check_sentence(sentence)


def test_labels_are_limited_in_number_and_length():
    assert check_labels(" a dog\n\n a cat\r\n") == ["a dog", "a cat"]
    assert len(check_labels("\n".join(f"thing {number}" for number in range(1_000)))) == 1_000
    with pytest.raises(VisitorError, match="1,001 labels were given; the maximum is 1,000"):
        check_labels("x\n" * 1_001)
    with pytest.raises(VisitorError, match="label 2 has 201 characters"):
        check_labels("a\n" + "b" * 201)
    with pytest.raises(VisitorError, match="the labels have 5,000,000 characters"):
        check_labels("c" * 5_000_000)


def test_equal_labels_are_found_in_linear_time():
    from retrieval.zero_shot import _check_labels

    labels = [f"label {number}" for number in range(100_000)]
    start = time.monotonic()
    _check_labels(labels)
    assert time.monotonic() - start < 2
    with pytest.raises(ValueError, match="'label 7' is given twice"):
        _check_labels([*labels, "label 7"])


@pytest.mark.parametrize(
    "count", [0, -1, 61, 2.5, 1e308, float("nan"), float("inf"), 10**400, "3", None, True, [3], {}]
)
def test_number_of_matches_is_a_whole_number_within_its_limits(count):
    assert check_count(3.0) == 3 and check_count(60) == 60
    with pytest.raises(VisitorError, match="from 1 to 60") as error:
        check_count(count)
    assert len(str(error.value)) < 200


def test_choice_must_be_on_offer():
    assert check_choice("a", ["a", "b"], "run") == "a"
    for value in ("c", "", "z" * 100_000, None, 1, ["a"], {"path": "a"}):
        with pytest.raises(VisitorError, match="no such run") as error:
            check_choice(value, ["a", "b"], "run")
        assert len(str(error.value)) < 200


def test_picture_of_a_run_has_the_formats_and_limits_of_photos(tmp_path):
    Image.new("RGB", (900, 300), "red").save(tmp_path / "good.png")
    assert load_picture(tmp_path / "good.png", 600).size == (600, 200)
    Image.new("RGB", (20, 20)).save(tmp_path / "script.eps")  # Pillow would pass it to Ghostscript
    (tmp_path / "script.eps").rename(tmp_path / "curves.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "good.png")
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "folder.png").mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns about decompression bombs
        Image.new("1", (13_000, 13_000)).save(tmp_path / "large.png")
    for name in ("curves.png", "link.png", "text.png", "folder.png", "large.png", "none.png"):
        with warnings.catch_warnings(), pytest.raises(VisitorError, match=name) as error:
            warnings.simplefilter("ignore")
            load_picture(tmp_path / name, 600)
        assert str(tmp_path) not in str(error.value)


def test_every_component_is_checked_whatever_it_is_given(tmp_path):
    gr = pytest.importorskip("gradio")
    (tmp_path / "photo.jpg").write_bytes(b"x")
    photo = {"path": str(tmp_path / "photo.jpg"), "url": "http://192.0.2.1/x", "meta": {"_type": "gradio.FileData"}}
    components = [gr.Textbox(), gr.Image(), gr.Dropdown(["r"], label="Run"), gr.Slider(1, 60)]
    values = check_inputs(gr, components, ["a dog", photo, "r", 3], tmp_path)
    assert values == ["a dog", {"path": photo["path"], "meta": {"_type": "gradio.FileData"}}, "r", 3]
    stranger = {"path": "/etc/hostname"}
    for position in range(len(values)):
        for bad in (stranger, {"path": "http://192.0.2.1/x"}, [stranger], 7.5):
            attempt = [*values[:position], bad, *values[position + 1 :]]
            with pytest.raises(VisitorError):
                check_inputs(gr, components, attempt, tmp_path)
    with pytest.raises(VisitorError, match="needs 4 values, got 1"):
        check_inputs(gr, components, ["a"], tmp_path)
    with pytest.raises(VisitorError, match="takes no such value"):
        check_inputs(gr, [gr.File()], [photo], tmp_path)


@pytest.mark.parametrize(
    ("error", "public"),
    [
        (VisitorError("label 2 is too long"), "label 2 is too long"),
        (ValueError("the sentence is empty"), "the sentence is empty"),
        (ValueError("no cache at /srv/cache/features"), None),
        (FileNotFoundError(2, "No such file", "/srv/data/x.jpg"), None),
        (RuntimeError("anything in /home/ann/x.py"), None),
        (KeyError("x"), None),
    ],
)
def test_error_shows_visitors_no_path_and_the_terminal_one_line(tmp_path, capsys, error, public):
    gr = pytest.importorskip("gradio")
    from webui.catalog import Catalog

    (tmp_path / "run").mkdir()
    catalog = Catalog(tmp_path / "run", [], split="test", runs_dir=tmp_path / "none", data_dir=None, options={})
    shown = public_error(gr, catalog, error)
    assert isinstance(shown, gr.Error) and not shown.print_exception
    assert shown.message == (public or "this did not work, and the reason stands in the terminal of the page")
    printed = capsys.readouterr().err
    assert printed.count("\n") == (0 if public else 1) and "Traceback" not in printed


def test_uploaded_photo_that_cannot_be_read_is_named_without_its_folder(tmp_path):
    (tmp_path / "x.jpg").write_bytes(b"no photo")
    with pytest.raises(VisitorError, match=r"^x\.jpg is not a photo that can be read$"):
        inputs.check_upload(str(tmp_path / "x.jpg"))


def test_path_of_an_upload_is_removed_from_messages(tmp_path):
    from webui.catalog import Catalog

    public = Catalog.public_error
    catalog = types.SimpleNamespace(runs={}, folders={}, data_dir=None, options={}, split="test")
    path = f"/tmp/search-page-ab12/files/{'0a' * 32}/beach.jpg"
    assert public(catalog, f"{path}: a JPEG with 900 scans") == "beach.jpg: a JPEG with 900 scans"
    assert public(catalog, "cannot read /var/lib/other/beach.jpg") is None
