"""
Train FAR: data -> tokenizer (trained if there is none) -> latents (cached once) -> FAR -> pictures.

    python train.py                                          # built-in shapes, 2 CPU cores, minutes
    python train.py --data fashion_mnist                     # 70,000 real images
    python train.py --data cifar10 --model far_s             # one GPU
    python train.py --data ~/photos --size 256 --model far_b # a folder of images, subfolders are classes
    python train.py --layout paper                           # the method as released by the authors
    python train.py --text                                   # text to image: drawn scenes with captions
    python train.py --text Qwen/Qwen2-1.5B --data ~/captioned --size 256 --tokenizer kl16.ckpt --model far_t2i
    torchrun --nproc_per_node 8 train.py --data ...          # several GPUs

Everything lands in --out. The same command again continues where the last one stopped.
"""
import json
import math
import os
import signal
import time
from argparse import RawDescriptionHelpFormatter
from copy import deepcopy
from dataclasses import asdict, fields, replace
from datetime import timedelta
from types import SimpleNamespace

import torch
import torch.distributed as dist
from tqdm import tqdm

from common import InputError, OneLineParser, command_line, load_checkpoint, pick_device, previous, save_checkpoint, write_atomically
from data import load_data
from far import FAR, LAYOUTS, PRESETS, FARConfig, Randomness, default_bands
from sample import save_reconstructions, save_samples
from text import encode, load_encoder, text_source
from tokenizer import STEPS as TOKENIZER_STEPS
from tokenizer import (autocast, cache_latents, default_config, epoch_indices, faster_dtype, held_out_psnr, is_trained, load_tokenizer,
                       save_tokenizer, tokenizer_path, train_tokenizer)


def get_args():
    parser = OneLineParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    # what to train on
    add("--data", help="shapes, fashion_mnist, cifar10, imagenet64, or a folder of images; for --text: shapes_text or a folder")
    add("--text", nargs="?", const="bytes",
        help="train on captions, with the encoder `bytes` (trained with the model) or a Qwen2 model by name or folder")
    add("--size", type=int, help="side of the images in pixels; by default the data's own")
    add("--data-dir", default="data", help="where data sets, tokenizers and cached latents are kept")
    add("--skip-bad", action="store_true", help="leave out images that cannot be read (counted) instead of stopping")
    # the tokenizer
    add("--tokenizer", help="a tokenizer.pt, or the published kl16.ckpt; by default one is trained, once per data and size")
    add("--stride", type=int, help="pixels per token side: 4, 8 or 16; by default it follows the size")
    add("--tokenizer-steps", type=int, help=f"optimizer steps of a new tokenizer ({TOKENIZER_STEPS}, fewer if --steps is below a tenth)")
    # the model
    add("--model", help=f"size: {', '.join(PRESETS)}; by default far_tiny, with --text far_tiny_t2i")
    add("--layout", default="band", help="band (ours) or paper (the released method)")
    add("--set", nargs="*", default=[], metavar="NAME=VALUE", help="change single fields of FARConfig, e.g. bands=1,2,4,8 lowpass=fft")
    # the run
    add("--out", help="folder of the run; by default runs/DATA_MODEL")
    add("--steps", type=int, help="optimizer steps; by default the preset's")
    add("--batch", type=int, help="images per step on each device; by default the preset's")
    add("--accum", type=int, default=1, help="batches per optimizer step: less memory, same effective batch")
    add("--lr", type=float, help="learning rate; by default the preset's")
    add("--seed", type=int, default=0, help="of weights, order and noise")
    add("--device", help="cuda, mps or cpu; by default the best there is")
    add("--dtype", choices=("bf16", "fp32"), help="arithmetic of the networks; by default the faster one here")
    add("--compile", action="store_true", help="torch.compile the model: slower start, faster steps on a GPU")
    add("--save-every", type=int, default=500, help="steps between checkpoints, and between pictures")
    args = parser.parse_args()
    args.data = args.data or ("shapes_text" if args.text else "shapes")
    args.model = args.model or ("far_tiny_t2i" if args.text else "far_tiny")
    return args


