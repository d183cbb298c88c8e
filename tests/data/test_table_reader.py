"""Columns are found by name and by their cells, never guessed; damaged rows are reported at their own line."""

import contextlib
import time

import pytest

from data.column_names import ColumnNames, match_columns, parse_caption_name, resolve_splits
from data.format_detection import read_layout
from data.loading import open_dataset, read_captions

COUNT = 24


def write_table(folder, header, row, *, photos=(), file="captions.csv"):
    """Write a table with COUNT rows; `row` contains {k}, or is a function of k."""
    folder.mkdir(parents=True, exist_ok=True)
    make = row if callable(row) else lambda k: row.format(k=k)
    lines = [*([header] if header else []), *map(make, range(COUNT))]
    (folder / file).write_text("\n".join(lines) + "\n", encoding="utf-8")
    for photo in photos or ("any.png",):  # without photos in it, the name of the folder may name a split
        (folder / photo).write_bytes(photo.encode())
    return folder / file


def read(path, **columns):
    return read_layout(path, columns=ColumnNames(**columns)).captions


def captions(records):
    return [text for _, text, _ in records.rows]


@pytest.mark.parametrize("image", ["pic", "foto", "bild", "Datei", "image"])
@pytest.mark.parametrize("caption", ["caption", "title", "标题", "Description"])
def test_half_known_header_has_one_caption_column(tmp_path, image, caption):
    path = write_table(tmp_path, f"{image},{caption},category,date", "p{k}.jpg,a red dog {k},home,2024-05-01")
    records = read(path)
    assert captions(records) == [f"a red dog {k}" for k in range(COUNT)]
    assert records.notes == [
        f"captions.csv: images from column {image}, captions from {caption}; ignored: category, date"
    ]


def test_unknown_caption_word_is_found_by_its_cells(tmp_path):
    row = "p{k}.png,blue,12.5,May 3 2024,https://shop.org/p{k},[1 2 3 4],the {k}th vase of clay,x{k}.pdf"
    path = write_table(tmp_path, "image,colour,price,shot,link,box,Legende,leaflet", row)
    assert captions(read(path)) == [f"the {k}th vase of clay" for k in range(COUNT)]


def test_two_unknown_texts_are_an_error_that_names_both_and_a_flag_chooses(tmp_path):
    path = write_table(tmp_path, "image;Legende;Ort", "p{k}.jpg;ein roter Hund {k};in Ulm {k}")
    with pytest.raises(ValueError, match=r"captions\.csv, line 1: .*Legende .*Ort .*--caption-column Legende"):
        read(path)
    assert captions(read(path, caption="ort"))[0] == "in Ulm 0"
    assert captions(read(path, caption="Ort, Legende"))[:2] == ["in Ulm 0", "ein roter Hund 0"]


def test_two_image_columns_are_an_error_that_names_both_and_a_flag_chooses(tmp_path):
    path = write_table(tmp_path, "before,after,caption", "b{k}.jpg,a{k}.jpg,a wall {k}")
    with pytest.raises(ValueError, match=r"before .*after .*--image-column before"):
        read(path)
    assert read(path, image="after").rows[0][0] == "a0.jpg"


def test_column_that_does_not_exist_is_an_error_with_those_that_do(tmp_path):
    path = write_table(tmp_path, "image,caption", "p{k}.jpg,a dog")
    for flag in ("image", "caption", "split"):
        with pytest.raises(ValueError, match=rf"expected the column 'nix' of --{flag}-column, found .*image, caption"):
            read(path, **{flag: "nix"})


def test_single_words_are_not_captions_unless_a_flag_says_so(tmp_path):
    path = write_table(tmp_path, "image,species", "p{k}.jpg,heron")
    with pytest.raises(ValueError, match=r"single words in species; .*--caption-column species"):
        read(path)
    assert captions(read(path, caption="species"))[0] == "heron"


