"""One training on any number of processes and workers: the same batches, losses and weights."""
import re
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
import torch.nn as nn
from accelerate import Accelerator
from jobs import forked, launched, log, ranks, start, train, wait_for_log, weights
from test_step import batch

from sac_lit.abn_pretraining import freeze_bn
from sac_lit.config import TOY
from sac_lit.deeplabv2 import build_model
from sac_lit.ema_training import MomentumNetwork, sac_step, SelfSupervision, Views
from sac_lit.moving_threshold import ClassPrior
from sac_lit.runs import Run

# SGD: Adam would turn a rounding error in a gradient near 0 into a step
SGD = (
    "--abn.optimizer sgd --abn.lr 1e-3 --abn.source-batch 4 --abn.target-batch 4 "
    "--sac.optimizer sgd --sac.lr 1e-3 --sac.schedule constant --sac.steps 10 "
    "--sac.source-batch 4 --sac.groups 2 --sac.num-crops 3 --sac.loss.floor 0 "
    "--eval-every 0").split()


def close(a, b, rtol=1e-5):
    "Whether two networks are the same to rounding: as a whole, and number by number."
    a, b = flat(a), flat(b)
    return (a - b).norm() < rtol * a.norm() and torch.allclose(a, b, rtol, rtol)


def flat(network):
    "All numbers of a network but the counters, in one row."
    names = [k for k in sorted(network) if "num_batches" not in k]
    return torch.cat([network[k].double().flatten() for k in names])


def joint_steps(run):
    "The network after three steps on this process's share, the last losses, and the prior."
    torch.manual_seed(0)
    network = freeze_bn(build_model("deeplabv2_tiny", 19))
    teacher, prior = MomentumNetwork(network), ClassPrior(19)
    share, slots = run.share(2, "sac.groups", views=2), run.share(4, "sac.source-batch").slots
    groups, mine = (slice(x[0], x[-1] + 1) for x in (share.slots, slots))
    model, optimizer = run.accelerator.prepare(
        network, torch.optim.Adam(network.parameters(), 1e-3))
    how = run.shared_execution(model, share)
    for step in range(3):
        images, labels, views = batch(step, crops=1, sources=4)
        clean, noisy = (x[groups, share.mine] for x in views[:2])
        part = Views(clean, noisy, views.theta[groups], share.mine)
        found = sac_step(model, teacher, prior, optimizer, images[mine], labels[mine], part,
                         SelfSupervision(zeta=.1), how)
    assert found["accepted"].sum() > .1
    weights = nn.utils.parameters_to_vector(network.parameters()).detach()
    return torch.cat([weights, *(x.flatten() for x in found.values()), prior.chi])


def joint_steps_in_float64():
    torch.Tensor.float = torch.Tensor.double           # what is never below float32 is above it
    torch.set_default_dtype(torch.float64)
    run = Run(replace(TOY, plain=True), Accelerator(cpu=True), Path())
    found = joint_steps(run)
    if run.accelerator.is_main_process: torch.save(found, "steps.pt")


@pytest.mark.parametrize("several", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_joint_steps_in_float64(tmp_path, several):
    """Equal on 1, 2 and 4 processes, up to the rounding of float64, with Adam.

    What differs in float32 is therefore rounding, and what Adam makes of it, and nothing else."""
    found = []
    for processes in (1, several):
        envs = ranks(processes) if processes > 1 else ({},)
        done = forked(joint_steps_in_float64, cwd=tmp_path, envs=envs)
        assert done.returncode == 0, done.stderr
        found.append(torch.load(tmp_path / "steps.pt"))
    assert found[0].dtype == torch.float64
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-11)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    "A folder in which the job has run on one process."
    cwd = tmp_path_factory.mktemp("processes")
    done = train(cwd, *SGD, "--name", "one")
    assert done.returncode == 0, done.stderr
    return cwd


def copy_pretrained(cwd, name):
    "A run that has everything up to the joint stage from the run `one`."
    there, here = cwd / "runs" / "one", cwd / "runs" / name
    here.mkdir()
    shutil.copytree(there / "model_abn", here / "model_abn")
    shutil.copy(there / "class_frequency.safetensors", here)
    config = (there / "config.json").read_text()
    (here / "config.json").write_text(config.replace('"name": "one"', f'"name": "{name}"'))


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_joint_stage(one, processes):
    "Two processes, by a launcher, have a group each; four share the views of two groups."
    name = f"sac{processes}"
    copy_pretrained(one, name)
    how = {"launch": launched(2)} if processes == 2 else {"processes": processes}
    done = train(one, *SGD, "--name", name, **how)
    assert done.returncode == 0, done.stderr
    assert close(weights(one, "one"), weights(one, name))
    assert close(weights(one, "one", "momentum"), weights(one, name, "momentum"))
    steps = log(one, name, stage="sac", event="step")
    assert all(r["loss_target"] > 0 and sum(r["accepted"]) > .1 for r in steps)
    compared = {
        "step": ("loss_source", "loss_target", "accepted"), "classes": ("prior", "threshold")}
    for event, keys in compared.items():
        rows = [log(one, n, stage="sac", event=event) for n in ("one", name)]
        for a, b in zip(*rows, strict=True):
            for k in keys:                # the log has 5 digits
                x, y = torch.tensor(a[k]), torch.tensor(b[k])
                torch.testing.assert_close(x, y, rtol=1e-5, atol=1.1e-5)
    logs = [log(one, n, stage="sac", event="evaluation") for n in ("one", name)]
    for a, b in zip(*logs, strict=True):
        assert all(x == y or abs(x - y) < .05 for x, y in zip(a["iou"], b["iou"]))


