"The focal loss against a slow version; importance sampling in exact arithmetic; image order."
import itertools
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from sac_lit.core import generator, IGNORE_INDEX, UserError
from sac_lit.focal_loss import batch_confidence, CONFIDENCES, focal_loss
from sac_lit.importance_sampling import (
    class_frequency,
    draw,
    epoch_index,
    sampling_weights,
    StepSampler,
)

quick = settings(deadline=None, derandomize=True, max_examples=40)
seeds = st.integers(0, 2 ** 31)
side = st.integers(1, 5)
sizes = st.tuples(st.integers(1, 3), st.integers(2, 6), side, side)    # of (B, C, H, W)


def batch(seed, size, ignored=.3, dtype=torch.float32):
    "Logits, labels, confidence, and a prior."
    B, C, H, W = size
    g = generator(seed, "batch")
    labels = torch.randint(C, (B, H, W), generator=g)
    labels[torch.rand(B, H, W, generator=g) < ignored] = IGNORE_INDEX
    logits = 3 * torch.randn(*size, generator=g, dtype=dtype)
    return logits, labels, torch.rand(B, H, W, generator=g), torch.rand(C, generator=g)


# ---------------------------------------------------------------- focal loss

@quick
@given(seeds, sizes, st.floats(0, 8))
def test_loss_equals_the_equation_pixel_by_pixel(seed, size, lam):
    z, y, m, chi = batch(seed, size)
    logp, total = z.double().log_softmax(1), 0.
    for b, i, j in itertools.product(*map(range, y.shape)):
        c = y[b, i, j].item()
        if c == IGNORE_INDEX: continue
        weight = m[b, i, j].item() * (1 - chi[c].item()) ** lam
        total -= weight * logp[b, c, i, j].item()
    loss = focal_loss(z, y, m, chi, lam).item()
    assert loss == pytest.approx(total / y.numel(), rel=1e-4, abs=1e-6)


@quick
@given(seeds, sizes)
def test_without_both_factors_it_is_cross_entropy(seed, size):
    z, y, m, chi = batch(seed, size)
    ce = F.cross_entropy(z, y, ignore_index=IGNORE_INDEX, reduction="sum") / y.numel()
    torch.testing.assert_close(focal_loss(z, y, torch.ones_like(m), chi, lam=0), ce)
    torch.testing.assert_close(focal_loss(z, y, torch.ones_like(m), torch.zeros_like(chi)), ce)
    assert focal_loss(z, y, m, torch.ones_like(chi)) == 0


@quick
@given(seeds, sizes, st.booleans())
def test_gradient_is_that_of_cross_entropy_scaled_by_a_constant(seed, size, average):
    z, y, m, chi = batch(seed, size)
    z.requires_grad_()
    if average: m = batch_confidence(m)
    grad, = torch.autograd.grad(focal_loss(z, y, m, chi), z)
    kept = y != IGNORE_INDEX
    c = torch.where(kept, y, 0)
    scale = m * (1 - chi[c]) ** 3 * kept / y.numel()
    expected = scale[:, None] * (z.softmax(1) - F.one_hot(c, size[1]).movedim(-1, 1))
    torch.testing.assert_close(grad, expected, atol=1e-6, rtol=1e-4)
    assert not grad.movedim(1, -1)[~kept].any()


@quick
@given(seeds, sizes)
def test_renaming_classes_and_moving_pixels_change_nothing(seed, size):
    z, y, m, chi = batch(seed, size)
    order = torch.randperm(size[1], generator=generator(seed, "classes"))
    renamed = torch.where(y == IGNORE_INDEX, y, order.argsort()[y.clamp(max=size[1] - 1)])
    loss = focal_loss(z, y, m, chi)
    torch.testing.assert_close(focal_loss(z[:, order], renamed, m, chi[order]), loss)
    torch.testing.assert_close(focal_loss(z.flip(-1), y.flip(-1), m.flip(-1), chi), loss)


