"""The mutations of benchmarks/fuzz.py: of bytes, of JSON values and of members of archives."""

import io
import json
import zipfile
from pathlib import Path
from random import Random

VALUES = (  # in place of a value in JSON
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        7,
        0.5,
        -0.0,
        1e-300,
        1e300,
        float("nan"),
        float("inf"),
        2**31,
        2**63,
        10**9,
        10**40,
    ),
    *("", "x", " ", "0", "../../x", "/etc/passwd", "/dev/zero", "https://example.org/x", "owner/name", "hf-hub:a/b"),
    *("a\nb\x1b[2J", "\0", "\ud800", "é狗🐕\u202e", "x" * 5000, "null", "kernels-community/flash-attn", "~", "auto"),
    *([], {}, [[]], [0], [1, 2, 3], ["a"], {"": 1}, {"a": {"b": []}}, [None] * 50, [[1.0] * 3] * 3),
)
WORDS = (
    "a dog",
    "red, left",
    '"quoted',
    "two\ttabs",
    "狗",
    "",
    " ",
    "a\0b",
    "x" * 300,
    "'s",
    "#0",
    "\u2028",
    "a|b",
    "{}",
)
KEYS = (
    "auto_map",
    "timm_backbone",
    "quantization_config",
    "pretrained",
    "checkpoint_path",
    "vocab_size",
    "dim",
    "name",
)


def damage(content: bytes, rng: Random) -> bytes:
    """Return `content` after one to five edits that overwrite, delete, truncate, insert or duplicate bytes."""
    result = bytearray(content)
    for _ in range(rng.randint(1, 5)):
        # More often in headers, and in the directories of archives at the end.
        position = int(rng.choice((rng.random(), rng.random() ** 4, 1 - rng.random() ** 4)) * len(result))
        length, kind = rng.randint(1, 200), rng.randrange(6)
        if kind == 0:
            result[position : position + length] = rng.randbytes(length)
        elif kind == 1:
            del result[position : position + length]
        elif kind == 2 and rng.random() < 0.3:
            del result[position:]
        elif kind == 3:
            result[position:position] = rng.choice(
                (b"\0", b"\n", b'"', b"\xff\xfe", b"9" * 5000, b" " * 20_000, b"[" * 2000)
            )
        elif kind == 4:
            result[position:position] = result[position : position + length]
        elif result:
            result[min(position, len(result) - 1)] ^= 1 << rng.randrange(8)
    return bytes(result)


def modify(value: object, rng: Random) -> object:
    """Return a copy of a JSON value in which one element is replaced, removed, added or renamed."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(sorted(value))
        kind = rng.random()
        if kind < 0.1:
            return {name: item for name, item in value.items() if name != key}
        if kind < 0.2:
            return value | {rng.choice(KEYS): rng.choice(VALUES)}
        if kind < 0.25:
            return {(str(rng.choice(VALUES)) if name == key else name): item for name, item in value.items()}
        return value | {key: modify(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        index = rng.randrange(len(value))
        return [*value[:index], modify(value[index], rng), *value[index + 1 :]]
    if isinstance(value, int | float) and rng.random() < 0.3:
        return value * rng.choice((-1, 0, 2, 1000, 10**7))
    return rng.choice(VALUES)


def mutate_file(path: Path, content: bytes, rng: Random) -> None:
    """Write `content` with one mutation: of its values if it is JSON, of a member if it is an archive, or of bytes."""
    if path.suffix in (".json", ".jsonl") and rng.random() < 0.7:
        path.write_bytes(_modify_json(path, content, rng))
    elif content[:2] == b"PK" and rng.random() < 0.6:
        path.write_bytes(_damage_member(content, rng))
    else:
        path.write_bytes(damage(content, rng))


def _modify_json(path, content, rng):
    lines = content.splitlines() if path.suffix == ".jsonl" else [content]
    index = rng.randrange(len(lines) or 1)
    try:
        value = json.loads(lines[index])
    except (ValueError, IndexError):  # the text was damaged before
        return damage(content, rng)
    lines[index] = json.dumps(modify(value, rng)).encode()
    return b"\n".join(lines)


def _damage_member(archive, rng):
    """Damage one member, and keep the archive valid so that the damage reaches the next reader; or compress it."""
    target = io.BytesIO()
    method = rng.choice((zipfile.ZIP_STORED,) * 4 + (zipfile.ZIP_DEFLATED,))
    with zipfile.ZipFile(io.BytesIO(archive)) as source, zipfile.ZipFile(target, "w", method) as result:
        names = source.namelist()
        chosen = rng.choice([name for name in names if name.endswith(".pkl")] * len(names) + names)
        for name in names:
            result.writestr(name, damage(source.read(name), rng) if name == chosen else source.read(name))
    return target.getvalue()


def write_photos(folder: Path, count: int) -> list[str]:
    """Write photos of one colour each, and return their names."""
    from PIL import Image

    folder.mkdir(parents=True)
    names = [f"photo_{number:02d}.png" for number in range(count)]
    for number, name in enumerate(names):
        Image.new("RGB", (24, 16), (number * 40 % 256, number * 70 % 256, number * 90 % 256)).save(folder / name)
    return names
