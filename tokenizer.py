"""
The tokenizer, a continuous KL autoencoder: an image becomes a small grid of continuous tokens, and back.

    python tokenizer.py --data fashion_mnist        # train one, print its PSNR on held-out images
    python train.py ...                             # trains a missing tokenizer by itself

The network is latent diffusion's AutoencoderKL (Rombach et al. 2022, appendix G), so that the published KL-16
(`kl16.ckpt`) loads into the same class. The small ones, which train in minutes on a CPU, are the same without
its levels: they fold all pixels of a token into channels first.

Shapes: B images, S side of the image, c image channels, C latent channels, H = S / stride side of the grid.
"""
import argparse
import functools
import hashlib
import math
import os
import time
from collections import OrderedDict
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from bands import both_axes, lowpass_matrices
from common import (InputError, OneLineParser, autocast, command_line, digest, epochs, faster_dtype,
                    load_checkpoint, make_parts, only_one, pick_device, positive, prefetch, reading,
                    seed_number, step_generator, write_atomically)
from data import load_data


@dataclass
class TokenizerConfig:
    image_channels: int = 3        # c: 1 for grey images, 3 for colour
    image_size: int = 32           # S that it was trained for
    stride: int = 8                # pixels per token and axis
    latent_dim: int = 64           # C
    width: int = 128               # channels of the first level
    published: bool = False        # the published network: levels that halve the side four times
    equivariant: bool = False      # a band of the latent is that band of the image, see `autoencoder_loss`

    def __post_init__(self):
        if self.image_size % self.stride:
            raise InputError(f"an image size of {self.image_size} is not a multiple of the tokenizer's "
                             f"stride {self.stride}")

    @property
    def latent_size(self):
        return self.image_size // self.stride

    @property
    def batch(self):
        return 8 if self.published else 32                       # images per training step

    @property
    def steps(self):
        return 2500 if self.published or self.equivariant else 400       # optimizer steps of a training


def default_config(size, channels, stride=None, latent_dim=None, captions=False):
    """
    The tokenizer for an image size: up to 64 px a small one, above the published network, for a GPU. For
    captioned pictures the small one is equivariant: the lowest band must know where several things are.
    """
    stride = stride or (8 if size <= 64 else 16)
    if stride == 16 and size > 64:
        return TokenizerConfig(channels, size, 16, latent_dim or 16, published=True)
    # few rich tokens: on Fashion-MNIST 4 x 4 x 32 latents train FAR to half the distance of 8 x 8 x 8 ones
    dims = {4: 8, 8: 32 if channels == 1 else 64, 16: 64}
    width = 64 if stride == 4 else 128
    return TokenizerConfig(channels, size, stride, latent_dim or dims[stride], width, equivariant=captions)


# ---- the network

def group_norm(n):
    return nn.GroupNorm(math.gcd(32, n), n, eps=1e-6)


class ResBlock(nn.Module):
    """Norm - SiLU - 3x3 convolution, twice, plus the input."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.norm1, self.conv1 = group_norm(n_in), nn.Conv2d(n_in, n_out, 3, padding=1)
        self.norm2, self.conv2 = group_norm(n_out), nn.Conv2d(n_out, n_out, 3, padding=1)
        self.nin_shortcut = nn.Identity() if n_in == n_out else nn.Conv2d(n_in, n_out, 1)

    def forward(self, x):
        y = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(y)))


class AttnBlock(nn.Module):
    """Single-head attention among all positions of the map."""

    def __init__(self, n):
        super().__init__()
        self.norm = group_norm(n)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(n, n, 1) for _ in range(4))

    def forward(self, x):
        y = self.norm(x)
        q, k, v = (f(y).flatten(2).mT for f in (self.q, self.k, self.v))                  # (B, HW, n) each
        y = F.scaled_dot_product_attention(q, k, v).mT.reshape(x.shape)                   # (B, n, H, W)
        return x + self.proj_out(y)


def middle(n):
    """The lowest resolution of both networks."""
    return nn.Sequential(OrderedDict(block_1=ResBlock(n, n), attn_1=AttnBlock(n), block_2=ResBlock(n, n)))


def levels(cfg):
    """Channels of every level, highest resolution first, and residual blocks in each of the encoder's."""
    return ([cfg.width * m for m in (1, 1, 2, 2, 4)], 2) if cfg.published else ([cfg.width], 1)