@quick
@given(seeds, sizes.filter(lambda s: s[0] > 1), st.floats(0, 1))
def test_batch_is_the_mean_of_its_images(seed, size, scale):
    z, y, m, chi = batch(seed, size)
    parts = [slice(b, b + 1) for b in range(size[0])]
    each = torch.stack([focal_loss(z[b], y[b], m[b], chi) for b in parts])
    torch.testing.assert_close(focal_loss(z, y, m, chi), each.mean())
    torch.testing.assert_close(focal_loss(z, y, scale * m, chi), scale * each.mean())


@quick
@given(seeds, sizes)
def test_average_confidence_is_the_broadcast_product(seed, size):
    z, y, m, chi = batch(seed, size)
    pixel = F.cross_entropy(z, y, (1 - chi) ** 3, ignore_index=IGNORE_INDEX, reduction="none")
    broadcast = (m[:, None] * pixel).mean()                            # (B, 1, H, W) * (B, H, W)
    torch.testing.assert_close(focal_loss(z, y, batch_confidence(m), chi), broadcast)


def test_the_table_of_confidences():
    m = torch.rand(3, 4, 5, generator=generator(0))
    expected = {"pixel": m, "batch": m.mean(0).expand(3, 4, 5), "none": torch.ones(3, 4, 5)}
    assert CONFIDENCES.keys() == expected.keys()
    for name, weigh in CONFIDENCES.items():
        assert torch.equal(weigh(m, lambda x: x), expected[name])
    twice = batch_confidence(m, reduce=lambda x: 2 * x)                # the mean over processes
    torch.testing.assert_close(twice, 2 * expected["batch"])


def test_the_function_that_takes_the_mean_is_a_parameter():
    z, y, m, chi = batch(0, (2, 4, 3, 3))
    weight = focal_loss(z, y, m, chi, loss_of=lambda logits, labels, weight: weight)
    kept = y != IGNORE_INDEX
    torch.testing.assert_close(weight[kept], (m * (1 - chi[y.where(kept, 0)]) ** 3)[kept])


def test_no_labels_no_loss_no_nan():
    z, y, m, chi = batch(0, (2, 4, 3, 3), ignored=2.)
    z.requires_grad_()
    loss = focal_loss(z, y, m, chi)
    grad, = torch.autograd.grad(loss, z)
    assert loss == 0 and not grad.any()


def test_extreme_logits_and_short_formats_are_computed_in_float32():
    z = torch.tensor([1e4, -1e4]).view(1, 2, 1, 1)
    y, one = torch.ones(1, 1, 1, dtype=torch.int64), torch.ones(1, 1, 1)
    assert focal_loss(z, y, one, torch.zeros(2)) == 2e4
    z, y, m, chi = batch(1, (2, 5, 4, 4))
    low = focal_loss(z.bfloat16(), y, m, chi)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, focal_loss(z.bfloat16().float(), y, m, chi))


def test_shapes_that_would_broadcast_are_refused():
    z, y, m, chi = batch(0, (2, 5, 4, 4))
    for confidence, prior, words in ((m, chi[:4], r"chi has shape \(4,\), expected \(5,\)"),
                                     (m, chi[0], "chi"),
                                     (m[:, None], chi, "differ in shape"),
                                     (m[:1], chi, "differ in shape")):
        with pytest.raises(ValueError, match=words): focal_loss(z, y, confidence, prior)


# ---------------------------------------------------------------- frequencies and weights

@quick
@given(seeds, sizes)
def test_frequencies_are_shares(seed, size):
    z, y, _, _ = batch(seed, size)
    C, soft = size[1], class_frequency(z.softmax(1), size[1])
    assert soft.sum().item() == pytest.approx(1, abs=1e-5)
    each = torch.stack([class_frequency(x, C) for x in z.softmax(1)])
    torch.testing.assert_close(soft, each.mean(0))
    hard = class_frequency(y, C)
    kept = (y != IGNORE_INDEX).sum().item()
    for c in range(C): assert hard[c].item() == pytest.approx((y == c).sum().item() / max(kept, 1))
    for dtype in (torch.uint8, torch.int32):
        torch.testing.assert_close(class_frequency(y.to(dtype), C), hard)
    sure = F.one_hot(z.argmax(1), C).movedim(-1, 1).float()
    torch.testing.assert_close(class_frequency(sure, C), class_frequency(z.argmax(1), C))


