"Affine maps and the fusion of views: against exact arithmetic, against the obvious version, and their symmetries."
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torchvision.transforms.v2.functional import resized_crop

from sac_lit.core import generator
from sac_lit.crop_fusion import POOLS, crop_theta, fuse, invert_theta, warp

quick = settings(deadline=None, derandomize=True, max_examples=30)
seeds = st.integers(0, 2 ** 31)
pools = st.sampled_from(sorted(POOLS))


@st.composite
def frames(draw, overhang=0):
    "A canvas, and a box of whole pixels that lies on it (or hangs over by at most `overhang`)."
    H, W = draw(st.integers(2, 12)), draw(st.integers(2, 12))
    top, left = draw(st.integers(-overhang, H - 1)), draw(st.integers(-overhang, W - 1))
    height, width = draw(st.integers(max(1, 1 - top), H + overhang - top)), draw(st.integers(max(1, 1 - left), W + overhang - left))
    return (H, W), (top, left, height, width), draw(st.booleans())


def group(seed, B=2, T=3, C=4, size=(8, 12), whole=True, dtype=torch.float32):
    "Softmax of T views with random boxes, the first of which is the whole canvas."
    g, (H, W) = generator(seed, "group"), size
    height, width = torch.randint(H // 2, H + 1, (B, T), generator=g), torch.randint(W // 2, W + 1, (B, T), generator=g)
    top, left = (torch.rand(B, T, generator=g) * (H - height + 1)).long(), (torch.rand(B, T, generator=g) * (W - width + 1)).long()
    if whole: top[:, 0], left[:, 0], height[:, 0], width[:, 0] = 0, 0, H, W
    theta = crop_theta(top, left, height, width, size, torch.rand(B, T, generator=g) < .5)
    return (2 * torch.randn(B, T, C, H, W, generator=g, dtype=dtype)).softmax(2), theta


def square(theta):
    return torch.cat([theta, theta.new_tensor([[0, 0, 1]]).expand(*theta.shape[:-2], 1, 3)], -2)


# ---------------------------------------------------------------- maps

@quick
@given(frames(overhang=3))
def test_theta_takes_corners_of_the_view_to_corners_of_the_box(frame):
    (H, W), (top, left, height, width), flip = frame
    theta = crop_theta(top, left, height, width, (H, W), flip)
    for x, y in ((-1, -1), (1, -1), (-1, 1), (1, 1)):
        column = left + width * ((x == 1) != flip)                     # of the box, in pixels of the canvas
        row = top + height * (y == 1)
        expected = [float(Fraction(2 * column, W) - 1), float(Fraction(2 * row, H) - 1)]
        torch.testing.assert_close(theta @ torch.tensor([x, y, 1.]), torch.tensor(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (0, 4)])
def test_theta_of_tensors_is_that_of_numbers(shape):
    g = generator(0, "boxes")
    boxes = torch.randint(1, 9, (*shape, 4), generator=g)
    flips = torch.rand(shape, generator=g) < .5
    theta = crop_theta(*boxes.unbind(-1), (9, 17), flips)
    assert theta.shape == (*shape, 2, 3) and theta.dtype == torch.float32
    for one, box, flip in zip(theta.reshape(-1, 2, 3), boxes.reshape(-1, 4), flips.reshape(-1)):
        assert torch.equal(one, crop_theta(*box.tolist(), (9, 17), bool(flip)))


@quick
@given(seeds)
def test_inverse_is_exact_for_any_affine_map(seed):
    theta = torch.randn(2, 3, 2, 3, generator=generator(seed, "affine"), dtype=torch.float64)
    theta[..., :2] += 4 * torch.eye(2)
    both = square(theta) @ square(invert_theta(theta))
    torch.testing.assert_close(both, torch.eye(3, dtype=torch.float64).expand(2, 3, 3, 3), atol=1e-12, rtol=0)
    torch.testing.assert_close(invert_theta(invert_theta(theta)), theta)


# ---------------------------------------------------------------- warping

@quick
@given(frames(), seeds, st.sampled_from(["bilinear", "nearest"]))
def test_boxes_of_whole_pixels_are_cut_and_pasted_exactly(frame, seed, mode):
    size, (top, left, height, width), flip = frame
    x = torch.rand(1, 2, *size, generator=generator(seed, "image"))
    theta = crop_theta(top, left, height, width, size, flip)[None]
    cut = warp(x, theta, (height, width), mode)
    inside = x[..., top:top + height, left:left + width]
    torch.testing.assert_close(cut, inside.flip(-1) if flip else inside, atol=1e-5, rtol=0)
    pasted = torch.zeros_like(x)
    pasted[..., top:top + height, left:left + width] = inside
    torch.testing.assert_close(warp(cut, invert_theta(theta), size, mode), pasted, atol=1e-5, rtol=0)


@quick
@given(st.integers(8, 24), st.integers(8, 24), seeds, st.booleans())
def test_enlarged_crops_are_those_of_torchvision_away_from_the_rim(H, W, seed, flip):
    g = generator(seed, "crop")
    height, width = (int(torch.randint((n + 1) // 2, n + 1, (), generator=g)) for n in (H, W))     # enlarged at most twice
    top, left = (int(torch.randint(0, n + 1, (), generator=g)) for n in (H - height, W - width))
    x = torch.rand(1, 3, H, W, generator=g)
    expected = resized_crop(x, top, left, height, width, [H, W], antialias=False)
    view = warp(x, crop_theta(top, left, height, width, (H, W), flip)[None], (H, W))
    inner = (..., slice(1, -1), slice(1, -1))                          # at the rim torchvision repeats the last pixel of the box
    torch.testing.assert_close(view[inner], (expected.flip(-1) if flip else expected)[inner], atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.uint8])
def test_warp_never_computes_in_less_than_the_precision_of_theta(dtype):
    x = torch.randint(0, 2, (1, 1, 6, 300), generator=generator(0)).to(dtype)      # bfloat16 could not tell 300 columns apart
    same = warp(x, torch.eye(2, 3)[None], (6, 300))
    assert same.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(same, x.to(same.dtype), atol=1e-4, rtol=0)


# ---------------------------------------------------------------- fusion

@quick
@given(seeds, pools)
def test_fused_is_a_distribution_where_seen_and_nothing_elsewhere(seed, pool):
    probs, theta = group(seed, whole=False)
    valid = torch.rand(*probs.shape[:2], *probs.shape[3:], generator=generator(seed, "valid")) < .6
    fused, seen = fuse(probs, theta, valid, pool=pool)
    assert fused.shape == probs.shape and seen.dtype == torch.bool and seen.shape == valid.shape
    torch.testing.assert_close(fused.sum(2), seen.float(), atol=1e-5, rtol=0)
    assert fused.min() >= 0


@quick
@given(seeds, pools)
def test_with_the_whole_canvas_every_pixel_is_seen(seed, pool):
    assert fuse(*group(seed), pool=pool)[1].all()


@quick
@given(seeds, pools, st.booleans())
def test_one_whole_view_comes_back_as_it_went_in(seed, pool, flip):
    probs, _ = group(seed, T=1)
    theta = crop_theta(0, 0, 8, 12, (8, 12), flip).expand(2, 1, 2, 3)
    torch.testing.assert_close(fuse(probs, theta, pool=pool)[0], probs, atol=1e-5, rtol=0)


@quick
@given(seeds, pools)
def test_what_all_views_agree_on_stays(seed, pool):
    probs, theta = group(seed)
    constant = probs[:1, :1, :, :1, :1].expand_as(probs)
    torch.testing.assert_close(fuse(constant, theta, pool=pool)[0], constant, atol=1e-5, rtol=0)


@quick
@given(seeds, st.permutations(range(3)))
def test_order_of_views_and_of_groups_has_no_meaning(seed, order):
    probs, theta = group(seed)
    fused, seen = fuse(probs, theta)
    again, seen_again = fuse(probs[:, order], theta[:, order])
    torch.testing.assert_close(again, fused[:, order], atol=1e-5, rtol=0)
    assert torch.equal(seen_again, seen[:, order])
    torch.testing.assert_close(fuse(probs[1:], theta[1:])[0], fused[1:], atol=1e-6, rtol=0)


@quick
@given(seeds)
def test_mirroring_a_view_and_saying_so_changes_nothing_for_the_others(seed):
    probs, theta = group(seed)
    fused, _ = fuse(probs, theta)
    mirrored, sign = probs.clone(), theta.clone()
    mirrored[:, 1], sign[:, 1, 0, 0] = probs[:, 1].flip(-1), -theta[:, 1, 0, 0]
    again, _ = fuse(mirrored, sign)
    torch.testing.assert_close(again[:, 0], fused[:, 0], atol=1e-5, rtol=0)
    torch.testing.assert_close(again[:, 1].flip(-1), fused[:, 1], atol=1e-5, rtol=0)


@quick
@given(seeds)
def test_on_the_canvas_the_mean_is_taken_over_views_that_see_the_pixel(seed):
    size, g = (6, 8), generator(seed, "canvas")
    boxes = torch.tensor([[0, 0, 6, 8], [0, 0, 3, 4], [3, 4, 3, 4]])  # halves: enlarged exactly twice
    small = torch.randn(3, 5, 3, 4, generator=g, dtype=torch.float64).softmax(1)
    probs = small.repeat_interleave(2, -2).repeat_interleave(2, -1)   # constant over the four pixels of each pixel of the canvas
    probs[0] = torch.randn(5, 6, 8, generator=g, dtype=torch.float64).softmax(0)
    expected = probs[0].clone()
    expected[:, :3, :4] = (expected[:, :3, :4] + small[1]) / 2
    expected[:, 3:, 4:] = (expected[:, 3:, 4:] + small[2]) / 2
    fused, _ = fuse(probs[None], crop_theta(*boxes.unbind(-1), size)[None])
    torch.testing.assert_close(fused[0, 0], expected, atol=1e-5, rtol=0)


@quick
@given(seeds)
def test_min_entropy_takes_whole_distributions_from_the_surest_view(seed):
    probs, _ = group(seed)
    theta = torch.eye(2, 3).expand(2, 3, 2, 3)                         # all views in one place
    surest = torch.special.entr(probs).sum(2).argmin(1)                # (B, H, W)
    expected = torch.stack([torch.stack([probs[b, surest[b, i, j], :, i, j] for i in range(8) for j in range(12)], -1) for b in range(2)]).unflatten(-1, (8, 12))
    torch.testing.assert_close(fuse(probs, theta, pool="min_entropy")[0][:, 0], expected, atol=1e-4, rtol=0)


@quick
@given(seeds, pools)
def test_padding_has_no_vote(seed, pool):
    probs, theta = group(seed)
    valid = torch.rand(2, 3, 8, 12, generator=generator(seed, "valid")) < .5
    garbage = torch.where(valid[:, :, None], probs, torch.rand(probs.shape, generator=generator(seed, "garbage")))
    torch.testing.assert_close(fuse(garbage, theta, valid, pool)[0], fuse(probs, theta, valid, pool)[0])
    everywhere = torch.ones_like(valid)
    torch.testing.assert_close(fuse(probs, theta, everywhere, pool)[0], fuse(probs, theta, pool=pool)[0])


@quick
@given(seeds)
def test_float32_is_as_good_as_float64(seed):
    probs, theta = group(seed, dtype=torch.float64)
    exact, seen = fuse(probs, theta)
    fused, seen_too = fuse(probs.float(), theta)
    assert exact.dtype == torch.float64 and fused.dtype == torch.float32 and torch.equal(seen, seen_too)
    torch.testing.assert_close(fused.double(), exact, atol=1e-5, rtol=0)


def test_lower_precision_is_fused_in_float32_and_inputs_are_left_alone():
    probs, theta = group(0)
    before = probs.clone()
    fused, _ = fuse(probs.bfloat16(), theta)
    assert fused.dtype == torch.float32
    torch.testing.assert_close(fused, fuse(probs.bfloat16().float(), theta)[0])
    fuse(probs, theta, torch.zeros(2, 3, 8, 12, dtype=torch.bool))
    assert torch.equal(probs, before)


@pytest.mark.parametrize("change, words", [
    (dict(theta=torch.eye(2, 3).expand(2, 4, 2, 3)), "theta has shape"),
    (dict(theta=torch.eye(2, 3).expand(6, 2, 3)), "theta has shape"),
    (dict(valid=torch.ones(2, 1, 8, 12, dtype=torch.bool)), "valid has shape"),
    (dict(pool="max"), "pool is 'max', expected one of mean, min_entropy")])
def test_what_would_broadcast_in_silence_is_refused(change, words):
    probs, theta = group(0)
    with pytest.raises(ValueError, match=words): fuse(probs, **{"theta": theta, **change})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("pool", sorted(POOLS))
def test_gpu_agrees_with_cpu(pool):
    probs, theta = group(0)
    valid = torch.rand(2, 3, 8, 12, generator=generator(0, "valid")) < .8
    fused, seen = fuse(probs, theta, valid, pool)
    on_gpu, seen_gpu = fuse(probs.cuda(), theta.cuda(), valid.cuda(), pool)
    torch.testing.assert_close(on_gpu.cpu(), fused, atol=1e-4, rtol=0)
    assert torch.equal(seen_gpu.cpu(), seen)
    boxes = torch.tensor([1, 2, 3, 4]).cuda()
    assert crop_theta(*boxes, (8, 12), True).is_cuda
