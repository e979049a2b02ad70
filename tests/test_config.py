"""The configuration: help for every setting, one table for every name, and what is on disk."""
import ast
import contextlib
import dataclasses
import io
import json
import re
import sys
import typing
from dataclasses import replace

import pytest
from house import cells, LIB, NBS

from sac_lit import config
from sac_lit.config import (
    absent_classes,
    check_config,
    check_same,
    CHOICES,
    Config,
    differences,
    load_config,
    MAY_CHANGE,
    PRESETS,
    settings,
    Stage,
    STAGES,
    TOY,
)
from sac_lit.core import UserError
from sac_lit.train import main

OWN = """
import torch
from accelerate.tracking import GeneralTracker
from sac_lit.config import Stage
from sac_lit.datasets import Layout
from sac_lit.views import Augmentation

class Network(torch.nn.Module): pass

def median(weighted, weight):
    return weighted.median(1).values, weight.amax(1)

def views(weighted, weight): return weighted, weight

def halves(confidence, reduce=None): return confidence / 2

def one(confidence, reduce=None): return confidence.mean()

class Tracker(GeneralTracker):
    name, requires_logging_directory, tracker = "own", False, None

NOISE = Augmentation(.5, lambda rng: torch.rand(1, generator=rng), lambda x, amount: x)
LAYOUT = Layout("*.png", "labels/*.png", absent=("train",))
STAGE = Stage("own", "model_own", "abn", "own_things:train_own")
LOST = Stage("own", "model_own", "abn", "own_things:nothing")

def train_own(run, stage, data): pass
"""
FITS = {
    "arch": "Network", "stages": "STAGE", "data.source": "LAYOUT", "data.target": "LAYOUT",
    "sac.noise": "NOISE", "sac.loss.pool": "median", "sac.loss.confidence": "halves",
    "tracker": "Tracker"}
FITS_NOT = {
    "arch": "STAGE", "stages": "LOST", "data.source": "STAGE", "data.target": "median",
    "sac.noise": "median", "sac.loss.pool": "views", "sac.loss.confidence": "one",
    "tracker": "Network"}


@pytest.fixture
def own(tmp_path, monkeypatch):
    "A module of the user's in the current folder."
    (tmp_path / "own_things.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_things", raising=False)
    before = dict(STAGES)
    yield "own_things"
    STAGES.clear()
    STAGES.update(before)


def changed(cfg, option, value):
    "A configuration with another value of a setting, by its dotted name."
    head, _, rest = option.partition(".")
    if rest: value = changed(getattr(cfg, head), rest, value)
    elif isinstance(getattr(cfg, head), tuple): value = (value,)
    return replace(cfg, **{head: value})


def dataclasses_of(cls):
    "A dataclass and those of its fields."
    yield cls
    for kind in typing.get_type_hints(cls).values():
        if dataclasses.is_dataclass(kind): yield from dataclasses_of(kind)


def dotted(cls, prefix=""):
    "The settings of a dataclass by dotted name."
    for name, kind in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(kind): yield from dotted(kind, f"{prefix}{name}.")
        else: yield prefix + name


@pytest.fixture(scope="module")
def help_text():
    "What `--help` prints, without frames and line breaks."
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit): main(["toy", "--help"])
    return re.sub(r"[\s│]+", " ", re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue()))


# ---------------------------------------------------------------- help

def test_every_setting_has_its_comment_as_help(help_text):
    "The comment beside a field, and no other, follows the flag."
    trees = [ast.parse((LIB / f"{m}.py").read_text()) for m in ("config", "ema_training")]
    lines = [(LIB / f"{m}.py").read_text().splitlines() for m in ("config", "ema_training")]
    names = {cls.__name__ for cls in dataclasses_of(Config)} | {"OptimConfig"}
    found = 0
    for tree, source in zip(trees, lines):
        for node in ast.walk(tree):
            if not isinstance(node, ast.ClassDef) or node.name not in names: continue
            for f in (n for n in node.body if isinstance(n, ast.AnnAssign)):
                comment = source[f.end_lineno - 1].partition("  # ")[2].strip()
                assert comment, f.target.id
                assert comment in help_text, (f.target.id, comment)
                found += 1
    assert found > 60


@pytest.mark.parametrize("option", CHOICES)
def test_help_lists_the_names_of_a_table(help_text, option):
    names = f"one of {', '.join(CHOICES[option].table)}, or {CHOICES[option].own})"
    flag = "--" + option.replace("_", "-")
    assert names in help_text.partition(f" {flag} ")[2]


def test_settings_that_are_named_exist():
    every = set(dotted(Config))
    assert MAY_CHANGE <= every and set(CHOICES) <= every
    assert {stage.settings for stage in STAGES.values()} <= {"abn", "sac"}


# ---------------------------------------------------------------- names

@pytest.mark.parametrize("option", CHOICES)
def test_a_name_in_no_table_is_one_sentence(option):
    with pytest.raises(UserError) as error: check_config(changed(TOY, option, "nothing"))
    text = str(error.value)
    assert text.startswith(f"--{option} nothing: ")
    assert "\n" not in text and all(name in text for name in CHOICES[option].table)


