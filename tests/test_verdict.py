"""A verdict without labels: its measures against slow ones, what it must not see, its worth."""
import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn as nn
from jobs import command, SMALL
from PIL import Image
from safetensors.torch import load_file

from sac_lit.config import _IN_A_RUN, load_config, STAGES, TOY, TOY_DATA
from sac_lit.core import generator, IGNORE_INDEX
from sac_lit.deeplabv2 import build_model
from sac_lit.report import load_verdict, results
from sac_lit.run_data import _source_data, open_data, some_of, target_data
from sac_lit.runs import open_run, Run
from sac_lit.verdict import (
    agreement,
    best_step,
    density,
    drift,
    GEOMETRIC,
    Judge,
    keep_by_score,
    kept_by_score,
    laid_back,
    main,
    measures,
    named_classes,
    open_judge,
    score,
    unseen_views,
    verdict,
    view_theta,
    write_verdict,
)

SIZE = 32, 64


def images(count, size=SIZE, seed=0):
    "Smooth random pictures."
    small = torch.rand(count, 3, 4, 8, generator=generator(seed, "images"))
    large = nn.functional.interpolate(small, size, mode="bicubic").clamp(0, 1)
    return [(255 * x).byte() for x in large]


def labelled(count, classes=19, size=SIZE):
    label = torch.randint(classes, (count, *size), generator=generator(1, "labels"))
    return [{"image": x, "label": y.byte()} for x, y in zip(images(count, size, 1), label)]


def network(seed=0, classes=19):
    torch.manual_seed(seed)
    return build_model("deeplabv2_tiny", classes).eval()


class Pixelwise(nn.Module):
    "Classifies each pixel by its colour alone: it says the same of a pixel wherever it lies."
    num_classes = 3

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(3))

    def forward(self, x):
        return torch.einsum("kc,bchw->bkhw", self.weight, x)


# ---------------------------------------------------------------- views

@pytest.mark.parametrize("size", [(32, 64), (48, 40), (7, 9)])
def test_views_are_laid_back(size):
    "What does not depend on the place agrees, but for borders between classes."
    net = Pixelwise()
    for image in images(3, size):
        maps = laid_back(net(unseen_views(image)), size)
        for moved in maps[1:1 + len(GEOMETRIC)]:
            seen = moved != IGNORE_INDEX
            assert seen.float().mean() > .5
            assert (moved == maps[0])[seen].float().mean() > (.9 if min(size) > 20 else .6)


def test_a_turn_keeps_right_angles_on_images_of_any_shape():
    "In pixels the map is a rotation, although its coordinates are normalised."
    H, W = 40, 100
    matrix = view_theta(30., 1., 1., (H, W))[:, :2]
    to_pixels = torch.diag(torch.tensor([W / 2, H / 2]))
    turned = to_pixels @ matrix @ to_pixels.inverse()
    assert torch.allclose(turned @ turned.T, torch.eye(2), atol=1e-6)
    assert math.isclose(turned[1, 0], math.sin(math.radians(30)), abs_tol=1e-6)


def test_no_geometric_view_is_one_of_training():
    "Training enlarges both sides alike; the views shrink, turn, or change the proportions."
    for degrees, height, width in GEOMETRIC.values():
        assert degrees or height != width or height < 1


# ---------------------------------------------------------------- measures

def test_agreement_against_loops():
    a = torch.randint(4, (50,), generator=generator(0, "a"))
    b = torch.where(torch.rand(50, generator=generator(0, "b")) < .6, a, 0)
    counts = torch.zeros(5, 5, dtype=torch.int64)
    for x, y in zip(a.tolist(), b.tolist()): counts[x, y] += 1
    slow = []
    for c in (0, 1, 4):                                # the source has three of five classes
        both = sum(x == c and y == c for x, y in zip(a.tolist(), b.tolist()))
        one = sum(x == c or y == c for x, y in zip(a.tolist(), b.tolist()))
        slow.append(both / one if one else 0.)
    present = torch.tensor([True, True, False, False, True])
    assert math.isclose(agreement(counts, present), sum(slow) / 3, rel_tol=1e-9)


def test_density_against_loops():
    probs = torch.randn(12, 5, generator=generator(0, "density")).softmax(1).double()
    rows = []
    for i in range(12):
        cosines = [float(torch.cosine_similarity(probs[i], probs[j], 0)) for j in range(12)]
        weight = np.exp([c / .05 for j, c in enumerate(cosines) if j != i])
        p = weight / weight.sum()
        rows.append(-(p * np.log(p)).sum())
    assert math.isclose(density(probs), np.mean(rows), rel_tol=1e-6)


def test_drift_of_one_class_taking_all():
    usual = torch.tensor([.6, .3, .1])
    assert drift(usual, usual) == 0
    shares = [torch.tensor([1 - k, k * .75, k * .25]) for k in (.4, .2, .1, 0.)]
    drifts = [drift(p, usual) for p in shares]
    assert drifts == sorted(drifts) and math.isclose(drifts[-1], -math.log(.6), rel_tol=1e-2)
    assert math.isfinite(drift(torch.tensor([0., 0., 1.]), torch.tensor([1., 0., 0.])))


