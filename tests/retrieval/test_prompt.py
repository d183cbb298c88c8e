"""The prompt of infer.py: sentences and commands, answered one after another."""

from pathlib import Path

import pytest

from retrieval.prompt import ask


@pytest.fixture
def answers(tmp_path):
    """Answer every query with three photos; record the queries."""
    photos = [tmp_path / f"{n}.jpg" for n in range(3)]
    for path in photos:
        path.touch()
    queries = []

    def search(sentence, photo):
        if sentence == "fail":
            raise ValueError("the model knows no word\nof it")
        queries.append(sentence or photo)
        return photos

    return search, queries, photos


def test_sentences_are_answered_until_quit(answers):
    search, queries, _ = answers
    ask(search, ["a dog", "", "  a cat in snow ", ":quit", "never"])

    assert queries == ["a dog", "a cat in snow"]


def test_more_searches_by_a_photo_of_the_last_answer(answers):
    search, queries, photos = answers
    ask(search, ["a dog", ":more 2", ":photo " + str(photos[0])])

    assert queries == ["a dog", photos[1], photos[0]]


def test_open_passes_the_photo_to_the_viewer(answers):
    search, _, photos = answers
    opened = []
    ask(search, ["a dog", ":open 3"], open_file=opened.append)

    assert opened == [photos[2]]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (":more 1", "search first"),
        (":photo nowhere.jpg", "no such photo"),
        (":photo", "name a photo"),
        (":delete 1", "no such command: :delete; :help"),
        ("fail", "knows no word of it"),
    ],
)
def test_a_mistake_is_one_line_and_the_next_query_is_answered(answers, capsys, line, message):
    search, queries, _ = answers
    ask(search, [line, "a dog"])

    (error,) = capsys.readouterr().err.splitlines()
    assert message in error and queries == ["a dog"]


@pytest.mark.parametrize("number", ["0", "4", "x", "-1", "1.5", ""])
def test_number_outside_the_answer_is_refused(answers, capsys, number):
    search, queries, _ = answers
    ask(search, ["a dog", f":more {number}"])

    assert "from 1 to 3" in capsys.readouterr().err and queries == ["a dog"]


def test_help_lists_the_commands(answers, capsys):
    ask(answers[0], [":help"])

    shown = capsys.readouterr().out
    assert all(command in shown for command in (":photo", ":more", ":open", ":quit"))


def test_missing_viewer_is_said(answers, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "")
    ask(answers[0], ["a dog", ":open 1"])

    assert "to open" in capsys.readouterr().err


def test_control_characters_of_an_error_are_escaped(capsys):
    def search(sentence, photo):
        raise ValueError("bad\x1b[2Jname")

    ask(search, ["x"])
    assert "\x1b" not in capsys.readouterr().err


def test_paths_with_spaces_and_quotes_are_read(answers, tmp_path):
    search, queries, _ = answers
    path = tmp_path / "my photo.jpg"
    path.touch()
    ask(search, [f":photo '{path}'", f":photo {path}"])

    assert queries == [Path(path), Path(path)]
