"""Train on two machines, compare with one, and let one machine disappear: `sudo python -m benchmarks.machines`.

The machines are two network namespaces of Linux with an address each, joined by a virtual cable. Each has its own copy
of the data set, its own cache and its own folder of runs. Needs root and the program `ip`.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from data.sample_set import write_sample_set
from models.checkpoint import load_state
from runtime.run_dir import read_log

ROOT = Path(__file__).parents[1]
ADDRESSES, PORT = ("10.77.0.1", "10.77.0.2"), 29511
NAMES, CABLES = ("machine-a", "machine-b"), ("cable-a", "cable-b")


@dataclass(frozen=True)
class Flags:
    """Train on two network namespaces."""

    epochs: int = 5  # of the comparison, one step each
    timeout: float = 300.0  # seconds until a process that should have ended counts as hanging


def main(flags: Flags) -> None:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        raise SystemExit("benchmarks.machines needs root and the program `ip` (Debian: iproute2)")
    with tempfile.TemporaryDirectory() as folder, network():
        for name in NAMES:
            write_sample_set(Path(folder, name, "scenes"), scenes=60)
        compare(Path(folder), flags)
        disappear(Path(folder), flags)


@contextmanager
def network():
    """Create the two namespaces, and delete them in the end."""

    def ip(*words):
        subprocess.run(["ip", *words], check=True)

    with ExitStack() as stack:
        for name in NAMES:
            ip("netns", "add", name)
            stack.callback(ip, "netns", "delete", name)
        ip("link", "add", CABLES[0], "type", "veth", "peer", "name", CABLES[1])
        for name, cable, address in zip(NAMES, CABLES, ADDRESSES, strict=True):
            ip("link", "set", cable, "netns", name)
            ip("-n", name, "address", "add", f"{address}/24", "dev", cable)
            for device in ("lo", cable):
                ip("-n", name, "link", "set", device, "up")
        yield


def compare(folder: Path, flags: Flags) -> None:
    """Assert that two machines end with the weights of one process."""
    arguments = ["--epochs", flags.epochs, "--batch-size", 60, "--micro-batch-size", 30]
    one = subprocess.Popen(command(*arguments, "--name", "one"), cwd=folder / NAMES[0], env=environment())
    assert one.wait(flags.timeout) == 0
    machines = [start(folder, number, *arguments, "--name", "two") for number in (0, 1)]
    assert [machine.wait(flags.timeout) for machine in machines] == [0, 0]
    assert not (folder / NAMES[1] / "runs").exists()
    one, two = (load_state(folder / NAMES[0] / "runs" / name / "last.pt")["model"] for name in ("one", "two"))
    # Running statistics of batch norms are averages over the processes, and over the micro-batches of a single one.
    keys = [key for key in one if "running" not in key and "tracked" not in key]
    difference = max((two[key] - one[key]).abs().max() / one[key].abs().max().clamp(min=1e-3) for key in keys)
    print(f"largest relative difference of a weight after {flags.epochs} steps: {difference:.1e}", flush=True)
    assert difference < 1e-4 and torch.isfinite(difference)


def disappear(folder: Path, flags: Flags) -> None:
    """Let the second machine disappear after an epoch, and assert that the first one ends and keeps its checkpoint."""
    arguments = ["--epochs", 10_000, "--batch-size", 8, "--name", "lost"]
    machines = [start(folder, number, *arguments, stderr=subprocess.PIPE, text=True) for number in (0, 1)]
    run, deadline = folder / NAMES[0] / "runs" / "lost", time.monotonic() + flags.timeout
    while not (run / "log.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    processes = subprocess.run(["ip", "netns", "pids", NAMES[1]], check=True, stdout=subprocess.PIPE, text=True).stdout
    for process in processes.split():
        os.kill(int(process), signal.SIGKILL)
    stopped = time.monotonic()
    _, messages = machines[0].communicate(timeout=flags.timeout)
    machines[1].communicate()
    (line,) = [line for line in messages.splitlines() if re.match(r"(process 1: )?error: ", line)]
    print(f"after {time.monotonic() - stopped:.0f} s: {line}", flush=True)
    epochs = load_state(run / "last.pt")["epoch"]
    print(f"{epochs} epochs are in last.pt, {len(read_log(run))} in the log", flush=True)
    assert machines[0].returncode != 0 and "--resume" in line and epochs >= 1


def start(folder: Path, number: int, *arguments, **options) -> subprocess.Popen:
    """Start the training process of one machine."""
    launcher = ["-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={number}", "--nproc-per-node=1"]
    launcher += [f"--master-addr={ADDRESSES[0]}", f"--master-port={PORT}"]
    words = ["ip", "netns", "exec", NAMES[number], *command(*arguments, launcher=launcher)]
    network_device = {"GLOO_SOCKET_IFNAME": CABLES[number]}
    cwd = folder / NAMES[number]
    return subprocess.Popen(words, cwd=cwd, env=environment(**network_device), start_new_session=True, **options)


def command(*arguments, launcher=()) -> list[str]:
    """Return the command of train.py for tiny towers, after the words of a launcher."""
    tiny = ["--dataset", "scenes", "--image-encoder", "test_resnet", "--image-size", 32, "--embed-dim", 16]
    tiny += ["--captions-per-image", 1, "--num-workers", 0, "--device", "cpu", "--precision", "float32"]
    tiny += ["--no-pretrained"]
    return [sys.executable, *launcher, str(ROOT / "train.py"), *map(str, (*tiny, *arguments))]


def environment(**variables) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | variables


if __name__ == "__main__":
    main(tyro.cli(Flags))