def test_measures_are_repeatable_and_plain():
    net = network().train()
    first, again = (measures(net, images(4), labelled(3)) for _ in range(2))
    assert first == again and net.training
    assert json.loads(json.dumps(first)) == first
    numbers = [x for x in first.values() if isinstance(x, float)]
    lists = [x for x in first.values() if isinstance(x, list)]
    assert len(numbers) + len(lists) == len(first) and {len(x) for x in lists} == {19}
    assert all(map(math.isfinite, numbers + sum(lists, [])))
    assert abs(sum(first["shares"]) - 1) < 1e-5
    assert abs(sum(first["accepted_by_class"]) - first["accepted"]) < 1e-5


def test_images_of_many_sizes():
    different = images(1, (32, 64)) + images(1, (64, 40)) + images(1, (33, 35))
    found = measures(network(), different, labelled(2, size=(30, 50)))
    assert 0 <= found["agreement_turned"] <= 1


def test_a_collapsed_network_is_not_steady():
    "One class everywhere agrees with itself on every view, which is worth one class."
    net = network()
    net.backbone.head.conv2d_list[0].bias.data[3] += 1e3
    found = measures(net, images(3), labelled(3))
    assert all(math.isclose(found[f"agreement_{name}"], 1 / 19) for name in GEOMETRIC)
    assert found["entropy"] < 1e-3 and found["drift"] > 2 and found["accepted"] > .9


def test_some_are_drawn_by_key():
    data = [{"image": i} for i in range(200)]
    one, two, other = ([*some_of(data, key)] for key in ("target", "target", "source"))
    assert one == two and len(one) == 64 and one != other
    assert [*some_of(data[:5], "target")] == data[:5]


# ---------------------------------------------------------------- score and verdict

def test_score_asks_whether_it_is_better_than_before():
    one, two = (measures(network(seed), images(4), labelled(3)) for seed in (0, 1))
    assert score(one, one) == 0 and math.isclose(score(one, two), -score(two, one))
    better = {**one, **{k: v + .1 for k, v in one.items() if k.startswith("agreement")}}
    assert math.isclose(score(one, better), 10)
    assert score(one, {**one, "drift": one["drift"] + .1}) < 0
    assert [verdict(s) for s in (-9, -.1, 0, .1, 9)] == [
        "worse", "cannot tell", "cannot tell", "cannot tell", "better"]


def test_a_view_of_ones_own_counts(monkeypatch):
    "As the exercise has it: in the measures under its name, and in the score."
    usual = measures(network(), images(2), labelled(2))
    monkeypatch.setitem(GEOMETRIC, "steeper", (15., 1., 1.))
    found = measures(network(), images(2), labelled(2))
    assert {k: v for k, v in found.items() if k in usual} == usual
    worse = {**found, "agreement_steeper": found["agreement_steeper"] - .7}
    assert math.isclose(score(found, worse), -10)


def test_being_surer_is_not_being_better():
    net, sure = network(), network()
    for conv in sure.backbone.head.conv2d_list:
        conv.weight.data *= 4
        conv.bias.data *= 4
    judge = Judge(net, images(4), labelled(3))
    found = judge(sure)
    assert found["after"]["entropy"] < found["before"]["entropy"]
    assert abs(found["score"]) < .05 and found["verdict"] == "cannot tell"


def test_classes_are_named():
    source = [.5, .3, .1, .1, 0.]
    before = {"shares": [.5, .3, .1, .05, .05]}
    def named(*shares):
        after = {"shares": list(shares), "source_shares": source}
        return [(c["name"], c["what"]) for c in named_classes(before, after, "abcde")]
    assert named(*source) == []
    assert named(.93, .02, .03, .01, .01) == [
        ("a", "takes over"), ("b", "vanishes")]
    assert named(.6, .3, .1, 0., 0.) == [("d", "vanishes")]     # e is none of the source
    assert named(.5, .05, .4, .05, 0.) == [("c", "takes over")]


def test_a_damaged_network_is_caught_and_its_class_named():
    torch.manual_seed(0)
    net = network()
    with torch.no_grad(): common = net(unseen_views(images(1)[0])).argmax(1)[0].mode()[0].mode()[0]
    eaten = network()
    eaten.backbone.head.conv2d_list[0].bias.data[(int(common) + 1) % 19] += 1e3
    source = labelled(3)
    found = Judge(net, images(4), source)(eaten)
    assert found["verdict"] == "worse"
    assert any(c["what"] == "takes over" for c in found["classes"])
    assert all(c["name"] in found["text"] for c in found["classes"])


@pytest.mark.parametrize("scores, best", [
    ([], None), ([1.], 1), ([1., 3., 2.], 2), ([1., 1.2, 1.4], 1), ([-5., -4., -9.], 2),
    ([1., 1.4, 1.8], 3)])
