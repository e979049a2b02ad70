"The class prior, the threshold and the pseudo labels: against loops, and at their limits."
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sac_lit.core import generator, IGNORE_INDEX
from sac_lit.moving_threshold import (
    class_peaks,
    ClassPrior,
    keep_confident,
    pseudo_labels,
    thresholds,
)

quick = settings(deadline=None, derandomize=True, max_examples=40)
seeds = st.integers(0, 2 ** 31)
B, C, side = st.integers(1, 3), st.integers(2, 6), st.integers(1, 5)
sizes = st.tuples(B, C, side, side)                                    # of (B, C, H, W)
zetas, betas, floors = st.floats(.1, 1), st.floats(1e-4, 1e-1), st.sampled_from([0., .1, .2, .6])


def batch(seed, size):
    "Probabilities, a prior, and a mask."
    g, (B, C, H, W) = generator(seed, "batch"), size
    probs = (2 * torch.randn(*size, generator=g)).softmax(1)
    chi = .05 * torch.rand(C, generator=g) ** 3
    return probs, chi, torch.rand(B, H, W, generator=g) < .7


# ---------------------------------------------------------------- prior

@quick
@given(seeds, sizes, st.floats(0, 1), st.integers(1, 4))
def test_prior_is_a_moving_average_that_copies_the_first_batch(seed, size, momentum, steps):
    prior, chi = ClassPrior(size[1], momentum), None
    for step in range(steps):
        probs, _, _ = batch(seed + step, size)
        share = probs.double().mean((0, 2, 3))
        prior.update(probs)
        chi = share if chi is None else momentum * chi + (1 - momentum) * share
    torch.testing.assert_close(prior.chi.double(), chi, atol=1e-6, rtol=1e-5)
    assert prior.updates == steps and not list(prior.parameters())


@quick
@given(seeds, sizes)
def test_prior_takes_groups_of_views_and_single_maps(seed, size):
    probs, _, _ = batch(seed, size)
    flat, grouped = ClassPrior(size[1]), ClassPrior(size[1])
    flat.update(probs)
    grouped.update(probs[:, None])
    torch.testing.assert_close(flat.chi, grouped.chi)
    flat, alone = ClassPrior(size[1]), ClassPrior(size[1])
    flat.update(probs[:1])
    alone.update(probs[0])
    torch.testing.assert_close(flat.chi, alone.chi)


@quick
@given(seeds, st.integers(1, 4), st.integers(1, 3))
def test_prior_of_several_processes_is_that_of_the_whole_batch(seed, processes, share):
    probs, _, _ = batch(seed, (processes * share, 5, 4, 6))
    parts = probs.split(share)
    mean = torch.stack([p.mean((0, 2, 3)) for p in parts]).mean(0)
    whole, part = ClassPrior(5), ClassPrior(5)
    for _ in range(2):
        whole.update(probs)
        part.update(parts[0], reduce=lambda mine: mean)
    torch.testing.assert_close(part.chi, whole.chi)


def test_chi_before_the_first_update_and_what_the_first_thresholds_see():
    prior = ClassPrior(3, init=1e-3)
    assert prior.chi.tolist() == pytest.approx([1e-3] * 3) and prior.updates == 0
    prior.update(torch.tensor([.995, .005, 0.]).view(1, 3, 1, 1))
    torch.testing.assert_close(prior.chi, torch.tensor([.995, .005, .99e-3]))
    first = thresholds(torch.ones(1, 3), prior.chi)[0]                 # not those of `init`
    full, lowered = .75, .75 * -math.expm1(-.99)
    assert first.tolist() == pytest.approx([full, .75 * -math.expm1(-5), lowered])


def test_a_class_that_the_first_batch_lacks_keeps_its_start_and_decays():
    probs = torch.zeros(1, 3, 2, 2)
    probs[:, 0] = 1
    prior = ClassPrior(3, momentum=.9, init=.01)
    for k in range(1, 4):
        prior.update(probs)
        torch.testing.assert_close(prior.chi, torch.tensor([1., .01 * .9 ** k, .01 * .9 ** k]))
    probs[:] = torch.tensor([0., 1, 0]).view(3, 1, 1)                  # found later: no copy
    before = prior.chi.clone()
    prior.update(probs)
    torch.testing.assert_close(prior.chi, .9 * before + torch.tensor([0., .1, 0]))


