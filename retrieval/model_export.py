"""Export a run's model to ONNX or to a transformers folder, and compare the exported model with PyTorch."""

import importlib
import json
import logging
import warnings
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import AutoModel

from data.preprocess import Preprocess
from models.checkpoint import Run
from retrieval.encoder import load_pretrained_encoder
from runtime.atomic_io import new_folder, write_text

TOLERANCE = 1e-4  # largest difference of an exported embedding from PyTorch's, per element


def write_onnx(run: Run, out: Path) -> float:
    """Write image.onnx, text.onnx, tokenizer/ and settings.json, and return the largest difference from PyTorch.

    image.onnx maps images (B, 3, H, W) uint8 to image_emb (B, D). text.onnx maps input_ids and attention_mask (M, L)
    int64 to text_emb (M, D). All rows are unit vectors. Raises ValueError if a difference exceeds TOLERANCE.
    """
    onnxruntime = _import_library("onnxruntime", "onnx onnxscript onnxruntime")
    model, preprocess = run.model.float().eval(), _preprocess(run)
    dynamic = torch.export.Dim.DYNAMIC
    towers = {
        "image": (
            model.encode_image,
            ["images"],
            [{0: dynamic}],
            [_random_images(rows, preprocess) for rows in (2, 1, 5)],
        ),
        "text": (
            model.encode_text,
            ["input_ids", "attention_mask"],
            [{0: dynamic, 1: dynamic}] * 2,
            [_example_captions(run, *shape) for shape in ((2, 9), (1, 3), (5, _max_tokens(run)))],
        ),
    }
    with new_folder(out) as folder:
        differences = []
        for name, (encode, input_names, dynamic_shapes, examples) in towers.items():
            path = folder / f"{name}.onnx"
            tower_to_onnx(encode, examples[0], input_names, f"{name}_emb", dynamic_shapes, path)
            differences += _compare_onnx(onnxruntime, encode, input_names, examples, path)
        run.tokenizer.save_pretrained(folder / "tokenizer")
        settings = {
            "preprocess": asdict(preprocess),
            "max_tokens": _max_tokens(run),
            "temperature": model.temperature.item(),
        }
        write_text(folder / "settings.json", json.dumps(settings, indent=2) + "\n")
    return max(differences)


def write_transformers(run: Run, out: Path) -> float:
    """Write a folder for transformers' from_pretrained and push_to_hub; return the largest difference from PyTorch.

    This works for pretrained dual encoders (models/pretrained.py), VisionTextDualEncoderModel included, without heads
    of their own: no class of transformers has these heads. Raises ValueError for other runs.
    """
    if run.config.model is None or run.config.heads != ("none", "none"):
        raise ValueError(
            f"transformers has no model with the heads of {run.folder}: train from a pretrained dual encoder "
            "(--model NAME) without other heads, or use --onnx, which exports any run"
        )
    model = run.model.float().eval()
    preprocess = _preprocess(run)
    with new_folder(out) as folder:
        _to_transformers(model).save_pretrained(folder)
        run.tokenizer.save_pretrained(folder)
        _image_processor(model.image_encoder, preprocess).save_pretrained(folder)
        encoder, _ = load_pretrained_encoder(
            str(folder), max_tokens=run.config.max_tokens, device="cpu", precision="float32"
        )
        if encoder.preprocess != preprocess:
            raise ValueError(f"transformers has no image processor for the preprocessing of {run.folder}: {preprocess}")
        images = [_random_images(rows, preprocess) for rows in (1, 3)]
        captions = [_example_captions(run, *shape) for shape in ((1, 3), (4, 9))]
        differences = [_max_difference(model.encode_image, inputs, encoder.encode_image) for inputs in images]
        differences += [_max_difference(model.encode_text, inputs, encoder.encode_text) for inputs in captions]
    return max(differences)


def tower_to_onnx(encode, example, input_names, output_name, dynamic_shapes, path, *, external_weights=False) -> None:
    """Write a tower's function `encode` as an ONNX graph, with external_weights in a file of their own beside it.

    Raises ValueError for towers that PyTorch cannot export.
    """

    class Tower(nn.Module):  # torch.onnx.export takes a module, not a bound method
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
                example,
                input_names=input_names,
                output_names=[output_name],
                dynamic_shapes=(tuple(dynamic_shapes),),
                dynamo=True,
                verbose=False,
            )
        program.save(str(path), external_data=external_weights or None)
    except Exception as error:  # the exporter's passes raise errors of many types
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"PyTorch cannot export this tower as {path.name}: {reason}") from None


