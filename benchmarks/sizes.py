"""Measure recall against bytes per photo of every way to store a gallery: `python -m benchmarks.sizes --run runs/NAME`.

Two tables. The first has the photos and captions of a split, and its recall in percent. The second has a gallery of
`--rows` made of those photos: each row beyond them is a random mixture of two of them with noise. It shows how many of
the exact 10 nearest rows each way finds for captions of the split, the milliseconds of processor time and of waiting
per query, one at a time, and the memory of a process that searches, beside the file that it maps. Needs
`pip install faiss-cpu`.
"""

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

QUERIES, TIMED = 500, 20  # captions searched together for the agreement, and one by one for the time
NOISE, SHARES = 0.3, (0.5, 0.95)  # length of the noise, and the share of the first photo in a mixture
ENGINES = ("float16", "torch", "int8", "binary")  # float16 is searched with NumPy, torch with PyTorch
EXACT, CODES = ENGINES[:2], ENGINES[2:]
CHUNK = 10_000


@dataclass(frozen=True)
class Flags:
    """Measure recall, bytes, time and memory of float16, int8 and binary embeddings, whole and cut to fewer values."""

    run: Path | None = None  # the run's folder; not needed if --folder contains embeddings.npz
    split: str = "val"  # split whose photos and captions are encoded
    rows: int = 1_000_000  # rows of the large gallery
    dims: tuple[int, ...] = ()  # also the first of this many values, for runs trained with --nested-dims
    engines: tuple[str, ...] = ENGINES  # what to measure on the large gallery
    folder: Path | None = None  # where embeddings and galleries are kept; default: a temporary folder


def main(flags: Flags) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = flags.folder or Path(temporary)
        if not (folder / "embeddings.npz").is_file():
            encode(flags.run, flags.split, folder)
        with np.load(folder / "embeddings.npz") as file:
            arrays = dict(file)
        dims = [arrays["image_emb"].shape[1], *flags.dims]
        print(
            f"{len(arrays['image_emb']):,} photos, {len(arrays['text_emb']):,} captions of {flags.split}: recall in %"
        )
        print(f"{'values':>8}  {'code':24} {'bytes':>6} {'i2t R@1':>8} {'t2i R@1':>8} {'t2i R@10':>9} {'rsum':>7}")
        for dim in dims:
            print_recall(dim, arrays)
        print(f"\n{flags.rows:,} rows, {QUERIES} captions: share of the exact 10 nearest rows, all values")
        columns = ("found", "of its values", "CPU ms", "ms", "MB file", "MB memory")
        print(f"{'values':>8}  {'engine':24} " + " ".join(f"{name:>13}" for name in columns))
        for dim in dims:
            make_gallery(folder / f"{dim}", dim, flags.rows, arrays)
            for engine in flags.engines:
                print_agreement(folder, dim, dims[0], engine)


def encode(run: Path, split: str, folder: Path) -> None:
    """Encode the photos and captions of a split, and save them as embeddings.npz."""
    from data.loading import open_run_data
    from retrieval.encoder import load_encoder
    from runtime.run_dir import read_shared_config

    encoder, _ = load_encoder(run, device="auto", precision="auto")
    data = open_run_data(run, read_shared_config(run), None, split).split(split)
    encoded = encoder.encode_split(data, split)
    names = ("image_emb", "text_emb", "caption_image_ids")
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "embeddings.npz", **{name: getattr(encoded, name).numpy() for name in names})


def cut(rows: np.ndarray, dim: int) -> np.ndarray:
    rows = rows[:, :dim].astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def print_recall(dim: int, arrays: dict[str, np.ndarray]) -> None:
    """Print the recall of the codes alone. A search ranks the first thousand exactly: here that is every photo."""
    import faiss
    import torch

    from retrieval import quantized
    from retrieval.metrics import retrieval_metrics

    images, texts = cut(arrays["image_emb"], dim), cut(arrays["text_emb"], dim)
    stored = {"float16": (images.astype(np.float16).astype(np.float32), 2 * dim)}
    for name, code in quantized.CODES.items():
        index = faiss.index_factory(dim, code.format(dim=dim), faiss.METRIC_INNER_PRODUCT)
        index.train(images)
        index.add(images)
        stored[f"{name}, codes alone"] = index.reconstruct_n(0, len(images)), index.sa_code_size()
    for name, (rows, size) in stored.items():
        inputs = [torch.from_numpy(array) for array in (rows, texts, arrays["caption_image_ids"])]
        metrics = retrieval_metrics(*inputs)
        values = [metrics[key] for key in ("i2t_R@1", "t2i_R@1", "t2i_R@10", "rsum")]
        print(f"{dim:>8}  {name:24} {size:>6,} {values[0]:>8.1f} {values[1]:>8.1f} {values[2]:>9.1f} {values[3]:>7.1f}")


