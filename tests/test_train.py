"""The main job through its real command line, in a small size: end to end, again, on what is one's
own, killed and resumed, and with bad input."""
import json
import re
from inspect import signature
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, MLflowTracker
from house import answer
from jobs import command, log, SMALL, train, weights
from PIL import Image

from sac_lit.config import ABNConfig, Config, SACConfig
from sac_lit.core import UserError
from sac_lit.runs import _NAMED_BY
from sac_lit.toy_city import render
from sac_lit.train import check_shares, lr_factor, warnings_in


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def is_one_sentence(done):
    lines = done.stderr.strip().splitlines()
    return done.returncode == 2 and len(lines) == 1 and lines[0].startswith("error: ")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "A folder in which the small job has run once."
    cwd = tmp_path_factory.mktemp("job")
    done = train(cwd)
    assert done.returncode == 0, done.stderr
    return cwd, done.stdout


# ---------------------------------------------------------------- the job

FILES = ("config.json", "log.jsonl", "report.html", "class_frequency.safetensors", "seconds.json",
         "model/config.json", "model_abn/model.safetensors", "momentum/model.safetensors",
         "figures/curves.png", "figures/views_0000006.png", "best_by_target_labels/config.json")


def test_main_job(finished):
    cwd, out = finished
    run = cwd / "runs" / "toy"
    assert re.search(r"^IoU in % +ABN +SAC +gain$", out, re.M)
    assert re.search(r"^mean +\d+\.\d +\d+\.\d +-?\d+\.\d$", out, re.M)
    for name in FILES: assert (run / name).stat().st_size > 0, name
    assert not list(run.rglob("*.tmp")) and not list((run / "checkpoints").glob("*"))
    page = (run / "report.html").read_text()
    assert page.count("data:image/png;base64") == 4
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert [r["step"] for r in log(cwd, event="step", stage="sac")] == [2, 4, 6]
    assert {r["network"] for r in log(cwd, event="evaluation")} == {"student", "momentum"}
    for row in log(cwd, event="classes"):
        assert len(row["prior"]) == len(row["threshold"]) == 19
        assert abs(sum(row["prior"]) - 1) < .1


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
    launch = ("-m", "accelerate.commands.launch", "-m", "sac_lit.train")
    done = train(cwd, "--name", "launched", "--data.workers", "2", launch=launch)
    assert done.returncode == 0, done.stderr
    assert same(weights(cwd), weights(cwd, "launched"))


def test_joint_stage_from_a_network_that_is_there(finished):
    "From a folder, or from a snapshot in the authors' layout: as if it had pretrained itself."
    from sac_lit.deeplabv2 import SegmentationModel
    from sac_lit.weights import save_snapshot
    cwd, _ = finished
    pretrained = SegmentationModel.from_pretrained(cwd / "runs" / "toy" / "model_abn")
    save_snapshot(cwd / "abn.pth", pretrained)
    for k, start in enumerate(("runs/toy/model_abn", "abn.pth")):
        done = train(cwd, "--name", f"from{k}", "--stages", "sac", "--sac.start", start)
        assert done.returncode == 0, done.stderr
        assert same(weights(cwd), weights(cwd, f"from{k}"))
        assert {r["stage"] for r in log(cwd, f"from{k}", event="evaluation")} == {"sac"}
        assert re.search(rf"^IoU in % +{('ABN', 'start')[k]} +SAC +gain$", done.stdout, re.M)
    row, = log(cwd, "from1", network="start")     # once; the folder's run had said it already
    there = log(cwd, event="evaluation", stage="abn")[-1]
    assert (row["miou"], row["iou"], row["step"]) == (there["miou"], there["iou"], 0)
    assert not log(cwd, "from0", network="start")


@pytest.mark.slow
def test_a_cache_gives_the_same_network(finished):
    cwd, _ = finished
    for name in ("cached", "from_cache"):
        done = train(cwd, "--name", name, "--data.cache", "cache", "--data.workers", "1")
        assert done.returncode == 0, done.stderr
        a, b = (weights(cwd, n) for n in ("toy", name))
        assert all(torch.equal(a[k], b[k]) for k in a)
    kept = [p for p in (cwd / "cache").iterdir() if p.is_dir()]
    assert len(kept) == 2                                                 # source and target