@pytest.mark.parametrize("names", [("caption_1", "caption_2"), ("Sentence a", "Sentence b"), ("text", "text (2)")])
def test_numbered_columns_are_all_captions(tmp_path, names):
    path = write_table(
        tmp_path, f"image,{','.join(names)},title,url", "p{k}.jpg,a dog,two dogs,Dogs,http://a.org/p.jpg"
    )
    assert captions(read(path))[:2] == ["a dog", "two dogs"]


@pytest.mark.parametrize("names", [("caption_en", "caption_zh"), ("en", "zh"), ("text-english", "text-chinese")])
def test_of_several_languages_one_is_read_and_said(tmp_path, names):
    path = write_table(tmp_path, f"image,{','.join(names)}", "p{k}.jpg,a dog,一只狗")
    records = read(path)
    assert set(captions(records)) == {"a dog"} and "--caption-column chooses another language" in records.notes[0]
    assert set(captions(read(path, caption="zh"))) == set(captions(read(path, caption=names[1]))) == {"一只狗"}


def test_languages_without_english_are_an_error(tmp_path):
    path = write_table(tmp_path, "image,text_fr,text_ru", "p{k}.jpg,un chien,собака бежит")
    with pytest.raises(ValueError, match="one language, found the columns text_fr, text_ru"):
        read(path)


def test_headerless_columns_follow_the_same_rules(tmp_path):
    path = write_table(tmp_path, "", "p{k}.jpg\t{k}\ta grey cat {k}\thttps://a.org/{k}", file="list.tsv")
    assert captions(read(path))[0] == "a grey cat 0"
    path = write_table(tmp_path / "b", "", "p{k}.jpg\ta grey cat {k}\tin a house {k}", file="list.tsv")
    with pytest.raises(ValueError, match=r"column numbers 2 .* and 3 .*--caption-column 2"):
        read(path)
    assert captions(read(path, caption="3"))[0] == "in a house 0"


@pytest.mark.parametrize(
    "word, split", [("eval", "test"), ("holdout", "test"), ("Validation part", None), ("验证集", "val")]
)
def test_synonyms_in_a_split_column(tmp_path, word, split):
    path = write_table(tmp_path, "image,split,caption", lambda k: f"p{k}.jpg,{('trn', word)[k % 2]},a dog {k}")
    if split is None:
        with pytest.raises(ValueError, match=f"found '{word}'; rename them, or ignore .*--split-column none"):
            read(path)
        assert {row[2] for row in read(path, split="none").rows} == {None}
    else:
        assert [row[2] for row in read(path).rows[:2]] == ["train", split]


def test_eval_means_the_part_that_no_other_word_names():
    assert resolve_splits(["train", "eval", "test"])["eval"] == "val"
    assert resolve_splits(["train", "dev", "held-out"])["held-out"] == "test"
    assert resolve_splits(["train", "val", "test", "eval"])["eval"] is None
    assert resolve_splits(["train", "eval", "holdout"])["eval"] is None


def test_set_column_that_is_no_split_is_ignored_and_said(tmp_path):
    path = write_table(tmp_path, "image,set,caption", lambda k: f"p{k}.jpg,{('blue set', 'tea set')[k % 2]},a cup {k}")
    records = read(path)
    assert {row[2] for row in records.rows} == {None} and records.notes[0].endswith("ignored: set")


def test_empty_cells_of_a_split_column_are_said(tmp_path):
    path = write_table(tmp_path, "image,split,caption", lambda k: f"p{k}.jpg,{('train', 'test', '')[k % 3]},a dog {k}")
    assert f"{COUNT // 3} rows have no split" in read(path).notes[1]


