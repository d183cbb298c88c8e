"""Equal captions are positives of each other's photos, and photos with equal bytes are one photo: against loops."""

import json
import math
import shutil
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data.repeats import find_repeats
from losses import PairIds, contrastive_loss, info_nce, info_nce_floor, positive_mask
from tests.helpers import open_data_of, run_in_process, run_script, tiny_model, write_image_folder
from training.objectives import Objective, objective_loss

IMAGES, CAPTIONS, TEXTS = 13, 40, 9


@pytest.fixture(params=range(4))
def split(request):
    """A split with shared texts, flipped texts that equal other texts, and three copies of a photo."""
    rng = np.random.default_rng(request.param)
    image_ids = np.sort(np.concatenate([np.arange(IMAGES), rng.integers(0, IMAGES, CAPTIONS - IMAGES)]))
    numbers = np.where(rng.random(CAPTIONS) < 0.5, rng.integers(0, TEXTS, CAPTIONS), 100 + np.arange(CAPTIONS))
    flipped = np.where(rng.random(CAPTIONS) < 0.3, rng.integers(0, TEXTS, CAPTIONS), numbers)
    photos = np.arange(IMAGES)
    photos[[7, 9]] = 4
    return numbers, flipped, image_ids, photos


def belongs(split, image, image_flipped, caption, caption_flipped):
    """Whether a caption is a positive of an image, by the definition: the same photo, or a text of that photo."""
    views, owner, photos = split[:2], split[2], split[3]
    if photos[owner[caption]] == photos[image]:
        return True
    own = {views[image_flipped][m] for m in range(CAPTIONS) if photos[owner[m]] == photos[image]}
    return views[caption_flipped][caption] in own


def draw_batch(split, seed):
    """Draw a batch: images without repetition, each flipped or not, with some of its captions."""
    rng = np.random.default_rng(seed)
    images = rng.permutation(IMAGES)[:8]
    flipped = rng.random(8) < 0.5
    captions = [rng.permutation(np.flatnonzero(split[2] == i))[:3] for i in images]
    return images, captions, flipped


def batch_ids(split, images, captions, flipped):
    repeats = find_repeats(*split)
    photo_ids = torch.from_numpy(repeats.photo_ids[images])
    own = photo_ids.repeat_interleave(torch.tensor([len(rows) for rows in captions]))
    texts = {key: torch.from_numpy(value) for key, value in repeats.batch_ids(images, captions, flipped).items()}
    return PairIds(photo_ids, own, **texts)


@pytest.mark.parametrize("seed", range(5))
def test_positives_of_a_batch_are_those_of_a_loop(split, seed):
    images, captions, flipped = draw_batch(split, seed)
    ids = batch_ids(split, images, captions, flipped)

    expected = [
        [
            belongs(split, image, int(is_flipped), m, int(other_flipped))
            for rows, other_flipped in zip(captions, flipped, strict=True)
            for m in rows
        ]
        for image, is_flipped in zip(images, flipped, strict=True)
    ]

    assert positive_mask(*ids).tolist() == expected
    assert ids.of_images(slice(None)).tolist() == expected
    assert torch.equal(ids.of_captions(torch.arange(len(ids.caption_image_ids))).T, positive_mask(*ids))


def test_text_that_was_not_sampled_makes_a_positive_too():
    repeats = find_repeats(np.array([5, 6, 5]), np.array([5, 6, 5]), np.array([0, 0, 1]), np.arange(2))

    ids = repeats.batch_ids([0, 1], [[1], [2]], [False, False])  # of photo 0, the shared caption was not drawn

    mask = positive_mask(torch.arange(2), torch.arange(2), *map(torch.from_numpy, ids.values()))
    assert mask.tolist() == [[True, True], [False, True]]


