"""Chinese from end to end: a vocabulary of characters, training and search, and pictures that show it."""

import re
import warnings

import pytest
from helpers import COLOURS, run_in_process, write_image_folder
from matplotlib import font_manager

from data.tokenizer import CHINESE, tokenize, train_tokenizer
from reporting import fonts, plots

NAMES = dict(zip(COLOURS, "红绿蓝黄黑白", strict=True))


@pytest.fixture
def chinese_photos(tmp_path):
    """The photos of two colours, captioned in Chinese."""
    folder = write_image_folder(tmp_path / "photos", 30)
    english = (folder / "captions.txt").read_text("utf-8")
    for colour, name in NAMES.items():
        english = english.replace(colour, name)
    chinese = english.replace(" on the left and ", "色在左边，右边是").replace("a picture of ", "一张照片，")
    (folder / "captions.txt").write_text(chinese.replace(" beside ", "色和").replace(" on the right", "在右"), "utf-8")
    return folder


@pytest.fixture
def system_fonts(tmp_path, monkeypatch):
    """Makes this system one with these Chinese fonts, and no others."""
    before = list(font_manager.fontManager.ttflist)

    def install(*names):
        paths = [build_font(tmp_path / f"wqy-{name}.ttf", name) for name in names]
        others = [entry for entry in before if entry.name not in fonts.FAMILIES]
        monkeypatch.setattr(font_manager.fontManager, "ttflist", others)
        monkeypatch.setattr(font_manager, "findSystemFonts", lambda: list(map(str, paths)))
        fonts.families.cache_clear()

    yield install
    fonts.families.cache_clear()


def build_font(path, family):
    """A font whose every Chinese letter is a square."""
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen

    pen = TTGlyphPen(None)
    pen.moveTo((100, 0))
    for corner in ((100, 800), (900, 800), (900, 0)):
        pen.lineTo(corner)
    pen.closePath()
    letters = "".join(NAMES.values()) + "狗照片"
    names = [".notdef", *(f"u{ord(letter):x}" for letter in letters)]
    font = FontBuilder(1000, isTTF=True)
    font.setupGlyphOrder(names)
    font.setupCharacterMap({ord(letter): f"u{ord(letter):x}" for letter in letters})
    font.setupGlyf(dict.fromkeys(names, pen.glyph()))
    font.setupHorizontalMetrics(dict.fromkeys(names, (1000, 100)))
    font.setupHorizontalHeader(ascent=900, descent=-100)
    font.setupNameTable({"familyName": family, "styleName": "Regular"})
    font.setupOS2()
    font.setupPost()
    font.save(path)
    return path


def test_every_chinese_character_of_the_captions_is_known():
    characters = [chr(0x4E00 + number) for number in range(3000)]
    captions = ["".join(characters[start : start + 20]) for start in range(0, 3000, 20)]
    tokenizer = train_tokenizer(captions)
    ids = tokenize(tokenizer, captions, max_tokens=64)
    assert all(len(row) == 22 and tokenizer.unk_token_id not in row for row in ids)
    assert not any(word.startswith("##") and CHINESE.match(word[2]) for word in tokenizer.get_vocab())


def test_chinese_captions_are_trained_and_searched_without_network(chinese_photos, tmp_path, monkeypatch, system_fonts):
    system_fonts()
    monkeypatch.chdir(tmp_path)
    small = ["--image-encoder", "test_resnet", "--image-size", 32, "--batch-size", 8, "--epochs", 1, "--num-workers", 0]
    precise = ["--precision", "float32"]
    done = run_in_process("train.py", "--dataset", chinese_photos, "--no-pretrained", *small, *precise, "--name", "run")
    assert done.returncode == 0, done.stderr
    done = run_in_process("infer.py", "红色在左边", "--run", "runs/run", *precise)
    assert done.returncode == 0 and "photo_" in done.stdout
    (line,) = [line for line in done.stderr.splitlines() if "shows boxes" in line]
    assert "fonts-noto-cjk" in line and "Glyph" not in done.stderr
    captions = run_in_process(
        "infer.py", "--image", chinese_photos / "Images" / "photo_00.png", "--run", "runs/run", *precise
    )
    assert re.search("[红绿蓝黄黑白]", captions.stdout)


def test_a_font_of_the_system_draws_chinese(tmp_path, system_fonts, capsys):
    system_fonts("WenQuanYi Zen Hei")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plots.plot_metrics({"i2t_R@1": 1.0, "t2i_R@1": 2.0}, "狗", tmp_path / "dog.png")
    assert capsys.readouterr().err == ""
    assert fonts.families() == ["DejaVu Sans", "WenQuanYi Zen Hei"]
    with_font = (tmp_path / "dog.png").read_bytes()
    system_fonts()
    plots.plot_metrics({"i2t_R@1": 1.0, "t2i_R@1": 2.0}, "狗", tmp_path / "dog.png")
    assert "dog.png" in capsys.readouterr().err and (tmp_path / "dog.png").read_bytes() != with_font


def test_a_picture_without_chinese_needs_no_font(tmp_path, system_fonts, capsys):
    system_fonts()
    plots.plot_metrics({"i2t_R@1": 1.0, "t2i_R@1": 2.0}, "dog, α → β", tmp_path / "dog.png")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("text", "cut"),
    [("a dog in snow", "a dog in snow"), ("a" * 30, "a" * 19 + "…"), ("狗" * 30, "狗" * 9 + "…"), ("狗 狗", "狗 狗")],
)
def test_long_names_are_cut_and_chinese_ones_at_half_the_length(text, cut):
    assert plots._cut(text, 20) == cut
