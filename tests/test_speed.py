"""Fast forms beside plain ones: equal by value and gradient, alone and in a step; less time."""
import copy
import json
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jobs import command

from sac_lit.abn_pretraining import cross_entropy, freeze_bn
from sac_lit.bench import time_trick
from sac_lit.core import ConfusionMatrix, generator
from sac_lit.crop_fusion import crop_theta
from sac_lit.deeplabv2 import ASPP, build_model, predicted_classes, upsample
from sac_lit.ema_training import (
    forward_backward,
    MomentumNetwork,
    PLAIN,
    pseudo_supervision,
    sac_step,
    SelfSupervision,
    Views,
)
from sac_lit.fast import (
    checkpoint_gradients,
    FAST,
    fast_argmax,
    fast_cross_entropy,
    fast_predicted_classes,
    fast_pseudo_supervision,
    fold_bn,
    heads_by_taps,
    in_parts,
    micro_batched,
    row_strips,
    speed_up,
)
from sac_lit.moving_threshold import ClassPrior
from sac_lit.views import target_views
from sac_lit.workload import Settings, Workload

CPU = torch.device("cpu")
many = settings(max_examples=60, deadline=None, derandomize=True)
small = st.integers(1, 9)


def frozen(arch="deeplabv2_tiny"):
    "A network whose running statistics fit: else the scores of random weights are all alike."
    return copy.deepcopy(fitted(arch))


@cache
def fitted(arch, size=(48, 96)):
    torch.manual_seed(0)
    model = build_model(arch, 19).train()
    for m in model.modules():
        if isinstance(m, torch.nn.Dropout2d): m.p = 0.
    images = torch.randn(2, 3, *size, generator=generator(0, "statistics"))
    with torch.no_grad():
        for _ in range(30): model(images)
    return freeze_bn(model)


def batch(size=(48, 96), groups=1):
    "Source images, labels and target views without meaning."
    g = generator(0, "batch")
    images = torch.randn(2, 3, *size, generator=g)
    labels = torch.randint(19, (2, *size), generator=g)
    labels[torch.rand(2, *size, generator=g) < .1] = 255
    frames = torch.randint(256, (groups, 3, *size), generator=g).byte()
    views, boxes, flips = target_views(frames, [g] * groups, size)
    theta = crop_theta(*boxes.unbind(-1), size, flips)
    return images, labels, Views(views * 2 - 1, views * 1.9 - 1, theta)


# ---------------------------------------------------------------- one trick at a time

@given(st.integers(1, 3), st.integers(2, 6), small, small, st.integers(1, 40), st.integers(1, 40),
       st.integers(0, 10**6), st.booleans())
@many
def test_cross_entropy_in_strips(B, C, h, w, H, W, seed, weighted):
    g = generator(seed, "strips")
    logits = (3 * torch.randn(B, C, h, w, generator=g)).requires_grad_()
    labels = torch.randint(0, C, (B, H, W), generator=g)
    labels[torch.rand(B, H, W, generator=g) < .2] = 255
    weight = torch.rand(B, H, W, generator=g) if weighted else 1.
    slow, fast = (f(logits, labels, weight) for f in (cross_entropy, fast_cross_entropy))
    assert fast.item() == pytest.approx(slow.item(), rel=1e-4, abs=1e-6)
    (a,), (b,) = (torch.autograd.grad(7 * loss, logits) for loss in (fast, slow))
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


@given(st.integers(1, 2), st.integers(2, 20), small, small, st.integers(1, 40), st.integers(1, 40),
       st.integers(0, 10**6))
@many
def test_predicted_classes_in_strips(B, C, h, w, H, W, seed):
    logits = 3 * torch.randn(B, C, h, w, generator=generator(seed, "classes"))
    scores = upsample(logits, (H, W))
    wide = upsample(logits, (h, W))
    strips = torch.cat([s.matrix @ wide[:, :, s.source] for s in row_strips(h, H, wide, 5)], 2)
    torch.testing.assert_close(strips, scores, rtol=1e-5, atol=1e-5)
    for y in scores: assert torch.equal(fast_argmax(y).long(), y.argmax(0))
    plain, fast = predicted_classes(logits, (H, W)), fast_predicted_classes(logits, (H, W)).long()
    highest, ours = (scores.gather(1, k[:, None]) for k in (plain, fast))
    assert (highest - ours).max() < 1e-4                                      # a tie, to rounding


