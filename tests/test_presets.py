"""The experiments beyond the toy: presets, SYNTHIA's means, your own folders."""
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from jobs import ENV, SMALL, log, train
from PIL import Image

from sac_lit.toy_city import render
from sac_lit.train import PRESETS, SUBSETS, absent_classes, paper


def test_presets_are_the_released_settings():
    "The differences between the six experiments, as the released configurations have them."
    configs = {k: c for k, (_, c) in PRESETS.items() if k.startswith(("gta5", "synthia"))}
    assert len(configs) == 6
    for name, c in configs.items():
        resnet, fcn = "resnet" in name, "fcn" in name
        assert c.abn.lr == c.sac.lr == (5e-4 if fcn else 2.5e-4)
        assert (c.abn.source_batch, c.abn.target_batch, c.abn.jitter) == ((12, 8, .5) if resnet else (16, 2, .4))
        assert (c.sac.loss.target_weight, c.sac.loss.floor) == ((5, .2) if resnet else (2, .1))
        assert c.data.source_size == ((1052, 1914) if "gta5" in name else None) and c.data.source_frames == ("released" if "gta5" in name else None)
        assert c.sac.hard_counts and c.sac.uniform == .25 and c.sac.steps == 108_000 and c.abn.steps == (75_000 if resnet else 56_200)
    assert sorted(absent_classes("synthia")) == [9, 14, 16] and [len(v) for v in SUBSETS.values()] == [16, 13]
    assert configs["gta5_vgg16"] == paper("gta5", "deeplabv2_vgg16")


@pytest.mark.parametrize("preset", ["gta5_resnet101", "synthia_fcn8s", "folder"])
def test_without_data_one_sentence(tmp_path, preset):
    done = subprocess.run([sys.executable, "-m", "sac_lit.train", preset], cwd=tmp_path, env=ENV, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert {"gta5_resnet101": "data/gta5", "synthia_fcn8s": "data/synthia", "folder": "--data.source-root"}[preset] in done.stderr


def test_synthia_reports_its_means(tmp_path):
    done = train(tmp_path, "--data.source", "synthia", "--data.source-root", "data/synthia")
    assert done.returncode == 0, done.stderr
    means = {n: float(x) for n, x in re.findall(r"^(mean of \d+) +\S+ +(\S+)", done.stdout, re.M)}
    iou = log(tmp_path, event="evaluation", stage="sac", network="student")[-1]["iou"]
    for name, classes in SUBSETS.items():
        expected = np.nanmean([np.nan if iou[c] is None else iou[c] for c in classes])
        assert abs(means[name] - expected) < .06


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    "Two folders of images as somebody may have them: sub-folders, other numbers than Cityscapes', a value for what has no class."
    root = tmp_path_factory.mktemp("mine")
    (root / "classes.txt").write_text("ground\nbuilt\ngreen\nsky\nthing\n")
    kinds = np.full(256, 7, np.uint8)
    for k, ids in enumerate([(0, 1), (2, 3, 4), (8, 9), (10,), range(11, 19)]): kinds[list(ids)] = k
    for domain, split, count in (("source", "day", 8), ("target", "dusk", 6), ("target", "val", 3)):
        for i in range(count):
            image, label = render(domain, split, i, (32, 64))
            for kind, pixels in (("images", image.permute(1, 2, 0).numpy()), ("labels", kinds[label.numpy()])):
                path = root / split / kind / f"drive_{i % 2}" / f"{i:03}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
    return root


FOLDER = ("folder --arch deeplabv2_tiny --weights None --data.source-root day/images --data.source-labels day/labels --data.classes classes.txt --data.ignore 7 "
          "--data.target-root dusk/images --data.workers 0").split()


def adapt(root, *args):
    return subprocess.run([sys.executable, "-m", "sac_lit.train", *FOLDER, *SMALL[SMALL.index("--abn.steps"):], *args], cwd=root, env=ENV, capture_output=True, text=True, timeout=300)


def test_folder_with_validation(folders):
    done = adapt(folders, "--data.val-root", "val/images", "--data.val-labels", "val/labels", "--name", "with")
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines() if line][-7:-1] == ["ground", "built", "green", "sky", "thing", "mean"]
    config = json.loads((folders / "runs" / "with" / "model" / "config.json").read_text())
    assert list(config["names"]) == ["ground", "built", "green", "sky", "thing"]


def test_folder_without_validation(folders):
    "Nobody has labels of the target: no table, but networks, pictures and a report."
    done = adapt(folders, "--name", "without")
    assert done.returncode == 0, done.stderr
    run = folders / "runs" / "without"
    assert not log(folders, "without", event="evaluation") and (run / "model" / "model.safetensors").exists()
    page = (run / "report.html").read_text()
    assert page.count("data:image/png;base64") == 3 and "no evaluation" in page


def test_folder_lacks_an_option(folders):
    done = adapt(folders, "--data.classes", "None", "--name", "no_classes")
    assert done.returncode == 2 and "--data.classes" in done.stderr and len(done.stderr.strip().splitlines()) == 1
