"""The report of a run, from a log and pictures that were made by hand."""
import base64
import dataclasses
import io
import json
import os
import re
from dataclasses import replace
from types import SimpleNamespace

import matplotlib.pyplot as plt
import pytest
import torch
from PIL import Image

from sac_lit.config import PRESETS, STAGES, SUBSETS, TOY
from sac_lit.core import generator, NAMES, use_style
from sac_lit.crop_fusion import crop_theta
from sac_lit.deeplabv2 import build_model
from sac_lit.ema_training import MomentumNetwork, pseudo_supervision, Views
from sac_lit.moving_threshold import ClassPrior
from sac_lit.report import (
    _verdict_html,
    figure_of_classes,
    figure_of_curves,
    figure_of_examples,
    figure_of_views,
    main,
    means_of,
    PARTS,
    redraw_report,
    result_table,
    results,
    save_figure,
    table_text,
    write_report,
)
from sac_lit.runs import Run

IOU = {"source": 20., "abn": 40., "sac": 50.}


def scores(stage, base, names, step=4, network="student", **changes):
    "A line of the log: every class has a little more than the one before; the last was not there."
    iou = [*(base + c for c in range(len(names) - 1)), None]
    miou = round(sum(iou[:-1]) / (len(names) - 1), 2)
    return {"event": "evaluation", "stage": stage, "network": network, "step": step,
            "miou": miou, "iou": iou, **changes}


def open_by_hand(folder, cfg, rows):
    "A run that nobody trained."
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"config": dataclasses.asdict(cfg)}))
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Run(cfg, SimpleNamespace(trackers=[], device=torch.device("cpu")), folder)


@pytest.fixture
def run(tmp_path):
    steps = [{"event": "step", "stage": "abn", "step": k, "loss_source": 2 / k} for k in (1, 2)]
    steps += [{"event": "step", "stage": "sac", "step": k, "loss_source": 1 / k,
               "loss_target": .1, "accepted": [.2] * 3} for k in (1, 2, 3)]
    rows = [scores(stage, base, NAMES) for stage, base in IOU.items()]
    rows += [scores("sac", 10, NAMES, step=2), scores("sac", 47, NAMES, network="momentum")]
    rows.sort(key=lambda row: row["step"])
    return open_by_hand(tmp_path / "runs" / "toy", TOY, steps + rows)


def pictures(page):
    data = re.findall(r"data:image/png;base64,([\w+/=]+)", page)
    return [Image.open(io.BytesIO(base64.b64decode(x))) for x in data]


# ---------------------------------------------------------------- the table

def test_the_last_evaluation_of_each_student_counts(run):
    assert {title: row["iou"][0] for title, row in results(run).items()} == {
        "source only": 20, "ABN": 40, "SAC": 50}


def test_table(run):
    table = result_table(run)
    assert list(table) == ["source only", "ABN", "SAC", "gain"]
    assert list(table.index) == [*NAMES, "mean"]
    assert table.loc["road"].tolist() == [20, 40, 50, 10]
    assert table.loc["bicycle"].isna().all()
    assert table.loc["mean", "SAC"] == results(run)["SAC"]["miou"]
    lines = table_text(table).splitlines()
    assert re.match(r"^IoU in % +source only +ABN +SAC +gain$", lines[0])
    assert re.match(r"^bicycle +- +- +- +-$", lines[-2])
    assert re.match(r"^mean +28\.5 +48\.5 +58\.5 +10\.0$", lines[-1])


def test_means_of_synthia(tmp_path):
    cfg = PRESETS["synthia_resnet101"][1]
    row = scores("sac", 50, NAMES, miou=33.33)
    run = open_by_hand(tmp_path / "a", cfg, [row])
    assert means_of(cfg) == SUBSETS and means_of(TOY) == {"mean": list(range(19))}
    table = result_table(run)
    assert list(table.index) == [*NAMES, "mean of 16", "mean of 13"]
    assert table.loc["mean of 16", "SAC"] == 33.33                        # as it was logged
    thirteen = [row["iou"][c] for c in SUBSETS["mean of 13"] if row["iou"][c] is not None]
    assert abs(table.loc["mean of 13", "SAC"] - sum(thirteen) / len(thirteen)) < 1e-9