def test_fresh_starts_over(finished):
    cwd, _ = finished
    for args in (("--name", "again"), ("--name", "again", "--seed", "1", "--fresh")):
        assert train(cwd, *args, "--stages", "abn").returncode == 0
    config = json.loads((cwd / "runs" / "again" / "config.json").read_text())
    assert config["config"]["seed"] == 1


def test_yardsticks(finished):
    cwd, _ = finished
    done = train(cwd, "--name", "all", "--stages", "source", "abn", "sac", "oracle")
    assert done.returncode == 0, done.stderr
    assert re.search(r"^IoU in % +source only +ABN +SAC +oracle +gain$", done.stdout, re.M)
    assert same(weights(cwd), weights(cwd, "all"))


def test_report_is_drawn_again_from_the_log_alone(finished):
    cwd, _ = finished
    page = cwd / "runs" / "toy" / "report.html"
    before = page.read_text()
    page.unlink()
    done = command(cwd, "report", "runs/toy")
    assert done.returncode == 0 and page.read_text() == before, done.stderr
    done = command(cwd, "report", "runs/none")
    assert is_one_sentence(done) and "runs/none" in done.stderr


def test_tracker(finished):
    why = "not among the project's packages; Accelerate finds whatever tracker is installed"
    pytest.importorskip("tensorboard", reason=why)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    cwd, _ = finished
    done = train(cwd, "--name", "tracked", "--tracker", "tensorboard")
    assert done.returncode == 0, done.stderr
    place = str(cwd / "runs" / "tracked" / "sac_lit")
    events = EventAccumulator(place, size_guidance={"images": 0}).Reload()
    assert [s.step for s in events.Scalars("abn/loss_source")] == [2, 4, 6]
    assert [s.step for s in events.Scalars("sac/loss_target")] == [8, 10, 12]
    assert events.Images("sac/views")


KEEPER = """
import json
from accelerate.tracking import GeneralTracker

class Keeper(GeneralTracker):
    name, requires_logging_directory, tracker = "keeper", False, None

    def log(self, values, step=None, **kwargs):
        with open("tracked.jsonl", "a") as file: file.write(json.dumps([step, values]) + "\\n")

    def log_images(self, values, step=None, **kwargs):
        self.log({name: list(x.shape[:2]) for name, x in values.items()}, step)
"""


def test_what_a_tracker_gets(finished):
    "All numbers of the log, those of classes by their names; learning rates; and the views."
    cwd, _ = finished
    (cwd / "keeper.py").write_text(KEEPER)
    done = train(cwd, "--name", "kept", "--tracker", "keeper:Keeper", "--abn.schedule", "poly")
    assert done.returncode == 0, done.stderr
    found = {}
    for line in (cwd / "tracked.jsonl").read_text().splitlines():
        step, values = json.loads(line)
        for name, x in values.items(): found.setdefault(name, {})[step] = x
    assert list(found["abn/loss_source"]) == [2, 4, 6] and found["sac/views"] == {
        9: [1, 3], 12: [1, 3]}
    for name in ("accepted", "prior", "threshold"):
        rows = [row for row in log(cwd, "kept", stage="sac") if name in row]
        assert found[f"sac/{name}/car"] == {6 + r["step"]: r[name][13] for r in rows}
    for network in ("student", "momentum"):
        *_, last = log(cwd, "kept", stage="sac", event="evaluation", network=network)
        assert found[f"sac/{network}/miou"][12] == last["miou"]
        assert found[f"sac/{network}/iou/road"][12] == last["iou"][0]
    falling = list(found["abn/lr/weights"].values())
    assert falling == sorted(falling, reverse=True) and falling[0] > falling[-1] > 0
    assert found["sac/lr/biases"][8] == 2 * found["sac/lr/weights"][8] > 0


def test_trackers_that_have_a_place_for_the_name_of_a_run():
    assert {*_NAMED_BY} <= {str(name) for name in LOGGER_TYPE_TO_CLASS}
    assert _NAMED_BY["mlflow"] in signature(MLflowTracker.__init__).parameters


# ---------------------------------------------------------------- what is one's own

