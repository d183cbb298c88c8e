"""Devices that are missing, busy, full or too old, lost processes and missing compilers: one line each."""

import sys

import pytest
import torch
from helpers import one_line_error, run_in_process

from runtime import cli, device, distributed
from runtime.device_errors import describe_failure
from training.run_start import require_compiler


class InductorError(RuntimeError):
    """As torch._inductor.exc.InductorError."""


OUT_OF_MEMORY = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 7.79 GiB of which 1.00 MiB is free."
)
BUSY = getattr(torch, "AcceleratorError", RuntimeError)
FAILURES = [
    (OUT_OF_MEMORY, ["out of memory", "7.79 GiB", "smaller model or batch"]),
    (MemoryError(), ["out of memory"]),
    (RuntimeError("MPS backend out of memory (MPS allocated: 18.0 GB)"), ["out of memory", "18.0 GB"]),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate"), ["out of memory"]),
    (
        BUSY("CUDA error: CUDA-capable device(s) is/are busy or unavailable\nCompile with TORCH_USE_CUDA_DSA"),
        ["busy or unavailable", "no other program"],
    ),
    (RuntimeError("CUDA error: no kernel image is available for execution on the device"), ["no code for this GPU"]),
    (
        NotImplementedError(
            "The operator 'aten::_fused_sdp' is not currently implemented for the MPS device. If you want this op"
        ),
        ["aten::_fused_sdp", "PYTORCH_ENABLE_MPS_FALLBACK=1"],
    ),
    (InductorError("Cannot find a working triton installation.\n\nSet TORCHDYNAMO_VERBOSE=1"), ["--compile", "Triton"]),
    (RuntimeError("[gloo/transport/tcp/pair.cc:561] Connection closed by peer [10.0.0.2]:1"), ["10.0.0.2", "lost"]),
    (
        RuntimeError("NCCL error in: ProcessGroupNCCL.cpp:1, remote process exited or there was a network error"),
        ["lost"],
    ),
]


@pytest.mark.parametrize(("error", "parts"), FAILURES, ids=lambda value: type(value).__name__)
def test_failure_of_the_machine_is_one_line_with_exit_code_2(error, parts, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as exit_code:
        cli.run(main)
    line = capsys.readouterr().err
    assert exit_code.value.code == 2 and line.count("\n") == 1 and line.startswith("error: ")
    assert all(part in line for part in parts), line


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes do not match"), NotImplementedError(), KeyError("out of memory")]
)
def test_other_errors_keep_their_traceback(error):
    def main():
        raise error

    with pytest.raises(type(error)) as raised:
        cli.run(main)
    assert raised.value is error and describe_failure(error) is None


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def refusal(name):
    with pytest.raises(ValueError) as error:
        device.pick_device(name)
    assert "\n" not in str(error.value) and f"--device {name}" in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("hidden", ["", " ", "-1"])
def test_hidden_gpus_an_old_driver_and_a_build_without_cuda_are_distinguished(no_gpu, monkeypatch, hidden):
    def init():
        raise RuntimeError(
            "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver"
        )

    monkeypatch.setattr(torch.cuda, "init", init)
    assert "driver on your system is too old (found version 11040)" in refusal("cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert "CUDA_VISIBLE_DEVICES is" in refusal("cuda")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA" in refusal("cuda")


def test_single_gpu_is_chosen_by_the_environment(no_gpu, tmp_path, monkeypatch):
    assert "CUDA_VISIBLE_DEVICES=1 and --device cuda" in refusal("cuda:1")
    assert "auto, cuda, mps or cpu" in refusal("tpu")
    monkeypatch.chdir(tmp_path)
    line = one_line_error(run_in_process("train.py", "--device", "cuda:2"))
    assert "CUDA_VISIBLE_DEVICES=2" in line


@pytest.mark.parametrize(("processes", "gpus", "nccl", "part"), [(4, 2, True, "2 GPUs"), (2, 2, False, "WSL 2")])
def test_processes_without_a_gpu_each_or_without_nccl_are_refused(monkeypatch, processes, gpus, nccl, part):
    for name in ("num_processes", "processes_on_this_machine"):
        monkeypatch.setattr(distributed, name, lambda: processes)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: nccl)
    with pytest.raises(ValueError, match=part) as error:
        distributed.init(torch.device("cuda"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_missing_compiler_is_named_before_training(monkeypatch, name):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr("training.run_start.find_spec", lambda module: None)
    with pytest.raises(ValueError, match=r"^--compile: .*(no C\+\+ compiler|Triton is not installed)") as error:
        require_compiler(torch.device(name))
    assert "\n" not in str(error.value)
    monkeypatch.setenv("CXX", sys.executable)
    monkeypatch.setattr("training.run_start.find_spec", lambda module: object())
    require_compiler(torch.device(name))


def test_float32_on_a_gpu_is_exact_and_algorithms_do_not_depend_on_timing(monkeypatch):
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = cudnn.allow_tf32, cudnn.benchmark, matmul.allow_tf32
    try:
        cudnn.allow_tf32 = cudnn.benchmark = True
        assert device.pick_device("cuda").type == "cuda"
        assert not (cudnn.allow_tf32 or cudnn.benchmark or matmul.allow_tf32)
    finally:
        cudnn.allow_tf32, cudnn.benchmark, matmul.allow_tf32 = before
