"""
Train FAR: data -> tokenizer (trained if there is none) -> latents (cached once) -> FAR -> pictures.

    python train.py                                          # built-in shapes, on 2 CPU cores in minutes
    python train.py --data fashion_mnist                     # 70,000 real images
    python train.py --text                                   # text to image: drawn scenes with captions
    python train.py --model far_b                 # the paper's FAR-B, on a GPU: a sanity run of about an hour
    python train.py --data cifar10 --model far_s             # one GPU
    python train.py --data ~/imagenet --size 256 --tokenizer kl16.ckpt --model far_b  # the paper's 400 epochs
    python train.py --text Qwen/Qwen2-1.5B --data ~/captioned --size 256 --tokenizer kl16.ckpt --model far_t2i
    torchrun --nproc_per_node 8 train.py ...                 # several GPUs

Everything lands in --out. The same command again continues where the last one stopped, bit for bit on a CPU.
"""
import json
import math
import os
import shlex
import signal
import time
from argparse import ArgumentTypeError, RawDescriptionHelpFormatter
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, fields
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from blocks import Muon
from common import (InputError, OneLineParser, autocast, command_line, epochs, faster_dtype, hold_lock,
                    join_processes, load_checkpoint, number, pick_device, positive, prefetch, previous,
                    reading, save_checkpoint, seed_number, step_generator, whole_numbers, write_atomically)
from data import load_data
from far import FAR, LAYOUTS, PRESETS, FARConfig, Randomness, default_layout, make_config
from sample import draw_pictures, draw_reconstructions
from text import load_encoder, text_source
from tokenizer import (cache_latents, default_config, fingerprint, fit_to_data, get_tokenizer, load_tokenizer,
                       save_tokenizer, time_step, tokenizer_path)


