"""Check the files of a run or of a weights folder before a library reads them: they may be from a stranger.

Refused: settings that name other files or repositories, custom code, sizes that no model has, and tokenizers whose
regular expressions may take exponential time.
"""

import json
import math
import re
import warnings
from pathlib import Path

from config import MAX_IMAGE_SIZE, format_value

MAX_JSON, MAX_TOKENIZER = 16 * 2**20, 128 * 2**20  # bytes; Gemma's tokenizer.json has 34 MB
MAX_DEPTH = 20  # of nested settings
MAX_NUMBER, MAX_LAYERS, MAX_LABELS = 10**7, 1000, 100_000
LAYERS = re.compile(r"layers?\b|_layer|depth|blocks|stages|experts")
LABELS = re.compile(r"num_labels|num_classes")
ATTENTIONS = ("eager", "sdpa", "flex_attention", "grouped_mm")  # other names are libraries, or kernels on the hub
DTYPES = ("float32", "float16", "bfloat16", "float64")
# Settings that make a library read other weights or run other code, unless they are false.
FORBIDDEN = {
    *("quantization_config", "compression_config", "kernel_config", "use_kernels"),
    *("use_timm_backbone", "timm_backbone", "use_pretrained_backbone", "backbone_kwargs"),
    *("base_model_name_or_path", "pretrained_model_name_or_path"),
}
INTERPOLATIONS = ("area", "nearest", "bilinear", "bicubic", "lanczos")
MAX_PATTERN, MAX_REPLACEMENT = 2000, 64  # characters
# Patterns of pre-tokenizers of the hub in which several repetitions follow each other without overlap.
KNOWN_PATTERNS = {
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",  # GPT-2
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"  # Llama 3
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"  # Qwen 2
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",  # CLIP
}


def read_json(path: Path, max_bytes: int = MAX_JSON) -> dict:
    """Read a JSON object. Raises ValueError, which names the file, FileNotFoundError if it is missing."""
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    if path.stat().st_size > max_bytes:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes, more than the {max_bytes:,} of any known model")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({' '.join(str(error).split())[:100]})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} contains {type(value).__name__}, not a JSON object")
    return value


def check_specification(specification: dict, path: Path, forbidden_arguments: set[str]) -> None:
    """Raise ValueError, which names the file and the key, unless it is a specification that `save_towers` writes."""
    dual_encoder = bool(specification.get("dual_encoder") or specification.get("pair"))
    if not dual_encoder:
        for key, kind in (("architecture", str), ("arguments", dict), ("folded", bool)):
            if not isinstance(specification.get(key), kind):
                raise _invalid(path, key, specification.get(key), f"a {kind.__name__}")
        if forbidden := sorted(forbidden_arguments & specification["arguments"].keys()):
            raise ValueError(f"{path}: the arguments of an image tower must not contain {', '.join(forbidden)}")
        _check_settings(specification["arguments"], path, "arguments")
    for key, lowest in (("mean", -1e6), ("std", 1e-6)):
        value = specification.get(key)
        if not (isinstance(value, list) and len(value) == 3 and all(_is_number(v, lowest, 1e6) for v in value)):
            raise _invalid(path, key, value, f"three numbers from {lowest:g} to 1e6")
    _check_preprocess(specification.get("preprocess", specification.get("view", {})), path)


def _check_preprocess(preprocess, path):
    if not isinstance(preprocess, dict) or preprocess.keys() - {"size", "shortest_edge", "interpolation"}:
        raise _invalid(path, "preprocess", preprocess, "an object with size, shortest_edge and interpolation")
    size, edge = preprocess.get("size", 224), preprocess.get("shortest_edge")
    if not _is_integer(size, 1, MAX_IMAGE_SIZE):
        raise _invalid(path, "preprocess.size", size, f"an integer from 1 to {MAX_IMAGE_SIZE:,}")
    if edge is not None and not _is_integer(edge, size, 2 * MAX_IMAGE_SIZE):
        raise _invalid(path, "preprocess.shortest_edge", edge, f"an integer from {size} to {2 * MAX_IMAGE_SIZE:,}")
    if (method := preprocess.get("interpolation", "area")) not in INTERPOLATIONS:
        raise _invalid(path, "preprocess.interpolation", method, f"one of {', '.join(INTERPOLATIONS)}")


def check_model_config(path: Path) -> None:
    """Check a config.json of transformers. Raises ValueError, which names the file and the key.

    The model must be one of transformers: custom code (auto_map) is never run.
    """
    from transformers import CONFIG_MAPPING

    settings = read_json(path)
    kind = settings.get("model_type")
    if "auto_map" in settings and (not isinstance(kind, str) or kind not in CONFIG_MAPPING):
        raise ValueError(f"{path} needs custom code (auto_map), which is never run: use a model type of transformers")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise ValueError(f"{path}: model_type {format_value(kind)!r} is not a model of transformers")
    _check_settings(settings, path, "")


def check_folder(folder: Path) -> None:
    """Check the settings of a local folder of weights in transformers' layout. Raises ValueError, naming the file."""
    if (folder / "adapter_config.json").exists():
        raise ValueError(
            f"{folder / 'adapter_config.json'} makes the folder an adapter of another model: merge it into that model "
            "(merge_and_unload in peft) and save the result"
        )
    if (folder / "config.json").is_file():
        check_model_config(folder / "config.json")
    check_tokenizer(folder)


