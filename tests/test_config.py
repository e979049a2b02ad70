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
import tyro
from house import answer, LIB

from sac_lit import config
from sac_lit.config import (
    absent_classes,
    check_config,
    check_same,
    CHOICES,
    Config,
    differences,
    load_config,
    load_stages,
    long_options,
    MAY_CHANGE,
    PRESETS,
    settings,
    Stage,
    STAGES,
    TOY,
)
from sac_lit.core import UserError
from sac_lit.deeplabv2 import SegmentationModel
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

def three(weighted, weight):
    assert weighted.shape[2] == 3, "three classes only"
    return weighted.sum(1), weight.sum(1)

def halves(confidence, average): return confidence / 2

def one(confidence, reduce=None): return confidence.mean()

def alone(confidence): return confidence

def keyword(confidence, *, reduce): return confidence

class Listed(torch.nn.Module):
    new = ["head."]
    def __init__(self, num_classes):
        super().__init__()
        self.body = torch.nn.Conv2d(3, 4, 1)
        self.head = torch.nn.Conv2d(4, num_classes, 1)
    def forward(self, x): return self.head(self.body(x))

class Named(Listed): new = "head."

class Layered(Listed): new = torch.nn.Conv2d(1, 1, 1)

class Tracker(GeneralTracker):
    name, requires_logging_directory, tracker = "own", False, None

def draw(rng): return torch.rand(1, generator=rng)

NOISE = Augmentation(.5, draw, lambda x, amounts: x)
ONE_ARGUMENT = NOISE._replace(apply=lambda x: x)
NUMBER = NOISE._replace(draw=lambda rng: .5)
SMALLER = NOISE._replace(apply=lambda x, amounts: x[:1])
OFTEN = NOISE._replace(p="often")
LAYOUT = Layout("*.png", "labels/*.png", absent=("train",))
STARS = Layout("*.png", "*/*.png")
UNICORN = Layout("*.png", "labels/*.png", absent=("unicorn",))
STAGE = Stage("own", "model_own", "abn", "own_things:train_own")
AGAIN = STAGE._replace(title="again")
LOST = STAGE._replace(train="own_things:nothing")
SAME_FOLDER = STAGE._replace(folder="model")
SAME_TITLE = STAGE._replace(title="SAC")
MOMENTUM = STAGE._replace(folder="momentum")
GALLERY = STAGE._replace(folder="gallery")
BELOW = STAGE._replace(folder="models/own")
NO_SETTINGS = STAGE._replace(settings="own")
SEED = STAGE._replace(settings="seed")

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


@pytest.mark.parametrize("option, name, words", [
    ("stages", "SAME_FOLDER", "the folder model is taken"),
    ("stages", "SAME_TITLE", "the title SAC is taken"),
    ("stages", "MOMENTUM", "the folder momentum is taken"),
    ("stages", "GALLERY", "the folder gallery is taken"),
    ("stages", "BELOW", "'models/own' is no name of a folder"),
    ("stages", "NO_SETTINGS", "its settings are own, not abn or sac"),
    ("stages", "SEED", "its settings are seed, not abn or sac"),
    ("sac.noise", "ONE_ARGUMENT", "TypeError"),
    ("sac.noise", "NUMBER", "TypeError"),
    ("sac.noise", "SMALLER", "does not fit; give an Augmentation"),
    ("sac.noise", "OFTEN", "TypeError"),
    ("sac.loss.confidence", "alone", "takes 1 positional argument but 2 were given"),
    ("sac.loss.confidence", "keyword", "takes 1 positional argument but 2 were given"),
    ("sac.loss.pool", "three", "AssertionError: three classes only")])
def test_what_fails_in_training_is_found_before(own, option, name, words):
    "A use that training makes of it is tried; a table without it stays as it is."
    with pytest.raises(UserError, match=re.escape(words)) as error:
        check_config(changed(TOY, option, f"{own}:{name}"))
    text = str(error.value)
    assert text.startswith(f"--{option} {own}:{name}: does not fit") and "\n" not in text
    assert f"{own}:{name}" not in STAGES