def positions(cfg, n):
    """Learned: without them convolutions could not make several places of one vector, the lowest band."""
    return nn.Parameter(torch.zeros(1, n, cfg.latent_size, cfg.latent_size)) if cfg.equivariant else 0


class Encoder(nn.Module):
    """Image (B, n_in, ...) to mean and log-variance of its latent, (B, 2C, H, H)."""

    def __init__(self, cfg, n_in):
        super().__init__()
        widths, n_res = levels(cfg)
        self.conv_in, self.position = nn.Conv2d(n_in, widths[0], 3, padding=1), positions(cfg, widths[0])
        self.down = nn.ModuleList()
        for before, n in zip([widths[0], *widths], widths):
            last = len(self.down) == len(widths) - 1
            block = nn.ModuleList(ResBlock(n if j else before, n) for j in range(n_res))
            attn = nn.ModuleList(AttnBlock(n) if last and cfg.published else nn.Identity() for _ in block)
            # the published weights were trained with padding on the right and below only
            halve = {} if last else dict(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(n, n, 3, stride=2))
            downsample = nn.Sequential(OrderedDict(halve))
            self.down.append(nn.ModuleDict(dict(block=block, attn=attn, downsample=downsample)))
        self.mid, self.norm_out = middle(n), group_norm(n)
        self.conv_out = nn.Conv2d(n, 2 * cfg.latent_dim, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x) + self.position
        for level in self.down:
            for block, attention in zip(level["block"], level["attn"]):
                x = attention(block(x))
            x = level["downsample"](x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Latent (B, C, H, H) to image (B, n_out, ...). Levels stand lowest resolution last, as in the files."""

    def __init__(self, cfg, n_out):
        super().__init__()
        widths, n_res = levels(cfg)
        n = widths[-1]
        self.conv_in, self.position = nn.Conv2d(cfg.latent_dim, n, 3, padding=1), positions(cfg, n)
        self.mid, self.up = middle(n), nn.ModuleList()
        for below, n in zip([*widths[1:], n], widths):
            block = nn.Sequential(*(ResBlock(n if j else below, n) for j in range(n_res + 1)))
            double = dict(nearest=nn.Upsample(scale_factor=2), conv=nn.Conv2d(n, n, 3, padding=1))
            upsample = nn.Sequential(OrderedDict(double if len(self.up) else {}))
            self.up.append(nn.ModuleDict(dict(block=block, upsample=upsample)))
        self.norm_out, self.conv_out = group_norm(widths[0]), nn.Conv2d(widths[0], n_out, 3, padding=1)

    def forward(self, x):
        x = self.mid(self.conv_in(x) + self.position)
        for level in reversed(self.up):
            x = level["upsample"](level["block"](x))
        return self.conv_out(F.silu(self.norm_out(x)))


class AutoencoderKL(nn.Module):
    """The tokenizer. `latent_scale` turns its latents into the unit-variance x of the rest of the code."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.patch = cfg, 1 if cfg.published else cfg.stride
        n, C = cfg.image_channels * self.patch ** 2, cfg.latent_dim
        self.encoder, self.decoder = Encoder(cfg, n), Decoder(cfg, n)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(2 * C, 2 * C, 1), nn.Conv2d(C, C, 1)
        if not cfg.published:         # a linear path around both: what a PCA of patches does is not relearned
            self.shortcut_in, self.shortcut_out = nn.Conv2d(n, C, 1), nn.Conv2d(C, n, 1)
        self.register_buffer("latent_scale", torch.ones(()), persistent=False)

    def encode(self, image):
        """image (B, c, S, S) in [-1, 1] -> mean, log-variance of the latent, (B, C, H, H) each, unscaled."""
        x = F.pixel_unshuffle(image, self.patch)                            # (B, c patch^2, S/patch, S/patch)
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)                   # (B, C, H, H) each
        if not self.cfg.published:
            mean = mean + self.shortcut_in(x)
        return mean, logvar.clamp(-30, 20)

    def decode(self, latent):
        """latent (B, C, H, H), not scaled -> image (B, c, S, S), about [-1, 1]."""
        x = self.decoder(self.post_quant_conv(latent))                      # (B, c patch^2, S/patch, S/patch)
        if not self.cfg.published:
            x = x + self.shortcut_out(latent)
        return F.pixel_shuffle(x, self.patch)


