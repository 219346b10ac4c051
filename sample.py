"""
Draw images from a trained run: a grid, what every band adds, or an npz for evaluators.

    python sample.py                                                  # the weights that come with the code
    python sample.py --prompt "a red circle left of a blue star" "two green squares"
    python sample.py --ckpt runs/fashion_mnist_far_tiny --classes bag,sandal --n 16 --cfg 2
    python sample.py --ckpt runs/cifar10_far_s --n 50000 --npz    # (N, H, W, 3) uint8 for evaluators; resumes
    torchrun --nproc_per_node 8 -- sample.py ... --npz                # every process makes its share

The same seed and arguments give the same bytes; image i depends on (seed, i) only: `--n 8` are the first 8 of
`--n 64`.
"""
import argparse
import os
import shutil
from types import SimpleNamespace

import torch
from tqdm import tqdm

from bands import check_bands
from common import (InputError, OneLineParser, autocast, command_line, digest, join_processes,
                    load_checkpoint, make_parts, number, pick_device, positive, rank_and_world, reading,
                    seed_number, whole_numbers)
from data import save_grid, save_npz
from diffusion import SAMPLERS
from far import FAR, FARConfig, any_ladder, sampling_defaults
from text import encode, load_encoder
from tokenizer import fingerprint, load_tokenizer, reconstruct, to_uint8

PRETRAINED = os.path.join(os.path.dirname(os.path.abspath(__file__)), "pretrained")
COLUMNS = 24                     # the most classes or prompts that a picture shows


# ---- a run, and images of it