def _compare_onnx(onnxruntime, encode, input_names, examples, path):
    """Return the largest difference per example. Raises ValueError, naming the file, if ONNX Runtime fails."""
    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        encode_onnx = partial(_run_onnx, session, input_names)
        return [_max_difference(encode, inputs, encode_onnx) for inputs in examples]
    except (ValueError, OSError):
        raise
    except Exception as error:  # ONNX Runtime has types of its own
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"ONNX Runtime cannot run {path.name}: {reason}") from None


def _run_onnx(session, input_names, *inputs):
    return session.run(None, {name: rows.numpy() for name, rows in zip(input_names, inputs, strict=True)})[0]


def _max_difference(encode: Callable, inputs: tuple, encode_exported: Callable) -> float:
    """Return the largest difference between the embeddings of both encoders. Raises ValueError above TOLERANCE."""
    with torch.no_grad():
        expected, exported = encode(*inputs), encode_exported(*inputs)
    difference = (expected - torch.as_tensor(exported)).abs().max().item()
    if not difference <= TOLERANCE:
        raise ValueError(
            f"the exported embeddings differ from PyTorch's by {difference:.1e}, more than {TOLERANCE:.0e}"
        )
    return difference


def _to_transformers(model):
    """Build the dual encoder of transformers with the trained weights of both towers and the learned scale."""
    towers = model.image_encoder.backbone.model, model.text_encoder.backbone.model
    dual_encoder = AutoModel.from_config(towers[0].config)
    state = dual_encoder.state_dict()
    trained = {name: tensor for tower in towers for name, tensor in tower.state_dict().items()}
    scales = {"logit_scale": model.logit_scale, "temperature": model.temperature, "logit_bias": model.logit_bias}
    trained |= {
        name: scale.detach().reshape(state[name].shape)
        for name, scale in scales.items()
        if name in state and scale is not None
    }
    dual_encoder.load_state_dict(state | trained)
    return dual_encoder.eval()


def _image_processor(image_encoder, preprocess):
    """Return the image processor of transformers that is equivalent to `preprocess`."""
    resample = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "area": 4}[preprocess.interpolation]
    mean, std = (getattr(image_encoder, name).flatten().tolist() for name in ("mean", "std"))
    options = {"image_mean": mean, "image_std": std, "resample": resample}
    square = {"height": preprocess.size, "width": preprocess.size}
    if patch := image_encoder.backbone.patch_size:
        return transformers.Siglip2ImageProcessor(
            patch_size=patch, max_num_patches=(preprocess.size // patch) ** 2, **options
        )
    if preprocess.shortest_edge is None:
        return transformers.ViTImageProcessor(size=square, **options)
    return transformers.CLIPImageProcessor(
        size={"shortest_edge": preprocess.shortest_edge}, crop_size=square, **options
    )


def _preprocess(run) -> Preprocess:
    return run.model.image_encoder.preprocess.resized(run.config.image_size).scaled(run.config.eval_image_scale)


def _max_tokens(run):
    return min(run.config.max_tokens, run.model.text_encoder.max_tokens or run.config.max_tokens)


def _random_images(rows, preprocess):
    generator = torch.Generator().manual_seed(rows)
    return (torch.randint(0, 256, (rows, 3, preprocess.size, preprocess.size), dtype=torch.uint8, generator=generator),)


def _example_captions(run, rows, length):
    """Return token ids and mask (rows, length) of words of the vocabulary; the last caption is padded."""
    tokenizer, length = run.tokenizer, min(length, _max_tokens(run))
    vocabulary = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    sentence = " ".join(token for token in vocabulary if token and token.isalnum())  # None: a gap in the ids
    ids = tokenizer(sentence, truncation=True, max_length=length)["input_ids"]
    limit = run.model.text_encoder.vocabulary
    if not ids or (limit is not None and max(ids) >= limit):
        raise ValueError(f"the tokenizer of {run.folder} does not fit its text tower, which has {limit} tokens")
    input_ids = torch.tensor([ids] * rows)
    mask = torch.ones_like(input_ids)
    if rows > 1 and input_ids.shape[1] > 4:
        mask[-1, 4:] = 0
        input_ids[-1, 3:] = torch.tensor([ids[-1]] + [tokenizer.pad_token_id] * (input_ids.shape[1] - 4))
    return input_ids, mask


def _import_library(name, packages):
    """Import an optional library. Raises ValueError with the install command if one of the packages is missing."""
    try:
        for package in packages.split():
            importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise ValueError(f"--onnx needs {error.name}: pip install {packages}") from None
    return importlib.import_module(name)
