"""The main job in a small size, through its command line.

A command that runs to its end is forked from a process that has imported the library already:
what it does is the same, and the five seconds of imports are spent once."""
import importlib
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from safetensors.torch import load_file

SMALL = (
    "--data.toy-train 8 --data.toy-val 3 --data.toy-size 32 64 "
    "--abn.steps 6 --abn.source-batch 2 --abn.target-batch 2 --abn.crop 32 64 "
    "--sac.steps 6 --sac.source-batch 2 --sac.groups 2 --sac.num-crops 1 --sac.crop 32 64 "
    "--log-every 2 --eval-every 3 --checkpoint-every 2 --threads 1 --mixed-precision no").split()
# Threads that wait for each other sleep: on cores that others use too, spinning takes ten times as
# long. Read when torch is imported, so it stands before the first process is made.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
MODULE = ("-m", "sac_lit.train")
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["sac_lit.train", "sac_lit.experiments", "nbdev.test"])


def tiny(base):
    "The same configuration at postage-stamp size."
    few = dict(steps=4, source_batch=2, crop=(32, 64))
    return replace(base, log_every=2, checkpoint_every=6, eval_every=0, mixed_precision="no",
                   data=replace(base.data, toy_train=6, toy_val=4, toy_size=(32, 64)),
                   abn=replace(base.abn, target_batch=2, **few), sac=replace(base.sac, **few))


def _forked(function, args, cwd, env, folder):
    "In a process of its own: a function in a folder, whose output goes to two files."
    multiprocessing.set_start_method(None, force=True)   # of its own processes: as anywhere else
    os.environ.update(env)
    os.chdir(cwd)
    for number in (1, 2): os.dup2(os.open(folder / str(number), os.O_WRONLY | os.O_CREAT), number)
    function(*args)


def forked(function, *args, cwd, timeout=300, envs=({},)):
    "What a function does in a process, or one for each environment, as `subprocess.run` says it."
    with tempfile.TemporaryDirectory() as place:
        folders = [Path(place, str(rank)) for rank in range(len(envs))]
        for folder in folders: folder.mkdir()
        processes = [FORKS.Process(target=_forked, args=(function, args, cwd, env, folder))
                     for env, folder in zip(envs, folders)]
        for process in processes: process.start()
        end = time.monotonic() + timeout
        for process in processes: process.join(max(0, end - time.monotonic()))
        late = [process for process in processes if process.is_alive()]
        for process in late: process.kill()
        if late: raise subprocess.TimeoutExpired(args, timeout)
        out, err = ("".join((folder / n).read_text() for folder in folders) for n in "12")
    return subprocess.CompletedProcess(args, max(p.exitcode for p in processes), out, err)


def _main(module, args):
    "The command line of a module."
    sys.argv[:] = [module, *args]
    sys.exit(importlib.import_module(module).main(list(args)))


def command(cwd, *args, module="sac_lit.train", **options):
    "A command of the library, run to its end."
    return forked(_main, module, args, cwd=cwd, **options)


def ranks(processes):
    "What a launcher tells each of several processes of this machine."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    everyone = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(processes),
                "LOCAL_WORLD_SIZE": str(processes)}
    return [{**everyone, "RANK": str(r), "LOCAL_RANK": str(r)} for r in range(processes)]


def launched(processes):
    "What starts a module on several processes of this machine."
    several = ("--standalone", "--nproc-per-node", str(processes))
    return ("-m", "torch.distributed.run", *several, *MODULE)


def train(cwd, *args, launch=None, timeout=300, processes=1):
    "The job, run to its end."
    envs = ranks(processes) if processes > 1 else ({},)
    if launch is None: return command(cwd, "toy", *SMALL, *args, timeout=timeout, envs=envs)
    line = [sys.executable, *launch, "toy", *SMALL, *args]
    options = {"capture_output": True, "text": True, "timeout": timeout}
    return subprocess.run(line, cwd=cwd, env=ENV, **options)


def start(cwd, *args, launch=MODULE, **kwargs):
    "The same in the background, as somebody would start it."
    line = [sys.executable, *launch, "toy", *SMALL, *args]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **kwargs}
    return subprocess.Popen(line, cwd=cwd, env=ENV, text=True, **pipes)


def weights(cwd, name="toy", folder="model"):
    return load_file(cwd / "runs" / name / folder / "model.safetensors")


def log(cwd, name="toy", **match):
    "Lines of a run's log with these values."
    rows = map(json.loads, (cwd / "runs" / name / "log.jsonl").read_text().splitlines())
    return [r for r in rows if all(r.get(k) == v for k, v in match.items())]


def wait_for(condition, process, seconds=120):
    end = time.time() + seconds
    while not condition() and process.poll() is None and time.time() < end: time.sleep(.01)


def wait_for_log(cwd, process, name, stage="abn"):
    path = cwd / "runs" / name / "log.jsonl"
    wait_for(lambda: path.exists() and log(cwd, name, stage=stage), process)