def test_no_gain_without_both(tmp_path):
    run = open_by_hand(tmp_path / "a", TOY, [scores("abn", 40, NAMES)])
    assert list(result_table(run)) == ["ABN"]


def test_gain_over_the_network_that_a_run_began_with(tmp_path):
    "By what the run said of it, or the run that left it; under the name of what it is."
    start = {**scores("sac", 30, NAMES, step=0, network="start")}
    before = open_by_hand(tmp_path / "runs" / "before", TOY, [scores("abn", 40, NAMES)])
    rows, left = [scores("sac", 50, NAMES)], before.folder / "model_abn"
    cases = {  # name: --sac.start, lines of the log, column, gain
        "own": ("x.pth", [start, *rows], "start", 20), "none": ("x.pth", rows, None, None),
        "theirs": (left, rows, "ABN", 10), "again": (left, [start, *rows], "ABN", 20)}
    for name, (path, log, column, gain) in cases.items():
        cfg = replace(TOY, stages=("sac",), sac=replace(TOY.sac, start=str(path)),
                      data=replace(TOY.data, workers=3))
        table = result_table(open_by_hand(tmp_path / name, cfg, log))
        assert list(table) == ([column, "SAC", "gain"] if column else ["SAC"])
        if gain: assert table.loc["road", "gain"] == gain


# ---------------------------------------------------------------- the figures

def test_curves_show_what_is_logged(run, monkeypatch):
    drawn = {}
    def keep(run, name):
        drawn[name] = [(ax.get_ylabel(), [line.get_label() for line in ax.lines])
                       for ax in plt.gcf().axes]
        plt.close()
    monkeypatch.setattr("sac_lit.report.save_figure", keep)
    figure_of_curves(run)
    (loss, labels), (accepted, shares), (miou, networks) = drawn["curves"]
    assert labels == ["ABN, source", "SAC, source", "SAC, target"]
    assert "accepted" in accepted and len(shares) == 1
    assert networks == ["student", "momentum", "ABN"]


def test_a_figure_is_whole_and_closed(run):
    use_style()
    plt.subplots(figsize=(7, 2))
    path = save_figure(run, "mine")
    assert path == run.folder / "figures" / "mine.png" and Image.open(path).width == 700
    assert not plt.get_fignums() and not list(path.parent.glob("*.tmp"))
    for draw in (figure_of_curves, figure_of_classes):
        assert Image.open(draw(run)).width <= 800


def test_examples_without_labels_and_of_different_sizes(run):
    for stage in ("abn", "sac"):
        build_model("deeplabv2_tiny", 19).save_pretrained(run.folder / STAGES[stage].folder)
    target = [{"image": torch.randint(256, (3, 24 + 8 * i, 40), dtype=torch.uint8)}
              for i in range(3)]
    val = [{**s, "label": torch.zeros(s["image"].shape[-2:]).long()} for s in target]
    for data in ({"val": None, "target": target}, {"val": val, "target": target}):
        assert figure_of_examples(run, data, count=3).exists()


def test_views_leave_the_prior_and_go_to_trackers(run):
    size, shown = (16, 32), []
    torch.manual_seed(0)
    model = build_model("deeplabv2_tiny", 19).eval()
    clean = torch.randn(1, 2, 3, *size, generator=generator(0, "views"))
    boxes = torch.tensor([[[0, 0, 16, 32], [4, 8, 8, 16]]])
    views = Views(clean, clean + .1, crop_theta(*boxes.unbind(-1), size))
    prior = ClassPrior(19)
    tracker = SimpleNamespace(log_images=lambda images, step: shown.append((images, step)))
    run.accelerator.trackers, run.steps_before = [tracker, SimpleNamespace()], 100
    path = figure_of_views(run, MomentumNetwork(model), prior, views, 7)
    assert path.name == "views_0000007.png" and path.exists()
    assert torch.equal(prior.chi, ClassPrior(19).chi) and prior.updates == 0
    (images, step), = shown
    assert step == 107 and images["sac/views"].shape[:2] == (1, 3)
    everything = replace(TOY.sac.loss, zeta=0., floor=0.)
    labels, _ = pseudo_supervision(MomentumNetwork(model), prior, views, everything)
    assert (labels != 255).all()                                          # drawn as the fused map


