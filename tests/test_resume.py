"""Whatever ends a run, the same command goes on, and the result is that of a run left alone."""
import errno
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from jobs import ENV, log, MODULE, SMALL, start, train, wait_for, wait_for_log, weights
from safetensors.torch import save_file

from sac_lit import core
from sac_lit.config import Config, load_config, SACConfig
from sac_lit.core import ASIDE, UserError
from sac_lit.loop import (
    _resume,
    checkpoints,
    load_checkpoint,
    Progress,
    run_stage,
    save_checkpoint,
)
from sac_lit.runs import lock_folder, open_run
from sac_lit.train import _read_frequencies, main

BUSY = ("--log-every", "1", "--checkpoint-every", "1")  # a checkpoint after every step
RARE = ("--log-every", "1", "--checkpoint-every", "100")  # none but at the end


@pytest.fixture(scope="module")
def cwd(tmp_path_factory):
    "A folder in which the job has run without trouble, as `whole`."
    cwd = tmp_path_factory.mktemp("resume")
    done = train(cwd, *BUSY, "--name", "whole")
    assert done.returncode == 0, done.stderr
    return cwd


def assert_as_undisturbed(cwd, name, whole="whole"):
    "Weights, log and the list of files are those of the undisturbed run."
    for folder in ("model_abn", "model", "momentum", "best_by_target_labels"):
        a, b = weights(cwd, whole, folder), weights(cwd, name, folder)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), folder
    runs = [cwd / "runs" / n for n in (whole, name)]
    logs = [(run / "log.jsonl").read_text() for run in runs]
    assert logs[0] == logs[1]
    files = [sorted(str(p.relative_to(run)) for p in run.rglob("*")) for run in runs]
    assert files[0] == files[1]


def assert_continues(cwd, *args, name):
    "The same command once more ends as the undisturbed run did."
    done = train(cwd, *args, "--name", name)
    assert done.returncode == 0, done.stderr
    assert_as_undisturbed(cwd, name)
    return done.stdout


def kill(process):
    process.kill()
    process.communicate()


def one_line(done):
    "What a command that was refused, or ended with an error, said."
    line, = done.stderr.strip().splitlines()
    assert done.returncode == 2
    return line


@pytest.mark.parametrize("kills, steps", [
    (1, "6"),
    pytest.param(25, "60", marks=pytest.mark.slow)])
def test_killed_at_random_moments(cwd, kills, steps):
    """Each start lives for a random time after its first sign of life.

    So every part of the run is hit, the writing of checkpoints above all."""
    args = (*BUSY, "--abn.steps", steps, "--sac.steps", steps)
    began = time.time()
    assert train(cwd, *args, "--name", f"whole{kills}").returncode == 0
    dice, name, work = random.Random(kills), f"killed{kills}", time.time() - began
    config = cwd / "runs" / name / "config.json"  # written anew by each start
    for _ in range(kills):
        began, process = time.time(), start(cwd, *args, "--name", name)
        wait_for(lambda began=began: config.exists() and config.stat().st_mtime >= began, process)
        wait_for(lambda: False, process, dice.uniform(0, 2 * work / (kills + 1)))
        kill(process)
    done = train(cwd, *args, "--name", name)
    assert done.returncode == 0, done.stderr
    assert_as_undisturbed(cwd, name, f"whole{kills}")


@pytest.mark.parametrize("number, stage", [
    (signal.SIGTERM, "abn"), pytest.param(signal.SIGINT, "sac", marks=pytest.mark.slow)])
def test_signal(cwd, number, stage):
    "The step in progress is finished and saved."
    name, args = f"signal{int(number)}", (*RARE, "--data.workers", "1")
    process = start(cwd, *args, "--name", name)
    wait_for_log(cwd, process, name, stage)
    process.send_signal(number)
    sent = time.time()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143 and time.time() - sent < 20
    last = errors.strip().splitlines()[-1]
    assert last.startswith(f"stopped as asked ({stage}, step "), errors
    assert list((cwd / "runs" / name / "checkpoints").glob(f"{stage}_*"))
    assert f"{stage}: continued from step" in assert_continues(cwd, *args, name=name)


