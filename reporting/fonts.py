"""Letters for pictures: matplotlib's own font has no Chinese, and one of the system's fills in where there is one."""

import re
from functools import cache
from pathlib import Path

from runtime.text import EAST_ASIAN

CHINESE = re.compile(f"[{EAST_ASIAN}]")
FAMILIES = (  # what systems bring: Linux, Windows, macOS
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
FILES = re.compile("cjk|wqy|notosanssc|sourcehan|msyh|simhei|simsun|pingfang|hiragino|heiti|droidsansfallback", re.I)
HOW = "for Chinese: `apt-get install fonts-noto-cjk`, on Windows and macOS add the language"


@cache
def families() -> list[str]:
    """The fonts that letters are looked for in, one after another: matplotlib's own, then one that has Chinese.

    One that was installed a minute ago counts; matplotlib's list of fonts is as old as its first run.
    """
    from matplotlib import font_manager

    if not (found := _known()):
        for path in font_manager.findSystemFonts():
            if FILES.search(Path(path).name):
                font_manager.fontManager.addfont(path)
        found = _known()
    return ["DejaVu Sans", *found[:1]]


def _known():
    from matplotlib import font_manager

    names = {entry.name for entry in font_manager.fontManager.ttflist}
    return [name for name in FAMILIES if name in names]
