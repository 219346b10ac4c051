"""
What a model costs: parameters, tokens and floating-point operations of every size, and measured times of one.

    python -m extras.benchmark                                   # the presets, counted: nothing is run
    python -m extras.benchmark --model far_tiny                  # ... and times of one, with random weights
    python -m extras.benchmark --model far_b --n 64 --batch 64   # on a GPU
    python -m extras.benchmark --ckpt runs/fashion_mnist_far_tiny

The presets are counted, and timed, as for ImageNet at 256 px: 16 x 16 latents of 16 channels, 1000 classes.
Operations are those of torch's FlopCounterMode, a multiplication and an addition being two.
"""
import argparse
import time
from copy import deepcopy
from types import SimpleNamespace

import torch
from torch.utils.flop_counter import FlopCounterMode

import bands as ladder
import train
from common import OneLineParser, autocast, command_line, faster_dtype, pick_device, positive
from far import FAR, LAYOUTS, PRESETS, Randomness, make_config, sampling_defaults
from sample import load_run

SAMPLERS = [("ddpm", (100, 100)), ("ddpm", (40, 100)), ("dpmpp", (24, 10)), ("dpmpp", (10, 10))]


# ---- counted

def imagenet(preset, layout):
    """A preset's configuration for 256 px latents."""
    text = {key: PRESETS[preset][key] for key in ("text_dim", "byte_depth") if key in PRESETS[preset]}
    return make_config(preset, layout, 16, 16, 1000, **text)


def flops(function):
    """Floating-point operations of function(), counted by torch."""
    counter = FlopCounterMode(display=False)
    with counter:
        function()
    return counter.get_total_flops()


def tokens(cfg, bands):
    """Tokens in training: of all bands that a step trains, and the condition tokens."""
    each = [(k if cfg.grid == "band" else cfg.latent_size) ** 2 for k in bands]
    return sum(each if cfg.context == "all" else each[-1:]) + cfg.n_cond


def sampling_flops(model, settings):
    """
    Operations of sampling one image, and the head's share: a model on the meta device, arguments of
    FAR.sample. One step of every band is counted; the others of that band are as expensive.
    """
    cfg, L = model.cfg, len(settings["bands"])
    labels, text = train.some_inputs(cfg, 1, "meta")[2:]
    once = flops(lambda: model.sample(labels, text, **dict(settings, steps=(1, 1))))
    head, more = 0, 0
    for l, k in enumerate(settings["bands"], 1):
        n = (k if cfg.grid == "band" else cfg.latent_size) ** 2
        branches = 1 + (ladder.guidance("linear", settings["cfg"], l, L) != 1)
        x, y, time = (torch.empty(*shape, device="meta") for shape in (
            (branches, n, cfg.latent_dim), (branches, n, cfg.head_width), (1, cfg.head_width)))
        call = flops(lambda: model.head(x, time, y))
        steps = ladder.diffusion_steps(*settings["steps"], l, L)
        head, more = head + steps * call, more + (steps - 1) * call
    return once + more, head / (once + more)


def counted(presets):
    """Markdown lines: what each preset costs in every layout. Masks hide what they hide in one drawn step."""
    lines = ["| preset | layout | million parameters: transformer | head | all | tokens, training "
             "| GFLOP / image, training | GFLOP / image, sampling (head) |", "|---" * 8 + "|"]
    for preset in presets:
        for layout in LAYOUTS:
            cfg = imagenet(preset, layout)
            with torch.device("meta"):
                model = FAR(cfg).eval()
            whole, head = (sum(p.numel() for p in part.parameters()) / 1e6 for part in (model, model.head))
            total, share = sampling_flops(model, sampling_defaults(cfg))
            training = train.count_flops(cfg, 2) / 2
            lines.append(
                f"| {preset} | {layout} | {whole - head:.1f} | {head:.1f} | {whole:.1f} "
                f"| {tokens(cfg, cfg.bands)} | {training / 1e9:,.1f} "
                f"| {total / 1e9:,.1f} ({share:.0%}) |")
    return lines


# ---- measured

