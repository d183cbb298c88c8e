"""Every file of the cache may be damaged in any way: the program makes it again, with one line, and the same result."""

import io
import json
import random
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import UNUSED_CACHE, tiny_model, tiny_tokenizer, write_image_folder

from data.image_cache import ImageCache
from data.loading import open_dataset
from data.preprocess import Preprocess
from data.tokenizer import tokenize
from models.trunk_split import split_trunk
from retrieval.ann_index import search_index
from retrieval.embedding_store import list_images, open_gallery
from retrieval.encoder import build_encoder
from retrieval.searcher import Searcher
from runtime.cache import load_cached
from training.feature_cache import cache_image_features, cache_text_features

CAPTIONS = ["red on the left", "a picture of blue beside white", "red on the left", "green on the right"]
DIM = 6


def npy(array):
    file = io.BytesIO()
    np.save(file, array, allow_pickle=array.dtype == object)
    return file.getvalue()


def header(shape, descr="<f2", fortran_order=False):
    """Return a function that replaces the header of an .npy file and keeps its rows."""

    def replace(content):
        file, (rows, dim) = io.BytesIO(), np.load(io.BytesIO(content)).shape
        values = {"descr": descr, "fortran_order": fortran_order, "shape": shape(rows, dim)}
        np.lib.format.write_array_header_1_0(file, values)
        return file.getvalue() + content[128:]

    return replace


