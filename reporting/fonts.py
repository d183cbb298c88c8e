"""Fonts for figures: matplotlib's default font has no Chinese characters, so a font of the system is added."""

import importlib.util
import re
from functools import cache
from pathlib import Path

from runtime.text import EAST_ASIAN

EAST_ASIAN_CHARACTER = re.compile(f"[{EAST_ASIAN}]")
FAMILIES = (  # fonts of Linux, Windows and macOS with Chinese characters
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Noto Sans SC",
    "Source Han Sans SC",
    "Source Han Sans CN",
    "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei",
    "Microsoft YaHei",
    "SimHei",
    "SimSun",
    "PingFang SC",
    "Hiragino Sans GB",
    "Heiti SC",
    "STHeiti",
    "Arial Unicode MS",
    "Droid Sans Fallback",
)
FONT_FILES = re.compile(
    "cjk|wqy|notosanssc|sourcehan|msyh|simhei|simsun|pingfang|hiragino|heiti|droidsansfallback", re.I
)
INSTALL_HINT = "for Chinese, run `apt-get install fonts-noto-cjk`; on Windows and macOS, add the language"


@cache
def families() -> list[str]:
    """Return the font families in order of preference: matplotlib's default, then one with Chinese characters.

    If matplotlib's cached list has none, search the system's font folders, which finds newly installed fonts.
    """
    from matplotlib import font_manager

    if not (available := _available_families()):
        for path in font_manager.findSystemFonts():
            if FONT_FILES.search(Path(path).name):
                font_manager.fontManager.addfont(path)
        available = _available_families()
    return ["DejaVu Sans", *available[:1]]


@cache
def _default_font_file() -> Path:
    """Return the file of DejaVu Sans, which matplotlib brings along, without importing matplotlib."""
    folder = Path(importlib.util.find_spec("matplotlib").origin).parent
    return folder / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"


def font_file(text: str) -> Path:
    """Return the file of a font for a text: DejaVu Sans, or for East Asian characters one of the system's."""
    if not EAST_ASIAN_CHARACTER.search(text) or len(families()) == 1:
        return _default_font_file()
    from matplotlib import font_manager

    return Path(font_manager.findfont(families()[1]))


def _available_families():
    from matplotlib import font_manager

    names = {entry.name for entry in font_manager.fontManager.ttflist}
    return [name for name in FAMILIES if name in names]
