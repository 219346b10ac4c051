"""
FAR: images from low to high frequency. The whole model; its diffusion head is in diffusion.py.

An image becomes a small latent grid x (tokenizer.py). Low-passes of x form a ladder of bands x^1, ..., x^L; a
transformer learns p(x) = prod_l p(x^l | x^{l-1}, ..., x^1): it looks at the lower bands and answers with one vector
z per token of the next, and a small diffusion head turns each z into a sample of that token.

    lowpass_matrices    the frequency ladder                       FAR, "frequency progressive" bands
    band_causal_mask    which band may look at which               the autoregression over bands
    FAR.transformer     bands and condition -> z                   masked encoder-decoder, as in MAE and MAR
    FAR.forward         the loss, in total and per band            the "simplified diffusion loss" (target="full")
    FAR.sample          band by band, from nothing to the image    the inference of FAR, with its schedules
    LAYOUTS, PRESETS    the paper's layout and ours; FAR-B, -L, -H and small ones

Shapes: B images, C latent channels, H side of the latent grid, L bands (l = 1..L), k_l frequencies per axis that
band l keeps, N tokens of all bands of a call, D width. x is the scaled latent, (B, C, H, H), unit variance.
"""
import math
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import check_fields
from diffusion import DiffusionHead, fast_attention, n_noise
from text import ByteEncoder

# The two ways to lay bands out. Everything else is shared.
#             tokens of a band      what the head learns            what the transformer sees
LAYOUTS = {
    "paper": dict(grid="full",      target="full",                  context="last",
                  predict="eps", times="uniform", input_noise=0.0, loss_weight="sine", temperature_curve="cosine",
                  head_attention=0),
    "band":  dict(grid="band",      target="band",                  context="all",
                  predict="v", times="logit-normal", loss_weight="uniform", temperature_curve="constant"),
}
# The baseline of mar.py: no bands, tokens by position
LAYOUTS["random"] = dict(order="random", grid="full", target="full", context="last", predict="v", input_noise=0.0,
                         mask="truncnorm", head_attention=0)
LAYOUTS["raster"] = dict(LAYOUTS["random"], order="raster")


@dataclass
class FARConfig:
    latent_size: int = 8              # H, the tokenizer's grid
    latent_dim: int = 4               # C, channels of a token
    bands: tuple = (1, 2, 4, 8)       # k_1 < ... < k_L = H
    n_class: int = 10
    text_dim: int = 0                 # width of the text vectors of a text-conditioned model, 0 for classes
    byte_depth: int = 0               # blocks of the text encoder inside the model; 0: a frozen one gives the vectors
    # the layout (see LAYOUTS)
    order: str = "frequency"          # of the autoregression; random or raster: the baseline of mar.py
    grid: str = "band"                # full: every band is H x H tokens; band: band l is k_l x k_l tokens
    target: str = "band"              # full: the head learns x; band: it learns x^l on its own grid, to unit variance
    context: str = "all"              # last: the transformer sees x^{l-1}; all: x^1 ... x^{l-1}, under the band-causal mask
    lowpass: str = "spatial"          # or fft
    # the transformer
    width: int = 192                  # D
    depth: int = 4                    # blocks of the encoder, and of the decoder
    n_head: int = 6
    n_cond: int = 4                   # condition tokens in front: the class embedding repeated
    pos_std: float = 0.02             # of the position tables at the start
    dropout: float = 0.0
    # the head
    head_width: int = 192
    head_depth: int = 3
    head_attention: int = 0           # heads of attention in its blocks: a band is drawn jointly; 0, tokens independently
    schedule: str = "cosine"          # noise schedule: cosine or linear
    predict: str = "v"                # v or eps
    times: str = "logit-normal"       # diffusion steps of training: uniform, or logit-normal, which are more often in the middle
    times_mean: float = 0.0           # of their logit: above 0, more noise, where a band's layout is still undecided
    noise_levels: int = 4             # that each z of the largest band is trained with per step, smaller bands with more
    # training
    label_drop: float = 0.1           # how often the condition is dropped, for guidance
    loss_weight: str = "uniform"      # of the bands: uniform, sine or article
    ladder: str = "fixed"             # bands of a step, context all: fixed, all of them; random, so that sampling may skip some
    mask: str = "none"                # share of tokens the encoder does not see: none, linear or truncnorm
    input_noise: float = 0.4          # lower bands carry noise of std up to this in training, so that a band repairs them
    # sampling
    guidance: str = "linear"          # over the bands: linear, from 1 towards cfg (the released code), or constant
    temperature_curve: str = "constant"  # over the bands: constant, or cosine (0.8 -> 1, the released code)

    def __post_init__(self):
        self.bands = tuple(self.bands)
        check_fields(self)
        if not (min(self.n_head, self.width, self.head_width, self.latent_dim, self.latent_size) > 0
                and self.latent_size <= 1024 and max(self.depth, self.head_depth, self.byte_depth) <= 1000):
            raise ValueError("no network has these sizes: width, heads and channels from 1, at most 1000 blocks, "
                             "a grid of at most 1024")
        choices = dict(
            order=("frequency", "random", "raster"), grid=("full", "band"), target=("full", "band"), context=("last", "all"),
            lowpass=("spatial", "fft"), schedule=("cosine", "linear"), predict=("v", "eps"), times=("uniform", "logit-normal"),
            loss_weight=tuple(LOSS_WEIGHTS), mask=MASKS, ladder=("fixed", "random"), guidance=("constant", "linear"),
            temperature_curve=("constant", "cosine"))
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is one of {', '.join(known)}, not {getattr(self, name)!r}")
        check_bands(self.bands, self.latent_size)
        if self.width % self.n_head:
            raise ValueError(f"width {self.width} is not a multiple of n_head {self.n_head}")
        if self.byte_depth and (not self.text_dim or self.text_dim % self.n_head):
            raise ValueError(f"byte_depth needs a text_dim that is a multiple of n_head {self.n_head}, not {self.text_dim}")
        if self.ladder == "random" and self.context == "last":
            raise ValueError("ladder random needs context all: with context last every step trains one band anyway")
        if self.grid == "band" and self.target == "full":
            raise ValueError("target full (the head learns the unfiltered x) needs grid full")
        if self.head_attention and (self.head_width % self.head_attention or self.order != "frequency"):
            raise ValueError("head_attention needs a head_width that is a multiple of it, and the frequency order")
        if self.n_class < 1 or self.noise_levels < 1:
            raise ValueError(f"n_class and noise_levels must be at least 1, not {self.n_class} and {self.noise_levels}")
        if not (0 <= self.dropout < 1 and 0 <= self.label_drop < 1):
            raise ValueError(f"dropout and label_drop must be from 0 to below 1, not {self.dropout} and {self.label_drop}")
        if not (0 <= self.input_noise < math.inf and 0 <= self.pos_std < math.inf and math.isfinite(self.times_mean)):
            raise ValueError("input_noise and pos_std must be 0 or more, times_mean any number")
        if self.order != "frequency" and not (self.grid == self.target == "full" and self.bands == (self.latent_size,)):
            raise ValueError("random and raster order need grid full, target full and one band, the whole grid")


