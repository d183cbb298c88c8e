"""The index of an archive's members: made by zipfile or tarfile, kept as arrays, found by bisection.

A member takes about 40 bytes beside its name, so that shards with millions of members fit into memory.
"""

import itertools
import os
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.archives import BASE64, DEFLATED, STORED, Member
from runtime.atomic_io import replace_file
from runtime.text import display_text, format_examples

VERSION = 1
FIELDS = ("offsets", "stored", "sizes", "crcs", "methods")


class Index:
    """The members of an archive, sorted by the bytes of their names."""

    def __init__(self, stamp: tuple[int, int], blob: bytes, starts: np.ndarray, columns: Sequence[np.ndarray], note=""):
        self.stamp, self.blob, self.starts, self.columns, self.note = stamp, blob, starts, columns, note

    def __len__(self) -> int:
        return len(self.starts) - 1

    def name_bytes(self, row: int) -> bytes:
        return self.blob[self.starts[row] : self.starts[row + 1]]

    def names(self) -> list[str]:
        """Return all names, sorted by their bytes."""
        pairs = itertools.pairwise(self.starts.tolist())
        return [self.blob[start:end].decode("utf-8", "surrogateescape") for start, end in pairs]

    def find(self, name: str) -> Member | None:
        """Return the member of a name, or None."""
        key = _key(name)
        low = self._bisect(key)
        if low == len(self) or self.name_bytes(low) != key:
            return None
        offset, stored, size, crc, method = (int(column[low]) for column in self.columns)
        return Member(name, offset, stored, size, method, crc)

    def has_folder(self, prefix: str) -> bool:
        """Return whether a member's name begins with `prefix`/."""
        key = _key(prefix) + b"/"
        low = self._bisect(key)
        return low < len(self) and self.name_bytes(low).startswith(key)

    def _bisect(self, key):
        low, high = 0, len(self)
        while low < high:
            middle = (low + high) // 2
            if self.name_bytes(middle) < key:
                low = middle + 1
            else:
                high = middle
        return low


def _key(name):
    """Return a name's bytes; half a surrogate pair, which no archive's name contains, becomes a NUL, which none has."""
    try:
        return name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return b"\0"


def build_index(archive: str, stamp: tuple[int, int]) -> Index:
    """Index the members of an archive; what cannot be read is counted and printed.

    Raises OSError if it cannot be opened, and ValueError if it is truncated, damaged or encrypted.
    """
    kind = archive.lower()
    collect = _collect_zip if kind.endswith(".zip") else _collect_tar if kind.endswith(".tar") else _collect_base64
    shown, members, skipped = display_text(archive), {}, []
    try:
        for raw, *fields in collect(archive, stamp[0], skipped):
            name = _safe_name(raw)
            if name is None:
                skipped.append(f"{raw!r:.80} (a name that points outside)")
            elif not _is_hidden(name):
                members[_key(name)] = fields  # of equal names the last one counts
    except MemoryError:
        raise
    except Exception as error:  # the two libraries raise many types for damaged archives
        if isinstance(error, OSError | ValueError) and (str(error).startswith(shown) or _names_file(error)):
            raise
        reason = display_text(f"{type(error).__name__}: {error}", 200)
        raise ValueError(f"{shown} is damaged ({reason}): download or pack it again") from None
    if skipped:
        text = f"{archive}: {len(skipped):,} members are skipped: {format_examples(skipped)}"
        print(display_text(text), file=sys.stderr, flush=True)
    keys = sorted(members)
    starts = np.cumsum([0, *map(len, keys)], dtype=np.int64)
    table = np.array([members[key] for key in keys], np.int64).reshape(-1, len(FIELDS))
    columns = [np.ascontiguousarray(column) for column in table.T]
    return Index(stamp, b"".join(keys), starts, columns)


def _names_file(error):
    return getattr(error, "filename", None) is not None


def _safe_name(raw):
    """Return a member's name relative to the archive, or None if it is absolute, has "..", NUL or is too long."""
    name = raw.replace("\\", "/")
    while name.startswith("./"):
        name = name[2:]
    parts = name.split("/")
    if not name or "\0" in name or name.startswith("/") or name[1:2] == ":" or ".." in parts or len(name) > 4096:
        return None
    return "/".join(part for part in parts if part not in ("", "."))


def _is_hidden(name):
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def _collect_tar(archive, size, skipped):
    from data.storage import open_regular

    shown, last = display_text(archive), "its first member"
    with open_regular(archive) as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while (info := tar.next()) is not None:
                    tar.members = []  # tarfile would keep all of them in memory
                    last = f"member {display_text(info.name, 200)}"
                    if info.isreg() and not info.issparse():
                        if info.size < 0 or info.offset_data + info.size > size:
                            break
                        yield info.name, info.offset_data, info.size, info.size, 0, STORED
                    elif not info.isdir():
                        skipped.append(f"{info.name} (a link or a special file)")
                else:
                    return
        except tarfile.TarError as error:
            reason = display_text(error, 200)
            end = f"{shown} is truncated or damaged after {last} ({reason}): download or pack it again"
            raise ValueError(end) from None
    raise ValueError(f"{shown} is truncated in {last}: download or pack it again")


