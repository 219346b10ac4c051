"""
The tokenizer, a continuous KL autoencoder: an image becomes a small grid of continuous tokens, and back. Its
network is latent diffusion's AutoencoderKL (Rombach et al. 2022, appendix G), into which the published KL-16,
kl16.ckpt, loads. Those that train.py trains fold a token's pixels into channels and have one level.
Shapes: B images, S side of the image, c image channels, C latent channels, H = S / stride side of the grid.
"""
import hashlib
import math
import os
import timeit
from collections import OrderedDict
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import trange

from common import (InputError, autocast, digest, epochs, load_checkpoint, make_parts, only_one, prefetch,
                    reading, step_generator, write_atomically)


@dataclass
class TokenizerConfig:
    image_channels: int = 3        # c: 1 for grey images, 3 for colour
    image_size: int = 32           # S that it was trained for
    stride: int = 8                # pixels per token and axis
    latent_dim: int = 64           # C
    width: int = 64                # channels of the first level
    published: bool = False        # the published network: levels that halve the side four times
    batch = 32                                                               # images of a training step
    latent_size = property(lambda cfg: cfg.image_size // cfg.stride)         # H

    def __post_init__(self):
        if self.image_size % self.stride:
            raise InputError(f"a size of {self.image_size} is not a multiple of the stride, {self.stride} px")


def default_config(size, channels):
    """Few rich tokens: 4 x 4 x 32 latents train FAR to half the distance of 8 x 8 x 8 (docs/tried.md)."""
    return TokenizerConfig(channels, size, 8 if size <= 128 else 16, 32 if channels == 1 else 64)


# ---- the network, with the names of the published file

conv3 = lambda n_in, n_out: nn.Conv2d(n_in, n_out, 3, padding=1)
group_norm = lambda n: nn.GroupNorm(math.gcd(32, n), n, eps=1e-6)
in_turn = lambda **layers: nn.Sequential(OrderedDict(layers))
middle = lambda n: in_turn(block_1=ResBlock(n, n), attn_1=AttnBlock(n), block_2=ResBlock(n, n))


class ResBlock(nn.Module):
    """Norm - SiLU - 3x3 convolution, twice, plus the input."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.norm1, self.conv1 = group_norm(n_in), conv3(n_in, n_out)
        self.norm2, self.conv2 = group_norm(n_out), conv3(n_out, n_out)
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
        return x + self.proj_out(F.scaled_dot_product_attention(q, k, v).mT.reshape(x.shape))


class Encoder(nn.Module):
    """Image (B, n_in, ...) -> mean and log-variance (B, 2C, H, H). `widths`: channels of its levels."""

    def __init__(self, cfg, n_in, widths):
        super().__init__()
        self.conv_in, self.down = conv3(n_in, widths[0]), nn.ModuleList()
        for level, (before, n) in enumerate(zip([widths[0], *widths], widths), 1):
            last, n_res = level == len(widths), 2 if cfg.published else 1
            block = nn.ModuleList(ResBlock(n if j else before, n) for j in range(n_res))
            attn = nn.ModuleList(AttnBlock(n) if last and cfg.published else nn.Identity() for _ in block)
            # the published weights were trained with padding on the right and below only
            halve = {} if last else dict(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(n, n, 3, stride=2))
            self.down.append(nn.ModuleDict(dict(block=block, attn=attn, downsample=in_turn(**halve))))
        self.mid, self.norm_out, self.conv_out = middle(n), group_norm(n), conv3(n, 2 * cfg.latent_dim)

    def forward(self, x):
        x = self.conv_in(x)
        for level in self.down:
            for block, attention in zip(level["block"], level["attn"]):
                x = attention(block(x))
            x = level["downsample"](x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Latent (B, C, H, H) to image (B, n_out, ...). Levels stand lowest resolution last, as in the file."""

    def __init__(self, cfg, n_out, widths):
        super().__init__()
        n, n_res = widths[-1], 3 if cfg.published else 2
        self.conv_in, self.mid, self.up = conv3(cfg.latent_dim, n), middle(n), nn.ModuleList()
        for below, n in zip([*widths[1:], n], widths):
            block = nn.Sequential(*(ResBlock(n if j else below, n) for j in range(n_res)))
            double = dict(nearest=nn.Upsample(scale_factor=2), conv=conv3(n, n))
            self.up.append(in_turn(block=block, upsample=in_turn(**double if len(self.up) else {})))
        self.norm_out, self.conv_out = group_norm(widths[0]), conv3(widths[0], n_out)

    def forward(self, x):
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class AutoencoderKL(nn.Module):
    """The tokenizer. `latent_scale` turns its latents into the unit-variance x of the rest of the code."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.patch = cfg, 1 if cfg.published else cfg.stride
        n, C = cfg.image_channels * self.patch ** 2, cfg.latent_dim
        widths = [cfg.width * m for m in ((1, 1, 2, 2, 4) if cfg.published else (1,))]     # finest first
        self.encoder, self.decoder = Encoder(cfg, n, widths), Decoder(cfg, n, widths)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(2 * C, 2 * C, 1), nn.Conv2d(C, C, 1)
        if not cfg.published:         # a linear path around both: what a PCA of patches does is not relearned
            self.shortcut_in, self.shortcut_out = nn.Conv2d(n, C, 1), nn.Conv2d(C, n, 1)
        self.register_buffer("latent_scale", torch.ones(()), persistent=False)

    def encode(self, image):
        """image (B, c, S, S) in [-1, 1] -> mean, log-variance of the latent, (B, C, H, H) each, unscaled."""
        x = F.pixel_unshuffle(image, self.patch)                            # (B, c patch^2, S/patch, S/patch)
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)                   # (B, C, H, H) each
        mean = mean if self.cfg.published else mean + self.shortcut_in(x)
        return mean, logvar.clamp(-30, 20)

    def decode(self, latent):
        """latent (B, C, H, H), not scaled -> image (B, c, S, S), about [-1, 1]."""
        x = self.decoder(self.post_quant_conv(latent))                      # (B, c patch^2, S/patch, S/patch)
        x = x if self.cfg.published else x + self.shortcut_out(latent)
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


def save_tokenizer(path, tokenizer):
    """Write a finished tokenizer where `load_tokenizer` reads it."""
    content = dict(kind="tokenizer", config=asdict(tokenizer.cfg), model=tokenizer.state_dict(),
                   latent_scale=tokenizer.latent_scale.item())
    write_atomically(path, lambda file: torch.save(content, file))


def load_tokenizer(path):
    """A tokenizer in eval mode from our tokenizer.pt or from the published kl16.ckpt. InputError."""
    content = load_checkpoint(path)
    with reading(path):
        weights = content["model"]
        if content.get("kind") == "tokenizer":
            cfg = TokenizerConfig(**content["config"])
        else:
            width, n_in = weights["encoder.conv_in.weight"].shape[:2]
            cfg = TokenizerConfig(n_in, 256, 16, len(weights["post_quant_conv.bias"]), width, published=True)
        tokenizer = AutoencoderKL(cfg)
        tokenizer.load_state_dict(weights)
        tokenizer.latent_scale.fill_(content.get("latent_scale", 0.2325))       # as the authors trained FAR
    return tokenizer.eval().requires_grad_(False)


def fit_to_data(tokenizer, data, path):
    """Set a given tokenizer to the data's size; the published one takes any multiple of 16. InputError."""
    cfg = tokenizer.cfg
    if cfg.image_channels != data.channels or not (cfg.published or cfg.image_size == data.size):
        raise InputError(f"{path} is for {cfg.image_channels} channels and {cfg.image_size} px, "
                         f"{data.name} has {data.channels} channels and {data.size} px")
    tokenizer.cfg = replace(cfg, image_size=data.size)


def fingerprint(module):
    """12 characters that change when any weight of a network does."""
    found = hashlib.sha256()
    for name, value in module.state_dict().items():
        found.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:12]