def test_damaged_checkpoint(cwd):
    "A byte flips in the newest checkpoint; the one before takes its place."
    folder = cwd / "runs" / "damaged" / "checkpoints"
    process = start(cwd, *BUSY, "--name", "damaged")
    wait_for(lambda: len(list(folder.glob("sac_*[0-9]"))) == 2, process)
    kill(process)
    newest = sorted(folder.glob("sac_*[0-9]"))[-1] / "state.pt"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    assert f"{newest.parent.name}: damaged" in assert_continues(cwd, *BUSY, name="damaged")


def limited(cwd, *args, size):
    "The job where no file may grow beyond a size: what a full disk does to a checkpoint."
    return subprocess.run(
        [sys.executable, *MODULE, "toy", *SMALL, *args], cwd=cwd, env=ENV,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
        capture_output=True, text=True, timeout=300)


def test_lengthened(cwd):
    """A finished run that is asked for more steps, and one that had them from the beginning.

    Weights and lines of steps are the same to the last bit."""
    args = (*BUSY, "--sac.schedule", "constant", "--keep", "last")
    for name, steps in (("longer", "4"), ("longer", "7"), ("long", "7")):
        done = train(cwd, *args, "--name", name, "--sac.steps", steps)
        assert done.returncode == 0, done.stderr
        if steps == "7" and name == "longer": assert "sac: continued from step 4" in done.stdout
    for folder in ("model_abn", "model", "momentum"):
        a, b = weights(cwd, "long", folder), weights(cwd, "longer", folder)
        assert all(torch.equal(a[k], b[k]) for k in a), folder
    steps = [log(cwd, name, event="step") for name in ("long", "longer")]
    assert steps[0] == steps[1]
    runs = [cwd / "runs" / name for name in ("long", "longer")]
    kept = [[p.name for p in (run / "checkpoints").iterdir()] for run in runs]
    assert kept == [["sac_0000007"]] * 2 and (runs[1] / "model_4").is_dir()


def test_full_disk(cwd):
    "The state is not written, what was there stays, and the message says so."
    args = (*BUSY, "--name", "full")
    assert train(cwd, *args, "--stages", "abn", "--abn.steps", "6").returncode == 0
    size = (cwd / "runs" / "full" / "model_abn" / "model.safetensors").stat().st_size
    done = limited(cwd, *args, size=2 * size)  # a joint checkpoint holds four times the network
    line = one_line(done)
    assert "sac_0000001: could not be written" in line and "make room" in line
    assert not list((cwd / "runs" / "full").rglob("*.tmp"))
    done = limited(cwd, *args, "--when-full", "continue", size=2 * size)
    assert done.returncode == 0 and "warning: " in done.stdout
    assert_as_undisturbed(cwd, "full")


def test_checkpoint_of_another_configuration(cwd):
    process = start(cwd, *BUSY, "--name", "mine")
    folder = cwd / "runs" / "mine" / "checkpoints"
    wait_for(lambda: list(folder.glob("abn_*[0-9]")), process)
    kill(process)
    args = (*BUSY, "--name", "other", "--seed", "1")
    assert train(cwd, *args, "--stages").returncode == 0  # no stage: an empty run
    shutil.copytree(folder, cwd / "runs" / "other" / "checkpoints")
    line = one_line(train(cwd, *args))
    assert "another configuration" in line and "seed" in line


def children(pid):
    "The processes that a process has started."
    return [int(p) for p in open(f"/proc/{pid}/task/{pid}/children").read().split()]


def test_a_worker_that_was_told_to_end_ends():
    "Python waits at its end for workers to which it sent one SIGTERM; they let the first pass by."
    code = """
import multiprocessing, signal, time
from sac_lit import loop

def stuck(ready):
    alarm, signal.alarm = signal.alarm, lambda seconds: alarm(min(seconds, 1))
    loop.postpone_sigterm(0)
    ready.set()
    while True: time.sleep(1)

context = multiprocessing.get_context("fork")
ready = context.Event()
worker = context.Process(target=stuck, args=[ready], daemon=True)
worker.start()
ready.wait()
"""
    subprocess.run([sys.executable, "-c", code], env=ENV, check=True, timeout=60)