# Training of a size. The paper's (FAR, implementation details): lr 1e-4 per 256 images, 100 warm-up epochs, then constant,
# 400 epochs, batch 1024, EMA 0.9999. The small ones: minutes on two CPU cores, one cosine.
PAPER = dict(epochs=400, warmup_epochs=100, batch=64, lr=1e-4, lr_per=256, cosine=False)
RECIPES = {
    "far_nano": dict(steps=1500, warmup=100, batch=64, lr=2e-3, cosine=True),
    "far_tiny": dict(steps=3000, warmup=100, batch=64, lr=2e-3, cosine=True),
    "far_s": dict(steps=100_000, warmup=1000, batch=128, lr=5e-4, cosine=True),
    "far_t2i": dict(PAPER, epochs=100, ema=0.99),
    "far_tiny_t2i": dict(steps=10_000, warmup=200, batch=32, lr=2e-3, cosine=True),
}


def model_config(args, data, tokenizer_cfg, encoder=None):
    """FARConfig from preset, layout, data, tokenizer, text encoder and --set. Raises InputError."""
    if args.model not in PRESETS:
        raise InputError(f"--model {args.model} is not known; there are {', '.join(PRESETS)}")
    if args.layout not in LAYOUTS:
        raise InputError(f"--layout {args.layout} is not known; there are {', '.join(LAYOUTS)}")
    values = dict(latent_size=tokenizer_cfg.latent_size, latent_dim=tokenizer_cfg.latent_dim, n_class=data.n_class,
                  bands=default_bands(tokenizer_cfg.latent_size, args.layout), **PRESETS[args.model], **LAYOUTS[args.layout])
    values["text_dim"] = 0 if not args.text else encoder.width if encoder else values["width"]
    values["byte_depth"] = values.get("byte_depth", 2) if args.text and not encoder else 0
    known = {f.name: f.type for f in fields(FARConfig)}
    for item in args.set:
        name, _, text = item.partition("=")
        if name not in known or not text:
            raise InputError(f"--set {item}: NAME=VALUE with NAME one of {', '.join(known)}")
        try:
            values[name] = (tuple(int(k) for k in text.split(",")) if known[name] is tuple else
                            {"True": True, "False": False}[text] if known[name] is bool else known[name](text))
        except (ValueError, KeyError):
            raise InputError(f"--set {item}: {text} is not a valid {known[name].__name__}")
    try:
        return FARConfig(**values)
    except ValueError as error:
        raise InputError(str(error))


def get_tokenizer(args, data, cfg, steps, device, rank):
    """The tokenizer for this data and size, trained now (by rank 0, the others wait) if there is none yet."""
    path = tokenizer_path(args.data_dir, data, cfg, steps)
    if rank == 0 and not is_trained(path):
        os.makedirs(args.data_dir, exist_ok=True)
        tokenizer = train_tokenizer(data, cfg, path, steps, seed=args.seed, device=device, dtype=args.dtype)
        held_out = load_data(args.data, args.size, args.data_dir, "test", skip_bad=args.skip_bad)
        print(f"tokenizer: {held_out_psnr(tokenizer, held_out, dtype=args.dtype):.1f} dB PSNR on held-out images ({path})")
    if dist.is_initialized():
        dist.barrier()
    return load_tokenizer(path)


def fit_tokenizer(cfg, data, path):
    """The given tokenizer's config at the data's size; raises InputError if it cannot encode this data."""
    if cfg.image_channels != data.channels:
        raise InputError(f"{path} is for {cfg.image_channels}-channel images, {data.name} has {data.channels}")
    if data.size % cfg.stride:
        raise InputError(f"images of {data.size} px are not a multiple of the stride {cfg.stride} of {path}")
    return replace(cfg, image_size=data.size)


def learning_rate(step, recipe):
    """Linear warm-up, then constant or a cosine to zero."""
    warm = min(1, (step + 1) / max(recipe["warmup"], 1))
    return recipe["lr"] * warm * (0.5 * (1 + math.cos(math.pi * step / recipe["steps"])) if recipe["cosine"] else 1)


@torch.no_grad()
def update_ema(ema, model, step, decay=0.9999):
    """Exponential moving average of the weights. A flat 0.9999 would be mostly initial noise for 100k steps, so it warms up."""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def draw_latents(latents, indices, scale, draw, device):
    """A fresh sample of the posterior of each image, scaled to unit variance: (B, C, H, H) float32."""
    views = torch.from_numpy(latents[indices.numpy()]).to(device).float()                        # (B, views, 2, C, H, H)
    view = (draw(torch.rand, len(views)) * views.shape[1]).long()                                # mirrored or not
    mean, logvar = views[torch.arange(len(views), device=device), view].unbind(1)                # (B, C, H, H) each
    return scale * (mean + (0.5 * logvar).exp() * draw(torch.randn, *mean.shape))