@pytest.mark.parametrize("pool", ["mean", "min_entropy"])
@pytest.mark.parametrize("micro_batch", [0, 3])
def test_pseudo_supervision_a_group_at_a_time(pool, micro_batch):
    _, _, views = batch(groups=3)
    teacher, hp = MomentumNetwork(frozen()), SelfSupervision(pool=pool, floor=.05)
    priors = ClassPrior(19), ClassPrior(19)
    for mine in (slice(None), slice(1, 3)):
        part = Views(views.clean[:, mine], views.noisy[:, mine], views.theta, mine)
        logits = teacher(views.clean.flatten(0, 1)).unflatten(0, (3, 4))
        gather = {"gather": lambda x: logits} if mine.start else {}           # of all processes
        plain, confidence = pseudo_supervision(teacher, priors[0], part, hp, **gather)
        network = in_parts(teacher, micro_batch) if micro_batch else teacher
        fast, quick = fast_pseudo_supervision(network, priors[1], part, hp, **gather)
        torch.testing.assert_close(quick, confidence, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(priors[0].chi, priors[1].chi, rtol=1e-4, atol=1e-7)
        assert fast.shape == plain.shape and (fast == plain).float().mean() > .999
        assert (plain != 255).float().mean() > .1


def test_head_by_taps():
    for channels, by_taps in ((80, True), (40, False)):                       # 72 taps
        head = ASPP(channels, 2)
        other = heads_by_taps(copy.deepcopy(head))
        assert (type(other) is not ASPP) == by_taps
        x = torch.randn(2, channels, 7, 30, generator=generator(0, "head"))
        for net in (head, other): net(x).square().mean().backward()
        torch.testing.assert_close(other(x), head(x), rtol=1e-4, atol=1e-5)
        for p, q in zip(head.parameters(), other.parameters()):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)


def test_folded_norms():
    plain, (images, labels, _) = frozen(), batch()
    folded = fold_bn(copy.deepcopy(plain))
    for net in (plain, folded): cross_entropy(net(images), labels).backward()
    torch.testing.assert_close(folded(images), plain(images), rtol=1e-3, atol=1e-4)
    for p, q in zip(plain.parameters(), folded.parameters()):
        assert (p.grad - q.grad).norm() <= 1e-3 * p.grad.norm() + 1e-7
    assert list(folded.state_dict()) == list(plain.state_dict())
    torch.testing.assert_close(folded.train()(images), plain.train()(images), rtol=1e-3, atol=1e-4)


def test_folding_keeps_its_hands_off_other_layers():
    net = torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(),
                              torch.nn.BatchNorm2d(4))
    x = torch.randn(2, 3, 8, 8)
    net(x)
    folded = fold_bn(copy.deepcopy(net))
    torch.testing.assert_close(freeze_bn(folded)(x), freeze_bn(net)(x))
    kinds = [type(m).__name__ for m in folded]
    assert kinds == ["BatchNorm2d", "Conv2d", "ReLU", "BatchNorm2d"]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_micro_batches(size):
    plain, (images, labels, _) = frozen(), batch()
    images, labels = images.repeat(2, 1, 1, 1), labels.repeat(2, 1, 1)
    nets, held = [plain, copy.deepcopy(plain)], []
    def no_sync():
        held.append(True)
        return torch.enable_grad()
    for net, passes in zip(nets, (forward_backward, micro_batched(size, no_sync))):
        loss = passes(net, cross_entropy, images, labels, factor=3.)
        net.loss = loss.item()
        assert not loss.requires_grad
    assert nets[1].loss == pytest.approx(nets[0].loss, rel=1e-5) and len(held) == -(-4 // size) - 1
    for p, q in zip(*(net.parameters() for net in nets)):
        assert (p.grad - q.grad).norm() <= 1e-3 * p.grad.norm() + 1e-7


def test_checkpointing_changes_nothing():
    plain, (images, labels, _) = frozen(), batch()
    other = checkpoint_gradients(copy.deepcopy(plain))
    for net in (plain, other): cross_entropy(net.train()(images), labels).backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(plain.parameters(), other.parameters()))
    assert all(torch.equal(p, q) for p, q in zip(plain.buffers(), other.buffers()))


# ---------------------------------------------------------------- the step

def steps(model, how, hp, n):
    "Losses of n joint steps, the network and the class prior after them."
    images, labels, views = batch()
    teacher, prior = MomentumNetwork(model), ClassPrior(19)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=.9)
    found = []
    for _ in range(n):
        teacher.update(model)
        step = sac_step(model, teacher, prior, optimizer, images, labels, views, hp, how)
        found.append([step["loss_source"].item(), step["loss_target"].item()])
    return found, model, prior