def get_args(argv=None):
    parser = OneLineParser(prog="train.py", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    # what to train on
    add("--data", help="shapes, fashion_mnist, cifar10, imagenet64, or a folder of images")
    add("--text", nargs="?", const="bytes", metavar="ENCODER",
        help="train on captions; with `bytes`, a part of the model, or a Qwen2 by name or folder")
    add("--size", type=positive, help="side of the images in pixels; by default the data's own")
    add("--data-dir", default="data", help="where data sets, tokenizers and cached latents are kept")
    add("--skip-bad", action="store_true", help="leave out images that cannot be read instead of stopping")
    add("--mirror", action="store_true", help="show every image of a folder mirrored, half of the time")
    add("--tokenizer", help="a tokenizer.pt, or the published kl16.ckpt; by default one is trained")
    # the model
    add("--model", choices=list(PRESETS), help="size; by default far_tiny, with --text far_tiny_t2i")
    add("--layout", choices=list(LAYOUTS), help="by default paper for the paper's sizes, band for others")
    add("--set", nargs="*", default=[], metavar="NAME=VALUE",
        help="change fields of FARConfig or of the recipe, e.g. bands=1,2,4,8 lowpass=fft lr=1e-3")
    # the run
    add("--out", help="folder of the run; by default runs/DATA_MODEL")
    add("--steps", type=positive, help="optimizer steps; warm-up and the tokenizer scale with them")
    add("--batch", type=positive, help="images per step on each device; by default the preset's")
    add("--accum", type=positive, default=1, help="batches per optimizer step: less memory")
    add("--seed", type=seed_number, default=0, help="of weights, order and noise")
    add("--device", help="cuda, mps or cpu; by default the best there is")
    add("--dtype", choices=("bf16", "fp32"), help="arithmetic; by default the faster one here")
    add("--compile", action="store_true", help="torch.compile the blocks: faster steps on a GPU")
    args = parser.parse_args(argv)
    args.data = args.data or ("shapes_text" if args.text else "shapes")
    args.model = args.model or ("far_tiny_t2i" if args.text else "far_tiny")
    args.layout = args.layout or default_layout(args.model)
    args.data_dir = os.path.abspath(args.data_dir)
    return args


# ---- the recipe

# The paper's sizes (FAR, implementation details): AdamW, lr 1e-4 per 256 images, warm-up for a quarter of the
# run, then constant, 400 epochs, EMA 0.9999, clip 3. The small ones: minutes on two CPU cores, Muon, lr to 0.
PAPER = dict(epochs=400, batch=128, lr=1e-4, lr_per=256, warmup=0.25, decay=False, muon=False, ema=0.9999,
             clip=3.0)
SMALL = dict(batch=128, lr=1.5e-2, warmup=0.05, decay=True, muon=True, ema=0.9999, clip=3.0)
RECIPES = {
    "far_nano": dict(SMALL, steps=3000, batch=32),
    "far_tiny": dict(SMALL, steps=2000),
    "far_tiny_t2i": dict(SMALL, steps=2000, lr=8e-3),
    "far_s": dict(SMALL, lr=5e-4, muon=False, warmup=0.01),
    "far_t2i": dict(PAPER, epochs=100, ema=0.99, clip=1.0),
}
HOUR = 3600 * 0.4 * 400e12       # floating-point operations of an hour on a current GPU: 40% of 400 TFLOP/s


def make_recipe(args, changes, cfg, n_images, world):
    """
    The training recipe as plain numbers: the preset's, with what the command line says instead. The paper's
    sizes train for its epochs on a million images or more, and elsewhere for an hour of a GPU. InputError.
    """
    recipe = {"tokenizer": 2500, "lr_per": None, **RECIPES.get(args.model, PAPER), **changes}
    recipe["batch"] = args.batch or recipe["batch"]
    recipe["effective"] = effective = recipe["batch"] * args.accum * world
    n_epochs = recipe.pop("epochs", None)
    if args.steps:
        recipe["steps"] = args.steps
    elif n_epochs and n_images >= 1_000_000:
        recipe["steps"] = n_epochs * n_images // effective
    elif "steps" not in recipe:
        counted = round(HOUR / (count_flops(cfg, 4) / 4 * recipe["batch"] * args.accum))
        recipe["steps"] = max(1, min(counted, 120_000))     # 30 ms a step: a small one waits for its launches
    recipe["warmup"] = math.ceil(recipe["warmup"] * recipe["steps"])
    recipe["tokenizer"] = tokenizer_steps(recipe["tokenizer"], recipe["steps"])
    if recipe["lr_per"]:
        recipe["lr"] *= effective / recipe["lr_per"]
    if not (recipe["lr"] > 0 and recipe["clip"] > 0 and 0 <= recipe["ema"] < 1 and recipe["tokenizer"] > 0):
        raise InputError("--set: lr, clip and tokenizer must be above 0, ema from 0 to below 1")
    return recipe


def tokenizer_steps(most, steps):
    """Optimizer steps of the tokenizer of a run of `steps`: fewer than usual for a short one."""
    return min(most, max(10, 5 * steps // 4))


def count_flops(cfg, batch, build=FAR):
    """Floating-point operations of a training step, counted by torch without running it."""
    with torch.device("meta"):
        model, inputs = build(cfg), some_inputs(cfg, batch, "meta")
    count = FlopCounterMode(display=False)
    with count:
        model(*inputs)[0].backward()
    return count.get_total_flops()


def some_inputs(cfg, batch, device):
    """Arguments of FAR.forward for a batch of random latents, of class 0 or with a text of twenty tokens."""
    x = torch.randn(batch, cfg.latent_dim, cfg.latent_size, cfg.latent_size, device=device)
    labels, text = torch.zeros(batch, dtype=torch.long, device=device), None
    if cfg.text_dim:
        width, kind = (12, torch.uint8) if cfg.byte_depth else (cfg.text_dim, torch.float32)
        text = (torch.ones(batch, 20, width, dtype=kind, device=device),
                torch.ones(batch, 20, dtype=torch.bool, device=device))
    return x, Randomness(0, 0, device), labels, text


def learning_rate(step, recipe):
    """Linear warm-up, then constant (FAR) or linear to zero."""
    warm = min(1, (step + 1) / max(recipe["warmup"], 1))
    return recipe["lr"] * warm * (1 - step / recipe["steps"] if recipe["decay"] else 1)


def make_optimizer(model, recipe, weight_decay=0.02):
    """
    AdamW as in FAR: weight decay on whatever has two or more dimensions, but not on the diffusion head. With
    `muon` (see blocks.py) the matrices of all blocks, the head's too, take its steps, and they alone decay.
    """
    hidden = ("encoder.", "decoder.", "head.blocks.", "text_encoder.blocks.")
    matrices, decayed, free = [], [], []
    for name, p in model.named_parameters():
        if recipe["muon"] and p.ndim == 2 and name.startswith(hidden):
            matrices.append(p)
        elif recipe["muon"] or p.ndim < 2 or name.startswith("head."):
            free.append(p)
        else:
            decayed.append(p)
    groups = [dict(params=matrices, matrices=True, weight_decay=weight_decay),
              dict(params=decayed, weight_decay=weight_decay), dict(params=free, weight_decay=0.0)]
    groups = [group for group in groups if group["params"]]
    fused = free[0].device.type in ("cpu", "cuda")
    return Muon(groups, lr=recipe["lr"], betas=(0.9, 0.95), fused=fused)


@torch.no_grad()
def update_ema(ema, model, step, decay):
    """Average of the weights; a flat 0.9999 would be initial noise for 7,000 steps: it warms up."""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


# ---- one step

def train_step(run, batches, step):
    """
    One optimizer step of run.model over micro-batches [(x, draw, labels, text)]. Nothing here waits for the
    device. -> a tensor on it, (2 + L,): the loss, the error of every band, the norm of the gradient.
    """
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(step, run.recipe)
    losses = []
    for i, batch in enumerate(batches):
        if run.world > 1:                               # gradients are shared once, with the last micro-batch
            run.model.require_backward_grad_sync = i == len(batches) - 1
        with autocast(run.device, run.dtype):
            loss, errors = run.model(*batch)
        (loss / len(batches)).backward()
        losses.append(torch.cat([loss.detach()[None], errors]))
    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), run.recipe["clip"])
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    update_ema(run.ema, run.model, step, run.recipe["ema"])
    return torch.cat([torch.stack(losses).nanmean(dim=0), norm.detach()[None]])


class Batches:
    """
    The batches of a run from cached latents: draws[number] is a function of (seed, number). A thread works
    ahead: it reads the view of each image that is needed, into memory that a GPU can copy without waiting.
    """

    def __init__(self, latents, labels, texts, scale, seed, batch, device, rank=0, world=1):
        self.latents, self.labels, self.texts, self.scale = latents, labels, texts, scale
        self.seed, self.batch, self.device, self.rank, self.world = seed, batch, device, rank, world
        self.waited = 0.0                                        # seconds that training has waited for data

    def __call__(self, start):
        """Micro-batches from number `start` on, without end: arguments of FAR.forward."""
        whole = self.batch * self.world
        numbered = enumerate(epochs(start * whole, whole, len(self.labels), self.seed), start)
        ready = prefetch(self.read, numbered, ahead=3)
        while True:
            clock = time.time()
            number, *parts = next(ready)
            self.waited += time.time() - clock
            mean, logvar, labels, *text = (part.to(self.device, non_blocking=True) for part in parts)
            draw = Randomness(self.seed + 1, number, self.device, self.rank, self.world)
            # a fresh sample of each image's posterior, scaled to unit variance
            x = self.scale * (mean.float() + (0.5 * logvar.float()).exp() * draw(torch.randn, *mean.shape))
            yield x, draw, labels, tuple(text) or None

    def read(self, numbered):
        """(number, indices of the global batch) -> number and this rank's part, in host memory."""
        number, everyone = numbered
        mine = slice(self.rank * self.batch, (self.rank + 1) * self.batch)
        chance = Randomness(self.seed + 2, number)
        u, indices = chance(torch.rand, 2 * len(everyone)).view(2, -1)[:, mine], everyone[mine]
        view = (u[0] * self.latents.shape[1]).long()                                      # mirrored or not
        moments = torch.from_numpy(self.latents[indices.tolist(), view.tolist()])    # (B, 2, C, H, H) float16
        parts = [moments[:, 0], moments[:, 1], self.labels[indices]]
        parts += self.texts(indices, u[1]) if self.texts else []
        if self.device.type == "cuda":
            parts = [part.pin_memory() for part in parts]
        return number, *parts


# ---- the loop

def fit(run):
    """
    Train run.model from run.start to the end of the recipe. Every 50 steps, and on Ctrl-C or SIGTERM, values
    are read from the device, logged and checked; now and then the run is saved and pictures are drawn. False
    if it was stopped.
    """
    rows, since, saved_at = [], time.time(), time.time()
    steps, stream = run.recipe["steps"], run.batches(run.start * run.accum)
    light = sum(p.numel() for p in run.ema.parameters()) < 50e6                    # a save costs nothing
    bar = tqdm(range(run.start, steps), "FAR", steps, initial=run.start, unit="step", disable=run.rank > 0)
    with signals_noted() as stop:
        for step in bar:
            micro = [next(stream) for _ in range(run.accum)]
            if run.ema.cfg.dropout:
                torch.manual_seed((run.seed * 1_000_003 + step) * run.world + run.rank)
            rows.append(train_step(run, micro, step))
            done = step + 1
            if not (done % 50 == 0 or done == steps or (stop and run.world == 1)):
                continue
            values, stopping = read_values(rows, stop, run)
            if not math.isfinite(values[-1]):
                raise InputError(f"the loss or its gradient is not finite between steps {done - len(rows)} "
                                 f"and {done}: try --dtype fp32, or --set lr={run.recipe['lr'] / 3:.1e}; "
                                 f"what {run.out} holds is from before")
            if run.rank == 0:
                log(run, bar, done, values, len(rows), time.time() - since)
                late = time.time() - saved_at > 1800
                if (light and (done == 100 or done % 500 == 0)) or late or stopping or done == steps:
                    run.save(done)
                    saved_at = time.time()
                    if not stopping:
                        draw_pictures(run.shown, run.out, run.seed)
            rows, run.batches.waited, since = [], 0.0, time.time()
            if stopping:
                return False
    return True


@contextmanager
def signals_noted():
    """A list that is no longer empty once Ctrl-C or SIGTERM has come, which do nothing else in this block."""
    noted, names = [], (signal.SIGINT, signal.SIGTERM)
    before = {name: signal.signal(name, lambda *_: noted.append(1)) for name in names}
    try:
        yield noted
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def read_values(rows, stop, run):
    """Loss, error of every band, gradient norm: means over steps and processes; whether any is to stop."""
    rows = torch.stack(rows)
    mean = rows.nanmean(dim=0)                                          # nan: a band that no step has trained
    mean[-1] = rows[:, -1].mean()                                    # but a gradient that is nan must be seen
    values = torch.cat([mean, mean.new_tensor([len(stop)])])
    if run.world > 1:
        dist.all_reduce(values)
    *values, stopping = (values / run.world).tolist()
    return values, stopping > 0


def log(run, bar, done, values, n, seconds):
    """One line of metrics.jsonl for n steps, and the text beside the bar."""
    loss, *errors, norm = values
    errors = [None if math.isnan(error) else round(error, 6) for error in errors]
    rate, waiting = run.recipe["effective"] * n / seconds, run.batches.waited / seconds
    lr = learning_rate(done - 1, run.recipe)
    line = dict(step=done, loss=loss, bands=errors, lr=lr, grad_norm=norm, images_per_s=rate, waiting=waiting)
    with open(os.path.join(run.out, "metrics.jsonl"), "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    shown = " ".join("-" if error is None else f"{error:.2f}" for error in errors)
    bar.set_postfix_str(f"loss {loss:.3f}, bands {shown}, {rate:.0f} img/s, waiting {waiting:.1%}")


def cut_log(path, start):
    """Drop the lines beyond step `start`, and half a line from a crash: they will be written again."""
    kept = []
    if os.path.exists(path):
        with open(path, encoding="utf-8", errors="replace") as file:
            whole = [line for line in file if line.endswith("}\n")]
            kept = [line for line in whole if json.loads(line)["step"] <= start]
    write_atomically(path, lambda file: file.write("".join(kept).encode()))


# ---- the stages of main

def open_inputs(args, device):
    """All that the user gave, opened before any long work: images, text encoder, tokenizer. InputError."""
    data, held_out = (
        load_data(args.data, args.size, args.data_dir, split, text=bool(args.text), skip_bad=args.skip_bad,
                  mirror=args.mirror or None)
        for split in ("train", "test"))
    if "text_dim" in PRESETS[args.model] and not args.text:
        raise InputError(f"--model {args.model} draws from text: add --text")
    if args.text and not data.captions:
        raise InputError(f"--text needs captions and {data.name} has none: put NAME.txt or metadata.jsonl "
                         "beside the images")
    encoder = load_encoder(args.text, device) if args.text else None
    layout = "" if args.layout == default_layout(args.model) else f"_{args.layout}"
    args.out = args.out or os.path.join("runs", f"{data.name}_{args.model}{layout}")
    given = args.tokenizer or os.path.join(args.out, "tokenizer.pt")     # a run goes on with its own
    tokenizer = load_tokenizer(given) if args.tokenizer or os.path.exists(given) else None
    if tokenizer:
        fit_to_data(tokenizer, data, given)
    return data, held_out, encoder, tokenizer


def configure(args, data, tokenizer_cfg, encoder, world):
    """FARConfig and recipe from preset, layout, data, tokenizer, encoder and --set. InputError."""
    kinds = {field.name: field.type for field in fields(FARConfig)}
    for name in ("layout", "latent_size", "latent_dim", "n_class", "text_dim", "byte_depth"):
        del kinds[name]                                           # these follow from the data and other flags
    of_recipe = dict(lr=float, ema=float, clip=float, warmup=float, tokenizer=int)
    kinds.update(of_recipe)
    changes = {}
    for item in args.set:
        name, _, text = item.partition("=")
        if name not in kinds:
            raise InputError(f"--set {item}: NAME=VALUE with NAME one of {', '.join(kinds)}")
        try:
            changes[name] = {float: number, tuple: whole_numbers}.get(kinds[name], kinds[name])(text)
        except (ValueError, ArgumentTypeError):
            raise InputError(f"--set {item}: {text!r} is not a valid {kinds[name].__name__}")
    recipe_changes = {"tokenizer": tokenizer_cfg.steps}
    recipe_changes.update({name: changes.pop(name) for name in of_recipe if name in changes})
    if args.text:
        preset = PRESETS[args.model]
        changes["text_dim"] = encoder.width if encoder else preset["width"]
        changes["byte_depth"] = 0 if encoder else preset.get("byte_depth", 2)
    try:
        cfg = make_config(args.model, args.layout, tokenizer_cfg.latent_size, tokenizer_cfg.latent_dim,
                          data.n_class, **changes)
    except ValueError as error:
        raise InputError(str(error))
    return cfg, make_recipe(args, recipe_changes, cfg, len(data), world)


def announce(args, data, cfg, recipe, device):
    """What will be trained."""
    others = " or ".join(f"--layout {name}" for name in LAYOUTS if name != args.layout)
    bands = ",".join(map(str, cfg.bands))
    print(f"{args.model} in the {args.layout} layout (else: {others}), bands {bands}, on {device}, "
          f"{args.dtype}\n"
          f"{data.name}: {len(data):,} images of {data.size} px, {data.n_class} classes, "
          f"{'mirrored half of the time' if data.flip else 'never mirrored'}\n"
          f"{recipe['steps']:,} steps of {recipe['effective']} images")


def estimate(args, data, cfg, recipe, start, tokenizer_cfg, device, build):
    """How long it will all take, from timed steps. tokenizer_cfg: of one that has to be trained, or None."""
    model, some = build(cfg).to(device), recipe["batch"]
    if device.type == "cpu":                             # a large model is timed on fewer images
        some = max(1, min(some, round(2e11 * some / count_flops(cfg, some))))
    run = SimpleNamespace(model=model, ema=deepcopy(model), optimizer=make_optimizer(model, recipe),
                          recipe=recipe, device=device, dtype=args.dtype, world=1)
    inputs = some_inputs(cfg, some, device)
    for _ in range(2):                                            # the first prepares memory and kernels
        began = time.time()
        train_step(run, [inputs], 0).tolist()
    stages = {"FAR": (time.time() - began) * recipe["batch"] / some * args.accum * (recipe["steps"] - start)}
    if tokenizer_cfg:
        seconds = time_step(tokenizer_cfg, device, args.dtype)
        stages["tokenizer"] = seconds * recipe["tokenizer"]
        views = len(data) * (2 if data.flip else 1)               # to encode is a sixth of a training step
        stages["latents"] = seconds / tokenizer_cfg.batch / 6 * views
    shown = ", ".join(f"{name} {seconds / 60:,.1f}" for name, seconds in stages.items())
    print(f"timed steps say about {sum(stages.values()) / 60:,.1f} minutes: {shown}", flush=True)
    if device.type == "cpu" and sum(stages.values()) > 7200:
        print("this is a CPU, for which far_nano and far_tiny are meant; the paper's method at their size: "
              "python train.py --data fashion_mnist --layout paper")


def resume_point(path, identity, rank=0):
    """
    The last whole checkpoint of this run, or None; in place of a damaged one the one before. InputError if it
    is another run's.
    """
    for candidate in filter(os.path.exists, (path, previous(path))):
        try:
            found = load_checkpoint(candidate, "far")
        except InputError as error:
            print(f"WARNING: {error}; trying the one before")
            if rank == 0:                        # out of the way, or the next save would keep it in its place
                os.replace(candidate, f"{candidate}.damaged")
            continue
        changed = [f"{key} ({found['run'].get(key)} there, {identity[key]} now)"
                   for key in identity if found["run"].get(key) != identity[key]]
        if changed:
            raise InputError(f"{os.path.dirname(path)} belongs to a run with other settings: "
                             f"{'; '.join(text[:300] for text in changed)}. Choose another --out")
        return found
    return None


def prepare(args, cfg, recipe, build, scale, latents, before, device):
    """Model, its average and its optimizer, new or as the checkpoint `before` left them."""
    torch.manual_seed(args.seed)
    model = build(cfg).to(device)
    moments = torch.from_numpy(latents[range(min(len(latents), 4096))][:, 0]).float()     # (n, 2, C, H, H)
    noise = torch.randn(moments[:, 0].shape, generator=step_generator(args.seed, 0))
    model.measure_band_std((scale * (moments[:, 0] + (0.5 * moments[:, 1]).exp() * noise)).to(device))
    ema = deepcopy(model).requires_grad_(False)
    optimizer = make_optimizer(model, recipe)
    if before:
        with reading(os.path.join(args.out, "far.pt")):
            for part, name in ((model, "model"), (ema, "ema"), (optimizer, "optimizer")):
                part.load_state_dict(before[name])
        print(f"continuing from step {before['step']}", flush=True)
    if args.compile:                                            # alike blocks share one; the rest draws noise
        for block in [*model.encoder, *model.decoder, *model.head.blocks]:
            block.compile()
    return model, ema, optimizer


def about_data(args, data, encoder, tokenizer):
    """What sampling must know of the data: plain types for the checkpoint."""
    about = dict(name=data.name, source=data.source, size=data.size, channels=data.channels,
                 data_dir=args.data_dir, class_names=data.class_names, tokenizer=fingerprint(tokenizer))
    if args.text:
        about.update(text=os.path.abspath(args.text) if os.path.isdir(args.text) else args.text,
                     text_fingerprint=encoder.fingerprint if encoder else "",
                     text_dtype=encoder.dtype if encoder else "",
                     prompts=[data.caption(i, 0.0) for i in range(min(len(data), 8))])
    return about


def main(argv=None, build=FAR):
    args = get_args(argv)
    rank, world, device = join_processes(pick_device(args.device))
    data, held_out, encoder, tokenizer = open_inputs(args, device)
    tokenizer_cfg = tokenizer.cfg if tokenizer else default_config(data.size, data.channels)
    cfg, recipe = configure(args, data, tokenizer_cfg, encoder, world)
    os.makedirs(args.out, exist_ok=True)
    lock = rank > 0 or hold_lock(os.path.join(args.out, "lock"), wait=False)          # until the process ends
    if not lock:
        raise InputError(f"another training is writing to {args.out}; choose another --out")
    path = os.path.join(args.out, "far.pt")
    same = {key: value for key, value in recipe.items() if key not in ("batch", "tokenizer")}
    identity = dict(config=asdict(cfg), recipe=same, seed=args.seed, data=data.fingerprint,
                    text=encoder.fingerprint if encoder else "")
    before = resume_point(path, identity, rank)
    start = before["step"] if before else 0
    shared_cpu = world > 1 and device.type == "cpu"                 # where each might find another one faster
    args.dtype = args.dtype or (before["dtype"] if before else "fp32" if shared_cpu else faster_dtype(device))
    if rank == 0:
        announce(args, data, cfg, recipe, device)
        there = tokenizer or os.path.exists(tokenizer_path(args.data_dir, data, tokenizer_cfg,
                                                           recipe["tokenizer"]))
        if not there and tokenizer_cfg.published:
            print("above 64 px the published tokenizer is better: --tokenizer kl16.ckpt; the one that is "
                  "trained now blurs detail")
        if start < recipe["steps"]:
            estimate(args, data, cfg, recipe, start, None if there else tokenizer_cfg, device, build)

    tokenizer = (tokenizer or get_tokenizer(data, held_out, tokenizer_cfg, args.data_dir, recipe["tokenizer"],
                                            args.seed, device, args.dtype)).to(device)
    about = about_data(args, data, encoder, tokenizer)
    if before and before["data"]["tokenizer"] != about["tokenizer"]:
        raise InputError(f"{args.out} was trained with another tokenizer: choose another --out")
    if rank == 0:
        save_tokenizer(os.path.join(args.out, "tokenizer.pt"), tokenizer)
        cut_log(os.path.join(args.out, "metrics.jsonl"), start)
    latents, scale = cache_latents(tokenizer, data, args.data_dir, device), tokenizer.latent_scale.item()
    texts = text_source(encoder, data, args.data_dir) if args.text else None
    model, ema, optimizer = prepare(args, cfg, recipe, build, scale, latents, before, device)
    before = None                                                    # as large as the model and its optimizer
    save = lambda step: save_checkpoint(path, dict(
        kind="far", step=step, run=identity, dtype=args.dtype, config=asdict(cfg), data=about,
        model=model.state_dict(), ema=ema.state_dict(), optimizer=optimizer.state_dict()))
    shown = SimpleNamespace(model=ema, tokenizer=tokenizer, encoder=encoder, device=device, dtype=args.dtype,
                            data=about)
    finished = fit(SimpleNamespace(
        model=DistributedDataParallel(model, broadcast_buffers=False) if world > 1 else model, ema=ema,
        optimizer=optimizer, recipe=recipe, start=start, accum=args.accum, out=args.out, seed=args.seed,
        batches=Batches(latents, data.labels, texts, scale, args.seed, recipe["batch"], device, rank, world),
        save=save, shown=shown, device=device, dtype=args.dtype, rank=rank, world=world))
    if rank == 0 and not finished:
        print(f"\nstopped; all is saved in {args.out}, and the same command continues")
    elif rank == 0:
        draw_reconstructions(shown, held_out, os.path.join(args.out, "reconstructions.png"))
        more = '--prompt "a yellow star above a green square"' if args.text else "--n 64"
        print(f"pictures: samples.png, bands.png and reconstructions.png in {args.out}\n"
              f"next:     python sample.py --ckpt {shlex.quote(args.out)} {more}")


if __name__ == "__main__":
    command_line(main)