def test_split_without_repeats_carries_no_text_ids():
    repeats = find_repeats(np.arange(6), np.arange(6) + 10, np.arange(6) // 2, np.arange(3))

    assert not repeats.has_texts and repeats.batch_ids([0], [[0]], [True]) == {}


def embeddings(seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [F.normalize(torch.randn(n, 12, generator=generator, dtype=dtype), dim=1) for n in (8, 8 * 3)]


OBJECTIVES = [
    Objective("info_nce"),
    Objective("info_nce", negatives="semi-hard", distance="cosine"),
    Objective("info_nce", negatives="all"),
    Objective("sigmoid"),
    Objective("cosine", cosine_margin=0.1),
    Objective("soft"),
]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: f"{objective.name}-{objective.negatives}")
@pytest.mark.parametrize("chunk_size", [1, 7, 64])
def test_chunked_objective_equals_the_plain_one(split, objective, chunk_size):
    ids = batch_ids(split, *draw_batch(split, 0))
    image_emb, text_emb = embeddings(0)
    results = []
    for loss in (objective_loss, partial(objective_loss, chunk_size=chunk_size)):
        leaves = [image_emb.clone().requires_grad_(), text_emb[: len(ids.caption_image_ids)].clone().requires_grad_()]
        terms = loss(*leaves, *ids[:2], objective, ids[2:], temperature=0.1, bias=-3.0, alpha=0.7)
        terms.total.backward()
        results.append([*(term.detach() for term in terms), *(leaf.grad for leaf in leaves)])
    for plain, chunked in zip(*results, strict=True):
        torch.testing.assert_close(plain, chunked, rtol=1e-9, atol=1e-11)


def looped_info_nce(sim, positives, texts, temperature):
    """InfoNCE by loops: a caption's share of an image's target is 1 over the number of captions with its text."""
    logits, total = sim / temperature, 0.0
    for row, mask in zip(logits, positives, strict=True):
        shares = {
            m: 1 / sum(bool(text == texts[m]) for text in texts) if texts[m] >= 0 else 1.0
            for m in mask.nonzero().flatten().tolist()
        }
        total -= (
            sum(share * (row[m] - row.logsumexp(0)) for m, share in shares.items()) / sum(shares.values()) / len(sim)
        )
    for column, mask in zip(logits.T, positives.T, strict=True):
        total -= (column[mask] - column.logsumexp(0)).mean() / sim.shape[1]
    return total / 2


def test_a_text_counts_once_for_an_image_however_many_captions_have_it(split):
    ids = batch_ids(split, *draw_batch(split, 1))
    image_emb, text_emb = embeddings(1)
    text_emb = text_emb[: len(ids.caption_image_ids)]
    sim, positives = image_emb @ text_emb.T, positive_mask(*ids)
    texts = ids.caption_text_ids if ids.caption_text_ids is not None else torch.full((sim.shape[1],), -1)

    terms = contrastive_loss(image_emb, text_emb, *ids, temperature=0.1, alpha=1.0, margin=0.2)

    torch.testing.assert_close(terms.info_nce, looped_info_nce(sim, positives, texts, 0.1))
    violations = [
        [
            max(0.0, 0.2 + near(sim[i, m]) - far)
            for far in (hardest(sim[i], positives[i]), hardest(sim[:, m], positives[:, m]))
        ]
        for i, m in positives.nonzero().tolist()
    ]
    weights = [
        1 / max(1, int((texts == texts[m]).sum())) if texts[m] >= 0 else 1.0 for _, m in positives.nonzero().tolist()
    ]
    expected = sum(w * sum(pair) / 2 for w, pair in zip(weights, violations, strict=True)) / sum(weights)
    assert terms.triplet.item() == pytest.approx(float(expected), rel=1e-5)


def near(cosine):
    return math.sqrt(max(1e-12, 2 - 2 * float(cosine)))


def hardest(scores, is_positive):
    negatives = [near(score) for score, own in zip(scores.tolist(), is_positive.tolist(), strict=True) if not own]
    return min(negatives, default=math.inf)


def test_floor_is_the_value_that_no_scores_go_below(split):
    ids = batch_ids(split, *draw_batch(split, 2))
    positives, weights = positive_mask(*ids), ids.caption_weights()
    floor = info_nce_floor(positives, weights)
    targets = positives.double() if weights is None else positives * weights.double()
    row = (targets / targets.sum(1, keepdim=True)).clamp(min=1e-30).log()

    def one_direction(scores, targets):  # cross entropy of the targets with themselves
        targets = targets / targets.sum(1, keepdim=True)
        return -(targets * (scores - scores.logsumexp(1, keepdim=True))).sum(1).mean()

    column = (positives.T / positives.T.sum(1, keepdim=True)).clamp(min=1e-30).log()
    expected = (one_direction(row, targets) + one_direction(column, positives.T.double())) / 2
    assert floor.item() == pytest.approx(expected.item(), abs=1e-5)
    for chunk_size in (1, 3, 100):
        assert ids.floor(chunk_size).item() == pytest.approx(floor.item(), abs=1e-5)


def test_equal_caption_is_never_the_hardest_negative():
    emb = F.normalize(torch.randn(3, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    image_emb, text_emb = emb[[0, 0, 1]], emb[[0, 0, 2]]  # photos 0 and 1 have one text and one embedding
    texts = torch.tensor([4, 4, -1]), torch.tensor([[4], [4], [-2]])
    settings = {"temperature": 0.1, "alpha": 1.0}

    separate = objective_loss(image_emb, text_emb, torch.arange(3), torch.arange(3), Objective(), **settings)
    shared = objective_loss(image_emb, text_emb, torch.arange(3), torch.arange(3), Objective(), texts, **settings)

    assert separate.triplet >= 0.2 / 3 > shared.triplet


def test_floor_is_reached_by_a_perfect_model():
    """Eight photos with one caption, and eight with captions of their own: (ln 8 + 0) / 2 on average."""
    topic = torch.tensor([0] * 8 + list(range(1, 9)))
    emb = torch.eye(9)[topic]
    positives = topic[:, None] == topic

    assert info_nce_floor(positives) == pytest.approx(math.log(8) / 2)
    assert info_nce(emb @ emb.T, positives, 0.01) == pytest.approx(math.log(8) / 2, abs=1e-3)
    for chunk_size in (1, 5, 100):
        ids = PairIds(torch.arange(16), torch.arange(16), topic, topic[:, None])
        assert ids.floor(chunk_size) == pytest.approx(math.log(8) / 2)


def write_products(folder):
    """Write 20 training photos that share four captions, two of them copies, and four photos in each other split."""
    write_image_folder(folder, 28)
    names = [f"photo_{number:02d}.png" for number in range(28)]
    colours, splits = ("red", "green", "blue", "white"), ["train"] * 20 + ["val"] * 4 + ["test"] * 4
    rows = [f"{name},a {colours[n % 4]} picture,{splits[n]}" for n, name in enumerate(names)]
    (folder / "captions.txt").write_text("\n".join(["image,caption,split", *rows]) + "\n")
    shutil.copy(folder / "Images" / names[0], folder / "Images" / names[4])
    return folder


@pytest.fixture(scope="module")
def products(tmp_path_factory):
    return write_products(tmp_path_factory.mktemp("products") / "products")


FLAGS = (
    *("--no-pretrained", "--image-encoder", "test_resnet", "--image-size", "32", "--embed-dim", "16"),
    *("--epochs", "2", "--batch-size", "8", "--device", "cpu", "--precision", "float32", "--num-workers", "0"),
)


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("flags", [[], ["--micro-batch-size", "3"], ["--freeze-image", "--cached-views", "2"]])
def test_training_knows_the_floor_of_its_loss(products, tmp_path, monkeypatch, flags):
    monkeypatch.chdir(tmp_path)

    done = run_in_process("train.py", "--dataset", products, *FLAGS, "--name", "run", *flags)

    assert done.returncode == 0, done.stderr
    (first, _) = log_of(tmp_path / "runs" / "run")
    assert 0.2 < first["info_nce_floor"] < math.log(8) and first["info_nce"] > first["info_nce_floor"]
    assert f"above {first['info_nce_floor']:.3f}, the lowest value" in done.stdout


def test_two_processes_train_as_one(products, tmp_path):
    # Batch norm would see half a batch in each process; dropout is drawn per micro-batch.
    same = ["--freeze-image", "--cached-views", "0", "--batch-size", "10", "--micro-batch-size", "5", "--epochs", "1"]
    for name, launcher in (("one", []), ("two", ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"])):
        arguments = ["train.py", "--dataset", products, *FLAGS, *same, "--name", name]
        run_script(*launcher, *arguments, cwd=tmp_path, GLOO_SOCKET_IFNAME="lo")

    (one,), (two,) = (log_of(tmp_path / "runs" / name) for name in ("one", "two"))
    for key in ("loss", "info_nce", "info_nce_floor", "triplet"):
        assert one[key] == pytest.approx(two[key], rel=1e-5)


def test_batch_of_the_loader_carries_canonical_photos_and_texts(products, tmp_path, tiny_config):
    from retrieval.encoder import build_training_encoder
    from training.dataloader_factory import build_batches

    config = tiny_config(dataset=str(products), cache_dir=str(tmp_path), batch_size=12)
    model, tokenizer = tiny_model()
    encoder = build_training_encoder(config, model, tokenizer)
    batches, _ = build_batches(config, model, encoder, open_data_of(config))

    assert batches.repeats
    split = open_data_of(config).split("train")
    rows = {path.name: row for row, path in enumerate(split.paths)}
    seen = set()
    for passes in batches.epoch(0):
        (batch,) = passes[0]
        ids = PairIds(*(batch[key] for key in PairIds._fields))
        texts = [split.captions[list(split.caption_image_ids).index(row)] for row in ids.caption_image_ids.tolist()]
        own = [split.captions[list(split.caption_image_ids).index(row)] for row in ids.image_ids.tolist()]
        assert positive_mask(*ids).tolist() == [[text == caption for caption in texts] for text in own]
        seen.update(ids.image_ids.tolist())
    assert max(rows["photo_00.png"], rows["photo_04.png"]) not in seen
