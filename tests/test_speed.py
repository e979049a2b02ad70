"""The fast parts against the plain ones of plain.py: equal, in less time and memory. Ratios are of the same run, taking turns."""
import copy
import json
import statistics
import subprocess
import sys
import time

import plain
import pytest
import torch
from hypothesis import given, settings, strategies as st

from sac_lit.abn_pretraining import fold_bn, freeze_bn, weighted_cross_entropy
from sac_lit.bench import Settings, Workload
from sac_lit.core import ConfusionMatrix, generator
from sac_lit.deeplabv2 import build_model, most_likely
from sac_lit.ema_training import MomentumNetwork, SelfSupervision, sac_step

CPU = torch.device("cpu")


def plain_workload(s: Settings) -> Workload:
    "The workload with networks as they are, neither folded nor with a head by taps, and an optimizer in loops."
    load = Workload(s, CPU)
    torch.manual_seed(0)
    load.network = plain.plain_network(build_model(s.arch, 19))
    load.teacher = MomentumNetwork(load.network)
    load.optimizer = torch.optim.SGD(load.network.parameters(), lr=1e-4, momentum=.9, foreach=False)
    return load


def plain_step(load: Workload, hp=SelfSupervision()):
    return plain.sac_step(load.network, load.teacher, load.prior, load.optimizer, load.images, load.labels, load.views, hp)


@pytest.mark.parametrize("arch", ["deeplabv2_tiny", "deeplabv2_resnet101", "deeplabv2_vgg16"])
def test_the_step_equals_the_plain_one(arch):
    s = Settings(arch, (48, 96), 1, 1)
    fast, slow = Workload(s, CPU), plain_workload(s)
    for load in (fast, slow):
        for m in load.network.modules():
            if isinstance(m, torch.nn.Dropout2d): m.p = 0.
    for _ in range(30):                                                            # statistics that fit: otherwise the scores of a random network are all the same
        with torch.no_grad(): slow.network.train()(slow.images)
    slow.teacher = MomentumNetwork(slow.network)
    for net in (fast.network, fast.teacher.model): net.load_state_dict(slow.network.state_dict())
    fast.optimizer = torch.optim.SGD(fast.network.parameters(), lr=1e-4, momentum=.9, fused=True)
    everything = SelfSupervision(zeta=0.)                                          # no threshold, which rounding might tip over
    for _ in range(2):
        found = sac_step(fast.network, fast.teacher, fast.prior, fast.optimizer, fast.images, fast.labels, fast.views, everything)
        source, target = plain_step(slow, everything)
        assert found["loss_source"].item() == pytest.approx(source.item(), rel=1e-4)
        assert found["loss_target"].item() == pytest.approx(target.item(), rel=1e-3, abs=1e-6)
    torch.testing.assert_close(fast.prior.chi, slow.prior.chi, rtol=1e-4, atol=1e-7)
    for (name, p), q in zip(fast.network.named_parameters(), slow.network.parameters()):
        assert (p.grad - q.grad).norm() <= 3e-2 * q.grad.norm() + 1e-7, name    # a ReLU may tip over


@given(st.integers(1, 3), st.integers(2, 6), st.integers(1, 9), st.integers(1, 9), st.integers(1, 40), st.integers(1, 40), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_cross_entropy_in_strips(B, C, h, w, H, W, seed):
    g = generator(seed, "strips")
    logits = (3 * torch.randn(B, C, h, w, generator=g)).requires_grad_()
    labels = torch.randint(0, C, (B, H, W), generator=g)
    labels[torch.rand(B, H, W, generator=g) < .2] = 255
    weight = torch.rand(B, H, W, generator=g) / (B * H * W)
    slow = (plain.cross_entropy(logits, labels) * weight).sum()
    fast = weighted_cross_entropy(logits, labels, weight)
    assert fast.item() == pytest.approx(slow.item(), rel=1e-4, abs=1e-6)
    (a,), (b,) = (torch.autograd.grad(7 * loss, logits) for loss in (fast, slow))
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


@given(st.integers(1, 3), st.integers(2, 30), st.integers(1, 300), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_counts(B, C, n, seed):
    g = generator(seed, "counts")
    pred, label = torch.randint(0, C, (B, n), generator=g), torch.randint(0, C, (B, n), generator=g)
    label[torch.rand(B, n, generator=g) < .2] = 255
    for dtype in (torch.int64, torch.uint8):
        assert torch.equal(ConfusionMatrix(C).update(pred.to(dtype), label.to(dtype)).counts, plain.count(pred, label, C))
    pred[label == 255] = 255                                                   # a prediction where nothing is counted may be anything
    assert torch.equal(ConfusionMatrix(C).update(pred, label).counts, plain.count(pred, label, C))


def test_folding_keeps_its_hands_off_other_layers():
    alone = torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.BatchNorm2d(4))
    x = torch.randn(2, 3, 8, 8)
    alone(x)
    folded = fold_bn(copy.deepcopy(alone))
    torch.testing.assert_close(freeze_bn(folded)(x), freeze_bn(alone)(x))
    assert [type(m).__name__ for m in folded] == ["BatchNorm2d", "Conv2d", "ReLU", "BatchNorm2d"]


def test_bench_from_the_command_line(tmp_path):
    options = "--arch deeplabv2_tiny --crop 32 64 --repeats 1 --no-data --against".split() + ["precision bf16", "--out", str(tmp_path / "found.json")]
    done = subprocess.run([sys.executable, "-m", "sac_lit.bench", *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert [s["settings"]["precision"] for s in found["sides"]] == ["float32", "bf16"]
    for side in found["sides"]: assert sum(side["phases"].values()) == pytest.approx(side["step"], rel=.5) and side["peak"] > 0 and side["operations"] > 1e6
    assert "B / A" in done.stdout and "softmax and fusion" in done.stdout
    done = subprocess.run([sys.executable, "-m", "sac_lit.bench", "--arch", "alexnet"], capture_output=True, text=True)
    assert done.returncode == 2


def ratio_of(fast, slow, repeats=3) -> float:
    "Median time of `fast` over that of `slow`, called in turns."
    times = {fast: [], slow: []}
    for _ in range(repeats + 1):
        for f in (fast, slow):
            start = time.perf_counter()
            f()
            times[f].append(time.perf_counter() - start)
    return statistics.median(times[fast][1:]) / statistics.median(times[slow][1:])


@pytest.mark.slow
@pytest.mark.parametrize("precision, limit", [("float32", .8), ("bf16", .45)])
def test_a_step_takes_less_time(precision, limit):
    s = Settings(crop=(256, 512), precision=precision, channels_last=True)
    fast, slow = Workload(s, CPU), plain_workload(Settings(crop=(256, 512)))
    ratio = ratio_of(fast.sac_step, lambda: plain_step(slow), 2)
    print(f"joint step, {precision}: {ratio:.2f} of the plain one in float32")
    assert ratio < limit


@pytest.mark.slow
def test_the_metric_takes_less_time():
    scores, size = torch.randn(1, 19, 128, 256), (1024, 2048)
    label = torch.randint(20, size, dtype=torch.uint8)
    label[label == 19] = 255
    plainly = lambda: plain.count(plain.upsample(scores, size).argmax(1)[0], label)
    quickly = lambda: ConfusionMatrix(19).update(most_likely(scores, size)[0], label).counts
    assert (quickly() - plainly()).abs().sum() <= 20                           # ties
    ratio = ratio_of(quickly, plainly, 5)
    print(f"arg max and counts: {ratio:.2f} of the plain ones")
    assert ratio < .35
