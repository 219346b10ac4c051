"""
Draw images from a trained run: a grid, what every band adds, an animation, or an npz for evaluators.

    python sample.py --ckpt runs/shapes_far_tiny                                  # a grid with one column per class
    python sample.py --ckpt runs/fashion_mnist_far_tiny --classes 3,7 --n 16 --cfg 2 --seed 1 --gif
    python sample.py --ckpt runs/cifar10_far_s --n 50000 --npz                    # (N, H, W, 3) uint8 for evaluators; resumes
    torchrun --nproc_per_node 8 -- sample.py ... --npz                            # every process makes its share
    python sample.py --ckpt runs/shapes_text_far_tiny_t2i --prompt "a yellow star above a green square" "two red circles"
    python sample.py --ckpt runs/shapes_text_far_tiny_t2i --interactive           # type prompts one after the other
    python sample.py --ckpt checkpoint-last.pth --tokenizer kl16.ckpt --classes 207,360 --cfg 3    # the authors' files

The same seed and arguments give the same bytes; image i depends on (seed, i) only, so `--n 8` are the first 8 of `--n 64`.
"""
import argparse
import math
import os
import shutil
import time
from dataclasses import asdict
from multiprocessing import get_context
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

from common import (InputError, OneLineParser, command_line, join_processes, load_checkpoint, peak_memory, pick_device,
                    rank_and_world, seed_number, write_atomically)
from count import count_calls, count_flops
from data import digest, reading
from diffusion import SAMPLERS
from far import PRESETS, FARConfig, check_bands, preset_fields, sampling_defaults
from mar import make_model
from published import load_published_far
from text import WORD_BYTES, encode, load_encoder
from tokenizer import autocast, build, faster_dtype, fingerprint, load_tokenizer, reconstruct, to_uint8

CHUNK = 250         # images per file on disk while many are made: the most that an interruption costs
DATA = dict(name=str, source=str, size=int, channels=int, class_names=list, data_dir=str)    # what a checkpoint says of its data
TEXT = dict(text=str, prompts=list)                                                          # a text model's also says this,
FROZEN = dict(text_dtype=str, text_fingerprint=str)                                          # and with a frozen encoder this


def load_run(path, device="cpu", ema=True, tokenizer=None):
    """
    A trained run for sampling: `path` is its folder or its far.pt, the tokenizer lies beside it unless given; or the
    authors' checkpoint-last.pth, with their kl16.ckpt given. Returns model and tokenizer in eval mode, data (dict: name,
    source, size, channels, class_names, data_dir, of a text model also text and prompts), encoder (see text.py), step,
    device and dtype, as attributes. Raises InputError.
    """
    path = os.path.join(path, "far.pt") if os.path.isdir(path) else path
    checkpoint = load_checkpoint(path, allow=[argparse.Namespace])
    if isinstance(checkpoint, dict) and checkpoint.get("kind") == "far":
        with reading(path):
            model = build(make_model, FARConfig(**checkpoint["config"]), checkpoint["ema" if ema else "model"], path)
            data, step = checkpoint["data"], int(checkpoint["step"])
            frozen = model.cfg.text_dim and not model.cfg.byte_depth
            known = {**DATA, **(TEXT if model.cfg.text_dim else {}), **(FROZEN if frozen else {})}
            wrong = [key for key, kind in known.items() if not isinstance(data[key], kind)]
            wrong += [] if all(isinstance(prompt, str) for prompt in data.get("prompts", ())) else ["prompts"]
            if wrong or len(data["class_names"]) > model.cfg.n_class or checkpoint.get("dtype", "fp32") not in ("bf16", "fp32"):
                raise ValueError(f"what it says of its data does not fit: {', '.join(wrong) or 'classes or arithmetic'}")
    else:
        model, step, frozen = load_published_far(path, ema), None, False
        data = dict(name="imagenet", source=None, size=16 * model.cfg.latent_size, channels=3, data_dir="data",
                    class_names=[str(i) for i in range(model.cfg.n_class)])
    beside = os.path.join(os.path.dirname(path), "tokenizer.pt")
    if not tokenizer and not os.path.exists(beside):
        raise InputError(f"there is no tokenizer.pt beside {path}: give one with --tokenizer (the authors' is kl16.ckpt)")
    tokenizer = load_tokenizer(tokenizer or beside)
    if step is None:                                     # the published network is convolutional: it takes any size
        tokenizer.cfg.image_size = model.cfg.latent_size * tokenizer.cfg.stride
    check_fits(model.cfg, tokenizer.cfg)
    encoder = load_encoder(data["text"], device, data["text_dtype"]) if frozen else None
    if frozen and (not encoder or encoder.fingerprint != data["text_fingerprint"]):
        raise InputError(f"{data['text']} is not the text model that {path} was trained with: its weights have changed")
    return SimpleNamespace(model=model.eval().to(device), tokenizer=tokenizer.to(device), device=torch.device(device),
                           data=data, encoder=encoder, step=step, dtype=checkpoint.get("dtype", "fp32"))