def test_dying_worker(cwd):
    args = (*BUSY, "--data.workers", "2")
    process = start(cwd, *args, "--name", "worker")
    path = cwd / "runs" / "worker" / "log.jsonl"
    wait_for(lambda: path.exists() and log(cwd, "worker", stage="abn") and children(process.pid),
             process)
    process.send_signal(signal.SIGSTOP)  # it has not read everything when its workers die
    os.kill(children(process.pid)[0], signal.SIGKILL)
    process.send_signal(signal.SIGCONT)
    _, errors = process.communicate(timeout=60)
    if process.returncode:  # it may have had all batches already
        # Python may report beside it that news of the death came while a loader was being closed
        error, = [line for line in errors.splitlines() if line.startswith("error: ")]
        assert process.returncode == 2 and "data worker" in error and "died" in error, errors
    assert_continues(cwd, *args, name="worker")


IN_PROCESS = """
import sys, time
import sac_lit.{module} as m
whole, calls = m.{name}, 0
def trouble(*args, **kwargs):
    global calls
    calls += 1
    if calls == {call}: {what}
    return whole(*args, **kwargs)
m.{name} = trouble
import sac_lit.train
sac_lit.train.main(sys.argv[1:])
"""


def train_with(cwd, module, name, call, what, *args):
    "The job, with something done at one call of a function of the library."
    code = IN_PROCESS.format(module=module, name=name, call=call, what=what)
    return train(cwd, *args, launch=("-c", code))


def test_nan(cwd):
    """A loss that is no number in the third step of the joint stage.

    The step is not taken, and its images are named."""
    nan = "return whole(*args, **kwargs) * float('nan')"
    done = train_with(cwd, "ema_training", "focal_loss", 3, nan, *BUSY, "--name", "nan")
    line = one_line(done)
    assert "sac stopped in step 3" in line and "target loss nan" in line
    assert line.count(".png") == 4
    saved = sorted(p.name for p in (cwd / "runs" / "nan" / "checkpoints").iterdir())
    assert saved == ["sac_0000001", "sac_0000002"]
    assert_continues(cwd, *BUSY, name="nan")


def test_stalled_worker(cwd):
    args = (*BUSY, "--name", "stalled", "--data.workers", "1", "--data.timeout", "3")
    done = train_with(cwd, "datasets", "open_image", 5, "time.sleep(3600)", *args)
    line = one_line(done)
    assert "data worker 0 of 1 delivered nothing for 3 s" in line and ".png" in line
    assert_continues(cwd, *BUSY, name="stalled")


@pytest.mark.slow
def test_signal_to_the_whole_group(cwd):
    """What a cluster does: the workers get the SIGTERM too.

    They still deliver the batch that the training needs to finish its step."""
    args = (*RARE, "--data.workers", "2")
    process = start(cwd, *args, "--name", "group", start_new_session=True)
    wait_for_log(cwd, process, "group")
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    last = errors.strip().splitlines()[-1]
    assert process.returncode == 143 and last.startswith("stopped as asked (abn, step "), errors
    assert list((cwd / "runs" / "group" / "checkpoints").glob("abn_*"))
    assert_continues(cwd, *args, name="group")


LAUNCH = (
    os.path.join(os.path.dirname(sys.executable), "accelerate"), "launch", "--num_processes", "1",
    "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--cpu", *MODULE)


