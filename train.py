"""
Train FAR: data -> tokenizer (trained if there is none) -> latents (cached once) -> FAR -> pictures.

    python train.py                                          # built-in shapes, on 2 CPU cores in minutes
    python train.py --data fashion_mnist                     # 70,000 real images
    python train.py --text                                   # text to image: drawn scenes with captions
    python train.py --model far_b                 # the paper's FAR-B, on a GPU: a sanity run of about an hour
    python train.py --data ~/imagenet --size 256 --tokenizer kl16.ckpt --model far_b  # the paper's 400 epochs
    python train.py --text Qwen/Qwen2-1.5B --data ~/captioned --size 256 --tokenizer kl16.ckpt --model far_t2i

Everything lands in --out. The same command again continues where the last one stopped, bit for bit on a CPU.
"""
import json
import math
import os
import shlex
import signal
import time
import timeit
from argparse import ArgumentTypeError, RawDescriptionHelpFormatter
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import asdict, fields
from types import SimpleNamespace

import torch
from tqdm import tqdm

from blocks import Muon
from common import (InputError, OneLineParser, autocast, command_line, epochs, faster_dtype, hold_lock,
                    join_processes, load_checkpoint, number, pick_device, positive, prefetch, previous,
                    reading, save_checkpoint, seed_number, step_generator, whole_numbers)
from data import load_data, save_grid
from far import FAR, LAYOUTS, PRESETS, FARConfig, Randomness, default_layout, make_config, sampling_defaults
from sample import draw_pictures, what_to_draw
from text import load_encoder, text_source
from tokenizer import (cache_latents, default_config, fingerprint, fit_to_data, get_tokenizer,
                       load_tokenizer, reconstruct, save_tokenizer, time_step, tokenizer_path)

# what --set may change, and how it is read: fields of FARConfig that no other flag decides, and the recipe
DECIDED = ("layout", "latent_size", "latent_dim", "n_class", "text_dim", "byte_depth")
OF_RECIPE = dict(lr=number, ema=number, clip=number, warmup=number, tokenizer=int)
READERS = {int: int, str: str, float: number, tuple: whole_numbers}
SETTINGS = OF_RECIPE | {f.name: READERS[f.type] for f in fields(FARConfig) if f.name not in DECIDED}


def setting(text):
    """ "width=64" of --set -> ("width", 64). Errors as argparse expects them."""
    name, _, value = text.partition("=")
    if name not in SETTINGS:
        raise ArgumentTypeError(f"{text}: NAME=VALUE with NAME one of {', '.join(SETTINGS)}")
    return name, SETTINGS[name](value)