# ---------------------------------------------------------------- the page

def test_page_is_complete_and_self_contained(run):
    (run.folder / "seconds.json").write_text('{"abn": 60.0, "sac": 120.0}')
    page = write_report(run).read_text(encoding="utf-8")
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert len(pictures(page)) == 2                                       # curves and classes
    assert "ABN 48.5, SAC 58.5" in page and "Training took 3.0 minutes" in page
    assert "<th>bicycle</th>" in page and "–" in page
    assert '"source_batch": 4' in page.replace("&#34;", '"')
    assert "nth-last-child(-n+1)" in page
    assert not re.search(r"[\x00-\x08\x0b-\x1f]|\\26a0|{{|{%", page)      # no escape, no brace left


def test_newest_picture_of_the_views(run):
    use_style()
    for step, width in ((2, 1), (10, 3)):
        plt.subplots(figsize=(width, 1))
        save_figure(run, f"views_{step:07d}")
    assert 300 in [p.width for p in pictures(write_report(run).read_text())]


def test_warnings_are_drawn_words_and_escaped(run):
    row = {"event": "warning", "stage": "sac", "step": 3, "text": "the class <b> & co is dying"}
    with open(run.folder / "log.jsonl", "a") as f: f.write(json.dumps(row) + "\n")
    page = write_report(run).read_text()
    text = "Step 3 of the joint stage: the class &lt;b&gt; &amp; co is dying."
    assert f'<p class="warning"><b>Warning.</b> {text}</p>' in page


def test_names_of_classes_and_runs_are_escaped(tmp_path):
    (tmp_path / "classes.txt").write_text("<script>\nmean\n")
    cfg = replace(TOY, name="<i>", data=replace(TOY.data, classes=str(tmp_path / "classes.txt")))
    run = open_by_hand(tmp_path / "a", cfg, [scores("abn", 1, "ab"), scores("sac", 2, "ab")])
    page = write_report(run).read_text()
    assert "<script>" not in page and "<i>" not in page and "<th>&lt;script&gt;</th>" in page
    assert list(result_table(run).index) == ["<script>", "mean", "mean"]


def test_before_the_first_line(tmp_path, recwarn):
    run = open_by_hand(tmp_path / "a", TOY, [])
    page = write_report(run).read_text()
    assert "no evaluation yet" in page and "<table" not in page and len(pictures(page)) == 1
    assert not recwarn.list


def test_a_last_line_that_was_cut_off(run):
    with open(run.folder / "log.jsonl", "a") as f: f.write('{"event": "evaluation", "sta')
    assert write_report(run).exists()


def test_sizes_are_told(run):
    said = "Trained on 96 x 192 pixels; predict sees images {}, and so did the evaluation."
    assert said.format("as they are on disk") in write_report(run).read_text()
    (run.folder / "model").mkdir()
    (run.folder / "model" / "config.json").write_text('{"inference_size": [360, 480]}')
    seen = "brought to the area of 360 x 480 pixels"
    assert said.format(seen) in write_report(run).read_text()


def test_without_labels_there_is_no_score_to_wait_for(tmp_path):
    run = open_by_hand(tmp_path / "a", TOY, [])
    (run.folder / "seconds.json").write_text('{"abn": 60.0}')
    page = write_report(run).read_text()
    assert "No labelled images of the target were given" in page and "evaluat" not in page
    assert len(pictures(page)) == 1 and "<table" not in page


