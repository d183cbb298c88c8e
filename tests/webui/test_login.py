"""The page's password: where it comes from, and the pauses after wrong guesses."""

import os

import pytest

from webui.login import FORGET_AFTER, LONGEST_PAUSE, Password, Pauses, read_auth, warnings


def test_password_comes_from_one_of_three_places(tmp_path):
    (tmp_path / "auth").write_text("eve:from:file\n")
    assert read_auth(None, None, {}) is None
    assert read_auth("ann:from flag", None, {}) == ("ann", "from flag")
    assert read_auth(None, tmp_path / "auth", {}) == ("eve", "from:file")
    assert read_auth(None, None, {"PAGE_AUTH": "bob:from variable"}) == ("bob", "from variable")
    with pytest.raises(ValueError, match="--auth and --auth-file both"):
        read_auth("a:b", tmp_path / "auth", {})
    with pytest.raises(ValueError, match="--auth-file and the environment variable PAGE_AUTH both"):
        read_auth(None, tmp_path / "auth", {"PAGE_AUTH": "a:b"})


@pytest.mark.parametrize(
    "content", [b"", b"name", b":secret", b"name:", b"a:b\nc:d", b"a:\xff\xfe", b"a:" + b"s" * 5_000]
)
def test_unusable_password_file_is_an_error_that_does_not_show_it(tmp_path, content):
    (tmp_path / "auth").write_bytes(content)
    with pytest.raises(ValueError, match="auth") as error:
        read_auth(None, tmp_path / "auth", {})
    assert "\n" not in str(error.value) and "secret" not in str(error.value)


def test_password_file_must_be_a_readable_regular_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file.*--auth-file"):
        read_auth(None, tmp_path / "none", {})
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "fifo"):
        with pytest.raises(OSError, match="--auth-file"):
            read_auth(None, path, {})


def test_password_that_others_can_read_is_said(tmp_path):
    file = tmp_path / "auth"
    file.write_text("a:b")
    file.chmod(0o644)
    assert "chmod 600" in warnings(None, file)[0]
    file.chmod(0o600)
    assert not warnings(None, file) and "list of processes" in warnings("a:b", None)[0]


def test_password_is_compared_whole():
    check = Password("zoë", "pä:ss")
    assert check("zoë", "pä:ss")
    for name, password in [("zoë", "pä:s"), ("zo", "pä:ss"), ("", ""), ("zoë", "pä:ss "), ("zoë\ud800", "pä:ss")]:
        assert not check(name, password)


def test_pause_doubles_with_each_wrong_guess_and_ends_with_the_right_password():
    now = [100.0]
    pauses = Pauses(lambda: now[0])
    waits = []
    for _ in range(9):
        waits.append(pauses.reserve("192.0.2.1", 1e9))
        now[0] += waits[-1]
    assert waits == [0, 0.5, 1, 2, 4, 8, 16, 32, LONGEST_PAUSE]
    pauses.forgive("192.0.2.1")
    now[0] += 1
    assert pauses.reserve("192.0.2.1", 1e9) == 0
    now[0] += FORGET_AFTER + 1
    assert pauses.reserve("192.0.2.1", 1e9) == 0


def test_guesses_sent_at_once_wait_one_after_another():
    pauses = Pauses(lambda: 5.0)
    waits = [pauses.reserve("2001:db8::1", 5) for _ in range(20)]
    assert waits[:4] == [0, 0.5, 1.5, 3.5] and min(waits[4:]) > 5  # refused
    assert pauses.reserve("2001:db8::ffff", 5) > 5  # the same network


def test_many_addresses_together_are_paused_and_take_bounded_memory():
    now = [0.0]
    pauses = Pauses(lambda: now[0])
    for number in range(12_000):
        now[0] += pauses.reserve(f"10.{number // 60_000}.{number // 250 % 250}.{number % 250}", 1e9)
    assert now[0] > 11_000 and len(pauses._guesses) <= 10_000
