"""
Draw images from a trained run: a grid, what every band adds, an animation, or an npz for evaluators.

    python sample.py --ckpt runs/shapes_far_tiny                                  # a grid with one column per class
    python sample.py --ckpt runs/fashion_mnist_far_tiny --classes 3,7 --n 16 --cfg 2 --seed 1 --gif
    python sample.py --ckpt runs/cifar10_far_s --n 50000 --npz                    # (N, H, W, 3) uint8 for evaluators
    python sample.py --ckpt checkpoint-last.pth --tokenizer kl16.ckpt --classes 207,360 --cfg 3    # the authors' files

The same seed and arguments give the same bytes; image i depends on (seed, i) only, so `--n 8` are the first 8 of `--n 64`.
"""
import math
import os
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from common import InputError, OneLineParser, command_line, load_checkpoint, pick_device, write_atomically
from far import FAR, FARConfig, check_bands
from tokenizer import autocast, load_tokenizer, reconstruct, to_uint8


def load_run(path, device="cpu", ema=True, tokenizer=None):
    """
    A trained run for sampling: `path` is its folder or its far.pt, the tokenizer lies beside it unless given. Returns
    model and tokenizer in eval mode, data (dict: name, size, channels, class_names, ...) and step, as attributes.
    """
    path = os.path.join(path, "far.pt") if os.path.isdir(path) else path
    checkpoint = load_checkpoint(path, "far")
    model = FAR(FARConfig(**checkpoint["config"]))
    model.load_state_dict(checkpoint["ema" if ema else "model"])
    tokenizer = load_tokenizer(tokenizer or os.path.join(os.path.dirname(path), "tokenizer.pt"))
    check_fits(model.cfg, tokenizer.cfg)
    return SimpleNamespace(model=model.eval().to(device), tokenizer=tokenizer.eval().to(device), device=torch.device(device),
                           data=checkpoint["data"], step=checkpoint["step"], dtype="fp32")


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


def generate(run, labels=None, text=None, seed=0, first=0, batch=64, every_band=False, bar=None, **sampling):
    """
    Images for labels LongTensor (N,) or text (vectors, visible), image i with the noise of (seed, first + i); `sampling`
    goes to FAR.sample. -> uint8 (N, c, S, S); with `every_band` a list of those, one per band.
    """
    n = len(labels if text is None else text[0])
    rows = []
    for i in range(0, n, batch):
        part = slice(i, i + batch)
        with autocast(run.device, run.dtype):
            ladder = run.model.sample(
                labels=None if labels is None else labels[part].to(run.device),
                text=None if text is None else tuple(t[part].to(run.device) for t in text),
                seed=seed, first=first + i, progress=(lambda: bar.update(1)) if bar is not None else (lambda: None), **sampling)
        rows.append([decode(run, x) for x in (ladder if every_band else ladder[-1:])])
    bands = [torch.cat(band) for band in zip(*rows)]
    return bands if every_band else bands[-1]


def to_rgb(images):
    """uint8 (N, c, S, S), grey or colour -> (N, S, S, 3)."""
    return images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous().numpy()


def save_grid(path, images, columns, scale=2):
    """Write uint8 images (N, c, S, S) as one PNG, `columns` to a row, with a thin gap, enlarged `scale` times."""
    rgb = to_rgb(images)
    n, size = len(rgb), rgb.shape[1]
    rows = math.ceil(n / columns)
    canvas = np.full((rows * (size + 1) - 1, columns * (size + 1) - 1, 3), 255, np.uint8)
    for i, image in enumerate(rgb):
        y, x = i // columns * (size + 1), i % columns * (size + 1)
        canvas[y:y + size, x:x + size] = image
    picture = Image.fromarray(canvas).resize((canvas.shape[1] * scale, canvas.shape[0] * scale), Image.NEAREST)
    write_atomically(path, lambda file: picture.save(file, format="PNG"))


def columns_of(run, most=24):
    """The classes that a picture shows, one column each."""
    return list(range(min(len(run.data["class_names"]), most)))


def save_samples(run, folder, rows=6, seed=0, **sampling):
    """samples.png, one column per class, and bands.png, one sample per row and one band per column, coarse to fine."""
    classes = columns_of(run)
    labels = torch.tensor(classes * rows)
    save_grid(os.path.join(folder, "samples.png"), generate(run, labels, seed=seed, **sampling), len(classes))
    few = labels[:min(8, len(labels))]
    save_bands(os.path.join(folder, "bands.png"), generate(run, few, seed=seed, every_band=True, **sampling))


def save_bands(path, ladder):
    """ladder: for every band uint8 images (N, c, S, S) -> one row per image, one column per band."""
    save_grid(path, torch.stack(ladder, dim=1).flatten(0, 1), len(ladder))


def save_reconstructions(run, data, path, n=12):
    """Originals over their reconstructions by the tokenizer."""
    images = data.batch(range(min(n, len(data))))
    save_grid(path, torch.cat([images, reconstruct(run.tokenizer, images)]), len(images))
