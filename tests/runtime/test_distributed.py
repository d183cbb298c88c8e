"""Training with two processes equals training with one: same weights, one writer, metrics over the full pool."""

import re

import pytest
import torch
from helpers import one_line_error, run_in_process, run_script, write_image_folder

from data.loading import open_dataset
from models.checkpoint import load_state
from runtime import distributed
from runtime.run_dir import read_log
from training.dataloader import EpochSampler

LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"],
    "accelerate launch": ["-m", "accelerate.commands.launch", "--cpu", "--num_processes=2", "--num_machines=1"],
}
FROZEN = ["--freeze-image", "--freeze-text"]


@pytest.fixture
def flags(photos, image_tower, text_tower):
    """Flags for five steps with all 22 training photos each.

    Two micro-batches per step make dropout draw the same masks as two processes do.
    """
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


def run_train_with(launcher, *arguments, cwd, check=True):
    # By default gloo resolves the host name, which fails in some sandboxes.
    return run_script(*LAUNCHERS[launcher], "train.py", *arguments, cwd=cwd, check=check, GLOO_SOCKET_IFNAME="lo")


@pytest.mark.parametrize(("launcher", "freezing"), [("torchrun", []), ("accelerate launch", FROZEN)])
def test_two_processes_reach_the_weights_of_one(launcher, freezing, flags, tmp_path):
    single = run_script("train.py", *flags, *freezing, "--name", "one", cwd=tmp_path)
    # A cache of their own, so that two processes encode the frozen towers too and print the same lines.
    double = run_train_with(launcher, *flags, *freezing, "--name", "two", "--cache-dir", "cache2", cwd=tmp_path)
    for name, done in (("one", single), ("two", double)):  # only rank 0 prints
        assert len(re.findall(r"^epoch \d/5 ", done.stdout, re.MULTILINE)) == 5
        assert done.stdout.count(f"finished: runs/{name}") == done.stdout.count("best: epoch") == 1
    one, two = (load_state(tmp_path / "runs" / name / "last.pt") for name in ("one", "two"))
    assert one["model"].keys() == two["model"].keys()
    for key, tensor in one["model"].items():
        if tensor.is_floating_point():
            torch.testing.assert_close(two["model"][key], tensor, rtol=1e-5, atol=1e-6 * tensor.abs().max().item())
    logs = [read_log(tmp_path / "runs" / name) for name in ("one", "two")]
    for record, other in zip(*logs, strict=True):
        timings = {"seconds", "images_per_s", "pairs_per_s"}
        assert {k: v for k, v in record.items() if k not in timings} == pytest.approx(
            {k: v for k, v in other.items() if k not in timings}, rel=1e-5
        )


def test_validation_images_that_do_not_divide_among_processes_are_all_measured(flags, tmp_path):
    """Three validation photos on two processes, first all readable, then two."""
    photos = write_image_folder(tmp_path / "photos", 30)
    header, *rows = (photos / "captions.txt").read_text().splitlines()
    splits = ["val"] * 6 + ["test"] * 10 + ["train"] * 44  # of two captions per photo
    lines = [f"{header},split", *(f"{row},{split}" for row, split in zip(rows, splits, strict=True))]
    (photos / "captions.txt").write_text("\n".join(lines) + "\n")
    val = open_dataset(str(photos), data_dir=None, cache_dir=str(tmp_path / "c"), split_seed=0).split("val")
    assert len(val.paths) == 3
    flags = [*flags, "--dataset", photos, "--epochs", 9, "--patience", 1]
    flags += ["--lr-image", 0, "--lr-text", 0, "--lr-heads", 0]  # no gain: all processes must stop after epoch 2
    single = run_script("train.py", *flags, "--name", "one", cwd=tmp_path)
    double = run_train_with("torchrun", *flags, "--name", "two", cwd=tmp_path)
    assert len(read_log(tmp_path / "runs" / "one")) == len(read_log(tmp_path / "runs" / "two")) == 2
    assert "2 processes" in " ".join(double.stdout.split()) and "processes" not in single.stdout
    one, two = (read_log(tmp_path / "runs" / name)[0] for name in ("one", "two"))
    assert one["rsum"] == pytest.approx(two["rsum"])
    val.paths[0].write_bytes(b"broken")
    done = run_train_with("torchrun", *flags, "--name", "broken", cwd=tmp_path)
    assert "val: 1 photo could not be read" in done.stdout


def test_process_without_a_readable_photo_takes_part_in_every_step(flags, tmp_path):
    photos = write_image_folder(tmp_path / "photos", 30)
    train = open_dataset(str(photos), data_dir=None, cache_dir=str(tmp_path / "c"), split_seed=0).split("train")
    order = EpochSampler(22, 22, 0, micro_batch_size=11, process=1, processes=2)
    for _, index in next(iter(order))[0]:  # all photos of rank 1 in the first epoch's only step
        train.paths[index].write_bytes(b"broken")
    flags = [*flags, "--dataset", photos, "--epochs", 1]
    done = run_train_with("torchrun", *flags, "--name", "two", cwd=tmp_path)
    assert "train: 11 photos could not be read" in " ".join(done.stdout.split()) and "epoch 1/1" in done.stdout


