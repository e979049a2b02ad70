"""Precision and memory switches: what they may change in the result, and what not."""
import copy
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from jobs import log, train, weights

from sac_lit.abn_pretraining import abn_step, freeze_bn
from sac_lit.config import load_config
from sac_lit.core import generator
from sac_lit.crop_fusion import crop_theta
from sac_lit.deeplabv2 import build_model, param_groups
from sac_lit.ema_training import (
    MomentumNetwork,
    pseudo_supervision,
    sac_step,
    SelfSupervision,
    Views,
)
from sac_lit.fast import checkpoint_gradients
from sac_lit.focal_loss import focal_loss
from sac_lit.moving_threshold import ClassPrior
from sac_lit.runs import Run, Share
from sac_lit.toy_city import render
from sac_lit.train import target_batch
from sac_lit.views import collate, normalize, photometric_noise, source_views, target_views

COMPILERS = "g++", "clang++"


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    "A folder in which the job has run without any switch."
    cwd = tmp_path_factory.mktemp("switches")
    done = train(cwd, "--name", "plain")
    assert done.returncode == 0, done.stderr
    return cwd


def difference(cwd, name):
    "Relative distance of the final network to that of the plain run."
    a, b = (weights(cwd, n) for n in ("plain", name))
    gap = sum((a[k].double() - b[k]).square().sum() for k in a)
    return (gap / sum(a[k].double().square().sum() for k in a)).sqrt().item()


@pytest.mark.parametrize("name, args, most", [
    ("checkpointing", ["--gradient-checkpointing"], 0.),
    ("micro", ["--sac.micro-batch", "1"], 1e-3),
    ("last", ["--channels-last"], .05),  # other kernels from the first step on, and Adam
    ("bf16", ["--mixed-precision", "bf16"], .1)])
def test_switch(plain, name, args, most):
    done = train(plain, "--name", name, *args)
    assert done.returncode == 0, done.stderr
    assert difference(plain, name) <= most
    for a, b in zip(log(plain, "plain", event="step"), log(plain, name, event="step"), strict=True):
        assert abs(a["loss_source"] - b["loss_source"]) <= most * a["loss_source"] * 2


def test_precision_belongs_to_the_configuration(plain):
    done = train(plain, "--name", "plain", "--mixed-precision", "bf16")
    assert done.returncode == 2 and "mixed_precision no there, bf16 here" in done.stderr


def test_views_without_noise(plain):
    "The student then sees what the teacher sees; the noise, where it is on, is not weak."
    cfg = load_config(plain / "runs" / "plain")
    batch = collate([{"image": render("target", "train", 0, (32, 64))[0], "index": 0}])
    gap = {}
    for noise in (cfg.sac.noise, ()):
        sac = replace(cfg.sac, noise=noise)
        run = Run(replace(cfg, sac=sac), SimpleNamespace(device=torch.device("cpu")), None)
        views = [target_batch(run, batch, step, Share(range(1))) for step in range(4)]
        gap[bool(noise)] = max((v.clean - v.noisy).abs().max().item() for v in views)
    assert gap[False] == 0 and gap[True] > .5