def test_ids_and_stems_of_existing_photos_name_them(tmp_path):
    cases = {
        "styles": (
            "id,gender,kind,year,productDisplayName",
            lambda k: f"{1163 + k},Men,Casual Shoes,201{k % 3},Shirt no {k}",
        ),
        "roco": ("", lambda k: f"ROCO_{k:05}\tCT scan no {k}"),
        "padded": ("article_id,detail", lambda k: f"{k},cotton top no {k}"),
        "floats": ("nr,detail", lambda k: f"{k}.0,cotton top no {k}"),
    }
    names = {"styles": "{}.jpg", "roco": "ROCO_{:05}.png", "padded": "{:07}.jpg", "floats": "{:03}.webp"}
    for case, (header, row) in cases.items():
        photos = [names[case].format(1163 + k if case == "styles" else k) for k in range(COUNT)]
        path = write_table(tmp_path / case, header, row, photos=photos)
        data = open_dataset(str(path), data_dir=None, cache_dir=str(tmp_path / "cache"), split_seed=0)
        assert dict(zip(data.table.image, data.table.caption, strict=True)) == {
            photo: row(k).replace("\t", ",").rpartition(",")[2] for k, photo in enumerate(photos)
        }


def test_number_of_two_photos_and_percent_encoded_names(tmp_path):
    photos = [*(f"{k:04}.jpg" for k in range(COUNT)), "03.jpg", "my photo.jpg", "a%20b.jpg"]
    path = write_table(tmp_path, "id,caption", "{k},a dog", photos=photos)
    path.write_text(path.read_text() + "my%20photo.jpg,a cat\na%20b.jpg,a bird\n")
    data = open_dataset(str(path), data_dir=None, cache_dir=str(tmp_path / "cache"), split_seed=0)
    assert data.missing == ["3 (in several folders)"]
    assert set(data.table.image) == {*photos} - {"0003.jpg", "03.jpg"}


def test_quoted_cell_may_span_any_number_of_lines(tmp_path):
    text = 'image,caption\na.jpg,"' + "line\n" * 200 + 'end"\nb.jpg,a cat\n'
    (tmp_path / "captions.csv").write_text(text)
    records = read(tmp_path / "captions.csv")
    assert captions(records) == ["line " * 200 + "end", "a cat"] and records.bad_rows == []


@pytest.mark.parametrize("rows", [['b.jpg,"open', 'c.jpg,"two"" cats"', "d.jpg,x"], ['1,a.jpg,"open', '2,b.jpg,"c"']])
def test_missing_closing_quote_loses_its_own_line_only(tmp_path, rows):
    header = "image,caption" if len(rows) == 3 else "nr,image,caption"
    (tmp_path / "captions.csv").write_text("\n".join([header, *rows]))
    records = read(tmp_path / "captions.csv")
    assert len(records.rows) == len(rows) - 1 and ", line 2: expected a closing quote" in records.bad_rows[0]


@pytest.mark.parametrize(
    "line",
    [
        " " * 50_000,
        "\t" * 300_000 + "x",
        "x" + " " * 300_000 + "y",
        ".jpg#0" * 60_000,
        '",' * 100_000,
        'z,"y\n' * 20_000,
        'a.jpg,"y\n' * 20_000,
        'a.jpg,"' + "z\n" * 20_000,
        "a.jpg,[" + "'" * 100_001 + "]",
        "," * 100_000,
    ],
)
@pytest.mark.parametrize("file", ["captions.csv", "captions.txt"])
def test_hostile_line_takes_linear_time(tmp_path, line, file):
    row = "p{k}.jpg,a dog" if file.endswith("csv") else "p{k}.jpg#0\ta dog"
    path = write_table(tmp_path, "image,caption" if file.endswith("csv") else "", row, file=file)
    path.write_text(path.read_text() + line + "\n")
    started = time.process_time()
    with contextlib.suppress(ValueError):  # most of the first lines are no captions
        assert len(read(path).rows) >= COUNT
    assert time.process_time() - started < 4