def check_bands(bands, latent_size):
    """Raise ValueError unless the bands are whole numbers that increase and end at the grid's side."""
    if not bands or any(a >= b for a, b in zip((0,) + tuple(bands), bands)) or bands[-1] != latent_size:
        raise ValueError(f"bands must increase from at least 1 and end at the latent grid's side {latent_size}, "
                         f"not {','.join(map(str, bands))}")


# ---------------------------------------------------------------------------------------------------------------------
# The frequency ladder

def lowpass_matrices(size, k, kind):
    """
    The low-pass that keeps k frequencies per axis, as two matrices: A (k, size) takes an axis to k samples, U (size, k)
    brings it back; lowpass(x, k) = U A x A^T U^T. `spatial`: area down-sampling, bicubic up-sampling (FAR's released
    code; its default). `fft`: Fourier resampling, an exact projection (FAR, frequency filtering). k = 0: nothing is left.
    """
    if k == 0:
        return torch.zeros(0, size), torch.zeros(size, 0)
    if kind == "fft":
        return fft_resample(torch.eye(size), k).T.contiguous(), fft_resample(torch.eye(k), size).T.contiguous()
    down = F.interpolate(torch.eye(size)[None], k, mode="area")[0].T                             # (k, size)
    up = F.interpolate(torch.eye(k)[None, :, :, None], (size, 1), mode="bicubic")[0, :, :, 0].T  # (size, k)
    return down.contiguous(), up.contiguous()