def test_a_layout_says_what_is_absent(own):
    assert absent_classes(f"{own}:LAYOUT") == (16,)


@pytest.mark.parametrize("option", FITS)
def test_what_is_the_users_own_takes_the_place_of_a_name(own, option):
    check_config(changed(TOY, option, f"{own}:{FITS[option]}"))


@pytest.mark.parametrize("option", FITS_NOT)
def test_what_does_not_fit_is_refused_with_what_was_expected(own, option):
    wrong = f"{own}:{FITS_NOT[option]}"
    with pytest.raises(UserError) as error: check_config(changed(TOY, option, wrong))
    text = str(error.value)
    assert text.startswith(f"--{option} {wrong}: does not fit") and "\n" not in text
    assert text.endswith(f"; give {CHOICES[option].own}")


@pytest.mark.parametrize("option", CHOICES)
def test_what_cannot_be_imported_is_refused(option):
    with pytest.raises(UserError, match="cannot be imported"):
        check_config(changed(TOY, option, "no_such_module:thing"))


def test_a_new_entry_is_one_entry(monkeypatch):
    "A pool and a stage that were put into their tables are accepted by name."
    pools = CHOICES["sac.loss.pool"].table
    monkeypatch.setitem(pools, "first", lambda weighted, weight: (weighted[:, 0], weight[:, 0]))
    monkeypatch.setitem(STAGES, "again", Stage("again", "model_again", "abn", "m:f"))
    check_config(changed(changed(TOY, "sac.loss.pool", "first"), "stages", "again"))


def test_a_stage_of_the_users_own_enters_the_table(own):
    stage = STAGES[f"{own}:STAGE"]
    assert stage.title == "own" and f"{own}:STAGE" in STAGES
    with pytest.raises(UserError, match="choose one of source, abn, sac, oracle"): STAGES["none"]


def test_names_are_checked_before_anything_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end: main(["toy", "--sac.loss.pool", "mode"])
    assert end.value.code == 2 and not list(tmp_path.iterdir())
    assert capsys.readouterr().err.startswith("error: --sac.loss.pool mode: no such entry")


# ---------------------------------------------------------------- presets

@pytest.mark.parametrize("name", PRESETS)
def test_presets(name, tmp_path):
    "Named as in the table, with known names, and the same when read back."
    text, cfg = PRESETS[name]
    check_config(cfg)
    assert cfg.name == name and text.endswith((".", ")."))
    assert load_config(written(tmp_path, cfg)) == cfg


def written(folder, cfg):
    (folder / "config.json").write_text(json.dumps({"config": dataclasses.asdict(cfg)}))
    return folder


def test_answer_adds_a_preset(monkeypatch):
    monkeypatch.setattr(config, "PRESETS", dict(PRESETS))
    names = {**vars(config)}
    exec(answer("08b_config", "preset"), names)
    text, cfg = config.PRESETS["toy_fast"]
    assert (cfg.name, cfg.abn.steps, cfg.sac.steps) == ("toy_fast", 400, 500) and text


def answer(notebook, name):
    "The block of code of an exercise's folded answer."
    text = "\n".join(c.source for c in cells(NBS / f"{notebook}.ipynb", "markdown"))
    return re.search(rf"^```python\n(# answer: {name}\n.*?)^```", text, re.M | re.S)[1]


# ---------------------------------------------------------------- on disk

def test_settings_are_plain_values_that_decide():
    flat = settings(TOY)
    assert flat["sac.loss.zeta"] == .75 and flat["data.toy_size"] == [96, 192]
    assert set(flat) == set(dotted(Config)) - MAY_CHANGE
    assert flat == json.loads(json.dumps(flat))


def test_differences_name_three_at_most():
    assert differences(settings(TOY), settings(replace(TOY, keep=7, data=TOY.data))) == ""
    text = differences(settings(TOY), settings(PRESETS["gta5_vgg16"][1]))
    assert text.count(" there, ") == 3
    assert differences({"a": 1}, {"b": 2}) == "a 1 there, None here; b None there, 2 here"


def test_another_version_wrote_the_file(tmp_path):
    "A setting that is gone is left out, one that is new has its default."
    values = dataclasses.asdict(TOY)
    values["recipe"] = "old"
    del values["plain"], values["sac"]["noise"]
    (tmp_path / "config.json").write_text(json.dumps({"config": values}))
    assert load_config(tmp_path) == TOY


@pytest.mark.parametrize("text", [None, "", "{", "[]", "{}", '{"config": null}', '{"config": 7}'])
def test_a_folder_that_is_no_run(tmp_path, text):
    if text is not None: (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="holds no run of sac_lit"): load_config(tmp_path)


def test_what_may_change_and_what_not(tmp_path):
    folder = written(tmp_path, TOY)
    check_same(folder, replace(TOY, keep=9, stages=("sac",), data=replace(TOY.data, workers=3)))
    with pytest.raises(UserError, match="sac.lr 0.0005 there, 0.1 here"):
        check_same(folder, replace(TOY, sac=replace(TOY.sac, lr=.1)))