def to_unit(images):
    """uint8 (B, c, S, S) -> float in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images):
    """float (B, c, S, S), about [-1, 1] -> uint8, rounded and clipped."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


@torch.inference_mode()
def reconstruct(tokenizer, images):
    """uint8 (B, c, S, S) through the tokenizer and back, by the latent's mean, as uint8 on the CPU."""
    parts = (to_unit(part.to(tokenizer.latent_scale.device)) for part in images.split(50))
    return torch.cat([to_uint8(tokenizer.decode(tokenizer.encode(part)[0])).cpu() for part in parts])


def psnr(a, b):
    """Peak signal-to-noise ratio in dB of uint8 images a and b, (B, c, S, S) each, all of them at once."""
    errors = [(x.float() - y.float()).square().mean() for x, y in zip(a, b)]
    return 10 * math.log10(255 ** 2 / max(torch.stack(errors).mean().item(), 1e-10))


# ---- files

def save_tokenizer(path, tokenizer):
    """Write a finished tokenizer where `load_tokenizer` reads it."""
    content = dict(kind="tokenizer", config=asdict(tokenizer.cfg), model=tokenizer.state_dict(),
                   latent_scale=tokenizer.latent_scale.item())
    write_atomically(path, lambda file: torch.save(content, file))


def load_tokenizer(path):
    """A tokenizer in eval mode from our tokenizer.pt or from the published kl16.ckpt. Raises InputError."""
    content = load_checkpoint(path)
    with reading(path):
        weights, kind = content["model"], content.get("kind", "published")
        if kind == "tokenizer":
            cfg, scale = TokenizerConfig(**content["config"]), content["latent_scale"]
        elif kind == "published":
            width, channels = weights["encoder.conv_in.weight"].shape[:2]
            latent_dim = weights["post_quant_conv.weight"].shape[0]
            cfg = TokenizerConfig(channels, 256, 16, latent_dim, width, published=True)
            scale = 0.2325                                       # what the authors trained FAR with
        else:
            raise InputError(f"{path} is neither a tokenizer of this program nor the published kl16.ckpt")
        tokenizer = AutoencoderKL(cfg)
        tokenizer.load_state_dict(weights)
        tokenizer.latent_scale.fill_(scale)
    return tokenizer.eval().requires_grad_(False)


def fit_to_data(tokenizer, data, path):
    """Set a given tokenizer to the data's size; InputError if it cannot encode these images."""
    cfg = tokenizer.cfg
    fits = cfg.published or cfg.image_size == data.size          # the published one takes any multiple of 16
    if cfg.image_channels != data.channels or not fits:
        raise InputError(f"{path} is for {cfg.image_channels}-channel images of {cfg.image_size} px, "
                         f"{data.name} has {data.channels} channels and {data.size} px: train one for it")
    tokenizer.cfg = replace(cfg, image_size=data.size)


def fingerprint(module):
    """12 characters that change when any weight of a network does."""
    found = hashlib.sha256()
    for name, value in module.state_dict().items():
        found.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:12]


# ---- training

KL_WEIGHT = 1e-2
# Of an equivariant tokenizer: the share of images that are compared after a low-pass, at first; it falls to 0
# while encoder and decoder learn together. For the rest of the steps the decoder learns alone, whole images.
LOWPASSED, TOGETHER = 0.6, 0.7


def autoencoder_loss(tokenizer, image, noise, k=None, decoder_only=False):
    """
    Mean absolute error plus KL_WEIGHT times the latent's KL divergence from a unit Gaussian, both per pixel
    (Kingma & Welling 2014; Rombach et al. 2022 eq. 25 without its adversarial term). With k (B,), frequencies
    per axis to keep of each latent, 1..H, latent and image are compared after the same low-pass: so a band of
    the latent becomes that band of the image (scale equivariance, Skorokhodov et al. 2025, arXiv 2502.14831).
    image (B, c, S, S); noise (B, C, H, H), unit normal. Returns (loss, error, KL per latent number).
    """
    with torch.set_grad_enabled(not decoder_only):
        mean, logvar = (part.float() for part in tokenizer.encode(image))
        latent = mean + (0.5 * logvar).exp() * noise
    if k is not None:
        latent, image = keep_frequencies(latent, k), keep_frequencies(image, k, tokenizer.cfg.stride)
    made = tokenizer.decode(latent).float()
    error = (made - image).abs().mean()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar)
    loss = error + KL_WEIGHT * kl.sum() / image.numel()
    if not tokenizer.cfg.equivariant:                    # an error alone blurs what it cannot place
        pairs = zip(local_contrast(made), local_contrast(image))
        loss = loss + sum((a - b).abs().mean() for a, b in pairs)
    return loss, error, kl.mean()