def check_fits(cfg, tokenizer_cfg):
    """Raise InputError unless the tokenizer makes the latents that the model reads."""
    ours, theirs = (cfg.latent_dim, cfg.latent_size), (tokenizer_cfg.latent_dim, tokenizer_cfg.latent_size)
    if ours != theirs:
        raise InputError(f"the tokenizer makes latents of {theirs[0]} channels and side {theirs[1]}, "
                         f"the model reads {ours[0]} and {ours[1]}: use the tokenizer it was trained with")


@torch.inference_mode()
def decode(run, x, batch=64):
    """Scaled latents x (B, C, H, H) -> uint8 images (B, c, S, S) on the CPU."""
    images = []
    for part in x.split(batch):
        with autocast(run.device, run.dtype):
            images.append(to_uint8(run.tokenizer.decode(part / run.tokenizer.latent_scale)).cpu())
    return torch.cat(images)


def generate(run, shown, seed=0, first=0, batch=64, every_band=False, bar=None, **sampling):
    """
    Images of what is shown, labels LongTensor (N,) or a list of N prompts, image i with the noise of (seed, first + i);
    `sampling` goes to FAR.sample. -> uint8 (N, c, S, S); with `every_band` a list of those, one per band.
    """
    rows = []
    for i in range(0, len(shown), batch):
        part = shown[i:i + batch]
        if torch.is_tensor(part):
            condition = dict(labels=part.to(run.device))
        else:
            condition = dict(text=tuple(t.to(run.device) for t in encode(run.encoder, part)))
        with autocast(run.device, run.dtype):
            ladder = run.model.sample(
                **condition, seed=seed, first=first + i, progress=(lambda: bar.update(1)) if bar is not None else (lambda: None),
                **sampling)
        rows.append([decode(run, x) for x in (ladder if every_band else ladder[-1:])])
    bands = [torch.cat(band) for band in zip(*rows)]
    return bands if every_band else bands[-1]


def sample_in_chunks(run, shown, folder, seed=0, batch=64, **sampling):
    """
    Images of labels LongTensor (N,) or a list of N prompts, as uint8 (N, c, S, S), by way of files of CHUNK images in
    `folder`, and how many were made. A file found there is not made again, so that an interrupted call goes on; of several
    processes each makes its share, and process 0 returns the images, in order (the others None).
    """
    (rank, world), made = rank_and_world(), 0
    os.makedirs(folder, exist_ok=True)
    starts = range(0, len(shown), CHUNK)
    path = lambda first: os.path.join(folder, f"{first:06d}.npy")
    with tqdm(total=len(starts[rank::world]), desc="sampling", unit=f"x {CHUNK} images", disable=rank > 0) as bar:
        for first in starts[rank::world]:
            part = shown[first:first + CHUNK]
            if len(read_chunk(path(first), run.data)) < len(part):
                images = generate(run, part, seed=seed, first=first, batch=batch, **sampling)
                write_atomically(path(first), lambda file: np.save(file, images.numpy()))
                made += len(part)
            bar.update(1)
    if world > 1:                                                        # also waits until all files are there
        total = torch.tensor(made, device=run.device)
        dist.all_reduce(total)
        made = int(total)
    if rank:
        return None, made
    images = torch.empty(len(shown), run.data["channels"], run.data["size"], run.data["size"], dtype=torch.uint8)
    for first in starts:
        part = images[first:first + CHUNK]
        part.copy_(torch.from_numpy(read_chunk(path(first), run.data)[:len(part)]))
    return images, made