ANY = {
    "empty": lambda content: b"",
    "first half": lambda content: content[: len(content) // 2],
    "first bytes": lambda content: content[:7],
    "zeros": lambda content: bytes(len(content)),
    "random": lambda content: random.Random(1).randbytes(len(content)),
    "text": lambda content: "Grüße\n".encode("latin-1") * 20,
}
JSON = {
    text: lambda content, text=text: text.encode()
    for text in (
        "{}",
        "[]",
        "null",
        "7",
        '"x"',
        "[[1, 2], [3]]",
        '{"a": 1}',
        "[" * 5000,
        '[-3, []]\n["a"]\n',
        "[1e999]",
    )
}
NPY = {
    "one row less": header(lambda rows, dim: (rows - 1, dim)),
    "another dim": header(lambda rows, dim: (rows, dim - 1)),
    "other axes": header(lambda rows, dim: (rows * dim,)),
    "huge": header(lambda rows, dim: (10**9, dim)),
    "float64": header(lambda rows, dim: (rows, dim), "<f8"),
    "big-endian": header(lambda rows, dim: (rows, dim), ">f2"),
    "fortran": header(lambda rows, dim: (rows, dim), fortran_order=True),
    "objects": lambda content: npy(np.array([{}, []], dtype=object)),
}


def with_values(**changes):
    """Return a function that replaces values of a JSON object."""
    return lambda content: json.dumps({**json.loads(content), **changes}).encode()


def damage(path, change):
    content = change(path.read_bytes())
    if content != path.read_bytes():
        path.write_bytes(content)


def check(make, path, change, capsys, *, line=True):
    """Damage a file, and check that `make` gives the same result with one line, and again without any line."""
    expected = make()
    damage(path, change)
    capsys.readouterr()
    assert make() == expected
    lines = capsys.readouterr().err.splitlines()
    assert len([text for text in lines if "is made again" in text]) == line, lines
    assert make() == expected
    assert "is made again" not in capsys.readouterr().err


@pytest.mark.parametrize("change", [*ANY, "npz of others"])
def test_token_ids(change, tmp_path, capsys):
    change = {**ANY, "npz of others": lambda _: npz(a=np.zeros(3))}[change]

    def make():
        tokens = tokenize(tiny_tokenizer(), CAPTIONS, max_tokens=9, cache_dir=tmp_path)
        return [ids.tolist() for ids in tokens]

    make()
    check(make, next(tmp_path.rglob("*.npz")), change, capsys)


def npz(**arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


@pytest.mark.parametrize(
    "arrays",
    [
        {"flat": np.zeros(20, np.int32), "starts": np.array([0, 5, 9])},
        {"flat": np.zeros(20, np.int32), "starts": np.array([0, 5, 3, 20])},
        {"flat": np.zeros(20, np.int32), "starts": np.array([0, 5, 9, 21])},
        {"flat": np.full(20, 10**6, np.int32), "starts": np.array([0, 5, 9, 20])},
        {"flat": np.full(20, -1, np.int32), "starts": np.array([0, 5, 9, 20])},
        {"flat": np.zeros((20, 1), np.int32), "starts": np.array([0, 5, 9, 20])},
        {"flat": np.zeros(20), "starts": np.array([0, 5, 9, 20])},
        {"flat": np.zeros(20, np.int32), "starts": np.array([0.0, 5, 9, 20])},
        {"flat": np.zeros(20, np.int32), "starts": np.array(0)},
        {"flat": np.array([{}] * 20, dtype=object), "starts": np.array([0, 5, 9, 20])},
    ],
    ids=range(10),
)
def test_token_ids_of_another_shape_or_beyond_the_vocabulary(arrays, tmp_path, capsys):
    def make():
        return [ids.tolist() for ids in tokenize(tiny_tokenizer(), CAPTIONS, max_tokens=9, cache_dir=tmp_path)]

    make()
    check(make, next(tmp_path.rglob("*.npz")), lambda _: npz(**arrays), capsys)


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    """A function that caches the features of 8 photos and their captions in a folder and returns them as bytes."""
    folder = write_image_folder(tmp_path_factory.mktemp("data") / "photos", 10)
    split = open_dataset(str(folder), data_dir=None, cache_dir=UNUSED_CACHE, split_seed=0).split("train")
    model, tokenizer = tiny_model(freeze_image=True, freeze_text=True)
    split_trunk(model.image_encoder)
    settings = {"image_size": 32, "max_tokens": 16, "device": "cpu", "precision": "float32", "num_workers": 0}
    encoder = build_encoder(model.eval(), tokenizer, **settings)
    encoder = type(encoder)(**{**vars(encoder), "encode_text": model.text_encoder})

    def make(cache_dir):
        tower, options = model.image_encoder, {"views": 1, "min_crop": 0.5, "cache_dir": str(cache_dir)}
        images = cache_image_features(encoder, tower, split, "x", **options)
        texts = cache_text_features(encoder, model.text_encoder, split.captions, "x", cache_dir=str(cache_dir))
        return images.rows.numpy().tobytes(), images.readable.tolist(), texts.numpy().tobytes()

    return make


METADATA = {
    "shape of text": with_values(shape="32"),
    "negative shape": with_values(shape=[-1, -32]),
    "shape of floats": with_values(shape=[32.0]),
    "another dtype": with_values(dtype="float16"),
    "unknown dtype": with_values(dtype=["float32"]),
    "unreadable from the end": with_values(unreadable=[-1]),
    "unreadable beyond": with_values(unreadable=[8]),
    "unreadable nested": with_values(unreadable=[[1], [2]]),
    "unreadable bool": with_values(unreadable=[True] * 8),
}


@pytest.mark.parametrize(
    ("suffix", "change"),
    [
        *(("json", change) for change in (*ANY.values(), *JSON.values(), *METADATA.values())),
        *(("safetensors", change) for change in ANY.values()),
        *(("images", ANY[name]) for name in ("empty", "first half", "text")),  # other bytes are other features
    ],
)
def test_cached_features(suffix, change, features, tmp_path, capsys):
    features(tmp_path)
    check(lambda: features(tmp_path), next(tmp_path.rglob(f"*.{suffix}")), change, capsys)


@pytest.mark.parametrize(
    "tensors",
    [
        {"texts": torch.zeros(3, 32)},
        {"texts": torch.zeros(16, 31)},
        {"texts": torch.zeros(16, 32, dtype=torch.int64)},
        {"images": torch.zeros(16, 32)},
    ],
)
def test_cached_text_features_of_another_shape(tensors, features, tmp_path, capsys):
    from safetensors.torch import save

    features(tmp_path)
    check(lambda: features(tmp_path), next(tmp_path.rglob("*.safetensors")), lambda _: save(tensors), capsys)


@pytest.mark.parametrize("journal", ["[-3, []]", "[9, []]", "[2, [5]]", "[2, 7]", "[true, []]", "{}", "[", "[2.5, []]"])
def test_journal_of_an_interrupted_computation(journal, features, tmp_path, capsys):
    expected = features(tmp_path)
    (path,) = tmp_path.rglob("*.images")
    path.rename(path.with_name(f".{path.name}"))
    path.with_suffix(".json").unlink()
    path.with_name(f".{path.name}.0-1.done").write_text(journal)
    capsys.readouterr()
    assert features(tmp_path) == expected
    assert capsys.readouterr().err.count("is made again") == 1


def encode(names):
    rows = [np.random.default_rng(int(name[6:8])).standard_normal(DIM, np.float32) for name in names]
    yield np.array(rows), [None] * len(names)


@pytest.fixture
def gallery(tmp_path):
    photos = list_images(write_image_folder(tmp_path / "photos", 10) / "Images")

    def make():
        opened = open_gallery(tmp_path / "cache", photos, encode)
        return dict(zip(opened.names, opened.embeddings.tolist(), strict=True))

    return make


@pytest.mark.parametrize("change", [*ANY.values(), *JSON.values()])
def test_journal_of_a_gallery(change, gallery, tmp_path):
    expected = gallery()
    damage(tmp_path / "cache" / "1.jsonl", change)
    assert gallery() == expected and gallery() == expected


@pytest.mark.parametrize(
    "line", ['["photo_03.png", 1]', '["photo_03.png", "1", 2]', "[7, 1, 2]", '["a", 1, 2, 3]', "{}"]
)
def test_line_of_a_gallery_with_another_shape(line, gallery, tmp_path, capsys):
    gallery()
    journal = tmp_path / "cache" / "1.jsonl"

    def change(content):
        lines = content.decode().splitlines()
        return "\n".join([*lines[:3], line, *lines[4:], ""]).encode()

    check(gallery, journal, change, capsys)


@pytest.mark.parametrize("name", [name for name in (*ANY, *NPY) if name not in ("one row less", "another dim")])
def test_rows_of_a_gallery(name, gallery, tmp_path, capsys):
    gallery()
    check(gallery, tmp_path / "cache" / "1.npy", {**ANY, **NPY}[name], capsys)


def test_rows_of_a_gallery_with_another_dimension_are_an_error_with_the_folder(gallery, tmp_path):
    from retrieval.searcher import search_images

    gallery()
    damage(tmp_path / "cache" / "1.npy", NPY["another dim"])
    photos = list_images(tmp_path / "photos" / "Images")
    opened = open_gallery(tmp_path / "cache", photos, encode)
    with pytest.raises(ValueError, match=r"cache have 5 values, those of the model 6: delete that folder"):
        search_images(np.zeros((1, DIM), np.float32), opened, 3)


@pytest.mark.parametrize("name", [*ANY, *NPY])
def test_rows_of_captions(name, tmp_path, capsys):
    rows = torch.randn(len(CAPTIONS), DIM, generator=torch.Generator().manual_seed(0))
    encoder = SimpleNamespace(encode_captions=lambda captions, desc: rows, query_bank=None)
    searcher = Searcher("key", lambda: (encoder, None), cache_dir=tmp_path)
    make = lambda: searcher.embed_captions(CAPTIONS).tolist()  # noqa: E731
    make()
    check(make, next(tmp_path.rglob("*.npy")), {**ANY, **NPY}[name], capsys)


@pytest.mark.parametrize("change", [ANY["empty"], ANY["first half"], ANY["zeros"], ANY["random"], ANY["text"]])
def test_decoded_photos(change, tmp_path):
    paths = sorted((write_image_folder(tmp_path / "photos", 5) / "Images").iterdir())

    def make():
        cache = ImageCache(paths, Preprocess(16), tmp_path / "cache")
        return [cache[index].tolist() for index in range(5)]

    expected = make()
    damage(next(tmp_path.rglob("*.u8")), change)
    assert make() == expected and make() == expected


@pytest.fixture
def faiss_gallery(tmp_path):
    pytest.importorskip("faiss")
    rows = torch.nn.functional.normalize(torch.randn(300, 16, generator=torch.Generator().manual_seed(1)))
    names = [f"{row}.jpg" for row in range(300)]
    return SimpleNamespace(store=tmp_path, version="1-300", names=names, embeddings=rows.half().numpy())


@pytest.mark.parametrize(
    ("suffix", "change"),
    [
        *(("index", change) for change in ANY.values()),
        ("index", lambda content: content[:-9] + bytes(9)),
        *(("json", change) for change in (*ANY.values(), *JSON.values())),
        *(("json", with_values(nprobe=value)) for value in (0, -1, "3", None, 2.0)),
        ("json", with_values(recall="high")),
        ("json", with_values(measured_on=3)),
    ],
)
def test_faiss_index(suffix, change, faiss_gallery, capsys):
    queries = torch.randn(3, 16, generator=torch.Generator().manual_seed(2))

    def make():
        return search_index("faiss", faiss_gallery, queries, 5)[1].tolist()

    make()
    check(make, faiss_gallery.store / f"faiss-1-300.{suffix}", change, capsys)


def test_faiss_index_without_its_metadata_is_built_again(faiss_gallery, capsys):
    queries = torch.randn(3, 16, generator=torch.Generator().manual_seed(2))
    expected = search_index("faiss", faiss_gallery, queries, 5)[1].tolist()
    (faiss_gallery.store / "faiss-1-300.json").unlink()
    assert search_index("faiss", faiss_gallery, queries, 5)[1].tolist() == expected
    assert "faiss-1-300.index is damaged (its .json file is missing)" in capsys.readouterr().err


@pytest.mark.parametrize("file", ["milvus.json", "schema.json", "*.parquet"])
@pytest.mark.parametrize("change", [ANY["first half"], ANY["random"], JSON["[[1, 2], [3]]"]], ids=range(3))
def test_milvus(file, change, faiss_gallery, capsys):
    pytest.importorskip("milvus_lite")
    from milvus_lite.server_manager import server_manager_instance

    queries = torch.randn(3, 16, generator=torch.Generator().manual_seed(2))

    def make():
        found = search_index("milvus", faiss_gallery, queries, 5)[1].tolist()
        server_manager_instance.release_server(str(faiss_gallery.store / "milvus.db"))  # as when the program ends
        return found

    expected = make()
    damage(next(faiss_gallery.store.rglob(file)), change)
    capsys.readouterr()
    assert make() == expected
    assert capsys.readouterr().err.count("is made again") == 1
    assert make() == expected


@pytest.mark.parametrize("name", ["tokens", "features", "captions", "faiss"])
def test_folder_in_the_place_of_a_file_is_one_line(name, request, tmp_path):
    """A folder may hold a person's files, so it is not deleted: the error names it."""
    if name == "tokens":
        make, pattern = lambda: tokenize(tiny_tokenizer(), CAPTIONS, max_tokens=9, cache_dir=tmp_path), "*.npz"
    elif name == "features":
        make, pattern = lambda: request.getfixturevalue("features")(tmp_path), "*.safetensors"
    elif name == "captions":
        encoder = SimpleNamespace(encode_captions=lambda captions, desc: torch.zeros(4, DIM), query_bank=None)
        searcher = Searcher("key", lambda: (encoder, None), cache_dir=tmp_path)
        make, pattern = lambda: searcher.embed_captions(CAPTIONS), "*.npy"
    else:
        gallery = request.getfixturevalue("faiss_gallery")
        make, pattern = lambda: search_index("faiss", gallery, torch.zeros(1, 16), 1), "*.index"
    make()
    path = next(tmp_path.rglob(pattern))
    path.unlink()
    (path / "mine").mkdir(parents=True)
    with pytest.raises((OSError, ValueError), match=path.name if name != "captions" else "irectory"):
        make()
    assert (path / "mine").is_dir()
    shutil.rmtree(path)


def test_line_about_a_damaged_file_is_escaped(tmp_path, capsys):
    path = tmp_path / "a\nb.npz"
    path.write_bytes(b"x")

    def load(path):
        raise ValueError("line 1\x1b[2J\nline 2")

    assert load_cached(path, load) is None
    (line,) = capsys.readouterr().err.splitlines()
    assert "a\\nb.npz is damaged (line 1\\x1b[2J line 2) and is made again" in line
