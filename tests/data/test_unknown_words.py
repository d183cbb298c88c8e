"""Unknown words: counted as a loop counts them, named with a tower that fits, refused where most words are unknown."""

import re

import pytest
import torch
from helpers import UNUSED_CACHE, tiny_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertTokenizer, PreTrainedTokenizerFast

from data.tokenizer import tokenize, train_tokenizer
from data.unknown_words import (
    advice,
    count_unknown,
    describe_language,
    describe_unknown_query,
    describe_unknown_words,
    find_unknown_words,
    require_known_words,
    script_of,
    unknown_ids,
)

DOGS = {
    "Chinese": "一只黑白相间的狗在雪地里奔跑",
    "Japanese": "犬が雪の中を走っている",
    "Korean": "눈 속을 달리는 개",
    "Cyrillic": "собака бежит по снегу",
    "Arabic": "كلب يجري في الثلج",
    "Devanagari": "बर्फ में दौड़ता कुत्ता",
    "Greek": "ένας σκύλος στο χιόνι",
}
MULTILINGUAL = "sentence-transformers/paraphrase-multilingual-mpnet-base-v2"


def word_level(**special):
    """Return a tokenizer that knows the words red, blue and on, with these special tokens."""
    words = {"[UNK]": 0, "<s>": 1, "red": 2, "blue": 3, "on": 4}
    backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def byte_level():
    """Return a byte-level BPE tokenizer, as of RoBERTa and CLIP: each byte is known."""
    alphabet = {character: index for index, character in enumerate(pre_tokenizers.ByteLevel.alphabet())}
    backend = Tokenizer(models.BPE(alphabet | {"<unk>": len(alphabet)}, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="<unk>")


def slow(tmp_path):
    """Return a tokenizer without offsets, as those that depend on a library of their language."""
    tokenizer = tiny_tokenizer()
    words = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    (tmp_path / "vocab.txt").write_text("\n".join(word for word, _ in words) + "\n", "utf-8")
    fast = BertTokenizer(str(tmp_path / "vocab.txt"))

    class Slow:
        is_fast = False
        unk_token, special_tokens_map = fast.unk_token, fast.special_tokens_map
        convert_tokens_to_ids, convert_ids_to_tokens = fast.convert_tokens_to_ids, fast.convert_ids_to_tokens

        def __call__(self, text, **options):
            assert not options.pop("return_offsets_mapping", False)
            return fast(text, **options)

    return Slow()


def test_counts_equal_those_of_a_loop():
    captions = ["red 狗 on the left", "blue", "一只狗", "", "red 狗 on the left", "café кот red"] * 3
    tokenizer = tiny_tokenizer()
    counts, total = count_unknown(tokenizer, tokenize(tokenizer, captions, max_tokens=9))
    encoded = [tokenizer(caption, truncation=True, max_length=9)["input_ids"] for caption in captions]
    unknown, special = tokenizer.unk_token_id, {tokenizer.cls_token_id, tokenizer.sep_token_id}
    assert counts.tolist() == [ids.count(unknown) for ids in encoded]
    assert total == sum(token not in special for ids in encoded for token in ids)


def test_captions_without_any_token_count_as_nothing():
    tokenizer = tiny_tokenizer()
    counts, total = count_unknown(tokenizer, tokenize(tokenizer, ["", ""], max_tokens=9))
    assert counts.tolist() == [0, 0] and total == 0
    require_known_words(tokenizer, ["", ""], max_tokens=9, dual_encoder=False)


@pytest.mark.parametrize("text", DOGS.values())
def test_byte_level_tokenizer_has_no_unknown_words(text):
    tokenizer = byte_level()
    assert unknown_ids(tokenizer) == set()
    assert find_unknown_words(tokenizer, text) == []
    assert describe_unknown_query(tokenizer, text) is None
    tokenizer.pad_token = "Ġ"
    assert unknown_ids(tokenizer) and count_unknown(tokenizer, tokenize(tokenizer, [text], max_tokens=99))[0] == 0


def test_token_with_another_purpose_is_not_unknown():
    assert unknown_ids(word_level(unk_token="[UNK]")) == {0}
    assert unknown_ids(word_level(unk_token="[UNK]", eos_token="[UNK]")) == set()  # CLIP's <|endoftext|>
    assert unknown_ids(word_level(bos_token="<s>", unk_token="<s>")) == {0}  # the vocabulary's own token counts
    assert unknown_ids(word_level()) == {0}


def test_tokenizer_without_offsets_finds_the_words_too(tmp_path):
    assert find_unknown_words(slow(tmp_path), "red кот on собака") == ["кот", "собака"]
    assert "кот" in describe_unknown_query(slow(tmp_path), "red кот")


@pytest.mark.parametrize(("script", "text"), DOGS.items())
def test_script_decides_the_tower(script, text):
    assert script_of(text, text) == script
    tower = {"Chinese": "bert-base-chinese", "Korean": "klue/bert-base"}.get(script, MULTILINGUAL)
    assert advice(script) == f"--text-encoder scratch or {tower}"
    captions = [text, "red on the left"] * 4
    tokenizer = tiny_tokenizer()
    line = describe_unknown_words(tokenizer, captions, tokenize(tokenizer, captions, max_tokens=64))
    assert line.startswith("warning: ") and line.endswith(f"--text-encoder scratch or {tower}")
    with pytest.raises(ValueError, match=f"scratch or {tower}, or train all the same with --allow-unknown-words"):
        require_known_words(tokenizer, [text] * 3, max_tokens=64, dual_encoder=False)
    assert script in describe_language(captions, text_encoder="bert-base-uncased")


def test_dual_encoder_is_replaced_by_another_one():
    with pytest.raises(ValueError, match="--model OFA-Sys/chinese-clip-vit-base-patch16, or two towers"):
        require_known_words(tiny_tokenizer(), [DOGS["Chinese"]], max_tokens=9, dual_encoder=True)


def test_warning_begins_above_ten_percent_and_refusal_above_fifty():
    tokenizer = word_level(unk_token="[UNK]")

    def line(unknown, known):
        captions = ["狗 " * unknown + "red " * known]
        return describe_unknown_words(tokenizer, captions, tokenize(tokenizer, captions, max_tokens=200))

    assert line(0, 10) is None
    assert line(1, 9).startswith("10.0% of the caption tokens") and "狗" in line(1, 9)
    assert line(11, 89).startswith("warning: 11.0%")
    require_known_words(tokenizer, ["red 狗"], max_tokens=9, dual_encoder=False)
    with pytest.raises(ValueError, match="does not know 67% of the words"):
        require_known_words(tokenizer, ["red 狗 猫"], max_tokens=9, dual_encoder=False)


def test_large_data_set_is_judged_by_evenly_spaced_captions(monkeypatch):
    monkeypatch.setattr("data.unknown_words.SAMPLE", 10)
    captions = ["red"] * 40 + ["狗"] * 60
    with pytest.raises(ValueError, match="60%"):
        require_known_words(word_level(unk_token="[UNK]"), captions, max_tokens=9, dual_encoder=False)


@pytest.mark.parametrize("text", DOGS.values())
def test_tokenizer_trained_on_the_captions_knows_them(text):
    tokenizer = train_tokenizer([text, "red on the left"] * 3)
    captions = [text, "red on the left"]
    assert describe_unknown_words(tokenizer, captions, tokenize(tokenizer, captions, max_tokens=99)) is None
    assert describe_unknown_query(tokenizer, text) is None


@pytest.mark.parametrize("text", ["一只狗", "собака", "狗。", "狗 , !", "???", " \u200b"])
def test_query_without_a_known_word_is_refused(text):
    tokenizer = train_tokenizer(["red on the left , 。 !"] * 3)
    with pytest.raises(ValueError, match="the model knows no word of the sentence"):
        describe_unknown_query(tokenizer, text)


def test_query_with_some_unknown_words_names_them():
    line = describe_unknown_query(tiny_tokenizer(), "red 狗\x1b[2J on the left 狗 " + " ".join("абвгде"))
    assert line.startswith("the model does not know these words of the sentence: 狗")
    assert "\x1b" not in line and "and 1 more" not in line and line.count("狗") == 1
    assert "--text-encoder scratch or" in line
    known = "red on the left and blue on the right " * 3
    assert describe_unknown_query(tiny_tokenizer(), known) is None
    assert describe_unknown_query(tiny_tokenizer(), known + "狗").endswith("these words of the sentence: 狗")


def test_language_of_a_report_without_a_tokenizer():
    assert describe_language(["a dog in snow", "café"], text_encoder="x") is None
    assert describe_language(["123", "!!"], text_encoder="x") is None
    assert describe_language(["a long caption in English with one character 狗"], text_encoder="x") is None
    line = describe_language([DOGS["Chinese"], "a dog"], text_encoder="distilbert-base-uncased")
    assert "78% of the letters are not Latin, most are Chinese" in line and "bert-base-chinese" in line


@pytest.fixture
def chinese_photos(tmp_path):
    """A data set of 12 photos with Chinese captions."""
    from helpers import write_image_folder

    folder = write_image_folder(tmp_path / "photos", 12)
    rows = [f"photo_{n:02d}.png,{DOGS['Chinese']}{n}" for n in range(12)]
    (folder / "captions.txt").write_text("\n".join(["image,caption", *rows]) + "\n", "utf-8")
    return folder


def test_training_on_unknown_words_is_refused_before_the_run_exists(chinese_photos, tiny_config, capsys):
    from helpers import open_data_of

    from training.trainer import train

    config = tiny_config(dataset=str(chinese_photos))
    with pytest.raises(ValueError, match=r"does not know \d+% of the words .* or bert-base-chinese"):
        train(config, open_data_of(config), None)
    assert not list((chinese_photos.parent / "runs").glob("*"))
    config = tiny_config(dataset=str(chinese_photos), allow_unknown_words=True)
    folder = train(config, open_data_of(config), None)
    assert re.search(r"^warning: \d+\.\d% of the caption tokens", capsys.readouterr().out, re.MULTILINE)
    train(tiny_config(dataset=str(chinese_photos), epochs=2), open_data_of(config), folder)  # a run that exists goes on


@pytest.mark.parametrize("changes", [{}, {"freeze_image": True, "freeze_text": True}, {"cached_views": 1}])
def test_training_prints_the_share_of_unknown_words(changes, photos, tiny_config, capsys, tmp_path):
    from helpers import open_data_of, write_image_folder

    from training.trainer import train

    folder = write_image_folder(tmp_path / "some", 12)
    text = (folder / "captions.txt").read_text("utf-8").replace("picture", "картина")
    (folder / "captions.txt").write_text(text, "utf-8")
    if changes.get("cached_views"):
        changes["unfreeze_image_stages"] = 1
    config = tiny_config(dataset=str(folder), **changes)
    train(config, open_data_of(config), None)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "caption tokens" in line]
    assert line.startswith("8.") and "картина" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "x", "--no-pretrained", "--text-encoder", "klue/bert-base"], "instead of --text-encoder klue"),
        (["--text_encoder=gpt2", "--no-pretrained", "--dataset", "x"], "leave out one"),
        (["--dataset", "sample", "--text-encoder", "bert-base-chinese"], "add --pretrained"),
        (["--text-pooling", "own"], "--text-pooling own"),
        (["--dataset", "x", "--text-pooling=own", "--no-pretrained"], "--text-pooling own"),
    ],
)
def test_flags_that_would_be_ignored_are_refused(arguments, message):
    from helpers import one_line_error, run_in_process

    assert message in one_line_error(run_in_process("train.py", *arguments))