def read_chunk(path, data):
    """Images (n, c, S, S) of a file of `sample_in_chunks`; none if it is not there, or not whole: it is then made again."""
    try:
        images = np.load(path, allow_pickle=False)
        fits = images.dtype == np.uint8 and images.shape[1:] == (data["channels"], data["size"], data["size"])
    except Exception:                                                    # damaged files end in a dozen different exceptions
        fits = False
    return images if fits else np.zeros(0, np.uint8)


def to_rgb(images):
    """uint8 (N, c, S, S), grey or colour -> (N, S, S, 3)."""
    return images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous().numpy()


def grid(images, columns, scale=2):
    """uint8 images (N, c, S, S), `columns` to a row with a thin gap, enlarged `scale` times -> (height, width, 3)."""
    rgb = to_rgb(images)
    n, size = len(rgb), rgb.shape[1]
    canvas = np.full((math.ceil(n / columns) * (size + 1) - 1, columns * (size + 1) - 1, 3), 255, np.uint8)
    for i, image in enumerate(rgb):
        y, x = i // columns * (size + 1), i % columns * (size + 1)
        canvas[y:y + size, x:x + size] = image
    return canvas.repeat(scale, 0).repeat(scale, 1)


def save_grid(path, images, columns):
    """Write `grid` as one PNG."""
    picture = Image.fromarray(grid(images, columns))
    write_atomically(path, lambda file: picture.save(file, format="PNG"))


def columns_of(run, most=24):
    """The classes that a picture shows, one column each, or the prompts."""
    return run.data["prompts"] if run.model.cfg.text_dim else list(range(min(len(run.data["class_names"]), most)))


def conditions(run, columns, n):
    """What n images show, the columns in turn, for `generate`: class numbers as a LongTensor, prompts as a list."""
    shown = [columns[i % len(columns)] for i in range(n)]
    return shown if run.model.cfg.text_dim else torch.tensor(shown)


def save_samples(run, folder, rows=6, seed=0):
    """
    samples.png, one column per class or prompt; bands.png, one sample per row, one band per column, coarse to fine. With 10
    steps of dpmpp at most: the released 100 of ddpm would take a training on a CPU minutes an image.
    """
    columns, sampling = columns_of(run), sampling_defaults(run.model.cfg)
    if sampling["sampler"] == "ddpm":
        sampling.update(sampler="dpmpp", steps=(10, 10))
    shown = conditions(run, columns, len(columns) * rows)
    save_grid(os.path.join(folder, "samples.png"), generate(run, shown, seed=seed, **sampling), len(columns))
    save_bands(os.path.join(folder, "bands.png"), generate(run, shown[:8], seed=seed, every_band=True, **sampling))


def save_bands(path, ladder):
    """ladder: for every band uint8 images (N, c, S, S) -> one row per image, one column per band."""
    save_grid(path, torch.stack(ladder, dim=1).flatten(0, 1), len(ladder))


def save_reconstructions(run, data, path, n=12):
    """Originals over their reconstructions by the tokenizer."""
    images = data.batch(range(min(n, len(data))))
    save_grid(path, torch.cat([images, reconstruct(run.tokenizer, images)]), len(images))


def whole_numbers(text):
    """"1,2,4" -> (1, 2, 4)."""
    return tuple(int(number) for number in text.split(","))


