"""Tiny models of the dual encoders that transformers knows, each with its tokenizer and image processor."""

import transformers
from helpers import tiny_tokenizer

VISION = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = VISION | {"hidden_size": 16}
SQUEEZED = {"size": {"height": 32, "width": 32}, "do_center_crop": False}


def clip_tokenizer():
    """A byte-pair tokenizer in CLIP's own form, its vocabulary single letters."""
    letters = [chr(code) for code in range(33, 127)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return transformers.CLIPTokenizer(vocab={word: number for number, word in enumerate(words)}, merges=[])


def clip():
    tokenizer = clip_tokenizer()
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = TEXT | ends | {"vocab_size": len(tokenizer), "max_position_embeddings": 60}
    config = transformers.CLIPConfig(
        text_config=text, vision_config=VISION | {"image_size": 32, "patch_size": 8}, projection_dim=12
    )
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return transformers.CLIPModel(config), tokenizer, processor


def chinese_clip():
    tokenizer = tiny_tokenizer()
    config = transformers.ChineseCLIPConfig(
        text_config=TEXT | {"vocab_size": len(tokenizer), "max_position_embeddings": 40},
        vision_config=VISION | {"image_size": 32, "patch_size": 8},
        projection_dim=12,
    )
    return transformers.ChineseCLIPModel(config), tokenizer, transformers.ChineseCLIPImageProcessor(**SQUEEZED)


def siglip():
    tokenizer = tiny_tokenizer()
    config = transformers.SiglipConfig(
        text_config=TEXT | {"vocab_size": len(tokenizer), "max_position_embeddings": 20, "projection_size": 24},
        vision_config=VISION | {"image_size": 32, "patch_size": 8},
    )
    return transformers.SiglipModel(config), tokenizer, transformers.SiglipImageProcessor(**SQUEEZED)


def siglip2():
    tokenizer = tiny_tokenizer()
    config = transformers.Siglip2Config(
        text_config=TEXT | {"vocab_size": len(tokenizer), "max_position_embeddings": 20, "projection_size": 24},
        vision_config=VISION | {"num_patches": 16, "patch_size": 8},
    )
    return (
        transformers.Siglip2Model(config),
        tokenizer,
        transformers.Siglip2ImageProcessor(patch_size=8, max_num_patches=16),
    )


def alt_clip():
    """A pair whose text side is XLM-RoBERTa: the multilingual kind."""
    tokenizer = tiny_tokenizer()
    config = transformers.AltCLIPConfig(
        text_config=TEXT
        | {"vocab_size": len(tokenizer), "max_position_embeddings": 40, "project_dim": 12, "pad_token_id": 0},
        vision_config=VISION | {"image_size": 32, "patch_size": 8},
        projection_dim=12,
    )
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32})
    return transformers.AltCLIPModel(config), tokenizer, processor


def bert_and_vit():
    """Any two towers that transformers has joined."""
    tokenizer = tiny_tokenizer()
    config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
        transformers.ViTConfig(**VISION, image_size=32, patch_size=8),
        transformers.BertConfig(**TEXT, vocab_size=len(tokenizer), max_position_embeddings=40),
        projection_dim=12,
    )
    return (
        transformers.VisionTextDualEncoderModel(config),
        tokenizer,
        transformers.ViTImageProcessor(size=SQUEEZED["size"]),
    )


KINDS = {make.__name__: make for make in (clip, chinese_clip, siglip, siglip2, alt_clip, bert_and_vit)}
