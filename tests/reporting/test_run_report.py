"""The report of a run: its figures against loops, the order of wrong pairs, and a page that needs no network."""

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import one_line_error, run_in_process, write_image_folder
from PIL import Image

from reporting import report_analysis as analysis
from reporting import run_report
from reporting.pair_quality import mismatch_scores
from reporting.report_findings import findings
from reporting.run_report import Pool, build_report
from retrieval.encoder import Encoder
from retrieval.metrics import retrieval_metrics, retrieval_ranks

TOPICS, PER_TOPIC, CAPTIONS = 12, 6, 4


@pytest.fixture
def pool(tmp_path):
    """72 photos of 12 topics with four captions each, in three splits; captions name their topic with two words."""
    generator = torch.Generator().manual_seed(0)
    topics = F.normalize(torch.randn(TOPICS, 32, generator=generator), dim=1)
    own = torch.arange(TOPICS * PER_TOPIC)
    topic = own % TOPICS
    photos = F.normalize(topics[topic] + 0.12 * torch.randn(len(own), 32, generator=generator), dim=1)
    ids = own.repeat_interleave(CAPTIONS)
    texts = F.normalize(photos[ids] + 0.12 * torch.randn(len(ids), 32, generator=generator), dim=1)
    tokens = [np.array([int(topic[i]), 50 + int(topic[i]), 100 + m % 9]) for m, i in enumerate(ids.tolist())]
    paths = [tmp_path / f"photo<{i}>.png" for i in range(len(own))]
    for i, path in enumerate(paths):
        Image.new("RGB", (40, 30), (3 * i, 90, 200 - 2 * i)).save(path)
    splits = ["train"] * 24 + ["val"] * 24 + ["test"] * 24
    captions = [f"topic {int(topic[i])} & <b>caption</b> {m}" for m, i in enumerate(ids.tolist())]
    return Pool(photos, texts, ids, paths, captions, splits, tokens)


def swap(pool, seed):
    """Exchange 5 % of the captions between photos of different topics; return the rows."""
    rng = np.random.default_rng(seed)
    rows = rng.permutation(len(pool.captions))[:14]
    others = np.roll(rows, 1)
    same = (pool.caption_image_ids[rows] % TOPICS == pool.caption_image_ids[others] % TOPICS).numpy()
    texts, tokens = pool.text_emb[others].clone(), [pool.token_ids[m] for m in others]
    for row, text, ids in zip(rows[~same], texts[torch.from_numpy(~same)], np.array(tokens)[~same], strict=True):
        pool.text_emb[row], pool.token_ids[row] = text, ids
    return rows[~same]


@pytest.mark.parametrize("seed", range(3))
def test_swapped_captions_are_among_the_first_eight_percent(pool, seed):
    swapped = swap(pool, seed)

    scores = mismatch_scores(pool.image_emb, pool.text_emb, pool.caption_image_ids, pool.token_ids)

    first = scores.argsort(descending=True)[: round(0.08 * len(scores))].tolist()
    assert np.isin(swapped, first).mean() >= 0.9


def test_a_memorised_wrong_caption_is_found_by_the_other_captions_of_its_photo(pool):
    # The model has learned the pair: caption 5, of a photo of topic 7, has a cosine of .7 and more with photo 1.
    pool.text_emb[5] = F.normalize(pool.image_emb[7] + 1.2 * pool.image_emb[1], dim=0)
    pool.token_ids[5] = np.array([7, 57, 101])

    scores = mismatch_scores(pool.image_emb, pool.text_emb, pool.caption_image_ids, pool.token_ids)

    assert (pool.text_emb[5] @ pool.image_emb[1]) > 0.7
    assert 5 in scores.argsort(descending=True)[:6].tolist()