@pytest.mark.parametrize("hp", [SelfSupervision(zeta=0.), SelfSupervision(pool="min_entropy")])
def test_three_steps_of_either_kind_are_the_same(hp):
    model = frozen()
    plain, a, prior = steps(model, PLAIN, hp, 3)
    fast, b, fast_prior = steps(speed_up(frozen()), FAST, hp, 3)
    assert torch.allclose(torch.tensor(plain), torch.tensor(fast), rtol=1e-4, atol=1e-5)
    assert torch.allclose(prior.chi, fast_prior.chi, rtol=1e-4, atol=1e-7)
    for (name, p), q in zip(a.named_parameters(), b.parameters()):
        assert (p - q).abs().max() < 1e-5, name


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["deeplabv2_resnet101", "deeplabv2_vgg16"])
def test_the_step_of_a_large_network_is_the_same(arch):
    everything = SelfSupervision(zeta=0.)            # no threshold, which rounding might tip over
    slow, model, prior = steps(frozen(arch), PLAIN, everything, 2)
    fast, fast_model, fast_prior = steps(speed_up(frozen(arch)), FAST, everything, 2)
    for (source, target), (fast_source, fast_target) in zip(slow, fast):
        assert fast_source == pytest.approx(source, rel=1e-4)
        assert fast_target == pytest.approx(target, rel=1e-3, abs=1e-6)
    torch.testing.assert_close(fast_prior.chi, prior.chi, rtol=1e-4, atol=1e-7)
    for (name, p), q in zip(fast_model.named_parameters(), model.parameters()):
        assert (p.grad - q.grad).norm() <= 3e-2 * q.grad.norm() + 1e-7, name  # a ReLU may tip over


# ---------------------------------------------------------------- the metric

def count(pred, label, num_classes):                 # counts (C, C)
    keep = label != 255
    pairs = label[keep].long() * num_classes + pred[keep].long()
    return torch.bincount(pairs, minlength=num_classes ** 2).view(num_classes, num_classes)


@given(st.integers(1, 3), st.integers(2, 30), st.integers(1, 300), st.integers(0, 10**6))
@many
def test_counts(B, C, n, seed):
    g = generator(seed, "counts")
    pred, label = (torch.randint(0, C, (B, n), generator=g) for _ in range(2))
    label[torch.rand(B, n, generator=g) < .2] = 255
    expected = count(pred, label, C)
    for dtype in (torch.int64, torch.uint8):
        found = ConfusionMatrix(C).update(pred.to(dtype), label.to(dtype)).counts
        assert torch.equal(found, expected)
    pred[label == 255] = 255                         # where nothing is counted, it may be anything
    assert torch.equal(ConfusionMatrix(C).update(pred, label).counts, expected)


# ---------------------------------------------------------------- the command line, and time

@pytest.mark.slow
def test_bench_from_the_command_line(tmp_path):
    options = "--arch deeplabv2_tiny --crop 32 64 --repeats 1 --no-data --against".split()
    options += ["precision bf16", "--out", str(tmp_path / "found.json")]
    done = command(tmp_path, *options, module="sac_lit.bench")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["command"].startswith("python -m sac_lit.bench --arch deeplabv2_tiny")
    assert [s["settings"]["precision"] for s in found["sides"]] == ["float32", "bf16"]
    for side in found["sides"]:
        assert sum(side["phases"].values()) == pytest.approx(side["step"], rel=.5)
        assert side["peak"] > 0 and side["operations"] > 1e6
    assert "B / A" in done.stdout and "softmax and fusion" in done.stdout
    done = command(tmp_path, "--arch", "alexnet", module="sac_lit.bench")
    assert done.returncode == 2 and "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("precision, limit", [("float32", .8), ("bf16", .45)])
def test_a_step_takes_less_time(precision, limit):
    plain = Settings(crop=(256, 512), plain=True)
    fast = replace(plain, plain=False, precision=precision, channels_last=True)
    def make(device):
        return "", Workload(plain, device).sac_step, Workload(fast, device).sac_step
    ratio = 1 / time_trick(make, CPU, 2)["ratio"][0]
    print(f"joint step, {precision}: {ratio:.2f} of the plain one in float32")
    assert ratio < limit


@pytest.mark.slow
def test_the_metric_takes_less_time():
    scores, size = torch.randn(1, 19, 128, 256), (1024, 2048)
    label = torch.randint(20, size, dtype=torch.uint8)
    label[label == 19] = 255
    def plainly(): return count(predicted_classes(scores, size)[0], label, 19)
    def quickly():
        return ConfusionMatrix(19).update(fast_predicted_classes(scores, size)[0], label).counts
    assert (quickly() - plainly()).abs().sum() <= 20                          # ties
    ratio = 1 / time_trick(lambda device: ("", plainly, quickly), CPU, 5)["ratio"][0]
    print(f"arg max and counts: {ratio:.2f} of the plain ones")
    assert ratio < .35