def get_args(argv=None):
    parser = OneLineParser(prog="train.py", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", help="shapes, fashion_mnist, cifar10, imagenet64, or a folder of images")
    add("--text", nargs="?", const="bytes", help="train on captions; TEXT: bytes, or a Qwen2, name or folder")
    add("--size", type=positive, help="side of the images in pixels; by default the data's own")
    add("--data-dir", type=os.path.abspath, default="data", help="of data sets, tokenizers, latents")
    add("--skip-bad", action="store_true", help="leave out images that cannot be read instead of stopping")
    add("--mirror", action="store_true", help="show every image of a folder mirrored, half of the time")
    add("--tokenizer", help="a tokenizer.pt, or the published kl16.ckpt; by default one is trained")
    add("--model", choices=list(PRESETS), help="size; by default far_nano for shapes, far_tiny for others")
    add("--layout", choices=list(LAYOUTS), help="by default paper for the paper's sizes, band for others")
    add("--set", nargs="*", type=setting, default=[], metavar="NAME=VALUE",
        help="change fields of FARConfig or of the recipe, e.g. bands=1,2,4,8 lowpass=fft lr=1e-3")
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
    small = "far_nano" if args.data == "shapes" else "far_tiny"
    args.model = args.model or ("far_tiny_t2i" if args.text else small)
    return args


# ---- the recipe. PAPER is that of its sizes (FAR, implementation details): AdamW, constant lr, given per 256
# images; for less than a million images as many steps as take a current GPU an hour: `hour` tokens, the
# condition's included (40% of 400 TFLOP/s). SMALL: minutes on two CPU cores, Muon, lr to 0.
PAPER = dict(batch=128, lr=1e-4, lr_per=256, warmup=0.25, decay=False, muon=False, ema=0.9999, clip=3.0,
             tokenizer=400)
SMALL = dict(PAPER, lr=1.5e-2, lr_per=None, warmup=0.05, decay=True, muon=True)
RECIPES = {
    "far_nano": dict(SMALL, steps=2000, lr=2.5e-2),
    "far_tiny": dict(SMALL, steps=2000),
    "far_tiny_t2i": dict(SMALL, steps=2000, lr=8e-3),
    "far_s": dict(SMALL, steps=120_000, lr=5e-4, muon=False, warmup=0.01),            # an hour, 30 ms each
    "far_b": dict(PAPER, epochs=400, hour=4.1e8),
    "far_l": dict(PAPER, epochs=400, hour=2.2e8),
    "far_h": dict(PAPER, epochs=400, hour=1.2e8),
    "far_t2i": dict(PAPER, epochs=100, hour=1.9e8, ema=0.99, clip=1.0),
}


def configure(args, data, grid, encoder, world):
    """FARConfig, and the recipe as plain numbers, of flags, data, tokenizer's config, encoder. InputError."""
    changes = dict(args.set)
    recipe = RECIPES[args.model] | {name: changes.pop(name) for name in OF_RECIPE if name in changes}
    if args.text:
        width, depth = (encoder.width, 0) if encoder else (PRESETS[args.model]["width"], 2)
        changes.update(text_dim=width, byte_depth=depth)
    try:
        cfg = make_config(args.model, args.layout, grid.latent_size, grid.latent_dim, data.n_class, **changes)
    except ValueError as error:
        raise InputError(str(error))
    recipe["batch"] = args.batch or recipe["batch"]
    recipe["effective"] = recipe["batch"] * args.accum * world
    n_epochs, hour = recipe.pop("epochs", None), recipe.pop("hour", None)
    if n_epochs and len(data) >= 1_000_000:
        recipe["steps"] = n_epochs * len(data) // recipe["effective"]
    elif hour:
        recipe["steps"] = math.ceil(hour / recipe["batch"] / args.accum / (cfg.n_cond + cfg.latent_size ** 2))
    recipe["steps"] = args.steps or recipe["steps"]
    recipe["warmup"] = math.ceil(recipe["warmup"] * recipe["steps"])
    recipe["tokenizer"] = tokenizer_steps(recipe["steps"], recipe["tokenizer"])
    recipe["lr"] *= recipe["effective"] / (recipe["lr_per"] or recipe["effective"])
    if not (recipe["lr"] > 0 and recipe["clip"] > 0 and 0 <= recipe["ema"] < 1 and recipe["tokenizer"] > 0):
        raise InputError("--set: lr, clip and tokenizer must be above 0, ema from 0 to below 1")
    return cfg, recipe


def tokenizer_steps(steps, most=PAPER["tokenizer"]):
    """Optimizer steps of the tokenizer of a run of `steps`: fewer than usual for a short one."""
    return min(most, max(10, 5 * steps // 4))


def learning_rate(step, recipe):
    """Linear warm-up, then constant (FAR) or linear to zero."""
    warm = min(1, (step + 1) / max(recipe["warmup"], 1))
    return recipe["lr"] * warm * (1 - step / recipe["steps"] if recipe["decay"] else 1)


def make_optimizer(model, recipe):
    """FAR's AdamW, no decay of vectors and head; with `muon` (blocks.py) only the blocks' matrices decay."""
    hidden = ("encoder.", "decoder.", "head.blocks.", "text_encoder.blocks.")
    groups = {}
    for name, p in model.named_parameters():
        matrix = recipe["muon"] and p.ndim == 2 and name.startswith(hidden)
        decays = matrix or not (recipe["muon"] or p.ndim < 2 or name.startswith("head."))
        groups.setdefault((matrix, decays), []).append(p)
    groups = [dict(params=params, matrices=matrix, weight_decay=0.02 if decays else 0.0)
              for (matrix, decays), params in sorted(groups.items(), reverse=True)]
    return Muon(groups, lr=recipe["lr"], betas=(0.9, 0.95), fused=p.device.type in ("cpu", "cuda"))


@torch.no_grad()
def update_ema(ema, model, step, decay):
    """Average of the weights; a flat 0.9999 would be initial noise for 7,000 steps: it warms up."""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


# ---- one step

def train_step(run, batches, step):
    """One step on micro-batches (x, draw, labels, text) -> (2 + L,): loss, bands' errors, gradient's norm."""
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(step, run.recipe)
    losses = []                                                        # nothing here waits for the device
    for i, batch in enumerate(batches):
        run.model.require_backward_grad_sync = i == len(batches) - 1       # several GPUs: with the last batch
        with autocast(run.device, run.dtype):
            loss, errors = run.model(*batch)
        (loss / len(batches)).backward()
        losses.append(torch.cat([loss.detach()[None], errors]))
    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), run.recipe["clip"])
    run.optimizer.step()
    run.optimizer.zero_grad()
    update_ema(run.ema, run.model, step, run.recipe["ema"])
    return torch.cat([torch.stack(losses).nanmean(dim=0), norm.detach()[None]])


def some_inputs(cfg, batch, device):
    """Arguments of FAR.forward for a batch of random latents, of class 0 or with a text of twenty tokens."""
    x = torch.randn(batch, cfg.latent_dim, cfg.latent_size, cfg.latent_size, device=device)
    words = torch.ones(batch, 20, 12 if cfg.byte_depth else cfg.text_dim, dtype=torch.uint8, device=device)
    labels = torch.zeros(batch, dtype=torch.long, device=device)
    return x, Randomness(0, 0, device), labels, (words, words[..., 0].bool()) if cfg.text_dim else None


def cached_batches(run, latents, labels, texts, scale):
    """Arguments of FAR.forward from step run.start on; micro-batch i is a function of (seed, i). Endless."""
    whole, start = run.recipe["batch"] * run.world, run.start * run.accum

    def read(numbered):                                                     # in a thread, three batches ahead
        i, everyone = numbered                                                # indices of the global batch
        u = Randomness(run.seed + 2, i)(torch.rand, 2 * whole).view(2, run.world, -1)[:, run.rank]
        indices, view = everyone.view(run.world, -1)[run.rank], (u[0] * latents.shape[1]).long()   # mirrored?
        moments = torch.from_numpy(latents[indices.tolist(), view.tolist()])         # (B, 2, C, H, H) float16
        parts = [moments, labels[indices], *(texts(indices, u[1]) if texts else [])]
        return i, [part.pin_memory() if run.device.type == "cuda" else part for part in parts]

    for i, parts in prefetch(read, enumerate(epochs(start * whole, whole, len(labels), run.seed), start), 3):
        moments, classes, *text = (part.to(run.device, non_blocking=True) for part in parts)
        mean, logvar = moments.float().unbind(1)                                          # (B, C, H, H) each
        draw = Randomness(run.seed + 1, i, run.device, run.rank, run.world)
        x = scale * (mean + (0.5 * logvar).exp() * draw(torch.randn, *mean.shape))        # a fresh sample
        yield x, draw, classes, tuple(text) or None


# ---- the loop

def fit(run, stream):
    """Train run.model on micro-batches to the end of the recipe, or until Ctrl-C or SIGTERM, and save it."""
    steps, stop, rows = run.recipe["steps"], [], []
    since = saved_at = time.time()
    bar = tqdm(range(run.start, steps), "FAR", steps, initial=run.start, unit="step", disable=run.rank > 0)
    with ExitStack() as at_the_end:
        for name in (signal.SIGINT, signal.SIGTERM):                 # noted only, until the loop has ended
            at_the_end.callback(signal.signal, name, signal.signal(name, lambda *_: stop.append(1)))
        for step in bar:
            batches = [next(stream) for _ in range(run.accum)]
            torch.manual_seed((run.seed * 1_000_003 + step) * run.world + run.rank)             # of dropout
            rows.append(train_step(run, batches, step))
            done = step + 1
            if not (done % 50 == 0 or done == steps or (stop and run.world == 1)):
                continue
            stopping = log(run, bar, done, rows, stop, time.time() - since)
            often = run.n_weights < 50e6 and (done == 100 or done % 500 == 0)          # a save costs nothing
            if run.rank == 0 and (often or stopping or done == steps or time.time() - saved_at > 1800):
                save(run, done, pictures=not stopping)
                saved_at = time.time()
            if stopping:
                return
            rows, since = [], time.time()


def log(run, bar, done, rows, stop, seconds):
    """Means over steps and processes into metrics.jsonl -> whether any is to stop. InputError on nan, inf."""
    rows = torch.stack(rows)             # nan: a band that no step has trained, but of the gradient an error
    values = torch.cat([rows.nanmean(0)[:-1], rows[:, -1:].mean(0), rows.new_tensor([len(stop)])])
    if run.world > 1:
        torch.distributed.all_reduce(values)
    loss, *errors, norm, stopping = (values / run.world).tolist()
    if not math.isfinite(norm):
        raise InputError(f"loss or gradient are not finite between steps {done - len(rows)} and {done}: try "
                         f"--dtype fp32, or --set lr={run.recipe['lr'] / 3:.1e}; {run.out} is from before")
    errors = [None if math.isnan(error) else round(error, 6) for error in errors]
    rate = run.recipe["effective"] * len(rows) / seconds
    line = dict(step=done, loss=loss, bands=errors, lr=learning_rate(done - 1, run.recipe), grad_norm=norm,
                images_per_s=rate)
    bar.set_postfix_str(f"loss {loss:.3f}, {rate:.0f} img/s")
    if run.rank == 0:
        with open(run.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    return stopping > 0


def save(run, step, pictures):
    """far.pt, which notes how long its log is; and of the averaged weights samples.png and bands.png."""
    path, *grids = (os.path.join(run.out, name) for name in ("far.pt", "samples.png", "bands.png"))
    model = getattr(run.model, "module", run.model)                      # without the wrapper of several GPUs
    save_checkpoint(path, dict(
        kind="far", step=step, run=run.identity, dtype=run.dtype, config=asdict(run.ema.cfg), data=run.data,
        logged=os.path.getsize(run.metrics), model=model.state_dict(), ema=run.ema.state_dict(),
        optimizer=run.optimizer.state_dict()))
    if pictures:
        shown = SimpleNamespace(**{**vars(run), "model": run.ema})
        what, sampling = what_to_draw(shown), sampling_defaults(run.ema.cfg)
        draw_pictures(shown, what, 4 * len(what), grids, run.seed, **sampling)


def open_inputs(args, device):
    """All that the user gave, opened before any long work: images, text encoder, tokenizer. InputError."""
    data, held_out = (load_data(args.data, args.size, args.data_dir, split, bool(args.text), args.skip_bad,
                                args.mirror or None) for split in ("train", "test"))
    if "text_dim" in PRESETS[args.model] and not args.text:
        raise InputError(f"--model {args.model} draws from text: add --text")
    if args.text and not data.captions:
        raise InputError(f"--text: {data.name} has no captions: NAME.txt or metadata.jsonl beside images")
    encoder = load_encoder(args.text, device) if args.text else None
    layout = "" if args.layout in (None, default_layout(args.model)) else f"_{args.layout}"
    args.out = args.out or os.path.join("runs", f"{data.name}_{args.model}{layout}")
    given = args.tokenizer or os.path.join(args.out, "tokenizer.pt")     # a run goes on with its own
    tokenizer = load_tokenizer(given) if args.tokenizer or os.path.exists(given) else None
    if tokenizer:
        fit_to_data(tokenizer, data, given)
    return data, held_out, encoder, tokenizer


def announce(run, model_name, data, tokenizer_cfg):
    """What will be trained, and how long it takes. tokenizer_cfg: of one that has to be trained, or None."""
    cfg, recipe, on_cpu = run.ema.cfg, run.recipe, run.device.type == "cpu"
    others = " or ".join(f"--layout {name}" for name in LAYOUTS if name != cfg.layout)
    print(f"{model_name} in the {cfg.layout} layout (else: {others}), on {run.device}, {run.dtype}\n"
          f"{data.name}: {len(data):,} images, {data.size} px, {data.n_class} classes, mirror: {data.flip}\n"
          f"{recipe['steps']:,} steps of {recipe['effective']} images, bands {cfg.bands}", flush=True)
    if tokenizer_cfg and data.size > 64:
        print("above 64 px the published tokenizer is better: --tokenizer kl16.ckpt; ours blurs detail")
    some, trial = recipe["batch"], deepcopy(run)
    if on_cpu:                        # of a large model some images: 2e11 operations, 6 a weight and token
        some = max(1, min(some, round(2e11 / (6 * run.n_weights * (cfg.n_cond + cfg.latent_size ** 2)))))
    inputs = some_inputs(cfg, some, run.device)                  # the first step prepares memory and kernels
    _, seconds = timeit.repeat(lambda: train_step(trial, [inputs], 0).tolist(), number=1, repeat=2)
    minutes = {"FAR": seconds / 60 * recipe["batch"] / some * run.accum * (recipe["steps"] - run.start)}
    if tokenizer_cfg:
        seconds = time_step(tokenizer_cfg, run.device, run.dtype)    # to encode is a sixth of a training step
        minutes["tokenizer"] = seconds / 60 * recipe["tokenizer"]
        minutes["latents"] = seconds / 60 / tokenizer_cfg.batch / 6 * len(data) * (2 if data.flip else 1)
    total, parts = sum(minutes.values()), ", ".join(f"{name} {part:,.1f}" for name, part in minutes.items())
    print(f"timed steps say about {total:,.1f} minutes: {parts}", flush=True)
    if on_cpu and total > 120:
        print("far_nano and far_tiny are for a CPU: python train.py --data fashion_mnist --layout paper")


def resume_point(path, identity, rank=0):
    """The last whole checkpoint of this run, a damaged one put aside, or None. InputError: another run's."""
    for candidate in filter(os.path.exists, (path, previous(path))):
        try:
            found = load_checkpoint(candidate, "far")
        except InputError as error:
            print(f"WARNING: {error}; trying the one before")
            if rank == 0:                        # out of the way, or the next save would keep it in its place
                os.replace(candidate, f"{candidate}.damaged")
            continue
        for key, now in identity.items():
            if found["run"].get(key) != now:
                raise InputError(f"{os.path.dirname(path)} is a run with another {key}: choose another --out "
                                 f"({str(found['run'].get(key))[:300]} there, {str(now)[:300]} now)")
        return found


def prepare(run, latents, scale, before, compiled):
    """Measure the bands of a new run, or go on from the checkpoint `before`; compile and wrap the model."""
    moments = torch.from_numpy(latents[range(min(len(latents), 4096))][:, 0]).float()     # (n, 2, C, H, H)
    noise = torch.randn(moments[:, 0].shape, generator=step_generator(run.seed, 0))
    x = scale * (moments[:, 0] + (0.5 * moments[:, 1]).exp() * noise)
    for model in (run.model, run.ema):
        model.measure_band_std(x.to(run.device))
    if before:
        with reading(os.path.join(run.out, "far.pt")):
            for name in ("model", "ema", "optimizer"):
                getattr(run, name).load_state_dict(before.pop(name))
        print(f"continuing from step {run.start}", flush=True)
    if compiled:                                                # alike blocks share one; the rest draws noise
        for block in [*run.model.encoder, *run.model.decoder, *run.model.head.blocks]:
            block.compile()
    if run.world > 1:
        run.model = torch.nn.parallel.DistributedDataParallel(run.model, broadcast_buffers=False)


def main(argv=None, build=FAR):
    args = get_args(argv)
    rank, world, device = join_processes(pick_device(args.device))
    data, held_out, encoder, tokenizer = open_inputs(args, device)
    tokenizer_cfg = tokenizer.cfg if tokenizer else default_config(data.size, data.channels)
    cfg, recipe = configure(args, data, tokenizer_cfg, encoder, world)
    os.makedirs(args.out, exist_ok=True)
    if rank == 0 and not (lock := hold_lock(os.path.join(args.out, "lock"), wait=False)):   # until it ends
        raise InputError(f"another training is writing to {args.out}; choose another --out")
    same = {key: value for key, value in recipe.items() if key not in ("batch", "tokenizer")}
    identity = dict(config=asdict(cfg), recipe=same, seed=args.seed, data=data.fingerprint,
                    text=encoder.fingerprint if encoder else "")
    before = resume_point(os.path.join(args.out, "far.pt"), identity, rank)
    shared_cpu = world > 1 and device.type == "cpu"                 # where each might find another one faster
    args.dtype = args.dtype or (before["dtype"] if before else "fp32" if shared_cpu else faster_dtype(device))
    torch.manual_seed(args.seed)
    model = build(cfg).to(device)
    run = SimpleNamespace(
        model=model, ema=deepcopy(model).eval().requires_grad_(False), recipe=recipe, device=device,
        optimizer=make_optimizer(model, recipe), n_weights=sum(p.numel() for p in model.parameters()),
        dtype=args.dtype, rank=rank, world=world, seed=args.seed, accum=args.accum, identity=identity,
        out=args.out, metrics=os.path.join(args.out, "metrics.jsonl"), start=before["step"] if before else 0)
    path = tokenizer_path(args.data_dir, data, tokenizer_cfg, recipe["tokenizer"])
    if rank == 0 and run.start < recipe["steps"]:
        announce(run, args.model, data, None if tokenizer or os.path.exists(path) else tokenizer_cfg)
    tokenizer = (tokenizer or get_tokenizer(data, held_out, tokenizer_cfg, args.data_dir, recipe["tokenizer"],
                                            args.seed, device, args.dtype)).to(device)
    run.encoder, run.tokenizer = encoder, tokenizer
    run.data = dict(                                        # what sampling must know of the data: plain types
        name=data.name, source=data.source, size=data.size, channels=data.channels, data_dir=args.data_dir,
        class_names=data.class_names, tokenizer=fingerprint(tokenizer),
        text=os.path.abspath(args.text) if os.path.isdir(args.text or "") else args.text,
        text_fingerprint=identity["text"], text_dtype=encoder.dtype if encoder else "",
        prompts=[data.caption(i) for i in range(min(len(data), 8))] if args.text else [])
    if before and before["data"]["tokenizer"] != run.data["tokenizer"]:
        raise InputError(f"{args.out} was trained with another tokenizer: choose another --out")
    if rank == 0:
        save_tokenizer(os.path.join(args.out, "tokenizer.pt"), tokenizer)
        images = held_out.batch(range(min(12, len(held_out))))
        pairs = torch.cat([images, reconstruct(tokenizer, images)])
        save_grid(os.path.join(args.out, "reconstructions.png"), pairs, len(images))
        with open(run.metrics, "a") as file:
            file.truncate(before.get("logged") if before else 0)      # later lines will be written again
    latents, scale = cache_latents(tokenizer, data, args.data_dir, device), tokenizer.latent_scale.item()
    texts = text_source(encoder, data, args.data_dir) if args.text else None
    prepare(run, latents, scale, before, args.compile)
    fit(run, cached_batches(run, latents, data.labels, texts, scale))
    if rank == 0:
        print(f"all is saved in {args.out}; if it was stopped, the same command continues\n"
              f"next: python sample.py --ckpt {shlex.quote(args.out)}")


if __name__ == "__main__":
    command_line(main)