def _collect_zip(archive, size, skipped):
    from data.storage import open_regular

    shown = display_text(archive)
    with open_regular(archive) as file:
        try:
            content = zipfile.ZipFile(file)
        except (zipfile.BadZipFile, EOFError, UnicodeDecodeError) as error:
            raise ValueError(_describe_broken_zip(shown, file, error)) from None
        infos = [info for info in content.infolist() if not info.is_dir()]
        names = _zip_names(infos)
        for info, name in zip(infos, names, strict=True):
            place = f"member {display_text(name, 200)}"
            if info.flag_bits & 1:
                raise ValueError(f"{shown} is encrypted ({place}): unpack it, or pack it without a password")
            if (info.external_attr >> 16) & 0o170000 == 0o120000:
                skipped.append(f"{name} (a link)")
            elif info.compress_type not in (STORED, DEFLATED):
                method = zipfile.compressor_names.get(info.compress_type, info.compress_type)
                skipped.append(f"{name} (compressed with {method}; stored and deflated members are read)")
            elif not 0 <= info.header_offset <= size - info.compress_size:
                raise ValueError(f"{shown} is truncated or damaged in {place}: download or pack it again")
            else:
                yield name, info.header_offset, info.compress_size, info.file_size, info.CRC, info.compress_type


def _zip_names(infos):
    """Return the names; those without the UTF-8 flag are in UTF-8, GB 2312 or code page 437, all in the same one."""
    raw = {info: info.orig_filename.encode("cp437") for info in infos if not info.flag_bits & 0x800}
    for encoding in ("utf-8", "gb2312", "cp437"):
        try:
            decoded = {info: name.decode(encoding) for info, name in raw.items()}
            break
        except UnicodeDecodeError:
            continue
    return [decoded.get(info, info.filename) for info in infos]


def _describe_broken_zip(archive, file, error):
    """Describe a zip archive without directory, by the last member whose header is there."""
    last, offset = None, 0
    for _ in range(1_000_000):
        file.seek(offset)
        head = file.read(30)
        if len(head) < 30 or head[:4] != b"PK\x03\x04":
            break
        name_size = int.from_bytes(head[26:28], "little")
        last = display_text(file.read(name_size).decode("utf-8", "replace"), 200)
        stored = int.from_bytes(head[18:22], "little")
        offset += 30 + name_size + int.from_bytes(head[28:30], "little") + stored
        if not stored or stored == 0xFFFFFFFF:
            break
    if last is None:
        return f"{archive} is not a zip archive ({display_text(error, 200)}): check the file"
    return f"{archive} is truncated: its directory is missing, the last member found is {last}; download it again"


def _collect_base64(archive, size, skipped):
    from data.storage import open_regular

    offset = 0
    with open_regular(archive) as file:
        for number, line in enumerate(file, start=1):
            key, tab, data = line.partition(b"\t")
            name = key.decode("utf-8", "surrogateescape").strip()
            if not tab or not name or "/" in name:
                if line.strip():
                    skipped.append(f"line {number} (expected id TAB base64, found {line[:20]!r})")
            else:
                stored = len(data.rstrip(b"\r\n"))
                yield f"{name}.jpg", offset + len(key) + 1, stored, stored * 3 // 4, 0, BASE64
            offset += len(line)


def save_index(file: Path, index: Index) -> None:
    """Write an index to the cache; without room on the disk, or in a read-only cache, do nothing."""
    names = np.frombuffer(index.blob, np.uint8)
    head = np.array([VERSION, *index.stamp], np.int64)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(file, lambda path: _save(path, head, names, index))
    except OSError:
        return


def _save(path, head, names, index):
    with open(path, "wb") as file:
        np.savez(file, head=head, names=names, starts=index.starts, columns=np.stack(index.columns))


def load_index(file: Path, stamp: tuple[int, int]) -> Index | None:
    """Return the index of an archive with this size and modification time, or None if it must be made."""
    if not os.path.isfile(file):
        return None
    try:
        with np.load(file, allow_pickle=False) as arrays:
            if arrays["head"].tolist() != [VERSION, *stamp]:
                return None
            blob, starts, columns = arrays["names"].tobytes(), arrays["starts"], arrays["columns"]
        valid = starts.ndim == 1 and len(starts) and starts[0] == 0 and starts[-1] == len(blob)
        valid = valid and (np.diff(starts) >= 0).all() and columns.shape == (len(FIELDS), len(starts) - 1)
        valid = valid and columns.dtype == np.int64 and starts.dtype == np.int64
        return Index(stamp, blob, starts, list(columns)) if valid else None
    except Exception:  # a damaged file can raise almost anything: the index is made again
        return None
