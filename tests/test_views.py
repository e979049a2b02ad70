"""Views: boxes of batches, colours and noise, beside torchvision's image by image; the draws."""
import math

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from house import answer
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import InterpolationMode

from sac_lit.core import generator, IGNORE_INDEX
from sac_lit.fast import fast_crop_and_resize
from sac_lit.toy_city import render
from sac_lit.views import (
    collate,
    COLOR_STATISTICS,
    crop_and_resize,
    crop_labels,
    draw_jitter,
    IMAGENET_MEAN,
    IMAGENET_STD,
    matching_statistics,
    NOISE,
    normalize,
    photometric_noise,
    random_box,
    source_views,
    target_views,
)

quick = settings(deadline=None, derandomize=True, max_examples=40)
SIZE = (32, 64)
FORMS = pytest.mark.parametrize("resize", [crop_and_resize, fast_crop_and_resize])


# ---------------------------------------------------------------- image by image, the yardstick

def cut(x, box, size, flip=False, mode="bilinear", fill=0.):  # (C, H, W) -> (C, h, w)
    "Pad, crop, and torchvision's resize."
    (top, left, height, width), (H, W) = map(int, box), x.shape[-2:]
    around = [max(0, -left), max(0, -top), max(0, left + width - W), max(0, top + height - H)]
    x = TF.pad(x, around, fill=fill)[..., top + around[1]:, left + around[0]:]
    smooth = mode == "bilinear"
    mode = InterpolationMode.BILINEAR if smooth else InterpolationMode.NEAREST_EXACT
    x = TF.resize(x[..., :height, :width], list(size), mode, antialias=smooth)
    return x.flip(-1) if flip else x


def uniform(rng, low, high): return low + (high - low) * torch.rand((), generator=rng).item()


def chance(rng, p): return torch.rand((), generator=rng).item() < p


def jitter_one(image, rng, *strengths):
    "Draws and applies the colour jitter of one image."
    factors = [uniform(rng, max(0., 1 - x), 1 + x) for x in strengths[:3]]
    amounts = [*factors, uniform(rng, -strengths[3], strengths[3])]
    changes = TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue
    for k in torch.randperm(4, generator=rng): image = changes[k](image, amounts[k])
    return image


def source_view(image, label, rng, size, scale, jitter, fill):
    s = uniform(rng, *scale)
    box = random_box(rng, round(size[0] / s), round(size[1] / s), image.shape[-2:])
    flip, jittered = chance(rng, .5), chance(rng, .5)
    image = image.float() / 255
    if jitter and jittered: image = jitter_one(image, rng, *[jitter] * 3, min(jitter, .5))
    label = cut(label[None], box, size, flip, "nearest", IGNORE_INDEX)[0].long()
    return cut(image, box, size, flip, fill=fill).clamp(0, 1), label


def group(image, rng, size, crops, scale, joint_scale):
    def part(share, frame):
        return random_box(rng, *(round(n * share) for n in frame), frame)
    zoom = part(1 / uniform(rng, *joint_scale), image.shape[-2:])
    canvas = cut(image.float() / 255, zoom, size, chance(rng, .5)).clamp(0, 1)
    boxes = [(0, 0, *size)] + [part(uniform(rng, *scale), size) for _ in range(crops)]
    flips = torch.rand(len(boxes), generator=rng) < .5
    views = [cut(canvas, box, size, flip) for box, flip in zip(boxes, flips)]
    return torch.stack(views), torch.tensor(boxes), flips


def noise_one(view, rng):
    blurred, jittered, grey = (chance(rng, p) for p in (1., .5, .2))
    s = uniform(rng, .1, 2.)
    if blurred: view = TF.gaussian_blur(view, [2 * math.ceil(3 * s) + 1] * 2, [s, s])
    if jittered: view = jitter_one(view, rng, .4, .4, .4, .1)
    return TF.rgb_to_grayscale(view, num_output_channels=3) if grey else view


# ---------------------------------------------------------------- geometry

@st.composite
def cuts(draw):
    H, W, h, w = (draw(st.integers(2, 12)) for _ in range(4))
    height, width = draw(st.integers(1, 16)), draw(st.integers(1, 16))
    box = (draw(st.integers(1 - height, H - 1)), draw(st.integers(1 - width, W - 1)), height, width)
    return (H, W), box, (h, w), draw(st.booleans())


