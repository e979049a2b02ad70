"""The experiments beyond the toy: presets, SYNTHIA's means, your own folders."""
import json
import re

import numpy as np
import pytest
from jobs import command, log, SMALL, train
from PIL import Image

from sac_lit.config import absent_classes, PRESETS, released_config, SUBSETS
from sac_lit.toy_city import render

RELEASED = {k: c for k, (_, c) in PRESETS.items() if k.startswith(("gta5", "synthia"))}


def test_six_experiments():
    assert len(RELEASED) == 6
    assert RELEASED["gta5_vgg16"] == released_config("gta5", "vgg16")
    assert sorted(absent_classes("synthia")) == [9, 14, 16]
    assert [len(v) for v in SUBSETS.values()] == [16, 13]


@pytest.mark.parametrize("name", RELEASED)
def test_presets_are_the_released_settings(name):
    "The differences between the six experiments, as the released configurations have them."
    c, resnet, gta5 = RELEASED[name], "resnet" in name, "gta5" in name
    assert c.abn.lr == c.sac.lr == (5e-4 if "fcn" in name else 2.5e-4)
    batches = c.abn.source_batch, c.abn.target_batch
    assert (*batches, c.abn.jitter) == ((12, 8, .5) if resnet else (16, 2, .4))
    assert (c.sac.loss.target_weight, c.sac.loss.floor) == ((5, .2) if resnet else (2, .1))
    assert c.data.source_size == ((1052, 1914) if gta5 else None)
    assert c.data.source_frames == ("released" if gta5 else None)
    assert c.sac.hard_counts and c.sac.uniform == .25
    assert c.sac.steps == 108_000 and c.abn.steps == (75_000 if resnet else 56_200)


@pytest.mark.parametrize("preset, place", [
    ("gta5_resnet101", "data/gta5"),
    ("synthia_fcn8s", "data/synthia"),
    ("folder", "--data.source-root")])
def test_without_data_one_sentence(tmp_path, preset, place):
    done = command(tmp_path, preset)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert place in done.stderr


def test_synthia_reports_its_means(tmp_path):
    done = train(tmp_path, "--data.source", "synthia", "--data.source-root", "data/synthia")
    assert done.returncode == 0, done.stderr
    found = re.findall(r"^(mean of \d+) +\S+ +(\S+)", done.stdout, re.M)
    means = {n: float(x) for n, x in found}
    iou = log(tmp_path, event="evaluation", stage="sac", network="student")[-1]["iou"]
    for name, classes in SUBSETS.items():
        expected = np.nanmean([np.nan if iou[c] is None else iou[c] for c in classes])
        assert abs(means[name] - expected) < .06


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    "Two folders of images as somebody may have them: sub-folders, numbers of their own."
    root = tmp_path_factory.mktemp("mine")
    (root / "classes.txt").write_text("ground\nbuilt\ngreen\nsky\nthing\n")
    kinds = np.full(256, 7, np.uint8)     # 7: a value for what has no class
    for k, ids in enumerate([(0, 1), (2, 3, 4), (8, 9), (10,), range(11, 19)]): kinds[list(ids)] = k
    for domain, split, count in (("source", "day", 8), ("target", "dusk", 6), ("target", "val", 3)):
        for i in range(count):
            image, label = render(domain, split, i, (32, 64))
            name = f"drive_{i % 2}/{i:03}.png"
            save(root / split / "images" / name, image.permute(1, 2, 0).numpy())
            save(root / split / "labels" / name, kinds[label.numpy()])
    return root


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


FOLDER = (
    "folder --arch deeplabv2_tiny --weights None --data.source-root day/images "
    "--data.source-labels day/labels --data.classes classes.txt --data.ignore 7 "
    "--data.target-root dusk/images --data.workers 0").split()


def adapt(root, *args):
    steps = SMALL[SMALL.index("--abn.steps"):]
    return command(root, *FOLDER, *steps, *args, timeout=300)


def test_folder_with_validation(folders):
    val = ("--data.val-root", "val/images", "--data.val-labels", "val/labels")
    done = adapt(folders, *val, "--name", "with")
    assert done.returncode == 0, done.stderr
    first = [line.split()[0] for line in done.stdout.splitlines() if line]
    assert first[-7:-1] == ["ground", "built", "green", "sky", "thing", "mean"]
    config = json.loads((folders / "runs" / "with" / "model" / "config.json").read_text())
    assert list(config["names"]) == ["ground", "built", "green", "sky", "thing"]


def test_folder_without_validation(folders):
    "Nobody has labels of the target: no table, but networks, pictures and a report."
    done = adapt(folders, "--name", "without")
    assert done.returncode == 0, done.stderr
    run = folders / "runs" / "without"
    assert not log(folders, "without", event="evaluation")
    assert (run / "model" / "model.safetensors").exists()
    page = (run / "report.html").read_text()
    assert page.count("data:image/png;base64") == 3 and "there is no mIoU" in page


def test_folder_lacks_an_option(folders):
    done = adapt(folders, "--data.classes", "None", "--name", "no_classes")
    assert done.returncode == 2 and "--data.classes" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.fixture(scope="module")
def sized(folders):
    "A run on images that are made smaller for the network, with some that stand upright."
    for path in (folders / "val" / "images").rglob("000.png"):
        for file in (path, folders / "val" / "labels" / path.relative_to(folders / "val/images")):
            Image.open(file).transpose(Image.Transpose.ROTATE_90).save(file)
    small = "--data.source-size 16 32 --data.target-size 16 32 --data.eval-size 16 32".split()
    crops = "--abn.crop 16 32 --sac.crop 16 32".split()
    val = ("--data.val-root", "val/images", "--data.val-labels", "val/labels")
    done = adapt(folders, *val, *small, *crops, "--name", "sized", "--mixed-precision", "bf16")
    assert done.returncode == 0, done.stderr
    return folders


def test_report_and_predict_give_the_same_figures(sized):
    "Network, sizes and labels are the same, whatever precision the training had."
    run = sized / "runs" / "sized"
    for stage, folder in (("abn", "model_abn"), ("sac", "model")):
        place = "--labels val/labels --classes classes.txt --ignore 7".split()
        done = command(sized, "evaluate", f"runs/sized/{folder}", "val/images", "--layout",
                       "folder", *place, "--out", stage, module="sac_lit.predict")
        assert done.returncode == 0, done.stderr
        scores = json.loads((sized / stage / "scores.json").read_text())
        row = log(sized, "sized", event="evaluation", stage=stage, network="student")[-1]
        known = [None if x is None else round(100 * x, 2) for x in scores["iou"].values()]
        assert known == row["iou"]
        assert np.sum(scores["confusion"]) == sum(
            (np.array(Image.open(p)) != 7).sum() for p in (sized / "val/labels").rglob("*.png"))
    assert "brought to the area of" in (run / "report.html").read_text()


def test_the_size_is_settled_on_the_source(sized):
    "The best one of those that were tried, by the source; the joint stage's network keeps it."
    row, = log(sized, "sized", event="inference_size")
    assert row["stage"] == "abn" and list(row["tried"])[0] == "16x32"
    assert list(row["tried"])[-1] == "32x64"                 # the size of the images
    best = max(row["tried"], key=row["tried"].get)
    assert "x".join(map(str, row["size"])) == best
    for folder in ("model_abn", "model", "momentum"):
        config = json.loads((sized / "runs/sized" / folder / "config.json").read_text())
        assert config["inference_size"] == row["size"]
