"""
The frequency ladder of FAR: an image as a sum of bands, lowest frequency first. This file can be read alone.

    python bands.py PICTURE.png          # draws the ladder of a picture of yours: PICTURE_bands.png

A low-pass keeps k of the H frequencies of each axis. A ladder k_1 < ... < k_L = H of them turns x into the
bands x^1, ..., x^L = x, each with all frequencies of the one below and some more; FAR draws them in turn.

    lowpass             x^l: both low-passes of the paper, spatial and Fourier FAR, "frequency hierarchy"
    band_causal_mask    which band may look at which                       the autoregression over bands
    mask_share          tokens hidden from the encoder, band by band       S2, frequency-aware masking
    loss_weight         weight of each band's loss                         S3, frequency-aware loss
    diffusion_steps     steps of the diffusion head, band by band          FAR, inference
    guidance, cooling   guidance and temperature, band by band             the released code

Shapes: B images, C channels, H side of the grid, L bands, l = 1..L, k_l frequencies per axis that band l
keeps. Here the grid is a picture; in FAR it is the tokenizer's latent, and 16 x 16.
"""
import math
import os
from statistics import NormalDist

import torch
import torch.nn.functional as F

from common import OneLineParser, autocast, command_line

LOWPASSES = ("spatial", "fft")


# ---- the low-pass

def lowpass_matrices(size, k, kind):
    """
    The low-pass that keeps k frequencies per axis, as two matrices: A (k, size) takes an axis to k samples, U
    (size, k) brings it back; lowpass(x, k) = U A x A^T U^T. `spatial` (the paper's default; released code):
    area down-sampling, bicubic up-sampling. `fft`: Fourier resampling, an exact projection.
    """
    if k == 0:
        return torch.zeros(0, size), torch.zeros(size, 0)
    full, kept = torch.eye(size, device="cpu"), torch.eye(k, device="cpu")
    if kind == "fft":
        down, up = fft_resample(full, k).T, fft_resample(kept, size).T
    else:
        down = F.interpolate(full[None], k, mode="area")[0].T                                    # (k, size)
        up = F.interpolate(kept[None, :, :, None], (size, 1), mode="bicubic")[0, :, :, 0].T      # (size, k)
    return down.contiguous(), up.contiguous()