def sampling_settings(args, cfg):
    """The keyword arguments of FAR.sample from the command line, the model's defaults where it is silent. Raises InputError."""
    settings = sampling_defaults(cfg)
    for name, value in (("bands", args.bands), ("sampler", args.sampler), ("steps", args.steps), ("cfg_scale", args.cfg),
                        ("temperature", args.temperature)):
        if value is not None:
            settings[name] = value
    settings["steps"] = (settings["steps"][0], settings["steps"][-1])                # one number is for all bands
    if settings["sampler"] not in SAMPLERS:
        raise InputError(f"--sampler {settings['sampler']} is not known; there are {', '.join(SAMPLERS)}")
    if not 1 <= min(settings["steps"]) <= max(settings["steps"]) <= 1000:
        raise InputError(f"--steps must be between 1 and 1000, not {','.join(map(str, settings['steps']))}")
    if settings["cfg_scale"] != 1 and cfg.label_drop == 0:
        raise InputError("--cfg needs an unconditional branch, and this model was trained without one (label_drop=0): "
                         "use --cfg 1")
    try:
        check_bands(settings["bands"], cfg.latent_size)
    except ValueError as error:
        raise InputError(f"--bands: {error}")
    if cfg.order != "frequency":
        settings["ar_steps"] = args.ar_steps or 8
    elif args.ar_steps:
        raise InputError("--ar-steps is for models in random or raster order; the steps of this one are its --bands")
    return settings


def save_gif(path, ladder, columns):
    """An animation from the coarsest band to the image. ladder: for every band uint8 (N, c, S, S)."""
    frames = [Image.fromarray(grid(images, columns)) for images in ladder]
    frames += [frames[-1]] * 3
    write_atomically(path, lambda file: frames[0].save(file, format="GIF", save_all=True, append_images=frames[1:],
                                                       duration=400, loop=0))


def save_npz(path, images, labels):
    """Images as the field's evaluators read them: arr_0 (N, H, W, 3) uint8, and the labels as arr_1."""
    write_atomically(path, lambda file: np.savez(file, arr_0=to_rgb(images), arr_1=labels.numpy()))


def time_sampling(job):
    """One row of the benchmark, in a process of its own so that its peak memory is its own. job: dict -> (seconds, MiB)."""
    device = pick_device(job["device"])
    torch.manual_seed(0)
    model = load_run(job["ckpt"], device).model if job["ckpt"] else make_model(FARConfig(**job["config"])).eval().to(device)
    cfg, n = model.cfg, job["n"]
    condition = dict(labels=(torch.arange(n) % cfg.n_class).to(device))
    if cfg.text_dim:                                                     # a prompt of 20 tokens
        tokens = torch.ones(n, 20, WORD_BYTES, dtype=torch.uint8) if cfg.byte_depth else torch.ones(n, 20, cfg.text_dim)
        condition = dict(text=(tokens.to(device), torch.ones(n, 20, dtype=torch.bool, device=device)))
    start = 0.0
    for warm_up in (True, False):
        settings = {**job["settings"], **(dict(steps=(1, 1)) if warm_up else {})}
        start = time.time()
        with autocast(device, job["dtype"]):
            model.sample(**condition, **settings)[-1].sum().item()
    seconds = time.time() - start
    return seconds, 1024 * peak_memory(device)


def benchmark(args):
    """Time the released procedure and ours, without decoding to pixels: a table in Markdown."""
    device, n = pick_device(args.device), args.n or 1
    if args.ckpt:
        cfg = load_run(args.ckpt, device).model.cfg
        layouts = {"paper" if cfg.grid == "full" else "band": asdict(cfg)}
    elif args.benchmark in PRESETS:
        base = dict(latent_size=16, latent_dim=16, n_class=1000)
        layouts = {name: asdict(FARConfig(**base, **preset_fields(args.benchmark, name, 16)))
                   for name in ("paper", "band")}
    else:
        raise InputError(f"--benchmark {args.benchmark} is not known; there are {', '.join(PRESETS)}")
    print(f"{args.ckpt or args.benchmark}, {n} images at once, {device}, {torch.get_num_threads()} threads, guidance 3, "
          "without decoding\n\n"
          "| layout | sampler | steps | bands | arithmetic | head calls / image | transformer tokens / image | images/s "
          "| times the first | peak MiB |\n"
          "|---|---|---|---|---|---|---|---|---|---|")
    first, fast = None, args.dtype or faster_dtype(device)
    for layout, config in layouts.items():
        model_cfg = FARConfig(**config)
        few = [("dpmpp", steps, fast) for steps in ((20, 20), (10, 10), (24, 10), (6, 6))]
        for sampler, steps, dtype in dict.fromkeys([("ddpm", (100, 100), "fp32"), ("ddpm", (100, 100), fast), *few]):
            settings = dict(sampling_defaults(model_cfg), sampler=sampler, steps=steps, cfg_scale=3.0)
            job = dict(ckpt=args.ckpt, config=config, settings=settings, n=n, device=args.device, dtype=dtype)
            with get_context("spawn").Pool(1) as pool:
                seconds, memory = pool.apply(time_sampling, (job,))
            first = first or seconds
            calls, tokens = count_calls(model_cfg, settings), count_flops(model_cfg, settings)[2]
            print(f"| {layout} | {sampler} | {' to '.join(map(str, dict.fromkeys(steps)))} "
                  f"| {','.join(map(str, settings['bands']))} | {dtype} | {calls:,} | {tokens:,} | {n / seconds:.3g} "
                  f"| {first / seconds:.1f} | {memory:.0f} |", flush=True)


