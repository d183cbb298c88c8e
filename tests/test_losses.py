"""The losses equal plain loops, torch's losses and numerical gradients."""

import math

import pytest
import torch
import torch.nn.functional as F

from losses import (
    contrastive_loss,
    cosine_margin_loss,
    hardest_triplet,
    info_nce,
    mined_triplet,
    positive_mask,
    sigmoid_loss,
    similarity_features,
    soft_cross_entropy,
    soft_info_nce,
)
from training.objectives import Objective, objective_loss

MARGIN = 0.3


def unit(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=dtype), dim=-1)


def ragged_batch(seed=0, dtype=torch.float32):
    """Five images with 1 to 3 captions each, in shuffled order: image_emb, text_emb, image_ids, caption_image_ids."""
    generator = torch.Generator().manual_seed(seed)
    image_ids = torch.tensor([40, 7, 19, 3, 88])
    caption_image_ids = image_ids.repeat_interleave(torch.tensor([1, 3, 2, 1, 2]))
    caption_image_ids = caption_image_ids[torch.randperm(len(caption_image_ids), generator=generator)]
    return unit(5, 8, seed=seed, dtype=dtype), unit(9, 8, seed=seed + 100, dtype=dtype), image_ids, caption_image_ids


def transpose(rows):
    return [list(column) for column in zip(*rows, strict=True)]


def info_nce_by_loops(sim, positives, temperature):
    def direction(sim, positives):
        total = 0.0
        for scores, row in zip(sim, positives, strict=True):
            exps = [math.exp(s / temperature) for s in scores]
            logs = [math.log(e / sum(exps)) for e, is_positive in zip(exps, row, strict=True) if is_positive]
            total -= sum(logs) / sum(row)
        return total / len(sim)

    return (direction(sim, positives) + direction(transpose(sim), transpose(positives))) / 2


def triplet_by_torch(image_emb, text_emb, positives, margin):
    def direction(anchors, others, positives):
        losses = []
        for anchor, is_positive in zip(anchors, positives, strict=True):
            negatives = others[~is_positive]
            for positive in others[is_positive]:
                if len(negatives) == 0:
                    losses.append(torch.zeros((), dtype=anchors.dtype))
                    continue
                nearest = negatives[(negatives - anchor).norm(dim=1).argmin()]
                losses.append(F.triplet_margin_loss(anchor[None], positive[None], nearest[None], margin=margin))
        return torch.stack(losses).mean()

    return (direction(image_emb, text_emb, positives) + direction(text_emb, image_emb, positives.T)) / 2


def test_positive_mask_marks_exactly_the_captions_of_each_image():
    mask = positive_mask(torch.tensor([5, 2]), torch.tensor([2, 5, 9, 2]))
    assert mask.dtype == torch.bool
    assert mask.tolist() == [[False, True, False, False], [True, False, False, True]]


@pytest.mark.parametrize("seed", range(5))
def test_info_nce_is_the_cross_entropy_to_uniform_positives(seed):
    image_emb, text_emb, image_ids, caption_image_ids = ragged_batch(seed)
    sim, positives = image_emb @ text_emb.T, positive_mask(image_ids, caption_image_ids)
    expected = info_nce_by_loops(sim.tolist(), positives.tolist(), 0.07)
    assert info_nce(sim, positives, 0.07).item() == pytest.approx(expected, rel=1e-5)


def test_info_nce_with_one_caption_per_image_is_clips_symmetric_cross_entropy():
    sim = unit(6, 8, seed=1) @ unit(6, 8, seed=2).T
    target = torch.arange(6)
    expected = (F.cross_entropy(sim / 0.07, target) + F.cross_entropy(sim.T / 0.07, target)) / 2
    torch.testing.assert_close(info_nce(sim, torch.eye(6, dtype=torch.bool), 0.07), expected)


def test_info_nce_is_finite_for_extreme_and_masked_similarities():
    positives = torch.eye(3, dtype=torch.bool)
    sim = torch.where(positives, 1.0, -torch.inf).requires_grad_()
    loss = info_nce(sim, positives, 1e-4)
    loss.backward()
    assert loss.item() == 0
    assert sim.grad.isfinite().all()


