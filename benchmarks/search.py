"""Time and peak memory of the search against FAISS, and of the metrics: `python -m benchmarks.search`.

Random unit vectors, the gallery a memory-mapped float16 file. Each measurement runs in a process of its own, one after
another, with the same number of threads; the time is the median of the runs, after one to warm up. Needs
`pip install faiss-cpu`.
"""

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

DIM, K = 256, 10
METRICS_DIM, CAPTIONS_PER_IMAGE = 512, 5


@dataclass(frozen=True)
class Flags:
    """Compare the exact search with FAISS's, and time the metrics."""

    queries: int = 1000  # how many at once
    gallery: tuple[int, ...] = (100_000, 1_000_000)  # rows
    pool: tuple[int, ...] = (5_000, 31_000)  # images of the metrics' pools, with 5 captions each
    runs: int = 3  # timed repetitions of each search
    threads: int = 2


def main(flags: Flags) -> None:
    print(f"top_k: {flags.queries:,} queries, {DIM} dimensions, k={K}, {flags.threads} threads")
    print(f"{'gallery':>12}  {'':10} {'seconds':>8}  {'MB over the gallery':>20}")
    with tempfile.TemporaryDirectory() as folder:
        for rows in flags.gallery:
            search_both(Path(folder), rows, flags)
    print(f"\nretrieval_metrics: {METRICS_DIM} dimensions, {flags.threads} threads")
    print(f"{'images':>12}  {'captions':>10} {'seconds':>8}  {'MB over the inputs':>20}")
    for images in flags.pool:
        done = in_own_process(["metrics", images, flags.threads])
        captions = images * CAPTIONS_PER_IMAGE
        print(f"{images:>12,}  {captions:>10,} {done['seconds']:>8.2f}  {done['megabytes']:>20,.0f}", flush=True)


def search_both(folder: Path, rows: int, flags: Flags) -> None:
    """Both searches over one gallery: their times, and whether they found the same."""
    from runtime.mmap_store import write_embeddings

    rng = np.random.default_rng(0)
    np.save(folder / "queries.npy", unit_rows(rng, flags.queries, DIM))
    blocks = (unit_rows(rng, min(10_000, rows - start), DIM) for start in range(0, rows, 10_000))
    write_embeddings(folder / "gallery.npy", blocks, DIM)
    for name in ("top_k", "faiss"):
        done = in_own_process([name, folder, flags.runs, flags.threads])
        print(f"{rows:>12,}  {name:10} {done['seconds']:>8.2f}  {done['megabytes']:>20,.0f}", flush=True)
    scores, indices = ([np.load(folder / f"{n}-{what}.npy") for n in ("top_k", "faiss")] for what in ("scores", "rows"))
    same = (indices[0] == indices[1]) | (abs(scores[0] - scores[1]) < 1e-6)
    print(f"{'':>12}  the same matches, up to equal scores: {same.mean():.4%}; largest gap of scores "
          f"{abs(scores[0] - scores[1]).max():.1e}")  # fmt: skip


def in_own_process(words: list) -> dict:
    """Run this file's measurement `words` in a fresh process, so that peak memory is its own."""
    command = [sys.executable, "-m", "benchmarks.search", "--measure", *map(str, words)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure_top_k(folder: str, runs: str, threads: str) -> dict:
    import torch

    from retrieval.metrics import top_k
    from runtime.mmap_store import open_embeddings

    torch.set_num_threads(int(threads))
    queries = torch.from_numpy(np.load(f"{folder}/queries.npy"))
    gallery = open_embeddings(f"{folder}/gallery.npy")
    (scores, rows), measured = timed(lambda: top_k(queries, gallery, K), int(runs), gallery.nbytes)
    np.save(f"{folder}/top_k-scores.npy", scores.numpy())
    np.save(f"{folder}/top_k-rows.npy", rows.numpy())
    return measured


def measure_faiss(folder: str, runs: str, threads: str) -> dict:
    import faiss

    faiss.omp_set_num_threads(int(threads))
    queries = np.load(f"{folder}/queries.npy")
    before = peak_bytes()
    index = faiss.IndexFlatIP(DIM)
    gallery = np.load(f"{folder}/gallery.npy", mmap_mode="r")
    for start in range(0, len(gallery), 10_000):
        index.add(gallery[start : start + 10_000].astype(np.float32))
    (scores, rows), measured = timed(lambda: index.search(queries, K), int(runs), gallery.nbytes, before)
    np.save(f"{folder}/faiss-scores.npy", scores)
    np.save(f"{folder}/faiss-rows.npy", rows)
    return measured


def measure_metrics(images: str, threads: str) -> dict:
    import torch

    from retrieval.metrics import retrieval_metrics

    torch.set_num_threads(int(threads))
    rng = np.random.default_rng(0)
    owner = np.arange(int(images)).repeat(CAPTIONS_PER_IMAGE)
    image_emb = unit_rows(rng, int(images), METRICS_DIM)
    text_emb = image_emb[owner] + 0.15 * rng.standard_normal((len(owner), METRICS_DIM), np.float32)
    text_emb /= np.linalg.norm(text_emb, axis=1, keepdims=True)
    inputs = [torch.from_numpy(rows) for rows in (image_emb, text_emb, owner)]
    _, measured = timed(lambda: retrieval_metrics(*inputs), 1, 0)
    return measured


def timed(call: Callable[[], object], runs: int, gallery_bytes: int, before: int | None = None) -> tuple[object, dict]:
    """The call's result, and its median time and peak memory above what was there, without the gallery's own."""
    before, seconds = before or peak_bytes(), []
    if runs > 1:
        call()
    for _ in range(runs):
        started = time.perf_counter()
        result = call()
        seconds.append(time.perf_counter() - started)
    megabytes = (peak_bytes() - before - gallery_bytes) / 1e6
    return result, {"seconds": statistics.median(seconds), "megabytes": max(0, megabytes)}


def peak_bytes() -> int:
    """The most memory this process has had so far, mapped files included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def unit_rows(rng: np.random.Generator, rows: int, dim: int) -> np.ndarray:
    emb = rng.standard_normal((rows, dim), np.float32)
    return emb / np.linalg.norm(emb, axis=1, keepdims=True)


MEASUREMENTS = {"top_k": measure_top_k, "faiss": measure_faiss, "metrics": measure_metrics}

if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(MEASUREMENTS[sys.argv[2]](*sys.argv[3:])))
    else:
        main(tyro.cli(Flags))