@FORMS
@quick
@given(case=cuts(), fill=st.sampled_from([0., .45, 2.]))
def test_a_box_is_pad_crop_and_pillows_resize(resize, case, fill):
    (H, W), (top, left, height, width), size, flip = case
    x = torch.rand(1, H, W, generator=generator(0, H, W))
    wide = np.full((H + 40, W + 40), fill, np.float32)
    wide[20:20 + H, 20:20 + W] = x[0]
    part = Image.fromarray(wide[20 + top:20 + top + height, 20 + left:20 + left + width])
    slow = np.asarray(part.resize(size[::-1], Image.BILINEAR))
    boxes, flips = torch.tensor([[top, left, height, width]]), torch.tensor([flip])
    found = resize(x[None], boxes, size, flips, fill)[0, 0].numpy()
    assert np.abs(found - (slow[:, ::-1] if flip else slow)).max() < 1e-5


@quick
@given(cuts())
def test_labels_take_the_nearest_pixel(case):
    (H, W), (top, left, height, width), size, flip = case
    x = torch.randint(19, (H, W), generator=generator(0, H, W))
    wide = np.full((H + 40, W + 40), IGNORE_INDEX, np.uint8)
    wide[20:20 + H, 20:20 + W] = x
    part = Image.fromarray(wide[20 + top:20 + top + height, 20 + left:20 + left + width])
    places = [[(int((j + .5) * width / size[1]), int((i + .5) * height / size[0]))
               for j in range(size[1])] for i in range(size[0])]
    nearest = np.asarray([[part.getpixel(place) for place in row] for row in places])
    boxes, flips = torch.tensor([[top, left, height, width]]), torch.tensor([flip])
    found = crop_labels(x[None], boxes, size, flips)[0].numpy()
    assert found.dtype == np.int64
    assert np.array_equal(found, nearest[:, ::-1] if flip else nearest)


@FORMS
def test_each_channel_has_its_fill_and_boxes_outside_are_refused(resize):
    boxes = torch.tensor([[-4, 0, 8, 4]])
    out = resize(torch.ones(1, 3, 4, 4), boxes, (8, 4), fill=(.1, .2, .3))[0]
    fill = torch.tensor([.1, .2, .3])[:, None, None].expand(3, 4, 4)
    assert torch.allclose(out[:, :4], fill) and (out[:, 4:] == 1).all()
    for box in ((4, 0, 2, 2), (-3, 0, 3, 2), (0, 9, 1, 1), (0, 0, 0, 2)):
        with pytest.raises(ValueError, match="outside"):
            resize(torch.ones(1, 1, 4, 4), torch.tensor([box]), (2, 2))
    with pytest.raises(ValueError, match="outside"):                          # in the padding
        frames = torch.tensor([[4, 3]])
        resize(torch.ones(1, 1, 4, 4), torch.tensor([[0, 3, 1, 1]]), (2, 2), frames=frames)


@pytest.mark.parametrize("kind, box, size", [
    ("inside", (3, 5, 10, 20), (10, 20)), ("enlarging", (3, 5, 8, 16), (32, 64)),
    ("shrinking", (0, 0, 24, 48), (6, 10)), ("odd", (1, 2, 17, 31), (13, 40)),
    ("overhanging", (-6, -9, 30, 60), (24, 48)), ("around", (-10, -10, 60, 90), (16, 20))])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_plain_and_fast_forms_agree(kind, box, size, flip, padded):
    g = generator(0, kind)
    images, boxes = torch.rand(3, 3, 24, 48, generator=g), torch.tensor([box]).expand(3, 4)
    boxes = boxes + torch.tensor([[0], [1], [2]])                             # larger by 1 and 2
    flips = torch.tensor([flip, not flip, flip])
    frames = torch.tensor([[24, 48], [20, 48], [24, 31]]) if padded else None
    plain, fast = (resize(images, boxes, size, flips, (.1, .2, .3), frames)
                   for resize in (crop_and_resize, fast_crop_and_resize))
    assert (plain - fast).abs().max() < 2e-6
    grouped = fast_crop_and_resize(images[None], boxes[None], size, flips[None], (.1, .2, .3),
                                   None if frames is None else frames[None])
    assert torch.equal(grouped[0], fast)                                      # (1, 3, C, h, w)