def test_pretraining_shares_batch_norm(one):
    "The statistics of a batch are those of all processes; the first steps agree to rounding."
    done = train(one, *SGD, "--name", "abn2", "--stages", "abn", processes=2)
    assert done.returncode == 0, done.stderr
    assert close(weights(one, "one", "model_abn"), weights(one, "abn2", "model_abn"), rtol=1e-4)
    logs = [log(one, n, stage="abn", event="step") for n in ("one", "abn2")]
    for a, b in zip(*logs):
        assert abs(a["loss_source"] - b["loss_source"]) < 2e-5


def test_a_batch_that_cannot_be_shared_is_refused_with_numbers_that_work(one):
    done = train(one, *SGD, "--name", "odd", "--abn.source-batch", "3", processes=2)
    sentence = ("--abn.source-batch 3 cannot be shared by 2 processes; "
                "start 1 processes, or give multiples of 2")
    assert done.returncode != 0 and sentence in done.stderr
    late = ("--name", "late", "--sac.source-batch", "3", "--sac.groups", "6")
    done = train(one, *SGD, *late, processes=2)       # before pretraining, not after it
    sentence = "--sac.source-batch 3 cannot be shared by 2 processes; start 1 processes"
    assert done.returncode != 0 and sentence in done.stderr
    assert not (one / "runs" / "late" / "log.jsonl").exists()


def test_a_target_batch_too_small_to_be_shared_is_everybodys(one):
    """The released VGG models pretrain with two target images on four GPUs.

    They only move statistics, which are the same if all see both."""
    args = (*SGD, "--abn.target-batch", "1", "--stages", "abn")
    for processes in (1, 2):
        done = train(one, *args, "--name", f"target{processes}", processes=processes)
        assert done.returncode == 0, done.stderr
    a, b = weights(one, "target1", "model_abn"), weights(one, "target2", "model_abn")
    assert close(a, b, rtol=1e-2)     # variances are counted twice, n / (n - 1) with another n


@pytest.mark.slow
def test_bf16_on_two_processes(one):
    done = train(one, *SGD, "--mixed-precision", "bf16", "--name", "bf16", processes=2)
    assert done.returncode == 0, done.stderr
    kinds = {v.dtype for k, v in weights(one, "bf16").items() if "num_batches" not in k}
    assert kinds == {torch.float32}


APART = """
import os, sys
os.makedirs('disk' + os.environ['RANK'], exist_ok=True)
os.chdir('disk' + os.environ['RANK'])
import sac_lit.train
sac_lit.train.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_machines_without_a_common_disk_are_refused(one):
    "Each process works in a folder of its own."
    script = one / "apart.py"
    script.write_text(APART)
    done = train(one, *SGD, "--name", "apart", launch=(*launched(2)[:-2], str(script)))
    sentence = "the processes [1] do not see what process 0 wrote there"
    assert done.returncode != 0 and sentence in done.stderr


@pytest.mark.slow
def test_workers_change_nothing(one):
    "20 steps, 10 a stage, with 0, 1 and 3 workers: equal to the last bit."
    args = (*SGD, "--abn.steps", "10")
    for workers in ("0", "1", "3"):
        done = train(one, *args, "--name", f"workers{workers}", "--data.workers", workers)
        assert done.returncode == 0, done.stderr
    for other in ("workers1", "workers3"):
        for folder in ("model_abn", "model", "momentum"):
            a, b = weights(one, "workers0", folder), weights(one, other, folder)
            assert all(torch.equal(a[k], b[k]) for k in a)
        assert log(one, "workers0") == log(one, other)


def test_a_signal_reaches_all_processes(one):
    """SIGTERM to the launcher: all processes leave after the same step.

    The state is saved, and one process continues from it."""
    args = (*SGD, "--abn.steps", "400", "--log-every", "1", "--checkpoint-every", "1000",
            "--name", "signal", "--stages", "abn")
    process = start(one, *args, launch=launched(2))
    wait_for_log(one, process, "signal")
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode and "stopped as asked (abn, step " in errors, errors
    saved = [p.name for p in (one / "runs" / "signal" / "checkpoints").iterdir()]
    found = re.findall(r"stopped as asked \(abn, step (\d+) of 400\)", errors)
    steps = {int(m) for m in found}
    assert len(steps) == 1 and saved == [f"abn_{steps.pop():07d}"]


def test_one_of_two_processes_is_killed(one):
    "The other one ends within seconds, with one sentence of its own; the run can go on."
    args = (*SGD, "--abn.steps", "20000", "--name", "bereaved", "--data.workers", "0")
    process = start(one, *args, launch=launched(2))
    wait_for_log(one, process, "bereaved")
    ranks = {rank_of(child): child for child in psutil.Process(process.pid).children()}
    ranks["1"].kill()
    begin = time.monotonic()
    _, said = process.communicate(timeout=60)
    assert time.monotonic() - begin < 20 and process.returncode
    assert said.count("error: ") == 1 and "does not answer any more" in said
    assert "rank0" not in said


def rank_of(process):
    return process.environ().get("RANK")
