"""A run's model in the forms of other programs: ONNX, and a folder of transformers. What is written is compared."""

import importlib
import json
import logging
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import AutoModel

from data.preprocess import Preprocess
from models.checkpoint import Run
from retrieval.encoder import load_pretrained_encoder
from runtime.atomic_io import new_folder, write_text

TOLERANCE = 1e-4  # between an embedding of the written model and PyTorch's


def write_onnx(run: Run, out: Path) -> float:
    """Write image.onnx, text.onnx, tokenizer/ and settings.json; returns the largest difference from PyTorch.

    image.onnx takes images (B, 3, H, W) uint8 and gives image_emb (B, D); text.onnx takes input_ids and attention_mask
    (M, L) int64 and gives text_emb (M, D); all rows are unit vectors. Raises ValueError where they differ too much.
    """
    onnxruntime = _library("onnxruntime", "onnx onnxscript onnxruntime")
    model, preprocess = run.model.float().eval(), _view(run)
    any_rows, any_length = torch.export.Dim.DYNAMIC, torch.export.Dim.DYNAMIC
    towers = {
        "image": (model.encode_image, ["images"], [{0: any_rows}], [_photos(rows, preprocess) for rows in (2, 1, 5)]),
        "text": (
            model.encode_text,
            ["input_ids", "attention_mask"],
            [{0: any_rows, 1: any_length}] * 2,
            [_captions(run, *shape) for shape in ((2, 9), (1, 3), (5, _max_tokens(run)))],
        ),
    }
    with new_folder(out) as draft:
        gaps = []
        for name, (encode, names, dynamic, probes) in towers.items():
            path = draft / f"{name}.onnx"
            _to_onnx(encode, probes[0], names, f"{name}_emb", dynamic, path)
            session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
            gaps += [
                _gap(encode, probe, lambda *inputs, s=session, n=names: _run_onnx(s, n, inputs)) for probe in probes
            ]
        run.tokenizer.save_pretrained(draft / "tokenizer")
        settings = {
            "preprocess": asdict(preprocess),
            "max_tokens": _max_tokens(run),
            "temperature": model.temperature.item(),
        }
        write_text(draft / "settings.json", json.dumps(settings, indent=2) + "\n")
    return max(gaps)


def write_transformers(run: Run, out: Path) -> float:
    """Write a folder for transformers' from_pretrained and push_to_hub; returns the largest difference from PyTorch.

    There is one for pairs (pairs.py), VisionTextDualEncoderModel among them, whose heads keep the towers' space: no
    class of transformers holds other heads. Raises ValueError for other runs.
    """
    if run.config.model is None or run.config.heads != ("none", "none"):
        raise ValueError(
            f"transformers has no model with the heads of {run.folder}: it takes a run that was trained from a pair, "
            "--model NAME, without heads of its own; --onnx takes any run"
        )
    model = run.model.float().eval()
    with new_folder(out) as draft:
        _joined_again(model).save_pretrained(draft)
        run.tokenizer.save_pretrained(draft)
        _processor(model.image_encoder, _view(run)).save_pretrained(draft)
        encoder, _ = load_pretrained_encoder(
            str(draft), max_tokens=run.config.max_tokens, device="cpu", precision="float32"
        )
        if encoder.preprocess != _view(run):
            raise ValueError(f"transformers cannot prepare photos as {run.folder} does: {_view(run)}")
        gaps = [_gap(model.encode_image, _photos(rows, _view(run)), encoder.encode_image) for rows in (1, 3)]
        captions = [_captions(run, *shape) for shape in ((1, 3), (4, 9))]
        gaps += [_gap(model.encode_text, probe, encoder.encode_text) for probe in captions]
    return max(gaps)