def load_run(path, device="cpu", ema=True, build=FAR):
    """
    A trained run for sampling, from its folder or its far.pt with tokenizer.pt beside it; build(cfg) makes
    the model. -> model and tokenizer in eval mode, data (a dict, see train.about_data), encoder (see
    text.py), step, device, dtype and its folder, as attributes. InputError.
    """
    path = os.path.join(path, "far.pt") if os.path.isdir(path) else path
    if not os.path.exists(path):
        raise InputError(f"there is no run at {path}: give the folder that train.py wrote")
    checkpoint = load_checkpoint(path, "far")
    with reading(path):
        data, model = checkpoint["data"], build(FARConfig(**checkpoint["config"]))
        weights = checkpoint["ema" if ema or "model" not in checkpoint else "model"]
        model.load_state_dict({name: value.float() for name, value in weights.items()})
    folder = os.path.dirname(path)
    tokenizer = load_tokenizer(os.path.join(folder, "tokenizer.pt"))
    ours, theirs = (cfg.latent_dim * cfg.latent_size ** 2 for cfg in (model.cfg, tokenizer.cfg))
    if ours != theirs:
        raise InputError(f"the tokenizer.pt beside {path} makes other latents than the model reads")
    encoder = load_encoder(data["text"], device, data["text_dtype"]) if data.get("text") else None
    if encoder and encoder.fingerprint != data["text_fingerprint"]:
        raise InputError(f"{data['text']} has changed: it is not the text model that {path} was trained with")
    model = model.eval().requires_grad_(False).to(device)
    return SimpleNamespace(model=model, tokenizer=tokenizer.to(device), data=data, encoder=encoder,
                           step=checkpoint["step"], device=torch.device(device), dtype=checkpoint["dtype"],
                           folder=folder)


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
    Images of what is shown, class numbers or prompts (N of them), image i with the noise of (seed, first +
    i); `sampling` goes to FAR.sample. -> uint8 (N, c, S, S); with `every_band` a list of those, one per band.
    """
    rows, was_training = [], run.model.training
    run.model.eval()
    for i in range(0, len(shown), batch):
        part = shown[i:i + batch]
        if run.model.cfg.text_dim:
            condition = dict(text=tuple(t.to(run.device) for t in encode(run.encoder, part)))
        else:
            condition = dict(labels=torch.as_tensor(part, device=run.device))
        with autocast(run.device, run.dtype):
            bands = run.model.sample(**condition, seed=seed, first=first + i, **sampling,
                                     progress=bar.update if bar is not None else lambda: None)
        rows.append([decode(run, x) for x in (bands if every_band else bands[-1:])])
    run.model.train(was_training)
    images = [torch.cat(band) for band in zip(*rows)]
    return images if every_band else images[-1]


def sample_in_parts(run, shown, folder, seed=0, batch=64, **sampling):
    """
    Images of class numbers or prompts, uint8 (N, c, S, S), by way of files of 250 in `folder`: an interrupted
    call goes on, a longer one begins with them, several processes share the work; process 0 has the result.
    """
    def make(rows):
        return generate(run, shown[rows.start:rows.stop], seed, rows.start, batch, **sampling).numpy()

    parts = make_parts(folder, len(shown), make, "sampling", size=250, batch=batch)
    return torch.from_numpy(parts[range(len(shown))]) if rank_and_world()[0] == 0 else None


# ---- pictures

def draw_pictures(run, folder, seed=0, rows=4):
    """samples.png, a column per class or prompt; bands.png, a row per sample, a column per band."""
    columns, sampling = columns_of(run)[:COLUMNS], sampling_defaults(run.model.cfg)
    with tqdm(total=2 * len(sampling["bands"]), desc="pictures", unit="band", leave=False) as bar:
        images = generate(run, columns * rows, seed, batch=COLUMNS * rows, bar=bar, **sampling)
        save_grid(os.path.join(folder, "samples.png"), images, len(columns))
        ladder = generate(run, (columns * rows)[:8], seed, every_band=True, bar=bar, **sampling)
        save_bands(os.path.join(folder, "bands.png"), ladder)


def columns_of(run):
    """All that a run draws: class numbers, or the prompts that stand in its checkpoint."""
    return list(run.data["prompts"] if run.model.cfg.text_dim else range(len(run.data["class_names"])))


def save_bands(path, ladder):
    """ladder: for every band uint8 images (N, c, S, S) -> one row per image, one column per band."""
    save_grid(path, torch.stack(ladder, dim=1).flatten(0, 1), len(ladder))


def draw_reconstructions(run, data, path, n=12):
    """Originals over their reconstructions by the tokenizer."""
    images = data.batch(range(min(n, len(data))))
    save_grid(path, torch.cat([images, reconstruct(run.tokenizer, images)]), len(images))


# ---- the command line

def add_sampling_flags(parser):
    """The flags of every script that samples."""
    add = parser.add_argument
    add("--seed", type=seed_number, default=0, help="of the noise")
    add("--cfg", type=number, help="guidance, rising from 1 at the lowest band; 1 is none")
    add("--steps", type=whole_numbers, help="diffusion steps of all bands, or first and last: 40,100")
    add("--sampler", choices=SAMPLERS, help="of the diffusion head; by default the layout's")
    add("--temperature", type=number, help="scale of the noise: lower is plainer, higher is wilder")
    add("--bands", type=whole_numbers, help="the ladder to climb, e.g. 1,2,4,8; by default the model's")
    add("--no-ema", action="store_true", help="the raw weights instead of their average")
    add("--batch", type=positive, default=64, help="images at once")
    add("--device", help="cuda, mps or cpu; by default the best there is")
    add("--dtype", choices=("bf16", "fp32"), help="arithmetic; by default that of the training")


def sampling_settings(args, cfg):
    """Arguments of FAR.sample from the command line, else the model's defaults. InputError."""
    settings = sampling_defaults(cfg)
    for name in ("bands", "sampler", "steps", "cfg", "temperature"):
        if getattr(args, name) is not None:
            settings[name] = getattr(args, name)
    settings["steps"] = settings["steps"][0], settings["steps"][-1]          # one number is for all bands
    if max(settings["steps"]) > 1000:
        raise InputError("--steps must be between 1 and 1000, the steps of the training")
    if settings["cfg"] != 1 and cfg.label_drop == 0:
        raise InputError("--cfg needs a null condition, and this model was trained without one: use --cfg 1")
    try:
        check_bands(settings["bands"], cfg.latent_size)
    except ValueError as error:
        raise InputError(f"--bands: {error}")
    if settings["bands"] != cfg.bands and not any_ladder(cfg):
        known = ",".join(map(str, cfg.bands))
        raise InputError(f"--bands: this model was trained on {known} alone; other ladders can be climbed "
                         "where the head learns x and levels are drawn singly (--layout paper)")
    return settings


