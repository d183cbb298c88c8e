"""No step waits for the GPU, tried on a CUDA device that computes nothing (tests/null_device): images and features."""

import json
import sys
from pathlib import Path

import pytest
from helpers import ROOT, run_script

sys.path.insert(0, str(ROOT / "tests" / "null_device"))
from build import Unbuildable, build

FEATURES = ["--unfreeze-image-stages", 1, "--cached-views", 2, "--freeze-epochs", 1, "--micro-batch-size", 5]
FLOAT16 = ["--gradient-checkpointing", "--precision", "float16"]


@pytest.fixture(scope="module")
def device(tmp_path_factory):
    try:
        return build(tmp_path_factory.mktemp("null_device"))
    except Unbuildable:
        pytest.skip("needs Linux, gcc, nm, CUDA's headers and the CUDA build of PyTorch")


@pytest.mark.parametrize("flags", [FLOAT16, FEATURES], ids=["images in float16", "features"])
def test_steps_on_a_gpu_wait_for_nothing_and_copy_from_pinned_memory_only(
    flags, device, photos, image_tower, text_tower, tmp_path
):
    settings = ["--dataset", photos, "--image-encoder", image_tower, "--text-encoder", text_tower]
    settings += ["--image-size", 32, "--embed-dim", 16, "--batch-size", 11, "--epochs", 2, "--num-workers", 0]
    driver = Path(ROOT, "tests", "null_device", "driver.py")
    arguments = [driver, *settings, *flags, "--device", "cuda"]
    done = run_script(*arguments, cwd=tmp_path, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="0", **device)
    counts = json.loads(done.stdout.split("COUNTS ")[1].splitlines()[0])
    assert len(counts["steps"]) == 4 and len(counts["validations"]) == 2
    for step in counts["steps"]:
        assert step["launches"] > 100 and step["waits"] == step["pageable"] == 0, counts
    for validation in counts["validations"]:
        assert validation["waits"] <= 2 and validation["pageable"] == 0, counts
