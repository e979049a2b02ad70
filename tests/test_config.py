"""The configuration: help for every setting, one table for every name, and what is on disk."""
import ast
import contextlib
import dataclasses
import io
import json
import math
import os
import re
import sys
import typing
from dataclasses import replace
from operator import attrgetter

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
    is_run,
    load_config,
    load_stages,
    long_options,
    MAY_CHANGE,
    only_longer,
    PRESETS,
    settings,
    Stage,
    STAGES,
    TOY,
)
from sac_lit.core import UserError
from sac_lit.deeplabv2 import SegmentationModel
from sac_lit.ranges import check_ranges, RANGES
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
    elif isinstance(getattr(cfg, head), tuple) and not isinstance(value, tuple): value = (value,)
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


# ---------------------------------------------------------------- numbers

def leaves(kind):
    "The types of which a type is made."
    parts = typing.get_args(kind)
    return {kind} if not parts else set().union(*map(leaves, parts))


def kind_of(option):
    "The type of a setting, by its dotted name."
    kind = Config
    for part in option.split("."): kind = typing.get_type_hints(kind)[part]
    return kind


def test_every_number_has_a_range():
    "And a range says the same of a setting as its type: whole, how many, and whether None is one."
    numeric = {name for name in dotted(Config) if leaves(kind_of(name)) & {int, float}}
    assert numeric == set(RANGES)
    for name, allowed in RANGES.items():
        kinds = leaves(kind_of(name))
        assert allowed.whole == (int in kinds) and allowed.none == (type(None) in kinds), name
        value = attrgetter(name)(PRESETS["gta5_vgg16"][1])
        count = len(value) if isinstance(value, tuple) else 1
        assert ... in kinds or value is None or allowed.count == count, name


def filled(allowed, x):
    "A value for a range that is made of one number."
    return x if allowed.count == 1 else (x,) * (allowed.count or 2)


def ends(allowed):
    "Values that a range just holds."
    low = math.nextafter(allowed.low, math.inf) if allowed.above else allowed.low
    yield filled(allowed, low)
    yield filled(allowed, allowed.high if allowed.high < math.inf else 10 ** 9)
    if allowed.none: yield None


def outside(allowed):
    "Values that no range, or just not this one, holds."
    step = (lambda x, to: x + (1 if to > x else -1)) if allowed.whole else math.nextafter
    yield filled(allowed, allowed.low if allowed.above else step(allowed.low, -math.inf))
    if allowed.high < math.inf: yield filled(allowed, step(allowed.high, math.inf))
    for x in (math.nan, math.inf, -math.inf, True, "1", -10 ** 400): yield filled(allowed, x)
    if allowed.whole: yield filled(allowed, allowed.low + .5)
    if not allowed.none: yield None
    if allowed.count > 1: yield (filled(allowed, allowed.low + 1)[:-1])
    if allowed.rising: yield allowed.high, allowed.low


@pytest.mark.parametrize("option", RANGES)
def test_a_number_is_taken_within_its_range_only(option):
    for value in ends(RANGES[option]): check_ranges(put(TOY, option, value))
    for value in outside(RANGES[option]):
        with pytest.raises(UserError) as error: check_config(put(TOY, option, value))
        text = str(error.value)
        assert text.startswith(f"--{option.replace('_', '-')}") and "\n" not in text
        assert f": give {RANGES[option]}" in text and len(text) < 400


def put(cfg, option, value):
    "A configuration with exactly this value of a setting."
    head, _, rest = option.partition(".")
    if rest: value = put(getattr(cfg, head), rest, value)
    return replace(cfg, **{head: value})


@pytest.mark.parametrize("option", RANGES)
def test_help_shows_the_range(help_text, option):
    flag = "--" + option.replace("_", "-")
    about = help_text.partition(f" {flag} ")[2].partition(" --")[0]
    assert f"; {RANGES[option].bounds()})" in about


@pytest.mark.parametrize("args, words", [
    ("--sac.loss.zeta 2", "--sac.loss.zeta 2.0: give a number from 0 to 1 (a share of"),
    ("--sac.loss.zeta nan", "--sac.loss.zeta nan: give a number from 0 to 1"),
    ("--sac.loss.beta -1", "--sac.loss.beta -1.0: give a number above 0 and at most 1 (equation"),
    ("--abn.lr -1", "--abn.lr -1.0: give a number above 0"),
    ("--sac.weight-decay -1", "--sac.weight-decay -1.0: give a number from 0 to 1"),
    ("--abn.steps -3", "--abn.steps -3: give a number of at least 1 and at most 9999999"),
    ("--stages abn --sac.groups 0", "--sac.groups 0: give a number of at least 1"),
    ("--abn.crop 0 0", "--abn.crop 0 0: give numbers of at least 16"),
    ("--sac.view-scale 1 .5", "--sac.view-scale 1.0 0.5: give numbers from 0.1 to 1 (2, the first"),
    ("--sac.blur 40", "--sac.blur 40.0: reaches beyond the crop, whose shorter side has 96 pixels"),
    ("--name a/b", "--name 'a/b': give the name of a folder"),
    ("--name ..", "--name '..': give the name of a folder"),
    ("--stages oracle --data.target folder", "--stages oracle: needs labels of the target's"),
    ("--stages abn --sac.start x", "--sac.start: the joint stage would not use")])
