"The focal loss against a slow version and its own symmetries; importance sampling against exact arithmetic."
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from sac_lit.core import IGNORE_INDEX, UserError, generator
from sac_lit.focal_loss import batch_confidence, focal_loss
from sac_lit.importance_sampling import class_frequency, draw, sampling_weights

quick = settings(deadline=None, derandomize=True, max_examples=40)
seeds = st.integers(0, 2 ** 31)
sizes = st.tuples(st.integers(1, 3), st.integers(2, 6), st.integers(1, 5), st.integers(1, 5))  # B, C, H, W


def batch(seed, size, ignored=.3, dtype=torch.float32):
    B, C, H, W = size
    g = generator(seed, "batch")
    labels = torch.randint(C, (B, H, W), generator=g)
    labels[torch.rand(B, H, W, generator=g) < ignored] = IGNORE_INDEX
    return 3 * torch.randn(*size, generator=g, dtype=dtype), labels, torch.rand(B, H, W, generator=g), torch.rand(C, generator=g)


# ---------------------------------------------------------------- focal loss

@quick
@given(seeds, sizes, st.floats(0, 8))
def test_loss_equals_the_equation_pixel_by_pixel(seed, size, lam):
    z, y, m, chi = batch(seed, size)
    logp, total = z.double().log_softmax(1), 0.
    for b, i, j in torch.cartesian_prod(*(torch.arange(n) for n in y.shape)).tolist():
        c = y[b, i, j].item()
        if c != IGNORE_INDEX: total -= m[b, i, j].item() * (1 - chi[c].item()) ** lam * logp[b, c, i, j].item()
    assert focal_loss(z, y, m, chi, lam).item() == pytest.approx(total / y.numel(), rel=1e-4, abs=1e-6)


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
    each = torch.stack([focal_loss(z[b:b + 1], y[b:b + 1], m[b:b + 1], chi) for b in range(size[0])])
    torch.testing.assert_close(focal_loss(z, y, m, chi), each.mean())
    torch.testing.assert_close(focal_loss(z, y, scale * m, chi), scale * each.mean())   # linear in the confidence


@quick
@given(seeds, sizes)
def test_average_confidence_is_the_broadcast_product(seed, size):
    z, y, m, chi = batch(seed, size)
    pixel = F.cross_entropy(z, y, (1 - chi) ** 3, ignore_index=IGNORE_INDEX, reduction="none")
    torch.testing.assert_close(focal_loss(z, y, batch_confidence(m), chi), (m[:, None] * pixel).mean())


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
    with pytest.raises(ValueError, match=r"chi has shape \(4,\), expected \(5,\)"): focal_loss(z, y, m, chi[:4])
    with pytest.raises(ValueError, match="chi"): focal_loss(z, y, m, chi[0])
    with pytest.raises(ValueError, match="differ in shape"): focal_loss(z, y, m[:, None], chi)
    with pytest.raises(ValueError, match="differ in shape"): focal_loss(z, y, m[:1], chi)


# ---------------------------------------------------------------- frequencies and weights

@quick
@given(seeds, sizes)
def test_frequencies_are_shares(seed, size):
    z, y, _, _ = batch(seed, size)
    C, soft = size[1], class_frequency(z.softmax(1), size[1])
    assert soft.sum().item() == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(soft, torch.stack([class_frequency(x, C) for x in z.softmax(1)]).mean(0))
    hard = class_frequency(y, C)
    kept = (y != IGNORE_INDEX).sum().item()
    for c in range(C): assert hard[c].item() == pytest.approx((y == c).sum().item() / max(kept, 1))
    for dtype in (torch.uint8, torch.int32): torch.testing.assert_close(class_frequency(y.to(dtype), C), hard)
    sure = F.one_hot(z.argmax(1), C).movedim(-1, 1).float()
    torch.testing.assert_close(class_frequency(sure, C), class_frequency(z.argmax(1), C))


tables = st.integers(1, 5).flatmap(lambda C: st.lists(
    st.lists(st.integers(0, 7), min_size=C, max_size=C), min_size=1, max_size=8))   # small counts, N rows of C


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
            exact = Fraction(1, N) if total == 0 or c in ignore else (1 - u) * Fraction(table[n][c], total) + u / N
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
    with pytest.raises(ValueError, match="expected"): class_frequency(torch.rand(4, 3, 3), 5)
    with pytest.raises(ValueError, match="expected"): class_frequency(torch.rand(5), 5)
    with pytest.raises(ValueError, match="33 is no class"): class_frequency(torch.tensor([[33, 0]]), 19)
    with pytest.raises(UserError, match="1.5"): sampling_weights(torch.ones(2, 2), uniform=1.5)
    for bad in (-1., float("nan")):
        with pytest.raises(ValueError, match="frequencies"): sampling_weights(torch.tensor([[bad, 1.]]))


# ---------------------------------------------------------------- drawing

@quick
@given(seeds, st.integers(0, 10 ** 6), st.integers(0, 15))
def test_draw_is_a_function_of_the_key(seed, step, slot):
    weights = sampling_weights(torch.rand(30, 6, generator=generator(seed)))
    key = (seed, "sac", step, slot)
    first = draw(weights, generator(*key))
    draw(weights, generator(seed, "sac", step, slot + 1))
    torch.rand(5)                                              # the global generator has no part in it
    assert draw(weights, generator(*key)) == first
    assert 0 <= first < 30


@quick
@given(seeds, st.lists(st.sampled_from([0., 1e-12, .1, 1., 1e6]), min_size=1, max_size=12).filter(any))
def test_images_without_weight_are_never_drawn(seed, row):
    weights, g = torch.tensor([row]).double(), generator(seed)
    assert all(row[draw(weights, g, label=0)] > 0 for _ in range(20))


@pytest.mark.parametrize("point, image", [(0., 1), (1 / 6, 2), (.5, 3), (1 - 2 ** -53, 3)])
def test_the_points_of_the_line(monkeypatch, point, image):
    "From the smallest to the largest number that `torch.rand` can give; an end belongs to the next image."
    monkeypatch.setattr(torch, "rand", lambda *size, **kwargs: torch.tensor(point, dtype=torch.float64))
    assert draw(torch.tensor([[0., 1., 2., 3., 0.]]).double(), generator(0), label=0) == image


@pytest.mark.parametrize("label", [None, 2])
def test_law_of_large_numbers(label):
    weights, n = sampling_weights(torch.tensor([[4., 0, 1], [1, 0, 0], [0, 2, 0], [5, 0, 3]])), 8000
    p = weights.mean(0) if label is None else weights[label]
    g = generator(0, "many")
    seen = torch.bincount(torch.tensor([draw(weights, g, label) for _ in range(n)]), minlength=4) / n
    assert ((seen - p).abs() < 5 * (p * (1 - p) / n).sqrt()).all()


def test_classes_in_turn_have_the_same_distribution_as_classes_at_random():
    weights, n = sampling_weights(torch.rand(5, 3, generator=generator(0)) ** 4), 9000
    p = weights.mean(0)
    seen = torch.bincount(torch.tensor([draw(weights, generator(0, k), label=k % 3) for k in range(n)]), minlength=5) / n
    assert ((seen - p).abs() < 5 * (p * (1 - p) / n).sqrt()).all()