def test_long_names_long_cells_and_nul(tmp_path):
    photos = [f"p{k}.jpg" for k in range(COUNT)]
    path = write_table(tmp_path, "image,caption", "p{k}.jpg,a dog", photos=photos)
    long_cell = "a " * 100_000
    path.write_text(path.read_text() + f'p1.jpg,"{long_cell}"\n{"x" * 1_000_000}.jpg,big\np2.jpg,nul \0 here\n')
    data = open_dataset(str(path), data_dir=None, cache_dir=str(tmp_path / "cache"), split_seed=0, allow_bad_rows=True)
    assert long_cell.strip() in set(data.table.caption)
    assert [("at most 4,096 bytes" in row, "NUL" in row) for row in data.bad_rows] == [(True, False), (False, True)]


def test_number_with_thousands_of_digits_is_a_bad_row(tmp_path):
    path = write_table(tmp_path, "id,caption", "{k},a dog", photos=[f"{k:03}.jpg" for k in range(COUNT)])
    path.write_text(path.read_text() + "9" * 5000 + ",a dog\n")
    data = open_dataset(str(path), data_dir=None, cache_dir=str(tmp_path / "cache"), split_seed=0)
    assert len(data.table) == COUNT and f"line {COUNT + 2}: expected a file name" in data.bad_rows[0]


def test_unusable_file_is_reported_with_its_first_bad_rows(tmp_path):
    path = write_table(tmp_path, "image,caption", "p{k}.jpg,")
    for options in ({"allow_bad_rows": True}, {}):  # as dataset.py and as train.py
        with pytest.raises(ValueError) as error:
            read_captions(path, **options)
        message = str(error.value)
        assert message.count("found an empty caption") == 5 and f"and {COUNT - 5} more" in message


def test_names_of_columns():
    assert match_columns(["pic", "Caption1", "caption 2", "category"])[:2] == ("pic", ["Caption1", "caption 2"])
    assert match_columns(["image", "caption_zh", "caption_en"])[1] == ["caption_en"]
    assert match_columns(["image", "text_id", "caption_count"])[1] == []
    assert parse_caption_name("caption_de").language == "de" and parse_caption_name("text_id") is None


@pytest.mark.parametrize("other", ["set", "phase"])
def test_split_columns_that_contradict_are_an_error(tmp_path, other):
    def row(k, same):
        words = ("train", "test")
        return f"p{k}.jpg,a red dog {k},{words[k % 2]},{words[(k + 1 - same) % 2]}"

    header = f"image,caption,split,{other}"
    path = write_table(tmp_path, header, lambda k: row(k, 0))
    with pytest.raises(ValueError, match=f"columns split .* and {other} .*--split-column split"):
        read(path)
    assert {split for *_, split in read(path, split=other).rows} == {"train", "test"}
    assert read(write_table(tmp_path, header, lambda k: row(k, 1))).rows[1][2] == "test"


@pytest.mark.parametrize(("unclear", "clear"), [("a.csv", "z.csv"), ("notes.tsv", "rows.csv")])
def test_a_clear_table_is_read_before_an_unclear_one_of_the_same_rank(tmp_path, unclear, clear):
    write_table(tmp_path, "foo\tbar\tbaz", "p{k}.jpg\ta red dog {k}\ta cat runs {k}", file=unclear)
    write_table(tmp_path, "image,caption", "p{k}.jpg,a blue bird {k}", file=clear)
    layout = read_layout(tmp_path)
    assert captions(layout.captions)[0] == "a blue bird 0" and layout.unused_files == [unclear]
    (tmp_path / unclear).rename(tmp_path / "captions.csv")  # a known name is not passed over
    with pytest.raises(ValueError, match=r"captions\.csv.*bar .* and baz"):
        read_layout(tmp_path)


def test_single_words_without_a_header_are_named(tmp_path):
    words = ("lion", "zebra", "ibis")
    records = read(write_table(tmp_path, None, lambda k: f"p{k}.jpg,{words[k % 3]}"))
    assert len(records.rows) == COUNT
    assert records.notes == ["captions.csv: captions from column 2 are single words: lion, zebra, ibis"]
    assert read(write_table(tmp_path, None, "p{k}.jpg,a lion {k}")).notes == []