def test_a_stage_of_ones_own(finished):
    "The answer of the exercise: one entry, in at most 20 lines, with a column and a curve."
    cwd, _ = finished
    code = answer("09_train", "stage")
    assert len([line for line in code.splitlines()[1:] if line]) <= 20
    assert max(map(len, code.splitlines())) <= 100
    (cwd / "adabn.py").write_text(code)
    done = train(cwd, "--name", "own", "--stages", "source", "adabn:ADABN")
    assert done.returncode == 0, done.stderr
    assert re.search(r"^IoU in % +source only +AdaBN$", done.stdout, re.M)
    assert [r["step"] for r in log(cwd, "own", stage="adabn:ADABN", event="step")] == [2, 4, 6]
    before, after = weights(cwd, "own", "model_source"), weights(cwd, "own", "model_adabn")
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    assert moved and all("running_" in k or "num_batches" in k for k in moved)


SIZES = ((32, 64), (64, 32), (40, 40), (27, 51))  # wide, upright, square, odd


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    "Own folders whose images have any size; one is upright by a note of its camera only."
    root = tmp_path_factory.mktemp("mixed")
    (root / "classes.txt").write_text("ground\nbuilt\ngreen\nsky\nthing\n")
    kinds = np.full(256, 255, np.uint8)
    groups = (0, 1), (2, 3, 4), (8, 9), (10,), range(11, 19)
    for k, ids in enumerate(groups): kinds[list(ids)] = k
    for domain, split, count in (("source", "day", 8), ("target", "dusk", 7), ("target", "val", 4)):
        for i in range(count):
            image, label = render(domain, split, i, SIZES[i % 4])
            (root / split / "images").mkdir(parents=True, exist_ok=True)
            (root / split / "labels").mkdir(exist_ok=True)
            picture, exif = Image.fromarray(image.permute(1, 2, 0).numpy()), Image.Exif()
            if i == 3:
                picture, exif[0x0112] = picture.transpose(Image.Transpose.ROTATE_90), 6
            picture.save(root / split / "images" / f"{i}.jpg", quality=95, exif=exif)
            Image.fromarray(kinds[label.numpy()]).save(root / split / "labels" / f"{i}.png")
    return root


FOLDERS = ("folder_cpu --arch deeplabv2_tiny --encoder None --weights None "
           "--data.source-root day/images --data.source-labels day/labels "
           "--data.classes classes.txt --data.target-root dusk/images "
           "--data.val-root val/images --data.val-labels val/labels").split()
STEPS = SMALL[SMALL.index("--abn.steps"):]
ANY_SIZE = "--data.source-size None --data.target-size None --data.eval-size None".split()


def train_any_size(cwd, name, workers):
    "A run in which all images keep their sizes."
    options = "--data.workers", workers, "--name", name
    done = command(cwd, *FOLDERS, *STEPS, *ANY_SIZE, *options)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^IoU in % +ABN +SAC +gain$", done.stdout, re.M)


@pytest.fixture(scope="module")
def plain(mixed):
    "The folder after such a run."
    train_any_size(mixed, "plain", "0")
    return mixed


def test_images_of_different_sizes(plain):
    "All sizes as they are, in training and in evaluation; with workers, the same."
    train_any_size(plain, "workers", "2")
    assert same(weights(plain, "plain"), weights(plain, "workers"))
    iou = log(plain, "plain", event="evaluation", stage="sac", network="student")[-1]["iou"]
    assert len(iou) == 5 and max(x or 0 for x in iou) > 0
    assert all(np.isfinite(r["loss_source"]) for r in log(plain, "plain", event="step"))


def test_an_image_is_evaluated_at_its_own_size(plain):
    "Every labelled pixel is counted, no padding."
    from sac_lit.core import evaluate
    from sac_lit.datasets import open_dataset
    from sac_lit.deeplabv2 import SegmentationModel
    from sac_lit.run_data import evaluate_shared
    val = plain / "val"
    data = open_dataset("folder", val / "images", val / "labels", classes=plain / "classes.txt")
    model = SegmentationModel.from_pretrained(plain / "runs" / "plain" / "model")
    cfg = SimpleNamespace(data=SimpleNamespace(workers=0))
    acc = SimpleNamespace(num_processes=1, process_index=0, autocast=torch.no_grad)
    run = SimpleNamespace(cfg=cfg, accelerator=acc, device=torch.device("cpu"),
                          reduce=lambda x, how: x, stopping=lambda: False)
    cm = evaluate_shared(run, model, data)
    assert cm.counts.sum() == sum((s["label"] != 255).sum() for s in data)
    assert len({s["image"].shape for s in data}) == 4
    nothing = evaluate(lambda image: torch.zeros(image.shape[-2:]).long(), data, 5)
    assert nothing.counts.sum() == cm.counts.sum()


