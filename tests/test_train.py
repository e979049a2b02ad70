"""The main job through its real command line, in a small size: end to end, again, killed and resumed, and with bad input."""
import json
import re
import subprocess
import sys

import pytest
import torch
from jobs import ENV, log, train, weights


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "A folder in which the small job has run once."
    cwd = tmp_path_factory.mktemp("job")
    done = train(cwd)
    assert done.returncode == 0, done.stderr
    return cwd, done.stdout


def test_main_job(finished):
    cwd, out = finished
    run = cwd / "runs" / "toy"
    assert re.search(r"^IoU in % +ABN +SAC +gain$", out, re.M) and re.search(r"^mean +\d+\.\d +\d+\.\d +-?\d+\.\d$", out, re.M)
    for name in ("config.json", "log.jsonl", "report.html", "class_frequency.safetensors", "model/config.json", "model_abn/model.safetensors",
                 "momentum/model.safetensors", "figures/curves.png", "figures/views_0000006.png", "best_by_target_labels/config.json", "seconds.json"):
        assert (run / name).stat().st_size > 0, name
    assert not list(run.rglob("*.tmp")) and not list((run / "checkpoints").glob("*"))
    page = (run / "report.html").read_text()
    assert page.count("data:image/png;base64") == 4 and not re.search(r'(src|href)="(?!data:)', page)
    assert [r["step"] for r in log(cwd, event="step", stage="sac")] == [2, 4, 6]
    assert {r["network"] for r in log(cwd, event="evaluation")} == {"student", "momentum"}
    for row in log(cwd, event="classes"): assert len(row["prior"]) == len(row["threshold"]) == 19 and abs(sum(row["prior"]) - 1) < .1


def test_saved_network_predicts(finished):
    from sac_lit.deeplabv2 import SegmentationModel
    cwd, _ = finished
    model = SegmentationModel.from_pretrained(cwd / "runs" / "toy" / "model").eval()
    assert model(torch.zeros(1, 3, 32, 64)).shape[1] == 19


def test_same_command_again_does_nothing_again(finished):
    cwd, _ = finished
    log = (cwd / "runs" / "toy" / "log.jsonl").read_bytes()
    again = train(cwd)
    assert again.returncode == 0 and "mean" in again.stdout
    assert (cwd / "runs" / "toy" / "log.jsonl").read_bytes() == log


def test_accelerate_launch_and_workers_give_the_same_network(finished):
    cwd, _ = finished
    done = train(cwd, "--name", "launched", "--data.workers", "2", launch=("-m", "accelerate.commands.launch", "-m", "sac_lit.train"))
    assert done.returncode == 0, done.stderr
    assert same(weights(cwd), weights(cwd, "launched"))


def test_joint_stage_from_a_network_that_is_there(finished):
    "From a folder, or from a snapshot in the authors' layout: what the run makes that pretrained the network itself."
    from sac_lit.deeplabv2 import SegmentationModel, save_snapshot
    cwd, _ = finished
    save_snapshot(cwd / "abn.pth", SegmentationModel.from_pretrained(cwd / "runs" / "toy" / "model_abn"))
    for k, start in enumerate(("runs/toy/model_abn", "abn.pth")):
        done = train(cwd, "--name", f"from{k}", "--stages", "sac", "--sac.start", start)
        assert done.returncode == 0, done.stderr
        assert same(weights(cwd), weights(cwd, f"from{k}"))
        assert {r["stage"] for r in log(cwd, f"from{k}", event="evaluation")} == {"sac"}


def test_a_cache_gives_the_same_network(finished):
    cwd, _ = finished
    for name in ("cached", "from_cache"):
        done = train(cwd, "--name", name, "--data.cache", "cache", "--data.workers", "1")
        assert done.returncode == 0, done.stderr
        a, b = (weights(cwd, n) for n in ("toy", name))
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert len([p for p in (cwd / "cache").iterdir() if p.is_dir()]) == 2                   # source and target


def test_fresh_starts_over(finished):
    cwd, _ = finished
    for args in (("--name", "again"), ("--name", "again", "--seed", "1", "--fresh")):
        assert train(cwd, *args, "--stages", "abn").returncode == 0
    assert json.loads((cwd / "runs" / "again" / "config.json").read_text())["config"]["seed"] == 1