def read_prompts(given):
    """Prompts from the command line; "@FILE" stands for the lines of a file. Raises InputError on a missing or empty one."""
    prompts = []
    for item in given or ():
        if item.startswith("@"):
            try:
                with open(item[1:], encoding="utf-8-sig") as file:
                    prompts += [line.strip() for line in file if line.strip()]
            except (OSError, UnicodeDecodeError) as error:
                raise InputError(f"--prompt {item}: {item[1:]} could not be read ({error})")
        else:
            prompts.append(item.strip())
    if given and not all(prompts or [""]):
        raise InputError("--prompt is empty")
    return prompts


def out_of(args):
    """Where pictures go, without ending: --out, or sample in the run's folder."""
    folder = args.ckpt if os.path.isdir(args.ckpt) else os.path.dirname(args.ckpt)
    return (args.out or os.path.join(folder, "sample")).removesuffix(".png")


def interactive(args, run, settings):
    """Read prompts from the keyboard until an empty line or the end; write OUT_001.png, OUT_002.png ... as they come."""
    if not run.model.cfg.text_dim:
        raise InputError("--interactive is for a model trained on text; this one draws classes")
    n, out = args.n or 8, out_of(args)
    print(f"a prompt and Enter draws {n} images; an empty line ends")
    for number in range(1, 1000):
        try:
            prompt = input("> ").strip()
        except EOFError:
            return
        if not prompt:
            return
        settings = dict(settings, masked=args.masked)
        images = generate(run, conditions(run, [prompt], n), seed=args.seed, batch=args.batch, **settings)
        save_grid(f"{out}_{number:03d}.png", images, min(n, 8))
        print(f"written: {out}_{number:03d}.png", flush=True)


def get_args():
    parser = OneLineParser(prog="sample.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ckpt", help="folder of a run, its far.pt, or the authors' checkpoint-last.pth")
    add("--tokenizer", help="tokenizer.pt or kl16.ckpt, if it does not lie beside the checkpoint")
    # what to draw
    add("--classes", type=whole_numbers, help="class numbers, e.g. 3,7; by default all, at most 24")
    add("--prompt", nargs="+", metavar="TEXT", help="what a model trained on text shall draw; @FILE holds one prompt a line")
    add("--interactive", action="store_true", help="type prompts one after the other; each gets a picture of --n images (8)")
    add("--n", type=int, help="how many images, the classes or prompts in turn; by default 4 of each")
    add("--seed", type=seed_number, default=0, help="of the noise")
    # how
    add("--cfg", type=float, help="guidance, rising from 1 at the lowest band; 1 is none; by default the model's")
    add("--steps", type=whole_numbers, help="diffusion steps of every band, or of the lowest and the highest: 10 or 40,100")
    add("--sampler", help="of the diffusion head: ddpm, ddim or dpmpp")
    add("--temperature", type=float, help="scale of the noise: lower is plainer, higher is wilder; by default the model's")
    add("--bands", type=whole_numbers, help="the ladder to climb, e.g. 1,2,4,8; by default the model's")
    add("--ar-steps", type=int, help="autoregressive steps of the baseline of mar.py; FAR has one per band")
    add("--masked", action="store_true", help="hide random tokens of every band from the encoder, for variety")
    add("--no-ema", action="store_true", help="the raw weights instead of their average")
    # where
    add("--out", help="the picture, and the beginning of the names of what comes with it; by default sample.png in the run's folder")
    add("--gif", action="store_true", help="also an animation from blur to image")
    add("--npz", action="store_true", help="also an npz with arr_0, (N, H, W, 3) uint8")
    add("--batch", type=int, default=64, help="images at once")
    add("--device", help="cuda, mps or cpu; by default the best there is")
    add("--dtype", choices=("bf16", "fp32"), help="arithmetic of the networks; by default that of the training")
    add("--benchmark", nargs="?", const="far_b", metavar="PRESET",
        help="time samplers and layouts on this machine, with --ckpt's model or a preset with random weights (far_b), and print a table")
    return parser.parse_args()