def test_best_step(scores, best):
    assert best_step([{"step": k + 1, "score": s} for k, s in enumerate(scores)]) == best


# ---------------------------------------------------------------- a run

@pytest.fixture
def run(tmp_path, monkeypatch):
    "A run whose two networks nobody trained."
    monkeypatch.chdir(tmp_path)
    data = replace(TOY_DATA, toy_train=6, toy_val=2, toy_size=SIZE)
    run = open_run(replace(TOY, name="mine", data=data))
    open_data(run)                                     # draws the city
    for seed, folder in enumerate(("model_abn", "model")):
        network(seed).save_pretrained(run.folder / folder)
    return run


def test_no_label_of_the_target_leaks(run, tmp_path):
    "The same verdict with label files, with false ones, and without any."
    text = []
    def judge(data):
        write_verdict(run, data)
        text.append((run.folder / "verdict.json").read_text())
    judge(open_data(run))
    root = tmp_path / run.cfg.data.target_root
    labels = [p for p in root.rglob("*.png") if "labelIds" in p.name]
    assert len(labels) == 8
    for p in labels: Image.new("L", SIZE[::-1], 7).save(p)
    judge(open_data(run))
    shutil.rmtree(root / "gtFine")
    judge({**open_without_val(run), "val": None})
    assert text[0] == text[1] == text[2]


def open_without_val(run):
    "Source and target, where the target has no label files any more."
    return {"source": _source_data(run.cfg.data), "target": target_data(run.cfg.data)}


def test_verdict_of_a_run(run):
    assert load_verdict(run.folder) == {}
    found = write_verdict(run, open_data(run))
    assert load_verdict(run.folder) == found
    assert {"verdict", "score", "text", "classes", "before", "after"} == found.keys()
    assert found["verdict"] == verdict(found["score"])
    assert math.isclose(found["score"], score(found["before"], found["after"]), abs_tol=1e-3)
    for text in ("", "{", "[]", "{}"):
        (run.folder / "verdict.json").write_text(text)
        assert load_verdict(run.folder) == {}


def test_the_best_by_score_is_kept(run):
    "That with the best score so far; a later one has to be clearly better."
    given = iter([1., 3., 3.2, 2.])
    judge = lambda network: {"score": next(given), "verdict": "better"}
    kept = []
    for step in (1, 2, 3, 4):
        said = keep_by_score(run, judge, network(step), step)
        weights = load_file(run.folder / "best_by_score" / "model.safetensors")
        kept.append(next(k for k in (1, 2, 3, 4) if same(weights, network(k))))
    assert kept == [1, 2, 2, 2] and said == " score +2.0"
    assert [r["score"] for r in run.rows(event="score", stage="sac")] == [1., 3., 3.2, 2.]
    assert same(kept_by_score(run).state_dict(), network(2))
    assert run.rows(event="kept")[-1]["step"] == 2


def test_judging_draws_nothing(run):
    "The training's random numbers are the same with and without it."
    judge, net = open_judge(run, open_data(run)), network(5).train()
    torch.manual_seed(0)
    judge(net)
    after = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(after, torch.rand(3))


def same(weights, net):
    "Whether a network has these weights."
    return all(torch.equal(weights[k], v) for k, v in net.state_dict().items())


def test_command(run, capsys):
    main(["runs/mine"])
    said = capsys.readouterr().out
    assert said.startswith(f"{load_verdict(run.folder)['verdict']} (score ")
    with pytest.raises(SystemExit) as end: main(["runs/nothing"])
    error = capsys.readouterr().err
    assert end.value.code == 2 and "runs/nothing" in error and len(error.splitlines()) == 1


@pytest.mark.trains
def test_a_run_that_keeps_by_score(tmp_path):
    "Its network, its table and its verdict belong together; the same without a target's labels."
    options = *SMALL, "--keep", "score", "--sac.lr", "3e-3"
    done = command(tmp_path, "toy", *options, "--eval-every", "1", "--name", "one")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "one"
    run = Run(load_config(folder), None, folder)
    step = run.rows(event="kept")[-1]["step"]
    row, = run.rows(event="evaluation", stage="sac", network="student", step=step)
    assert results(run)["SAC"] == row
    assert step == best_step(run.rows(event="score"))
    saved = load_file(folder / "model" / "model.safetensors")
    kept = load_file(folder / "best_by_score" / "model.safetensors")
    assert saved.keys() == kept.keys() and all(torch.equal(saved[k], kept[k]) for k in saved)
    assert load_verdict(folder)["text"] in done.stdout
    folders = {p.name for p in folder.iterdir() if p.is_dir()}
    assert folders <= _IN_A_RUN | {entry.folder for entry in STAGES.values()}
    score = next(r["score"] for r in run.rows(event="score") if r["step"] == step)
    assert math.isclose(load_verdict(folder)["score"], score, abs_tol=2e-3)