def local_contrast(image):
    """Root mean square of the differences of neighbouring pixels in windows of 4 x 4, down and across."""
    return [(F.avg_pool2d(image.diff(dim=axis).square(), 4, 2) + 1e-3).sqrt() for axis in (2, 3)]


@torch.no_grad()
def start_from_patches(tokenizer, images):
    """
    Start the linear path as the principal components of the patches of images (n, c, S, S) in [-1, 1], and
    the network as nothing beside it. Orthonormal: distances between latents are distances between pictures.
    """
    into, out = tokenizer.shortcut_in, tokenizer.shortcut_out
    n = min(tokenizer.cfg.latent_dim, into.in_channels)
    x = F.pixel_unshuffle(images, tokenizer.cfg.stride).movedim(1, -1).flatten(0, -2).cpu().double()
    mean = x.mean(dim=0)                                                                  # (c stride^2,)
    values, vectors = torch.linalg.eigh((x - mean).T @ (x - mean) / len(x))               # increasing
    scale = values[-n:].mean().sqrt().item()                                        # unit variance on average
    mean, vectors = mean.to(into.weight), vectors[:, -n:].to(into.weight)             # float32, on the device
    into.weight[:n, :, 0, 0], into.bias[:n] = vectors.T / scale, -(vectors.T @ mean) / scale
    out.weight[:, :n, 0, 0], out.bias[:] = vectors * scale, mean
    for layer in (tokenizer.encoder.conv_out, tokenizer.decoder.conv_out):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    tokenizer.quant_conv.bias[:] = 0
    tokenizer.quant_conv.bias[tokenizer.cfg.latent_dim:] = -4        # the log-variance: little noise at first


@functools.cache
def axis_lowpasses(size, unit, device):
    """The low-passes of an axis that keep unit, 2 unit, ..., size frequencies: (size / unit, size, size)."""
    pairs = (lowpass_matrices(size, k, "spatial") for k in range(unit, size + 1, unit))
    with autocast(device, "fp32"):                               # kept, so whoever asks first
        return torch.stack([up @ down for down, up in pairs]).to(device)


def keep_frequencies(x, k, unit=1):
    """The low-pass, image by image: x (B, c, S, S) with k * unit frequencies per axis; k (B,), from 1."""
    return both_axes(axis_lowpasses(x.shape[-1], unit, x.device)[k - 1][:, None], x)


def make_optimizer(tokenizer):
    """AdamW; every step sets its learning rate."""
    return torch.optim.AdamW(tokenizer.parameters(), betas=(0.9, 0.99), weight_decay=0.01)


def learning_rate(cfg, step, steps):
    """Warm-up over 100 steps, half of a short run, then a cosine to zero: a run of any length is finished."""
    peak = 2e-4 if cfg.published else 4e-3
    return peak * min(1, (step + 1) / min(100, steps / 2)) * 0.5 * (1 + math.cos(math.pi * step / steps))


