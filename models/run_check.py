"""Check that a loaded run works: it encodes one gray photo and one caption, before any photo of the user is read."""

from typing import TYPE_CHECKING

import torch

from config import MAX_IMAGE_SIZE

if TYPE_CHECKING:
    from models.checkpoint import Run

CAPTION = "a photo"


def is_library_error(error: BaseException) -> bool:
    """Return whether a library raised the error for a file's content; a panic in Rust's tokenizers is no Exception."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def check_run(run: "Run") -> None:
    """Encode a gray photo of the run's size, if it has an image tower, and a caption.

    Raises ValueError, which names the run's folder, if that fails or if an embedding is not finite: the tower takes no
    images of this size, the tokenizer belongs to another tower, the weights overflow.
    """
    checks = {} if run.model.image_encoder is None else _image_check(run)
    checks["a caption"] = lambda: run.model.encode_text(*_caption(run))
    for what, encode in checks.items():
        try:
            with torch.inference_mode():
                embedding = encode()
        except BaseException as error:  # torch, transformers and tokenizers raise many types
            if not is_library_error(error):
                raise
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise ValueError(f"{run.folder} cannot be used: its model does not encode {what}: {reason}") from None
        if not embedding.isfinite().all():
            raise ValueError(
                f"{run.folder} cannot be used: its embedding of {what} is not finite, its weights overflow"
            )


def _image_check(run):
    """Return {what: function that encodes a gray photo of the run's size}."""
    size = run.model.image_encoder.preprocess.scaled(run.config.eval_image_scale).size
    if size > MAX_IMAGE_SIZE:
        raise ValueError(
            f"{run.folder} encodes photos of {size:,} pixels, more than {MAX_IMAGE_SIZE:,}: see its config.json"
        )
    pixels = torch.full((1, 3, size, size), 128, dtype=torch.uint8)
    return {f"a photo of {size} pixels": lambda: run.model.encode_image(pixels)}


def _caption(run):
    """Return input_ids and attention_mask (1, L) of CAPTION."""
    if not isinstance(run.tokenizer.pad_token_id, int):
        raise ValueError("its tokenizer has no padding token")
    max_tokens = min(run.config.max_tokens, run.model.text_encoder.max_tokens or run.config.max_tokens)
    input_ids = torch.tensor([run.tokenizer(CAPTION, truncation=True, max_length=max_tokens)["input_ids"]])
    if not input_ids.numel():
        raise ValueError("its tokenizer returns no tokens")
    return input_ids, torch.ones_like(input_ids)