def rows_of(C): return st.lists(st.integers(0, 7), min_size=C, max_size=C)


tables = st.integers(1, 5).flatmap(                                    # small counts, N rows of C
    lambda C: st.lists(rows_of(C), min_size=1, max_size=8))


@quick
@given(tables, st.integers(0, 8), st.sets(st.integers(0, 4)))
def test_weights_equal_exact_fractions(table, eighths, ignore):
    N, C, u = len(table), len(table[0]), Fraction(eighths, 8)
    ignore = {c for c in ignore if c < C}
    weights = sampling_weights(torch.tensor(table).float(), uniform=float(u), ignore=ignore)
    assert weights.shape == (C, N) and weights.dtype == torch.float64
    for c in range(C):
        total = sum(row[c] for row in table)
        for n in range(N):
            exact = Fraction(1, N)
            if total and c not in ignore: exact = (1 - u) * Fraction(table[n][c], total) + u / N
            assert weights[c, n].item() == pytest.approx(float(exact), abs=1e-14)
    torch.testing.assert_close(weights.sum(1), torch.ones(C).double())


@quick
@given(tables)
def test_weights_leave_their_input_alone_and_do_not_depend_on_its_scale(table):
    frequency = torch.tensor(table).double()
    before = frequency.clone()
    weights = sampling_weights(frequency, ignore=[0])
    assert torch.equal(frequency, before)
    torch.testing.assert_close(sampling_weights(7 * frequency, ignore=[0]), weights)


def test_refusals():
    for values, C, words in ((torch.rand(4, 3, 3), 5, "expected"), (torch.rand(5), 5, "expected"),
                             (torch.tensor([[33, 0]]), 19, "33 is no class")):
        with pytest.raises(ValueError, match=words): class_frequency(values, C)
    with pytest.raises(UserError, match="1.5"): sampling_weights(torch.ones(2, 2), uniform=1.5)
    for bad in (-1., float("nan")):
        frequency = torch.tensor([[bad, 1.]])
        with pytest.raises(ValueError, match="frequencies"): sampling_weights(frequency)


# ---------------------------------------------------------------- drawing

@quick
@given(seeds, st.integers(0, 10 ** 6), st.integers(0, 15))
def test_draw_is_a_function_of_the_key(seed, step, slot):
    weights = sampling_weights(torch.rand(30, 6, generator=generator(seed)))
    key = (seed, "sac", step, slot)
    first = draw(weights, generator(*key))
    draw(weights, generator(seed, "sac", step, slot + 1))
    torch.rand(5)                                              # the global generator: no part in it
    assert draw(weights, generator(*key)) == first
    assert 0 <= first < 30


@quick
@given(seeds, st.lists(st.sampled_from([0., 1e-12, .1, 1., 1e6]), min_size=1, max_size=12)
       .filter(any))
def test_images_without_weight_are_never_drawn(seed, row):
    weights, g = torch.tensor([row]).double(), generator(seed)
    assert all(row[draw(weights, g, label=0)] > 0 for _ in range(20))


@pytest.mark.parametrize("point, image", [(0., 1), (1 / 6, 2), (.5, 3), (1 - 2 ** -53, 3)])
def test_the_points_of_the_line(monkeypatch, point, image):
    "From the least to the largest number of `torch.rand`; an end belongs to the next image."
    drawn = torch.tensor(point, dtype=torch.float64)
    monkeypatch.setattr(torch, "rand", lambda *size, **kwargs: drawn)
    assert draw(torch.tensor([[0., 1., 2., 3., 0.]]).double(), generator(0), label=0) == image