def make_recipe(args, n_images, world):
    """The training recipe as plain numbers: the preset's, with what the command line says instead. See RECIPES."""
    recipe = dict(RECIPES.get(args.model, PAPER))
    recipe.update({name: value for name in ("steps", "batch", "lr") if (value := getattr(args, name)) is not None})
    if recipe["batch"] < 1 or args.accum < 1 or recipe["steps"] < 1 or not recipe["lr"] > 0:
        raise InputError("--steps, --batch, --accum and --lr must be positive")
    effective = recipe["batch"] * args.accum * world
    per_epoch = max(1, n_images // effective)
    if "epochs" in recipe:                                               # a recipe in epochs, lr per 256 images
        recipe.setdefault("steps", recipe.pop("epochs") * per_epoch)
        recipe["warmup"] = recipe.pop("warmup_epochs") * per_epoch
        recipe["lr"] = recipe["lr"] * effective / 256 if args.lr is None else args.lr
    return recipe


def make_optimizer(model, lr, weight_decay=0.02):
    """AdamW as in MAR and FAR: no weight decay on biases, norms, single vectors and the diffusion head."""
    free = lambda name, p: p.ndim < 2 or name.startswith("head.") or name.endswith(("_pos", "mask_token", "null_cond", "null_text"))
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return torch.optim.AdamW([dict(params=[p for name, p in named if not free(name, p)], weight_decay=weight_decay),
                              dict(params=[p for name, p in named if free(name, p)], weight_decay=0.0)],
                             lr=lr, betas=(0.9, 0.95), fused=next(model.parameters()).device.type in ("cpu", "cuda"))


def time_step(model, batch, text=None):
    """Seconds of one training step on random latents, and the text of a batch if any, after a warm-up. Changes nothing."""
    cfg, device = model.cfg, model.band_std.device
    x = torch.randn(batch, cfg.latent_dim, cfg.latent_size, cfg.latent_size, device=device)
    for step in range(2):
        start = time.time()
        model(x, Randomness(0, step, device), torch.zeros(batch, dtype=torch.long, device=device), text)[0].backward()
        model.zero_grad(set_to_none=True)
    return time.time() - start


def duration(seconds):
    """90 -> "1.5 minutes"."""
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} seconds"


