"""The password of the page: where it is read from, how it is compared, and the pause after wrong guesses."""

import hashlib
import hmac
import ipaddress
import os
import stat
import time
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

from data.storage import read_bytes

VARIABLE = "PAGE_AUTH"  # environment variable with NAME:PASSWORD
MAX_FILE = 4096  # bytes
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 60.0  # seconds after the first wrong guess, doubled after each one
LONGEST_SHARED_PAUSE = 1.0  # seconds between guesses from all addresses together
FORGET_AFTER = 900  # seconds without a guess
MAX_ADDRESSES = 10_000
EVERYONE = "everyone"


def read_auth(
    flag: str | None, file: Path | None, environment: Mapping[str, str] = os.environ
) -> tuple[str, str] | None:
    """Return the name and the password that visitors must enter, or None if there are none.

    Of --auth, --auth-file and the environment variable only one may be given. Raises ValueError or OSError.
    """
    variable = environment.get(VARIABLE) or None
    given = {"--auth": flag, "--auth-file": file, f"the environment variable {VARIABLE}": variable}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise ValueError(f"{' and '.join(names)} both give a password: keep one of them")
    if not names:
        return None
    text = _read_file(file) if file is not None else flag or variable
    name, _, password = text.partition(":")
    name = name.strip()  # as the page does with the name that a visitor enters
    if not name or not password:
        where = f"{names[0]} {file}" if file is not None else names[0]
        raise ValueError(f"{where} must be NAME:PASSWORD")
    return name, password


def warnings(flag: str | None, file: Path | None) -> list[str]:
    """Return lines about a password that other users of this machine can read."""
    if flag is not None:
        return [
            f"other users of this machine can read --auth in the list of processes: use --auth-file FILE or {VARIABLE}"
        ]
    if file is not None and hasattr(os, "getuid") and stat.S_IMODE(file.expanduser().stat().st_mode) & 0o077:
        return [f"other users of this machine can read {file}: chmod 600 {file}"]
    return []


def _read_file(file):
    try:
        content = read_bytes(file.expanduser(), MAX_FILE + 1)
    except FileNotFoundError:
        raise FileNotFoundError(f"no such file: {file} (--auth-file)") from None
    except OSError as error:
        raise OSError(f"{file} cannot be read: {error.strerror or error} (--auth-file)") from None
    try:
        lines = content.decode("utf-8-sig").strip().splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{file} is not UTF-8 text (--auth-file)") from None
    if len(content) > MAX_FILE or len(lines) != 1:
        raise ValueError(f"{file} must contain one line, NAME:PASSWORD (--auth-file)")
    return lines[0].strip()


class Password:
    """Compare a name and a password with the right ones, in a time that does not depend on how much of them agrees."""

    def __init__(self, name: str, password: str):
        self._expected = _digests(name, password)

    def __call__(self, name: str, password: str) -> bool:
        name_matches, password_matches = map(hmac.compare_digest, _digests(name, password), self._expected)
        return name_matches & password_matches


def _digests(*texts):
    return [hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest() for text in texts]


class Pauses:
    """The pause before the next guess: it doubles with each wrong one from an address, up to LONGEST_PAUSE.

    A network of IPv6 (/64) counts as one address. All addresses together are paused up to LONGEST_SHARED_PAUSE.
    """

    def __init__(self, clock=time.monotonic):
        self._clock, self._guesses = clock, OrderedDict()  # address -> (guesses, time of the next one, of the last one)

    def reserve(self, address: str | None, longest_wait: float) -> float:
        """Return the seconds that a guess has to wait, and count it as wrong before it is checked.

        Guesses sent at once therefore wait one after another. A guess that would wait for more than `longest_wait` is
        not to be checked, and is not counted.
        """
        now, network = self._clock(), _network(address)
        limits = {network: LONGEST_PAUSE, EVERYONE: LONGEST_SHARED_PAUSE}
        wait = max(max(self._recent(key, now)[1] - now, 0) for key in limits)
        if wait <= longest_wait:
            for key, longest in limits.items():
                guesses, due = self._recent(key, now)
                # A few mistakes of other people delay nobody.
                pause = guesses / 100 if key == EVERYONE else FIRST_PAUSE * 2 ** min(guesses, 20)
                self._guesses.pop(key, None)
                self._guesses[key] = (guesses + 1, max(due, now) + min(pause, longest), now)
            while len(self._guesses) > MAX_ADDRESSES:
                self._guesses.popitem(last=False)
        return wait

    def _recent(self, key, now):
        """Return the number of guesses, and the time of the next one."""
        guesses, due, last = self._guesses.get(key, (0, now, now))
        return (0, now) if now - last > FORGET_AFTER else (guesses, due)

    def forgive(self, address: str | None) -> None:
        """Forget the guesses of an address after the right password."""
        self._guesses.pop(_network(address), None)


def _network(address):
    try:
        ip = ipaddress.ip_address((address or "").partition("%")[0])
    except ValueError:
        return "unknown"
    return str(ip if ip.version == 4 else ipaddress.ip_network((int(ip), 64), strict=False))