@FORMS
def test_padding_does_not_count(resize):
    sizes = (24, 48), (20, 48), (24, 30)
    images = [torch.randint(256, (3, *s), generator=generator(0, *s)).byte() for s in sizes]
    samples = [{"image": x, "label": x[0], "index": i} for i, x in enumerate(images)]
    batch = collate(samples)
    assert batch["frame"].tolist() == [list(s) for s in sizes]
    assert batch["index"].tolist() == [0, 1, 2]
    boxes, size = torch.tensor([[2, 3, 12, 24], [-4, 8, 30, 60], [8, 0, 16, 30]]), (16, 20)
    found = resize(batch["image"].float(), boxes, size, frames=batch["frame"])
    labels = crop_labels(batch["label"], boxes, size, frames=batch["frame"])
    for x, box, ours, its in zip(images, boxes, found, labels):
        assert torch.allclose(ours, cut(x.float(), box, size), atol=2e-3)     # of 255
        assert torch.equal(its, cut(x[:1], box, size, mode="nearest", fill=IGNORE_INDEX)[0].long())


@quick
@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 99))
def test_random_box_is_inside_or_around(height, width, key):
    top, left, h, w = random_box(generator(key), height, width, (9, 13))
    assert (h, w) == (height, width)
    for start, n, frame in ((top, h, 9), (left, w, 13)):
        assert 0 <= start <= frame - n if n <= frame else frame - n <= start <= 0


# ---------------------------------------------------------------- the source

@FORMS
@pytest.mark.parametrize("scale, jitter", [
    ((.5, 1.), 0.), ((.5, 2.), .5), ((1., 2.), .4), ((.2, .3), .5)])
def test_source_views_are_those_of_one_image_at_a_time(resize, scale, jitter):
    pairs = [render("source", "train", i, SIZE) for i in range(6)]
    images, labels = map(torch.stack, zip(*pairs))
    generators = [generator(0, "source", i) for i in range(6)]
    views, maps = source_views(images, labels, generators, (24, 40), scale, jitter, resize=resize)
    for i, (image, label) in enumerate(pairs):
        rng = generator(0, "source", i)
        x, y = source_view(image, label, rng, (24, 40), scale, jitter, IMAGENET_MEAN)
        assert (views[i] - x).abs().max() < 1e-5 and torch.equal(maps[i], y)
        assert torch.equal(rng.get_state(), generators[i].get_state())


@quick
@given(st.integers(0, 99), st.sampled_from([(.5, 1.), (.5, 2.), (1., 2.), (.1, .2)]))
def test_source_image_and_label_move_together(key, scale):
    blocks = torch.arange(8, dtype=torch.uint8).repeat_interleave(8).expand(1, 32, 64)
    images = (blocks * 30)[:, None].expand(1, 3, -1, -1)     # vertical stripes; it says the label
    x, y = source_views(images, blocks, [generator(key)], (32, 64), scale, fill=[1.] * 3)
    assert x.shape == (1, 3, 32, 64) and y.shape == (1, 32, 64) and y.dtype == torch.int64
    assert 0 <= x.min() and x.max() <= 1
    x, y = x[0], y[0]
    inside = y != IGNORE_INDEX
    assert inside.any()
    agree = (x[0] * 255 / 30).round().long() == y
    def largest(z): return torch.nn.functional.max_pool2d(z[None, None], 5, 1, 2)[0, 0]
    steady = largest(y.float()) == -largest(-y.float())
    assert agree[inside & steady].all() and (x[:, ~inside & steady] > .99).all()


def test_padding_is_zero_after_normalising():
    image, label = render("source", "train", 0, SIZE)
    mean, std = matching_statistics("gta5")
    x, y = source_views(image[None], label[None], [generator(3)], (64, 128), (.25, .25), .5, mean)
    x, known = x[0], y[0] != IGNORE_INDEX
    rows, columns = known.any(1).nonzero(), known.any(0).nonzero()
    outside = torch.ones(64, 128, dtype=torch.bool)
    near = slice(max(0, columns.min() - 2), columns.max() + 3)
    outside[max(0, rows.min() - 2):rows.max() + 3, near] = False
    assert outside.any() and normalize(x, mean, std)[:, outside].abs().max() < 1e-5


