"""Compare engines for the image tower on one CPU core, and the recall with their embeddings.

`python -m benchmarks.encoding_engines --run runs/NAME` measures PyTorch in float32 and bfloat16, and ONNX Runtime in
float32 and int8 (static quantization, calibrated on training photos); with `pip install openvino` also OpenVINO in
bfloat16, and with --compile torch.compile. Recall is that of the validation split. Needs onnx, onnxscript, onnxruntime.
"""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

os.environ["OMP_NUM_THREADS"] = "1"  # one core: CPU time then depends little on other work on the machine
BATCH, CALIBRATION = 32, 150  # photos


@dataclass(frozen=True)
class Flags:
    """Measure each engine in alternating order."""

    run: Path  # the run's folder
    data_dir: Path | None = None  # where its data set is stored, if it has moved
    rounds: int = 5  # number of measurements of each engine
    recall: bool = True  # also measure recall on the validation split
    compile: bool = False  # also measure torch.compile, which needs a C++ compiler


def main(flags: Flags) -> None:
    import torch

    from data.loading import open_run_data
    from retrieval.encoder import load_encoder
    from runtime.run_dir import read_shared_config

    torch.set_num_threads(1)
    encoder, model = load_encoder(flags.run, device="cpu", precision="float32")
    encoder = replace(encoder, num_workers=0)
    data = open_run_data(flags.run, read_shared_config(flags.run), flags.data_dir, "val")
    train = open_run_data(flags.run, read_shared_config(flags.run), flags.data_dir, "train").split("train").paths
    with tempfile.TemporaryDirectory() as temporary:
        calibration = read_pixels(encoder, train[:: max(1, len(train) // CALIBRATION)][:CALIBRATION])
        engines = build_engines(encoder, model, calibration, Path(temporary), with_compile=flags.compile)
        compare_speed(engines, torch.cat(calibration)[:BATCH], flags.rounds)
        if flags.recall:
            compare_recall(engines, encoder, data.split("val"))


def read_pixels(encoder, paths) -> list:
    """Return the batches of preprocessed photos, each (b, 3, H, W) uint8."""
    from dataset import ImageFiles

    files = ImageFiles(paths, preprocess=encoder.preprocess)
    return [pixels for pixels, _ in encoder.pixel_batches(files, "", batch_size=BATCH) if pixels is not None]


def build_engines(encoder, model, calibration, folder: Path, *, with_compile: bool) -> dict[str, Callable]:
    """Return functions from pixels (B, 3, H, W) uint8 to embeddings (B, D), by name."""
    import torch

    half = replace(encoder, precision=torch.bfloat16)
    engines = {"PyTorch float32": encoder.embed_pixels, "PyTorch bfloat16": half.embed_pixels}
    if with_compile:
        import torch._inductor.config as inductor

        inductor.freezing = True
        compiled = torch.compile(model.encode_image)

        def run_compiled(images):
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                return compiled(images).float()

        engines["torch.compile bfloat16"] = run_compiled
    path = folder / "image.onnx"
    write_onnx(model, calibration[0], path)
    engines["ONNX Runtime float32"] = onnx_engine(path)
    quantize(path, folder / "int8.onnx", calibration)
    engines["ONNX Runtime int8"] = onnx_engine(folder / "int8.onnx")
    try:
        engines["OpenVINO bfloat16"] = openvino_engine(path)
    except ImportError:
        print("OpenVINO is not measured: pip install openvino", file=sys.stderr)
    return engines


def write_onnx(model, example, path: Path) -> None:
    """Export the image tower and its head."""
    from torch.export import Dim

    from retrieval.model_export import tower_to_onnx

    tower_to_onnx(model.encode_image, (example,), ["images"], "image_emb", [{0: Dim("batch")}], path)


def quantize(source: Path, target: Path, calibration) -> None:
    """Write an int8 graph: per-channel weights, activations from the calibration batches' ranges."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.batches = iter(calibration)

        def get_next(self):
            batch = next(self.batches, None)
            return None if batch is None else {"images": batch.numpy()}

    prepared = source.with_name("prepared.onnx")
    quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
    quantize_static(
        str(prepared),
        str(target),
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        weight_type=QuantType.QInt8,
        activation_type=QuantType.QUInt8,
        op_types_to_quantize=["Conv", "Add"],
    )


def onnx_engine(path: Path) -> Callable:
    """Return a function that runs an exported tower with ONNX Runtime on one core."""
    import onnxruntime
    import torch

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def openvino_engine(path: Path) -> Callable:
    """Return a function that runs an exported tower with OpenVINO in bfloat16 on one core."""
    import numpy as np
    import openvino
    import torch

    core = openvino.Core()
    settings = {"INFERENCE_PRECISION_HINT": "bf16", "INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1}
    compiled = core.compile_model(core.read_model(str(path)), "CPU", settings)
    return lambda images: torch.from_numpy(np.array(compiled(images.numpy())[0], np.float32))


def compare_speed(engines: dict[str, Callable], images, rounds: int) -> None:
    """Print the median of photos per second of CPU time."""
    rates = {name: [] for name in engines}
    for number in range(rounds + 1):  # the first one prepares kernels and memory
        for name, embed in engines.items():
            started = time.process_time()
            embed(images)
            if number:
                rates[name].append(len(images) / (time.process_time() - started))
    for name, values in rates.items():
        print(f"{name:24} {statistics.median(values):6.1f} photos per second of CPU time", flush=True)


def compare_recall(engines: dict[str, Callable], encoder, split) -> None:
    """Print the recall of each engine's embeddings, their cosines to the first one's, and how many top tens agree."""
    import torch

    from retrieval.exact_search import top_k
    from retrieval.metrics import retrieval_metrics

    text_emb = encoder.encode_captions(list(split.captions), "captions")
    caption_image_ids, pixels = torch.from_numpy(split.caption_image_ids), read_pixels(encoder, split.paths)
    expected = None
    for name, embed in engines.items():
        image_emb = torch.nn.functional.normalize(torch.cat([embed(batch) for batch in pixels]), dim=-1)
        metrics = retrieval_metrics(image_emb, text_emb, caption_image_ids)
        indices = top_k(text_emb, image_emb, 10, chunk_size=4096)[1]
        if expected is None:
            expected = image_emb, indices
        cosines = (image_emb * expected[0]).sum(1)
        shared = (indices.unsqueeze(2) == expected[1].unsqueeze(1)).any(2).float().mean()
        recalls = ", ".join(f"{key} {metrics[key]:.1f}" for key in ("i2t_R@1", "t2i_R@1", "rsum"))
        cosine = f"cosine {cosines.mean():.5f} (at least {cosines.min():.4f})"
        print(f"{name:24} {recalls}; {cosine}; {shared:.1%} of the top tens", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Flags))