def test_prior_survives_saving_in_the_midst_of_a_run(tmp_path):
    batches = [batch(k, (2, 4, 3, 5))[0] for k in range(4)]
    straight, saved, resumed = ClassPrior(4), ClassPrior(4), ClassPrior(4, init=.5)
    for p in batches: straight.update(p)
    for p in batches[:2]: saved.update(p)
    torch.save(saved.state_dict(), tmp_path / "prior.pt")
    resumed.load_state_dict(torch.load(tmp_path / "prior.pt", weights_only=True))
    for p in batches[2:]: resumed.update(p)
    assert torch.equal(resumed.chi, straight.chi)
    assert torch.equal(resumed.updates, straight.updates)


def test_prior_is_float32_whatever_comes_in_and_carries_no_graph():
    probs, prior = torch.full((1, 2, 512, 512), .5, dtype=torch.bfloat16), ClassPrior(2)
    prior.update(probs.requires_grad_())
    torch.testing.assert_close(prior.chi, torch.tensor([.5, .5]))      # a bfloat16 sum ends at 256
    assert prior.chi.dtype == torch.float32 and not prior.chi.requires_grad


# ---------------------------------------------------------------- threshold

@quick
@given(st.floats(0, 1), st.floats(0, 1), zetas, betas, floors)
def test_threshold_is_equation_3(peak, chi, zeta, beta, floor):
    expected = max(floor, zeta * -math.expm1(-chi / beta) * peak)
    peaks = torch.full((1, 1), peak, dtype=torch.float64)
    prior = torch.full((1,), chi, dtype=torch.float64)
    got = thresholds(peaks, prior, zeta, beta, floor)
    assert got.item() == pytest.approx(expected, rel=1e-12)
    assert floor <= got.item() <= max(floor, zeta * peak)


@quick
@given(seeds, zetas, betas)
def test_threshold_grows_with_the_prior_and_scales_with_the_peak(seed, zeta, beta):
    chi = torch.rand(30, generator=generator(seed)).sort().values
    peak = torch.rand(4, 1, generator=generator(seed, "peak")).expand(4, 30)
    limit = thresholds(peak, chi, zeta, beta)
    assert (limit.diff(dim=1) >= 0).all()
    torch.testing.assert_close(thresholds(peak / 2, chi, zeta, beta), limit / 2)


# ---------------------------------------------------------------- pseudo labels

@quick
@given(seeds, sizes, zetas, betas, floors)
def test_labels_are_those_of_loops_over_pixels(seed, size, zeta, beta, floor):
    probs, chi, valid = batch(seed, size)
    labels, confidence = pseudo_labels(probs, chi, zeta, beta, floor, valid)
    assert labels.dtype == torch.int64 and labels.shape == confidence.shape == valid.shape
    for n in range(size[0]):
        pixels = [(i, j) for i in range(size[2]) for j in range(size[3])]
        best = {p: probs[n, :, *p].argmax().item() for p in pixels if valid[n, *p]}
        peak = {}
        for p, c in best.items(): peak[c] = max(peak.get(c, 0.), probs[n, c, *p].item())
        for p in pixels:
            if p not in best:
                assert labels[n, *p] == IGNORE_INDEX and confidence[n, *p] == 0
                continue
            c = best[p]
            m = probs[n, c, *p].item()
            limit = max(floor, zeta * -math.expm1(-chi[c].item() / beta) * peak[c])
            assert confidence[n, *p].item() == m
            if abs(m - limit) > 1e-6: assert labels[n, *p] == (c if m > limit else IGNORE_INDEX)