def _to_onnx(encode, probe, names, output, dynamic, path):
    class Tower(nn.Module):  # what is exported must be a module
        def __init__(self):
            super().__init__()
            self.model = encode.__self__

        def forward(self, *inputs):
            return encode(*inputs)

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                Tower().eval(),
                probe,
                input_names=names,
                output_names=[output],
                dynamic_shapes=(tuple(dynamic),),
                dynamo=True,
                verbose=False,
            )
        program.save(str(path))
    except Exception as error:  # whatever the exporter's many passes raise
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"PyTorch cannot export this tower as {path.name}: {reason}") from None


def _run_onnx(session, names, inputs):
    return session.run(None, {name: rows.numpy() for name, rows in zip(names, inputs, strict=True)})[0]


def _gap(encode: Callable, inputs: tuple, other: Callable) -> float:
    """The largest difference of the two encoders' rows; ValueError beyond TOLERANCE."""
    with torch.no_grad():
        rows, others = encode(*inputs), other(*inputs)
    gap = (rows - torch.as_tensor(others)).abs().max().item()
    if not gap <= TOLERANCE:
        raise ValueError(f"the exported embeddings differ from PyTorch's by {gap:.1e}, more than {TOLERANCE:.0e}")
    return gap


def _joined_again(model):
    """The pair as transformers knows it, with the trained weights of both halves and the learned scale."""
    trunk_parts = model.image_encoder.backbone.model, model.text_encoder.backbone.model
    pair = AutoModel.from_config(trunk_parts[0].config)
    state = pair.state_dict()
    trained = {name: tensor for half in trunk_parts for name, tensor in half.state_dict().items()}
    scales = {"logit_scale": model.logit_scale, "temperature": model.temperature, "logit_bias": model.logit_bias}
    trained |= {
        name: scale.detach().reshape(state[name].shape)
        for name, scale in scales.items()
        if name in state and scale is not None
    }
    pair.load_state_dict(state | trained)
    return pair.eval()


def _processor(image_encoder, preprocess):
    """transformers' preparation of photos that does what `preprocess` does."""
    kinds = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "area": 4}
    colours = {name: getattr(image_encoder, name).flatten().tolist() for name in ("mean", "std")}
    options = {"image_mean": colours["mean"], "image_std": colours["std"], "resample": kinds[preprocess.interpolation]}
    square = {"height": preprocess.size, "width": preprocess.size}
    if patch := image_encoder.backbone.patch:
        return transformers.Siglip2ImageProcessor(
            patch_size=patch, max_num_patches=(preprocess.size // patch) ** 2, **options
        )
    if preprocess.shortest_edge is None:
        return transformers.ViTImageProcessor(size=square, **options)
    return transformers.CLIPImageProcessor(
        size={"shortest_edge": preprocess.shortest_edge}, crop_size=square, **options
    )


def _view(run) -> Preprocess:
    return run.model.image_encoder.preprocess.resized(run.config.image_size).scaled(run.config.eval_image_scale)


def _max_tokens(run):
    return min(run.config.max_tokens, run.model.text_encoder.max_tokens or run.config.max_tokens)


def _photos(rows, preprocess):
    generator = torch.Generator().manual_seed(rows)
    return (torch.randint(0, 256, (rows, 3, preprocess.size, preprocess.size), dtype=torch.uint8, generator=generator),)


def _captions(run, rows, length):
    """Token ids and mask (rows, length) of words that are none, the last caption shorter than the others."""
    tokenizer, length = run.tokenizer, min(length, _max_tokens(run))
    words = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    sentence = " ".join(word for word in words if word.isalnum())
    ids = tokenizer(sentence, truncation=True, max_length=length)["input_ids"]
    input_ids = torch.tensor([ids] * rows)
    mask = torch.ones_like(input_ids)
    if rows > 1 and input_ids.shape[1] > 4:
        mask[-1, 4:] = 0
        input_ids[-1, 3:] = torch.tensor([ids[-1]] + [tokenizer.pad_token_id] * (input_ids.shape[1] - 4))
    return input_ids, mask


def _library(name, packages):
    try:
        for package in packages.split():
            importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise ValueError(f"--onnx needs {error.name}: pip install {packages}") from None
    return importlib.import_module(name)