def training_seconds(cfg, recipe, device, dtype, count=5, build=FAR, compiled=False, clock=time.perf_counter):
    """Seconds of one training step on random latents, the mean of `count` after three to warm up."""
    model = build(cfg).to(device)
    if compiled:
        for block in [*model.encoder, *model.decoder, *model.head.blocks]:
            block.compile()
    run = SimpleNamespace(model=model, ema=deepcopy(model), optimizer=train.make_optimizer(model, recipe),
                          recipe=recipe, device=device, dtype=dtype, world=1)
    for step in range(-3, count):
        if step == 0:                                        # what came before was to warm up
            began = clock()
        x, _, labels, text = train.some_inputs(cfg, recipe["batch"], device)
        train.train_step(run, [(x, Randomness(0, step + 3, device), labels, text)], 0).tolist()
    return (clock() - began) / count


def sampling_seconds(model, n, settings, device, dtype):
    """Seconds of drawing the latents of n images at once, after one step of every band to warm up."""
    labels, text = train.some_inputs(model.cfg, n, device)[2:]
    for steps in ((1, 1), settings["steps"]):
        began = time.perf_counter()
        with autocast(device, dtype):
            model.sample(labels, text, **dict(settings, steps=steps))[-1].sum().item()
    return time.perf_counter() - began


def memory(device):
    """Peak GiB on a GPU since the last call, as text."""
    if device.type != "cuda":
        return "-"
    peak = torch.cuda.max_memory_allocated(device) / 2 ** 30
    torch.cuda.reset_peak_memory_stats(device)
    return f"{peak:.1f}"


def training_row(name, cfg, recipe, device, dtype, **options):
    """One line of Markdown."""
    seconds = training_seconds(cfg, recipe, device, dtype, **options)
    return f"| {name} | {recipe['batch']} | {dtype} | {recipe['batch'] / seconds:.3g} | {memory(device)} |"


def sampling_row(name, model, n, settings, device, dtype):
    """One line of Markdown."""
    seconds = sampling_seconds(model, n, settings, device, dtype)
    steps = " to ".join(map(str, dict.fromkeys(settings["steps"])))
    bands = ",".join(map(str, settings["bands"]))
    return (f"| {name} | {settings['sampler']} | {steps} | {bands} | {n} | {dtype} "
            f"| {n / seconds:.3g} | {memory(device)} |")


TRAINING = "| training | batch | arithmetic | images/s | peak GiB |\n|---|---|---|---|---|"
SAMPLING = ("| sampling | sampler | steps | bands | batch | arithmetic | images/s | peak GiB |\n"
            "|---|---|---|---|---|---|---|---|")


def main(argv=None):
    parser = OneLineParser(prog="extras.benchmark", description=__doc__,
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", choices=list(PRESETS), help="time this size in all layouts, with random weights")
    add("--ckpt", help="time this run's model")
    add("--n", type=positive, default=4, help="images drawn at once (%(default)s)")
    add("--batch", type=positive, default=4, help="images of a training step (%(default)s)")
    add("--device", help="cuda, mps or cpu; by default the best there is")
    add("--dtype", choices=("bf16", "fp32"), help="arithmetic; by default the faster one here")
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    if not (args.model or args.ckpt):
        return print("\n".join(counted(PRESETS)))
    dtype = args.dtype or faster_dtype(device)
    configs = ({args.ckpt: load_run(args.ckpt).model.cfg} if args.ckpt else
               {f"{args.model}, {layout}": imagenet(args.model, layout) for layout in LAYOUTS})
    recipe = dict(train.RECIPES.get(args.model, train.RECIPES["far_tiny"]), batch=args.batch, steps=1000)
    print(f"{device}, {torch.get_num_threads()} threads, without decoding to pixels\n\n{TRAINING}")
    for name, cfg in configs.items():
        print(training_row(name, cfg, recipe, device, dtype), flush=True)
    print(f"\n{SAMPLING}")
    for name, cfg in configs.items():
        model, defaults = FAR(cfg).eval().to(device), sampling_defaults(cfg)
        for sampler, steps in dict.fromkeys([(defaults["sampler"], defaults["steps"]), *SAMPLERS]):
            settings = dict(defaults, sampler=sampler, steps=steps)
            print(sampling_row(name, model, args.n, settings, device, dtype), flush=True)


if __name__ == "__main__":
    command_line(main)