def what_to_draw(args, run):
    """Class numbers or prompts from --classes or --prompt; by default all. InputError."""
    if (args.prompt and not run.model.cfg.text_dim) or (args.classes and run.model.cfg.text_dim):
        way = "from text: use --prompt" if args.classes else "classes: use --classes"
        raise InputError(f"this model draws {way}")
    if args.prompt:
        return args.prompt
    names, chosen = run.data["class_names"], []
    for text in (args.classes or "").split(",") if args.classes else ():
        if text not in names and not (text.isascii() and text.isdigit() and int(text) < len(names)):
            raise InputError(f"--classes: {text!r} is neither a class nor a number below {len(names)}")
        chosen.append(names.index(text) if text in names else int(text))
    return chosen or columns_of(run)


def get_args(argv=None):
    parser = OneLineParser(prog="sample.py", description=__doc__,
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ckpt", default=PRETRAINED, help="a run's folder, or its far.pt; by default ours")
    add("--classes", help="names or numbers, e.g. bag,3; by default all")
    add("--prompt", nargs="+", metavar="TEXT", help="for text models")
    add("--n", type=positive, help="how many images, the classes or prompts in turn; by default 4 of each")
    add("--out", help="the picture; by default sample.png in the run's folder")
    add("--npz", action="store_true", help="also an npz: arr_0 (N, H, W, 3) uint8, arr_1 labels")
    add_sampling_flags(parser)
    return parser.parse_args(argv)


def save_all(run, args, what, n, out, settings):
    """
    OUT.npz of n images of `what` in turn, by several processes, and its labels: class numbers, or places of
    the prompts. The same weights, things to draw and settings go on where they were interrupted.
    """
    networks = fingerprint(run.model), fingerprint(run.tokenizer)
    parts = f"{out}.parts-{digest(networks, settings, what, args.seed, args.batch, run.dtype)}"
    turns = [i % len(what) for i in range(n)]
    images = sample_in_parts(run, [what[i] for i in turns], parts, args.seed, args.batch, **settings)
    if images is not None:
        save_npz(f"{out}.npz", images, turns if run.model.cfg.text_dim else [what[i] for i in turns])
        shutil.rmtree(parts)


def main(argv=None):
    args = get_args(argv)
    rank, _, device = join_processes(pick_device(args.device))
    run = load_run(args.ckpt, device, not args.no_ema)
    run.dtype = args.dtype or run.dtype
    settings, what = sampling_settings(args, run.model.cfg), what_to_draw(args, run)
    folder = "." if args.ckpt == PRETRAINED else run.folder
    out = (args.out or os.path.join(folder, "sample")).removesuffix(".png")
    os.makedirs(os.path.dirname(out) or ".", exist_ok=True)
    n = args.n or 4 * len(what)
    if args.npz:
        save_all(run, args, what, n, out, settings)
    if rank:
        return                                                   # the pictures are few: process 0 draws them
    columns = what[:COLUMNS]
    few = min(n, 4 * COLUMNS if len(what) > COLUMNS else 16 * len(columns))
    print(f"{n} images: " + ", ".join(f"{name} {value}" for name, value in settings.items()))
    if few < n:
        print(f"the picture shows {few} of them, of the first {len(columns)} of {len(what)}")
    with tqdm(total=-(-few // args.batch) * len(settings["bands"]), desc="pictures", unit="band") as bar:
        shown = [columns[i % len(columns)] for i in range(few)]
        ladder = generate(run, shown, args.seed, 0, args.batch, True, bar, **settings)
    save_grid(f"{out}.png", ladder[-1], min(len(columns), few))
    save_bands(f"{out}_bands.png", [images[:8] for images in ladder])
    names = [repr(c) if isinstance(c, str) else f"{c} {run.data['class_names'][c]}" for c in columns]
    print(f"columns: {', '.join(names)}\n"
          f"written: {f'{out}.npz, ' if args.npz else ''}{out}.png, {out}_bands.png")


if __name__ == "__main__":
    command_line(main)