def test_what_cannot_be_trained_is_refused_before_anything_is_made(
        tmp_path, monkeypatch, capsys, args, words):
    assert refused(tmp_path, monkeypatch, capsys, "toy", *args.split()).startswith(words)


def refused(tmp_path, monkeypatch, capsys, *args):
    "What a command says that ends with the status 2, one sentence, and leaves nothing."
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end: main(list(args))
    line, = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and not list(tmp_path.iterdir()) and line.startswith("error: ")
    assert len(line) < 400
    return line.removeprefix("error: ")


# ---------------------------------------------------------------- options

@pytest.mark.parametrize("args, words", [
    ("toy --zeta .5", "--zeta: no such option; did you mean --sac.loss.zeta or"),
    ("toy --sac.loss.zta=.5", "--sac.loss.zta: no such option; did you mean --sac.loss.zeta or"),
    ("--sac.num_crop 4", "--sac.num-crop: no such option; did you mean --sac.num-crops"),
    ("--optim adam", "--optim: no such option; did you mean --abn.optimizer or --sac.optimizer"),
    ("--qqq 1", "--qqq: no such option; --help lists all of them"),
    ("--sac.lr fast", "--sac.lr fast: give a number"),
    ("--sac.steps 1.5", "--sac.steps 1.5: give a whole number"),
    ("--seed", "--seed: give a whole number"),
    ("--abn.crop 64", "--abn.crop 64: give 2 whole numbers"),
    ("--abn.crop 64 64 64 --seed 1", "--abn.crop 64 64 64: give 2 whole numbers"),
    ("--data.eval-size a b", "--data.eval-size a b: give 2 whole numbers, or None"),
    ("--abn.optimizer sgdd", "--abn.optimizer sgdd: give sgd or adam"),
    ("--fresh=3", "--fresh 3: give no value: it is a switch"),
    ("toy -x", "-x: no option takes it"),
    ("toy extra", "extra: no option takes it"),
    ("toyy", "toyy: did you mean toy"),
    ("folder-cpuu", "folder-cpuu: did you mean folder_cpu"),
    ("nothing", "nothing: choose one of toy, toy_long,"),
    ("report", "FOLDER is not given"),
    ("report a b", "b: no option takes it")])
def test_a_mistyped_option_is_one_sentence(tmp_path, monkeypatch, capsys, args, words):
    assert refused(tmp_path, monkeypatch, capsys, *args.split()).startswith(words)


@pytest.mark.parametrize("name", ["folder-cpu", "folder_cpu"])
def test_a_preset_is_found_in_either_spelling(tmp_path, monkeypatch, capsys, name):
    assert refused(tmp_path, monkeypatch, capsys, name, "--seed", "-1").startswith("--seed -1: ")


# ---------------------------------------------------------------- settings of another run

@pytest.fixture
def begun(monkeypatch, tmp_path):
    "A run on the disk, and what a command would train."
    there = tmp_path / "runs" / "one"
    there.mkdir(parents=True)
    cfg = replace(TOY, name="one", seed=3, fresh=True, sac=replace(TOY.sac, noise=(), period=2))
    written(there, cfg)
    trained = []
    monkeypatch.setattr("sac_lit.train.train", trained.append)
    monkeypatch.chdir(tmp_path)
    return cfg, trained


@pytest.mark.parametrize("form", [
    "--config runs/one --name two", "--config=runs/one/config.json --name two",
    "--name two --config runs/one", "--sac.period 5 --config runs/one --name two --seed 1"])
def test_another_run_lends_its_settings(begun, form):
    "But not that it was to start over: a folder of the new name is not emptied."
    cfg, trained = begun
    main(form.split())
    period, seed = (5, 1) if "period" in form else (2, 3)
    sac = replace(cfg.sac, period=period)
    assert trained == [replace(cfg, name="two", fresh=False, seed=seed, sac=sac)]