def test_names_come_from_the_network_where_their_file_is_gone(tmp_path):
    cfg = replace(TOY, data=replace(TOY.data, classes=str(tmp_path / "gone.txt")))
    run = open_by_hand(tmp_path / "a", cfg, [scores("abn", 1, "ab"), scores("sac", 2, "ab")])
    build_model("deeplabv2_tiny", 2, names=("up", "down")).save_pretrained(run.folder / "model")
    page = redraw_report(run.folder).read_text()
    assert "<th>up</th>" in page and "<th>down</th>" in page


# ---------------------------------------------------------------- verdict and parts

VERDICT = {
    "score": -.31234, "verdict": "worse", "text": "SAC is <less> steady than ABN.",
    "before": {"agreement_of_views": .71, "gone": .5, "list": [1]},
    "after": {"agreement_of_views": .83, "entropy": float("nan"), "list": [2]}}


def verdict_on(page):
    box = re.search(r'<section class="verdict.*?</section>', page, re.S)
    return box and re.sub(r"\s+", " ", box[0])


def test_verdict_stands_at_the_top(run):
    assert verdict_on(write_report(run).read_text()) is None
    (run.folder / "verdict.json").write_text(json.dumps(VERDICT))
    page = write_report(run).read_text()
    box = verdict_on(page)
    assert page.index("</h1>") < page.index("<section") < page.index("mIoU in %")
    assert '<section class="verdict worse"' in box
    said = "<b>Worse</b>, judged without labels (score -0.312): SAC is &lt;less&gt; steady"
    assert said in box
    rows = re.findall(r"<tr><th>([^<]*)</th><td>(.*?)</td><td>(.*?)</td>", box)
    assert rows == [("agreement of views", "0.71", "0.83"), ("gone", "0.5", "–")]


@pytest.mark.parametrize("verdict, kind", [("better", "better"), ("cannot tell", "open")])
def test_verdicts_without_classes_and_measures(run, verdict, kind):
    (run.folder / "verdict.json").write_text(json.dumps({"verdict": verdict, "score": None}))
    box = verdict_on(write_report(run).read_text())
    assert f'class="verdict {kind}"' in box and f"<b>{verdict.capitalize()}</b>" in box
    assert "<table" not in box and "<ul" not in box and "score" not in box


def test_a_damaged_verdict_is_none(run):
    for text in ("{", "[]", "{}"):
        (run.folder / "verdict.json").write_text(text)
        assert _verdict_html(run) == ""


def test_parts_of_ones_own(run, tmp_path, monkeypatch):
    (tmp_path / "my_parts.py").write_text("def name(run): return f'<p>mine: {run.cfg.name}</p>'")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(PARTS, "mine", "my_parts:name")
    page = write_report(run).read_text()
    assert page.index("</table>") < page.index("<p>mine: toy</p>") < page.index("<figure>")


# ---------------------------------------------------------------- the command

def test_from_the_folder_alone(run, capsys, monkeypatch):
    monkeypatch.chdir(run.folder.parents[1])
    use_style()
    page = write_report(run).read_text()
    main(["runs/toy"])
    assert capsys.readouterr().out == "report: runs/toy/report.html\n"
    assert (run.folder / "report.html").read_text() == page
    assert redraw_report(run.folder) == run.folder / "report.html"


LINE = {"event": "evaluation", "stage": "sac", "network": "student", "step": 9, "miou": 1.,
        "iou": [1.] * 19}
DAMAGED = [  # lines of a log
    "garbage", "\0\0", "[1]", "null", "[" * 10_000, "{}", '{"event": "evaluation"}',
    *(json.dumps({**LINE, key: value}) for key in LINE
      for value in (None, {}, [1], ["x"] * 19, True, 10 ** 400)),
    *(json.dumps({**LINE, key: "x"}) for key in ("step", "miou", "iou")),
    json.dumps({**LINE, "step": -1}),
    *(json.dumps({k: v for k, v in LINE.items() if k != key}) for key in LINE if key != "network"),
    '{"event": "step", "stage": "abn", "step": 2, "loss_source": "x"}',
    '{"event": "step", "stage": "sac", "step": 2, "accepted": ["x"]}',
    '{"event": "step", "stage": "sac", "step": 2, "accepted": 3}',
    '{"event": "warning", "stage": "sac", "step": 2}',
    '{"event": "warning", "stage": "sac", "step": 2, "text": 3}']