def test_info_nce_has_the_numerical_gradient_of_similarity_and_temperature():
    image_emb, text_emb, image_ids, caption_image_ids = ragged_batch(dtype=torch.float64)
    sim = (image_emb @ text_emb.T).requires_grad_()
    temperature = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    positives = positive_mask(image_ids, caption_image_ids)
    assert torch.autograd.gradcheck(lambda s, t: info_nce(s, positives, t), (sim, temperature))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_convert_half_precision_similarities_to_float32(dtype):
    image_emb, text_emb, image_ids, caption_image_ids = ragged_batch()
    sim, positives = (image_emb @ text_emb.T).to(dtype), positive_mask(image_ids, caption_image_ids)
    for loss in (lambda s: info_nce(s, positives, 0.07), lambda s: hardest_triplet(s, positives, MARGIN)):
        assert loss(sim).dtype == torch.float32
        torch.testing.assert_close(loss(sim), loss(sim.float()))


@pytest.mark.parametrize("margin", [0.05, 0.3, 2.0])
@pytest.mark.parametrize("seed", range(4))
def test_hardest_triplet_is_torchs_triplet_margin_loss_with_the_nearest_negative(seed, margin):
    image_emb, text_emb, image_ids, caption_image_ids = ragged_batch(seed)
    positives = positive_mask(image_ids, caption_image_ids)
    expected = triplet_by_torch(image_emb, text_emb, positives, margin)
    torch.testing.assert_close(hardest_triplet(image_emb @ text_emb.T, positives, margin), expected, atol=1e-5, rtol=0)


def test_hardest_triplet_has_the_gradient_of_torchs_loss_for_both_embeddings():
    grads = []
    for loss in (
        lambda i, t, p: hardest_triplet(i @ t.T, p, MARGIN),
        lambda i, t, p: triplet_by_torch(i, t, p, MARGIN),
    ):
        image_leaf, text_leaf, image_ids, caption_image_ids = ragged_batch(3, dtype=torch.float64)
        image_leaf.requires_grad_(), text_leaf.requires_grad_()
        image_emb, text_emb = F.normalize(image_leaf, dim=1), F.normalize(text_leaf, dim=1)
        loss(image_emb, text_emb, positive_mask(image_ids, caption_image_ids)).backward()
        grads.append((image_leaf.grad, text_leaf.grad))
    torch.testing.assert_close(grads[0], grads[1], atol=1e-5, rtol=0)


def test_hardest_triplet_has_the_numerical_gradient():
    image_emb, text_emb, image_ids, caption_image_ids = ragged_batch(1, dtype=torch.float64)
    sim, positives = (image_emb @ text_emb.T).requires_grad_(), positive_mask(image_ids, caption_image_ids)
    assert torch.autograd.gradcheck(lambda s: hardest_triplet(s, positives, MARGIN), (sim,))


def test_hardest_triplet_has_gradients_at_the_positive_and_the_hardest_negative_only():
    sim = torch.tensor([[0.5, 0.1, 0.4]], requires_grad=True)
    hardest_triplet(sim, torch.tensor([[True, False, False]]), 1.0).backward()
    assert sim.grad[0, 0] < 0 < sim.grad[0, 2]  # a descent step raises the positive and lowers the negative
    assert sim.grad[0, 1] == 0


def test_sibling_caption_is_never_a_negative():
    image_emb = torch.eye(2)
    text_emb = torch.eye(2).repeat_interleave(2, 0)  # siblings have equal embeddings, as near as a negative can be
    positives = positive_mask(torch.tensor([0, 1]), torch.tensor([0, 0, 1, 1]))
    assert hardest_triplet(image_emb @ text_emb.T, positives, 1.0) == 0


def test_row_or_column_without_negatives_adds_no_loss_and_no_gradient():
    sim = torch.tensor([[0.9, 0.2, 0.1], [0.3, 0.8, 0.2]], requires_grad=True)
    positives = torch.tensor([[True, True, True], [False, True, False]])
    loss = hardest_triplet(sim, positives, 1.0)
    loss.backward()

    def d(cosine):
        return math.sqrt(2 - 2 * cosine)

    by_image = [0, 0, 0, 1 + d(0.8) - d(0.3)]  # every caption is a positive of the first image
    by_caption = [1 + d(0.9) - d(0.3), 0, 1 + d(0.1) - d(0.2), 0]  # the second caption is a positive of both images
    expected = (sum(by_image) / 4 + sum(by_caption) / 4) / 2
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    assert sim.grad.isfinite().all()