def test_photos_with_one_caption_are_scored_by_their_neighbours(pool):
    rows = torch.arange(0, len(pool.captions), CAPTIONS)
    texts, tokens = pool.text_emb[rows].clone(), [pool.token_ids[m] for m in rows.tolist()]
    texts[[3, 4]] = texts[[4, 3]]

    scores = mismatch_scores(pool.image_emb, texts, torch.arange(len(rows)), tokens)

    assert set(scores.argsort(descending=True)[:2].tolist()) == {3, 4}


def test_ranks_are_those_of_the_metrics(pool):
    order = torch.randperm(len(pool.captions), generator=torch.Generator().manual_seed(1))

    i2t, t2i = retrieval_ranks(pool.image_emb, pool.text_emb[order], pool.caption_image_ids[order])

    metrics = retrieval_metrics(pool.image_emb, pool.text_emb, pool.caption_image_ids)
    assert 100 * (i2t <= 1).double().mean() == pytest.approx(metrics["i2t_R@1"])
    assert 100 * (t2i <= 5).double().mean() == pytest.approx(metrics["t2i_R@5"])
    sim = pool.text_emb[order] @ pool.image_emb.T
    for m in range(0, len(order), 37):
        own = sim[m, pool.caption_image_ids[order[m]]]
        assert t2i[m] == (sim[m] >= own - 1e-6).sum()


def test_bootstrap_interval_resamples_photos_and_covers_the_recall():
    ranks, image_ids = torch.tensor([1, 9] * 50), torch.arange(50).repeat_interleave(2)

    recall = analysis.bootstrap_recall(ranks, image_ids, 1)

    assert recall == (50, 50, 50)  # every photo has one hit of two: resampling photos changes nothing
    by_caption = analysis.bootstrap_recall(ranks, torch.arange(100), 1)
    assert 38 <= by_caption.low <= 44 and 56 <= by_caption.high <= 62


def test_rank_histogram_counts_each_rank_once():
    bars = analysis.rank_histogram(torch.tensor([1, 2, 5, 6, 10, 100, 101, 4000]))

    assert bars == [
        ("1", 12.5),
        ("2 to 5", 25),
        ("6 to 10", 25),
        ("11 to 20", 0),
        ("21 to 50", 0),
        ("51 to 100", 12.5),
        ("over 100", 25),
    ]


def test_length_groups_cover_every_length():
    groups, names = analysis.length_groups([3, 4, 5, 6, 7, 8, 30, 3])

    assert groups.max() < len(names) and names[0].startswith("3") and names[-1].endswith("30")
    assert (groups.diff()[:6] >= 0).all()


def test_novelty_groups_count_rare_words():
    training = Counter({1: 5, 2: 3, 3: 2})

    groups, _ = analysis.novelty_groups([{1, 2}, {1, 3}, {3, 9}, {7, 8, 9}], training)

    assert groups.tolist() == [0, 1, 2, 2]


def test_hub_is_an_answer_with_four_times_its_share():
    neighbours = torch.arange(1000).reshape(100, 10) % 50
    neighbours[:90, 0] = 7

    assert [row for row, _ in analysis.hubs(neighbours, 50)] == [7]


def test_near_duplicates_are_in_different_splits(pool):
    pool.image_emb[70] = pool.image_emb[3]  # test and train
    pool.image_emb[4] = pool.image_emb[5]  # both train

    pairs = analysis.near_duplicates(pool.image_emb, pool.image_splits)

    assert pairs[0][:2] == (3, 70)
    assert all(pool.image_splits[a] != pool.image_splits[b] for a, b, _ in pairs)


def test_report_is_one_page_without_addresses_and_escapes_what_it_shows(pool, tmp_path, monkeypatch):
    pool.paths[1].write_bytes(b"no photo")
    (tmp_path / "data" / "run").mkdir(parents=True)
    monkeypatch.setattr(run_report, "encode_pool", lambda data, encoder, known: pool)
    log = [{"epoch": n, "rsum": rsum} for n, rsum in ((1, 300.0), (2, 420.0), (3, 400.0), (4, 390.0))]
    monkeypatch.setattr(run_report, "read_log", lambda folder: log)

    class Data:
        name = "my <photos>"

    path = run_report.write_report(tmp_path / "data" / "run", Data, None)

    page = path.read_text("utf-8")
    assert "<b>caption" not in page and "&lt;b&gt;caption" in page and "my &lt;photos&gt;" in page
    assert not re.search(r"""(?:src|href|url)\s*[=(]\s*["']?(?!data:|#|"|')\S""", page)
    assert "Epoch 2 of 4 was the best (rsum 420.0)" in page
    assert page.count("<h1>") == 1 and 'lang="en"' in page and page.count("data:image/jpeg") > 20


