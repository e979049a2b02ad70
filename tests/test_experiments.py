"""The command line of the studies, in a small size; what they say is in the notebook."""
import importlib.util
import json
import runpy
import sys
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from house import answer, NBS
from jobs import tiny
from PIL import Image

import sac_lit.experiments as experiments
from sac_lit.config import PRESETS, STAGES, TOY
from sac_lit.core import NAMES, remove, UserError
from sac_lit.experiments import scores, STUDIES, Study, summary, variant
from sac_lit.runs import Run
from sac_lit.train import train

PAIR = {"SAC": "", "no target loss": "--sac.loss.target-weight 0"}


@pytest.fixture
def small(monkeypatch, tmp_path):
    "A study of two settings at postage-stamp size, in an empty folder."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(STUDIES, "ablation", Study(PAIR, tiny(experiments.SHORT_TOY)))
    return tmp_path


def refused(argv, capsys):
    "The one line that a command says on its way out."
    capsys.readouterr()
    with pytest.raises(SystemExit) as end: experiments.main(argv)
    error = capsys.readouterr().err
    assert end.value.code == 2 and len(error.strip().splitlines()) == 1
    return error


@pytest.mark.slow
def test_shells_side_by_side_and_one_that_collects(small, capsys):
    "A seed each; then all of them, where nothing is left to train."
    for seed in "01": experiments.main(["ablation", "--seeds", seed])
    runs = [p for p in (small / "runs").rglob("*") if "seed" in p.name]
    made = {p: p.stat().st_mtime_ns for p in runs}
    capsys.readouterr()
    experiments.main(["ablation", "--seeds", "0", "1", "--out", "both.json"])
    assert {p: p.stat().st_mtime_ns for p in made} == made
    found = json.loads((small / "both.json").read_text())
    assert found["command"] == (
        "python -m sac_lit.experiments ablation --seeds 0 1 --out both.json")
    assert [(r["title"], r["seed"]) for r in found["rows"]] == [
        ("SAC", 0), ("no target loss", 0), ("SAC", 1), ("no target loss", 1)]
    out = capsys.readouterr().out
    assert "no target loss" in out and out.endswith("both.json\n")


def test_a_broken_run_is_one_sentence(small, capsys):
    (small / "runs" / "study_seed0").mkdir(parents=True)
    (small / "runs" / "study_seed0" / "notes.txt").write_text("mine")
    error = refused(["ablation", "--seeds", "0"], capsys)
    assert error.startswith("error: runs/study_seed0")


@pytest.mark.slow
def test_a_run_of_other_settings_is_not_taken_for_a_result(small, capsys, monkeypatch):
    experiments.main(["ablation", "--seeds", "0"])
    base = STUDIES["ablation"].base
    slower = replace(base, sac=replace(base.sac, period=2))
    monkeypatch.setitem(STUDIES, "ablation", Study(PAIR, slower))
    assert refused(["ablation", "--seeds", "0"], capsys).startswith(
        "error: runs/study_seed0 holds a run of another configuration "
        "(sac.period 1 there, 2 here)")


@pytest.mark.slow
def test_a_report_of_a_run_that_was_cut_off_is_not_its_end(small):
    results = small / "runs" / "ablation.json"

    def miou(): return {r["title"]: r["sac"] for r in json.loads(results.read_text())["rows"]}

    experiments.main(["ablation", "--seeds", "0"])
    folder = small / "runs" / "study_seed0_sac"
    remove(folder / STAGES["sac"].folder)      # as `report FOLDER` leaves a run that goes on
    made = miou()
    with open(folder / "log.jsonl", "a") as log: log.write('{"event": "evaluation", "st')
    experiments.main(["ablation", "--seeds", "0"])
    assert (folder / STAGES["sac"].folder).exists()
    assert miou() == made


@pytest.mark.parametrize("wrong", [["--seeds"], ["--seeds", "0", "0"], ["--out", "."]])
def test_what_cannot_work_is_refused_before_training(small, capsys, wrong):
    assert refused(["ablation", *wrong], capsys).startswith(f"error: {wrong[0]}")
    assert [*small.iterdir()] == []


def test_unknown_study(capsys):
    with pytest.raises(SystemExit) as end: experiments.main(["everything"])
    assert end.value.code == 2 and "ablation" in "".join(capsys.readouterr())


def test_a_study_of_ones_own(small, capsys):
    Path("my_study.py").write_text(
        "from sac_lit.experiments import STUDIES, Study\n"
        "STUDY = Study({'SAC': '', 'other beta': '--sac.loss.beta 1e-3'},\n"
        "              STUDIES['ablation'].base)\n"
        "NUMBER = 3\n")
    experiments.main(["my_study:STUDY", "--seeds", "0", "--out", "mine.json"])
    assert len(json.loads(Path("mine.json").read_text())["rows"]) == 2
    assert "my_study:NUMBER: is no Study" in refused(["my_study:NUMBER"], capsys)


def test_a_study_of_ones_own_by_the_command(small, monkeypatch, capsys):
    "With `python -m`, `Study` is one class here and another in the module that is imported."
    Path("their_study.py").write_text(
        "from sac_lit.experiments import Study\n"
        "STUDY = Study({'SAC': ''}, seeds=())\n")
    monkeypatch.setattr(sys, "argv", ["sac_lit.experiments", "their_study:STUDY"])
    with warnings.catch_warnings(), pytest.raises(SystemExit):
        warnings.simplefilter("ignore", RuntimeWarning)  # it is imported already
        runpy.run_module("sac_lit.experiments", run_name="__main__")
    assert "--seeds: give at least one" in capsys.readouterr().err  # taken, but without seeds