def test_end_of_the_launcher(cwd):
    """`accelerate launch` dies of a SIGTERM without a word to the training.

    The training notices, saves and ends; until then the run is locked."""
    steps = 20_000  # minutes: the second start and the launcher's end fall into them anywhere
    args = ("--log-every", "1", "--checkpoint-every", f"{steps}", "--abn.steps", f"{steps}",
            "--name", "launched")
    process = subprocess.Popen(
        [*LAUNCH, "toy", *SMALL, *args], cwd=cwd, env=ENV,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for_log(cwd, process, "launched")
    line = one_line(train(cwd, *args))
    assert "another process is at work in this run" in line
    process.terminate()
    process.wait(timeout=60)
    folder = cwd / "runs" / "launched" / "checkpoints"
    end = time.time() + 60
    while not list(folder.glob("abn_*[0-9]")) and time.time() < end: time.sleep(.05)
    assert len(list(folder.glob("abn_*[0-9]"))) == 1
    assert log(cwd, "launched", stage="abn")[-1]["step"] < steps


def test_first_start_that_was_cut_off(cwd):
    "Killed while the first file was written, or in the middle of --fresh: it can be opened."
    folder = cwd / "runs" / "cut"
    folder.mkdir()
    (folder / ASIDE.replace("*", "0")).write_text('{"config": {')
    assert train(cwd, *BUSY, "--name", "cut", "--stages").returncode == 0
    (folder / "log.jsonl").unlink(missing_ok=True)
    assert_continues(cwd, *BUSY, "--fresh", name="cut")


# ---------------------------------------------------------------- without a training

def test_a_start_that_failed_claims_no_name(tmp_path):
    "A mistyped option that only the network notices, say: the corrected command may have the name."
    def opened(seed): return open_run(Config(name="run", runs=str(tmp_path), seed=seed))
    opened(0)
    assert load_config(opened(1).folder).seed == 1
    opened(1).log({"event": "step", "stage": "abn", "step": 1})
    with pytest.raises(UserError, match="seed 1 there, 2 here"): opened(2)


@pytest.mark.parametrize("content", ["{}", "[1]", "null", '{"config": 3}', '{"arch": "x"}', "\xff"])
def test_fresh_empties_nothing_but_a_run(tmp_path, content):
    "Many programs write a config.json; what lies beside one that is not ours is not ours."
    mine = tmp_path / "run"
    mine.mkdir()
    (mine / "config.json").write_text(content, encoding="latin-1")
    (mine / "thesis.tex").write_text("years of work")
    for fresh in (True, False):
        with pytest.raises(UserError, match="not a run of sac_lit"):
            open_run(Config(name="run", runs=str(tmp_path), fresh=fresh))
    assert (mine / "config.json").read_text(encoding="latin-1") == content
    assert (mine / "thesis.tex").read_text() == "years of work"


def test_a_damaged_log_stops_nothing(saved):
    "It is kept beside the new one, which has the lines that could be read."
    run, state = saved
    path = run.folder / "log.jsonl"
    before = path.read_bytes()
    damaged = before + b"\x00\xff\xfe\n[1]\nnull\n" + b'{"event": "step", "st'
    path.write_bytes(damaged)
    said = []
    run.say = said.append
    assert _resume(run, "abn", state) == 2
    assert path.read_bytes() == before and said[0].startswith(f"{path}: 3 damaged lines")
    assert path.with_name("log.jsonl.damaged").read_bytes() == damaged
    for k, content in enumerate(("garbage", "null", "[1]")):
        (run.folder / "seconds.json").write_text(content)
        assert _resume(run, "abn", state) == 2 and "set aside as seconds.json.damaged" in said[-2]
        aside = run.folder / f"seconds.json.damaged{k or ''}"
        assert aside.read_text() == content and not (run.folder / "seconds.json").exists()
    for content in ("", "[]", "{", '{"abn": "x", "sac": 2.5}'):
        (run.folder / "seconds.json").write_text(content)
        assert run.seconds() == ({"sac": 2.5} if "2.5" in content else {})


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink(path, path)])
def test_what_is_no_log_stops_no_resume(saved, make):
    run, state = saved
    path = run.folder / "log.jsonl"
    path.unlink()
    make(path)
    said = []
    run.say = said.append
    assert _resume(run, "abn", state) == 2 and path.read_bytes() == b""
    assert "set aside as log.jsonl.damaged" in said[0]


@pytest.mark.parametrize("name", ["log.jsonl", "seconds.json"])
def test_a_pipe_in_the_place_of_a_log_is_set_aside_before_anything_is_read(saved, name, capfd):
    run, _ = saved
    (run.folder / name).unlink(missing_ok=True)
    os.mkfifo(run.folder / name)
    again = open_run(run.cfg)
    again.log({"event": "step", "stage": "abn", "step": 3})
    assert f"set aside as {name}.damaged" in capfd.readouterr().out
    assert again.rows()[-1]["step"] == 3 and again.seconds() == {}


def test_a_checkpoint_of_another_network_gets_one_sentence(saved):
    run, state = saved
    with pytest.raises(UserError, match="abn_0000002: not of this run .RuntimeError"):
        load_checkpoint(run, "abn", {**state, "model": torch.nn.Linear(3, 2)})
    with pytest.raises(UserError, match="abn_0000002: not of this run .KeyError"):
        load_checkpoint(run, "abn", {**state, "prior": torch.nn.Linear(3, 2)})


def spoil(path, how):
    "Put something else in the place of a checkpoint."
    state = path / "state.pt"
    if how == "pipe":
        state.unlink()
        os.mkfifo(state)
    elif how == "file":
        shutil.rmtree(path)
        path.write_text("x")
    else:
        parts = {"settings": 3, "versions": {}, "state": {}}
        torch.save([1] if how == "list" else parts, state)


