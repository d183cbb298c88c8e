"""Text from files and visitors cannot control the terminal: escaped by what prints it, and again by the stream."""

import io
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import one_line_error, run_in_process, write_image_folder
from PIL import Image, ImageDraw

from runtime import cli
from runtime.cli import ON_STDERR, ON_STDOUT, SafeStream
from runtime.text import CONTROL, display_filename, display_text, format_examples, shell_argument

EVIL = {
    "clear screen": "x\x1b[2J\nresult",
    "C1": "a\x9b31mred\x85next",
    "right to left": "photo\u202egnp.exe\u2066",
    "bell and backspace": "safe\x08\x08\x07\x7f",
    "carriage return": "   1   0.999  best.jpg\r",
    "separators": "a\u2028b\u2029c\x0b\x0c\x1c",
    "title": "\x1b]0;title\x07",
    "tags": "flag\U000e0041\U000e007f\ufeff",
    "not UTF-8": "caf\udce9",
    "half an emoji": "\ud83d!",
}
# What a file system allows in a name; bytes beyond UTF-8 and half emojis are tested above.
NAMES = [text for text in EVIL.values() if not re.search("[\ud800-\udfff]", text)]


@pytest.mark.parametrize("text", EVIL.values(), ids=EVIL)
def test_control_characters_are_escaped_and_nothing_else(text):
    shown = display_text(text)
    assert not CONTROL.search(shown) and shown == display_text(shown)
    shown.encode("utf-8")
    assert [c for c in text if not CONTROL.match(c)] == [c for c in text if c in shown and not CONTROL.match(c)]


@pytest.mark.parametrize(
    "text", ["a dog", "一只狗 👩\u200d👧 🇩🇪", "שלום", "नमस्ते\u200d", "C:\\new\\x1b", "é e\u0301", "a\xa0b"]
)
def test_ordinary_text_is_unchanged(text):
    assert display_text(text) == text


def test_escapes_are_readable_and_long_text_is_shortened():
    assert display_text("x\x1b[2J\nresult.jpg\x9b\u202e") == "x\\x1b[2J\\nresult.jpg\\x9b\\u202e"
    assert display_text(Path("a\tb")) == "a\\tb"
    assert display_text("x" * 50, 10) == "x" * 9 + "…" and display_text("x" * 10, 10) == "x" * 10
    assert display_filename(Path("/tmp/a\nb.png")) == "a\\nb.png"
    assert format_examples(["a\nb", 2]) == "a\\nb, 2"


@pytest.mark.parametrize("text", [*EVIL.values(), "plain", "two words", 'it\'s $HOME `x` \\ "q"', "", "-x\n'\\n"])
def test_shell_argument_is_read_back_by_a_shell(text):
    quoted = shell_argument(text)
    assert not CONTROL.search(quoted)
    environment = {**os.environ, "LC_ALL": "C.UTF-8"}
    done = subprocess.run(["bash", "-c", f"printf %s {quoted}"], capture_output=True, env=environment, check=True)
    if "\ud83d" not in text:  # no program can receive half an emoji
        assert done.stdout == os.fsencode(text)


def test_path_that_begins_with_a_hyphen_is_no_flag():
    assert shell_argument(Path("-x")) == "./-x" and shell_argument("-x") == "-x"


def test_stream_passes_colours_and_progress_bars_only():
    out, err = io.StringIO(), io.StringIO()
    text = "\r 50%\x1b[A\x1b[31mred\x1b[0m\x1b[K\n\t\x1b[2J\x1b]0;t\x07\x9b"
    SafeStream(out, ON_STDOUT).write(text)
    SafeStream(err, ON_STDERR).writelines([text, text])
    assert out.getvalue() == "\\r 50%\\x1b[A\x1b[31mred\x1b[0m\\x1b[K\n\t\\x1b[2J\\x1b]0;t\\x07\\x9b"
    assert err.getvalue() == 2 * "\r 50%\x1b[A\x1b[31mred\x1b[0m\x1b[K\n\t\\x1b[2J\\x1b]0;t\\x07\\x9b"
    assert SafeStream(out, ON_STDOUT).write("abc") == 3
    assert SafeStream(sys.stdout, ON_STDOUT).encoding == sys.stdout.encoding


@pytest.mark.parametrize("text", EVIL.values(), ids=EVIL)
def test_error_is_one_line_without_control_characters(text, capsys):
    def main():
        raise ValueError(f"no such file: {text}")

    with pytest.raises(SystemExit):
        cli.run(main)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and not CONTROL.search(err.rstrip("\n"))


def test_library_output_is_escaped(capsys):
    cli.run(lambda: print("warning from a library: \x1b[2J\u202e", file=sys.stderr))
    assert capsys.readouterr().err == "warning from a library: \\x1b[2J\\u202e\n"


def assert_clean(done, *, forged=("result", "next")):
    for stream in (done.stdout, done.stderr):
        for line in stream.split("\n"):
            assert not CONTROL.search(re.sub(r"\r|\x1b\[A", "", line)), line
            assert not any(line.startswith(word) for word in forged), line


