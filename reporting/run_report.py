"""Write report.html: one self-contained page that explains how well a run retrieves, where it fails, and why."""

import base64
import io
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.image_io import load_image
from data.loading import CaptionData, Split
from data.splits import SPLITS
from data.tokenizer import tokenize
from models.hub_run import hub_name
from reporting import report_analysis as analysis
from reporting.pair_quality import mismatch_scores
from reporting.report_findings import findings
from retrieval.encoder import EncodedSplit, Encoder
from retrieval.exact_search import top_k
from retrieval.metrics import retrieval_ranks
from runtime.atomic_io import write_text
from runtime.run_dir import CURVES, read_log

REPORT = "report.html"
THUMBNAIL = 176  # pixels of the longer side
EXAMPLES = 6  # queries shown as best and as worst, in each direction
ANSWERS = 4  # shown for a query
PAIR_CARDS, MAX_PAIRS, PAIR_SHARE = 18, 500, 0.08  # pairs that look wrong: with photo; at most; share of all
CLEAR_MISMATCH = 15  # mismatch score above which a pair is counted in the findings
MAX_LISTED = 12  # repeated captions and near-duplicates


@dataclass(frozen=True)
class Pool:
    """The encoded photos and captions of all splits, as rows; caption m belongs to photo caption_image_ids[m]."""

    image_emb: Tensor  # (N, D) unit rows
    text_emb: Tensor  # (M, D) unit rows
    caption_image_ids: Tensor  # (M,)
    paths: list[Path]  # N
    captions: list[str]  # M
    image_splits: list[str]  # N
    token_ids: list[np.ndarray]  # M
    thumbnails: dict[int, str] = field(default_factory=dict)  # data URL of the photo in this row; "" if unreadable

    def rows(self, split: str) -> tuple[Tensor, Tensor]:
        """Return the rows of a split's photos and captions; both are consecutive."""
        is_split = torch.tensor([name == split for name in self.image_splits])
        return is_split.nonzero().squeeze(1), is_split[self.caption_image_ids].nonzero().squeeze(1)

    def thumbnail(self, row: int) -> str:
        """Return a photo as a data URL of a small JPEG."""
        if row not in self.thumbnails:
            self.thumbnails[row] = _data_url(self.paths[row])
        return self.thumbnails[row]

    def photo(self, row: int, text: str = "") -> dict:
        """Return what the template shows of a photo."""
        captions = [self.captions[m] for m in (self.caption_image_ids == row).nonzero().squeeze(1).tolist()]
        return {
            "src": self.thumbnail(row),
            "name": self.paths[row].name,
            "split": self.image_splits[row],
            "captions": captions,
            "text": text,
        }


def write_report(
    folder: Path,
    data: CaptionData,
    encoder: Encoder,
    split: str = "test",
    output: Path | None = None,
    *,
    frozen: bool = False,
    encoded: tuple[Split, EncodedSplit] | None = None,
) -> Path:
    """Write report.html about a split, with what the other splits explain, into `output`, by default the run's folder.

    frozen: whether only the heads were trained. encoded: a split and its rows, if `encoder` has encoded it already.
    Return the report's path.
    """
    from jinja2 import Environment, FileSystemLoader

    pool = encode_pool(data, encoder, encoded)
    content = build_report(pool, split) | {
        "run": hub_name(folder) or folder.name,
        "dataset": Path(data.name).name,
        "sizes": [(name, *(len(rows) for rows in pool.rows(name))) for name in SPLITS],
        "curves": _file_url(folder / CURVES),
        "frozen": frozen,
    }
    content["findings"] = findings(content, read_log(folder))
    template = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
    report = (output or folder) / REPORT
    report.parent.mkdir(parents=True, exist_ok=True)
    write_text(report, template.get_template("report.html.j2").render(content))
    return report