# ---- training

def autoencoder_loss(tokenizer, image, **draw):
    """Rombach et al. 2022, eq. 25, with local contrast for the adversarial term; image (B, c, S, S) -> ()."""
    mean, logvar = (part.float() for part in tokenizer.encode(image))
    made = tokenizer.decode(mean + (0.5 * logvar).exp() * torch.randn(mean.shape, **draw)).float()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar)
    loss = (made - image).abs().mean() + 1e-2 * kl.sum() / image.numel()
    for axis in (2, 3):           # how much neighbouring pixels differ in windows of 4 x 4, down and across
        a, b = ((F.avg_pool2d(x.diff(dim=axis).square(), 4, 2) + 1e-3).sqrt() for x in (made, image))
        loss = loss + (a - b).abs().mean()
    return loss


@torch.no_grad()
def start_from_patches(tokenizer, images):
    """The linear path starts as the PCA of patches of images (n, c, S, S), the network as nothing beside."""
    into, out, C = tokenizer.shortcut_in, tokenizer.shortcut_out, tokenizer.cfg.latent_dim
    x = F.pixel_unshuffle(images, tokenizer.cfg.stride).movedim(1, -1).flatten(0, -2).cpu().double()
    mean = x.mean(dim=0)                                                                  # (c stride^2,)
    values, vectors = torch.linalg.eigh((x - mean).T @ (x - mean) / len(x))               # increasing
    scale = values[-C:].mean().sqrt().item()                                        # unit variance on average
    mean, vectors = mean.to(into.weight), vectors[:, -C:].to(into.weight)             # float32, on the device
    into.weight[..., 0, 0], into.bias[:] = vectors.T / scale, -(vectors.T @ mean) / scale
    out.weight[..., 0, 0], out.bias[:] = vectors * scale, mean
    torch._foreach_zero_([*tokenizer.encoder.conv_out.parameters(), *tokenizer.decoder.conv_out.parameters()])
    tokenizer.quant_conv.bias[:C], tokenizer.quant_conv.bias[C:] = 0, -4            # little noise at first


