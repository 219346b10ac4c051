"""
The tokenizer: a continuous KL autoencoder. An image becomes a small square grid of continuous tokens, and back.

    python tokenizer.py --data fashion_mnist                  # train one, print its PSNR on held-out images
    python tokenizer.py --data my_photos --size 256           # a folder of images; the stride follows the size
    python train.py ...                                       # trains a missing tokenizer by itself

The network is latent diffusion's AutoencoderKL (Rombach et al. 2022, appendix G), so that the published KL-16 file
(`kl16.ckpt`) loads into the same class; `patch` folds pixels into channels first, which is what makes a small one
train in minutes on a CPU.

Shapes: B images, S side of the image, C latent channels, H = S / stride side of the latent grid, c image channels.
"""
import argparse
import functools
import hashlib
import math
import os
import shutil
import time
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from common import (InputError, OneLineParser, barrier, check_fields, command_line, load_checkpoint, loader_threads, pick_device,
                    prefetch, rank_and_world, save_checkpoint, seed_number)
from data import load_data, reading
from far import both_axes, lowpass_matrices


@dataclass
class TokenizerConfig:
    image_channels: int = 3         # 1 for grey images, 3 for colour
    image_size: int = 32            # the side it was trained for
    patch: int = 2                  # pixels folded into channels before the first convolution: patch x patch
    width: int = 64                 # channels of the first level
    mult: tuple = (1, 2)            # width multiplier per level; every level after the first halves the side
    n_res: int = 1                  # residual blocks per level of the encoder; the decoder has one more
    latent_dim: int = 4             # C
    level_attention: bool = False   # attention in the encoder's last level too (the published KL-16)
    equivariant: bool = False       # a band of the latent is that band of the image (see AutoencoderKL.loss)
    shortcut: bool = True           # a linear path around encoder and decoder: what a patch-wise PCA does is not relearned

    @property
    def stride(self):
        return self.patch * 2 ** (len(self.mult) - 1)

    @property
    def latent_size(self):
        return self.image_size // self.stride

    def __post_init__(self):
        self.mult = tuple(self.mult)
        check_fields(self)
        if not (self.mult and min(self.image_channels, self.patch, self.width, self.latent_dim, *self.mult) > 0
                and len(self.mult) <= 16 and self.n_res <= 1000):
            raise ValueError(f"no network has {self}")
        if self.image_size % self.stride:
            raise InputError(f"an image size of {self.image_size} is not a multiple of the tokenizer's stride {self.stride}")


def group_norm(channels):
    return nn.GroupNorm(math.gcd(32, channels), channels, eps=1e-6)


