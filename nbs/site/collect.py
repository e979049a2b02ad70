"""Keep the results of finished runs in nbs/results, where the notebooks read them.

    python nbs/site/collect.py toy runs/toy_seed0 runs/toy_seed1 ...

writes nbs/results/toy.json (the commands, and every run's IoU in per cent by stage) and, for the
first run of the preset toy, nbs/results/toy_example.png: a validation image and, below it, its
label map and the networks' predictions as train ids.
"""
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from sac_lit.config import check_same, Config, DataConfig, load_config, PRESETS, STAGES
from sac_lit.core import clean_exit, NAMES, UserError, written_aside
from sac_lit.datasets import open_dataset
from sac_lit.experiments import scores
from sac_lit.predict import load_network, predict

OUT = Path(__file__).parents[1] / "results"


def commands(preset: str, cfg: Config, stages) -> list[str]:
    "What trains a run: its preset, then the yardsticks, if it has some."
    train = f"python -m sac_lit.train {preset} --seed {cfg.seed} --name {cfg.name}"
    others = [stage for stage in stages if stage not in PRESETS[preset][1].stages]
    return [train, *[f"{train} --stages {' '.join(others)}"] * bool(others)]


def collect(preset: str, folders: list[Path]) -> dict:
    "The results of runs of a preset, and the commands that make them."
    if preset not in PRESETS:
        raise UserError(f"{preset}: no preset; give one of {', '.join(PRESETS)}, then folders")
    runs, lines = [], []
    for folder in folders:
        cfg, found = load_config(folder), scores(folder)
        same = replace(PRESETS[preset][1], name=cfg.name, seed=cfg.seed)
        check_same(folder, replace(same, mixed_precision=cfg.mixed_precision))
        runs.append({"name": cfg.name, "seed": cfg.seed, **found})
        lines += commands(preset, cfg, found)
    lines.append(" ".join(["python nbs/site/collect.py", preset, *map(str, folders)]))
    return {"command": "\n".join(lines), "classes": NAMES, "runs": runs}


def example(folder: Path, data: DataConfig) -> np.ndarray:
    "A validation image, its label map and two predictions, one below the other: (4 H, W, 3)."
    val = open_dataset("cityscapes", data.target_root, split="val", size=data.eval_size)
    image, label = val[3]["image"], val[3]["label"]
    networks = [load_network(folder / STAGES[stage].folder) for stage in ("abn", "sac")]
    maps = [label, *(predict(network, image) for network in networks)]        # (H, W) each
    rows = [image, *(m.expand(3, -1, -1).byte() for m in maps)]               # (3, H, W) each
    return torch.cat(rows, 1).permute(1, 2, 0).numpy()


def main(preset: str = "", *folders: str) -> None:
    folders = [Path(folder) for folder in folders]
    with clean_exit():
        result = collect(preset, folders)
        with written_aside(OUT / f"{preset}.json") as tmp:
            tmp.write_text(json.dumps(result, indent=1) + "\n")
        if preset != "toy": return
        picture = Image.fromarray(example(folders[0], load_config(folders[0]).data))
        with written_aside(OUT / "toy_example.png") as tmp:
            picture.save(tmp, "PNG", optimize=True)


if __name__ == "__main__": main(*sys.argv[1:])