def test_batch_of_one_image_has_zero_loss_and_gradient():
    sim = torch.tensor([[0.1, -0.3]], requires_grad=True)
    loss = hardest_triplet(sim, torch.ones(1, 2, dtype=torch.bool), 1.0) + info_nce(sim[:, :1], torch.ones(1, 1) > 0, 1)
    loss.backward()
    assert loss == 0
    assert (sim.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_is_finite_where_image_and_caption_are_equal(dtype):
    emb = unit(4, 8, dtype=dtype).requires_grad_()
    collapsed = emb[:1].expand(4, 8)
    for sim in (emb @ emb.T, collapsed @ collapsed.T, torch.ones(4, 4, dtype=dtype) * emb.sum() / emb.sum()):
        emb.grad = None
        hardest_triplet(sim, torch.eye(4, dtype=torch.bool), MARGIN).backward()
        assert emb.grad.isfinite().all()


def test_contrastive_loss_adds_alpha_times_the_triplet():
    image_emb, text_emb, image_ids, caption_image_ids = ragged_batch()
    terms = contrastive_loss(
        image_emb, text_emb, image_ids, caption_image_ids, temperature=0.07, alpha=0.4, margin=MARGIN
    )
    sim, positives = image_emb @ text_emb.T, positive_mask(image_ids, caption_image_ids)
    torch.testing.assert_close(terms.info_nce, info_nce(sim, positives, 0.07))
    torch.testing.assert_close(terms.triplet, hardest_triplet(sim, positives, MARGIN))
    torch.testing.assert_close(terms.total, terms.info_nce + 0.4 * terms.triplet)
    assert all(term.shape == () for term in terms)


def test_triplet_term_with_alpha_zero_has_no_gradient():
    image_emb, text_emb, image_ids, caption_image_ids = ragged_batch()
    image_emb.requires_grad_()
    terms = contrastive_loss(image_emb, text_emb, image_ids, caption_image_ids, temperature=0.07, alpha=0, margin=1.0)
    assert terms.triplet > 0
    assert not terms.triplet.requires_grad
    assert terms.total == terms.info_nce
    terms.total.backward()
    assert image_emb.grad.abs().sum() > 0


def test_contrastive_loss_is_float32_under_autocast():
    image_emb, text_emb, image_ids, caption_image_ids = ragged_batch()
    arguments = dict(temperature=torch.tensor(0.07), alpha=1.0, margin=MARGIN)
    expected = contrastive_loss(image_emb, text_emb, image_ids, caption_image_ids, **arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = contrastive_loss(image_emb, text_emb, image_ids, caption_image_ids, **arguments)
    assert terms == expected
    assert terms.total.dtype == torch.float32


def test_order_of_captions_does_not_change_the_loss():
    image_emb, text_emb, image_ids, caption_image_ids = ragged_batch()
    order = torch.randperm(len(caption_image_ids), generator=torch.Generator().manual_seed(0))
    arguments = dict(temperature=0.07, alpha=1.0, margin=MARGIN)
    expected = contrastive_loss(image_emb, text_emb, image_ids, caption_image_ids, **arguments)
    shuffled = contrastive_loss(image_emb, text_emb[order], image_ids, caption_image_ids[order], **arguments)
    torch.testing.assert_close(shuffled.total, expected.total)


def softmax(values):
    exps = [math.exp(value) for value in values]
    return [value / sum(exps) for value in exps]


def dot(a, b):
    return sum(x * y for x, y in zip(a.tolist(), b.tolist(), strict=True))


def test_sigmoid_loss_equals_loops():
    image_emb, text_emb, image_ids, caption_image_ids = ragged_batch(dtype=torch.float64)
    sim, positives = image_emb @ text_emb.T, positive_mask(image_ids, caption_image_ids)
    total = 0.0
    for i, m in ((i, m) for i in range(5) for m in range(9)):
        sign = 1 if positives[i, m] else -1
        total += math.log(1 + math.exp(-sign * (sim[i, m].item() / 0.1 - 10)))
    assert sigmoid_loss(sim, positives, 0.1, -10.0).item() == pytest.approx(total / 9)


def test_cosine_margin_loss_equals_loops():
    image_emb, text_emb, image_ids, caption_image_ids = ragged_batch(dtype=torch.float64)
    sim, positives = image_emb @ text_emb.T, positive_mask(image_ids, caption_image_ids)
    total = 0.0
    for column, labels in zip(sim.T.tolist(), positives.T.tolist(), strict=True):
        positive_losses = [0.5 * (1 - s) for s, label in zip(column, labels, strict=True) if label]
        negative_losses = [0.5 * max(0.0, s - 0.1) for s, label in zip(column, labels, strict=True) if not label]
        total += sum(positive_losses) / len(positive_losses) + sum(negative_losses) / len(negative_losses)
    assert cosine_margin_loss(sim, positives, 0.1).item() == pytest.approx(total / 9)


def test_cosine_margin_loss_with_one_caption_per_image_is_torchs_loss():
    image_emb, text_emb = unit(6, 8), unit(6, 8, seed=1)
    terms = []
    for label, rows in ((1, [(i, i) for i in range(6)]), (-1, [(i, m) for i in range(6) for m in range(6) if i != m])):
        image, caption = (torch.tensor(index) for index in zip(*rows, strict=True))
        labels = torch.full((len(rows),), label)
        terms.append(F.cosine_embedding_loss(image_emb[image], text_emb[caption], labels, margin=0.1))
    loss = cosine_margin_loss(image_emb @ text_emb.T, torch.eye(6, dtype=torch.bool), 0.1)
    torch.testing.assert_close(loss, sum(terms) / 2)


def test_soft_info_nce_equals_loops():
    image_emb, text_emb, image_ids, caption_image_ids = ragged_batch(dtype=torch.float64)
    positives, temperature, softness = positive_mask(image_ids, caption_image_ids), 0.2, 0.3
    image_of = positives.int().argmax(0).tolist()
    captions_of = [[m for m in range(9) if image_of[m] == i] for i in range(5)]
    target_sim = [
        [
            dot(image_emb[i], image_emb[image_of[m]]) / 2
            + sum(dot(text_emb[n], text_emb[m]) for n in captions_of[i]) / len(captions_of[i]) / 2
            for m in range(9)
        ]
        for i in range(5)
    ]
    sim = (image_emb @ text_emb.T).tolist()

    def direction(sim, target_sim, positives):
        total = 0.0
        for scores, target_scores, labels in zip(sim, target_sim, positives, strict=True):
            probabilities = softmax([s / temperature for s in scores])
            soft = softmax([s / temperature for s in target_scores])
            target = [(1 - softness) * y / sum(labels) + softness * q for y, q in zip(labels, soft, strict=True)]
            total -= sum(t * math.log(p) for t, p in zip(target, probabilities, strict=True))
        return total / len(sim)

    labels = positives.int().tolist()
    by_image = direction(sim, target_sim, labels)
    by_caption = direction(transpose(sim), transpose(target_sim), transpose(labels))
    loss = soft_info_nce(image_emb, text_emb, positives, temperature, softness)
    assert loss.item() == pytest.approx((by_image + by_caption) / 2)


def test_soft_info_nce_without_softness_is_info_nce_and_its_targets_have_no_gradient():
    image_emb, text_emb, image_ids, caption_image_ids = ragged_batch(dtype=torch.float64)
    positives = positive_mask(image_ids, caption_image_ids)
    hard = info_nce(image_emb @ text_emb.T, positives, 0.1)
    torch.testing.assert_close(soft_info_nce(image_emb, text_emb, positives, 0.1, 0.0), hard)
    leaf = image_emb.clone().requires_grad_()
    soft_info_nce(leaf, text_emb, positives, 0.1, 1.0).backward()

    image_features, text_features = similarity_features(image_emb, text_emb, positives)

    def loss_with_fixed_targets(images):
        target_sim = image_features @ text_features.T
        rows = soft_cross_entropy(images @ text_emb.T, positives, target_sim, 0.1, 1.0)
        columns = soft_cross_entropy(text_emb @ images.T, positives.T, target_sim.T, 0.1, 1.0)
        return (rows.mean() + columns.mean()) / 2

    step = 1e-6
    for row, column in ((0, 0), (3, 5)):
        values = []
        for sign in (1, -1):
            perturbed = image_emb.clone()
            perturbed[row, column] += sign * step
            values.append(loss_with_fixed_targets(perturbed))
        assert leaf.grad[row, column].item() == pytest.approx(((values[0] - values[1]) / (2 * step)).item(), rel=1e-4)


def distance(cosine, kind):
    return 1 - cosine if kind == "cosine" else math.sqrt(max(2 - 2 * cosine, 1e-12))


def triplet_by_loops(sim, positives, margin, negatives, kind):
    def direction(sim, positives):
        losses = []
        for scores, labels in zip(sim, positives, strict=True):
            far = [distance(s, kind) for s, label in zip(scores, labels, strict=True) if not label]
            for near in (distance(s, kind) for s, label in zip(scores, labels, strict=True) if label):
                if negatives == "all":
                    losses.append(sum(max(0.0, margin + near - d) for d in far) / len(far) if far else 0.0)
                elif negatives == "semi-hard":
                    farther = [d for d in far if d > near]
                    losses.append(max(0.0, margin + near - min(farther)) if farther else 0.0)
                else:
                    losses.append(max(0.0, margin + near - min(far)) if far else 0.0)
        return sum(losses) / len(losses)

    return (direction(sim, positives) + direction(transpose(sim), transpose(positives))) / 2


@pytest.mark.parametrize("kind", ["euclidean", "cosine"])
@pytest.mark.parametrize("negatives", ["hardest", "semi-hard", "all"])
@pytest.mark.parametrize("seed", range(3))
def test_triplet_term_equals_loops(negatives, kind, seed):
    image_emb, text_emb, image_ids, caption_image_ids = ragged_batch(seed, dtype=torch.float64)
    objective = Objective(negatives=negatives, distance=kind, margin=0.4)
    terms = objective_loss(image_emb, text_emb, image_ids, caption_image_ids, objective, temperature=0.1, alpha=0.5)
    sim, positives = image_emb @ text_emb.T, positive_mask(image_ids, caption_image_ids)
    expected = triplet_by_loops(sim.tolist(), positives.tolist(), 0.4, negatives, kind)
    assert expected > 0 and terms.triplet.item() == pytest.approx(expected)
    torch.testing.assert_close(terms.total, terms.main + 0.5 * terms.triplet)


@pytest.mark.parametrize("negatives", ["hardest", "semi-hard", "all"])
def test_batch_of_one_image_has_no_triplet_loss_and_a_finite_gradient(negatives):
    image_emb, text_emb = unit(1, 8).requires_grad_(), unit(3, 8, seed=1)
    objective = Objective(negatives=negatives)
    terms = objective_loss(image_emb, text_emb, torch.zeros(1), torch.zeros(3), objective, temperature=0.1, alpha=1.0)
    terms.total.backward()
    assert terms.triplet == 0 and image_emb.grad.isfinite().all()


@pytest.mark.parametrize("negatives", ["semi-hard", "all"])
def test_mined_triplet_has_the_numerical_gradient(negatives):
    image_emb, text_emb, image_ids, caption_image_ids = ragged_batch(dtype=torch.float64)
    sim, positives = (image_emb @ text_emb.T).requires_grad_(), positive_mask(image_ids, caption_image_ids)
    assert torch.autograd.gradcheck(lambda sim: mined_triplet(sim, positives, 0.4, negatives=negatives), sim)


@pytest.mark.parametrize("main", ["sigmoid", "cosine", "soft"])
def test_main_term_decreases_as_captions_approach_their_image(main):
    image_emb, _, image_ids, caption_image_ids = ragged_batch()
    own_image = image_emb[positive_mask(image_ids, caption_image_ids).int().argmax(0)]
    settings = dict(objective=Objective(main), temperature=0.1, bias=-10.0, alpha=0.0)
    far, near, equal = (
        objective_loss(
            image_emb,
            F.normalize(own_image + noise * unit(9, 8, seed=5), dim=1),
            image_ids,
            caption_image_ids,
            **settings,
        )
        for noise in (3.0, 0.5, 0.0)
    )
    assert far.main > near.main
    assert main == "soft" or near.main > equal.main  # soft targets give negatives a probability above zero