class ResBlock(nn.Module):
    """Norm - SiLU - 3x3 convolution, twice, plus the input."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.norm1, self.conv1 = group_norm(n_in), nn.Conv2d(n_in, n_out, 3, padding=1)
        self.norm2, self.conv2 = group_norm(n_out), nn.Conv2d(n_out, n_out, 3, padding=1)
        if n_in != n_out:
            self.nin_shortcut = nn.Conv2d(n_in, n_out, 1)

    def forward(self, x):
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return y + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """Single-head attention among all positions of the map."""

    def __init__(self, n):
        super().__init__()
        self.norm = group_norm(n)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(n, n, 1) for _ in range(4))

    def forward(self, x):
        y = self.norm(x)
        q, k, v = (f(y).flatten(2).transpose(1, 2) for f in (self.q, self.k, self.v))        # (B, HW, n)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)         # (B, n, H, W)
        return x + self.proj_out(y)


class Resample(nn.Module):
    """Halve the side by a strided convolution, or double it by nearest neighbours and a convolution."""

    def __init__(self, n, up):
        super().__init__()
        self.up = up
        self.conv = nn.Conv2d(n, n, 3, padding=1) if up else nn.Conv2d(n, n, 3, stride=2)

    def forward(self, x):
        # the published files were trained with padding on the right and bottom only
        return self.conv(F.interpolate(x, scale_factor=2.0) if self.up else F.pad(x, (0, 1, 0, 1)))


def middle(n):
    return nn.ModuleDict(dict(block_1=ResBlock(n, n), attn_1=AttnBlock(n), block_2=ResBlock(n, n)))


def position_map(n, side):
    """Learned positions: without them convolutions could not turn one vector, the lowest band, into places."""
    return nn.Parameter(torch.zeros(1, n, side, side))


class Encoder(nn.Module):
    """Image to the mean and log-variance of its latent."""

    def __init__(self, cfg):
        super().__init__()
        width = [cfg.width * m for m in cfg.mult]
        self.conv_in = nn.Conv2d(cfg.image_channels * cfg.patch ** 2, width[0], 3, padding=1)
        self.position = position_map(width[0], cfg.image_size // cfg.patch) if cfg.equivariant else 0
        self.down = nn.ModuleList()
        for i, n in enumerate(width):
            last = i == len(width) - 1
            level = nn.ModuleDict(dict(
                block=nn.ModuleList(ResBlock(n if j else width[max(i - 1, 0)], n) for j in range(cfg.n_res))))
            if last and cfg.level_attention:
                level["attn"] = nn.ModuleList(AttnBlock(n) for _ in range(cfg.n_res))
            if not last:
                level["downsample"] = Resample(n, up=False)
            self.down.append(level)
        self.mid = middle(n)
        self.norm_out, self.conv_out = group_norm(n), nn.Conv2d(n, 2 * cfg.latent_dim, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x) + self.position
        for level in self.down:
            for j, block in enumerate(level["block"]):
                x = block(x)
                x = level["attn"][j](x) if "attn" in level else x
            x = level["downsample"](x) if "downsample" in level else x
        x = self.mid["block_2"](self.mid["attn_1"](self.mid["block_1"](x)))
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """Latent to image. Levels are stored lowest resolution last, as in the published files."""

    def __init__(self, cfg):
        super().__init__()
        width = [cfg.width * m for m in cfg.mult]
        self.conv_in = nn.Conv2d(cfg.latent_dim, width[-1], 3, padding=1)
        self.position = position_map(width[-1], cfg.latent_size) if cfg.equivariant else 0
        self.mid = middle(width[-1])
        self.up = nn.ModuleList()
        for i, n in enumerate(width):
            n_in = width[min(i + 1, len(width) - 1)]                 # what the level below hands over
            level = nn.ModuleDict(dict(
                block=nn.ModuleList(ResBlock(n if j else n_in, n) for j in range(cfg.n_res + 1))))
            if i:
                level["upsample"] = Resample(n, up=True)
            self.up.append(level)
        self.norm_out = group_norm(width[0])
        self.conv_out = nn.Conv2d(width[0], cfg.image_channels * cfg.patch ** 2, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x) + self.position
        x = self.mid["block_2"](self.mid["attn_1"](self.mid["block_1"](x)))
        for level in reversed(self.up):
            for block in level["block"]:
                x = block(x)
            x = level["upsample"](x) if "upsample" in level else x
        return self.conv_out(F.silu(self.norm_out(x)))


class AutoencoderKL(nn.Module):
    """The tokenizer. `latent_scale` turns its latents into the unit-variance x of the rest of the code."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.encoder, self.decoder = Encoder(cfg), Decoder(cfg)
        self.quant_conv = nn.Conv2d(2 * cfg.latent_dim, 2 * cfg.latent_dim, 1)
        self.post_quant_conv = nn.Conv2d(cfg.latent_dim, cfg.latent_dim, 1)
        if cfg.shortcut:
            n = cfg.image_channels * cfg.stride ** 2
            self.shortcut_in, self.shortcut_out = nn.Conv2d(n, cfg.latent_dim, 1), nn.Conv2d(cfg.latent_dim, n, 1)
        self.register_buffer("latent_scale", torch.ones(()), persistent=False)

    def encode(self, image):
        """image (B, c, S, S) in [-1, 1] -> mean and log-variance of the latent, each (B, C, H, H), not scaled."""
        x = F.pixel_unshuffle(image, self.cfg.patch)                              # (B, c patch^2, S/patch, S/patch)
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)           # (B, C, H, H) each
        if self.cfg.shortcut:
            mean = mean + self.shortcut_in(F.pixel_unshuffle(image, self.cfg.stride))
        return mean, logvar.clamp(-30, 20)

    def decode(self, latent):
        """latent (B, C, H, H), not scaled -> image (B, c, S, S), about [-1, 1]."""
        image = F.pixel_shuffle(self.decoder(self.post_quant_conv(latent)), self.cfg.patch)
        return image + F.pixel_shuffle(self.shortcut_out(latent), self.cfg.stride) if self.cfg.shortcut else image

    def loss(self, image, noise, kl_weight, k=None, decoder_only=False):
        """
        Mean absolute error plus `kl_weight` times the Kullback-Leibler divergence of the latent from a unit Gaussian,
        both per pixel (Kingma & Welling 2014; Rombach et al. 2022 eq. 25 without its adversarial term). With k (B,), the
        frequencies per axis of each latent to keep, 1..H, latent and image are compared after the same low-pass: so a
        band of the latent becomes that band of the image (scale equivariance, Skorokhodov et al. 2025, arXiv 2502.14831).
        image (B, c, S, S); noise (B, C, H, H), unit normal. Returns (loss, error, KL per latent number).
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not decoder_only):
            mean, logvar = self.encode(image)
            mean, logvar = mean.float(), logvar.float()
            latent = mean + (0.5 * logvar).exp() * noise
        if k is not None:
            latent, image = keep_frequencies(latent, k), keep_frequencies(image, k, self.cfg.stride)
        error = (self.decode(latent).float() - image).abs().mean()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar)
        return error + kl_weight * kl.sum() / image.numel(), error, kl.mean()


@functools.cache
def axis_lowpasses(size, unit):
    """The low-passes of an axis that keep unit, 2 unit, ..., size frequencies: (size / unit, size, size)."""
    pairs = (lowpass_matrices(size, k, "spatial") for k in range(unit, size + 1, unit))
    return torch.stack([up @ down for down, up in pairs])


def keep_frequencies(x, k, unit=1):
    """The spatial low-pass of far.py, image by image: x (B, c, S, S) with k * unit frequencies per axis; k (B,), from 1."""
    with torch.autocast(x.device.type, enabled=False):
        return both_axes(axis_lowpasses(x.shape[-1], unit).to(x.device)[k - 1][:, None], x.float())


def default_config(image_size, image_channels, stride=None, latent_dim=None, captions=False):
    """
    The tokenizer for an image size. Up to 64 px: a small one that trains in minutes on two CPU cores, stride 8. Above:
    the published KL-16 network, stride 16, for a GPU. The small one is equivariant for captioned pictures: where several
    things have places, the lowest band must know them. Raises InputError on a stride that is not there or does not divide.
    """
    stride = stride or (8 if image_size <= 64 else 16)
    if stride not in (4, 8, 16):
        raise InputError(f"--stride is 4, 8 or 16, not {stride}")
    if stride == 16 and image_size > 64:
        shape = dict(patch=1, width=128, mult=(1, 1, 2, 2, 4), n_res=2, latent_dim=latent_dim or 16, level_attention=True,
                     shortcut=False)
    else:
        # few rich tokens: on Fashion-MNIST 4 x 4 x 32 latents train FAR to half the Frechet distance of 8 x 8 x 8 ones
        channels = {4: 8, 8: 32 if image_channels == 1 else 64, 16: 64}[stride]                   # a colour token says more
        shape = dict(patch=stride, width=64 if stride == 4 else 128, mult=(1,), latent_dim=latent_dim or channels,
                     equivariant=captions)
    return TokenizerConfig(image_channels=image_channels, image_size=image_size, **shape)


def to_unit(images):
    """uint8 (B, c, S, S) -> float in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images):
    """float (B, c, S, S), about [-1, 1] -> uint8, rounded and clipped."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def psnr(a, b):
    """Peak signal-to-noise ratio in dB between uint8 images a and b, each (B, c, S, S), over all of them at once."""
    return 10 * math.log10(255 ** 2 / max((a.double() - b.double()).square().mean().item(), 1e-10))


def step_generator(seed, step, device="cpu"):
    """The random numbers of one step: a function of (seed, step) alone, so a resumed run draws what an unbroken one does."""
    return torch.Generator(device).manual_seed(seed * 1_000_003 + step)


def epoch_indices(start, count, n, seed):
    """`count` indices from position `start` of an endless stream of shuffled epochs over n images. LongTensor (count,)."""
    parts = []
    while count > 0:
        epoch, offset = divmod(start, n)
        order = torch.randperm(n, generator=step_generator(seed, epoch))[offset:offset + count]
        parts.append(order)
        start, count = start + len(order), count - len(order)
    return torch.cat(parts)


def autocast(device, dtype):
    """bf16 arithmetic where it is safe (dtype "bf16"), or none ("fp32"). fp16 is not offered: it gives black images."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype == "bf16")