def train_step(tokenizer, optimizer, images, flip, step, steps, seed, dtype):
    """
    One step on images uint8 (B, c, S, S), mirrored half of the time with `flip`. Nothing here waits for the
    device: what comes back is a tensor on it, (3,): error, KL per latent number, norm of the gradient.
    """
    cfg, device, n, done, k = tokenizer.cfg, images.device, len(images), step / steps, None
    draw = dict(generator=step_generator(seed, step, device), device=device)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(cfg, step, steps)
    images = to_unit(images)
    if flip:
        images = torch.where(torch.rand(n, 1, 1, 1, **draw) < 0.5, images.flip(-1), images)
    noise = torch.randn(n, cfg.latent_dim, cfg.latent_size, cfg.latent_size, **draw)
    decoder_only = cfg.equivariant and done >= TOGETHER
    if cfg.equivariant and not decoder_only:
        u, lower = torch.rand(2, n, **draw)
        lower = 1 + lower * (cfg.latent_size - 1)
        k = torch.where(u < LOWPASSED * (1 - done / TOGETHER), lower, cfg.latent_size).long()
    with autocast(device, dtype):
        loss, error, kl = autoencoder_loss(tokenizer, images, noise, k, decoder_only)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(tokenizer.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return torch.stack([error, kl, norm]).detach()


def time_step(cfg, device, dtype):
    """Seconds of a training step here: of the second one, for the first prepares memory and kernels."""
    tokenizer = AutoencoderKL(cfg).to(device)
    optimizer, shape = make_optimizer(tokenizer), (cfg.image_channels, cfg.image_size, cfg.image_size)
    images = torch.full((cfg.batch, *shape), 127, dtype=torch.uint8, device=device)
    for _ in range(2):
        began = time.time()
        train_step(tokenizer, optimizer, images, False, 0, 1, 0, dtype).tolist()
    return time.time() - began


def train_tokenizer(data, cfg, path, steps, seed=0, device="cpu", dtype="fp32", save_every=500):
    """
    Train a tokenizer on `data`; leave it at `path`, with its latent scale. Until then its state lies in
    PATH.training: an interrupted training continues from its last save, bit for bit on a CPU.
    """
    torch.manual_seed(seed)
    tokenizer = AutoencoderKL(cfg).to(device)
    optimizer, state = make_optimizer(tokenizer), f"{path}.training"
    identity = dict(config=asdict(cfg), data=data.fingerprint, flip=data.flip, steps=steps, seed=seed)
    before = load_checkpoint(state, "tokenizer training") if os.path.exists(state) else None
    start, rows = 0, []
    if not (cfg.published or cfg.equivariant):
        some = next(epochs(0, min(len(data), 2048), len(data), seed))
        start_from_patches(tokenizer, to_unit(data.batch(some)).to(device))
    if before and before["identity"] == identity:                # else it was another training: begin anew
        tokenizer.load_state_dict(before["model"])
        optimizer.load_state_dict(before["optimizer"])
        start = before["step"]
    # the thread that reads also copies to the device: training never waits for it
    order = epochs(start * cfg.batch, cfg.batch, len(data), seed)
    batches = prefetch(lambda indices: data.batch(indices).to(device), order)
    bar = tqdm(range(start, steps), initial=start, total=steps, desc="tokenizer", unit="step")
    for step in bar:
        rows.append(train_step(tokenizer, optimizer, next(batches), data.flip, step, steps, seed, dtype))
        done = step + 1
        save = done % save_every == 0 or done == steps
        if done % 50 == 0 or save:
            error, kl, norm = torch.stack(rows).mean(dim=0).tolist()
            bar.set_postfix_str(f"L1 {error:.4f} KL {kl:.2f}", refresh=False)
            if not math.isfinite(norm):
                raise InputError(f"the tokenizer's loss or its gradient is not finite between steps "
                                 f"{done - len(rows)} and {done}: try --dtype fp32")
            rows = []
        if save:
            content = dict(kind="tokenizer training", identity=identity, step=done,
                           model=tokenizer.state_dict(), optimizer=optimizer.state_dict())
            write_atomically(state, lambda file: torch.save(content, file))
    tokenizer.eval().requires_grad_(False)
    tokenizer.latent_scale.fill_(measure_latent_scale(tokenizer, data, seed))
    save_tokenizer(path, tokenizer)
    os.remove(state)
    return tokenizer


@torch.inference_mode()
def measure_latent_scale(tokenizer, data, seed=0, n=2048):
    """1 / std of latents drawn for n training images: x then has unit variance (Rombach et al. 2022, G)."""
    generator, latents = step_generator(seed, 1), []
    for indices in next(epochs(0, min(n, len(data)), len(data), seed)).split(32):
        images = to_unit(data.batch(indices).to(tokenizer.latent_scale.device))
        mean, logvar = (part.cpu() for part in tokenizer.encode(images))
        latents.append(mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=generator))
    return 1 / torch.cat(latents).double().std().item()          # on the CPU: mps has no float64


def tokenizer_path(data_dir, data, cfg, steps):
    """Where the tokenizer of these images, of this shape and length of training, is kept."""
    key = digest(data.fingerprint, data.flip, asdict(cfg), steps)
    return os.path.join(data_dir, f"tokenizer_{data.name}_{data.size}_{key}.pt")


