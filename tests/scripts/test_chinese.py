"""Chinese captions: a vocabulary of characters, training and search, and figures with a Chinese font."""

import re
import warnings

import pytest
from helpers import COLOURS, run_in_process, write_image_folder
from matplotlib import font_manager

from data.tokenizer import HAN_CHARACTER, tokenize, train_tokenizer
from reporting import fonts, plots

NAMES = dict(zip(COLOURS, "红绿蓝黄黑白", strict=True))


@pytest.fixture
def chinese_photos(tmp_path):
    """A data set of photos with two colours and Chinese captions."""
    folder = write_image_folder(tmp_path / "photos", 30)
    captions = (folder / "captions.txt").read_text("utf-8")
    for colour, name in NAMES.items():
        captions = captions.replace(colour, name)
    captions = captions.replace(" on the left and ", "色在左边，右边是").replace("a picture of ", "一张照片，")
    (folder / "captions.txt").write_text(captions.replace(" beside ", "色和").replace(" on the right", "在右"), "utf-8")
    return folder


@pytest.fixture
def system_fonts(tmp_path, monkeypatch):
    """A function that replaces the Chinese fonts that matplotlib finds on this system by those with the given names."""
    original = list(font_manager.fontManager.ttflist)

    def install(*names):
        paths = [build_font(tmp_path / f"wqy-{name}.ttf", name) for name in names]
        others = [entry for entry in original if entry.name not in fonts.FAMILIES]
        monkeypatch.setattr(font_manager.fontManager, "ttflist", others)
        monkeypatch.setattr(font_manager, "findSystemFonts", lambda: list(map(str, paths)))
        fonts.families.cache_clear()

    yield install
    fonts.families.cache_clear()


def build_font(path, family):
    """Write a font in which every Chinese character is a square."""
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen

    pen = TTGlyphPen(None)
    pen.moveTo((100, 0))
    for corner in ((100, 800), (900, 800), (900, 0)):
        pen.lineTo(corner)
    pen.closePath()
    characters = "".join(NAMES.values()) + "狗照片"
    glyphs = [".notdef", *(f"u{ord(character):x}" for character in characters)]
    font = FontBuilder(1000, isTTF=True)
    font.setupGlyphOrder(glyphs)
    font.setupCharacterMap({ord(character): f"u{ord(character):x}" for character in characters})
    font.setupGlyf(dict.fromkeys(glyphs, pen.glyph()))
    font.setupHorizontalMetrics(dict.fromkeys(glyphs, (1000, 100)))
    font.setupHorizontalHeader(ascent=900, descent=-100)
    font.setupNameTable({"familyName": family, "styleName": "Regular"})
    font.setupOS2()
    font.setupPost()
    font.save(path)
    return path


def test_every_chinese_character_of_the_captions_is_in_the_vocabulary():
    characters = [chr(0x4E00 + number) for number in range(3000)]
    captions = ["".join(characters[start : start + 20]) for start in range(0, 3000, 20)]
    tokenizer = train_tokenizer(captions)
    ids = tokenize(tokenizer, captions, max_tokens=64)
    assert all(len(row) == 22 and tokenizer.unk_token_id not in row for row in ids)
    assert not any(token.startswith("##") and HAN_CHARACTER.match(token[2]) for token in tokenizer.get_vocab())


def test_training_and_search_with_chinese_captions_need_no_network(chinese_photos, tmp_path, monkeypatch, system_fonts):
    system_fonts()
    monkeypatch.chdir(tmp_path)
    float32 = ["--precision", "float32"]
    flags = ["--image-encoder", "test_resnet", "--image-size", 32, "--batch-size", 8, "--epochs", 1, "--num-workers", 0]
    flags += ["--no-pretrained", "--name", "run", *float32]
    done = run_in_process("train.py", "--dataset", chinese_photos, *flags)
    assert done.returncode == 0, done.stderr
    done = run_in_process("infer.py", "红色在左边", "--run", "runs/run", *float32)
    assert done.returncode == 0 and "photo_" in done.stdout
    (line,) = [line for line in done.stderr.splitlines() if "shows boxes" in line]
    assert "fonts-noto-cjk" in line and "Glyph" not in done.stderr
    image = chinese_photos / "Images" / "photo_00.png"
    done = run_in_process("infer.py", "--image", image, "--run", "runs/run", *float32)
    assert re.search("[红绿蓝黄黑白]", done.stdout)


def test_chinese_font_of_the_system_is_used(tmp_path, system_fonts, capsys):
    system_fonts("WenQuanYi Zen Hei")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plots.plot_metrics({"i2t_R@1": 1.0, "t2i_R@1": 2.0}, "狗", tmp_path / "dog.png")
    assert capsys.readouterr().err == ""
    assert fonts.families() == ["DejaVu Sans", "WenQuanYi Zen Hei"]
    figure_with_font = (tmp_path / "dog.png").read_bytes()
    system_fonts()
    plots.plot_metrics({"i2t_R@1": 1.0, "t2i_R@1": 2.0}, "狗", tmp_path / "dog.png")
    assert "dog.png" in capsys.readouterr().err and (tmp_path / "dog.png").read_bytes() != figure_with_font


def test_figure_without_chinese_gives_no_warning(tmp_path, system_fonts, capsys):
    system_fonts()
    plots.plot_metrics({"i2t_R@1": 1.0, "t2i_R@1": 2.0}, "dog, α → β", tmp_path / "dog.png")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("text", "shortened"),
    [("a dog in snow", "a dog in snow"), ("a" * 30, "a" * 19 + "…"), ("狗" * 30, "狗" * 9 + "…"), ("狗 狗", "狗 狗")],
)
def test_long_text_is_shortened_and_chinese_text_to_half_the_length(text, shortened):
    assert plots._shorten(text, 20) == shortened