def faster_dtype(device):
    """
    "bf16" or "fp32", whichever runs a linear layer forward and backward faster here: processors with bf16 arithmetic
    gain a factor of 3, older ones lose. On a GPU bf16 if it has it.
    """
    device = torch.device(device)
    if device.type != "cpu":
        return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    seconds = {}
    for dtype in ("bf16", "fp32"):
        kind = torch.bfloat16 if dtype == "bf16" else torch.float32
        layer, x = nn.Linear(256, 1024).to(kind), torch.randn(2048, 256, dtype=kind)
        times = []
        for _ in range(4):
            start = time.perf_counter()
            layer(x).sum().backward()
            times.append(time.perf_counter() - start)
        seconds[dtype] = min(times)
    return "bf16" if seconds["bf16"] < 0.8 * seconds["fp32"] else "fp32"


@torch.inference_mode()
def reconstruct(tokenizer, images, dtype="fp32"):
    """uint8 (B, c, S, S) through the tokenizer and back, by the latent's mean, as uint8."""
    device = tokenizer.latent_scale.device
    with autocast(device, dtype):
        return to_uint8(tokenizer.decode(tokenizer.encode(to_unit(images.to(device)))[0])).cpu()


@torch.inference_mode()
def measure_latent_scale(tokenizer, data, seed=0, n=2048):
    """1 / standard deviation of latents drawn for n training images: what makes x have unit variance (Rombach et al. 2022, G)."""
    generator, square, mean = step_generator(seed, 1), [], []
    for i in epoch_indices(0, min(n, len(data)), len(data), seed).split(128):
        mu, logvar = tokenizer.encode(to_unit(data.batch(i).to(tokenizer.latent_scale.device)))
        latent = mu + (0.5 * logvar).exp() * torch.randn(mu.shape, generator=generator).to(mu)
        square.append(latent.double().square().mean().item() * len(i))
        mean.append(latent.double().mean().item() * len(i))
    n = min(n, len(data))
    return 1 / math.sqrt(sum(square) / n - (sum(mean) / n) ** 2)