def train_step(tokenizer, optimizer, images, flip, step, steps, seed, dtype):
    """A step on uint8 images (B, c, S, S), never waiting for the device -> the gradient's norm, ()."""
    draw = dict(generator=step_generator(seed, step, images.device), device=images.device)
    # warm-up over 100 steps, half of a short run, then a cosine to zero: a run of any length is finished
    warm = min(1, (step + 1) / min(100, steps / 2))
    optimizer.param_groups[0]["lr"] = 4e-3 * warm * 0.5 * (1 + math.cos(math.pi * step / steps))
    images = to_unit(images)
    if flip:
        images = torch.where(torch.rand(len(images), 1, 1, 1, **draw) < 0.5, images.flip(-1), images)
    with autocast(images.device, dtype):
        loss = autoencoder_loss(tokenizer, images, **draw)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(tokenizer.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return norm


def time_step(cfg, device, dtype):
    """Seconds of a training step here: of the second one, for the first prepares memory and kernels."""
    tokenizer = AutoencoderKL(cfg).to(device)
    optimizer = torch.optim.AdamW(tokenizer.parameters())
    images = torch.zeros(cfg.batch, cfg.image_channels, cfg.image_size, cfg.image_size, device=device)
    step = lambda: train_step(tokenizer, optimizer, images, False, 0, 1, 0, dtype).item()
    return timeit.repeat(step, number=1, repeat=2)[1]


def train_tokenizer(data, cfg, path, steps, seed=0, device="cpu", dtype="fp32"):
    """Train a tokenizer on `data` and leave it at `path`; on a CPU the same seed gives the same bits."""
    torch.manual_seed(seed)
    tokenizer = AutoencoderKL(cfg).to(device)
    some = next(epochs(0, min(len(data), 2048), len(data), seed))
    start_from_patches(tokenizer, to_unit(data.batch(some)).to(device))
    optimizer = torch.optim.AdamW(tokenizer.parameters(), betas=(0.9, 0.99), weight_decay=0.01)
    batches = prefetch(lambda indices: data.batch(indices).to(device), epochs(0, cfg.batch, len(data), seed))
    for step in trange(steps, desc="tokenizer", unit="step"):
        norm = train_step(tokenizer, optimizer, next(batches), data.flip, step, steps, seed, dtype)
    if not math.isfinite(norm.item()):                  # as it stays from the first step on where it was not
        raise InputError("the tokenizer's gradient is not finite: try train.py with --dtype fp32")
    tokenizer.eval().requires_grad_(False)
    generator, latents = step_generator(seed, 1), []                 # unit variance: Rombach et al. 2022, G
    for indices in some.split(32):
        mean, logvar = (part.cpu() for part in tokenizer.encode(to_unit(data.batch(indices).to(device))))
        latents.append(mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=generator))
    tokenizer.latent_scale.fill_(1 / torch.cat(latents).double().std().item())         # mps has no float64
    save_tokenizer(path, tokenizer)
    return tokenizer


def tokenizer_path(data_dir, data, cfg, steps):
    """Where the tokenizer of these images, of this shape and length of training, is kept."""
    key = digest(data.fingerprint, data.flip, asdict(cfg), steps)
    return os.path.join(data_dir, f"tokenizer_{data.name}_{data.size}_{key}.pt")


def get_tokenizer(data, held_out, cfg, data_dir, steps, seed=0, device="cpu", dtype="fp32"):
    """The tokenizer in eval mode; if there is none, one process trains it, prints its PSNR, others wait."""
    path = tokenizer_path(data_dir, data, cfg, steps)
    with only_one(path):
        if not os.path.exists(path):
            tokenizer = train_tokenizer(data, cfg, path, steps, seed, device, dtype)
            images = held_out.batch(torch.arange(min(1000, len(held_out))))
            error = F.mse_loss(reconstruct(tokenizer, images).float(), images.float()).item()
            psnr = 10 * math.log10(255 ** 2 / max(error, 1e-10))
            print(f"tokenizer: {psnr:.2f} dB on held-out images, written: {path}", flush=True)
    return load_tokenizer(path).to(device)


@torch.inference_mode()
def cache_latents(tokenizer, data, folder, device="cpu"):
    """Parts (N, views, 2, C, H, H) float16, made once: mean and log-variance; view 1: of mirrored images."""
    def encode(rows):
        images = to_unit(data.batch(torch.arange(rows.start, rows.stop)).to(device))      # (B, c, S, S)
        views = [images, images.flip(-1)] if data.flip else [images]
        moments = torch.stack([torch.stack(tokenizer.encode(view), dim=1) for view in views], dim=1)
        return moments.half().cpu().numpy()

    key = digest(data.fingerprint, data.flip, fingerprint(tokenizer))
    path = os.path.join(folder, f"latents_{data.name}_{data.size}_{key}")
    batch = max(1, min(128, 2 ** 21 // data.size ** 2))                      # of large pictures fewer: memory
    torch.set_float32_matmul_precision("highest")                            # on a GPU no TF32 in products
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):         # nor in convolutions
        parts = make_parts(path, len(data), encode, "latents", batch=batch)
    torch.set_float32_matmul_precision("high")                               # as pick_device has set it
    return parts
