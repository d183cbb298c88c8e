"""Encodings of caption files are detected and said; where two are as likely, UTF-8 is asked for."""

import pytest

from data.format_detection import read_layout
from data.text_encoding import read_text

TEXTS = {
    "cp949": "강아지가 눈 위를 달리고 아이가 웃는다",
    "euc_kr": "고양이가 창가에서 조용히 자고 있다",
    "cp932": "雪の上を走る犬と笑っている子供",
    "euc_jp": "猫が窓辺で静かに寝ている",
    "gb18030": "一只狗在雪地里奔跑，孩子在笑",
    "big5": "一隻狗在雪地裡奔跑，孩子在公園裡笑",
    "cp1252": "Zwei Männer lächeln über grüne Bäume",
    "latin-1": "Deux garçons âgés mangent des pêches à l'école",
    "cp1251": "Собака бежит по снегу",
    "koi8_r": "Кошка спит у окна",
    "cp1253": "Ένας σκύλος τρέχει στο χιόνι",
    "utf-16": "a dog on the beach",
    "utf-16-le": "a dog on the beach",
    "utf-32": "一只狗",
}


def write(path, text, encoding):
    path.write_bytes("".join(f"p{k}.jpg,{text}\n" for k in range(12)).encode(encoding))
    return path


@pytest.mark.parametrize("encoding", TEXTS)
def test_encoding_is_detected_and_said(tmp_path, encoding):
    records = read_layout(write(tmp_path / "captions.csv", TEXTS[encoding], encoding)).captions
    assert {text for _, text, _ in records.rows} == {TEXTS[encoding]} and records.bad_rows == []
    is_said = any("is not UTF-8: read as" in note for note in records.notes)
    assert is_said != encoding.startswith("utf")


def test_two_encodings_that_are_as_likely_are_an_error(tmp_path, monkeypatch):
    import chardet

    guesses = [{"encoding": "Windows-1251", "confidence": 0.5}, {"encoding": "KOI8-R", "confidence": 0.45}]
    monkeypatch.setattr(chardet, "detect_all", lambda *_, **__: guesses)
    path = write(tmp_path / "captions.csv", TEXTS["cp1251"], "cp1251")
    with pytest.raises(
        ValueError, match=r"captions\.csv.*as likely Cyrillic, Windows-1251 as .*KOI8-R; save .* as UTF-8"
    ):
        read_layout(path)
    guesses[1]["confidence"] = 0.1
    assert len(read_layout(path).captions.rows) == 12


def test_damaged_line_of_a_utf8_file_is_a_bad_row(tmp_path):
    lines = [f"p{k}.jpg,一只小狗在雪地里".encode() for k in range(40)]
    lines[7] = lines[7][:-2]
    lines[9] = "p9.jpg,ein Hund läuft übers grüne Gras".encode("latin-1")
    (tmp_path / "captions.csv").write_bytes(b"\n".join(lines))
    records = read_layout(tmp_path / "captions.csv").captions
    assert len(records.rows) == 38 and [row.split(":")[0][-2:] for row in records.bad_rows] == [" 8", "10"]
    assert records.notes == []


@pytest.mark.parametrize("rows", [1, 3, 500])
def test_nul_does_not_make_utf16_of_a_file(tmp_path, rows):
    text = "a.jpg,nul \0 here\n" + "".join(f"p{k}.jpg,a dog\n" for k in range(rows))
    (tmp_path / "captions.csv").write_text(text)
    assert read_text(tmp_path / "captions.csv").text == text
    records = read_layout(tmp_path / "captions.csv").captions
    assert len(records.rows) == rows and "line 1: expected a caption of a.jpg, found a NUL" in records.bad_rows[0]
