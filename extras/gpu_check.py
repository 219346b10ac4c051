"""
Is this machine's GPU used well, and does everything run on it? About ten minutes, one table.

    python -m extras.gpu_check

far_b in the paper's layout trains, with and without torch.compile, and is sampled in all layouts; the
authors' reference numbers, where they lie (../shared/golden, or the folder that FAR_GOLDEN names), are
compared in float32 and bf16; shapes at 64 px and Fashion-MNIST are trained, 200 steps, and sampled.
"""
import argparse
import os
import time

import numpy as np
import torch

import sample
import train
from common import InputError, OneLineParser, autocast, command_line, pick_device
from extras.benchmark import SAMPLING, TRAINING, imagenet, sampling_row, training_row
from extras.published import load_published
from far import FAR, LAYOUTS, sampling_defaults

GOLDEN = os.environ.get("FAR_GOLDEN", os.path.join("..", "shared", "golden"))


def speed(device, tiny):
    """Print training and sampling of far_b in bf16; in a dry run of far_nano, uncompiled."""
    preset, batch, n = ("far_nano", 2, 1) if tiny else ("far_b", 64, 64)
    print(TRAINING)
    recipe = dict(train.RECIPES.get(preset, train.PAPER), batch=batch, steps=1000)
    for compiled in (False,) if tiny else (False, True):
        name = f"{preset}, paper{', compiled' if compiled else ''}"
        cfg = imagenet(preset, "paper")
        print(training_row(name, cfg, recipe, device, "bf16", compiled=compiled), flush=True)
    print(f"\n{SAMPLING}")
    for layout in LAYOUTS:
        cfg = imagenet(preset, layout)
        model, settings = FAR(cfg).eval().to(device), sampling_defaults(cfg)
        settings["steps"] = (2, 2) if tiny else settings["steps"]
        print(sampling_row(f"{preset}, {layout}", model, n, settings, device, "bf16"), flush=True)


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
    parser = OneLineParser(prog="extras.gpu_check", description=__doc__,
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="cuda, mps or cpu; by default the best there is")
    parser.add_argument("--out", default="runs/gpu_check", help="folder of the trainings (%(default)s)")
    parser.add_argument("--data-dir", default="data", help="where data sets and tokenizers are kept")
    parser.add_argument("--tiny", action="store_true", help="a dry run: far_nano, two steps of everything")
    args = parser.parse_args(argv)
    device, ends = pick_device(args.device), []
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else device
    print(f"{card}, torch {torch.__version__}\n")
    speed(device, args.tiny)
    if os.path.exists(os.path.join(GOLDEN, "far_tiny.npz")):
        agreement(device)
    for data, size in (("shapes", 32 if args.tiny else 64), ("fashion_mnist", 32)):
        out, began = os.path.join(args.out, data), time.perf_counter()
        small = ["--model", "far_nano", "--batch", "2"] if args.tiny else []
        try:
            train.main(["--data", data, "--size", str(size), "--out", out, "--data-dir", args.data_dir,
                        "--device", str(device), "--steps", "2" if args.tiny else "200", *small])
            sample.main(["--ckpt", out, "--n", "8", "--device", str(device)])
            ends.append(f"| {data} | {size} px | {time.perf_counter() - began:.0f} s | {out}/sample.png |")
        except InputError as error:
            ends.append(f"| {data} | {size} px | failed | {error} |")
    print("\n| trained and sampled | size | all in all | pictures |\n|---|---|---|---|\n" + "\n".join(ends))


if __name__ == "__main__":
    command_line(main)
