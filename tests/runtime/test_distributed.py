"""Two processes train as one does: the same weights, one writer, metrics over the full pool."""

import pytest
import torch
from helpers import one_line_error, run_in_process, run_script

from models.checkpoint import load_state
from runtime import distributed
from runtime.run_dir import read_log

LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"],
    "accelerate launch": ["-m", "accelerate.commands.launch", "--cpu", "--num_processes=2", "--num_machines=1"],
}
FROZEN = ["--freeze-image", "--freeze-text"]


@pytest.fixture
def flags(photos, image_tower, text_tower):
    """Five steps, of all 22 training photos each; two micro-batches, so that dropout falls as in two processes."""
    settings = {
        "dataset": photos,
        "image-encoder": image_tower,
        "text-encoder": text_tower,
        "image-size": 32,
        "embed-dim": 16,
        "batch-size": 22,
        "micro-batch-size": 11,
        "epochs": 5,
        "device": "cpu",
        "precision": "float32",
        "num-workers": 0,
    }
    return [word for name, value in settings.items() for word in (f"--{name}", value)]


def launched(launcher, *words, cwd, check=True):
    # gloo looks up the machine's own name, which not every sandbox can resolve
    return run_script(*LAUNCHERS[launcher], "train.py", *words, cwd=cwd, check=check, GLOO_SOCKET_IFNAME="lo")


@pytest.mark.parametrize(("launcher", "freezing"), [("torchrun", []), ("accelerate launch", FROZEN)])
def test_two_processes_end_with_the_weights_of_one(launcher, freezing, flags, tmp_path):
    alone = run_script("train.py", *flags, *freezing, "--name", "one", cwd=tmp_path)
    together = launched(launcher, *flags, *freezing, "--name", "two", cwd=tmp_path)
    assert together.stdout.replace("two", "one").count("\n") == alone.stdout.count("\n")  # one of them speaks
    one, two = (load_state(tmp_path / "runs" / name / "last.pt") for name in ("one", "two"))
    assert one["model"].keys() == two["model"].keys()
    for key, tensor in one["model"].items():
        if tensor.is_floating_point():
            torch.testing.assert_close(two["model"][key], tensor, rtol=1e-5, atol=1e-6 * tensor.abs().max().item())
    logs = [read_log(tmp_path / "runs" / name) for name in ("one", "two")]
    for record, other in zip(*logs, strict=True):
        timed = {"seconds", "images_per_s", "pairs_per_s"}
        assert {k: v for k, v in record.items() if k not in timed} == pytest.approx(
            {k: v for k, v in other.items() if k not in timed}, rel=1e-5
        )


def test_a_batch_that_the_processes_cannot_share_is_refused_with_the_sizes_that_they_can(flags, tmp_path, monkeypatch):
    monkeypatch.setattr("training.trainer.world_size", lambda: 4)
    monkeypatch.chdir(tmp_path)
    line = one_line_error(run_in_process("train.py", *flags, "--batch-size", 18))
    assert "--batch-size 18 cannot be divided among 4 processes" in line and "16 or 20" in line
    assert not (tmp_path / "runs").exists()


EXCHANGE = """
import torch
from runtime import distributed
distributed.init(torch.device("cpu"))
rank = distributed.rank()
rows = [torch.arange(6.0).view(3, 2), torch.empty(0)][rank]  # the second has none, and does not know their width
gathered, start = distributed.gather_rows(rows)
assert torch.equal(gathered, torch.arange(6.0).view(3, 2)) and start == [0, 3][rank]
gathered, start = distributed.gather_rows(torch.arange(1 + rank, dtype=torch.int64))
assert gathered.tolist() == [0, 0, 1] and start == rank
gathered, _ = distributed.gather_rows(torch.empty(0, dtype=torch.bool))
assert len(gathered) == 0 and gathered.dtype == torch.bool
slices = [[slice(0, 2), slice(0, 0)], [slice(2, 5), slice(0, 0)]][rank]
assert [distributed.shard_slice(5), distributed.shard_slice(0)] == slices
assert distributed.all_gather_list([rank]) == [0, 1] and distributed.broadcast_object(f"of {rank}") == "of 0"
layer = torch.nn.BatchNorm1d(2)
torch.nn.init.constant_(layer.weight, rank)
distributed.broadcast_parameters(layer)
assert not layer.weight.any()
layer.running_mean.fill_(rank)
distributed.average_batch_norm_stats(layer)
assert layer.running_mean.tolist() == [0.5, 0.5]
layer.weight.grad = torch.full((2,), 2.0) if rank else None  # nothing could be read here
distributed.all_reduce_gradients([layer.weight])
assert layer.weight.grad.tolist() == [2.0, 2.0]
distributed.cleanup()
"""


def test_what_two_processes_exchange_arrives_in_their_order_and_from_empty_hands_too(tmp_path):
    (tmp_path / "exchange.py").write_text(EXCHANGE)
    run_script(*LAUNCHERS["torchrun"], tmp_path / "exchange.py", cwd=tmp_path, GLOO_SOCKET_IFNAME="lo")


def test_one_process_exchanges_nothing_and_gets_back_what_it_gave():
    rows = torch.ones(3, 2, requires_grad=True)
    assert distributed.gather_rows(rows) == (rows, 0) and distributed.shard_slice(7) == slice(0, 7)
    assert distributed.all_gather_list([1]) == [1] and distributed.broadcast_object("x") == "x"
    assert (distributed.rank(), distributed.world_size()) == (0, 1)


STOPPED = """
import dataclasses, signal, sys
from pathlib import Path
import torch
import train
from data.loading import open_data
from training import train_step, trainer
from models.checkpoint import load_state
from runtime.distributed import rank
from runtime.signals import Stopped

trainer.distributed.cleanup = lambda: None  # the processes train three times
whole, _ = train.parse_flags()
data = open_data(whole)
trainer.train(whole, data, None)
parts = dataclasses.replace(whole, name="parts")
real = train_step.TrainStep.__call__

def call(self, passes, number, **options):
    if number == 4 and rank() == 1:
        signal.raise_signal(signal.SIGTERM)  # one of them is told, between two checkpoints
    return real(self, passes, number, **options)

train_step.TrainStep.__call__ = call
try:
    trainer.train(parts, data, None)
    sys.exit("not stopped")
except Stopped as stop:
    assert stop.signum == signal.SIGTERM
folder = Path("runs/parts")
torch.distributed.barrier()
state = load_state(folder / "last.pt")
assert (state["epoch"], len(state["statistics"])) == (1, 2) and state["meters"]["steps"] in (2, 3), state["meters"]
assert not all(torch.equal(state["statistics"][0][k], v) for k, v in state["statistics"][1].items())
train_step.TrainStep.__call__ = real
trainer.train(parts, data, folder)
torch.distributed.barrier()
ends = [load_state(Path("runs") / name / "last.pt")["model"] for name in ("whole", "parts")]
assert all(torch.equal(tensor, ends[1][key]) for key, tensor in ends[0].items())
torch.distributed.destroy_process_group()
"""


def test_two_processes_of_which_one_is_told_to_end_go_on_as_if_neither_had_been(flags, tmp_path):
    (tmp_path / "stopped.py").write_text(STOPPED)
    words = [*flags, "--batch-size", 6, "--micro-batch-size", 6, "--no-fold-batch-norm", "--epochs", 3]
    words = [tmp_path / "stopped.py", *words, "--name", "whole"]
    run_script(*LAUNCHERS["torchrun"], *words, cwd=tmp_path, GLOO_SOCKET_IFNAME="lo")