@quick
@given(seeds, sizes)
def test_peaks_are_maxima_where_the_class_is_dominant(seed, size):
    probs, _, _ = batch(seed, size)
    confidence, dominant = probs.max(1)
    peaks = class_peaks(confidence, dominant, size[1])
    mine = [torch.where(dominant == c, confidence, 0.) for c in range(size[1])]
    expected = torch.stack([x.amax((1, 2)) for x in mine], 1)
    assert torch.equal(peaks, expected)
    everywhere = probs.amax((2, 3))
    assert (peaks <= everywhere).all()  # the printed peak is never lower
    assert torch.equal(peaks[everywhere > .5], everywhere[everywhere > .5])


@quick
@given(seeds, sizes)
def test_limits(seed, size):
    probs, chi, _ = batch(seed, size)
    everything, confidence = pseudo_labels(probs, torch.zeros_like(chi))
    assert torch.equal(everything, probs.argmax(1))
    assert torch.equal(confidence, probs.amax(1))
    strict, _ = pseudo_labels(probs, torch.ones_like(chi), zeta=1.)
    assert (strict == IGNORE_INDEX).all()                              # not even the peak
    assert (pseudo_labels(probs, chi, floor=1.)[0] == IGNORE_INDEX).all()
    unseen = torch.zeros(size[0], *size[2:], dtype=torch.bool)
    nothing, zero = pseudo_labels(probs, chi, valid=unseen)
    assert (nothing == IGNORE_INDEX).all() and not zero.any()


@quick
@given(seeds, sizes)
def test_samples_and_directions_are_independent(seed, size):
    probs, chi, valid = batch(seed, size)
    labels, _ = pseudo_labels(probs, chi, valid=valid)
    assert torch.equal(pseudo_labels(probs[:1], chi, valid=valid[:1])[0], labels[:1])
    mirrored, _ = pseudo_labels(probs.flip(-1), chi, valid=valid.flip(-1))
    assert torch.equal(mirrored, labels.flip(-1))
    rarer, _ = pseudo_labels(probs, chi / 2, valid=valid)              # it keeps all that it had
    assert ((rarer != IGNORE_INDEX) >= (labels != IGNORE_INDEX)).all()


def test_the_parts_are_the_whole():
    probs, chi, valid = batch(0, (3, 5, 4, 6))
    confidence, dominant = probs.max(1)
    labels, _ = pseudo_labels(probs, chi, .8, 1e-2, .1, valid)
    assert torch.equal(keep_confident(confidence * valid, dominant, chi, .8, 1e-2, .1), labels)


def test_labels_carry_no_graph_and_a_sample_may_lack_a_class():
    probs = torch.eye(3)[None, :, :, None].requires_grad_()            # (1, 3, 3, 1)
    labels, confidence = pseudo_labels(probs[:, :, :2], torch.ones(3))
    assert labels.flatten().tolist() == [0, 1] and not confidence.requires_grad


@pytest.mark.parametrize("call, words", [
    (lambda m, chi, valid: ClassPrior(19).update(m), r"expected \(..., 19, H, W\)"),
    (lambda m, chi, valid: pseudo_labels(m, torch.ones(19)),
     r"chi has shape \(19,\), expected \(5,\)"),
    (lambda m, chi, valid: pseudo_labels(m, chi[:1]), r"chi has shape \(1,\), expected \(5,\)"),
    (lambda m, chi, valid: pseudo_labels(m, chi, valid=valid[:, None]), "valid has shape")])
def test_shapes_that_would_broadcast_are_refused(call, words):
    with pytest.raises(ValueError, match=words): call(*batch(0, (2, 5, 3, 4)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_agrees_with_cpu():
    probs, chi, valid = batch(0, (3, 6, 40, 50))
    labels, confidence = pseudo_labels(probs, chi, valid=valid)
    on_gpu = pseudo_labels(probs.cuda(), chi.cuda(), valid=valid.cuda())
    assert torch.equal(on_gpu[0].cpu(), labels)
    assert torch.equal(on_gpu[1].cpu(), confidence)
    prior, prior_gpu = ClassPrior(6), ClassPrior(6).cuda()
    prior.update(probs)
    prior_gpu.update(probs.cuda())
    torch.testing.assert_close(prior_gpu.chi.cpu(), prior.chi)