def encode_pool(data: CaptionData, encoder: Encoder, known: tuple[Split, EncodedSplit] | None = None) -> Pool:
    """Encode all splits but the known one; unreadable photos are reported and left out."""
    emb, text, ids, paths, captions, splits = [], [], [], [], [], []
    for name in SPLITS:
        split = data.split(name)
        is_known = known is not None and _has_same_items(known[0], split)
        encoded = known[1] if is_known else encoder.encode_split(split, name)
        ids.append(encoded.caption_image_ids + len(paths))
        emb.append(encoded.image_emb)
        text.append(encoded.text_emb)
        paths += [split.paths[row] for row in encoded.readable_images.tolist()]
        captions += [split.captions[m] for m in encoded.readable_captions.tolist()]
        splits += [name] * len(encoded.image_emb)
    token_ids = tokenize(encoder.tokenizer, captions, max_tokens=encoder.max_tokens, cache_dir=encoder.cache_dir)
    return Pool(torch.cat(emb), torch.cat(text), torch.cat(ids), paths, captions, splits, token_ids)


def _has_same_items(first, second):
    ids = (first.caption_image_ids, second.caption_image_ids)
    return first.paths == second.paths and list(first.captions) == list(second.captions) and np.array_equal(*ids)


def build_report(pool: Pool, split: str) -> dict:
    """Compute everything that the report shows, as plain values for the template."""
    images, captions = pool.rows(split)
    image_emb, text_emb = pool.image_emb[images], pool.text_emb[captions]
    image_ids = pool.caption_image_ids[captions] - images[0]
    i2t_rank, t2i_rank = retrieval_ranks(image_emb, text_emb, image_ids)
    return {
        "split": split,
        "recall": _recall_rows(pool, split),
        "histograms": [
            ("Sentence to photo", analysis.rank_histogram(t2i_rank)),
            ("Photo to sentence", analysis.rank_histogram(i2t_rank)),
        ],
        "groups": _groups(pool, captions, image_ids, t2i_rank),
        "sentence_examples": _sentence_examples(pool, images, captions, image_ids, t2i_rank),
        "photo_examples": _photo_examples(pool, images, captions, i2t_rank),
        "hubs": _hubs(pool, images, captions),
        "pairs": _suspicious_pairs(pool),
        "repeated": analysis.repeated_captions(pool.captions, pool.caption_image_ids.tolist()),
        "n_captions": len(pool.captions),
        "duplicates": [
            {"first": pool.photo(a), "second": pool.photo(b), "cosine": cosine}
            for a, b, cosine in analysis.near_duplicates(pool.image_emb, pool.image_splits)[:MAX_LISTED]
        ],
        "max_listed": MAX_LISTED,
    }


def _recall_rows(pool, split):
    """Recall of the split, and of as many training and validation photos: recall depends on the size of the pool."""
    size = min(len(pool.rows(name)[0]) for name in SPLITS)
    rows = [_recall_row(pool, split, None)]
    rows += [_recall_row(pool, name, size) for name in SPLITS]
    return {"rows": rows, "size": size}


def _recall_row(pool, split, size):
    images, _ = pool.rows(split)
    if size is not None:
        images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:size].sort().values]
    position = torch.full((len(pool.paths),), -1)
    position[images] = torch.arange(len(images))
    captions = (position[pool.caption_image_ids] >= 0).nonzero().squeeze(1)
    image_ids = position[pool.caption_image_ids[captions]]
    i2t_rank, t2i_rank = retrieval_ranks(pool.image_emb[images], pool.text_emb[captions], image_ids)
    return {
        "split": split,
        "images": len(images),
        "i2t": [analysis.bootstrap_recall(i2t_rank, torch.arange(len(images)), k) for k in analysis.KS],
        "t2i": [analysis.bootstrap_recall(t2i_rank, image_ids, k) for k in analysis.KS],
        "chance": [100 * k / len(images) for k in analysis.KS],
    }


def _groups(pool, captions, image_ids, ranks):
    """R@5 by length and by known words of the caption."""
    training = Counter(word for m in pool.rows("train")[1].tolist() for word in set(pool.token_ids[m].tolist()))
    token_ids = [pool.token_ids[m] for m in captions.tolist()]
    lengths = analysis.length_groups([len(ids) for ids in token_ids])
    novelty = analysis.novelty_groups([set(ids.tolist()) for ids in token_ids], training)
    return [
        ("Length of the sentence, in tokens", analysis.recall_by_group(ranks, image_ids, *lengths)),
        ("Words of the sentence in the training captions", analysis.recall_by_group(ranks, image_ids, *novelty)),
    ]