def main():
    args = get_args()
    if args.benchmark:
        return benchmark(args)
    if not args.ckpt:
        raise InputError("--ckpt is needed: the folder of a run, its far.pt, or the authors' checkpoint-last.pth")
    rank, world, device = join_processes(pick_device(args.device))
    run = load_run(args.ckpt, device, not args.no_ema, args.tokenizer)
    run.dtype = args.dtype or run.dtype
    settings = sampling_settings(args, run.model.cfg)
    if (args.n is not None and args.n < 1) or args.batch < 1:
        raise InputError("--n and --batch must be at least 1")
    if args.interactive:
        return None if rank else interactive(args, run, settings)
    if (args.prompt and not run.model.cfg.text_dim) or (args.classes and run.model.cfg.text_dim):
        raise InputError("this model draws " + ("from text: use --prompt" if args.classes else "classes: use --classes"))
    classes = read_prompts(args.prompt) or args.classes or columns_of(run)
    n = args.n if args.n is not None else 4 * len(classes)
    if args.classes and not all(0 <= c < run.model.cfg.n_class for c in classes):
        raise InputError(f"--classes: the model has classes 0 to {run.model.cfg.n_class - 1}")
    shown, out = conditions(run, classes, n), out_of(args)
    settings["masked"] = args.masked
    if args.npz:
        # the same weights, labels or prompts, and settings go on in the same folder
        key = digest(*map(fingerprint, (run.model, run.tokenizer)), settings, classes, args.seed, args.batch, run.dtype)
        images, _ = sample_in_chunks(run, shown, f"{out}.parts-{key}", args.seed, args.batch, **settings)
    if rank:
        return                                                           # the pictures are few: process 0 draws them
    print(f"{n} images: " + ", ".join(f"{name} {value}" for name, value in settings.items()))
    few = min(n, 16 * len(classes) if len(classes) <= 24 else 24)        # a file of prompts may be long
    with tqdm(total=math.ceil(few / args.batch) * len(settings["bands"]), desc="pictures", unit="band") as bar:
        ladder = generate(run, shown[:few], seed=args.seed, batch=args.batch, every_band=True, bar=bar, **settings)
    save_grid(f"{out}.png", ladder[-1], min(len(classes), few))
    save_bands(f"{out}_bands.png", [images[:8] for images in ladder])
    written = [f"{out}.png", f"{out}_bands.png"]
    if args.gif:
        save_gif(f"{out}.gif", ladder, min(len(classes), few))
        written.append(f"{out}.gif")
    if args.npz:
        numbers = range(len(classes)) if run.model.cfg.text_dim else classes                 # of the prompts, or the classes
        save_npz(f"{out}.npz", images, torch.tensor([numbers[i % len(classes)] for i in range(n)]))
        shutil.rmtree(f"{out}.parts-{key}")
        written.append(f"{out}.npz")
    names = [repr(c) if isinstance(c, str) else f"{c} {run.data['class_names'][c]}" for c in classes[:24]]
    print(f"columns: {', '.join(names)}\nwritten: {', '.join(written)}")


if __name__ == "__main__":
    command_line(main)