def make_gallery(folder: Path, dim: int, rows: int, arrays: dict[str, np.ndarray]) -> None:
    """Write a gallery of float16 rows, the photos and mixtures of them, and the queries, unless they exist."""
    from runtime.mmap_store import open_embeddings, write_embeddings

    path = folder / "1.npy"
    if path.is_file() and len(open_embeddings(path)) == rows:
        return
    folder.mkdir(parents=True, exist_ok=True)
    photos = cut(arrays.get("base", arrays["image_emb"]), arrays["image_emb"].shape[1])

    def blocks():
        rng = np.random.default_rng(0)  # the same mixtures for every dim
        yield cut(photos[:rows], dim)
        for start in range(min(len(photos), rows), rows, CHUNK):
            count = min(CHUNK, rows - start)
            first, second = photos[rng.integers(len(photos), size=(2, count))]
            share = rng.uniform(*SHARES, (count, 1)).astype(np.float32)
            noise = rng.standard_normal(first.shape, np.float32) * np.float32(NOISE / first.shape[1] ** 0.5)
            yield cut(share * first + (1 - share) * second + noise, dim)

    write_embeddings(path, blocks(), dim)
    numbers = np.random.default_rng(1).choice(len(arrays["text_emb"]), QUERIES, replace=False)
    np.save(folder / "queries.npy", cut(arrays["text_emb"][numbers], dim))


def print_agreement(folder: Path, dim: int, full_dim: int, engine: str) -> None:
    """Search in two new processes, the first of which builds the index; print the agreement with exact search."""
    store = folder / str(dim)
    found = measure(store, engine, "all")  # builds the index
    result = measure(store, engine, "single")
    exact = [measure_once(folder / str(size)) for size in (full_dim, dim)]
    shares = [share(rows, found["rows"]) for rows in exact]
    size = sum(path.stat().st_size for path in (store.glob(f"{engine}-*") if engine in CODES else [store / "1.npy"]))
    values = [
        f"{shares[0]:.1%}",
        f"{shares[1]:.1%}",
        *(f"{value:.0f}" for value in result["milliseconds"]),
        f"{size / 1e6:,.0f}",
    ]
    values.append(f"{result['megabytes']:,.0f}")
    print(f"{dim:>8}  {engine:24} " + " ".join(f"{value:>13}" for value in values), flush=True)


def measure_once(store: Path) -> list:
    """Return the exact nearest rows of a gallery, from a file after the first time."""
    path = store / "exact.json"
    if not path.is_file():
        path.write_text(json.dumps(measure(store, "float16", "all")["rows"]))
    return json.loads(path.read_text())


def share(exact: list, found: list) -> float:
    return float(np.mean([len(set(a) & set(b)) / len(a) for a, b in zip(exact, found, strict=True)]))


def measure(store: Path, engine: str, how: str) -> dict:
    command = [sys.executable, "-m", "benchmarks.sizes", "--measure", str(store), engine, how]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure_here(store: str, engine: str, how: str) -> dict:
    """Search the gallery with an engine: all queries together -> rows, or one by one -> time and memory."""
    from retrieval.ann_index import search_index
    from retrieval.embedding_store import Gallery
    from retrieval.numpy_search import top_k
    from runtime.mmap_store import open_embeddings

    store = Path(store)
    rows, queries = open_embeddings(store / "1.npy"), np.load(store / "queries.npy")
    gallery = Gallery(store, [""] * len(rows), rows, {}, store, "1")
    if how == "all":
        search = exact_search(rows) if engine in EXACT else lambda q: search_index(engine, gallery, q, 10)
        return {"rows": search(queries)[1].tolist()}
    search = {"float16": lambda q: top_k(q, rows, 10), "torch": exact_search(rows)}.get(
        engine, lambda q: search_index(engine, gallery, q, 10)
    )
    search(queries[:1])
    started, wall = time.process_time(), time.perf_counter()
    count = 5 if engine in EXACT else TIMED
    for query in queries[:count]:
        search(query[None])
    milliseconds = [1000 * (time.process_time() - started) / count, 1000 * (time.perf_counter() - wall) / count]
    return {"milliseconds": milliseconds, "megabytes": own_megabytes()}


def exact_search(rows: np.ndarray):
    def search(queries):
        import torch

        from retrieval import top_k

        return top_k(torch.from_numpy(queries), rows, 10)

    return search


def own_megabytes() -> float:
    """Return the memory of this process on Linux, without the pages of files that it has mapped."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) / 1e3


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure_here(*sys.argv[2:])))
    else:
        main(tyro.cli(Flags))
