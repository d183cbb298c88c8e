"""A real Milvus server: insert, search, restart, a lost connection, two writers.

The package `milvus` of the registry contains a server for Linux on x86-64. Its wrapper is not used to start it: it
moves to another port after a restart, and waits ten seconds.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from helpers import ROOT
from test_ann_index import gallery_of, search_index

from retrieval import milvus_index
from retrieval.metrics import top_k
from runtime import cli

milvus = pytest.importorskip("milvus", reason="no server: pip install milvus==2.3.5 (Linux on x86-64)")
pymilvus = pytest.importorskip("pymilvus")
ETCD_PEER_PORT = 2380  # fixed in the server: two of them cannot run on one machine
LONGEST_START, LONGEST_ERROR = 60, 30  # seconds


def answers(port):
    """Return whether a process accepts connections on a port of this machine."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def wait_until(condition, seconds):
    """Wait until the condition holds, at most this long; return whether it does."""
    deadline = time.monotonic() + seconds
    while not (holds := condition()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return holds


class Server:
    """A Milvus server with its data in a folder, on free ports."""

    def __init__(self, folder):
        config = milvus.MilvusServerConfig(data_dir=str(folder))
        # Below the ports that clients get: a client that tries again could otherwise connect to itself.
        config.set("proxy_port", 22_000)
        config.set("common.session.ttl", 3)  # seconds until a restarted server takes over from a killed one
        config.resolve()
        milvus._initialize_data_files(str(folder))
        self.folder, self.log, self.process = folder, folder / "server.log", None
        self.port = config.get("proxy_port")
        self.uri = f"http://127.0.0.1:{self.port}"
        metrics_port, metrics_socket = config.resolve_port(9091)
        metrics_socket.close()
        libraries = f"{folder / 'bin'}:{os.environ.get('LD_LIBRARY_PATH', '')}"
        self.environment = {
            "DEPLOY_MODE": "STANDALONE",
            "METRICS_PORT": str(metrics_port),
            "LD_LIBRARY_PATH": libraries,
        }

    def start(self):
        """Start the server, with the data that it has, and wait until it answers."""
        if not wait_until(lambda: not answers(ETCD_PEER_PORT), 20):
            pytest.skip(f"port {ETCD_PEER_PORT}, which the server needs, is used by another program")
        with self.log.open("w") as log:
            command = [self.folder / "bin" / "milvus", "run", "standalone"]
            environment = os.environ | self.environment
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, cwd=self.folder, env=environment, start_new_session=True
            )
        if not wait_until(self.is_ready, LONGEST_START):
            pytest.fail(f"the server does not start: {self.log.read_text()[-3000:]}")

    def is_ready(self):
        if self.process.poll() is not None or not answers(self.port):
            return False
        with contextlib.suppress(pymilvus.MilvusException):
            client = self.client()
            client.list_collections()
            client.close()
            return True
        return False

    def stop(self):
        """Kill the server: it writes nothing more."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def client(self):
        return pymilvus.MilvusClient(self.uri, timeout=5)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("milvus"))
    # One at a time, in whatever process a test runs: its etcd has a fixed port.
    with FileLock(Path(tempfile.gettempdir()) / "milvus-server-test.lock"):
        try:
            server.start()
            yield server
        finally:
            server.stop()


@pytest.fixture
def queries():
    return torch.nn.functional.normalize(torch.randn(20, 16, generator=torch.Generator().manual_seed(0)))


def assert_exact(gallery, server, queries, k=10):
    scores, rows = search_index(server.uri, gallery, queries, k)
    exact_scores, exact = top_k(queries, gallery.embeddings, k)
    assert torch.equal(rows, exact)
    torch.testing.assert_close(scores, exact_scores, atol=1e-5, rtol=0)


def count_rows(server, gallery):
    """Return the number of rows of each collection of a gallery."""
    client, prefix = server.client(), f"photos_{gallery.store.name.rpartition('-')[2]}"
    names = [name for name in client.list_collections() if name.startswith(prefix)]
    return sorted(milvus_index._count_rows(client, name) for name in names)


def test_server_follows_changes_of_the_gallery(server, queries, tmp_path, capsys):
    changed = [*range(10, 300), *range(900, 905)]
    for version, seeds in ((1, range(300)), (1, range(300)), (2, changed)):
        gallery = gallery_of(tmp_path / "photos-00aa", seeds, version)
        assert_exact(gallery, server, queries)
    messages = capsys.readouterr().err.splitlines()
    assert [line.partition(": ")[2] for line in messages] == [
        "300 photos added, 0 removed",
        "5 photos added, 10 removed",
    ]
    assert count_rows(server, gallery) == [295]


def test_two_writers_of_one_gallery_and_another_machine_with_the_same_path(server, queries, tmp_path):
    """Two processes that share a cache store each photo once; a machine with its own cache removes none of theirs."""
    gallery = gallery_of(tmp_path / "photos-00bb", range(1500), 1)
    code = f"""
import sys
sys.path[:0] = {sys.path!r}
from pathlib import Path
from retrieval.ann_index import search_index
from test_ann_index import gallery_of
import numpy as np
gallery = gallery_of(Path({str(tmp_path / "photos-00bb")!r}), range(1500), int(sys.argv[1]))
print(search_index({server.uri!r}, gallery, np.array({queries.tolist()}), 5)[1].tolist())
"""
    # Each has its own file of the same rows, so that none reads a file that the other is writing.
    processes = [
        subprocess.Popen([sys.executable, "-c", code, version], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for version in ("2", "3")
    ]
    (tmp_path / "other").mkdir()
    other = gallery_of(tmp_path / "other" / "photos-00bb", range(1490, 1530), 1)
    assert_exact(other, server, queries)
    expected = str(top_k(queries, gallery.embeddings, 5)[1].tolist())
    assert [process.communicate()[0].strip() for process in processes] == [expected] * 2
    assert count_rows(server, gallery) == [40, 1500]


def test_lost_connection_is_one_line_and_after_a_restart_the_next_search_completes(
    server, queries, tmp_path, monkeypatch, capsys
):
    gallery = gallery_of(tmp_path / "photos-00ee", range(3500), 1)
    upsert, batches = pymilvus.MilvusClient.upsert, []

    def upsert_and_lose_the_server(client, *arguments, **options):
        if len(batches) == 2:
            server.stop()
        batches.append(1)
        return upsert(client, *arguments, **options)

    started = time.monotonic()
    with monkeypatch.context() as patch:
        patch.setattr(milvus_index, "TIMEOUT", 2)
        patch.setattr(pymilvus.MilvusClient, "upsert", upsert_and_lose_the_server)
        for _ in range(2):  # while photos are added, and a server that is gone from the start
            with pytest.raises(SystemExit) as exit_info:
                cli.run(lambda: search_index(server.uri, gallery, queries, 10))
            (line,) = capsys.readouterr().err.splitlines()
            assert exit_info.value.code == 2 and line.startswith(f"error: Milvus at {server.uri}: ")
            assert "start it and run the same command again" in line
    assert len(batches) == 3 and time.monotonic() - started < LONGEST_ERROR
    server.start()
    assert_exact(gallery, server, queries)
    # The server has kept what was sent, also without a flush.
    assert "1,500 photos added, 0 removed" in capsys.readouterr().err
    assert count_rows(server, gallery) == [3500]