@pytest.mark.slow
def test_a_study_gives_what_a_run_of_its_own_gives(small):
    "A setting of `period` in another city, and the same by one command of training."
    study = STUDIES["period"]._replace(base=replace(tiny(TOY), name="period"))
    first = study.start(100)
    assert (first.seed, first.data.toy_seed, study.start(0).data.toy_seed) == (100, 1, 0)
    row = experiments.run_study(study, seeds=[100])[1]
    whole = variant(first, row["options"])
    whole = replace(whole, name="whole", stages=TOY.stages, sac=replace(whole.sac, start=None))
    found = scores(train(whole).folder)
    assert found["abn"]["student"]["miou"] == row["abn"]
    assert found["sac"]["student"] == {"miou": row["sac"], "iou": row["iou"]}


@pytest.mark.parametrize("chosen", ["no", "bf16"])
def test_settings_take_the_precision_of_their_pretraining(small, monkeypatch, chosen):
    "What a processor chose for one command holds when another goes on with the same seed."
    asked = []
    def trained(cfg):
        asked.append((cfg.stages, cfg.mixed_precision))
        return Run(replace(cfg, mixed_precision=chosen), None, Path(cfg.name))
    found = {"student": {"miou": 40., "iou": [40.] * 19}}
    monkeypatch.setattr(experiments, "trained", trained)
    monkeypatch.setattr(experiments, "scores", lambda folder: {"abn": found, "sac": found})
    experiments.run_study(Study(PAIR), seeds=[0])
    assert asked == [(("abn",), None), (("sac",), chosen), (("sac",), chosen)]


def test_a_setting_takes_the_short_form_of_an_option():
    first = STUDIES["ablation"].start(0)
    for options in ("--pool min_entropy", "--pool=min_entropy"):
        assert variant(first, options).sac.loss.pool == "min_entropy"


def test_a_run_that_is_done_brings_its_stages(small):
    "A stage of one's own that its last command had trained, and the sentence if it is gone."
    cfg = replace(tiny(TOY), stages=("abn",))
    folder = small / "runs" / "toy"
    (folder / "model_abn").mkdir(parents=True)
    values = asdict(replace(cfg, stages=("abn", "own_stage:MINE")))
    (folder / "config.json").write_text(json.dumps({"config": values}))
    with pytest.raises(UserError, match="--stages own_stage:MINE: cannot be imported"):
        experiments.trained(cfg)
    Path("own_stage.py").write_text(
        "from sac_lit.config import Stage\n"
        "MINE = Stage('mine', 'model_mine', 'abn', 'sac_lit.train:train_supervised')\n")
    importlib.invalidate_caches()
    experiments.trained(cfg)
    assert STAGES.pop("own_stage:MINE").title == "mine"


def test_the_exercise_adds_a_study(small, monkeypatch):
    "Its answer is run as it stands on the page, in a small size."
    code = answer("11_experiments", "study")
    base = tiny(experiments.SHORT_TOY)
    names = {"STUDIES": {}, "Study": lambda table: Study(table, base), "summary": summary,
             "run_study": experiments.run_study}
    exec(code, names)
    views = [(variant(base, o).sac.num_crops + 1) * variant(base, o).sac.groups
             for o in names["STUDIES"]["crops"].settings.values()]
    assert len(names["rows"]) == 3 and len({*views}) == 1


# ---------------------------------------------------------------- nbs/site/collect.py

@pytest.fixture
def collect(monkeypatch, tmp_path):
    "The script, writing into an empty folder, for a preset at postage-stamp size."
    spec = importlib.util.spec_from_file_location("collect", NBS / "site" / "collect.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "OUT", tmp_path / "results")
    monkeypatch.setitem(PRESETS, "toy", ("small", tiny(TOY)))
    return module


def test_collected_results_name_their_commands(collect, capsys):
    train(replace(tiny(TOY), name="toy_seed3", seed=3))
    train(replace(tiny(TOY), name="toy_seed3", seed=3, stages=("source",)))
    collect.main("toy", "runs/toy_seed3")
    found = json.loads(Path("results/toy.json").read_text())
    assert found["command"].splitlines() == [
        "python -m sac_lit.train toy --seed 3 --name toy_seed3",
        "python -m sac_lit.train toy --seed 3 --name toy_seed3 --stages source",
        "python nbs/site/collect.py toy runs/toy_seed3"]
    assert found["classes"] == list(NAMES) and {"abn", "sac", "source"} < found["runs"][0].keys()
    assert np.array(Image.open("results/toy_example.png")).shape == (4 * 32, 64, 3)
    other = replace(tiny(TOY), sac=replace(tiny(TOY).sac, period=2))
    PRESETS["toy"] = "small", other
    for argv, words in ((["toy", "runs/toy_seed3"], "sac.period 4 there, 2 here"),
                        (["toy", "runs/none"], "holds no run"), (["toys"], "toys: no preset")):
        with pytest.raises(SystemExit) as end: collect.main(*argv)
        assert end.value.code == 2 and words in capsys.readouterr().err
    collect.main("toy", "runs/toy_seed3", "--out", "slower", "--changed")
    found = json.loads(Path("results/slower.json").read_text())
    assert found["command"].splitlines()[0] == (
        "python -m sac_lit.train toy --sac.period 4 --seed 3 --name toy_seed3")
    assert not Path("results/slower_example.png").exists()