def test_matching_statistics():
    tall = lambda values: torch.tensor(values)[:, None, None]
    mean_t, std_t = map(torch.tensor, COLOR_STATISTICS["cityscapes"])
    for name, (mean_s, std_s) in COLOR_STATISTICS.items():
        mean, std = matching_statistics(name)
        pixels = torch.randn(3, 100, 200, generator=generator(0)) * tall(std_s) + tall(mean_s)
        ours = normalize(pixels, mean, std)
        expected = (mean_t - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
        assert torch.allclose(ours.mean((1, 2)), expected, atol=.03)
        assert torch.allclose(ours.std((1, 2)), std_t / torch.tensor(IMAGENET_STD), atol=.03)


# ---------------------------------------------------------------- the batch of views

@FORMS
def test_groups_are_those_of_one_image_at_a_time(resize):
    images = torch.stack([render("target", "train", i, SIZE)[0] for i in range(5)])
    generators, size = [generator(0, "group", i) for i in range(5)], (24, 48)
    views, boxes, flips = target_views(images, generators, size, joint_scale=(1., 1.5),
                                       resize=resize)
    for i, image in enumerate(images):
        slow = group(image, generator(0, "group", i), size, 3, (.5, 1.), (1., 1.5))
        assert (views[i] - slow[0]).abs().max() < 1e-5
        assert torch.equal(boxes[i], slow[1]) and torch.equal(flips[i], slow[2])


@quick
@given(st.integers(0, 9999), st.integers(0, 4))
def test_group_of_views(key, crops):
    images, size = render("target", "demo", 0, SIZE)[0][None], (24, 48)
    views, boxes, flips = (x[0] for x in target_views(images, [generator(key)], size, crops))
    assert views.shape == (crops + 1, 3, *size)
    assert boxes.shape == (crops + 1, 4) and boxes.dtype == torch.int64
    assert flips.shape == (crops + 1,) and flips.dtype == torch.bool
    top, left, height, width = boxes.unbind(1)
    assert boxes[0].tolist() == [0, 0, *size] and (top >= 0).all() and (left >= 0).all()
    assert (top + height <= 24).all() and (left + width <= 48).all()
    assert (height >= 12).all() and (width >= 24).all()
    assert ((width - 2 * height).abs() <= 2).all()           # the aspect ratio, to rounding
    canvas = views[0].flip(-1) if flips[0] else views[0]
    for view, box, flip in zip(views, boxes, flips):
        assert (view - cut(canvas, box, size, flip)).abs().max() < 1e-5
    again = target_views(images, [generator(key)], size, crops)
    for x, y in zip((views, boxes, flips), again): assert torch.equal(x, y[0])


@FORMS
@pytest.mark.parametrize("cut_from", ["canvas", "image"])
def test_a_box_says_where_on_the_canvas_a_view_lies(cut_from, resize):
    """On a ramp, a pixel's value is its place; the box must predict it to a fraction of a pixel."""
    H, W, h, w = 120, 200, 32, 64
    across = torch.linspace(0, 255, W).expand(H, W)
    down = torch.linspace(0, 255, H)[:, None].expand(H, W)
    images = torch.stack([across, down, across]).round().byte()[None].expand(6, -1, -1, -1)
    rngs = [generator(0, "ramp", k) for k in range(6)]
    views, boxes, flips = target_views(images, rngs, (h, w), joint_scale=(1., 1.5),
                                       resize=resize, cut_from=cut_from)
    x, y = torch.arange(w) + .5, torch.arange(h) + .5
    for group, places, turned in zip(views, boxes, flips):
        canvas = group[0].flip(-1) if turned[0] else group[0]
        for channel, u, axis, middle in ((0, x, 1, w // 2), (1, y, 0, h // 2)):
            line = canvas[channel].mean(1 - axis)
            slope = (line[-5] - line[4]) / (u[-5] - u[4])
            for view, box, flip in zip(group, places, turned):
                seen = (view.flip(-1) if flip else view)[channel].mean(1 - axis)
                place = box[axis] + u * box[axis + 2] / len(u)
                expected = line[middle] + slope * (place - u[middle])
                assert (seen - expected)[4:-4].abs().max() < .25 * slope.abs()


def test_frequencies_of_the_draws():
    n = 800
    images = torch.zeros(n, 3, 16, 32, dtype=torch.uint8)
    images[..., :16] = 255
    generators = [generator(0, k) for k in range(n)]
    views, boxes, flips = target_views(images, generators, (16, 32), 1, joint_scale=(1., 1.))
    turned = flips.float()
    assert ((turned.mean(0) - .5).abs() < .07).all() and abs(torch.corrcoef(turned.T)[0, 1]) < .1
    white_left = views[:, 0, 0, 0, 0] > .5                   # of view 0: the canvas is not mirrored
    assert abs((white_left != flips[:, 0]).float().mean() - .5) < .07
    heights = boxes[:, 1, 2].float()
    assert abs(heights.mean() - 12) < .4 and heights.min() == 8 and heights.max() == 16


# ---------------------------------------------------------------- noise

def only(name, **changes): return {name: NOISE[name]._replace(**changes)}


def test_noise_is_that_of_one_view_at_a_time():
    views = torch.stack([render("target", "train", i, SIZE)[0] / 255 for i in range(12)])
    noisy = photometric_noise(views, [generator(0, "noise", i) for i in range(12)])
    for i, view in enumerate(views):
        assert (noisy[i] - noise_one(view, generator(0, "noise", i))).abs().max() < 1e-5


def test_noise_leaves_geometry_alone_and_draws_by_its_key():
    view = render("target", "demo", 0, SIZE)[0][None] / 255
    assert torch.equal(photometric_noise(view, [generator(0)], {}), view)
    for k in range(10):
        out, again = (photometric_noise(view, [generator(0, k)]) for _ in range(2))
        assert out.shape == view.shape and 0 <= out.min() and out.max() <= 1 + 1e-6
        assert torch.equal(out, again)
    ramp = torch.linspace(0, 1, 64).expand(1, 3, 32, 64)
    blur = only("blur", draw=lambda rng: torch.tensor([2.], dtype=torch.float64))
    blurred = photometric_noise(ramp, [generator(0)], blur)
    assert (blurred - ramp)[..., 8:-8].abs().max() < 1e-5    # a blur moves no slope
    grey = photometric_noise(view, [generator(0)], only("grey", p=1.))[0]
    assert torch.equal(grey[0], grey[1]) and torch.equal(grey[0], grey[2])
    generators = [generator(0, k) for k in range(150)]
    jittered = photometric_noise(view.expand(150, -1, -1, -1), generators, only("jitter"))
    changed = (jittered != view).flatten(1).any(1)
    assert abs(changed.float().mean() - .5) < .15


def test_no_draw_touches_the_global_generator():
    image, label = (x[None] for x in render("source", "demo", 0, SIZE))
    before = torch.get_rng_state()
    source_views(image, label, [generator(0)], (16, 32), jitter=.5)
    views, _, _ = target_views(image, [generator(0)], (16, 32))
    photometric_noise(views[0, :1], [generator(1)], only("jitter", p=1.))
    draw_jitter(generator(2))
    assert torch.equal(before, torch.get_rng_state())


def test_the_answer_of_the_exercise():
    code = answer("01b_views", "sensor noise")
    assert len(code.splitlines()) <= 20
    table = dict(NOISE)
    try:
        exec(code, {})
        entry = NOISE["sensor"]
    finally:
        NOISE.clear()
        NOISE.update(table)
    views = torch.full((2, 3, 40, 60), .5)
    noisy = [photometric_noise(views, [generator(0, t) for t in range(2)],
                               {"sensor": entry._replace(p=1.)}) for _ in range(2)]
    assert torch.equal(*noisy) and not torch.equal(noisy[0][0], noisy[0][1])
    assert all(0 < x.std() < .11 and abs(x.mean() - .5) < .01 for x in noisy[0])
