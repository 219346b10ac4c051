"""
Train FAR: data -> tokenizer (trained if there is none) -> latents (cached once) -> FAR -> pictures.

    python train.py                                          # built-in shapes, 2 CPU cores, minutes
    python train.py --data fashion_mnist                     # 70,000 real images
    python train.py --data cifar10 --model far_s             # one GPU
    python train.py --data ~/photos --size 256 --model far_b # a folder of images, subfolders are classes
    python train.py --layout paper                           # the method as released by the authors
    python train.py --text                                   # text to image: drawn scenes with captions
    python train.py --text Qwen/Qwen2-1.5B --data ~/captioned --size 256 --tokenizer kl16.ckpt --model far_t2i
    torchrun --nproc_per_node 8 train.py --data ...          # several GPUs; --fsdp if the model does not fit into one

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
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from tqdm import tqdm

from common import (InputError, OneLineParser, barrier, command_line, first_process_first, join_processes, load_checkpoint,
                    loader_threads, peak_memory, pick_device, previous, save_checkpoint, seed_number, write_atomically)
from data import load_data, reading
from evaluate import Judge, check_progress, draw_progress
from far import LAYOUTS, PRESETS, FARConfig, Randomness, preset_fields
from mar import make_model
from muon import Muon
from sample import save_reconstructions, save_samples
from text import encode, load_encoder, text_source
from tokenizer import STEPS as TOKENIZER_STEPS
from tokenizer import (autocast, cache_latents, default_config, epoch_indices, faster_dtype, fingerprint, held_out_psnr,
                       is_trained, load_exactly, load_tokenizer, save_tokenizer, tokenizer_path, train_tokenizer)


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
    add("--tokenizer-steps", type=int,
        help=f"optimizer steps of a new tokenizer ({TOKENIZER_STEPS}, fewer if --steps is below a tenth)")
    # the model
    add("--model", help=f"size: {', '.join(PRESETS)}; by default far_tiny, with --text far_tiny_t2i")
    add("--layout", default="band", help="band (ours), paper (the released method), random or raster (the baseline of mar.py)")
    add("--set", nargs="*", default=[], metavar="NAME=VALUE",
        help="change single fields of FARConfig, e.g. bands=1,2,4,8 lowpass=fft")
    # the run
    add("--out", help="folder of the run; by default runs/DATA_MODEL")
    add("--steps", type=int, help="optimizer steps; by default the preset's")
    add("--batch", type=int, help="images per step on each device; by default the preset's")
    add("--accum", type=int, default=1, help="batches per optimizer step: less memory, same effective batch")
    add("--lr", type=float, help="learning rate; by default the preset's")
    add("--seed", type=seed_number, default=0, help="of weights, order and noise")
    add("--device", help="cuda, mps or cpu; by default the best there is")
    add("--dtype", choices=("bf16", "fp32"), help="arithmetic of the networks; by default the faster one here")
    add("--compile", action="store_true", help="torch.compile the blocks: slower start, faster steps on a GPU")
    add("--fsdp", action="store_true",
        help="under torchrun: every process holds its share of weights, average and optimizer (FSDP2)")
    add("--checkpoint-activations", action="store_true",
        help="compute blocks again going backward: less memory, a third more work")
    add("--save-every", type=int, default=500, help="steps between checkpoints, and between pictures")
    add("--eval-every", type=int, metavar="N",
        help="every N steps score 1,000 samples (see evaluate.py) into metrics.jsonl and progress.png")
    args = parser.parse_args()
    args.data = args.data or ("shapes_text" if args.text else "shapes")
    args.model = args.model or ("far_tiny_t2i" if args.text else "far_tiny")
    return args


# Training of a size. The paper's (FAR, implementation details): lr 1e-4 per 256 images, 100 warm-up epochs, then constant,
# 400 epochs, batch 1024, EMA 0.9999. The small ones: minutes on two CPU cores, one cosine, Muon.
PAPER = dict(epochs=400, warmup_epochs=100, batch=64, lr=1e-4, lr_per=256, cosine=False)
RECIPES = {
    "far_nano": dict(steps=3000, warmup=100, batch=32, lr=1e-2, cosine=True, muon=True),
    "far_tiny": dict(steps=2000, warmup=100, batch=128, lr=1e-2, cosine=True, muon=True),
    "far_s": dict(steps=100_000, warmup=1000, batch=128, lr=5e-4, cosine=True),
    "far_t2i": dict(PAPER, epochs=100, ema=0.99),
    "far_tiny_t2i": dict(steps=2000, warmup=100, batch=128, lr=8e-3, cosine=True, muon=True),
}


def model_config(args, data, tokenizer_cfg, encoder=None):
    """FARConfig from preset, layout, data, tokenizer, text encoder and --set. Raises InputError."""
    if args.model not in PRESETS:
        raise InputError(f"--model {args.model} is not known; there are {', '.join(PRESETS)}")
    if args.layout not in LAYOUTS:
        raise InputError(f"--layout {args.layout} is not known; there are {', '.join(LAYOUTS)}")
    values = dict(latent_size=tokenizer_cfg.latent_size, latent_dim=tokenizer_cfg.latent_dim, n_class=data.n_class,
                  **preset_fields(args.model, args.layout, tokenizer_cfg.latent_size))
    values["text_dim"] = 0 if not args.text else encoder.width if encoder else values["width"]
    values["byte_depth"] = values.get("byte_depth", 2) if args.text and not encoder else 0
    known = {f.name: f.type for f in fields(FARConfig)}
    for item in args.set:
        name, _, text = item.partition("=")
        if name in ("latent_size", "latent_dim", "n_class", "text_dim", "byte_depth", "order"):
            raise InputError(f"--set {item}: {name} follows from the data, the tokenizer, --text and --layout")
        if name not in known or not text:
            raise InputError(f"--set {item}: NAME=VALUE with NAME one of {', '.join(known)}")
        try:
            values[name] = tuple(int(k) for k in text.split(",")) if known[name] is tuple else known[name](text)
        except ValueError:
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
        held_out = load_data(args.data, args.size, args.data_dir, "test", args.skip_bad, workers=loader_threads())
        print(f"tokenizer: {held_out_psnr(tokenizer, held_out, dtype=args.dtype):.1f} dB PSNR on held-out images ({path})")
    barrier()
    return load_tokenizer(path)


def fit_tokenizer(cfg, data, path):
    """The given tokenizer's config at the data's size; raises InputError if it cannot encode this data."""
    if cfg.image_channels != data.channels:
        raise InputError(f"{path} is for {cfg.image_channels}-channel images, {data.name} has {data.channels}")
    if cfg.shortcut and cfg.image_size != data.size:                     # the published network takes any size
        raise InputError(f"{path} was trained for images of {cfg.image_size} px, {data.name} has {data.size}: "
                         "train one for this size")
    if data.size % cfg.stride:
        raise InputError(f"images of {data.size} px are not a multiple of the stride {cfg.stride} of {path}")
    return replace(cfg, image_size=data.size)


def learning_rate(step, recipe):
    """Linear warm-up, then constant or a cosine to zero."""
    warm = min(1, (step + 1) / max(recipe["warmup"], 1))
    return recipe["lr"] * warm * (0.5 * (1 + math.cos(math.pi * step / recipe["steps"])) if recipe["cosine"] else 1)


@torch.no_grad()
def update_ema(ema, model, step, decay=0.9999):
    """Exponential moving average of the weights. A flat 0.9999 would be mostly initial noise for 7,000 steps, so it warms up."""
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
    if min(recipe["batch"], args.accum, recipe.get("steps", 1)) < 1 or not 0 < recipe["lr"] < math.inf:
        raise InputError("--steps, --batch, --accum and --lr must be positive")
    effective = recipe["batch"] * args.accum * world
    per_epoch = max(1, n_images // effective)
    if "epochs" in recipe:                                               # a recipe in epochs, lr per 256 images
        recipe.setdefault("steps", recipe.pop("epochs") * per_epoch)
        recipe["warmup"] = recipe.pop("warmup_epochs") * per_epoch
        recipe["lr"] = recipe["lr"] * effective / 256 if args.lr is None else args.lr
    return recipe


def make_optimizer(model, lr, muon=False, bf16=False, weight_decay=0.02):
    """
    AdamW as in FAR: no weight decay on biases, norms, single vectors and the diffusion head. With `muon` (see muon.py) the
    matrices of all blocks, the head's too, take its steps, weight decay with them, in `bf16` if that is the arithmetic.
    """
    single = ("_pos", "mask_token", "null_cond", "null_text")
    hidden = ("encoder.", "decoder.", "head.blocks.", "text_encoder.blocks.")
    groups = dict(matrices=[], decayed=[], free=[])
    for name, p in model.named_parameters():
        if p.requires_grad:
            kind = "matrices" if muon and p.ndim == 2 and name.startswith(hidden) else \
                   "free" if p.ndim < 2 or name.startswith("head.") or name.endswith(single) else "decayed"
            groups[kind].append(p)
    groups = [dict(params=params, matrices=kind == "matrices", weight_decay=0.0 if kind == "free" else weight_decay)
              for kind, params in groups.items() if params]
    fused = next(model.parameters()).device.type in ("cpu", "cuda")
    return Muon(groups, bf16, lr=lr, betas=(0.9, 0.95), fused=fused)


def time_step(model, batch, optimizer, text=None):
    """
    Seconds of one training step on random latents, and the text of a batch if any, after a warm-up. With an optimizer of
    learning rate 0 it changes nothing.
    """
    cfg, device = model.cfg, model.band_std.device
    x = torch.randn(batch, cfg.latent_dim, cfg.latent_size, cfg.latent_size, device=device)
    for step in range(2):
        start = time.time()
        model(x, Randomness(0, step, device), torch.zeros(batch, dtype=torch.long, device=device), text)[0].backward()
        optimizer.step()
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


CONTENT = dict(step=int, run=dict, dtype=str, config=dict, model=dict, ema=dict, optimizer=dict, data=dict)    # of a checkpoint


def resume_point(path, run, rank=0):
    """The last whole checkpoint of this run at `path`, or None. A damaged one falls back to the one before, with a warning."""
    for candidate in (path, previous(path)):
        if os.path.exists(candidate):
            try:
                found = load_checkpoint(candidate, "far")
                wrong = [key for key, kind in CONTENT.items() if not isinstance(found.get(key), kind)]
                if wrong:
                    raise InputError(f"{candidate} is not whole: {', '.join(wrong)} missing or of a wrong type")
            except InputError as error:
                print(f"WARNING: {error}" + ("; falling back to the one before" if candidate == path else ""))
                barrier()
                if rank == 0:                      # out of the way, or the next save would put it in the place of the good one
                    os.replace(candidate, f"{candidate}.damaged")
                continue
            changed = [key for key in run if found["run"].get(key) != run[key]]
            if changed:
                values = [f"{key} ({found['run'].get(key)} there, {run[key]} now)" for key in changed]
                raise InputError(f"{os.path.dirname(path)} belongs to a run with other settings: "
                                 f"{'; '.join(v if len(v) < 300 else v[:300] + '...' for v in values)}. Choose another --out")
            return found
    return None


def over_processes(value):
    """The sum of a tensor over all processes."""
    value = value.clone()
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def of_first_process(value):
    """Process 0's value of a plain object, for all."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