def lock_folder(out):
    """Hold a lock on the run's folder until the process ends; raise InputError if another process holds it."""
    try:
        import fcntl                                                     # not on Windows, where nothing is locked
    except ImportError:
        return None
    lock = open(os.path.join(out, "lock"), "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise InputError(f"another training is writing to {out}; choose another --out")
    return lock


def resume_point(path, run):
    """The last whole checkpoint of this run at `path`, or None. A damaged one falls back to the one before, with a warning."""
    for candidate in (path, previous(path)):
        if os.path.exists(candidate):
            try:
                found = load_checkpoint(candidate, "far")
            except InputError as error:
                print(f"WARNING: {error}" + ("; falling back to the one before" if candidate == path else ""))
                continue
            changed = [key for key in run if found["run"].get(key) != run[key]]
            if changed:
                values = [f"{key} ({found['run'].get(key)} there, {run[key]} now)" for key in changed]
                raise InputError(f"{os.path.dirname(path)} belongs to a run with other settings: "
                                 f"{'; '.join(v if len(v) < 300 else v[:300] + '...' for v in values)}. Choose another --out")
            return found
    return None


def mean_over_ranks(rows):
    """Mean over a list of vectors, entries that are nan left out, and over all processes -> list of floats."""
    rows = torch.stack(rows)
    total, count = rows.nansum(0), (~rows.isnan()).sum(0).float()
    if dist.is_initialized():
        dist.all_reduce(total), dist.all_reduce(count)
    return [None if math.isnan(v) else round(v, 6) for v in (total / count).tolist()]


class Metrics:
    """metrics.jsonl: one line per interval. After a resume, lines beyond the checkpoint are dropped, so none is double."""

    def __init__(self, path, start):
        kept = []
        if os.path.exists(path):
            with open(path, encoding="utf-8", errors="replace") as file:
                for line in file:
                    try:
                        kept += [line] if json.loads(line)["step"] <= start else []
                    except (ValueError, KeyError, TypeError):
                        pass                                             # half a line from a crash
        write_atomically(path, lambda file: file.write("".join(kept).encode()))
        self.file = open(path, "a", encoding="utf-8")

    def write(self, **values):
        self.file.write(json.dumps(values) + "\n")
        self.file.flush()


def main():
    args = get_args()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(args.device)
    if world > 1:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=2))
    say = print if rank == 0 else (lambda *text: None)

    # everything the user gave is looked at before any long work starts
    data = load_data(args.data, args.size, args.data_dir, skip_bad=args.skip_bad)
    if "text_dim" in PRESETS.get(args.model, ()) and not args.text:
        raise InputError(f"--model {args.model} draws from text: add --text")
    if args.text and not data.captions:
        raise InputError(f"--text needs captions and {data.name} has none: put NAME.txt or metadata.jsonl beside the images")
    encoder = load_encoder(args.text, device, args.dtype) if args.text else None
    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else None
    tokenizer_cfg = fit_tokenizer(tokenizer.cfg, data, args.tokenizer) if tokenizer else default_config(data.size, data.channels, args.stride)
    cfg = model_config(args, data, tokenizer_cfg, encoder)
    recipe = make_recipe(args, len(data), world)
    # a quick check of a model, --steps 2, gets a quick tokenizer; its file name carries its steps
    tokenizer_steps = args.tokenizer_steps or min(TOKENIZER_STEPS, 10 * recipe["steps"])
    out = args.out or os.path.join("runs", f"{data.name}_{args.model}" + ("_paper" if args.layout == "paper" else ""))
    os.makedirs(out, exist_ok=True)
    lock = lock_folder(out) if rank == 0 else None                       # held until the process ends
    effective = recipe["batch"] * args.accum * world
    run = dict(config=asdict(cfg), recipe={**recipe, "batch": effective}, seed=args.seed, data=data.fingerprint)
    if encoder:
        run["text"] = encoder.fingerprint
    path = os.path.join(out, "far.pt")
    before = resume_point(path, run)
    start = before["step"] if before else 0
    args.dtype = args.dtype or (before["dtype"] if before else faster_dtype(device))
    torch.manual_seed(args.seed)
    model = FAR(cfg).to(device)
    say(f"{data.name}: {len(data):,} images of {data.size} px, {data.n_class} classes. {args.model}, {args.layout} layout: "
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, bands {','.join(map(str, cfg.bands))}, on {device}, {args.dtype}")
    say(f"{recipe['steps']:,} steps of {effective} images ({recipe['batch']} a device x {args.accum} accumulated "
        f"x {world} processes)")
    if device.type == "cpu" and rank == 0 and start < recipe["steps"]:
        with autocast(device, args.dtype):
            text = encode(encoder, [data.captions[i % len(data)] for i in range(recipe["batch"])]) if args.text else None
            seconds = time_step(model, recipe["batch"], text) * args.accum * (recipe["steps"] - start)
        say(f"a timed step says: about {duration(seconds)} for the training of the model on this CPU"
            + ("; far_nano and far_tiny are meant for CPUs" if seconds > 7200 else ""))

    tokenizer = tokenizer or get_tokenizer(args, data, tokenizer_cfg, tokenizer_steps, device, rank)
    tokenizer = tokenizer.to(device)
    if rank == 0:
        save_tokenizer(os.path.join(out, "tokenizer.pt"), tokenizer)
        cache_latents(tokenizer, data, args.data_dir, device, args.dtype)
        args.text and text_source(encoder, data, args.data_dir)
    if world > 1:
        dist.barrier()
    latents = cache_latents(tokenizer, data, args.data_dir, device, args.dtype)
    texts = text_source(encoder, data, args.data_dir) if args.text else None
    scale = tokenizer.latent_scale.item()

    # model, average, optimizer
    model.measure_band_std(draw_latents(latents, torch.arange(min(len(data), 4096)), scale, Randomness(args.seed, 0, device), device))
    ema = deepcopy(model).requires_grad_(False)
    optimizer = make_optimizer(model, recipe["lr"])
    if before:
        model.load_state_dict(before["model"])
        ema.load_state_dict(before["ema"])
        optimizer.load_state_dict(before["optimizer"])
        say(f"continuing from step {start}")
    step_model = torch.compile(model) if args.compile else model
    if world > 1:
        step_model = torch.nn.parallel.DistributedDataParallel(step_model)
    about = dict(name=data.name, source=args.data, size=data.size, channels=data.channels, data_dir=args.data_dir,
                 class_names=data.class_names)
    if args.text:
        about.update(text=args.text if not os.path.isdir(args.text) else os.path.abspath(args.text),
                     text_dtype=encoder and encoder.dtype, text_fingerprint=encoder and encoder.fingerprint,
                     prompts=[data.captions[i] for i in range(min(len(data), 8))])
    trained_run = SimpleNamespace(model=ema, tokenizer=tokenizer, encoder=encoder, device=device, dtype=args.dtype, data=about)

    def save(step):
        save_checkpoint(path, dict(
            kind="far", step=step, run=run, dtype=args.dtype, config=asdict(cfg), model=model.state_dict(), ema=ema.state_dict(),
            optimizer=optimizer.state_dict(), data=about))

    stop = []                                                            # Ctrl-C and SIGTERM: finish the step, save, leave
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda *_: stop.append(1))
    metrics = Metrics(os.path.join(out, "metrics.jsonl"), start) if rank == 0 else None
    bar = tqdm(range(start, recipe["steps"]), initial=start, total=recipe["steps"], desc="FAR", unit="step", disable=rank > 0)
    rows, waited, interval = [], 0.0, time.time()
    for step in bar:
        lr = learning_rate(step, recipe)
        for group in optimizer.param_groups:
            group["lr"] = lr
        if cfg.dropout:
            torch.manual_seed((args.seed * 1_000_003 + step) * world + rank)
        for micro in range(args.accum):
            clock = time.time()
            number = step * args.accum + micro
            indices = epoch_indices(number * recipe["batch"] * world, recipe["batch"] * world, len(data), args.seed)
            indices = indices[rank * recipe["batch"]:(rank + 1) * recipe["batch"]]
            draw = Randomness(args.seed + 1, number, device, rank, world)
            x = draw_latents(latents, indices, scale, draw, device)
            labels = data.labels[indices].to(device)
            text = tuple(part.to(device) for part in texts(indices)) if texts else None
            waited += time.time() - clock
            with autocast(device, args.dtype):
                loss, per_band = step_model(x, draw, labels, text)
            (loss / args.accum).backward()
            rows.append(torch.cat([loss.detach()[None], per_band]))
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 3.0)
        if not torch.isfinite(norm):
            raise InputError(f"the loss or its gradient is not finite at step {step} (images {indices.tolist()[:8]}...): "
                             f"try --dtype fp32 or a lower --lr; the checkpoint in {out} is from before")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        update_ema(ema, model, step, recipe.get("ema", 0.9999))
        done = step + 1
        if done % 50 == 0 or done == recipe["steps"]:
            seconds, (mean, *bands) = time.time() - interval, mean_over_ranks(rows)
            values = dict(step=done, loss=mean, bands=bands, lr=lr, grad_norm=norm.item(),
                          images_per_s=len(rows) * recipe["batch"] * world / seconds, waiting=waited / seconds)
            if rank == 0:
                metrics.write(**values)
            bar.set_postfix_str(f"loss {values['loss']:.3f}, bands {' '.join('-' if v is None else f'{v:.2f}' for v in bands)}, "
                                f"lr {values['lr']:.1e}, grad {values['grad_norm']:.2f}, {values['images_per_s']:.0f} img/s, "
                                f"waiting {values['waiting']:.1%}")
            rows, waited, interval = [], 0.0, time.time()
        if rank == 0 and (done % args.save_every == 0 or done == recipe["steps"] or stop):
            save(done)
            if not stop and done < recipe["steps"]:
                save_samples(trained_run, out, seed=args.seed)
                interval = time.time()
        if stop:
            say(f"\nstopped after step {done}; it is saved, and the same command continues")
            return

    if rank == 0:
        held_out = load_data(args.data, args.size, args.data_dir, "test", skip_bad=args.skip_bad)
        save_reconstructions(trained_run, held_out, os.path.join(out, "reconstructions.png"))
        save_samples(trained_run, out, seed=args.seed)
        print(f"pictures: {out}/samples.png, {out}/bands.png, {out}/reconstructions.png\n"
              f"next:     python sample.py --ckpt {out} " + ('--prompt "a yellow star above a green square"' if texts else
                                                             "--n 64"))


if __name__ == "__main__":
    command_line(main)