def fft_resample(x, m):
    """
    Resample the last axis of x (..., n) to m points by cropping or zero-padding its Fourier spectrum. The Nyquist bin of
    an even length stands for two frequencies: it is doubled on the way down and halved on the way up (as scipy.signal.resample).
    """
    n, keep = x.shape[-1], min(x.shape[-1], m)
    spectrum = torch.fft.rfft(x)
    resampled = spectrum.new_zeros(*x.shape[:-1], m // 2 + 1)
    resampled[..., :keep // 2 + 1] = spectrum[..., :keep // 2 + 1]
    if keep % 2 == 0 and m != n:
        resampled[..., keep // 2] *= 2 if m < n else 0.5
    return torch.fft.irfft(resampled, n=m) * (m / n)


def both_axes(matrix, x):
    """matrix (..., h, H) along both axes of x (..., C, H, H) -> (..., C, h, h)."""
    return matrix @ x @ matrix.mT


def lowpass(x, k, kind="spatial"):
    """x^l of the paper: x (B, C, H, H) with k frequencies per axis kept. k = H is the identity, k = 0 gives zeros."""
    down, up = lowpass_matrices(x.shape[-1], k, kind)
    return both_axes((up @ down).to(x), x)


# ---------------------------------------------------------------------------------------------------------------------
# What changes from band to band

def loss_weight_sine(k_in, k_out, size):
    """The released code's: 1 to 2, rising with the cut-off k of the input."""
    return 1 + math.sin(math.pi / 2 * (k_in + 1) / size)


def loss_weight_article(k_in, k_out, size):
    """
    The article's formula sin(pi l / L), kept for the record: it is 0 for the last band, which then never learns
    anything, although the text says that high bands weigh more.
    """
    return math.sin(math.pi * k_out / size) if k_out < size else 0.0


LOSS_WEIGHTS = {"uniform": lambda k_in, k_out, size: 1.0, "sine": loss_weight_sine, "article": loss_weight_article}
MASKS = ("none", "linear", "truncnorm")


def mask_ratio(kind, k_in, size, u):
    """
    Share of a band's tokens that is hidden from the encoder. `linear` (article): 0.7 for the lowest band down to 0 for one
    whose input keeps all but one frequency, the highest of the paper's list. `truncnorm` (released code): normal, mean 1,
    std 0.25, cut to [0.7 k/H, 1]; u in [0, 1) picks the quantile.
    """
    if kind == "linear":
        return 0.7 * (1 - k_in / max(size - 1, 1)) if k_in < size else 0.0
    low = torch.tensor((0.7 * k_in / size - 1) / 0.25)
    cdf = lambda x: 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    quantile = cdf(low) + u * (0.5 - cdf(low))
    return float((1 + 0.25 * math.sqrt(2) * torch.erfinv(2 * quantile - 1)).clamp(0.7 * k_in / size, 1))


def linear_steps(first, last, L):
    """Diffusion steps per band: linear from the lowest to the highest band (article: 100 to 1000; released code: 100)."""
    return [round(first + (last - first) * s / max(L - 1, 1)) for s in range(L)]


def guidance_weights(kind, scale, L):
    """Guidance per band. `linear` (released code): 1 + (scale - 1) s / L for s = 0..L-1, which never reaches `scale`."""
    return [1 + (scale - 1) * s / L if kind == "linear" else scale for s in range(L)]


def temperatures(kind, scale, L):
    """Temperature per band. `cosine` (released code): 0.8 + 0.2 (1 - cos(pi/2 (s+1)/L)), times `scale`."""
    return [scale * (0.8 + 0.2 * (1 - math.cos(math.pi / 2 * (s + 1) / L))) if kind == "cosine" else scale for s in range(L)]


def band_causal_mask(n_tokens):
    """
    True where attention is allowed: inside a band all tokens see each other, across bands they look down only.
    n_tokens = [1, 2, 3] (the condition tokens count as the lowest band) gives, with x = may look:

        query / key   0 | 1 1 | 2 2 2
                0     x | . . | . . .
                1     x | x x | . . .
                2     x | x x | x x x
    """
    band = torch.repeat_interleave(torch.arange(len(n_tokens)), torch.tensor(n_tokens))          # (N,)
    return band[:, None] >= band[None, :]                                                        # (N, N)


# ---------------------------------------------------------------------------------------------------------------------
# The transformer

class Attention(nn.Module):
    """Multi-head attention. `cache` (a dict, in sampling) keeps the keys and values of the lower bands."""

    def __init__(self, cfg):
        super().__init__()
        self.n_head, self.dropout = cfg.n_head, cfg.dropout
        self.qkv, self.proj = nn.Linear(cfg.width, 3 * cfg.width), nn.Linear(cfg.width, cfg.width)

    def forward(self, x, mask=None, cache=None):
        B, N, D = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.n_head, D // self.n_head).permute(2, 0, 3, 1, 4)  # (B, heads, N, d) each
        if cache is not None:
            if self in cache:
                k, v = (torch.cat(pair, dim=2) for pair in zip(cache[self], (k, v)))             # (B, heads, lower + N, d)
            cache[self] = k, v
        y = fast_attention(q, k, v, mask, self.dropout if self.training else 0.0)
        return F.dropout(self.proj(y.transpose(1, 2).reshape(B, N, D)), self.dropout, self.training)


class CrossAttention(nn.Module):
    """Attention to the text. With a cache, its keys and values are computed once per image, not once per band."""

    def __init__(self, cfg):
        super().__init__()
        self.n_head = cfg.n_head
        self.q, self.kv = nn.Linear(cfg.width, cfg.width), nn.Linear(cfg.width, 2 * cfg.width)
        self.proj = nn.Linear(cfg.width, cfg.width)

    def forward(self, x, text, cache=None):
        B, N, D = x.shape
        vectors, visible = text                                                                  # (B, M, D), (B, M)
        if cache is not None and self in cache:
            k, v = cache[self]
        else:
            k, v = self.kv(vectors).view(B, -1, 2, self.n_head, D // self.n_head).permute(2, 0, 3, 1, 4)
            if cache is not None:
                cache[self] = k, v
        q = self.q(x).view(B, N, self.n_head, D // self.n_head).transpose(1, 2)                  # (B, heads, N, d)
        y = fast_attention(q, k, v, visible[:, None, None])                                      # padding is not looked at
        return self.proj(y.transpose(1, 2).reshape(B, N, D))


class MLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.fc1, self.fc2, self.dropout = nn.Linear(cfg.width, 4 * cfg.width), nn.Linear(4 * cfg.width, cfg.width), cfg.dropout

    def forward(self, x):
        return F.dropout(self.fc2(F.gelu(self.fc1(x))), self.dropout, self.training)


class Block(nn.Module):
    """Pre-norm transformer block; text-conditioned models look at the text between attention and MLP."""

    def __init__(self, cfg):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(cfg.width, eps=1e-6), Attention(cfg)
        if cfg.text_dim:
            self.norm_text, self.cross = nn.LayerNorm(cfg.width, eps=1e-6), CrossAttention(cfg)
        self.norm2, self.mlp = nn.LayerNorm(cfg.width, eps=1e-6), MLP(cfg)

    def forward(self, x, mask=None, text=None, cache=None):
        x = x + self.attn(self.norm1(x), mask, cache)
        if text is not None:
            x = x + self.cross(self.norm_text(x), text, cache)
        return x + self.mlp(self.norm2(x))


class Randomness:
    """
    The random numbers of one training step: a function of (seed, step) alone. They are drawn for the global batch, and
    every rank keeps its rows, so that a resumed run repeats an unbroken one, and several processes repeat one.
    """

    def __init__(self, seed, step, device="cpu", rank=0, world=1):
        self.generator = torch.Generator(device).manual_seed(seed * 1_000_003 + step)
        self.rank, self.world = rank, world

    def __call__(self, kind, n, *shape):
        """kind: torch.rand or torch.randn -> (n, *shape), this rank's rows of (world n, *shape)."""
        everyone = kind(self.world * n, *shape, generator=self.generator, device=self.generator.device)
        return everyone[self.rank * n:(self.rank + 1) * n]

    def shared(self, kind, *shape):
        """kind(*shape) on the CPU, the same numbers on every rank."""
        return kind(*shape, generator=self.generator, device=self.generator.device).cpu()


class FAR(nn.Module):
    """Frequency autoregressive model: `forward` is the loss of a batch, `sample` draws images."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        H, D = cfg.latent_size, cfg.width
        # condition
        if cfg.text_dim:
            self.text_in = nn.Linear(cfg.text_dim, D)
            self.null_text = nn.Parameter(torch.randn(1, 1, cfg.text_dim) * 0.02)
            if cfg.byte_depth:
                plain = replace(cfg, width=cfg.text_dim, text_dim=0, byte_depth=0)
                self.text_encoder = ByteEncoder(cfg.text_dim, [Block(plain) for _ in range(cfg.byte_depth)])
        else:
            self.class_embed = nn.Embedding(cfg.n_class, D)
        self.null_cond = nn.Parameter(torch.randn(1, D) * 0.02)           # "no label", the branch that guidance subtracts
        # encoder and decoder
        self.token_in, self.norm_in = nn.Linear(cfg.latent_dim, D), nn.LayerNorm(D, eps=1e-6)
        self.encoder = nn.ModuleList(Block(cfg) for _ in range(cfg.depth))
        self.encoder_norm, self.decoder_in = nn.LayerNorm(D, eps=1e-6), nn.Linear(D, D)
        self.decoder = nn.ModuleList(Block(cfg) for _ in range(cfg.depth))
        self.decoder_norm = nn.LayerNorm(D, eps=1e-6)
        self.mask_token = nn.Parameter(torch.randn(1, 1, D) * 0.02, requires_grad=cfg.mask != "none")
        # positions: one table on the H x H grid, low-passed to a band's grid; condition tokens in front
        self.encoder_pos = nn.Parameter(torch.randn(1, cfg.n_cond + H * H, D) * cfg.pos_std)
        self.decoder_pos = nn.Parameter(torch.randn(1, cfg.n_cond + H * H, D) * cfg.pos_std)
        self.head_pos = nn.Parameter(torch.randn(1, H * H, D) * 0.02)
        if cfg.grid == "band" or cfg.context == "all":                    # the paper's layout does not tell the level here
            self.level_in, self.level_out = nn.Parameter(torch.zeros(H + 1, D)), nn.Parameter(torch.zeros(H + 1, D))
        for linear in [m for m in self.modules() if isinstance(m, nn.Linear)]:
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        if not cfg.text_dim:
            nn.init.normal_(self.class_embed.weight, std=0.02)
        self.head = DiffusionHead(cfg.latent_dim, D, cfg.head_width, cfg.head_depth, cfg.schedule, cfg.predict,
                                  cfg.head_attention)
        # the ladder: A_k in down[k, :k], U_k in up[k, :, :k], and the std of every band of the training data
        down, up = torch.zeros(H + 1, H, H), torch.zeros(H + 1, H, H)
        for k in range(1, H + 1):
            down[k, :k], up[k, :, :k] = lowpass_matrices(H, k, cfg.lowpass)
        self.register_buffer("down", down, persistent=False)
        self.register_buffer("up", up, persistent=False)
        self.register_buffer("band_std", torch.ones(H + 1))
        self.checkpoint_activations = False

    # ---- bands

    def band(self, x, k):
        """
        The band that keeps k frequencies, on its own grid, to unit variance where the head learns bands.
        x (B, C, H, H), k an int, or with grid full a LongTensor (B,) -> (B, C, g, g).
        """
        if self.cfg.grid == "band":
            return both_axes(self.down[k, :k], x) / self.band_std[k]
        lowpass = (self.up @ self.down)[k]                                                       # (H, H) or (B, H, H)
        if torch.is_tensor(k):
            return both_axes(lowpass[:, None], x) / self.band_std[k][:, None, None, None]
        return both_axes(lowpass, x) / self.band_std[k]

    def raise_band(self, y, k_in, k_out):
        """Band k_in on the grid of band k_out, which is predicted from it: (B, C, g_in, g_in) -> (B, C, g_out, g_out)."""
        if self.cfg.grid == "full":
            return y
        if k_in == 0:
            return y.new_zeros(*y.shape[:2], k_out, k_out)
        return both_axes(self.down[k_out, :k_out] @ self.up[k_in, :, :k_in], y)

    def show_band(self, y, k):
        """A band back on the full grid, in the units of x: x^l, (B, C, H, H)."""
        return (both_axes(self.up[k, :, :k], y) if self.cfg.grid == "band" else y) * self.band_std[k]

    @torch.no_grad()
    def measure_band_std(self, x):
        """Store the std of every band over latents x (n, C, H, H): bands are divided by it, unless the head learns x."""
        if self.cfg.target == "band":
            self.band_std.fill_(1)
            self.band_std[1:] = torch.stack([self.band(x, k).std() for k in range(1, self.cfg.latent_size + 1)])

    # ---- the transformer

    def condition(self, labels=None, text=None, drop=None):
        """
        The condition: labels LongTensor (B,), or text = (vectors (B, M, text_dim), visible (B, M) bool), with an encoder of
        its own (tokens (B, M, 12) uint8, visible); `drop` (B,) bool picks the images whose condition is replaced by the
        learned null -> (vector (B, D), text or None) for `transformer`.
        """
        if text is None:
            vector = self.class_embed(labels)                                                    # (B, D)
            if drop is not None:
                vector = torch.where(drop[:, None], self.null_cond, vector)
            return vector, None
        vectors, visible = text
        if self.cfg.byte_depth:
            vectors = self.text_encoder(vectors, visible)                                        # (B, M, text_dim)
        if drop is not None:                             # the null text is one learned vector; the rest is padding
            vectors = torch.where(drop[:, None, None], self.null_text, vectors)
            first = torch.arange(visible.shape[1], device=visible.device) == 0
            visible = torch.where(drop[:, None], first, visible)
        return self.null_cond.expand(len(vectors), -1), (self.text_in(vectors), visible)

    def positions(self, table, bands):
        """table (1, H^2, D) at the grids of `bands`, a list of (k_in, k_out) -> (1, N, D), or (B, N, D)."""
        H = self.cfg.latent_size
        if self.cfg.grid == "full":
            return table.repeat(1, len(bands), 1)
        grid = table.view(H, H, -1).permute(2, 0, 1)                                             # (D, H, H)
        return torch.cat([both_axes(self.down[k, :k], grid).flatten(1).T for _, k in bands])[None]

    def transformer(self, inputs, bands, condition, hidden=None, cache=None):
        """
        inputs: for each band of the call its (B, C, g, g); bands: for each its (k_in, k_out), ints, or with one band of
        grid full LongTensors (B,); condition as `condition` returns it; hidden (B, N) bool, the tokens that the encoder
        does not see. With a cache (a dict), the call continues the bands of the calls before. -> z (B, N, D).
        """
        cfg, B = self.cfg, len(inputs[0])
        vector, text = condition
        n_cond = cfg.n_cond if not cache else 0                          # condition tokens are in the first call only
        n_tokens = [x.shape[-1] ** 2 for x in inputs]
        x = self.token_in(torch.cat([x.flatten(2).mT for x in inputs], dim=1))                   # (B, N, D)
        level = 0
        if hasattr(self, "level_in"):
            levels = [(self.level_in[a] + self.level_out[b]).view(-1, 1, cfg.width).expand(-1, n, -1)
                      for (a, b), n in zip(bands, n_tokens)]
            level = torch.cat(levels, dim=1)                                                     # (1 or B, N, D)
        tables = [(table[:, :n_cond], self.positions(table[:, cfg.n_cond:], bands) + level)
                  for table in (self.encoder_pos, self.decoder_pos)]

        # With one band, or a new band above cached ones, everything may be looked at: no mask
        groups = [n_cond] * (n_cond > 0) + n_tokens
        mask = band_causal_mask(groups).to(x.device) if cfg.context == "all" and len(groups) > 1 else None   # (n_cond + N,)^2

        # encoder: the visible tokens only
        cond = vector[:, None].expand(-1, n_cond, -1)                                            # (B, n_cond, D)
        x = torch.cat([cond + tables[0][0], x + tables[0][1]], dim=1)                            # (B, n_cond + N, D)
        x = self.norm_in(x)
        if hidden is None:
            x = self.run(self.encoder, x, mask, text, cache)
        else:
            hidden = F.pad(hidden, (n_cond, 0))                                                  # (B, n_cond + N)
            visible, order = (~hidden).sort(dim=1, descending=True, stable=True)                 # visible tokens to the front
            n = int(visible.sum(dim=1).max())
            visible, order = visible[:, :n], order[:, :n]                                        # (B, n)
            allowed = None
            if mask is not None or not visible.all():                    # images with fewer visible tokens are padded
                allowed = visible[:, None, None, :].expand(-1, 1, n, -1)                         # (B, 1, n, n)
                if mask is not None:
                    allowed = allowed & mask[order[:, :, None], order[:, None, :]][:, None]
            x = x.gather(1, order[..., None].expand(-1, -1, cfg.width))                          # (B, n, D)
            x = self.run(self.encoder, x, allowed, text, cache)
        x = self.decoder_in(self.encoder_norm(x))

        # decoder: mask tokens where the encoder saw nothing
        if hidden is not None:
            everything = self.mask_token.to(x.dtype).expand(B, hidden.shape[1], -1)
            x = torch.where(visible[..., None], x, self.mask_token.to(x.dtype))
            x = everything.scatter(1, order[..., None].expand(-1, -1, cfg.width), x)             # (B, n_cond + N, D)
        x = torch.cat([x[:, :n_cond] + tables[1][0], x[:, n_cond:] + tables[1][1]], dim=1)
        x = self.decoder_norm(self.run(self.decoder, x, mask, text, cache))
        return x[:, n_cond:] + self.positions(self.head_pos, bands)                              # (B, N, D)

    def run(self, blocks, x, mask, text, cache):
        for block in blocks:
            if self.checkpoint_activations and self.training:
                x = torch.utils.checkpoint.checkpoint(block, x, mask, text, use_reentrant=False)
            else:
                x = block(x, mask, text, cache)
        return x

    # ---- training

    def forward(self, x, draw, labels=None, text=None):
        """
        The loss of a batch. x (B, C, H, H) scaled latents; draw: the step's Randomness; labels (B,) or text (see
        `condition`). Returns the loss, a scalar, and the unweighted squared error of every band, (L,) (nan: not trained
        in this step). context all trains every band; context last one random band per image.
        """
        cfg, B, L = self.cfg, len(x), len(self.cfg.bands)
        rungs = torch.arange(L)
        if cfg.ladder == "random":
            rungs = ((draw.shared(torch.rand, L) < 0.5) | (rungs == L - 1)).nonzero()[:, 0]
        k_out = torch.tensor(cfg.bands)[rungs]
        k_in = torch.cat([torch.zeros(1, dtype=torch.long), k_out[:-1]])
        drop = draw(torch.rand, B) < cfg.label_drop
        if cfg.context == "all":
            pick = torch.arange(len(rungs)).expand(B, -1)                                        # (B, bands of this call)
            bands = list(zip(k_in.tolist(), k_out.tolist()))
        elif cfg.grid == "full":
            pick = (draw(torch.rand, B, 1).cpu() * L).long()
            bands = [(k_in[pick[:, 0]].to(x.device), k_out[pick[:, 0]].to(x.device))]
        else:                                            # tokens of a batch must stand on one grid: one band for all
            pick = (draw.shared(torch.rand, 1) * L).long().expand(B, 1)
            bands = [(int(k_in[pick[0, 0]]), int(k_out[pick[0, 0]]))]

        inputs, targets = [], []
        for a, b in bands:
            lower = self.band(x, a) if torch.is_tensor(a) or a else x                            # k_in = 0 is never read
            if cfg.input_noise and (torch.is_tensor(a) or a):
                amount = cfg.input_noise * draw(torch.rand, B, 1, 1, 1)                          # not told to the model
                lower = lower + amount * draw(torch.randn, *lower.shape)
            if not torch.is_tensor(a) and not a and cfg.grid == "full":
                lower = torch.zeros_like(x)
            inputs.append(self.raise_band(lower, a, b))
            target = x if cfg.target == "full" else self.band(x, b)
            targets.append(target.flatten(2).mT)                                                 # (B, N_l, C) each
        n_tokens = [t.shape[1] for t in targets]
        hidden = self.hide(k_in[pick], n_tokens, draw) if cfg.mask != "none" else None
        z = self.transformer(inputs, bands, self.condition(labels, text, drop), hidden)          # (B, N, D)

        weigh = LOSS_WEIGHTS[cfg.loss_weight]
        weights = torch.tensor([weigh(a, b, cfg.latent_size) for a, b in zip(k_in.tolist(), k_out.tolist())])
        total, count, per_band = 0.0, 0, torch.full((B, L), torch.nan, device=x.device)
        for z_l, target, l in zip(z.split(n_tokens, dim=1), targets, pick.T):
            N, C = target.shape[1:]
            # each z serves for several noise levels; the small low bands get more of them, else the large ones drown them
            r = round(cfg.noise_levels * math.sqrt(max(n_tokens) / N)) if cfg.context == "all" else cfg.noise_levels
            condition = self.head.condition(z_l, k_in[l].to(z_l)[:, None, None])                 # (B, N_l, W), once for r levels
            each = lambda v: v[:, None].expand(B, r, N, v.shape[-1]).flatten(0, 1)               # (B r, N_l, .)
            t = self.head.draw_times(cfg.times, draw, B, r, 1 if self.head.joint else N, mean=cfg.times_mean)
            noise_l = draw(torch.randn, B, r, N, C)
            mse, bits = self.head.loss(each(target), each(condition), t.flatten(0, 1), noise_l.flatten(0, 1))
            total = total + ((mse + bits).view(B, -1).sum(dim=1) * weights[l].to(x.device)).sum()
            count += mse.numel()
            per_band[torch.arange(B), rungs[l].to(x.device)] = mse.detach().view(B, -1).mean(dim=1)
        return total / count, per_band.nanmean(dim=0)

    def hide(self, k_in, n_tokens, draw):
        """The tokens that the encoder does not see, a random share (see mask_ratio); k_in (B, bands) -> (B, N) bool."""
        B = len(k_in)
        hidden = []
        for i, n in enumerate(n_tokens):
            u = draw(torch.rand, B, 1)
            ratio = torch.tensor([[mask_ratio(self.cfg.mask, k, self.cfg.latent_size, float(v))]
                                  for k, v in zip(k_in[:, i].tolist(), u[:, 0])]).to(u)          # (B, 1)
            rank = draw(torch.rand, B, n).argsort(dim=1).argsort(dim=1)                          # (B, n), a random order
            hidden.append(rank < (ratio * n).floor())
        return torch.cat(hidden, dim=1)

    # ---- sampling

    @torch.inference_mode()
    def sample(self, labels=None, text=None, seed=0, first=0, bands=None, cfg_scale=1.0, temperature=1.0,
               steps=(10, 10), sampler="dpmpp", masked=False, progress=lambda: None):
        """
        Draw images band by band (FAR, inference). labels (B,) or text, one image each. Image i's noise depends on
        (seed, first + i) only. bands: the ladder to climb, cfg.bands by default; cfg_scale: guidance; steps: diffusion
        steps of the lowest and of the highest band, linear between. -> list of x^l, (B, C, H, H) each; the last is x.
        """
        cfg, device = self.cfg, self.band_std.device
        bands = tuple(bands or cfg.bands)
        check_bands(bands, cfg.latent_size)
        B, L, C = len(labels if text is None else text[0]), len(bands), cfg.latent_dim
        generators = [torch.Generator().manual_seed(seed * 1_000_003 + first + i) for i in range(B)]
        draw = lambda kind, *shape: torch.stack([kind(*shape, generator=g) for g in generators]).to(device)
        weights = guidance_weights(cfg.guidance, cfg_scale, L)
        guided = any(w != 1 for w in weights)
        condition = self.condition(labels, text)
        if guided:                                                       # the conditional images, then the unconditional ones
            null = self.condition(labels, text, torch.ones(B, dtype=torch.bool, device=device))
            join = lambda a, b: torch.cat([a, b])
            condition = (join(condition[0], null[0]), condition[1] and tuple(map(join, condition[1], null[1])))
        cache = {} if cfg.context == "all" else None
        y, k_in, ladder = torch.zeros(B, C, cfg.latent_size, cfg.latent_size, device=device), 0, []
        for k, w, tau, S in zip(bands, weights, temperatures(cfg.temperature_curve, temperature, L), linear_steps(*steps, L)):
            lower = self.raise_band(y, k_in, k)                                                  # (B, C, g, g)
            N = lower.shape[-1] ** 2
            hidden = None
            if masked:
                n_hidden = int(mask_ratio("linear", k_in, cfg.latent_size, 0.5) * N)
                hidden = draw(torch.rand, N).argsort(dim=1).argsort(dim=1) < n_hidden            # (B, N)
            if guided:
                lower, hidden = torch.cat([lower, lower]), None if hidden is None else torch.cat([hidden, hidden])
            z = self.transformer([lower], [(k_in, k)], condition, hidden, cache)                 # (B or 2B, N, D)
            z = z[:B] if w == 1 else z                                   # no second branch where it would have no weight
            noise = draw(torch.randn, n_noise(S, sampler), N, C)                                 # (B, n, N, C)
            level = torch.full((1, 1, 1), float(k_in), device=device)
            tokens = self.head.sample(self.head.condition(z, level), noise, S, sampler, w, tau)  # (B, N, C)
            y = tokens.mT.reshape(B, C, *lower.shape[-2:])
            y = self.band(y, k) if cfg.target == "full" else y
            ladder.append(self.show_band(y, k))
            k_in = k
            progress()
        return ladder


# ---------------------------------------------------------------------------------------------------------------------
# Sizes. far_b, far_l and far_h are the paper's; the smaller ones are for a CPU or one small GPU.

PRESETS = {
    "far_nano": dict(width=96, depth=2, n_head=4, n_cond=1, head_width=128, head_depth=2, noise_levels=2),
    # draws the tokens of a band jointly, with more noise on the lower bands: half its weights are in the head
    "far_tiny": dict(width=128, depth=1, n_head=4, n_cond=1, head_width=128, head_depth=3, head_attention=4, noise_levels=1,
                     input_noise=0.8),
    "far_s": dict(width=384, depth=6, n_head=6, n_cond=4, head_width=384, head_depth=4),
    "far_b": dict(width=768, depth=12, n_head=12, n_cond=64, head_width=1024, head_depth=6, dropout=0.1),
    "far_l": dict(width=1024, depth=16, n_head=16, n_cond=64, head_width=1024, head_depth=3, dropout=0.1),
    "far_h": dict(width=1280, depth=20, n_head=16, n_cond=64, head_width=1024, head_depth=3, dropout=0.1),
}
PRESETS["far_xl"] = PRESETS["far_h"]                     # the authors' other name for it
# Text to image: far_l with cross-attention to Qwen2-1.5B's vectors, and a small one. Any other size takes text as well.
PRESETS["far_t2i"] = dict(PRESETS["far_l"], text_dim=1536)
# To put things where the text says the small one needs two more: training times with more noise, for a band's layout shows
# through all the rest and nothing then needs the text; and positions that start as large as tokens, even low-passed to
# 2 x 2, for word order and places are learnt together or not at all.
PRESETS["far_tiny_t2i"] = dict(PRESETS["far_tiny"], depth=2, text_dim=128, byte_depth=2, noise_levels=2, input_noise=0.4,
                               times_mean=1.0, pos_std=2.0)


def default_bands(latent_size, layout):
    """The band list of a layout: every cut-off 1..H for the paper's, powers of two up to H for ours."""
    if layout == "paper":
        return tuple(range(1, latent_size + 1))
    if layout in ("random", "raster"):
        return (latent_size,)
    return tuple(2 ** i for i in range(int(math.log2(latent_size)) + 1) if 2 ** i < latent_size) + (latent_size,)


def preset_fields(model, layout, latent_size):
    """The fields of FARConfig that a preset and a layout decide, and their bands: a dict. The layout has the last word."""
    return {**PRESETS[model], **LAYOUTS[layout], "bands": default_bands(latent_size, layout)}


def sampling_defaults(cfg):
    """
    How a model is sampled unless told otherwise: the released procedure for the paper's layout; for ours steps, guidance
    and temperature as they measured best on Fashion-MNIST (README, "Fast sampling"): more steps for the low bands, which
    decide most and have few tokens; less temperature for text, where being right counts. No guidance without a null condition.
    """
    if cfg.order == "frequency" and cfg.context == "last" and cfg.target == "full":
        return dict(bands=paper_sampling_bands(cfg.latent_size), sampler="ddpm", steps=(100, 100), cfg_scale=1.0, temperature=1.0)
    return dict(bands=cfg.bands, sampler="dpmpp", steps=(24, 10), cfg_scale=4.0 if cfg.label_drop else 1.0,
                temperature=1.0 if cfg.text_dim else 1.15)


def paper_sampling_bands(latent_size):
    """The released sampler's list, inputs k = 0, 2, 3, ..., 10 at H = 16, scaled to other grids."""
    inputs = sorted({max(1, round(k * latent_size / 16)) for k in range(2, 11)})
    return tuple(k for k in inputs if k < latent_size) + (latent_size,)