@pytest.mark.parametrize("confidence", ["pixel", "batch", "none"])
def test_what_weights_the_target_loss(confidence):
    torch.manual_seed(0)
    model, size = freeze_bn(build_model("deeplabv2_tiny", 5)), (32, 64)
    clean, noisy = torch.randn(2, 1, 2, 3, *size)
    boxes = torch.tensor([[[0, 0, 32, 64], [4, 8, 16, 32]]])
    views = Views(clean, noisy, crop_theta(*boxes.unbind(-1), size))
    images, labels = torch.randn(1, 3, *size), torch.randint(5, (1, *size))
    teacher, hp = MomentumNetwork(model), SelfSupervision(confidence=confidence, zeta=.5)
    prior, optimizer = ClassPrior(5), torch.optim.SGD(model.parameters(), lr=0.)
    found = sac_step(model, teacher, prior, optimizer, images, labels, views, hp)["loss_target"]
    again = ClassPrior(5)
    pseudo, m = pseudo_supervision(teacher, again, views, hp)
    of_batch = m.mean(0, keepdim=True).expand_as(m)
    weight = {"pixel": m, "batch": of_batch, "none": torch.ones(m.shape)}[confidence]
    with torch.no_grad():
        scores = F.interpolate(model(noisy[0]), size, mode="bilinear", align_corners=True)
        ce = F.cross_entropy(scores, pseudo, ignore_index=255, reduction="none")
    rarity = (1 - again.chi)[pseudo.where(pseudo != 255, 0)] ** 3
    assert (pseudo != 255).float().mean() > .1
    torch.testing.assert_close(found, (weight * rarity * ce).mean())


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="needs a C++ compiler")
def test_compile(plain):
    done = train(plain, "--name", "compile", "--compile", timeout=900)
    assert done.returncode == 0, done.stderr
    assert difference(plain, "compile") < .05


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_bf16_on_a_gpu_reaches_what_float32_reaches(tmp_path):
    "The preset toy, three seeds each: the means differ by less than their standard deviation."
    scores = {}
    for precision in ("no", "bf16"):
        for seed in range(3):
            name = f"{precision}{seed}"
            command = [sys.executable, "-m", "sac_lit.train", "toy", "--name", name,
                       "--seed", str(seed), "--mixed-precision", precision]
            done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True,
                                  timeout=1800)
            assert done.returncode == 0, done.stderr
            rows = log(tmp_path, name, event="evaluation", stage="sac", network="student")
            scores.setdefault(precision, []).append(rows[-1]["miou"])
    full, half = (torch.tensor(s) for s in scores.values())
    assert (full.mean() - half.mean()).abs() < max(full.std(), half.std()), scores


@pytest.mark.parametrize("arch", ["deeplabv2_resnet101", "deeplabv2_vgg16"])
def test_checkpointed_gradients_are_the_same(arch):
    "Also in training mode, where batch norm must move its statistics once."
    torch.manual_seed(0)
    net = build_model(arch, 3)
    other, x = checkpoint_gradients(copy.deepcopy(net)), torch.randn(2, 3, 33, 41)
    for n in (net, other): n.train()(x).square().mean().backward()
    pairs = zip(net.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(p.grad, q.grad) for p, q in pairs)
    assert all(torch.equal(p, q) for p, q in zip(net.buffers(), other.buffers(), strict=True))


def trained(size, steps=80):
    "A small network that has learned something of the source."
    torch.manual_seed(0)
    model = build_model("deeplabv2_tiny", 19)
    optimizer = torch.optim.Adam(param_groups(model, 3e-3, 5e-4))
    pairs = [render("source", "train", i, size) for i in range(16)]
    for step in range(steps):
        chosen = [pairs[(4 * step + slot) % 16] for slot in range(4)]
        images, labels = (torch.stack(x) for x in zip(*chosen))
        rngs = [generator(0, "abn", step, slot) for slot in range(4)]
        images, labels = source_views(images, labels, rngs, size, scale=(1., 2.))
        abn_step(model, optimizer, normalize(images), labels, normalize(images))
    return freeze_bn(model)


@pytest.mark.slow
def test_bf16_networks_give_the_same_pseudo_labels_and_loss():
    "On a network that has learned something, 99 % of the pseudo labels and the loss to 1 %."
    size = (64, 128)
    model = trained(size)
    images = torch.stack([render("target", "train", i, size)[0] for i in range(8)])
    rngs = [generator(0, "target", i) for i in range(8)]
    clean, boxes, flips = target_views(images, rngs, size)
    rngs = [generator(0, "noise", i, t) for i in range(8) for t in range(clean.shape[1])]
    noisy = photometric_noise(clean.flatten(0, 1), rngs).view_as(clean)
    theta = crop_theta(*boxes.unbind(-1), size, flips)
    views, found = Views(normalize(clean), normalize(noisy), theta), {}
    for dtype in (torch.float32, torch.bfloat16):
        prior, hp = ClassPrior(19, init=1e-2), SelfSupervision(beta=1e-2)
        half = torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)
        with torch.no_grad(), half:
            labels, confidence = pseudo_supervision(MomentumNetwork(model), prior, views, hp)
            logits = model(views.noisy.flatten(0, 1))
            assert logits.dtype in (dtype, torch.float32)
            assert confidence.dtype == prior.chi.dtype == torch.float32
            loss = focal_loss(logits, labels, confidence, prior.chi)
            assert loss.dtype == torch.float32
        found[dtype] = labels, loss
    (labels, loss), (labels_bf16, loss_bf16) = found.values()
    assert (labels != 255).float().mean() > .3
    assert (labels == labels_bf16).float().mean() > .99
    assert abs(loss - loss_bf16) < .01 * loss