def test_indivisible_batch_size_is_an_error_with_the_nearest_divisible_ones(flags, tmp_path, monkeypatch):
    monkeypatch.setattr("training.run_start.world_size", lambda: 4)
    monkeypatch.chdir(tmp_path)
    line = one_line_error(run_in_process("train.py", *flags, "--batch-size", 18))
    assert "--batch-size 18 cannot be divided among 4 processes" in line and "16 or 20" in line
    assert not (tmp_path / "runs").exists()


COLLECTIVES = """
import torch
from runtime import distributed
distributed.init(torch.device("cpu"))
rank = distributed.rank()
rows = [torch.arange(6.0).view(3, 2), torch.empty(0)][rank]  # rank 1 has no rows and does not know D
gathered, start = distributed.gather_rows(rows)
assert torch.equal(gathered, torch.arange(6.0).view(3, 2)) and start == [0, 3][rank]
gathered, start = distributed.gather_rows(torch.arange(1 + rank, dtype=torch.int64))
assert gathered.tolist() == [0, 0, 1] and start == rank
gathered, _ = distributed.gather_rows(torch.empty(0, dtype=torch.bool))
assert len(gathered) == 0 and gathered.dtype == torch.bool
gathered, start = distributed.gather_rows(torch.tensor([[True, False, True], [False]][rank]))  # does not divide by 2
assert gathered.tolist() == [True, False, True, False] and gathered.dtype == torch.bool and start == [0, 3][rank]
images, ids = distributed.gather_tensors([torch.full((rank, 2), 1.5), torch.arange(3 - rank)])
assert images[0].tolist() == [[1.5, 1.5]] and images[1] == 0
assert ids[0].tolist() == [0, 1, 2, 0, 1] and ids[1] == [0, 3][rank]
slices = [[slice(0, 2), slice(0, 0)], [slice(2, 5), slice(0, 0)]][rank]
assert [distributed.shard_slice(5), distributed.shard_slice(0)] == slices
assert distributed.all_gather_list([rank]) == [0, 1] and distributed.broadcast_object(f"of {rank}") == "of 0"
from retrieval.metrics import retrieval_metrics
generator = torch.Generator().manual_seed(0)
for images, captions, chunk_size in ((11, 37, 4), (3, 5, 1024), (1, 1, 2)):  # shares that do not divide
    ids = torch.randint(images, (captions,), generator=generator)
    image_emb = torch.nn.functional.normalize(torch.randn(images, 6, generator=generator))
    text_emb = torch.nn.functional.normalize(image_emb[ids] + torch.randn(captions, 6, generator=generator))
    text_emb[::3] = text_emb[0].clone()  # ties
    alone = retrieval_metrics(image_emb, text_emb, ids, chunk_size=chunk_size)
    assert retrieval_metrics(image_emb, text_emb, ids, chunk_size=chunk_size, shared=True) == alone
layer = torch.nn.BatchNorm1d(2)
torch.nn.init.constant_(layer.weight, rank)
distributed.broadcast_parameters(layer)
assert not layer.weight.any()
layer.running_mean.fill_(rank)
distributed.average_batch_norm_stats(layer)
assert layer.running_mean.tolist() == [0.5, 0.5]
import time
from datetime import timedelta
def wait():
    distributed.limit_waiting(timedelta(seconds=1))
    if rank:
        time.sleep(3)  # as a machine without power: it sends nothing
        os._exit(0)
    distributed.all_reduce_sum(torch.ones(3))
import os
from runtime import cli
cli.run(wait)
"""


def test_collectives_keep_rank_order_and_accept_ranks_without_data(tmp_path):
    (tmp_path / "collectives.py").write_text(COLLECTIVES)
    launched = [*LAUNCHERS["torchrun"], tmp_path / "collectives.py"]
    done = run_script(*launched, cwd=tmp_path, check=False, GLOO_SOCKET_IFNAME="lo")
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "the connection to another process was lost (Timed out waiting" in line, done.stderr
    assert re.search(r"exitcode +: 2 ", done.stderr)