@pytest.mark.parametrize("how", ["pipe", "file", "list", "parts"])
def test_what_is_no_checkpoint_gives_way_to_the_one_before(saved, how):
    run, state = saved
    spoil(checkpoints(run, "abn")[-1], how)
    load_checkpoint(run, "abn", state)
    assert state["progress"].step == 1
    assert (run.folder / "checkpoints" / "abn_0000002.damaged").exists()


def test_a_name_as_long_as_names_can_be(tmp_path):
    run = tmp_path / ("x" * 250)
    with lock_folder(run):
        with pytest.raises(UserError, match="another process is at work"), lock_folder(run): pass
    assert open_run(Config(name=run.name, runs=str(tmp_path))).folder == run


# ---------------------------------------------------------------- lengthened

def finished(folder, **changes):
    "A run whose joint stage is done, as far as its folder says."
    sac = SACConfig(steps=20, **changes.pop("sac", {}))
    cfg = Config(name="done", runs=str(folder), sac=sac, **changes)
    run = open_run(cfg)
    run.log({"event": "step", "stage": "sac", "step": 20, "loss_source": .1})
    (run.folder / "model").mkdir()
    (run.folder / "model" / "mark").write_text("after 20 steps")
    (run.folder / "checkpoints" / "sac_0000020").mkdir(parents=True)
    return replace(cfg, mixed_precision=run.cfg.mixed_precision)


def longer(cfg, steps=30): return replace(cfg, sac=replace(cfg.sac, steps=steps))


def test_a_finished_run_is_opened_for_more_steps(tmp_path):
    "What it had trained is kept under the number of its steps."
    run = open_run(longer(finished(tmp_path)))
    assert load_config(run.folder).sac.steps == 30 and not (run.folder / "model").exists()
    assert (run.folder / "model_20" / "mark").read_text() == "after 20 steps"


@pytest.mark.parametrize("changes, words", [
    ({"sac": {"schedule": "poly"}}, "its learning rate falls to 0 at step 20 (--sac.schedule p"),
    ({"keep": "score"}, "with --keep score, its evaluation after step 20 would be one too many"),
    ({"keep": "score", "eval_every": 7}, "its evaluation after step 20"),
    ({}, "its last checkpoint, {run}/checkpoints/sac_0000020, is gone")])
def test_what_cannot_be_lengthened_says_why_and_stays(tmp_path, changes, words):
    cfg, run = finished(tmp_path, **changes), tmp_path / "done"
    if not changes: shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError) as error: open_run(longer(cfg))
    text = str(error.value)
    assert words.format(run=run) in text and f"--config {run}" in text and "\n" not in text
    assert load_config(run).sac.steps == 20 and (run / "model" / "mark").exists()


def test_neither_shorter_nor_otherwise(tmp_path):
    cfg = finished(tmp_path)
    with pytest.raises(UserError, match="sac.steps 20 there, 10 here"): open_run(longer(cfg, 10))
    with pytest.raises(UserError, match="sac.steps 20 there, 30 here; seed 0 there, 1 here"):
        open_run(replace(longer(cfg), seed=1))


