"""Keep the results of finished runs in nbs/results, where the notebooks read them.

    python nbs/site/collect.py toy runs/toy_seed0 runs/toy_seed1 ...
    python nbs/site/collect.py folder_cpu runs/camvid_seed3 ... --out camvid
    python nbs/site/collect.py folder_cpu runs/labels_16 ... --out camvid_labels --changed

The first writes nbs/results/toy.json: the commands, and every run's IoU in per cent by stage. And
examples of the first run, as the label map, ABN and SAC have them: for the toy city
toy_example.png, an image with its three maps below it; for photographs camvid_photos.jpg, five in a
row, and camvid_maps.png, three rows of train ids. With --changed, runs may differ from the preset;
their commands say by what, and no examples are kept.
"""
import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as TF

from sac_lit.config import check_same, class_names, Config, load_config, PRESETS, settings, STAGES
from sac_lit.core import clean_exit, UserError, written_aside
from sac_lit.experiments import scores
from sac_lit.predict import load_network, predict
from sac_lit.report import load_verdict
from sac_lit.run_data import val_data

OUT = Path(__file__).parents[1] / "results"


def options(preset: str, cfg: Config) -> str:
    "By what a run differs from its preset."
    usual, words = settings(PRESETS[preset][1]), []
    for name, value in settings(cfg).items():
        if name in ("name", "seed", "mixed_precision") or value == usual[name]: continue
        values = value if isinstance(value, list) else [value]
        words += ["--" + name.replace("_", "-"), *map(str, values)]
    return " ".join(words)


def commands(preset: str, cfg: Config, stages) -> list[str]:
    "What trains a run: its preset, then the yardsticks, if it has some."
    usual = PRESETS[preset][1].stages
    first, others = [s for s in usual if s in stages], [s for s in stages if s not in usual]
    part = f"--stages {' '.join(first)}" if first != [*usual] else ""
    words = "python -m sac_lit.train", preset, options(preset, cfg), part
    train = " ".join([*filter(None, words), f"--seed {cfg.seed} --name {cfg.name}"])
    return [train, *[f"{train} --stages {' '.join(others)}"] * bool(others)]


def collect(preset: str, folders: list[Path], changed: bool = False) -> dict:
    "The results of runs of a preset, or of a changed one, and the commands that make them."
    if preset not in PRESETS:
        raise UserError(f"{preset}: no preset; give one of {', '.join(PRESETS)}, then folders")
    if not folders: raise UserError(f"{preset}: of which runs? Give their folders")
    runs, lines = [], []
    for folder in folders:
        cfg, found = load_config(folder), scores(folder)
        same = replace(PRESETS[preset][1], name=cfg.name, seed=cfg.seed,
                       mixed_precision=cfg.mixed_precision)
        if not same.data.source_root: same = replace(same, data=cfg.data)
        if not changed: check_same(folder, same)
        said = {k: load_verdict(folder).get(k) for k in ("verdict", "score")}
        runs.append({"name": cfg.name, "seed": cfg.seed, **said, **found})
        lines += commands(preset, cfg, found)
    return {"command": "\n".join(lines), "classes": class_names(cfg), "runs": runs}


def examples(folder: Path, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    "Validation images of a run, (3, H, W · count), and their three maps, (3 H, W · count)."
    val = val_data(load_config(folder).data)
    networks = [load_network(folder / STAGES[stage].folder) for stage in ("abn", "sac")]
    images, maps = [], []
    for i in [3] if count == 1 else np.linspace(0, len(val) - 1, count).astype(int):
        image, label = val[i]["image"], val[i]["label"]
        images.append(image)
        maps.append(torch.cat([label, *(predict(network, image) for network in networks)]))
    return torch.cat(images, -1), torch.cat(maps, -1)


def save_examples(name: str, folder: Path) -> None:
    "Write the pictures that this file's first lines name."
    photos, maps = examples(folder, 1 if name == "toy" else 5)
    if name == "toy":
        pictures = {"example.png": torch.cat([photos, maps.expand(3, -1, -1)], 1)}
    else:
        size = [n // 2 for n in photos.shape[-2:]]
        maps = maps[None, ::2, ::2]
        pictures = {"photos.jpg": TF.resize(photos, size, antialias=True), "maps.png": maps}
    for end, pixels in pictures.items():
        picture = Image.fromarray(pixels.permute(1, 2, 0).squeeze(-1).numpy())
        form = {"png": "PNG", "jpg": "JPEG"}[end[-3:]]
        with written_aside(OUT / f"{name}_{end}") as tmp:
            picture.save(tmp, form, optimize=True, quality=85)


def main(*argv: str) -> None:
    parser = argparse.ArgumentParser(prog="python nbs/site/collect.py")
    parser.add_argument("preset")
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--out", help="name of the results; by default the preset's")
    parser.add_argument("--changed", action="store_true", help="runs may differ from the preset")
    args = parser.parse_args(argv or None)
    name = args.out or args.preset
    with clean_exit():
        result = collect(args.preset, args.folders, args.changed)
        end = [f"--out {name}"] * (name != args.preset) + ["--changed"] * args.changed
        command = ["python nbs/site/collect.py", args.preset, *map(str, args.folders), *end]
        result["command"] += "\n" + " ".join(command)
        with written_aside(OUT / f"{name}.json") as tmp:
            tmp.write_text(json.dumps(result, indent=1) + "\n")
        if name != "toy_long" and not args.changed: save_examples(name, args.folders[0])


if __name__ == "__main__": main()
