"""Build the null CUDA device into a folder; Unbuildable names what is missing for it."""

import glob
import re
import shutil
import subprocess
from pathlib import Path

import torch

HERE = Path(__file__).parent
LIBRARIES = ("libtorch_cuda.so", "libc10_cuda.so", "libtorch_python.so", "libtorch_cuda_linalg.so")
DRIVER = "libcuda.so.1"
CONTEXT_STATE = "int cuDevicePrimaryCtxGetState(int d, unsigned *f, int *active) { *active = 1; return 0; }\n"
# cuDNN, NCCL and the other libraries are not called: they stay as they are.
REPLACED = re.compile(r"(?:__cuda|cuda[A-Z]|cublas|cu[A-Z])\w*")


class Unbuildable(Exception):
    """gcc, nm, CUDA's headers or the CUDA build of PyTorch are missing."""


def build(folder: Path) -> dict[str, str]:
    """Compile the device, and return the environment in which a new process uses it."""
    headers = next(iter(sorted(glob.glob("/usr/local/cuda*/include"), reverse=True)), None)
    lib = Path(torch.__file__).parent / "lib"
    if not (headers and (lib / LIBRARIES[0]).exists() and shutil.which("gcc") and shutil.which("nm")):
        raise Unbuildable
    source = (HERE / "runtime.c").read_text()
    _compile(folder / "libnull.so", source, _imports(lib, LIBRARIES), f"-I{headers}", "-lpthread")
    _compile(folder / DRIVER, CONTEXT_STATE, _imports(lib, ["libcaffe2_nvrtc.so"]), f"-Wl,-soname,{DRIVER}")
    return {"LD_PRELOAD": str(folder / "libnull.so"), "LD_LIBRARY_PATH": str(folder), "NULL_DEVICE": str(folder)}


def _imports(lib, names):
    """Return the functions of CUDA that these libraries of PyTorch import."""
    paths = [path for name in names if (path := lib / name).exists()]
    listed = subprocess.run(["nm", "-D", "--undefined-only", *paths], check=True, capture_output=True, text=True).stdout
    symbols = {line.split()[-1].partition("@")[0] for line in listed.splitlines() if line.strip()}
    return sorted(filter(REPLACED.fullmatch, symbols))


def _compile(library, source, names, *options):
    """Compile a library with this source, and with a function that returns 0 for each other name."""
    stubs = "".join(f"int {name}(void) {{ return 0; }}\n" for name in names if not re.search(rf"\b{name}\b", source))
    main, rest = library.with_suffix(".main.c"), library.with_suffix(".stubs.c")
    main.write_text(source)
    rest.write_text(stubs)  # apart from the headers, whose declarations they contradict
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-w", "-o", library, main, rest, *options], check=True)