def test_own_folders_have_an_oracle_and_a_gain(plain):
    "With the labels of the target's training images, which no other stage sees."
    labels = "--data.target-label-maps", "dusk/labels"
    done = command(plain, *FOLDERS, *STEPS, *ANY_SIZE, "--name", "plain_too", *labels,
                   "--data.workers", "0", "--stages", "abn", "sac", "oracle")
    assert done.returncode == 0, done.stderr
    assert re.search(r"^IoU in % +ABN +SAC +oracle +gain$", done.stdout, re.M)
    assert same(weights(plain, "plain"), weights(plain, "plain_too"))
    gone = command(plain, *FOLDERS, *STEPS, "--name", "gone", "--stages", "abn", "oracle",
                   "--data.target-label-maps", "val/labels")
    assert is_one_sentence(gone) and "label" in gone.stderr
    assert not (plain / "runs" / "gone" / "log.jsonl").exists()


def test_a_cache_needs_one_size(mixed):
    done = command(mixed, *FOLDERS, *STEPS, *ANY_SIZE, "--data.cache", "kept", "--name", "kept")
    assert is_one_sentence(done) and "--data.source-size" in done.stderr, done.stderr


# ---------------------------------------------------------------- bad input

@pytest.mark.parametrize("args, words", [
    ("--name toy --sac.lr 0.5", ["runs/toy", "sac.lr", "--fresh"]),
    ("--name e1 --stages sac", ["model_abn", "--stages"]),
    ("--name e2 --data.no-toy --data.source-root nowhere", ["nowhere"]),
    ("--name e3 --data.no-toy --data.target-root data/toy_city/source", ["data/toy_city/source"]),
    ("--name e4 --data.toy-seed 5", ["data/toy_city/source"]),
    ("--name e6 --tracker pencil", ["--tracker pencil"]),
    ("--name e7 --mixed-precision fp16", ["--mixed-precision fp16", "GPU"]),
    ("--name e8 --sac.start runs/toy/model_abn", ["--sac.start", "--stages sac"]),
    ("--name e9 --stages sac --sac.start runs/toy", ["runs/toy", "config.json"]),
    ("--name e10 --stages sac --sac.start runs/toy/model_abn --arch deeplabv2_vgg16",
     ["--sac.start runs/toy/model_abn", "deeplabv2_tiny", "deeplabv2_vgg16"]),
    ("--name e5 --stages abn --abn.lr 1e30", ["runs/e5", "step 2", "nan", "--abn.lr", "images/"])])
def test_bad_input_is_one_sentence(finished, args, words):
    done = train(finished[0], *args.split())
    assert is_one_sentence(done), done.stderr
    assert all(w in done.stderr for w in words), done.stderr


@pytest.mark.parametrize("args, words", [
    ("--arch deeplabv3", ["--arch deeplabv3", "deeplabv2_tiny"]),
    ("--arch nothing_here:Net", ["--arch nothing_here:Net"]),
    ("--arch json:dumps", ["--arch json:dumps"]),
    ("--pool mode", ["pool mode", "min_entropy"]),
    ("--pool math:sqrt", ["pool math:sqrt"]),
    ("--sac.noise blur fog", ["--sac.noise fog", "grey"]),
    ("--sac.loss.confidence some", ["confidence some", "pixel"]),
    ("--stages abn sacc", ["--stages sacc", "oracle"]),
    ("--data.source gta6", ["gta6", "synthia"]),
    ("--data.target kitti", ["kitti", "cityscapes"])])
def test_an_unknown_entry_is_refused_before_anything_is_made(tmp_path, args, words):
    done = train(tmp_path, *args.split())
    assert is_one_sentence(done), done.stderr
    assert all(w in done.stderr for w in words), done.stderr
    assert not list(tmp_path.rglob("*.jsonl")) and not (tmp_path / "data").exists()


OWN = """
from accelerate.tracking import GeneralTracker
from sac_lit.config import Stage
from sac_lit.datasets import Layout
from sac_lit.views import NOISE

class Tracker(GeneralTracker):
    name, requires_logging_directory, tracker = "own", False, None
    def __init__(self, place): self.place = place

CLASH = Stage("mine", "model", "abn", "sac_lit.train:train_supervised")
BLUR = NOISE["blur"]._replace(apply=lambda images: images)
HIGH = Layout("images/*.png", "labels/*.png", {70000: 0})
"""