def test_the_end_of_the_console_is_not_the_end_of_the_run(tmp_path):
    code = f"""
from pathlib import Path
from accelerate import PartialState
from sac_lit.runs import Run
run = Run(None, PartialState(cpu=True), Path({str(tmp_path)!r}))
for k in range(3000): run.say(f"step {{k}} of three thousand")
Path("{tmp_path}/done").touch()
"""
    process = subprocess.Popen([sys.executable, "-c", code], env=ENV, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"step 0 of three thousand\n"
    process.stdout.close()
    assert process.wait(60) == 0 and (tmp_path / "done").exists()


def test_without_a_terminal_a_stage_says_a_line_a_minute(tmp_path, monkeypatch):
    "With losses, rate, and the time that is left; 100 steps of four seconds."
    clock, said = [0.], []
    monkeypatch.setattr(core.time, "monotonic", lambda: clock[0])
    run = open_run(Config(name="slow", runs=str(tmp_path), log_every=5))
    run.say = said.append
    def losses(start):
        for _ in range(start, 100):
            clock[0] += 4
            yield {"loss": torch.tensor(.5)}
    run_stage(run, "fit", 100, losses, {"model": torch.nn.Linear(2, 2)}, lambda step: "")
    assert said[0] == "fit 15/100 loss 0.500: 4.0 seconds each, 6 min left"
    assert len(said) == 7 and said[-1] == "fit 100/100"


def test_damaged_frequencies_are_counted_again(tmp_path):
    path = tmp_path / "class_frequency.safetensors"
    assert _read_frequencies(path, (4, 3)) is None
    for content in (b"", b"garbage" * 10):
        path.write_bytes(content)
        assert _read_frequencies(path, (4, 3)) is None
    save_file({"frequency": torch.ones(4, 3)}, path)
    assert _read_frequencies(path, (4, 3)).sum() == 12
    assert _read_frequencies(path, (5, 3)) is None
    for wrong in (torch.full((4, 3), torch.nan), -torch.ones(4, 3), torch.ones(4, 3).double()):
        save_file({"frequency": wrong}, path)
        assert _read_frequencies(path, (4, 3)) is None
    path.unlink()
    os.mkfifo(path)
    assert _read_frequencies(path, (4, 3)) is None


@pytest.fixture
def saved(tmp_path):
    "A run with two checkpoints of a small model."
    run = open_run(Config(name="small", runs=str(tmp_path)))
    run.log({"event": "step", "stage": "abn", "step": 0})
    model, progress = torch.nn.Linear(2, 2), Progress()
    for step in (1, 2):
        progress.step = step
        save_checkpoint(run, "abn", {"model": model, "progress": progress})
    return run, {"model": model, "progress": progress}


def assert_both_are_there(run):
    assert [p.name for p in checkpoints(run, "abn")] == ["abn_0000001", "abn_0000002"]


def test_disk_that_does_not_answer(saved, monkeypatch):
    "An error of the disk is no damage: nothing is removed, and the run does not start over."
    run, state = saved
    def stale(*args, **kwargs): raise OSError(errno.ESTALE, "Stale file handle")
    sentence = "abn_0000002: cannot be read .Stale file handle.; nothing was changed"
    with monkeypatch.context() as m:
        m.setattr(torch, "load", stale)
        with pytest.raises(UserError, match=sentence): load_checkpoint(run, "abn", state)
    assert_both_are_there(run)


def test_any_flipped_bit_is_noticed(saved, capsys):
    run, state = saved
    path, dice = checkpoints(run, "abn")[-1], random.Random(0)
    good = (path / "state.pt").read_bytes()
    weight = state["model"].weight.clone()
    for _ in range(150):
        data, k = bytearray(good), dice.randrange(8 * len(good))
        data[k // 8] ^= 1 << k % 8
        (path / "state.pt").write_bytes(data)
        state["progress"].step = 0
        load_checkpoint(run, "abn", state)
        assert state["progress"].step in (1, 2)     # the one before, or a bit of no meaning
        assert torch.equal(state["model"].weight, weight)
        aside = path.with_name(f"{path.name}.damaged")
        if aside.exists(): os.replace(aside, path)
    assert "set aside as abn_0000002.damaged" in capsys.readouterr().out


def test_what_is_not_finite_is_not_saved(saved):
    run, state = saved
    torch.nn.init.constant_(state["model"].bias, torch.inf)
    state["progress"].step = 3
    sentence = "abn_0000003: not saved, since bias is not finite"
    with pytest.raises(UserError, match=sentence): save_checkpoint(run, "abn", state)
    assert_both_are_there(run)


@pytest.mark.parametrize("option", [
    "--log-every", "--checkpoint-every", "--checkpoints", "--sac.period", "--threads",
    "--sac.label-batch"])
def test_numbers_that_must_not_be_zero(tmp_path, option, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end: main(["toy", option, "0"])
    assert end.value.code == 2
    assert f"{option} 0: give a number of at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--data.eval-size", "--data.source-size", "--data.target-size"])
@pytest.mark.parametrize("size", ["0 8", "8 0", "-4 8"])
def test_sizes_of_nothing(tmp_path, option, size, monkeypatch, capsys):
    "Refused before the city is drawn and the run's name is taken."
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end: main(["toy", option, *size.split()])
    assert end.value.code == 2 and not [*tmp_path.iterdir()]
    assert f"{option} {size}: give numbers of at least 1" in capsys.readouterr().err
