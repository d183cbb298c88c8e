"""Compare time and peak memory of exact search with FAISS, and measure the metrics: `python -m benchmarks.search`.

The vectors are random unit vectors, the gallery a memory-mapped float16 file. Each measurement runs in its own process,
one after another, with the same number of threads. The time is the median of the runs after a warm-up run.
Needs `pip install faiss-cpu`.
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
    """Compare exact search with FAISS, and measure the metrics."""

    queries: int = 1000  # number of queries, searched at once
    gallery: tuple[int, ...] = (100_000, 1_000_000)  # numbers of gallery rows
    pool: tuple[int, ...] = (5_000, 31_000)  # numbers of images for the metrics, with 5 captions each
    runs: int = 3  # timed runs of each search
    threads: int = 2  # threads of PyTorch and FAISS


def main(flags: Flags) -> None:
    print(f"top_k: {flags.queries:,} queries, {DIM} dimensions, k={K}, {flags.threads} threads")
    print(f"{'gallery':>12}  {'':10} {'seconds':>8}  {'MB beyond gallery':>20}")
    with tempfile.TemporaryDirectory() as folder:
        for rows in flags.gallery:
            compare_searches(Path(folder), rows, flags)
    print(f"\nretrieval_metrics: {METRICS_DIM} dimensions, {flags.threads} threads")
    print(f"{'images':>12}  {'captions':>10} {'seconds':>8}  {'MB beyond inputs':>20}")
    for images in flags.pool:
        result = run_in_new_process(["metrics", images, flags.threads])
        captions = images * CAPTIONS_PER_IMAGE
        print(f"{images:>12,}  {captions:>10,} {result['seconds']:>8.2f}  {result['megabytes']:>20,.0f}", flush=True)


def compare_searches(folder: Path, rows: int, flags: Flags) -> None:
    """Search one gallery with top_k and FAISS; print their times, and the fraction of equal matches."""
    from runtime.mmap_store import write_embeddings

    rng = np.random.default_rng(0)
    np.save(folder / "queries.npy", unit_rows(rng, flags.queries, DIM))
    blocks = (unit_rows(rng, min(10_000, rows - start), DIM) for start in range(0, rows, 10_000))
    write_embeddings(folder / "gallery.npy", blocks, DIM)
    for name in ("top_k", "faiss"):
        result = run_in_new_process([name, folder, flags.runs, flags.threads])
        print(f"{rows:>12,}  {name:10} {result['seconds']:>8.2f}  {result['megabytes']:>20,.0f}", flush=True)
    scores, indices = (
        [np.load(folder / f"{name}-{array}.npy") for name in ("top_k", "faiss")] for array in ("scores", "rows")
    )
    difference = abs(scores[0] - scores[1])
    equal = (indices[0] == indices[1]) | (difference < 1e-6)
    print(f"{'':>12}  equal matches or scores: {equal.mean():.4%}; largest difference of scores {difference.max():.1e}")


def run_in_new_process(arguments: list) -> dict:
    """Run the measurement `arguments` of this file in a new process, so that its peak memory is measured alone."""
    command = [sys.executable, "-m", "benchmarks.search", "--measure", *map(str, arguments)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure_top_k(folder: str, runs: str, threads: str) -> dict:
    import torch

    from retrieval.metrics import top_k
    from runtime.mmap_store import open_embeddings

    torch.set_num_threads(int(threads))
    queries = torch.from_numpy(np.load(f"{folder}/queries.npy"))
    gallery = open_embeddings(f"{folder}/gallery.npy")
    (scores, rows), result = measure(lambda: top_k(queries, gallery, K), int(runs), gallery.nbytes)
    np.save(f"{folder}/top_k-scores.npy", scores.numpy())
    np.save(f"{folder}/top_k-rows.npy", rows.numpy())
    return result


def measure_faiss(folder: str, runs: str, threads: str) -> dict:
    import faiss

    faiss.omp_set_num_threads(int(threads))
    queries = np.load(f"{folder}/queries.npy")
    initial_bytes = peak_bytes()
    index = faiss.IndexFlatIP(DIM)
    gallery = np.load(f"{folder}/gallery.npy", mmap_mode="r")
    for start in range(0, len(gallery), 10_000):
        index.add(gallery[start : start + 10_000].astype(np.float32))
    (scores, rows), result = measure(lambda: index.search(queries, K), int(runs), gallery.nbytes, initial_bytes)
    np.save(f"{folder}/faiss-scores.npy", scores)
    np.save(f"{folder}/faiss-rows.npy", rows)
    return result


def measure_metrics(images: str, threads: str) -> dict:
    import torch

    from retrieval.metrics import retrieval_metrics

    torch.set_num_threads(int(threads))
    rng = np.random.default_rng(0)
    caption_image_ids = np.arange(int(images)).repeat(CAPTIONS_PER_IMAGE)
    image_emb = unit_rows(rng, int(images), METRICS_DIM)
    noise = rng.standard_normal((len(caption_image_ids), METRICS_DIM), np.float32)
    text_emb = image_emb[caption_image_ids] + 0.15 * noise
    text_emb /= np.linalg.norm(text_emb, axis=1, keepdims=True)
    inputs = [torch.from_numpy(array) for array in (image_emb, text_emb, caption_image_ids)]
    _, result = measure(lambda: retrieval_metrics(*inputs), 1, 0)
    return result


def measure(
    call: Callable[[], object], runs: int, gallery_bytes: int, initial_bytes: int | None = None
) -> tuple[object, dict]:
    """Return the result of `call`, its median time, and its peak memory beyond initial_bytes and the gallery."""
    initial_bytes, seconds = initial_bytes or peak_bytes(), []
    if runs > 1:
        call()
    for _ in range(runs):
        started = time.perf_counter()
        value = call()
        seconds.append(time.perf_counter() - started)
    megabytes = (peak_bytes() - initial_bytes - gallery_bytes) / 1e6
    return value, {"seconds": statistics.median(seconds), "megabytes": max(0, megabytes)}


def peak_bytes() -> int:
    """Return the peak memory of this process so far, including memory-mapped files."""
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
