"""Tiny dual encoders of transformers with random weights, each with its tokenizer and image processor."""

import transformers
from helpers import tiny_tokenizer

VISION = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = VISION | {"hidden_size": 16}
SQUARE = {"size": {"height": 32, "width": 32}, "do_center_crop": False}


def clip_tokenizer():
    """Return a byte-pair tokenizer of CLIP whose vocabulary is single characters."""
    characters = [chr(code) for code in range(33, 127)]
    tokens = [*characters, *(f"{character}</w>" for character in characters), "<|startoftext|>", "<|endoftext|>"]
    return transformers.CLIPTokenizer(vocab={token: token_id for token_id, token in enumerate(tokens)}, merges=[])


def clip():
    tokenizer = clip_tokenizer()
    special_tokens = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = transformers.CLIPConfig(
        text_config=TEXT | special_tokens | {"vocab_size": len(tokenizer), "max_position_embeddings": 60},
        vision_config=VISION | {"image_size": 32, "patch_size": 8},
        projection_dim=12,
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
    return transformers.ChineseCLIPModel(config), tokenizer, transformers.ChineseCLIPImageProcessor(**SQUARE)


def siglip():
    tokenizer = tiny_tokenizer()
    config = transformers.SiglipConfig(
        text_config=TEXT | {"vocab_size": len(tokenizer), "max_position_embeddings": 20, "projection_size": 24},
        vision_config=VISION | {"image_size": 32, "patch_size": 8},
    )
    return transformers.SiglipModel(config), tokenizer, transformers.SiglipImageProcessor(**SQUARE)


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
    """Return a multilingual dual encoder: its text side is XLM-RoBERTa."""
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
    """Return a dual encoder that transformers assembled from two single towers."""
    tokenizer = tiny_tokenizer()
    config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
        transformers.ViTConfig(**VISION, image_size=32, patch_size=8),
        transformers.BertConfig(**TEXT, vocab_size=len(tokenizer), max_position_embeddings=40),
        projection_dim=12,
    )
    return (
        transformers.VisionTextDualEncoderModel(config),
        tokenizer,
        transformers.ViTImageProcessor(size=SQUARE["size"]),
    )


KINDS = {make.__name__: make for make in (clip, chinese_clip, siglip, siglip2, alt_clip, bert_and_vit)}
