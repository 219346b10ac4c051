"""
What a model costs: parameters, tokens and floating-point operations of every size, and measured times of one.

    python -m extras.benchmark                                   # the presets, counted: nothing is run
    python -m extras.benchmark --model far_b --batch 64          # times of one size in every layout

The presets are counted, and timed, as for ImageNet at 256 px: 16 x 16 latents of 16 channels, 1000 classes.
Operations are those of torch's FlopCounterMode, a multiplication and an addition being two.
"""
import time
from copy import deepcopy
from itertools import product
from types import SimpleNamespace

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import train
from bands import diffusion_steps
from common import OneLineParser, autocast, command_line, faster_dtype, pick_device, positive
from far import FAR, LAYOUTS, PRESETS, Randomness, make_config, sampling_defaults

IMAGENET = 16, 16, 1000                           # side and channels of the latents, classes


def training_flops(cfg, batch):
    """Operations of a training step, counted by torch on the meta device without running it."""
    with torch.device("meta"):
        model, inputs = FAR(cfg), train.some_inputs(cfg, batch, "meta")
    with FlopCounterMode(display=False) as counter:
        model(*inputs)[0].backward()
    return counter.get_total_flops()


def sampling_flops(model, settings):
    """Operations of sampling one image, of a model on the meta device: all steps of a band cost the same."""
    labels, text = train.some_inputs(model.cfg, 1, "meta")[2:]

    def count(steps):
        counts = [0]
        with FlopCounterMode(display=False) as counter:
            model.sample(labels, text, progress=lambda: counts.append(counter.get_total_flops()),
                         **dict(settings, steps=(steps, steps)))
        return np.diff(counts)                                                       # (L,), of each band

    once, L = count(1), len(settings["bands"])
    steps = np.array([diffusion_steps(*settings["steps"], l, L) for l in range(1, L + 1)])
    return (once + (steps - 1) * (count(2) - once)).sum()


def counted():
    """Markdown lines: what each preset costs in every layout. Masks hide what they hide in one drawn step."""
    lines = ["| preset | layout | million parameters: transformer | head | all | tokens, training "
             "| GFLOP / image, training | GFLOP / image, sampling |", "|---" * 8 + "|"]
    for preset, layout in product(PRESETS, LAYOUTS):
        cfg = make_config(preset, layout, *IMAGENET)
        with torch.device("meta"):
            model = FAR(cfg).eval()
        whole, head = (sum(p.numel() for p in part.parameters()) / 1e6 for part in (model, model.head))
        tokens = len(model.mask) if cfg.context == "all" else model.encoder_pos.shape[1]
        training, sampling = training_flops(cfg, 2) / 2, sampling_flops(model, sampling_defaults(cfg))
        lines.append(f"| {preset} | {layout} | {whole - head:.1f} | {head:.1f} | {whole:.1f} | {tokens} "
                     f"| {training / 1e9:,.1f} | {sampling / 1e9:,.1f} |")
    return lines


def training_seconds(model, recipe, device, dtype, count=5, clock=time.perf_counter):
    """Seconds of a training step on random latents: the mean of `count`, after three to warm up."""
    run = SimpleNamespace(model=model, ema=deepcopy(model), optimizer=train.make_optimizer(model, recipe),
                          recipe=recipe, device=device, dtype=dtype, world=1)
    for step in range(-3, count):
        if step == 0:
            began = clock()
        x, _, labels, text = train.some_inputs(model.cfg, recipe["batch"], device)
        train.train_step(run, [(x, Randomness(0, step + 3, device), labels, text)], 0).tolist()
    return (clock() - began) / count


TIMES = ("| model | batch | arithmetic | images/s, training | images/s, sampling | sampler, steps "
         "| peak GiB of a GPU |\n|---|---|---|---|---|---|---|")


def timed(name, cfg, recipe, device, dtype):
    """A line of TIMES: a model with random weights, trained, and sampled its own way without decoding."""
    model, n, settings = FAR(cfg).to(device), recipe["batch"], sampling_defaults(cfg)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    training = n / training_seconds(model, recipe, device, dtype)
    labels, text = train.some_inputs(cfg, n, device)[2:]
    for steps in ((1, 1), settings["steps"]):                       # the first call is to warm up
        began = time.perf_counter()
        with autocast(device, dtype):
            model.eval().sample(labels, text, **dict(settings, steps=steps))[-1].sum().item()
    sampling = n / (time.perf_counter() - began)
    sampler = f"{settings['sampler']} {' to '.join(map(str, settings['steps']))}"
    peak = torch.cuda.max_memory_allocated() / 2 ** 30
    cells = f"{name}, {cfg.layout}", n, dtype, f"{training:.3g}", f"{sampling:.3g}", sampler, f"{peak:.1f}"
    return f"| {' | '.join(map(str, cells))} |"


def main(argv=None):
    parser = OneLineParser(prog="-m extras.benchmark", description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", choices=list(PRESETS), help="time this size in all layouts")
    parser.add_argument("--batch", type=positive, default=4, help="images at once (%(default)s)")
    args, device = parser.parse_args(argv), pick_device()
    if not args.model:
        return print("\n".join(counted()))
    recipe = dict(train.RECIPES.get(args.model, train.PAPER), batch=args.batch, steps=1000)
    print(f"{device}, {torch.get_num_threads()} threads\n\n{TIMES}")
    for layout in LAYOUTS:
        cfg = make_config(args.model, layout, *IMAGENET)
        print(timed(args.model, cfg, recipe, device, faster_dtype(device)), flush=True)


if __name__ == "__main__":
    command_line(main)