def test_yardsticks(finished):
    cwd, _ = finished
    done = train(cwd, "--name", "all", "--stages", "source", "abn", "sac", "oracle")
    assert done.returncode == 0, done.stderr
    assert re.search(r"^IoU in % +source only +ABN +SAC +oracle +gain$", done.stdout, re.M)
    assert same(weights(cwd), weights(cwd, "all"))


@pytest.mark.parametrize("args, words", [
    (["--name", "toy", "--sac.lr", "0.5"], ["runs/toy", "sac.lr", "--fresh"]),
    (["--name", "e1", "--stages", "sac"], ["model_abn", "--stages"]),
    (["--name", "e2", "--data.no-toy", "--data.source-root", "nowhere"], ["nowhere"]),
    (["--name", "e3", "--data.no-toy", "--data.target-root", "data/toy_city/source"], ["data/toy_city/source"]),
    (["--name", "e4", "--data.toy-seed", "5"], ["data/toy_city/source"]),
    (["--name", "e6", "--tracker", "pencil"], ["--tracker pencil"]),
    (["--name", "e7", "--mixed-precision", "fp16"], ["--mixed-precision fp16", "GPU"]),
    (["--name", "e8", "--sac.start", "runs/toy/model_abn"], ["--sac.start", "--stages sac"]),
    (["--name", "e9", "--stages", "sac", "--sac.start", "runs/toy"], ["runs/toy", "config.json"]),
    (["--name", "e10", "--stages", "sac", "--sac.start", "runs/toy/model_abn", "--arch", "deeplabv2_vgg16"], ["--sac.start runs/toy/model_abn", "deeplabv2_tiny", "deeplabv2_vgg16"]),
    (["--name", "e5", "--stages", "abn", "--abn.lr", "1e30"], ["runs/e5", "step 2", "nan", "--abn.lr", "images/"]),
])
def test_bad_input_is_one_sentence(finished, args, words):
    done = train(finished[0], *args)
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    assert all(w in lines[0] for w in words), lines[0]


@pytest.mark.parametrize("args", [["no_such_preset"], ["toy", "--no-such-option", "1"], ["toy", "--sac.lr", "fast"]])
def test_bad_command_line(tmp_path, args):
    done = subprocess.run([sys.executable, "-m", "sac_lit.train", *args], cwd=tmp_path, env=ENV, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert any(a.lstrip("-") in done.stderr + done.stdout for a in args)
    assert not list(tmp_path.iterdir())


def test_damaged_image_keeps_the_run(finished):
    cwd, _ = finished
    image = sorted((cwd / "data" / "toy_city" / "target" / "leftImg8bit" / "val").rglob("*.png"))[0]
    whole = image.read_bytes()
    image.write_bytes(whole[: len(whole) // 2])
    try: done = train(cwd, "--name", "damaged", "--stages", "abn")
    finally: image.write_bytes(whole)
    assert done.returncode == 2 and image.name in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert train(cwd, "--name", "damaged", "--stages", "abn").returncode == 0
    assert same(weights(cwd, folder="model_abn"), weights(cwd, "damaged", "model_abn"))


def test_help_lists_presets(tmp_path):
    done = subprocess.run([sys.executable, "-m", "sac_lit.train", "--help"], cwd=tmp_path, env=ENV, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "toy_long" in done.stdout.replace("-", "_")


def test_report_is_drawn_again_from_the_log_alone(finished):
    cwd, _ = finished
    page = cwd / "runs" / "toy" / "report.html"
    before = page.read_text()
    page.unlink()
    done = subprocess.run([sys.executable, "-m", "sac_lit.train", "report", "runs/toy"], cwd=cwd, env=ENV, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and page.read_text() == before, done.stderr
    done = subprocess.run([sys.executable, "-m", "sac_lit.train", "report", "runs/none"], cwd=cwd, env=ENV, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "runs/none" in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_tracker(finished):
    pytest.importorskip("tensorboard", reason="not among the project's packages; Accelerate finds whatever tracker is installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    cwd, _ = finished
    done = train(cwd, "--name", "tracked", "--tracker", "tensorboard")
    assert done.returncode == 0, done.stderr
    events = EventAccumulator(str(cwd / "runs" / "tracked" / "sac_lit"), size_guidance={"images": 0}).Reload()
    assert [s.step for s in events.Scalars("abn/loss_source")] == [2, 4, 6] and [s.step for s in events.Scalars("sac/loss_target")] == [8, 10, 12]
    assert events.Images("sac/views")