def load_tokenizer(path):
    """A tokenizer in eval mode from our tokenizer.pt or from the published kl16.ckpt. Raises InputError."""
    content = load_checkpoint(path)
    with reading(path):
        if isinstance(content, dict) and content.get("kind") == "tokenizer":
            if content["step"] < content["steps"]:
                raise InputError(f"the training of {path} was interrupted at step {content['step']} of {content['steps']}: "
                                 "run the command that trained it again to finish it")
            tokenizer = build(AutoencoderKL, TokenizerConfig(**content["config"]), content["model"], path)
            tokenizer.latent_scale.fill_(content["latent_scale"])
        else:
            tokenizer = load_published(content, path)
        if not 0 < tokenizer.latent_scale.item() < math.inf:
            raise ValueError(f"its latent scale is {tokenizer.latent_scale.item()}")
    return tokenizer.eval().requires_grad_(False)


def load_published(content, path):
    """The authors' KL-16 file: sizes are read from its tensors; the latent scale 0.2325 is the one they trained FAR with."""
    weights = content.get("model") if isinstance(content, dict) else None
    if not isinstance(weights, dict) or "encoder.conv_in.weight" not in weights:
        raise InputError(f"{path} is neither a tokenizer of this program nor the published KL-16 file")
    width = weights["encoder.conv_in.weight"].shape[0]
    levels = len({name.split(".")[2] for name in weights if name.startswith("encoder.down.")})
    tokenizer = AutoencoderKL(TokenizerConfig(
        image_channels=weights["encoder.conv_in.weight"].shape[1], image_size=16 * 2 ** (levels - 1), patch=1, width=width,
        mult=tuple(weights[f"encoder.down.{i}.block.0.conv2.weight"].shape[0] // width for i in range(levels)),
        n_res=len({name.split(".")[4] for name in weights if name.startswith("encoder.down.0.block.")}),
        latent_dim=weights["post_quant_conv.weight"].shape[0],
        level_attention=f"encoder.down.{levels - 1}.attn.0.q.weight" in weights, shortcut=False))
    load_exactly(tokenizer, weights, path)
    tokenizer.latent_scale.fill_(0.2325)
    return tokenizer


def build(kind, cfg, weights, path):
    """A network kind(cfg) with these weights. It is first made without memory, to see whether they fit. Raises InputError."""
    with torch.device("meta"):
        check_weights(kind(cfg), weights, path)
    network = kind(cfg)
    network.load_state_dict(weights)
    return network


def load_exactly(module, weights, path):
    """load_state_dict after `check_weights`."""
    check_weights(module, weights, path)
    module.load_state_dict(weights)


def check_weights(module, weights, path):
    """Raise an InputError that names what is missing, unexpected, of another shape or not finite, in one line."""
    if not (isinstance(weights, dict) and all(torch.is_tensor(value) for value in weights.values())):
        raise InputError(f"{path} does not fit: its weights are not tensors by name")
    have = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    given = {name: tuple(value.shape) for name, value in weights.items()}
    wrong = [f"missing {n}" for n in have if n not in given] + [f"unexpected {n}" for n in given if n not in have] + \
            [f"{n} is {given[n]}, not {have[n]}" for n in have if n in given and given[n] != have[n]] + \
            [f"{n} is not finite" for n, value in weights.items() if not torch.isfinite(value).all()]
    if wrong:
        raise InputError(f"{path} does not fit: {'; '.join(wrong[:8])}{f' and {len(wrong) - 8} more' if len(wrong) > 8 else ''}")


def tokenizer_path(data_dir, data, cfg, steps):
    """Where the tokenizer of a data set, size, shape and length of training is kept: train.py and tokenizer.py share it."""
    name = f"tokenizer_{data.name}_{data.size}_{data.fingerprint}_s{cfg.stride}c{cfg.latent_dim}_{steps}.pt"
    return os.path.join(data_dir, name)


def is_trained(path):
    """Whether there is a finished tokenizer of ours at `path`."""
    if not os.path.exists(path):
        return False
    content = load_checkpoint(path, "tokenizer")
    with reading(path):
        return content["step"] == content["steps"]


def save_tokenizer(path, tokenizer, **more):
    """Write a finished tokenizer where `load_tokenizer` reads it, with `more` plain entries."""
    content = dict(kind="tokenizer", config=asdict(tokenizer.cfg), step=0, steps=0, **more)
    save_checkpoint(path, dict(content, model=tokenizer.state_dict(), latent_scale=tokenizer.latent_scale.item()))


STEPS = 2500
# Of an equivariant tokenizer: the share of images compared after a low-pass, at first; it falls to 0 while encoder and
# decoder learn together, and for the rest of the steps the decoder learns alone, whole images only.
LOWPASSED, TOGETHER = 0.6, 0.7


def train_tokenizer(data, cfg, path, steps=STEPS, batch=None, lr=None, kl_weight=1e-2, seed=0, device="cpu", dtype="fp32",
                    save_every=500):
    """
    Train a tokenizer on `data` and leave it at `path`, with its latent scale. An interrupted training continues from
    its last save, bit for bit on a CPU. Prints the PSNR of held-out images at the end.
    """
    torch.manual_seed(seed)
    tokenizer = AutoencoderKL(cfg).to(device)
    default_batch, default_lr = (32, 4e-3) if cfg.shortcut else (8, 2e-4)                        # the small network, the published
    batch, lr = batch or default_batch, lr or default_lr
    optimizer = torch.optim.AdamW(tokenizer.parameters(), lr, betas=(0.9, 0.99), weight_decay=0.01)
    about = dict(name=data.name, size=data.size, channels=data.channels, fingerprint=data.fingerprint)
    identity = dict(config=asdict(cfg), data=about, steps=steps, batch=batch, lr=lr, kl_weight=kl_weight, seed=seed)
    start = 0
    if os.path.exists(path):
        before = load_checkpoint(path, "tokenizer")
        with reading(path):
            if any(before[key] != value for key, value in identity.items()):
                raise InputError(f"{path} belongs to another tokenizer training; choose another place or delete it")
            tokenizer.load_state_dict(before["model"])
            optimizer.load_state_dict(before["optimizer"])
            start = before["step"]
    batches = prefetch(data.batch, (epoch_indices(step * batch, batch, len(data), seed) for step in range(start, steps)))
    bar = tqdm(zip(range(start, steps), batches), initial=start, total=steps, desc="tokenizer", unit="step")
    for step, images in bar:
        rate = lr * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        images = to_unit(images.to(device))
        generator = step_generator(seed, step, device)
        if data.flip:
            mirror = torch.rand(len(images), 1, 1, 1, generator=generator, device=device) < 0.5
            images = torch.where(mirror, images.flip(-1), images)
        noise = torch.randn(len(images), cfg.latent_dim, cfg.latent_size, cfg.latent_size, generator=generator, device=device)
        k, together = None, not cfg.equivariant or step < TOGETHER * steps
        if cfg.equivariant and together:
            u = torch.rand(2, len(images), generator=generator, device=device)
            share = LOWPASSED * (1 - step / (TOGETHER * steps))
            k = torch.where(u[0] < share, (1 + u[1] * (cfg.latent_size - 1)).long(), cfg.latent_size)
        with autocast(device, dtype):
            loss, error, kl = tokenizer.loss(images, noise, kl_weight, k, decoder_only=not together)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(tokenizer.parameters(), 1.0)
        if not torch.isfinite(norm):
            indices = epoch_indices(step * batch, batch, len(data), seed).tolist()
            raise InputError(f"the tokenizer's loss or its gradient is not finite at step {step} (images {indices[:8]}...): "
                             f"try --dtype fp32, or a lower learning rate; {path} holds what was saved before, if anything")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 20 == 0:
            bar.set_postfix_str(f"L1 {error.item():.4f} KL {kl.item():.2f}", refresh=False)
        if (step + 1) % save_every == 0 or step + 1 == steps:
            done = step + 1 == steps
            scale = measure_latent_scale(tokenizer.eval(), data, seed) if done else 1.0
            tokenizer.latent_scale.fill_(scale)
            save_checkpoint(path, dict(kind="tokenizer", **identity, model=tokenizer.state_dict(), step=step + 1,
                                       optimizer=None if done else optimizer.state_dict(), latent_scale=scale))
            tokenizer.train()
    return tokenizer.eval().requires_grad_(False)


def held_out_psnr(tokenizer, data, n=1000, dtype="fp32"):
    """PSNR in dB of up to n images of `data` (a test split) through the tokenizer."""
    parts = torch.arange(min(n, len(data))).split(100)
    images = torch.cat([data.batch(i) for i in parts])
    return psnr(images, torch.cat([reconstruct(tokenizer, part, dtype) for part in images.split(100)]))


def fingerprint(tokenizer):
    """12 characters that change when any weight of the tokenizer does."""
    digest = hashlib.sha256()
    for name, value in tokenizer.state_dict().items():
        digest.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


@torch.inference_mode()
def cache_latents(tokenizer, data, folder, device="cpu", dtype="fp32", batch=128, flush_every=16):
    """
    Encode the data set once: a float16 memory map (N, views, 2, C, H, H) of means and log-variances, `views` 2 where a
    mirrored image is as good (then the mirrored one is the second), else 1. Its name carries the fingerprints of data
    and tokenizer and the arithmetic, so a changed one is noticed. Memory does not grow with N. An interrupted caching
    continues, and several processes share the work: parts of flush_every batches, each noted in a folder once it is on the
    disk.
    """
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, f"latents_{data.name}_{data.size}_{data.fingerprint}_{fingerprint(tokenizer)}_{dtype}.npy")
    if os.path.exists(path):
        return np.load(path, mmap_mode="r")
    views, size = 2 if data.flip else 1, tokenizer.cfg.latent_size
    shape, partial, done = (len(data), views, 2, tokenizer.cfg.latent_dim, size, size), f"{path}.partial", f"{path}.done"
    rank, world = rank_and_world()
    parts = torch.arange(len(data)).split(batch * flush_every)
    note = lambda part: os.path.join(done, f"{part[0]}-{part[-1]}")
    if rank == 0:
        if not (os.path.isdir(done) and os.path.exists(partial)):
            shutil.rmtree(done, ignore_errors=True)
            np.lib.format.open_memmap(partial, "w+", np.float16, shape)  # the header, and room for the rest
            os.makedirs(done)
    barrier()
    offset, row = np.load(partial, mmap_mode="r").offset, math.prod(shape[1:]) * 2        # bytes: of the header, of an image
    mine = [part for part in parts[rank::world] if not os.path.exists(note(part))]
    batches = [indices for part in mine for indices in part.split(batch)]
    ends = {int(part[-1]): part for part in mine}
    bar = tqdm(total=sum(map(len, parts[rank::world])), initial=sum(map(len, parts[rank::world])) - sum(map(len, mine)),
               desc="latents", unit="img", disable=rank > 0)
    with open(partial, "r+b") as file:
        for indices, images in zip(batches, prefetch(data.batch, batches)):
            images = to_unit(images.to(device))
            with autocast(device, dtype):
                moments = torch.stack([torch.stack(tokenizer.encode(images.flip(-1) if view else images), dim=1)
                                       for view in range(views)], dim=1).half().cpu()    # (B, views, 2, C, H, H)
            if not torch.isfinite(moments).all():
                raise InputError(f"the tokenizer gives non-finite latents for images {indices[0]} to {indices[-1]} of {data.name}: "
                                 "try --dtype fp32, or train it anew")
            try:                                   # written, not mapped: a full disk is then an error, not a crash
                file.seek(offset + int(indices[0]) * row)
                file.write(moments.numpy().tobytes())
                if int(indices[-1]) in ends:
                    file.flush()
                    os.fsync(file.fileno())
                    open(note(ends[int(indices[-1])]), "w").close()
            except OSError as error:
                raise InputError(f"could not write {partial} ({error.strerror}); make room, the same command continues")
            bar.update(len(indices))
    bar.close()
    barrier()
    if rank == 0:
        os.replace(partial, path)
        shutil.rmtree(done, ignore_errors=True)
    barrier()
    return np.load(path, mmap_mode="r")


