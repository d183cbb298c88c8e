"""Lines of a text in blocks: the same as `str.split`, for strings and for UTF-8; rows of a table across blocks."""

import pytest

from data import text_lines
from data.caption_rows import CaptionRows
from data.records import FIND_COLUMNS
from data.table_reader import read_table
from data.text_lines import TextLines

TEXTS = ["", "\n", "a", "a\n", "\n\na", "one\ntwo\n\nthree", "é\n海,辺\n😀 \n" * 9, "x" * 50 + "\n" + "y" * 50]


@pytest.fixture(params=[1, 7, 40])
def small_blocks(request, monkeypatch):
    monkeypatch.setattr(text_lines, "BLOCK", request.param)
    monkeypatch.setattr("data.text_encoding.BLOCK", request.param)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("encode", [str, str.encode])
def test_lines_are_those_of_split(small_blocks, text, encode):
    lines, expected = TextLines(encode(text)), text.split("\n")

    assert list(lines) == expected and len(lines) == len(expected)
    assert [lines[k] for k in reversed(range(len(lines)))] == expected[::-1]


ROWS = '''image,caption,split
a 1.jpg,a plain row,train
a 1.jpg,"a comma, and
a second line, of
three",val
b\\c.png,  spaces around  ,test
b\\c.png,"doubled ""quotes""",train
b\\c.png,,train
,no image,train
d.jpg,one, comma too many,train
e.jpg,"not closed,val
f.jpg,海辺の犬 😀,val
f.jpg,"[""two"", ""captions""]",val

g.jpg,last,test'''


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_table_in_small_blocks_is_the_same_table(tmp_path, monkeypatch, newline, start):
    path = tmp_path / "captions.csv"
    path.write_bytes((start + ROWS.replace("\n", newline)).encode())
    whole = read_table(path, FIND_COLUMNS)
    monkeypatch.setattr(text_lines, "BLOCK", 5)
    monkeypatch.setattr("data.text_encoding.BLOCK", 5)
    parts = read_table(path, FIND_COLUMNS)

    assert whole == parts and len(whole.bad_rows) == 4
    assert whole.rows[:3] == [
        ("a 1.jpg", "a plain row", "train"),
        ("a 1.jpg", "a comma, and a second line, of three", "val"),
        ("b/c.png", "spaces around", "test"),
    ]
    assert [row[1] for row in whole.rows[3:]] == ['doubled "quotes"', "海辺の犬 😀", "two", "captions", "last"]


@pytest.mark.parametrize("damage", [b"caf\xe9 x.jpg,a dog\n", b"x.jpg,a caf\xe9\n"])
def test_line_with_invalid_bytes_is_reported_in_small_blocks(tmp_path, small_blocks, damage):
    path = tmp_path / "captions.csv"
    path.write_bytes(b"image,caption\n" + "y.jpg,a café\n".encode() * 4 + damage)
    records = read_table(path, FIND_COLUMNS)

    assert len(records.rows) == 4 and "line 6: expected UTF-8" in records.bad_rows[0]


def test_nul_characters_are_reported(tmp_path):
    path = tmp_path / "captions.csv"
    path.write_bytes(b"image,caption\nx.jpg,a dog\ny.jpg,a\0cat\nx\0.jpg,a cat\n")
    records = read_table(path, FIND_COLUMNS)

    assert list(records.rows) == [("x.jpg", "a dog", None)]
    assert ["line 3" in records.bad_rows[0], "line 4" in records.bad_rows[1]] == [True, True]


def test_caption_rows_are_a_list_of_tuples():
    rows = CaptionRows([("a.jpg", "one", None)])
    rows.append(("b.jpg", "two", "val"))
    rows.extend(CaptionRows([("c.jpg", "three", "test")]))

    assert rows == [("a.jpg", "one", None), ("b.jpg", "two", "val"), ("c.jpg", "three", "test")]
    assert (len(rows), rows[-1], rows[:1]) == (3, ("c.jpg", "three", "test"), [("a.jpg", "one", None)])
    assert rows.pop_columns()[2] == [None, "val", "test"] and not rows