@pytest.mark.parametrize("args, words", [
    ("--tracker own_entries:Tracker", "cannot be made without arguments (TypeError: "),
    ("--stages sac own_entries:CLASH", "the folder model is taken"),
    ("--sac.noise own_entries:BLUR", "does not fit (TypeError: "),
    ("--data.source own_entries:HIGH", "ids takes 70000 to 0"),
    ("--pool=modes", "--sac.loss.pool modes: no such entry")])
def test_what_is_ones_own_is_tried_before_anything_is_made(tmp_path, args, words):
    (tmp_path / "own_entries.py").write_text(OWN)
    done = train(tmp_path, *args.split())
    assert is_one_sentence(done) and words in done.stderr, done.stderr
    assert not (tmp_path / "data").exists() and not list(tmp_path.rglob("config.json"))


@pytest.mark.parametrize("args", ["no_such_preset", "toy --no-such-option 1", "toy --sac.lr fast"])
def test_bad_command_line(tmp_path, args):
    done = command(tmp_path, *args.split())
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert any(a.lstrip("-") in done.stderr + done.stdout for a in args.split())
    assert not list(tmp_path.iterdir())


def test_damaged_image_keeps_the_run(finished):
    cwd, _ = finished
    images = cwd / "data" / "toy_city" / "target" / "leftImg8bit" / "val"
    image = sorted(images.rglob("*.png"))[0]
    whole = image.read_bytes()
    image.write_bytes(whole[: len(whole) // 2])
    try: done = train(cwd, "--name", "damaged", "--stages", "abn")
    finally: image.write_bytes(whole)
    assert is_one_sentence(done) and image.name in done.stderr
    assert train(cwd, "--name", "damaged", "--stages", "abn").returncode == 0
    assert same(weights(cwd, folder="model_abn"), weights(cwd, "damaged", "model_abn"))


def test_help_lists_presets(tmp_path):
    done = command(tmp_path, "--help")
    assert done.returncode == 0 and "toy_long" in done.stdout.replace("-", "_")


# ---------------------------------------------------------------- functions

def test_learning_rate():
    poly, constant = ABNConfig(steps=10, schedule="poly"), SACConfig(steps=10)
    assert [lr_factor(constant, step) for step in (0, 9)] == [1, 1]
    factors = [lr_factor(poly, step) for step in range(11)]
    assert factors[0] == 1 and factors[10] == 0 and abs(factors[5] - .5 ** .9) < 1e-12
    assert factors == sorted(factors, reverse=True)


def steady(n, accepted=(.4, .05)):
    return [{"loss_source": .3, "accepted": list(accepted)} for _ in range(n)]


def test_warnings():
    "The last tenth of the log, at least four lines, beside the first."
    names = ("road", "car")
    assert warnings_in([], names) == warnings_in(steady(7), names) == []
    assert warnings_in(steady(100), names) == []
    gone = steady(90) + steady(10, (.4, .004))
    assert warnings_in(gone, names) == ["pseudo labels of the class car are dying out"]
    assert warnings_in(steady(90, (.4, 1e-5)) + steady(10, (.4, 0)), names) == []   # never there
    climbed = steady(90) + [{**row, "loss_source": .46} for row in steady(10)]
    text, = warnings_in(climbed, names)
    assert "source loss" in text
    assert warnings_in(steady(99) + climbed[-1:], names) == []                      # one line only


def test_shares_are_checked_for_the_stages_of_the_run():
    def run(processes, *stages):
        cfg = Config(stages=stages, abn=ABNConfig(source_batch=6), sac=SACConfig(source_batch=8))
        return SimpleNamespace(cfg=cfg, accelerator=SimpleNamespace(num_processes=processes))
    check_shares(run(3, "abn"))
    check_shares(run(8, "sac"))                                           # 2 groups of 4 views
    with pytest.raises(UserError, match="--abn.source-batch 6.* by 4 .*start 1, 2, 3, 6 processes"):
        check_shares(run(4, "source"))
    with pytest.raises(UserError, match="--sac.source-batch 8, --sac.groups 2 .*start 1, 2 proc"):
        check_shares(run(3, "abn", "sac"))