@pytest.mark.parametrize("form, words", [
    ("--config runs/one", "--config runs/one: give the new run a --name of its own"),
    ("toy --config runs/one --name two", "toy: give a preset or --config, not both"),
    ("--name two --config", "--config: give the folder of a run"),
    ("--config runs/none --name two", "runs/none: holds no run of sac_lit"),
    ("--config runs/one --name two --sac.perod 3", "--sac.perod: no such option; did you mean"),
    ("--config runs/one --name two --seed x", "--seed x: give a whole number")])
def test_what_another_run_cannot_lend(begun, capsys, form, words):
    with pytest.raises(SystemExit) as end: main(form.split())
    assert end.value.code == 2 and not begun[1]
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {words}")


def test_only_longer():
    more = settings(put(TOY, "sac.steps", 2000))
    assert only_longer(settings(TOY), more) and not only_longer(more, settings(TOY))
    assert not only_longer(settings(TOY), settings(put(TOY, "abn.steps", 2000)))
    assert not only_longer(settings(TOY), {**more, "seed": 1})
    assert not only_longer(more, more)


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


def test_differences_name_three_at_most_and_say_how_many_more():
    assert differences(settings(TOY), settings(replace(TOY, checkpoints=7, data=TOY.data))) == ""
    there, here = settings(TOY), settings(PRESETS["gta5_vgg16"][1])
    text = differences(there, here)
    assert text.count(" there, ") == 3
    assert text.endswith(f"; and {sum(there[k] != here[k] for k in there) - 3} more")
    assert differences({"a": 1, "b": 1, "c": 1}, {"a": 2, "b": 2, "c": 2}).count(";") == 2
    assert differences({"a": 1}, {"b": 2}) == "a 1 there, None here; b None there, 2 here"


def test_another_version_wrote_the_file(tmp_path):
    "A setting that is gone is left out, one that is new has its default."
    values = dataclasses.asdict(TOY)
    values["recipe"] = "old"
    del values["plain"], values["sac"]["noise"]
    (tmp_path / "config.json").write_text(json.dumps({"config": values}))
    assert load_config(tmp_path) == TOY


NO_RUNS = [
    None, "", "{", "[]", "{}", "null", '{"config": null}', '{"config": 7}', '{"config": {}}',
    '{"config": []}', '{"config": {"name": "x"}}', "[" * 10_000, "\0"]


@pytest.mark.parametrize("text", NO_RUNS)
def test_a_folder_that_is_no_run(tmp_path, text):
    if text is not None: (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="holds no run of sac_lit") as error: load_config(tmp_path)
    assert "\n" not in str(error.value) and not is_run(tmp_path)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink(path, path)])
def test_what_is_no_file_is_no_run(tmp_path, make):
    make(tmp_path / "config.json")
    with pytest.raises(UserError, match="holds no run of sac_lit"): load_config(tmp_path)
    assert not is_run(tmp_path)


@pytest.mark.parametrize("value", [{"a": 1}, [[]], "\0x", True, 1.5, 10 ** 400, None])
def test_any_value_in_a_file_is_a_setting_or_one_sentence(tmp_path, value):
    for option in [*dotted(Config), "data", "abn", "sac", "sac.loss"]:
        (tmp_path / "config.json").write_text(json.dumps({"config": plain_with(option, value)}))
        try: cfg = load_config(tmp_path)
        except UserError as e:
            assert "\n" not in str(e) and option.rpartition(".")[2] in str(e)
            continue
        if isinstance(value, dict): continue  # of another version
        kinds = {type(value)} | ({float} if type(value) is int else set())
        assert leaves(kind_of(option)) & kinds, option
        if option not in RANGES or value in (1.5, None): continue
        with pytest.raises(UserError): check_ranges(cfg)


def plain_with(option, value):
    "The preset `toy` as plain values, one of them another."
    plain = dataclasses.asdict(TOY)
    *path, name = option.split(".")
    part = plain
    for key in path: part = part[key]
    part[name] = value
    return plain


def test_what_may_change_and_what_not(tmp_path):
    folder = written(tmp_path, TOY)
    check_same(folder, replace(TOY, checkpoints=9, stages=("sac",)))
    check_same(folder, replace(TOY, data=replace(TOY.data, workers=3)))
    with pytest.raises(UserError, match=r"sac.lr 0.001 there, 0.1 here\); give another"):
        check_same(folder, replace(TOY, sac=replace(TOY.sac, lr=.1)))


def test_a_run_of_another_version_is_not_continued_and_says_why(tmp_path):
    values = dataclasses.asdict(TOY)
    values["recompute"], values["sac"]["noise"] = False, True
    (tmp_path / "config.json").write_text(json.dumps({"config": values}))
    words = r"sac.noise True there, .* here\), begun with another version"
    with pytest.raises(UserError, match=words): check_same(tmp_path, TOY)
