"""One training on any number of processes and workers: the same batches, losses and weights."""
import re
import shutil
import signal
import time

import pytest
import torch
from jobs import launched, log, start, train, weights

SGD = ("--abn.optimizer sgd --abn.lr 1e-3 --sac.optimizer sgd --sac.lr 1e-3 --sac.schedule constant --sac.steps 10 --sac.source-batch 4 "
       "--sac.groups 2 --sac.num-crops 3 --sac.loss.floor 0 --abn.source-batch 4 --abn.target-batch 4 --eval-every 0").split()  # Adam would turn a rounding error in a gradient near 0 into a step


def close(a, b, rtol=1e-5):
    "Whether two networks are the same to rounding: as a whole, and number by number."
    a, b = (torch.cat([x[k].double().flatten() for k in sorted(x) if "num_batches" not in k]) for x in (a, b))
    return (a - b).norm() < rtol * a.norm() and torch.allclose(a, b, rtol, rtol)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    "A folder in which the job has run on one process."
    cwd = tmp_path_factory.mktemp("processes")
    done = train(cwd, *SGD, "--name", "one")
    assert done.returncode == 0, done.stderr
    return cwd


@pytest.mark.parametrize("processes", [2, 4])
def test_joint_stage(one, processes):
    "Two processes have a group each; four share the views of two groups."
    name = f"sac{processes}"
    (one / "runs" / name).mkdir()
    shutil.copytree(one / "runs" / "one" / "model_abn", one / "runs" / name / "model_abn")
    shutil.copy(one / "runs" / "one" / "class_frequency.safetensors", one / "runs" / name)
    config = (one / "runs" / "one" / "config.json").read_text().replace('"name": "one"', f'"name": "{name}"')
    (one / "runs" / name / "config.json").write_text(config)
    done = train(one, *SGD, "--name", name, launch=launched(processes))
    assert done.returncode == 0, done.stderr
    assert close(weights(one, "one"), weights(one, name)) and close(weights(one, "one", "momentum"), weights(one, name, "momentum"))
    assert all(r["loss_target"] > 0 and sum(r["accepted"]) > .1 for r in log(one, name, stage="sac", event="step"))
    for event, keys in (("step", ("loss_source", "loss_target", "accepted")), ("classes", ("prior", "threshold"))):
        for a, b in zip(log(one, "one", stage="sac", event=event), log(one, name, stage="sac", event=event), strict=True):
            for k in keys: torch.testing.assert_close(torch.tensor(a[k]), torch.tensor(b[k]), rtol=1e-5, atol=1.1e-5)  # the log has 5 digits
    scores = [[r["iou"] for r in log(one, n, stage="sac", event="evaluation")] for n in ("one", name)]
    for a, b in zip(*scores, strict=True): assert all(x == y or abs(x - y) < .05 for x, y in zip(a, b))


def test_pretraining_shares_batch_norm(one):
    "The statistics of a batch are those of all processes; the first steps agree to rounding."
    done = train(one, *SGD, "--name", "abn2", "--stages", "abn", launch=launched(2))
    assert done.returncode == 0, done.stderr
    assert close(weights(one, "one", "model_abn"), weights(one, "abn2", "model_abn"), rtol=1e-4)
    for a, b in zip(log(one, "one", stage="abn", event="step"), log(one, "abn2", stage="abn", event="step")):
        assert abs(a["loss_source"] - b["loss_source"]) < 2e-5


def test_a_batch_that_cannot_be_shared_is_refused_with_numbers_that_work(one):
    done = train(one, *SGD, "--name", "odd", "--abn.source-batch", "3", launch=launched(2))
    assert done.returncode != 0 and "--abn.source-batch 3 cannot be shared by 2 processes; start 1 processes, or give multiples of 2" in done.stderr
    done = train(one, *SGD, "--name", "late", "--sac.source-batch", "3", "--sac.groups", "6", launch=launched(2))     # before pretraining, not after it
    assert done.returncode != 0 and "--sac.source-batch 3 cannot be shared by 2 processes; start 1 processes" in done.stderr
    assert not (one / "runs" / "late" / "log.jsonl").exists()


def test_a_target_batch_too_small_to_be_shared_is_everybodys(one):
    "The released VGG models pretrain with two target images on four GPUs: they only move statistics, which are the same if all see both."
    for name, launch in (("target1", launched(1)), ("target2", launched(2))):
        done = train(one, *SGD, "--abn.target-batch", "1", "--stages", "abn", "--name", name, launch=launch)
        assert done.returncode == 0, done.stderr
    assert close(weights(one, "target1", "model_abn"), weights(one, "target2", "model_abn"), rtol=1e-2)     # variances are counted twice, n / (n - 1) with another n


def test_bf16_on_two_processes(one):
    done = train(one, *SGD, "--mixed-precision", "bf16", "--name", "bf16", launch=launched(2))
    assert done.returncode == 0, done.stderr
    assert all(v.dtype == torch.float32 for k, v in weights(one, "bf16").items() if "num_batches" not in k)


def test_machines_without_a_common_disk_are_refused(one):
    "Each process works in a folder of its own."
    script = one / "apart.py"
    script.write_text("import os, sys\nos.makedirs('disk' + os.environ['RANK'], exist_ok=True)\nos.chdir('disk' + os.environ['RANK'])\n"
                      "import sac_lit.train\nsac_lit.train.main(sys.argv[1:])\n")
    done = train(one, *SGD, "--name", "apart", launch=(*launched(2)[:-2], str(script)))
    assert done.returncode != 0 and "the processes [1] do not see what process 0 wrote there" in done.stderr


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
    "SIGTERM to the launcher: all processes leave after the same step, the state is saved, and one process continues from it."
    args = (*SGD, "--abn.steps", "400", "--log-every", "1", "--checkpoint-every", "1000", "--name", "signal", "--stages", "abn")
    process = start(one, *args, launch=launched(2))
    path = one / "runs" / "signal" / "log.jsonl"
    end = time.time() + 120
    while time.time() < end and process.poll() is None and not (path.exists() and log(one, "signal")): time.sleep(.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode and "stopped as asked (abn, step " in errors, errors
    saved = [p.name for p in (one / "runs" / "signal" / "checkpoints").iterdir()]
    steps = {int(m) for m in re.findall(r"stopped as asked \(abn, step (\d+) of 400\)", errors)}
    assert len(steps) == 1 and saved == [f"abn_{steps.pop():07d}"]