def _sentence_examples(pool, images, captions, image_ids, ranks):
    """Show the best and the worst sentences: what was found, and the rank of the right photo."""
    _, found = top_k(pool.text_emb[captions], pool.image_emb[images], ANSWERS)
    scores = (pool.text_emb[captions] * pool.image_emb[images][image_ids]).sum(1)

    def example(m):
        own = int(image_ids[m])
        answers = [pool.photo(int(images[row]), "right" if row == own else "") for row in found[m].tolist()]
        rank = int(ranks[m])
        return {
            "query": pool.captions[int(captions[m])],
            "rank": rank,
            "answers": answers,
            "right": pool.photo(int(images[own]), f"right, rank {rank:,}") if own not in found[m].tolist() else None,
        }

    return _best_and_worst(ranks, scores, image_ids, example)


def _photo_examples(pool, images, captions, ranks):
    """Show the photos whose captions are found best and worst."""
    _, found = top_k(pool.image_emb[images], pool.text_emb[captions], ANSWERS)
    owners = pool.caption_image_ids[captions] - images[0]

    def example(row):
        answers = [(pool.captions[int(captions[m])], int(owners[m]) == row) for m in found[row].tolist()]
        return {"photo": pool.photo(int(images[row])), "rank": int(ranks[row]), "answers": answers}

    return _best_and_worst(ranks, pool.image_emb.new_zeros(len(ranks)), torch.arange(len(ranks)), example)


def _best_and_worst(ranks, scores, image_ids, example):
    """Return examples of the lowest ranks (highest score first) and of the highest; each photo occurs once."""
    by_score = scores.argsort(descending=True, stable=True)
    order = by_score[ranks[by_score].argsort(stable=True)].tolist()
    result = {}
    for key, queries in (("best", order), ("worst", order[::-1])):
        seen, chosen = set(), []
        for query in queries:
            if (image := int(image_ids[query])) not in seen:
                seen.add(image)
                chosen.append(query)
            if len(chosen) == EXAMPLES:
                break
        result[key] = [example(query) for query in chosen]
    return result


def _hubs(pool, images, captions):
    _, photos = top_k(pool.text_emb[captions], pool.image_emb[images], 10)
    _, texts = top_k(pool.image_emb[images], pool.text_emb[captions], 10)
    return {
        "photos": [
            pool.photo(int(images[row]), f"in the first ten of {share:.1f} % of the sentences")
            for row, share in analysis.hubs(photos, len(images))
        ],
        "captions": [(pool.captions[int(captions[m])], share) for m, share in analysis.hubs(texts, len(captions))],
        "expected": 1000 / len(images),
    }


def _suspicious_pairs(pool):
    """Return the pairs that fit worst, of all splits: the worst with their photo, the others by name."""
    scores = mismatch_scores(pool.image_emb, pool.text_emb, pool.caption_image_ids, pool.token_ids)
    count = max(1, min(MAX_PAIRS, int(PAIR_SHARE * len(scores))))
    order = scores.argsort(descending=True, stable=True)[:count].tolist()
    cards = []
    for m in order[:PAIR_CARDS]:
        photo = pool.photo(int(pool.caption_image_ids[m]))
        others = [caption for caption in photo["captions"] if caption != pool.captions[m]]
        cards.append({"photo": photo, "caption": pool.captions[m], "others": others[:2]})
    rows = pool.caption_image_ids[torch.tensor(order)].tolist()
    listed = [
        (pool.paths[row].name, pool.image_splits[row], pool.captions[m]) for m, row in zip(order, rows, strict=True)
    ]
    return {"cards": cards, "listed": listed, "clear": int((scores > CLEAR_MISMATCH).sum())}


def _data_url(path):
    from PIL import Image

    try:
        image = Image.fromarray(load_image(path, THUMBNAIL))
    except OSError:
        return ""
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=72)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _file_url(path):
    if not path.is_file():
        return ""
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