BUCKETS = """
import torch
import torch.distributed as dist
from torch import nn
from runtime import distributed
from runtime.gradient_buckets import GradientBuckets

distributed.init(torch.device("cpu"))
rank = distributed.rank()
torch.manual_seed(0)
model = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("scale", "first", "skipped", "unused", "last")})
model["first"].weight.data = model["first"].weight.data.T  # a parameter that is not contiguous
model["conv"] = nn.Conv2d(2, 3, 2).to(memory_format=torch.channels_last)
buckets = GradientBuckets(model.parameters(), replicated=[model["scale"].weight], bucket_bytes=200)

def backward(rows, conv, last=False):
    rows = model["first"](torch.full((rows, 4), 1.0 + rank))
    rows = model["last"](rows if rank else model["skipped"](rows))  # rank 1 skips a layer, as with layer dropout
    loss = rows.square().sum() + (model["conv"](torch.ones(1, 2, 3, 3)).sum() if conv else 0)
    if last:
        buckets.start()
    loss.backward()

def two_passes(last):
    backward(3, conv=rank == 0)  # no micro-batch of rank 1 uses conv
    backward(2, conv=False, last=last)

def rank_0_only(last):  # no photo of rank 1 could be read
    if rank == 0:
        backward(2, conv=True, last=last)

def check(passes):
    model.zero_grad()
    model["scale"](torch.ones(1, 4)).sum().backward()  # the loss: each rank has the full gradient of the weight
    passes(False)
    local = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    model["scale"](torch.ones(1, 4)).sum().backward()
    passes(True)
    sent = len(buckets._sent) if buckets._started else 0
    buckets.finish()
    for name, parameter in model.named_parameters():
        expected = torch.zeros(parameter.shape)
        if local[name] is not None:
            expected.copy_(local[name])
        ranks = torch.tensor(local[name] is not None).int()
        dist.all_reduce(expected)
        dist.all_reduce(ranks)
        if not ranks:
            assert parameter.grad is None, name
            continue
        torch.testing.assert_close(parameter.grad, expected / 2 if name == "scale.weight" else expected)
        assert parameter.grad.stride() == parameter.stride(), name
    assert model["unused"].weight.grad is None
    return sent

check(two_passes)
check(rank_0_only)
check(lambda last: None)
sent = check(lambda last: backward(1, conv=True, last=last))
print(f"rank {rank}: {sent} of {len(buckets._buckets)} buckets sent during the backward pass", flush=True)
model["last"].requires_grad_(False)  # other buckets
check(two_passes)
distributed.cleanup()
"""


def test_buckets_of_gradients_are_sums_whatever_gradients_a_process_lacks(tmp_path):
    (tmp_path / "buckets.py").write_text(BUCKETS)
    done = run_script(*LAUNCHERS["torchrun"], tmp_path / "buckets.py", cwd=tmp_path, GLOO_SOCKET_IFNAME="lo")
    sent = re.findall(r"rank (\d): (\d+) of (\d+) buckets", done.stdout)
    assert sorted(rank for rank, *_ in sent) == ["0", "1"] and all(0 < int(some) < int(of) for _, some, of in sent)


def test_collectives_of_a_single_process_return_their_input():
    rows = torch.ones(3, 2, requires_grad=True)
    assert distributed.gather_rows(rows) == (rows, 0) and distributed.shard_slice(7) == slice(0, 7)
    assert distributed.all_gather_list([1]) == [1] and distributed.broadcast_object("x") == "x"
    assert (distributed.rank(), distributed.world_size()) == (0, 1)


INTERRUPTED = """
import dataclasses, signal, sys
from pathlib import Path
import torch
import train
from data.loading import open_data
from training import train_step, trainer
from models.checkpoint import load_state
from runtime.distributed import rank
from runtime.signals import Stopped

trainer.distributed.cleanup = lambda: None  # because train() is called three times
uninterrupted, _ = train.parse_flags()
data = open_data(uninterrupted)
trainer.train(uninterrupted, data, None)
interrupted = dataclasses.replace(uninterrupted, name="interrupted")
original = train_step.TrainStep.__call__

def call(self, passes, number, **options):
    if number == 4 and rank() == 1:
        signal.raise_signal(signal.SIGTERM)  # one rank receives the signal, between two checkpoints
    return original(self, passes, number, **options)

train_step.TrainStep.__call__ = call
try:
    trainer.train(interrupted, data, None)
    sys.exit("not stopped")
except Stopped as error:
    assert error.signum == signal.SIGTERM
folder = Path("runs/interrupted")
torch.distributed.barrier()
state = load_state(folder / "last.pt")
assert (state["epoch"], len(state["statistics"])) == (1, 2) and state["meters"]["steps"] in (2, 3), state["meters"]
assert not all(torch.equal(state["statistics"][0][k], v) for k, v in state["statistics"][1].items())
train_step.TrainStep.__call__ = original
trainer.train(interrupted, data, folder)
torch.distributed.barrier()
weights = [load_state(Path("runs") / name / "last.pt")["model"] for name in ("uninterrupted", "interrupted")]
assert all(torch.equal(tensor, weights[1][key]) for key, tensor in weights[0].items())
torch.distributed.destroy_process_group()
"""


def test_run_interrupted_by_a_signal_to_one_rank_resumes_exactly(flags, tmp_path):
    (tmp_path / "interrupted.py").write_text(INTERRUPTED)
    flags = [*flags, "--batch-size", 6, "--micro-batch-size", 6, "--no-fold-batch-norm", "--epochs", 3]
    arguments = [tmp_path / "interrupted.py", *flags, "--name", "uninterrupted"]
    run_script(*LAUNCHERS["torchrun"], *arguments, cwd=tmp_path, GLOO_SOCKET_IFNAME="lo")