def get_tokenizer(data, held_out, cfg, data_dir, steps, seed=0, device="cpu", dtype="fp32", path=None):
    """
    The tokenizer of a data set, in eval mode on the device. If it is not there, one process trains it, prints
    the PSNR of held-out images, and leaves it at `path`, by default in the data folder; others wait for it.
    """
    path = path or tokenizer_path(data_dir, data, cfg, steps)
    with only_one(path):
        if not os.path.exists(path):
            tokenizer = train_tokenizer(data, cfg, path, steps, seed, device, dtype)
            images = held_out.batch(torch.arange(min(1000, len(held_out))))
            print(f"tokenizer: {psnr(images, reconstruct(tokenizer, images)):.2f} dB on held-out images, "
                  f"latent scale {tokenizer.latent_scale.item():.4f}, written: {path}", flush=True)
    return load_tokenizer(path).to(device)


@torch.inference_mode()
def cache_latents(tokenizer, data, folder, device="cpu"):
    """
    Encode the data set once, in float32: Parts (N, views, 2, C, H, H) float16 of means and log-variances;
    two views where a mirrored image (the second) is as good. Their folder inside `folder` is named by data
    and tokenizer, so a changed one is noticed. Memory does not grow with N.
    """
    def encode(rows):
        images = to_unit(data.batch(torch.arange(rows.start, rows.stop)).to(device))      # (B, c, S, S)
        views = [images, images.flip(-1)] if data.flip else [images]
        moments = torch.stack([torch.stack(tokenizer.encode(view), dim=1) for view in views], dim=1)
        return moments.half().cpu().numpy()                                      # (B, views, 2, C, H, H)

    key = digest(data.fingerprint, data.flip, fingerprint(tokenizer))
    path = os.path.join(folder, f"latents_{data.name}_{data.size}_{key}")
    batch = max(1, min(128, 2 ** 21 // data.size ** 2))          # of large pictures fewer: memory
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")                # on a GPU no TF32 in products
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):                 # nor in convolutions
        parts = make_parts(path, len(data), encode, "latents", batch=batch)
    torch.set_float32_matmul_precision(precision)
    return parts


def main(argv=None):
    parser = OneLineParser(prog="tokenizer.py", description=__doc__,
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", default="shapes", help="shapes, fashion_mnist, cifar10, imagenet64, or a folder of images")
    add("--size", type=positive, help="side of the images in pixels; by default the data's own")
    add("--data-dir", default="data", help="where data sets and tokenizers are kept")
    add("--skip-bad", action="store_true", help="leave out images that cannot be read instead of stopping")
    add("--mirror", action="store_true", help="show every image of a folder mirrored too, half of the time")
    add("--text", action="store_true", help="for captioned pictures: the lowest band knows where things are")
    add("--stride", type=int, choices=(4, 8, 16), help="pixels per token and axis; by default by the size")
    add("--latent-dim", type=positive, help="channels of a token; by default it follows the stride")
    add("--steps", type=positive, help="optimizer steps; the schedule scales with them")
    add("--seed", type=seed_number, default=0, help="of weights, order and noise")
    add("--device", help="cuda, mps or cpu; by default the best there is")
    add("--dtype", choices=("bf16", "fp32"), help="arithmetic of the network; by default the faster one here")
    add("--out", help="the file to write; by default where train.py looks for it, in the data folder")
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    data, held_out = (load_data(args.data, args.size, args.data_dir, split, skip_bad=args.skip_bad,
                                mirror=args.mirror or None) for split in ("train", "test"))
    cfg = default_config(data.size, data.channels, args.stride, args.latent_dim, args.text)
    args.steps = args.steps or cfg.steps
    path = args.out or tokenizer_path(args.data_dir, data, cfg, args.steps)
    if os.path.exists(path):
        raise InputError(f"{path} is there already: remove it, or choose another --out")
    print(f"{data.name}: {len(data):,} images of {data.size} px -> {cfg.latent_size} x {cfg.latent_size} "
          f"tokens of {cfg.latent_dim}")
    get_tokenizer(data, held_out, cfg, args.data_dir, args.steps, args.seed, device,
                  args.dtype or faster_dtype(device), path)


if __name__ == "__main__":
    command_line(main)
