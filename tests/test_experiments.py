"""The command line of the studies, in a small size; what they say is in the notebook."""
import json
from dataclasses import replace

import pytest

import sac_lit.experiments as experiments
from sac_lit.runs import remove
from sac_lit.train import MODEL_FOLDER


@pytest.fixture
def small(monkeypatch, tmp_path):
    "A study of two settings at postage-stamp size, in an empty folder."
    base, pair = experiments.STUDY, {"SAC": "", "no target loss": "--sac.loss.target-weight 0"}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(experiments.STUDIES, "ablation", pair)
    monkeypatch.setattr(experiments, "STUDY", replace(
        base, log_every=2, checkpoint_every=6, data=replace(base.data, toy_train=6, toy_val=2, toy_size=(32, 64)),
        abn=replace(base.abn, steps=4, source_batch=2, target_batch=2, crop=(32, 64)), sac=replace(base.sac, steps=4, source_batch=2, crop=(32, 64))))
    return tmp_path


def test_shells_side_by_side_and_one_that_collects(small, capsys):
    "A seed each; then all of them, where nothing is left to train."
    for seed in "01": experiments.main(["ablation", "--seeds", seed])
    made = {p: p.stat().st_mtime_ns for p in (small / "runs").rglob("*") if "seed" in p.name}
    capsys.readouterr()
    experiments.main(["ablation", "--seeds", "0", "1", "--out", "both.json"])
    assert {p: p.stat().st_mtime_ns for p in made} == made
    rows = json.loads((small / "both.json").read_text())
    assert [(r["title"], r["seed"]) for r in rows] == [("SAC", 0), ("no target loss", 0), ("SAC", 1), ("no target loss", 1)]
    assert "no target loss" in (out := capsys.readouterr().out) and out.endswith("both.json\n")


def test_a_broken_run_is_one_sentence(small, capsys):
    (small / "runs" / "study_seed0").mkdir(parents=True)
    (small / "runs" / "study_seed0" / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit) as end: experiments.main(["ablation", "--seeds", "0"])
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("error: runs/study_seed0") and len(error.strip().splitlines()) == 1


def test_a_run_of_other_settings_is_not_taken_for_a_result(small, capsys, monkeypatch):
    experiments.main(["ablation", "--seeds", "0"])
    monkeypatch.setattr(experiments, "STUDY", replace(experiments.STUDY, sac=replace(experiments.STUDY.sac, period=2)))
    capsys.readouterr()
    with pytest.raises(SystemExit) as end: experiments.main(["ablation", "--seeds", "0"])
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("error: runs/study_seed0 holds a run of another configuration (sac.period 1 there, 2 here)")


def test_a_report_of_a_run_that_was_cut_off_is_not_its_end(small):
    experiments.main(["ablation", "--seeds", "0"])
    folder = small / "runs" / "study_seed0_sac"
    remove(folder / MODEL_FOLDER["sac"])  # as `report FOLDER` leaves a run that goes on
    made = {r["title"]: r["sac"] for r in json.loads((small / "runs" / "ablation.json").read_text())}
    with open(folder / "log.jsonl", "a") as log: log.write('{"event": "evaluation", "st')
    experiments.main(["ablation", "--seeds", "0"])
    assert (folder / MODEL_FOLDER["sac"]).exists()
    assert {r["title"]: r["sac"] for r in json.loads((small / "runs" / "ablation.json").read_text())} == made


@pytest.mark.parametrize("wrong", [["--seeds"], ["--seeds", "0", "0"], ["--out", "."]])
def test_what_cannot_work_is_refused_before_training(small, capsys, wrong):
    with pytest.raises(SystemExit) as end: experiments.main(["ablation", *wrong])
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith(f"error: {wrong[0]}") and len(error.strip().splitlines()) == 1
    assert [*small.iterdir()] == []


def test_unknown_study(capsys):
    with pytest.raises(SystemExit) as end: experiments.main(["everything"])
    assert end.value.code == 2 and "ablation" in "".join(capsys.readouterr())