@pytest.mark.parametrize("label", [None, 2])
def test_law_of_large_numbers(label):
    frequency = torch.tensor([[4., 0, 1], [1, 0, 0], [0, 2, 0], [5, 0, 3]])
    weights, n = sampling_weights(frequency), 8000
    p = weights.mean(0) if label is None else weights[label]
    g = generator(0, "many")
    drawn = torch.tensor([draw(weights, g, label) for _ in range(n)])
    seen = torch.bincount(drawn, minlength=4) / n
    assert ((seen - p).abs() < 5 * (p * (1 - p) / n).sqrt()).all()


def test_classes_in_turn_have_the_same_distribution_as_classes_at_random():
    weights, n = sampling_weights(torch.rand(5, 3, generator=generator(0)) ** 4), 9000
    p = weights.mean(0)
    drawn = torch.tensor([draw(weights, generator(0, k), label=k % 3) for k in range(n)])
    seen = torch.bincount(drawn, minlength=5) / n
    assert ((seen - p).abs() < 5 * (p * (1 - p) / n).sqrt()).all()


# ---------------------------------------------------------------- the order of images

@quick
@given(st.integers(1, 12), st.integers(5, 40), st.integers(0, 9), st.integers(0, 5))
def test_order_of_images(batch, n, step, seed):
    def pick(step, slot): return epoch_index(seed, "abn", step, slot, batch, n)

    def sampler(start, slots=range(batch)): return StepSampler(start, step + 3, slots, pick)

    walk = [pick(k, slot) for k in range(-(-2 * n // batch)) for slot in range(batch)]
    for epoch in range(2): assert sorted(walk[epoch * n:(epoch + 1) * n]) == list(range(n))
    batches = list(sampler(0))
    assert list(sampler(step)) == batches[step:] and len(sampler(step)) == 3
    for P in (p for p in range(1, batch + 1) if batch % p == 0):       # processes
        slots = [range(p * batch // P, (p + 1) * batch // P) for p in range(P)]
        shares = [list(sampler(0, mine)) for mine in slots]
        assert [sum(parts, []) for parts in zip(*shares)] == batches


def test_streams_and_epochs_have_their_own_order():
    def order(seed, stage, epoch):
        return [epoch_index(seed, stage, epoch, slot, 50, 50) for slot in range(50)]

    keys = (0, "abn", 0), (0, "abn", 1), (0, "sac", 0), (1, "abn", 0)
    orders = [order(*key) for key in keys]
    assert all(a != b for a, b in itertools.combinations(orders, 2))
    assert orders[0] == order(0, "abn", 0)


@quick
@given(st.integers(0, 50), st.integers(0, 7), st.integers(1, 8), st.integers(1, 30))
def test_slots_are_numbered_through_whatever_the_batch_size(step, slot, batch, n):
    slot = slot % batch
    number = step * batch + slot
    assert epoch_index(0, "abn", step, slot, batch, n) == epoch_index(0, "abn", number, 0, 1, n)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")      # more workers than cores
def test_indices_do_not_depend_on_workers():
    dataset = [{"index": i} for i in range(10)]

    def pick(step, slot): return epoch_index(1, "sac", step, slot, 3, 10)

    def indices(workers):
        sampler = StepSampler(0, 4, range(3), pick)
        loader = DataLoader(dataset, batch_sampler=sampler, num_workers=workers)
        return [batch["index"].tolist() for batch in loader]

    assert indices(0) == indices(1) == indices(3)


def test_no_order_touches_the_global_generator():
    weights = sampling_weights(torch.rand(6, 3, generator=generator(0)))
    before = torch.get_rng_state()
    epoch_index(0, "sac", 5, 1, 4, 10)
    draw(weights, generator(0, "sac image", 5, 1))
    assert torch.equal(before, torch.get_rng_state())
