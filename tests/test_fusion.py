"Affine maps and the fusion of views: exact arithmetic, the obvious version, symmetries; pools."
import itertools
import sys
from fractions import Fraction

import pytest
import torch
from house import answer
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms.v2.functional import resized_crop

from sac_lit.core import generator, UserError
from sac_lit.crop_fusion import crop_theta, divide, fuse, invert_theta, POOLS, warp

quick = settings(deadline=None, derandomize=True, max_examples=30)
seeds = st.integers(0, 2 ** 31)
pools = st.sampled_from(sorted(POOLS))


@st.composite
def frames(draw, overhang=0):
    "A canvas, and a box of whole pixels that lies on it (or hangs over by at most `overhang`)."
    H, W = draw(st.integers(2, 12)), draw(st.integers(2, 12))
    top, left = draw(st.integers(-overhang, H - 1)), draw(st.integers(-overhang, W - 1))
    height = draw(st.integers(max(1, 1 - top), H + overhang - top))
    width = draw(st.integers(max(1, 1 - left), W + overhang - left))
    return (H, W), (top, left, height, width), draw(st.booleans())


def group(seed, B=2, T=3, C=4, size=(8, 12), whole=True, dtype=torch.float32):
    "Softmax of T views with random boxes, the first of which is the whole canvas."
    g, (H, W) = generator(seed, "group"), size
    height = torch.randint(H // 2, H + 1, (B, T), generator=g)
    width = torch.randint(W // 2, W + 1, (B, T), generator=g)
    top = (torch.rand(B, T, generator=g) * (H - height + 1)).long()
    left = (torch.rand(B, T, generator=g) * (W - width + 1)).long()
    boxes = torch.stack([top, left, height, width], -1)                # (B, T, 4)
    if whole: boxes[:, 0] = torch.tensor([0, 0, H, W])
    theta = crop_theta(*boxes.unbind(-1), size, torch.rand(B, T, generator=g) < .5)
    return (2 * torch.randn(B, T, C, H, W, generator=g, dtype=dtype)).softmax(2), theta


def square(theta):
    last = theta.new_tensor([[0, 0, 1]]).expand(*theta.shape[:-2], 1, 3)
    return torch.cat([theta, last], -2)


# ---------------------------------------------------------------- maps

@quick
@given(frames(overhang=3))
def test_theta_takes_corners_of_the_view_to_corners_of_the_box(frame):
    (H, W), (top, left, height, width), flip = frame
    theta = crop_theta(top, left, height, width, (H, W), flip)
    for x, y in ((-1, -1), (1, -1), (-1, 1), (1, 1)):
        column = left + width * ((x == 1) != flip)  # of the box, in pixels of the canvas
        row = top + height * (y == 1)
        expected = [float(Fraction(2 * column, W) - 1), float(Fraction(2 * row, H) - 1)]
        corner = theta @ torch.tensor([x, y, 1.])
        torch.testing.assert_close(corner, torch.tensor(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (0, 4)])
def test_theta_of_tensors_is_that_of_numbers(shape):
    g = generator(0, "boxes")
    boxes = torch.randint(1, 9, (*shape, 4), generator=g)
    flips = torch.rand(shape, generator=g) < .5
    theta = crop_theta(*boxes.unbind(-1), (9, 17), flips)
    assert theta.shape == (*shape, 2, 3) and theta.dtype == torch.float32
    flat = zip(theta.reshape(-1, 2, 3), boxes.reshape(-1, 4), flips.reshape(-1))
    for one, box, flip in flat:
        assert torch.equal(one, crop_theta(*box.tolist(), (9, 17), bool(flip)))


@quick
@given(seeds)
def test_inverse_is_exact_for_any_affine_map(seed):
    theta = torch.randn(2, 3, 2, 3, generator=generator(seed, "affine"), dtype=torch.float64)
    theta[..., :2] += 4 * torch.eye(2)
    both = square(theta) @ square(invert_theta(theta))
    unit = torch.eye(3, dtype=torch.float64).expand(2, 3, 3, 3)
    torch.testing.assert_close(both, unit, atol=1e-12, rtol=0)
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
    back = warp(cut, invert_theta(theta), size, mode)
    torch.testing.assert_close(back, pasted, atol=1e-5, rtol=0)


@quick
@given(st.integers(8, 24), st.integers(8, 24), seeds, st.booleans())
def test_enlarged_crops_are_those_of_torchvision_away_from_the_rim(H, W, seed, flip):
    g = generator(seed, "crop")                                        # enlarged at most twice
    height, width = (int(torch.randint((n + 1) // 2, n + 1, (), generator=g)) for n in (H, W))
    top, left = (int(torch.randint(0, n + 1, (), generator=g)) for n in (H - height, W - width))
    x = torch.rand(1, 3, H, W, generator=g)
    expected = resized_crop(x, top, left, height, width, [H, W], antialias=False)
    view = warp(x, crop_theta(top, left, height, width, (H, W), flip)[None], (H, W))
    if flip: expected = expected.flip(-1)
    inner = (..., slice(1, -1), slice(1, -1))  # its rim repeats the box's last pixel
    torch.testing.assert_close(view[inner], expected[inner], atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.uint8])
def test_warp_never_computes_in_less_than_the_precision_of_theta(dtype):
    x = torch.randint(0, 2, (1, 1, 6, 300), generator=generator(0)).to(dtype)
    same = warp(x, torch.eye(2, 3)[None], (6, 300))  # bfloat16 knows no 300 columns
    assert same.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(same, x.to(same.dtype), atol=1e-4, rtol=0)


# ---------------------------------------------------------------- fusion

@quick
@given(seeds, pools)
def test_fused_is_a_distribution_where_seen_and_nothing_elsewhere(seed, pool):
    probs, theta = group(seed, whole=False)
    valid = torch.rand(2, 3, 8, 12, generator=generator(seed, "valid")) < .6
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
    boxes = torch.tensor([[0, 0, 6, 8], [0, 0, 3, 4], [3, 4, 3, 4]])   # halves: enlarged twice
    small = torch.randn(3, 5, 3, 4, generator=g, dtype=torch.float64).softmax(1)
    probs = small.repeat_interleave(2, -2).repeat_interleave(2, -1)  # each of its pixels fourfold
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
    expected = torch.zeros(2, 4, 8, 12)
    for b, i, j in itertools.product(range(2), range(8), range(12)):
        expected[b, :, i, j] = probs[b, surest[b, i, j], :, i, j]
    fused, _ = fuse(probs, theta, pool="min_entropy")
    torch.testing.assert_close(fused[:, 0], expected, atol=1e-4, rtol=0)


@quick
@given(seeds, pools)
def test_padding_has_no_vote(seed, pool):
    probs, theta = group(seed)
    valid = torch.rand(2, 3, 8, 12, generator=generator(seed, "valid")) < .5
    garbage = torch.rand(probs.shape, generator=generator(seed, "garbage"))
    garbage = torch.where(valid[:, :, None], probs, garbage)
    fused, _ = fuse(probs, theta, valid, pool)
    torch.testing.assert_close(fuse(garbage, theta, valid, pool)[0], fused)
    fused, _ = fuse(probs, theta, pool=pool)
    torch.testing.assert_close(fuse(probs, theta, torch.ones_like(valid), pool)[0], fused)


@quick
@given(seeds)
def test_float32_is_as_good_as_float64(seed):
    probs, theta = group(seed, dtype=torch.float64)
    exact, seen = fuse(probs, theta)
    fused, seen_too = fuse(probs.float(), theta)
    assert exact.dtype == torch.float64 and fused.dtype == torch.float32
    assert torch.equal(seen, seen_too)
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
    (dict(valid=torch.ones(2, 1, 8, 12, dtype=torch.bool)), "valid has shape")])
def test_what_would_broadcast_in_silence_is_refused(change, words):
    probs, theta = group(0)
    with pytest.raises(ValueError, match=words): fuse(probs, **{"theta": theta, **change})


# ---------------------------------------------------------------- pools

@quick
@given(seeds)
def test_both_min_entropy_pools_agree_where_boxes_are_whole_pixels(seed):
    probs, theta = group(seed)
    ours, _ = fuse(probs, theta, pool="min_entropy")
    theirs, _ = fuse(probs, theta, pool="released_min_entropy")
    assert ((ours - theirs).abs().amax(2) > 1e-4).float().mean() < .01  # near ties


def test_the_released_pool_takes_the_entropy_before_the_weight_is_divided_out():
    doubtful, surer = torch.full((4,), .25), torch.tensor([.55, .15, .15, .15])
    weight = torch.tensor([.5, 1.]).view(1, 2, 1, 1, 1)                # the first is seen by half
    weighted = torch.stack([doubtful, surer])[None, :, :, None, None] * weight
    for pool, taken in (("min_entropy", surer), ("released_min_entropy", doubtful)):
        pooled, seen = divide(*POOLS[pool](weighted, weight))
        torch.testing.assert_close(pooled.flatten(), taken)
        assert seen.all()


def test_without_fusion_each_view_keeps_its_own_prediction():
    rng = torch.Generator().manual_seed(0)
    probs = torch.rand(2, 3, 5, 8, 16, generator=rng).softmax(2)
    boxes = torch.tensor([[0, 0, 8, 16], [1, 2, 4, 8], [2, 4, 6, 12]]).unbind(1)
    theta = crop_theta(*boxes, (8, 16), torch.tensor([False, True, False]))
    theta = theta.expand(2, -1, -1, -1)
    fused, seen = fuse(probs, theta, pool="none")
    assert torch.equal(fused, probs) and seen.all()
    valid = torch.rand(2, 3, 8, 16, generator=rng) > .5
    fused, seen = fuse(probs, theta, valid, pool="none")
    assert torch.equal(seen, valid) and torch.equal(fused, probs * valid[:, :, None])


POOLS_OF_ONES_OWN = """
import torch

def first(weighted, weight): return weighted[:, 0], weight[:, 0]
def bare(weighted, weight): return weighted.mean(1)
def swapped(weighted, weight): return weight.sum(1), weighted.sum(1)
def unreduced(weighted, weight): return weighted, weight
def three(weighted, weight): return weighted[:, 0], weight[:, 0], None
def numbers(weighted, weight): return 1, 2
def one_argument(weighted): return weighted
def fails(weighted, weight): raise ValueError("three classes\\nonly")
table = {}
"""


@pytest.fixture
def mypools(tmp_path, monkeypatch):
    (tmp_path/"mypools.py").write_text(POOLS_OF_ONES_OWN)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("mypools", None)


def test_a_pool_of_ones_own(mypools):
    probs, theta = group(0)
    fused, seen = fuse(probs, theta, pool="mypools:first")             # view 0 tells all views
    alone, _ = fuse(probs[:, :1], theta[:, :1])
    torch.testing.assert_close(fused[:, :1], alone)
    assert seen.all()


@pytest.mark.parametrize("pool, words", [
    ("max", "--pool max: no such entry; choose one of mean, min_entropy"),
    ("mypools:missing", "--pool mypools:missing: cannot be imported"),
    ("nowhere:at_all", "--pool nowhere:at_all: cannot be imported"),
    ("mypools:one_argument", "cannot be called .* takes 1 positional argument but 2 were given"),
    ("mypools:table", "cannot be called .*'dict' object is not callable"),
    ("mypools:fails", r"mypools:fails: cannot be called \(ValueError: three classes only\)"),
    ("mypools:bare", "returned one Tensor"),
    ("mypools:swapped", r"returned \[\(2, 1, 8, 12\), \(2, 4, 8, 12\)\]"),
    ("mypools:unreduced", r"returned \[\(2, 3, 4, 8, 12\), \(2, 3, 1, 8, 12\)\]"),
    ("mypools:three", r"returned .*, \(\)\]"),
    ("mypools:numbers", r"returned \[\(\), \(\)\]")])
def test_what_is_no_pool_gets_one_sentence(mypools, pool, words):
    with pytest.raises(UserError, match=words) as error: fuse(*group(0), pool=pool)
    text = str(error.value)
    assert "\n" not in text
    if "mypools" in pool and "missing" not in pool:
        assert "returns a map (B, C, H, W) and its weight (B, 1, H, W)" in text


def test_the_exercise_adds_a_pool(monkeypatch):
    monkeypatch.setitem(POOLS, "median", None)                         # gone again after the test
    code = answer("04_crop_fusion", "median")
    assert len(code.splitlines()) <= 20
    exec(code, {})
    probs = torch.rand(2, 3, 4, 8, 12, generator=generator(0)).softmax(2)
    one_place = torch.eye(2, 3).expand(2, 3, 2, 3)
    fused, seen = fuse(probs, one_place, pool="median")  # of three views: the middle one
    expected = probs.median(1).values
    expected = expected / expected.sum(1, keepdim=True)
    torch.testing.assert_close(fused[:, 0], expected, atol=1e-5, rtol=0)
    pair, _ = fuse(probs[:, :2], one_place[:, :2], pool="median")      # of two: their mean
    torch.testing.assert_close(pair[:, 0], probs[:, :2].mean(1), atol=1e-5, rtol=0)
    probs, theta = group(1, whole=False)
    valid = torch.rand(2, 3, 8, 12, generator=generator(0, "valid")) < .6
    fused, seen = fuse(probs, theta, valid, pool="median")
    torch.testing.assert_close(fused.sum(2), seen.float(), atol=1e-5, rtol=0)


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