@pytest.mark.parametrize(
    "arguments",
    [
        ["--dataset", "x", "--no-pretrained", "--text-encoder", "scratch"],
        ["--dataset", "x", "--no-pretrained", "--image-encoder", "resnet10t"],
        ["--dataset", "x", "--text-encoder", "klue/bert-base"],
        ["--dataset", "sample", "--pretrained", "--text-encoder", "gpt2"],
    ],
)
def test_other_combinations_are_accepted(arguments, monkeypatch):
    import train

    monkeypatch.setattr("sys.argv", ["train.py", *arguments])
    assert train.parse_flags()[0].dataset in ("x", "sample")


def test_label_without_a_known_word_is_refused():
    from types import SimpleNamespace

    from retrieval.zero_shot import class_embeddings

    encoder = SimpleNamespace(
        tokenizer=tiny_tokenizer(), encode_captions=lambda captions, desc: torch.randn(len(captions), 4)
    )
    assert class_embeddings(encoder, ["red", "blue"], ("{}",)).shape == (2, 4)
    with pytest.raises(ValueError, match="no word of the label '狗'"):
        class_embeddings(encoder, ["red", "狗"], ("{}",))


def test_report_counts_the_unknown_words_of_a_named_tower(chinese_photos, text_tower):
    from data.loading import open_dataset
    from reporting.dataset_report import tokenize_captions, unknown_words

    data = open_dataset(str(chinese_photos), data_dir=None, cache_dir=UNUSED_CACHE, split_seed=0)
    named, trained = (tokenize_captions(data, tower) for tower in (str(text_tower), None))
    assert unknown_words(data, str(text_tower), *named).startswith("warning: 100.0% of the caption")
    assert unknown_words(data, None, *trained).startswith("100% of the letters are not Latin, most are Chinese")


def test_import_loads_no_heavy_library():
    import subprocess
    import sys

    from helpers import ROOT

    code = "import sys, data.unknown_words; print(*({'torch', 'transformers', 'pandas'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
