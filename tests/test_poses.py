"""Flips and turns of views: exact on the way to the canvas and back; nothing where not asked."""
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from jobs import command, SMALL

from sac_lit.config import ABNConfig, check_config, Config, SACConfig
from sac_lit.core import generator, UserError
from sac_lit.crop_fusion import crop_theta, fuse, invert_theta, POOLS, warp
from sac_lit.poses import draw_poses, pose_theta, posed, Poses
from sac_lit.run_data import Recipe, source_batch, target_batch
from sac_lit.runs import Share
from sac_lit.views import crop_and_resize

ALL = [Poses(True), Poses(turns=True), Poses(True, True)]


def group(size, poses, B=2, T=4, C=3):
    "Predictions of views in random boxes, their maps, and random poses."
    g = generator(0, "group")
    boxes = torch.randint(0, 5, (B, T, 4), generator=g)
    boxes[..., 2:] += torch.tensor(size) // 2
    boxes[:, 0] = torch.tensor([0, 0, *size])
    theta = crop_theta(*boxes.unbind(-1), size, torch.rand(B, T, generator=g) < .5)
    probs = torch.rand(B, T, C, *size, generator=g).softmax(2)
    drawn = torch.stack([draw_poses(poses, generator(b, "pose"), T) for b in range(B)])
    return probs, theta, drawn


@pytest.mark.parametrize("pose", range(8))
def test_the_map_is_that_of_the_pixels(pose):
    x = torch.rand(1, 2, 9, 9, generator=generator(0, "x"))
    poses = torch.tensor([pose])
    theta = pose_theta(torch.eye(2, 3)[None], poses)
    torch.testing.assert_close(warp(x, theta, (9, 9)), posed(x, poses), atol=1e-5, rtol=0)
    there_and_back = warp(posed(x, poses), invert_theta(theta), (9, 9))
    torch.testing.assert_close(there_and_back, x, atol=1e-5, rtol=0)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("poses, size", [*((p, (12, 12)) for p in ALL), (Poses(True), (8, 14))])
def test_fusing_posed_views_is_fusing_views(pool, poses, size):
    probs, theta, drawn = group(size, poses)
    plain, seen = fuse(probs, theta, pool=pool)
    moved = posed(probs.flatten(0, 1), drawn.flatten()).view_as(probs)
    fused, seen_too = fuse(moved, pose_theta(theta, drawn), pool=pool)
    expected = posed(plain.flatten(0, 1), drawn.flatten()).view_as(plain)
    same = (fused - expected).abs().amax(2) < 1e-4                         # (B, T, H, W)
    if pool == "mean": assert same.all()
    assert same.float().mean() > .99                                       # ties of entropies
    assert seen.sum() == seen_too.sum()


def a_run(**options):
    c = SACConfig(crop=(24, 24), groups=2, num_crops=2, **options)
    return SimpleNamespace(cfg=Config(sac=c), device=torch.device("cpu"), resize=crop_and_resize,
                           noise={})


IMAGES = torch.randint(256, (2, 3, 40, 52), dtype=torch.uint8, generator=generator(0, "x"))


@pytest.mark.parametrize("poses", ALL)
@pytest.mark.parametrize("views_from", ["canvas", "image"])
def test_views_of_a_group_are_the_same_ones_posed(poses, views_from):
    share, key = Share(range(2)), (0, "sac target", 7)
    plain = target_batch(a_run(views_from=views_from), {"image": IMAGES}, 7, share)
    views = target_batch(a_run(views_from=views_from, **poses._asdict()), {"image": IMAGES}, 7,
                         share)
    drawn = torch.stack([draw_poses(poses, generator(*key, "pose", b), 3) for b in range(2)])
    assert drawn.any()
    moved = posed(plain.clean.flatten(0, 1), drawn.flatten()).view_as(plain.clean)
    assert torch.equal(views.clean, moved)
    assert torch.equal(views.theta, pose_theta(plain.theta, drawn))


def test_an_equivariant_network_gives_back_the_canvas():
    "One that sees each pixel alone: what it says of the whole canvas, in each view's pose."
    run = a_run(vertical_flips=True, turns=True)
    run.cfg = replace(run.cfg, sac=replace(run.cfg.sac, num_crops=0))
    for step in range(8):
        views = target_batch(run, {"image": IMAGES}, step, Share(range(2)))
        probs = views.clean.softmax(2)                                     # (B, 1, 3, h, w)
        fused, seen = fuse(probs, views.theta)
        torch.testing.assert_close(fused, probs, atol=1e-5, rtol=0)
        assert seen.all()


@pytest.mark.parametrize("poses", ALL)
def test_labels_move_with_their_images(poses):
    labels = IMAGES[:, 0]
    images = labels[:, None].expand(-1, 3, -1, -1)
    recipe = Recipe((40, 40), (1., 1.), 0., (0.,) * 3, (1.,) * 3, poses)
    batch = {"image": images, "label": labels}
    x, y = source_batch(a_run(), "abn", batch, 3, range(2), recipe)
    plain, _ = source_batch(a_run(), "abn", batch, 3, range(2), recipe._replace(poses=Poses()))
    inside = y != 255
    assert torch.equal((255 * x[:, 0]).round().long()[inside], y[inside])
    assert torch.equal(x.flatten().sort().values, plain.flatten().sort().values)


@pytest.mark.parametrize("stage, other", [("abn", {}), ("sac", {"views_from": "image"})])
def test_turns_need_square_crops(stage, other):
    kind = {"abn": ABNConfig, "sac": SACConfig}[stage]
    with pytest.raises(UserError, match=f"--{stage}.turns: needs square crops"):
        check_config(Config(**{stage: kind(turns=True, crop=(32, 64), **other)}))
    check_config(Config(**{stage: kind(turns=True, crop=(64, 64), **other)}))
    check_config(Config(**{stage: kind(vertical_flips=True, crop=(32, 64), **other)}))


@pytest.mark.trains
def test_a_training_with_both(tmp_path):
    square = "--abn.crop 32 32 --sac.crop 32 32 --abn.steps 2 --sac.steps 2 --eval-every 2".split()
    on = "--abn.vertical-flips --abn.turns --sac.vertical-flips --sac.turns".split()
    done = command(tmp_path, "toy", *SMALL, *square, *on)
    assert done.returncode == 0, done.stderr