def fft_resample(x, m):
    """
    Resample the last axis of x (..., n) to m points in its Fourier spectrum. The Nyquist bin of an even
    length stands for two frequencies: doubled on the way down, halved on the way up (scipy.signal.resample).
    """
    n, keep = x.shape[-1], min(x.shape[-1], m)
    spectrum = torch.fft.rfft(x)
    resampled = spectrum.new_zeros(*x.shape[:-1], m // 2 + 1)
    resampled[..., :keep // 2 + 1] = spectrum[..., :keep // 2 + 1]
    if keep % 2 == 0 and m != n:
        resampled[..., keep // 2] *= 2 if m < n else 0.5
    return torch.fft.irfft(resampled, n=m) * (m / n)


def both_axes(matrix, x):
    """matrix (h, H) along both axes of x (..., H, H) -> (..., h, h), float32: bf16 would round targets."""
    with autocast(x.device, "fp32"):
        return matrix @ x.float() @ matrix.mT


def lowpass(x, k, kind="spatial"):
    """x^l: x (B, C, H, H) with k frequencies per axis kept; all of it for k = H, zeros for k = 0."""
    down, up = lowpass_matrices(x.shape[-1], k, kind)
    return both_axes((up @ down).to(x), x)


# ---- the ladders

def every_band(size):
    """The paper's ladder in training: every cut-off 1, 2, ..., H."""
    return tuple(range(1, size + 1))


def doubling_bands(size):
    """1, 2, 4, ... and H: our ladder."""
    return tuple(2 ** i for i in range(size.bit_length()) if 2 ** i < size) + (size,)


def ten_bands(size):
    """The released sampler's ten steps, with inputs k = 0, 2, 3, ..., 10 of H = 16, scaled to other grids."""
    inputs = sorted({max(1, round(k * size / 16)) for k in range(2, 11)})
    return tuple(k for k in inputs if k < size) + (size,)


def check_bands(bands, size):
    """Raise ValueError unless the bands are whole numbers that increase and end at the grid's side."""
    if not bands or any(a >= b for a, b in zip((0, *bands), bands)) or bands[-1] != size:
        raise ValueError(f"bands must increase from at least 1 and end at the latent grid's side {size}, "
                         f"not {','.join(map(str, bands))}")


def band_causal_mask(n_tokens):
    """
    True where attention is allowed: inside a band all tokens see each other, across bands they look down
    only. n_tokens = [1, 2, 3] (the condition tokens count as the lowest band) gives, with x = may look:

        query / key   0 | 1 1 | 2 2 2
                0     x | . . | . . .
                1     x | x x | . . .
                2     x | x x | x x x
    """
    band = torch.tensor([l for l, n in enumerate(n_tokens) for _ in range(n)])                   # (N,)
    return band[:, None] >= band[None, :]                                                        # (N, N)


# ---- what changes from band to band: functions of the band l = 1..L and of how many there are

def loss_weight(kind, l, L):
    """
    S3, higher weights for high frequencies. `sine`, the released code: 1 + sin(pi/2 l/L), rising to 2.
    `article`: the text's formula, sin(pi l/L), against its words: the highest band, at 0, learns nothing.
    """
    if kind == "sine":
        return 1 + math.sin(math.pi / 2 * l / L)
    if kind == "article":
        return math.sin(math.pi * l / L) if l < L else 0.0
    return 1.0


def mask_share(kind, l, L, u=0.5):
    """
    S2, the share of a band's tokens that the encoder does not see. `linear` (the paper): from 0.7 at the
    lowest band to 0 at the highest; a ladder of one band hides none. `truncnorm` (released code): normal,
    mean 1, std 0.25, cut to [0.7 (l-1)/L, 1]; u in [0, 1) picks the quantile. `none`: 0.
    """
    if kind == "linear":
        return 0.7 * (L - l) / (L - 1) if L > 1 else 0.0
    if kind == "truncnorm":
        normal, low = NormalDist(1, 0.25), 0.7 * (l - 1) / L
        return normal.inv_cdf(normal.cdf(low) + u * (0.5 - normal.cdf(low)))
    return 0.0


def diffusion_steps(first, last, l, L):
    """
    Diffusion steps of band l, linear from the lowest to the highest band: 100 to 1000 in the article, 40 to
    100 in its revision, 100 everywhere in the released code. A ladder of one band takes `last`.
    """
    return round(first + (last - first) * (l - 1) / (L - 1)) if L > 1 else last


def guidance(kind, cfg, l, L):
    """Guidance of band l. `linear` (released code) starts at 1; `constant`, and a ladder of one band: cfg."""
    return 1 + (cfg - 1) * (l - 1) / L if kind == "linear" and L > 1 else cfg


def cooling(l, L):
    """Temperature of band l in the released code: 0.8 + 0.2 (1 - cos(pi/2 l/L)), rising to 1."""
    return 0.8 + 0.2 * (1 - math.cos(math.pi / 2 * l / L))


# ---- the ladder of a picture

def main(argv=None):
    """Two rows for each low-pass: the picture after every band; and, on grey, what the band adds."""
    from data import load_image, save_grid
    from tokenizer import to_uint8, to_unit
    parser = OneLineParser(prog="bands.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("picture", help="an image file; its centre is cut out, reduced to 128 x 128 pixels")
    path = parser.parse_args(argv).picture
    picture = to_unit(torch.from_numpy(load_image(path, size=128))[None])                # (1, 3, 128, 128)
    bands, out, rows = doubling_bands(128), f"{os.path.splitext(path)[0]}_bands.png", []
    for kind in LOWPASSES:
        after = torch.cat([lowpass(picture, k, kind) for k in bands])                    # (L, 3, 128, 128)
        rows += [after, torch.cat([after[:1], after.diff(dim=0)])]
    save_grid(out, to_uint8(torch.cat(rows)), len(bands))
    print(f"columns: k = {', '.join(map(str, bands))} of 128 frequencies per axis\n"
          f"rows: {' and '.join(LOWPASSES)}, each: after every band, and what each band adds\n"
          f"written: {out}")


if __name__ == "__main__":
    command_line(main)