def test_a_pool_is_tried_with_the_classes_of_the_run(own, tmp_path):
    (tmp_path / "classes.txt").write_text("a\nb\nc")
    cfg = changed(TOY, "sac.loss.pool", f"{own}:three")
    check_config(changed(cfg, "data.classes", str(tmp_path / "classes.txt")))


@pytest.mark.parametrize("option", ["data.source", "data.target"])
def test_a_layout_that_cannot_be_right_is_refused(own, option):
    with pytest.raises(UserError, match=f"--{option} {own}:STARS: 2 stars in labels, but 1"):
        check_config(changed(TOY, option, f"{own}:STARS"))


def test_absent_classes_are_classes_of_the_run(own, tmp_path):
    cfg = changed(TOY, "data.source", f"{own}:UNICORN")
    words = f"--data.source {own}:UNICORN: unicorn is absent there, but is none of the run's"
    with pytest.raises(UserError, match=words): check_config(cfg)
    (tmp_path / "classes.txt").write_text("horse\nunicorn")
    check_config(changed(cfg, "data.classes", str(tmp_path / "classes.txt")))
    assert absent_classes(f"{own}:UNICORN", ("horse", "unicorn")) == (1,)


def test_stages_of_the_users_own_do_not_meet(own):
    "Two with one folder in one command; and a stage is loaded by its name, or refused."
    both = replace(TOY, stages=("sac", f"{own}:STAGE", f"{own}:AGAIN"))
    with pytest.raises(UserError, match="AGAIN: does not fit .*the folder model_own is taken"):
        check_config(both)
    check_config(replace(TOY, stages=(f"{own}:STAGE",)))
    load_stages(TOY.stages)
    with pytest.raises(UserError, match="--stages gone:STAGE: cannot be imported"):
        load_stages(["gone:STAGE"])


@pytest.mark.parametrize("name", ["Listed", "Named"])
def test_new_layers_are_a_name_or_several(own, name):
    assert SegmentationModel(f"{own}:{name}", 2).new == ("head.",)


def test_new_layers_that_are_no_names_are_refused(own):
    with pytest.raises(UserError, match=f"--arch {own}:Layered: its attribute new is of type Conv"):
        SegmentationModel(f"{own}:Layered", 2)


@pytest.mark.parametrize("short", ["--pool median", "--pool=median"])
def test_short_forms_of_options(short, help_text):
    assert tyro.cli(Config, args=long_options(short.split())).sac.loss.pool == "median"
    others = ["--pooled=1", "a=b", "--sac.noise"]
    assert long_options(others) == others
    assert "short: --pool;" in help_text.partition(" --sac.loss.pool ")[2][:200]


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


# ---------------------------------------------------------------- on disk

def test_settings_are_plain_values_that_decide():
    flat = settings(TOY)
    assert flat["sac.loss.zeta"] == .75 and flat["data.toy_size"] == [96, 192]
    assert set(flat) == set(dotted(Config)) - MAY_CHANGE
    assert flat == json.loads(json.dumps(flat))


def test_differences_name_three_at_most():
    assert differences(settings(TOY), settings(replace(TOY, checkpoints=7, data=TOY.data))) == ""
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
    check_same(folder, replace(TOY, checkpoints=9, stages=("sac",)))
    check_same(folder, replace(TOY, data=replace(TOY.data, workers=3)))
    with pytest.raises(UserError, match=r"sac.lr 0.0005 there, 0.1 here\); give another"):
        check_same(folder, replace(TOY, sac=replace(TOY.sac, lr=.1)))


def test_a_run_of_another_version_is_not_continued_and_says_why(tmp_path):
    values = dataclasses.asdict(TOY)
    values["recompute"], values["sac"]["noise"] = False, True
    (tmp_path / "config.json").write_text(json.dumps({"config": values}))
    words = r"sac.noise True there, .* here\), begun with another version"
    with pytest.raises(UserError, match=words): check_same(tmp_path, TOY)