def _check_settings(value, path, name, depth=0):
    """Check a value of a configuration and the values in it; name: its keys, joined with dots."""
    if depth > MAX_DEPTH:
        raise ValueError(f"{path}: {name[:60]} is nested more than {MAX_DEPTH} deep")
    key = name.rpartition(".")[2]
    if isinstance(value, dict):
        for inner, item in value.items():
            _check_settings(item, path, f"{name}.{inner}" if name else inner, depth + 1)
    elif isinstance(value, list):
        for item in value:
            _check_settings(item, path, name, depth + 1)
    elif isinstance(value, int) and not isinstance(value, bool):
        limit = MAX_LABELS if LABELS.search(key) else MAX_LAYERS if LAYERS.search(key) else MAX_NUMBER
        if abs(value) > limit and key != "model_max_length":
            raise _invalid(path, name, value, f"at most {limit:,}")
    if key in FORBIDDEN and value not in (None, False, "", {}):
        raise ValueError(f"{path}: {name} would load other weights or code: such models are not supported")
    if key == "backbone" and isinstance(value, str) and value:
        raise ValueError(f"{path}: {name} names another model, {format_value(value)!r}: such models are not supported")
    if key == "model_type" and str(value).startswith("timm"):
        raise ValueError(f"{path}: {name} {format_value(value)!r} would load other weights: it is not supported")
    if key.endswith(("attn_implementation", "experts_implementation")) and not _is_one_of(value, ATTENTIONS):
        raise _invalid(path, name, value, "eager or sdpa; kernels of the hub are not loaded")
    if key in ("dtype", "torch_dtype") and not _is_one_of(value, DTYPES):
        raise _invalid(path, name, value, "float32, float16, bfloat16 or float64")


def _is_one_of(value, names):
    """Return whether a value, or each of an object's values, is one of the names; "torch." may stand before it."""
    if isinstance(value, dict):
        return all(_is_one_of(item, names) for item in value.values())
    return value is None or (isinstance(value, str) and value.removeprefix("torch.") in names)


def check_tokenizer(folder: Path) -> None:
    """Check the tokenizer's files in a folder. Raises ValueError, which names the file.

    A regular expression must be one of KNOWN_PATTERNS, or have at most one unbounded repetition in a row: the engine of
    tokenizers backtracks and may otherwise take hours for one caption.
    """
    check_regular_files(folder)
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else ():
        if path.is_file() and path.stat().st_size > MAX_TOKENIZER:
            raise ValueError(
                f"{path} has {path.stat().st_size:,} bytes, more than the {MAX_TOKENIZER:,} of any tokenizer"
            )
    path = folder / "tokenizer.json"
    if not path.is_file():
        return
    tokenizer = read_json(path, MAX_TOKENIZER)
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        _check_tokenizer_part(tokenizer.get(part), path, part)
    words = tokenizer.get("model")
    length = words.get("max_input_chars_per_word", 100) if isinstance(words, dict) else 100
    if not _is_integer(length, 1, 10_000):
        raise _invalid(path, "max_input_chars_per_word", length, "an integer from 1 to 10,000")


def check_regular_files(folder: Path) -> None:
    """Raise ValueError if the folder contains a named pipe or a device: reading it would wait forever."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise ValueError(f"{path} is not a regular file: delete it")


def _check_tokenizer_part(part, path, name, depth=0):
    if depth > MAX_DEPTH:
        raise ValueError(f"{path}: its {name} is nested more than {MAX_DEPTH} deep")
    if isinstance(part, dict):
        pattern = part.get("Regex")
        if isinstance(pattern, str) and not is_fast_pattern(pattern):
            raise ValueError(
                f"{path}: the regular expression {pattern[:60]!r} of its {name} may take hours for one caption"
            )
        for key in ("content", "prepend", "replacement"):
            if isinstance(part.get(key), str) and len(part[key]) > MAX_REPLACEMENT:
                raise ValueError(f"{path}: {key} of its {name} has more than {MAX_REPLACEMENT} characters")
    for inner in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
        if isinstance(inner, dict | list):
            _check_tokenizer_part(inner, path, name, depth + 1)


def is_fast_pattern(pattern: str) -> bool:
    """Return whether a regular expression needs at most quadratic time: no repetition in or next to another one."""
    if pattern in KNOWN_PATTERNS:
        return True
    if len(pattern) > MAX_PATTERN:
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # \p{L} is not in Python's syntax; for the structure any class will do.
            tree = re._parser.parse(re.sub(r"\\[pP]\{\^?\w+\}", r"\\w", pattern))
        return _unbounded(tree) <= 1
    except (re.error, RecursionError, OverflowError, ValueError):
        return False


def _unbounded(node):
    """Return the largest number of unbounded repetitions in a row; infinity if they are nested, or with references."""
    total = 0
    for operator, argument in node:
        name = str(operator)
        if name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
            _, most, body = argument
            inner = _unbounded(body)
            repeated = most > 1000  # {1,3} is not a repetition here, unless its body contains one
            total += (math.inf if inner else 1) if repeated else inner * max(most, 1)
        elif name == "BRANCH":
            total += max(_unbounded(branch) for branch in argument[1])
        elif name == "SUBPATTERN":
            total += _unbounded(argument[-1])
        elif name == "ATOMIC_GROUP":
            total += _unbounded(argument)
        elif name in ("ASSERT", "ASSERT_NOT"):
            total += _unbounded(argument[1])
        elif name.startswith("GROUPREF"):
            return math.inf
    return total


def _is_integer(value, lowest, highest):
    return isinstance(value, int) and not isinstance(value, bool) and lowest <= value <= highest


def _is_number(value, lowest, highest):
    return isinstance(value, int | float) and not isinstance(value, bool) and lowest <= value <= highest


def _invalid(path, name, value, expected):
    return ValueError(f"{path}: {name} must be {expected}, got {format_value(value)!r}")
