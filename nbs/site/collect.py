"""Keep the results of finished runs in nbs/results, where the notebooks read them.

    python nbs/site/collect.py toy runs/toy_seed0 runs/toy_seed1 ...

writes nbs/results/toy.json (every run's IoU in per cent, by stage) and, for the first run of the preset toy,
nbs/results/toy_example.png: a validation image and, below it, its label map and the networks' predictions as train ids.
"""
import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from sac_lit.core import NAMES
from sac_lit.datasets import cityscapes, normalize
from sac_lit.deeplabv2 import SegmentationModel, upsample
from sac_lit.experiments import scores
from sac_lit.runs import DataConfig, load_config

OUT = Path(__file__).parents[1] / "results"
FOLDERS = {"abn": "model_abn", "sac": "model"}


@torch.no_grad()
def predictions(folder: Path, image: torch.Tensor) -> list[torch.Tensor]:
    "Label maps that the run's networks give an image (3, H, W)."
    models = [SegmentationModel.from_pretrained(folder / f).eval() for f in FOLDERS.values()]
    return [upsample(m(normalize(image[None] / 255)), image.shape[-2:]).argmax(1)[0] for m in models]


def main(name: str, *folders: str) -> None:
    configs = [load_config(Path(f)) for f in folders]
    result = {"classes": NAMES, "runs": [{"name": c.name, "seed": c.seed, **scores(f)} for c, f in zip(configs, folders)]}
    OUT.mkdir(exist_ok=True)
    (OUT / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    if name == "toy": save_example(Path(folders[0]), configs[0].data)


def save_example(folder: Path, data: DataConfig) -> None:
    sample = cityscapes(data.target_root, "val", size=data.eval_size)[3]
    maps = [sample["label"], *predictions(folder, sample["image"])]
    rows = [sample["image"].permute(1, 2, 0), *(m[..., None].expand(-1, -1, 3).byte() for m in maps)]
    Image.fromarray(np.concatenate([np.asarray(r) for r in rows])).save(OUT / "toy_example.png", optimize=True)


if __name__ == "__main__": main(*sys.argv[1:])
