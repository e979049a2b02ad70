"""The main job in a small size, through its real command line."""
import json
import os
import subprocess
import sys

from safetensors.torch import load_file

SMALL = (
    "--data.toy-train 8 --data.toy-val 3 --data.toy-size 32 64 "
    "--abn.steps 6 --abn.source-batch 2 --abn.target-batch 2 --abn.crop 32 64 "
    "--sac.steps 6 --sac.source-batch 2 --sac.groups 2 --sac.num-crops 1 --sac.crop 32 64 "
    "--log-every 2 --eval-every 3 --checkpoint-every 2").split()
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
MODULE = ("-m", "sac_lit.train")


def launched(processes):
    "What starts a module on several processes of this machine."
    several = ("--standalone", "--nproc-per-node", str(processes))
    return ("-m", "torch.distributed.run", *several, *MODULE)


def train(cwd, *args, launch=MODULE, **kwargs):
    "The job, run to its end."
    command = [sys.executable, *launch, "toy", *SMALL, *args]
    options = {"timeout": 300, **kwargs}
    return subprocess.run(command, cwd=cwd, env=ENV, capture_output=True, text=True, **options)


def start(cwd, *args, launch=MODULE, **kwargs):
    "The same in the background."
    command = [sys.executable, *launch, "toy", *SMALL, *args]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **kwargs}
    return subprocess.Popen(command, cwd=cwd, env=ENV, text=True, **pipes)


def weights(cwd, name="toy", folder="model"):
    return load_file(cwd / "runs" / name / folder / "model.safetensors")


def log(cwd, name="toy", **match):
    "Lines of a run's log with these values."
    rows = map(json.loads, (cwd / "runs" / name / "log.jsonl").read_text().splitlines())
    return [r for r in rows if all(r.get(k) == v for k, v in match.items())]