def main():
    parser = OneLineParser(prog="tokenizer.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", default="shapes", help="shapes, fashion_mnist, cifar10, imagenet64, or a folder of images")
    add("--size", type=int, help="side of the images in pixels; by default the data's own")
    add("--data-dir", default="data", help="where data sets and tokenizers are kept")
    add("--skip-bad", action="store_true", help="leave out images that cannot be read (counted) instead of stopping")
    add("--stride", type=int, help="pixels per token side: 4, 8 or 16; by default it follows the size")
    add("--latent-dim", type=int, help="channels of a token; by default 8, 32 or 64 for stride 4, 8, 16")
    add("--steps", type=int, default=STEPS, help="optimizer steps")
    add("--batch", type=int, help="images per step; by default 32, 8 for the large network above 64 px")
    add("--lr", type=float, help="learning rate; by default 4e-3, 2e-4 for the large network above 64 px")
    add("--kl-weight", type=float, default=1e-2, help="of the divergence from a unit Gaussian, per pixel")
    add("--seed", type=seed_number, default=0, help="of weights, order and noise")
    add("--device", help="cuda, mps or cpu; by default the best there is")
    add("--dtype", choices=("bf16", "fp32"), help="arithmetic of the network; by default the faster one here")
    add("--out", help="the file to write; by default where train.py looks for it, in the data folder")
    args = parser.parse_args()
    device = pick_device(args.device)
    args.dtype = args.dtype or faster_dtype(device)
    data, held_out = (load_data(args.data, args.size, args.data_dir, split, args.skip_bad, workers=loader_threads())
                      for split in ("train", "test"))
    cfg = default_config(data.size, data.channels, args.stride, args.latent_dim, bool(data.captions))
    path = args.out or tokenizer_path(args.data_dir, data, cfg, args.steps)
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    print(f"{data.name}: {len(data):,} images of {data.size} px -> {cfg.latent_size} x {cfg.latent_size} tokens of {cfg.latent_dim}")
    if is_trained(path):
        tokenizer = load_tokenizer(path).to(device)
        print("it is already trained")
    else:
        tokenizer = train_tokenizer(data, cfg, path, args.steps, args.batch, args.lr, args.kl_weight, args.seed, device,
                                    args.dtype)
    print(f"PSNR on held-out images: {held_out_psnr(tokenizer, held_out, dtype=args.dtype):.2f} dB\n"
          f"latent scale {tokenizer.latent_scale.item():.4f}\nwritten: {path}")


if __name__ == "__main__":
    command_line(main)