@pytest.fixture(scope="module")
def evil_run(tmp_path_factory, image_tower, text_tower):
    """A working folder with a data set and a finished run whose names and captions contain control characters."""
    folder = tmp_path_factory.mktemp("evil")
    data = write_image_folder(folder / "photos\nnext", 30)
    rows, images = ["image,caption"], sorted((data / "Images").iterdir())
    for number, image in enumerate(images):
        name = f"{number:02d} {NAMES[number % len(NAMES)].replace('/', '')}.png".replace("\n", "").replace("\r", "")
        name = re.sub("[\x0b\x0c\x1c\x85\u2028\u2029]", "", name)  # a table has lines
        image.rename(image.with_name(name))
        rows.append(f'"{name}","red on the left \x1b[2J \x9b31m \u202e {number}"')
    (data / "captions.txt").write_text("\n".join(rows) + "\n", "utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        done = run_in_process(
            *("train.py", "--dataset", data, "--image-encoder", image_tower, "--text-encoder", text_tower),
            *("--image-size", 32, "--embed-dim", 16, "--batch-size", 8, "--precision", "float32", "--num-workers", 0),
            *("--epochs", 1, "--runs-dir", "runs\nnext", "--name", "x\x1b[2J"),
        )
        assert done.returncode == 0, done.stderr
    return folder, done


def test_training_prints_clean_lines_and_commands_that_work(evil_run):
    folder, done = evil_run
    assert_clean(done)
    (command,) = [line.strip() for line in done.stdout.splitlines() if line.startswith("  python evaluate.py")]
    words = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {command.removeprefix('python')}"], capture_output=True, text=True, check=True
    ).stdout.split("\0")
    assert (folder / words[1]).is_dir()


@pytest.mark.parametrize(
    "arguments",
    [
        ("evaluate.py", "RUN"),
        ("infer.py", "red on the left \x1b[2J\nresult", "--run", "RUN"),
        ("infer.py", "--image", "PHOTO", "--run", "RUN"),
        ("infer.py", "--image", "PHOTO", "--labels", "red\x1b[2J\nresult", "blue\x9b", "--run", "RUN"),
        ("infer.py", "red", "--gallery", "GALLERY", "--run", "RUN", "--top-k", "20"),
        ("infer.py", "red", "--gallery", "GALLERY", "--run", "RUN", "--json"),
        ("dataset.py", "DATA"),
    ],
    ids=" ".join,
)
def test_scripts_print_clean_lines(arguments, evil_run, monkeypatch, tmp_path):
    folder, _ = evil_run
    monkeypatch.chdir(folder)
    gallery = tmp_path / "gallery\nresult"
    gallery.mkdir()
    for name in NAMES:
        Image.new("RGB", (8, 8)).save(gallery / f"{name}.png", format="png")
        (gallery / f"broken {name}.jpg").write_bytes(b"x")
    (run,) = (path for path in (folder / "runs\nnext").iterdir() if path.is_dir())
    photo = next((folder / "photos\nnext" / "Images").iterdir())
    words = {"RUN": run, "PHOTO": photo, "GALLERY": gallery, "DATA": folder / "photos\nnext"}
    if arguments[0] == "dataset.py":
        from reporting import dataset_report

        monkeypatch.setitem(sys.modules, "dataset", SimpleNamespace(main=dataset_report.main))
    done = run_in_process(*(words.get(word, word) for word in arguments))
    assert done.returncode == 0, done.stderr
    assert_clean(done)


@pytest.mark.parametrize("name", NAMES)
def test_errors_about_a_hostile_name_are_one_clean_line(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / name.replace("/", "")
    folder.mkdir()
    with zipfile.ZipFile(folder / "photos.zip", "w") as archive:
        archive.writestr(f"{name}.jpg", b"no photo")
        archive.writestr(f"{name}.txt", f"caption {name}")
    (folder / "captions.csv").write_text(f'image,caption\n"{name}.jpg","{name}"\n', "utf-8", newline="")
    for arguments in (
        ("train.py", "--dataset", folder),
        ("train.py", "--dataset", folder / "photos.zip"),
        ("evaluate.py", folder),
        ("train.py", "--resume", folder),
        ("infer.py", "x", "--run", folder),
        ("infer.py", "--image", folder / "none.png"),
        ("infer.py", "--queries", folder),
        ("average.py", folder, folder, "--name", "x"),
        ("export.py", folder, "--onnx"),
        ("sweep.py", folder),
    ):
        line = one_line_error(run_in_process(*arguments))
        assert not CONTROL.search(line), line


def test_plots_escape_names_and_captions(tmp_path):
    from reporting import list_picture, match_picture, plots
    from retrieval.searcher import Match

    path = tmp_path / "a\x1b[2J\n\u202eb.png"
    Image.new("RGB", (20, 20)).save(path, format="png")
    texts = []
    import matplotlib.text

    original = matplotlib.text.Text.set_text

    def set_text(self, text):
        texts.append(str(text))
        original(self, text)

    def draw(self, position, text, *arguments, **options):
        texts.append(str(text))
        return original_draw(self, position, text, *arguments, **options)

    original_draw = ImageDraw.ImageDraw.text
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matplotlib.text.Text, "set_text", set_text)
        patch.setattr(ImageDraw.ImageDraw, "text", draw)
        evil = EVIL["clear screen"] + EVIL["C1"] + EVIL["right to left"]
        match_picture.plot_photos([(evil, path, [Match(0.5, path)])], tmp_path / "a.png")
        match_picture.plot_photos([(evil, None, [Match(0.5, path)])] * 2, tmp_path / "b.png")
        list_picture.plot_captions([(evil, path, [Match(0.5, evil)]), (evil, None, [])], tmp_path / "c.png")
        list_picture.plot_labels([(evil, path, [Match(0.5, evil)])], tmp_path / "g.png")
        list_picture.plot_examples(evil, [(path, evil, [evil])], tmp_path / "d.png")
        plots.plot_metrics({"i2t_R@1": 1.0, "t2i_R@1": 1.0}, evil, tmp_path / "e.png")
        import torch

        plots.plot_confusion(torch.eye(2, dtype=torch.int64), [evil, "b"], evil, tmp_path / "f.png")
    assert any("\\x1b[2J" in text for text in texts)
    assert not [text for text in texts if CONTROL.search(text.replace("\n", ""))]