@pytest.mark.parametrize("frozen", [False, True])
def test_findings_name_memorised_training_pairs(pool, frozen):
    report = build_report(pool, "test") | {"frozen": frozen}
    rows = {row["split"]: row for row in report["recall"]["rows"][1:]}
    rows["train"]["t2i"][0] = analysis.Recall(95, 90, 99)
    rows["val"]["t2i"][0] = analysis.Recall(30, 25, 35)

    texts = findings(report, [])

    assert any("95.0 on training photos and 30.0 on validation photos" in text for text in texts)
    assert any("--freeze-image" in text for text in texts) != frozen  # frozen towers cannot be frozen again
    assert any("--dropout" in text for text in texts)


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (
            1,
            (
                "One caption (0.3 %) fits its photo",
                "One photo has a",
                "One caption belongs to several photos: “a dog” to",
            ),
        ),
        (
            2,
            (
                "2 captions (0.7 %) fit their photo",
                "2 photos have a",
                "2 captions belong to several photos, “a dog” to",
            ),
        ),
    ],
)
def test_findings_count_in_the_singular_and_the_plural(pool, count, expected):
    report = build_report(pool, "test") | {"frozen": False}
    pair = {"first": {"name": "a.png"}, "second": {"name": "b.png"}}
    report["pairs"] = {"clear": count, "listed": [(f"{n}.png", "a dog", 0) for n in range(count)]}
    report |= {"duplicates": [pair] * count, "repeated": [("a dog", 3)] * count}

    texts = findings(report, [])

    assert all(any(text.startswith(start) for text in texts) for start in expected)


def test_worst_sentence_is_listed_with_the_rank_of_its_photo(pool):
    row = 50 * CAPTIONS  # a test photo's caption
    pool.text_emb[row] = -pool.image_emb[50]

    worst = build_report(pool, "test")["sentence_examples"]["worst"][0]

    assert worst["query"] == pool.captions[row] and worst["rank"] == 24
    assert worst["right"]["name"] == Path(pool.paths[50]).name


def test_evaluate_writes_the_report_of_a_run(tmp_path, monkeypatch):
    write_image_folder(tmp_path / "my_photos", 30)
    monkeypatch.chdir(tmp_path)
    flags = ["--no-pretrained", "--image-encoder", "test_resnet", "--image-size", 32, "--embed-dim", 16]
    flags += ["--batch-size", 8, "--epochs", 2, "--num-workers", 0, "--precision", "float32"]
    assert run_in_process("train.py", "--dataset", "my_photos", *flags, "--name", "run").returncode == 0

    encode_split, encoded = Encoder.encode_split, []

    def record(encoder, split, name, *arguments):
        encoded.append(name)
        return encode_split(encoder, split, name, *arguments)

    monkeypatch.setattr(Encoder, "encode_split", record)
    done = run_in_process("evaluate.py", "runs/run", "--report", "--precision", "float32")

    assert done.returncode == 0, done.stderr
    assert encoded == ["test", "train", "val"]  # each split once
    assert "report: runs/run/report.html" in done.stdout
    page = (tmp_path / "runs" / "run" / "report.html").read_text("utf-8")
    assert "run on my_photos" in page and "Curves of loss" in page and "photo_0" in page


def test_report_is_not_for_zero_shot(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "--report" in one_line_error(run_in_process("evaluate.py", "--report", "--zero-shot", "x"))
