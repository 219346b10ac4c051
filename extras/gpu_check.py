"""
Does everything run on this machine's GPU, and is it used well? About ten minutes, a table, some pictures.

    python -m extras.gpu_check

far_b is timed in all layouts; shapes at 64 px and Fashion-MNIST are trained for 200 steps, with and without
torch.compile, and sampled; the authors' reference numbers, where they lie (../shared/golden, or the folder
that FAR_GOLDEN names), are compared in float32 and bf16.
"""
import os

import numpy as np
import torch

import sample
import train
from common import OneLineParser, autocast, command_line, pick_device
from extras.benchmark import IMAGENET, TIMES, timed
from extras.published import load_published
from far import FAR, LAYOUTS, make_config

GOLDEN = os.environ.get("FAR_GOLDEN", os.path.join("..", "shared", "golden"))


def agreement(device):
    """Print the largest difference from the authors' transformer and head, relative to 1 + |value|."""
    numbers = np.load(os.path.join(GOLDEN, "far_tiny.npz"))
    d = {name: torch.from_numpy(numbers[name]).to(device) for name in numbers.files}
    cfg, ema, _ = load_published(os.path.join(GOLDEN, "far_tiny.pth"), n_head=4)
    model = FAR(cfg).eval()
    model.load_state_dict(ema)
    model, largest = model.to(device), lambda a, b: ((a.float() - b).abs() / (1 + b.abs())).max().item()
    print("\n| agreement with the authors' network | transformer | head |\n|---|---|---|")
    for dtype in ("fp32", "bf16"):
        with torch.inference_mode(), autocast(device, dtype):
            z = model.transformer([model.band(d["latent"], 9)], [10], model.condition(d["label"]))
            condition = model.head.cond(d["head_c"]) + model.head.level(d["head_level"])
            out = torch.cat(model.head(d["head_xt"], model.head.time(d["head_t"]), condition), dim=1)
        print(f"| {dtype} | {largest(z, d['z_9']):.1e} | {largest(out, d['head_out']):.1e} |", flush=True)


def main(argv=None):
    parser = OneLineParser(prog="-m extras.gpu_check", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", default="runs/gpu_check", help="folder of the trainings (%(default)s)")
    out, device = parser.parse_args(argv).out, pick_device()
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else device
    print(f"{card}, torch {torch.__version__}\n\n{TIMES}")
    recipe = dict(train.PAPER, batch=64, steps=1000)
    for layout in LAYOUTS:
        print(timed("far_b", make_config("far_b", layout, *IMAGENET), recipe, device, "bf16"), flush=True)
    for data, *flags in (("shapes", "--size", "64", "--compile"), ("fashion_mnist",)):
        folder = os.path.join(out, data)
        train.main(["--data", data, "--out", folder, "--steps", "200", *flags])
        sample.main(["--ckpt", folder, "--n", "8"])
    if os.path.exists(os.path.join(GOLDEN, "far_tiny.npz")):
        agreement(device)


if __name__ == "__main__":
    command_line(main)