@pytest.mark.parametrize("line", DAMAGED, ids=lambda line: line[:90])
def test_a_damaged_line_of_the_log_is_left_out(run, line):
    before = results(run), run.rows(event="warning"), run.rows(event="step")
    with open(run.folder / "log.jsonl", "a") as file: file.write(line + "\n")
    assert (results(run), run.rows(event="warning"), run.rows(event="step")) == before


GARBAGE = [
    "", "garbage", "null", "[]", "{}", '{"abn": "x"}', '{"names": 3, "inference_size": {}}', '"x"',
    '{"verdict": [], "text": 3}', '{"verdict": "better", "before": [1]}', "[" * 10_000]


def test_garbage_in_any_file_of_a_run_stops_no_report(run, capsys):
    "Whatever stands in a file beside the configuration, a report is written."
    names = ("seconds.json", "verdict.json", "model/config.json", "momentum/config.json",
             "gallery/index.json")
    paths = [run.folder / name for name in names]
    for path in paths: path.parent.mkdir(exist_ok=True)
    for text in GARBAGE:
        for path in paths: path.write_text(text)
        assert "SAC 58.5" in redraw_report(run.folder).read_text(), text
    for path in paths:
        path.unlink()
        os.mkfifo(path)
    assert "SAC 58.5" in redraw_report(run.folder).read_text()


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink(path, path)])
@pytest.mark.parametrize("name", ["log.jsonl", "config.json"])
def test_a_report_is_not_kept_waiting(run, capsys, make, name):
    (run.folder / name).unlink()
    make(run.folder / name)
    with pytest.raises(SystemExit) as end: main([str(run.folder)])
    line, = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and name in line


@pytest.mark.parametrize("names", [
    ("$\\frac$", "b"), ("$", "$$"), ("a $x_$ $", "\\$"), ("_^{", "{}%"), ("$a$b$c", "\\frac{$")])
def test_class_names_are_drawn_letter_by_letter(tmp_path, monkeypatch, names):
    "They are no formulas, whatever they look like."
    (tmp_path / "classes.txt").write_text("\n".join(names))
    cfg = replace(TOY, data=replace(TOY.data, classes=str(tmp_path / "classes.txt")))
    run = open_by_hand(tmp_path / "a", cfg, [scores("abn", 1, names), scores("sac", 2, names)])
    drawn = []
    def keep(run, name):
        plt.gcf().canvas.draw()
        texts = [text for legend in plt.gcf().legends for text in legend.get_texts()]
        texts = texts or plt.gcf().axes[0].get_xticklabels()
        drawn.append([shown_by(text) for text in texts if text.get_text()])
        plt.close()
    monkeypatch.setattr("sac_lit.report.save_figure", keep)
    figure_of_classes(run)
    target = [{"image": torch.zeros(3, 24, 40, dtype=torch.uint8)}] * 2
    figure_of_examples(run, {"val": None, "target": target}, count=2)
    assert drawn[0] == list(names) and drawn[1] == list(names)


def shown_by(text):
    "What a text of matplotlib shows; a formula would be told apart."
    shown, math = text._preprocess_math(text.get_text())
    assert not math
    return shown


@pytest.mark.parametrize("folder", ["nothing", "empty", "damaged"])
def test_no_run(tmp_path, capsys, folder):
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.json").write_text("{")
    with pytest.raises(SystemExit) as end: main([str(tmp_path / folder)])
    error = capsys.readouterr().err
    assert end.value.code == 2 and len(error.strip().splitlines()) == 1
    assert folder in error and "such as runs/toy" in error