def means(sums):
    """sums (2, n), totals and counts -> list of means, None where nothing was counted."""
    return [None if math.isnan(v) else round(v, 6) for v in (sums[0] / sums[1]).tolist()]


# ---- FSDP2: weights, average and optimizer state are DTensors, of which every process holds its rows

def shard(model, dtype):
    """
    Share the weights of a FAR among all processes; every block is gathered when it runs. With bf16, blocks are gathered
    and run in bf16. What is outside of them (embeddings, positions, the head) stays in float32, for casting the whole
    model's input would round the latents; gradients are added up in float32.
    """
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, torch.float32) if dtype == "bf16" else MixedPrecisionPolicy()
    for block in [*model.encoder, *model.decoder]:
        fully_shard(block, mp_policy=policy)
    fully_shard(model)


def whole(tree, rank):
    """
    A state dict with plain tensors in place of shares, so that a checkpoint is the same for any number of processes. All
    of them must call it; the gathered tensors are on the CPU of process 0, the others get None.
    """
    if isinstance(tree, dict):
        return {key: whole(value, rank) for key, value in tree.items()}
    if isinstance(tree, DTensor):
        gathered = tree.full_tensor()
        return gathered.cpu() if rank == 0 else None
    return tree


def load_optimizer(optimizer, state):
    """Load a whole optimizer state; where the weights are shares, each process takes its own."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for i, moments in state["state"].items():
        p = params[i]
        for name, value in moments.items():
            if isinstance(p, DTensor) and value.shape == p.shape:
                moments[name] = distribute_tensor(value.to(p.device), p.device_mesh, p.placements)
    optimizer.load_state_dict(state)


class Metrics:
    """metrics.jsonl: one line per interval. After a resume, lines beyond the checkpoint are dropped, so none is double."""

    def __init__(self, path, start):
        kept = []
        if os.path.exists(path):
            with open(path, encoding="utf-8", errors="replace") as file:
                for line in file:
                    try:
                        kept += [line.rstrip("\n") + "\n"] if json.loads(line)["step"] <= start else []
                    except (ValueError, KeyError, TypeError, RecursionError):
                        pass                                             # half a line from a crash
        write_atomically(path, lambda file: file.write("".join(kept).encode()))
        self.file = open(path, "a", encoding="utf-8")

    def write(self, **values):
        self.file.write(json.dumps(values) + "\n")
        self.file.flush()


def main():
    args = get_args()
    rank, world, device = join_processes(pick_device(args.device))
    if args.fsdp and world == 1:
        raise InputError("--fsdp shares the model among processes: start it with torchrun --nproc_per_node 2 or more")
    say = print if rank == 0 else (lambda *text: None)

    # everything the user gave is looked at before any long work starts
    with first_process_first():                                          # which downloads, or checks every image, once
        data = load_data(args.data, args.size, args.data_dir, skip_bad=args.skip_bad, workers=loader_threads())
    if "text_dim" in PRESETS.get(args.model, ()) and not args.text:
        raise InputError(f"--model {args.model} draws from text: add --text")
    if args.text and not data.captions:
        raise InputError(f"--text needs captions and {data.name} has none: put NAME.txt or metadata.jsonl beside the images")
    with first_process_first():
        encoder = load_encoder(args.text, device, args.dtype) if args.text else None
    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else None
    tokenizer_cfg = (fit_tokenizer(tokenizer.cfg, data, args.tokenizer) if tokenizer
                     else default_config(data.size, data.channels, args.stride, captions=bool(data.captions)))
    cfg = model_config(args, data, tokenizer_cfg, encoder)
    if args.eval_every is not None:
        check_progress(args.eval_every, data, cfg)
    recipe = make_recipe(args, len(data), world)
    # a quick check of a model, --steps 2, gets a quick tokenizer; its file name carries its steps
    tokenizer_steps = min(TOKENIZER_STEPS, 10 * recipe["steps"]) if args.tokenizer_steps is None else args.tokenizer_steps
    if tokenizer_steps < 1 or args.save_every < 1:
        raise InputError("--tokenizer-steps and --save-every must be at least 1")
    out = args.out or os.path.join("runs", f"{data.name}_{args.model}" + ("" if args.layout == "band" else f"_{args.layout}"))
    if os.path.exists(out) and not os.path.isdir(out):
        raise InputError(f"--out {out} is a file, not a folder")
    os.makedirs(out, exist_ok=True)
    lock = lock_folder(out) if rank == 0 else None                       # held until the process ends
    effective = recipe["batch"] * args.accum * world
    run = dict(config=asdict(cfg), recipe={**recipe, "batch": effective}, seed=args.seed, data=data.fingerprint)
    if encoder:
        run["text"] = encoder.fingerprint
    path = os.path.join(out, "far.pt")
    before = resume_point(path, run, rank)
    start = before["step"] if before else 0
    args.dtype = of_first_process(args.dtype or (before["dtype"] if before else faster_dtype(device)))    # it is measured
    torch.manual_seed(args.seed)
    model = make_model(cfg).to(device)
    model.checkpoint_activations = args.checkpoint_activations
    say(f"{data.name}: {len(data):,} images of {data.size} px, {data.n_class} classes. {args.model}, {args.layout} layout: "
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, bands {','.join(map(str, cfg.bands))}, "
        f"on {device}, {args.dtype}")
    say(f"{recipe['steps']:,} steps of {effective} images ({recipe['batch']} a device x {args.accum} accumulated "
        f"x {world} processes)")
    if device.type == "cpu" and rank == 0 and start < recipe["steps"]:
        with autocast(device, args.dtype):
            text = encode(encoder, [data.captions[i % len(data)] for i in range(recipe["batch"])]) if args.text else None
            # the optimizer is not kept: its moments are as large as two models
            seconds = time_step(model, recipe["batch"], make_optimizer(model, 0.0, recipe.get("muon"), args.dtype == "bf16"), text)
            seconds *= args.accum * (recipe["steps"] - start)
        say(f"a timed step says: about {duration(seconds)} for the training of the model on this CPU"
            + ("; far_nano and far_tiny are meant for CPUs" if seconds > 7200 else ""))

    tokenizer = tokenizer or get_tokenizer(args, data, tokenizer_cfg, tokenizer_steps, device, rank)
    tokenizer = tokenizer.to(device)
    mark = fingerprint(tokenizer)
    if before and before["data"].get("tokenizer", mark) != mark:
        raise InputError(f"{out} was trained with another tokenizer: give it with --tokenizer {out}/tokenizer.pt, or choose "
                         "another --out")
    if rank == 0:
        save_tokenizer(os.path.join(out, "tokenizer.pt"), tokenizer)
    latents = cache_latents(tokenizer, data, args.data_dir, device, args.dtype)
    with first_process_first():                                          # which asks a frozen encoder, once
        texts = text_source(encoder, data, args.data_dir) if args.text else None
    scale = tokenizer.latent_scale.item()

    # model, average, optimizer
    some = torch.arange(min(len(data), 4096))
    model.measure_band_std(draw_latents(latents, some, scale, Randomness(args.seed, 0, device), device))
    ema = deepcopy(model).requires_grad_(False)
    if before:
        load_exactly(model, before["model"], path)
        load_exactly(ema, before["ema"], path)
    if args.fsdp:
        shard(model, args.dtype), shard(ema, args.dtype)
    optimizer = make_optimizer(model, recipe["lr"], recipe.get("muon"), args.dtype == "bf16")
    sums = torch.zeros(2, 1 + len(cfg.bands), device=device)             # of loss and bands since the last log line, and counts
    if before:
        with reading(path):
            load_optimizer(optimizer, before["optimizer"])
            if rank == 0 and "sums" in before:
                sums.copy_(before["sums"])
        say(f"continuing from step {start}")
        before = None                                                    # as large as the model and its optimizer
    if args.compile:                                                     # alike blocks share one; the rest draws random numbers
        for block in [*model.encoder, *model.decoder, *model.head.blocks]:
            block.compile()
    step_model = torch.nn.parallel.DistributedDataParallel(model) if world > 1 and not args.fsdp else model
    about = dict(name=data.name, source=args.data, size=data.size, channels=data.channels, data_dir=args.data_dir,
                 class_names=data.class_names, tokenizer=mark)
    if args.text:
        about.update(text=args.text if not os.path.isdir(args.text) else os.path.abspath(args.text),
                     text_dtype=encoder and encoder.dtype, text_fingerprint=encoder and encoder.fingerprint,
                     prompts=[data.captions[i] for i in range(min(len(data), 8))])
    trained_run = SimpleNamespace(model=ema, tokenizer=tokenizer, encoder=encoder, device=device, dtype=args.dtype, data=about)

    def save(step):
        """A collective: all processes call it, process 0 writes."""
        parts = dict(model=model, ema=ema, optimizer=optimizer)
        states = {name: whole(part.state_dict(), rank) for name, part in parts.items()}
        total = over_processes(sums)
        if rank == 0:
            save_checkpoint(path, dict(
                kind="far", step=step, run=run, dtype=args.dtype, config=asdict(cfg), **states, sums=total,
                data=about))

    def look(at):
        """Process 0 calls `at` with the run as it is now; a sharded average is gathered first, by all processes."""
        if args.fsdp:
            state = whole(ema.state_dict(), rank)
            if rank == 0:
                trained_run.model = make_model(cfg).to(device).requires_grad_(False)
                trained_run.model.load_state_dict(state)
        if rank == 0:
            at(trained_run)

    draw_pictures = lambda run: save_samples(run, out, seed=args.seed)
    if args.eval_every and rank == 0:
        judge = Judge(data, device, args.data_dir)

    stop = []                                                            # Ctrl-C and SIGTERM: finish the step, save, leave
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda *_: stop.append(1))
    metrics = Metrics(os.path.join(out, "metrics.jsonl"), start) if rank == 0 else None
    bar = tqdm(range(start, recipe["steps"]), initial=start, total=recipe["steps"], desc="FAR", unit="step", disable=rank > 0)
    seen, waited, interval = 0, 0.0, time.time()                         # images, seconds
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
            row = torch.cat([loss.detach()[None], per_band])
            sums += torch.stack([row.nan_to_num(), (~row.isnan()).float()]) / world
            seen += recipe["batch"] * world
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 3.0)
        norm = norm.full_tensor() if args.fsdp else norm
        if not torch.isfinite(norm):
            raise InputError(f"the loss or its gradient is not finite at step {step} (images {indices.tolist()[:8]}...): "
                             f"try --dtype fp32 or a lower --lr; the checkpoint in {out} is from before")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        update_ema(ema, model, step, recipe.get("ema", 0.9999))
        done = step + 1
        if done % 50 == 0 or done == recipe["steps"]:
            seconds, (mean, *bands) = time.time() - interval, means(over_processes(sums))
            values = dict(step=done, loss=mean, bands=bands, lr=lr, grad_norm=norm.item(), images_per_s=seen / seconds,
                          waiting=waited / seconds, memory_gib=round(peak_memory(device), 3))
            if rank == 0:
                metrics.write(**values)
            bar.set_postfix_str(f"loss {values['loss']:.3f}, bands {' '.join('-' if v is None else f'{v:.2f}' for v in bands)}, "
                                f"lr {values['lr']:.1e}, grad {values['grad_norm']:.2f}, {values['images_per_s']:.0f} img/s, "
                                f"waiting {values['waiting']:.1%}")
            seen, waited, interval = 0, 0.0, time.time()
            sums.zero_()
        clock = time.time()
        if args.eval_every and done % args.eval_every == 0:              # before the save, which keeps the log's lines up to here
            look(lambda run: metrics.write(step=done, **judge(run)))
            if rank == 0:
                draw_progress(os.path.join(out, "metrics.jsonl"), os.path.join(out, "progress.png"))
        # all processes stop, or none
        stopping = over_processes(torch.tensor(float(len(stop)), device=device)) > 0 if world > 1 else bool(stop)
        if done % args.save_every == 0 or done == recipe["steps"] or stopping:
            save(done)
            if not stopping and done < recipe["steps"]:
                look(draw_pictures)
        interval += time.time() - clock                                  # the rate in the log is that of training
        if stopping:
            say(f"\nstopped after step {done}; it is saved, and the same command continues")
            return

    signal.signal(signal.SIGINT, signal.default_int_handler)             # all is saved: from here they end the program at once
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    look(draw_pictures)
    if rank == 0:
        held_out = load_data(args.data, args.size, args.data_dir, "test", skip_bad=args.skip_bad)
        save_reconstructions(trained_run, held_out, os.path.join(out, "reconstructions.png"))
        print(f"pictures: {out}/samples.png, {out}/bands.png, {out}/reconstructions.png\n"
              f"next:     python sample.py --ckpt {out} " + ('--prompt "a yellow star above a green square"' if texts else
                                                             "--n 64"))


if __name__ == "__main__":
    command_line(main)
