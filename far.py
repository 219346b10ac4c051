"""
FAR: images from low to high frequency. Layouts, what a band is, who sees whom, the loss, the sampler, sizes.

An image becomes a small latent grid x (tokenizer.py). Low-passes of x form a ladder of bands x^1, ..., x^L
(bands.py). A transformer learns p(x) = prod_l p(x^l | x^{l-1}, ..., x^1): it looks at the lower bands and
answers with one vector z per token of the next, and a small diffusion head (diffusion.py) turns each z into a
sample of that token.

Shapes: B images, C latent channels, H side of the latent grid, L bands (l = 1..L), k_l frequencies per axis
that band l keeps, N tokens of all bands of a call, D width. x is the scaled latent, (B, C, H, H), variance 1.
"""
import itertools
import math
import random
from dataclasses import dataclass, fields, replace

import torch
import torch.nn as nn

import bands as ladder
from blocks import Block
from common import step_generator
from diffusion import DiffusionHead
from text import ByteEncoder

# Three ways to lay bands out. `paper`: as the paper describes it. `released`: the authors' repository, number
# for number, what their checkpoints load into. `band`: ours. Everything else is shared.
LAYOUTS = {
    "paper":    dict(grid="full", target="full", context="last", mask="linear", loss_weight="sine",
                     predict="eps", times="uniform", noise_levels=4, input_noise=0.0, head_attention=0),
    "released": dict(grid="full", target="full", context="last", mask="none", loss_weight="uniform",
                     predict="eps", times="uniform", noise_levels=4, input_noise=0.0, head_attention=0),
    "band":     dict(grid="band", target="band", context="all", mask="none", loss_weight="uniform",
                     predict="v", times="logit-normal"),
}
# How each is sampled unless told otherwise: arguments of FAR.sample
SAMPLING = {
    "paper":    dict(sampler="ddpm", steps=(40, 100), cfg=4.0, temperature=1.0, hold=5.0),
    "released": dict(sampler="ddpm", steps=(100, 100), cfg=3.0, temperature=1.0, cool=True),
    "band":     dict(sampler="dpmpp", steps=(24, 10), cfg=4.0, temperature=1.15),
}
CHOICES = dict(layout=tuple(LAYOUTS), lowpass=ladder.LOWPASSES, grid=("full", "band"),
               target=("full", "band"), context=("last", "all"), schedule=("cosine", "linear"),
               predict=("v", "eps"), times=("uniform", "logit-normal"), mask=("none", "linear", "truncnorm"),
               loss_weight=("uniform", "sine", "article"))


@dataclass
class FARConfig:
    layout: str = "band"              # a key of LAYOUTS: where the fields marked * come from
    latent_size: int = 8              # H, the tokenizer's grid
    latent_dim: int = 4               # C, channels of a token
    bands: tuple = (1, 2, 4, 8)       # k_1 < ... < k_L = H
    n_class: int = 10
    text_dim: int = 0                 # width of the text vectors of a text-conditioned model, 0 for classes
    byte_depth: int = 0       # blocks of the text encoder inside the model; 0: a frozen one gives the vectors
    # bands
    lowpass: str = "spatial"          # or fft
    grid: str = "band"                # * full: every band is H x H tokens; band: band l is k_l x k_l tokens
    target: str = "band"              # * full (S1): the head learns x; band: it learns x^l, to unit variance
    context: str = "all"         # * last: the transformer sees x^{l-1}; all: every lower band, under the mask
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
    head_attention: int = 0       # * heads of attention: a band is drawn jointly; 0: its tokens independently
    head_lean: int = 0            # 1: a joint head for little time, see DiffusionHead
    schedule: str = "cosine"          # noise schedule: cosine or linear
    predict: str = "v"                # * what the head predicts: v, or eps, the noise
    times: str = "logit-normal"       # * diffusion steps of training: uniform, or more often in the middle
    times_mean: float = 0.0    # of their logit: above 0, more noise, where a band's layout is still undecided
    noise_levels: int = 4             # that each z of the largest band is trained with per step
    # training
    label_drop: float = 0.1           # how often the condition is dropped, for guidance
    loss_weight: str = "uniform"      # * S3, of the bands: uniform, sine or article
    mask: str = "none"                # * S2, tokens that the encoder does not see: none, linear or truncnorm
    input_noise: float = 0.4  # * std of noise on lower bands in training: a band repairs them

    def __post_init__(self):
        self.bands = tuple(self.bands)
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            if name in CHOICES and value not in CHOICES[name]:
                raise ValueError(f"{name} is one of {', '.join(CHOICES[name])}, not {value!r}")
            least = 1 if field.type is int and field.default else 0           # what is 0 by default may be 0
            if field.type in (int, float) and name != "times_mean" and value < least:
                raise ValueError(f"{name} must be at least {least}")
        if max(self.dropout, self.label_drop) >= 1:
            raise ValueError("dropout and label_drop must be below 1")
        if self.width % self.n_head or (self.byte_depth and self.text_dim % self.n_head):
            raise ValueError(f"width {self.width} and text_dim must be multiples of n_head {self.n_head}")
        if self.head_attention and self.head_width % self.head_attention:
            raise ValueError(f"head_width {self.head_width} is not a multiple of head_attention")
        if self.grid == "band" and self.target == "full":
            raise ValueError("target=full (the head learns the unfiltered x) needs grid=full")
        ladder.check_bands(self.bands, self.latent_size)


# ---- random numbers

class Randomness:
    """Random numbers of a training step: a function of (seed, step) alone, however many ranks share it."""

    def __init__(self, seed, step, device="cpu", rank=0, world=1):
        self.generator, self.device = step_generator(seed, step, device), device
        self.host = random.Random(f"{seed} {step}")        # decisions: Python numbers, the same on every rank
        self.rank, self.world = rank, world

    def __call__(self, kind, n, *shape):
        """kind: torch.rand or torch.randn -> (n, *shape), this rank's rows of (world n, *shape)."""
        everyone = kind(self.world * n, *shape, generator=self.generator, device=self.device)
        return everyone[self.rank * n:(self.rank + 1) * n]


class NoiseOfImages:
    """Randomness of sampling: row i depends on the seed and the number of its image alone, in any call."""

    def __init__(self, seed, images, device):
        self.generators, self.device = [step_generator(seed, i) for i in images], device
        self.host = random.Random(seed)

    def __call__(self, kind, n, *shape):
        return torch.stack([kind(*shape, generator=g) for g in self.generators]).to(self.device)


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
        self.null_cond = nn.Parameter(torch.randn(1, D) * 0.02)   # "no label", which guidance subtracts
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
        for linear in [m for m in self.modules() if isinstance(m, nn.Linear)]:
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        if not cfg.text_dim:
            nn.init.normal_(self.class_embed.weight, std=0.02)
        self.head = DiffusionHead(cfg.latent_dim, D, cfg.head_width, cfg.head_depth, cfg.schedule,
                                  cfg.predict, cfg.head_attention, bool(cfg.head_attention and cfg.head_lean))
        if cfg.context == "all":                   # which band a token is of, and which ones it may look at
            self.level = nn.Parameter(torch.zeros(H + 1, D))
            mask = ladder.band_causal_mask([cfg.n_cond, *(self.side(k) ** 2 for k in cfg.bands)])
            self.mask = nn.Buffer(mask, persistent=False)
        # the ladder: A_k in down[k, :k], U_k in up[k, :, :k], and the std of every band of the training data
        self.down, self.up = (nn.Buffer(torch.zeros(H + 1, H, H), persistent=False) for _ in range(2))
        for k in range(1, H + 1):
            self.down[k, :k], self.up[k, :, :k] = ladder.lowpass_matrices(H, k, cfg.lowpass)
        self.band_std = nn.Buffer(torch.ones(H + 1))

    # ---- bands

    def side(self, k):
        """Side of the token grid of the band that keeps k frequencies."""
        return k if self.cfg.grid == "band" else self.cfg.latent_size

    def band(self, x, k):
        """x^l ("frequency hierarchy") on its own grid, (B, C, g, g), of variance 1 if the head learns it."""
        y = ladder.both_axes(self.down[k, :k], x)                                         # (B, C, k, k)
        return (y if self.cfg.grid == "band" else ladder.both_axes(self.up[k, :, :k], y)) / self.band_std[k]

    def raise_band(self, y, k_in, k):
        """Band k_in on the grid of band k, which is predicted from it: (B, C, g_in, g_in) -> (B, C, g, g)."""
        if self.cfg.grid == "full":
            return y
        return ladder.both_axes(self.down[k, :k], ladder.both_axes(self.up[k_in, :, :k_in], y))

    def show_band(self, y, k):
        """A band back on the full grid, in the units of x: x^l, (B, C, H, H)."""
        return (ladder.both_axes(self.up[k, :, :k], y) if self.cfg.grid == "band" else y) * self.band_std[k]

    @torch.no_grad()
    def measure_band_std(self, x):
        """Store the std of every band over latents x (n, C, H, H), for heads that learn bands."""
        if self.cfg.target == "band":
            self.band_std.fill_(1)
            for k in range(1, self.cfg.latent_size + 1):
                self.band_std[k] = self.band(x, k).std()

    # ---- the transformer

    def condition(self, labels=None, text=None, drop=None):
        """
        labels (B,), or text: vectors (B, M, text_dim) or bytes of words (B, M, 12), and visible (B, M). drop
        (B,) bool: where the null condition replaces it, None for nowhere. -> (vector (B, D), text or None).
        """
        if text is None:
            vector = self.class_embed(labels)                                             # (B, D)
            return vector if drop is None else torch.where(drop[:, None], self.null_cond, vector), None
        vectors, visible = text
        vectors = self.text_encoder(vectors, visible) if self.cfg.byte_depth else vectors.float()
        if drop is not None:                           # the null text is one learned vector; the rest padding
            vectors = torch.where(drop[:, None, None], self.null_text, vectors)
            first = torch.arange(visible.shape[1], device=visible.device) == 0
            visible = torch.where(drop[:, None], first, visible)
        return self.null_cond.expand(len(vectors), -1), (self.text_in(vectors), visible)

    def positions(self, table, ks, n_cond=0, level=True):
        """Of the condition, and on the grids of the bands `ks` with the band's own: (1, n_cond + N, D)."""
        H, found = self.cfg.latent_size, [table[:, :n_cond]]
        grid = table[:, -H * H:].mT.unflatten(2, (H, H))                                  # (1, D, H, H)
        for k in ks:
            p = grid if self.cfg.grid == "full" else ladder.both_axes(self.down[k, :k], grid)
            p = p.flatten(2).mT                                                           # (1, N_l, D)
            found.append(p + self.level[k] if level and self.cfg.context == "all" else p)
        return torch.cat(found, dim=1)

    def transformer(self, inputs, ks, condition, seen=None, cache=None):
        """
        Masked encoder and decoder, as in MAR -> z (B, N, D). inputs: for each band of the call what it is
        predicted from, (B, C, g, g); ks: how many frequencies each keeps; seen: the tokens of each that the
        encoder sees, (B, n), or None for all. With a cache (a dict), a call goes on where those before ended.
        """
        cfg, (vector, text) = self.cfg, condition
        x = self.token_in(torch.cat([y.flatten(2).mT for y in inputs], dim=1))            # (B, N, D)
        n_cond = 0 if cache else cfg.n_cond                                           # in the first call only
        cond = vector[:, None].expand(-1, n_cond, -1)                                     # (B, n_cond, D)
        x = self.norm_in(torch.cat([cond, x], dim=1) + self.positions(self.encoder_pos, ks, n_cond))
        B, total, D = x.shape                                                             # total: n_cond + N
        # who sees whom: a band above cached ones may look at everything, as may the only band of a call
        mask = encoder_mask = self.mask[:total, :total] if cfg.context == "all" and not cache else None
        if seen is not None:                 # the encoder sees the condition, and some tokens of every band
            parts = torch.arange(n_cond, device=x.device).expand(B, -1), *seen            # (B, n_l) each
            starts = itertools.accumulate([0, n_cond, *(self.side(k) ** 2 for k in ks)])
            places = torch.cat([part + start for part, start in zip(parts, starts)], dim=1)
            if mask is not None:             # of a band all images see equally many tokens: one mask fits all
                encoder_mask = mask[places[0][:, None], places[0]]                        # (n, n)
            index = places[..., None].expand(-1, -1, D)                                   # (B, n, D)
            x = x.gather(1, index)                                                        # (B, n, D)
        for block in self.encoder:
            x = block(x, encoder_mask, text, cache)
        x = self.decoder_in(self.encoder_norm(x))
        if seen is not None:                                           # mask tokens stand for all the others
            x = self.mask_token.to(x).expand(B, total, -1).scatter(1, index, x)
        x = x + self.positions(self.decoder_pos, ks, n_cond)                              # (B, n_cond + N, D)
        for block in self.decoder:
            x = block(x, mask, text, cache)
        return self.decoder_norm(x)[:, n_cond:] + self.positions(self.head_pos, ks, level=False)

    def choose_seen(self, share, k, draw, B):
        """The tokens of band k that are seen when a random `share` is hidden: LongTensor (B, n)."""
        n = self.side(k) ** 2
        hidden = min(math.floor(share * n + draw.host.random()), n)      # rounded at random: right on average
        return draw(torch.rand, B, n).argsort(dim=1)[:, hidden:]

    # ---- training

    def forward(self, x, draw, labels=None, text=None):
        """
        The loss of a batch: x (B, C, H, H) scaled latents; draw: the step's Randomness; labels (B,) or text
        (see `condition`). -> the loss, a scalar, and the unweighted squared error of every band, (L,), nan
        where it is not trained: context all trains every band in each step, context last one at random.
        """
        cfg, B, L = self.cfg, len(x), len(self.cfg.bands)
        levels = range(1, L + 1) if cfg.context == "all" else [draw.host.randint(1, L)]
        k = (0, *cfg.bands)                                                   # band 0 has no frequency at all
        inputs, targets, seen = [], [], []
        for l in levels:
            lower = self.band(x, k[l - 1])                                                # (B, C, g_in, g_in)
            if cfg.input_noise and l > 1:                                # its amount is not told to the model
                amount = cfg.input_noise * draw(torch.rand, B, 1, 1, 1)
                lower = lower + amount * draw(torch.randn, *lower.shape)
            inputs.append(self.raise_band(lower, k[l - 1], k[l]))                         # (B, C, g, g)
            # S1, the simplified diffusion loss: at every level the head learns the unfiltered x
            target = x if cfg.target == "full" else self.band(x, k[l])
            targets.append(target.flatten(2).mT)                                          # (B, N_l, C)
            if cfg.mask != "none":                                            # S2: frequency-aware masking
                share = ladder.mask_share(cfg.mask, l, L, draw.host.random())
                seen.append(self.choose_seen(share, k[l], draw, B))                       # (B, visible)
        condition = self.condition(labels, text, draw(torch.rand, B) < cfg.label_drop)
        z = self.transformer(inputs, [k[l] for l in levels], condition, seen or None)     # (B, N, D)

        total, count, errors = 0.0, 0, torch.full((L,), torch.nan, device=x.device)
        for l, target, z_l in zip(levels, targets, z.split([t.shape[1] for t in targets], dim=1)):
            mse, bits = self.diffusion_loss(target, z_l, k[l - 1], draw)                  # (B r, N_l) each
            weight = ladder.loss_weight(cfg.loss_weight, l, L)                # S3: frequency-aware loss
            total, count = total + weight * (mse + bits).sum(), count + mse.numel()
            errors[l - 1] = mse.detach().mean()
        return total / count, errors

    def diffusion_loss(self, target, z, k_in, draw):
        """
        The head's loss of one band: target (B, N, C), z (B, N, D) -> two terms, (B r, N) each. A z serves for
        r noise levels, unless lean in small bands more: a band's share then grows with sqrt(N), not with N.
        """
        cfg, (B, N, C) = self.cfg, target.shape
        r = round(cfg.noise_levels * (1 if self.head.lean else math.sqrt(cfg.latent_size ** 2 / N)))
        condition = self.head.condition(z, float(k_in))                         # (B, N, W), once for r levels
        repeat = lambda v: v[:, None].expand(B, r, N, v.shape[-1]).flatten(0, 1)          # (B r, N, .)
        t = self.head.draw_times(cfg.times, draw, B, r, 1 if self.head.joint else N, mean=cfg.times_mean)
        noise = draw(torch.randn, B, r, N, C)
        return self.head.loss(repeat(target), repeat(condition), t.flatten(0, 1), noise.flatten(0, 1))

    # ---- sampling

    @torch.inference_mode()
    def sample(self, labels=None, text=None, seed=0, first=0, progress=lambda: None, bands=None,
               sampler="dpmpp", steps=(10, 10), cfg=1.0, guidance="linear", temperature=1.0, cool=False,
               hold=None, masked=False):
        """
        Draw images band by band: labels (B,) or text, one image each -> list of x^l, (B, C, H, H) each, the
        last is x. Image i's noise depends on (seed, first + i) only. bands: the ladder to climb; steps: of
        diffusion at the lowest and the highest band; cfg: guidance, see bands.guidance; cool: the released
        code's temperatures; hold: see DiffusionHead.sample; masked: hide tokens as in training.
        """
        device, H, C = self.band_std.device, self.cfg.latent_size, self.cfg.latent_dim
        bands = tuple(bands or self.cfg.bands)
        B, L = len(labels if text is None else text[0]), len(bands)
        draw = NoiseOfImages(seed, range(first, first + B), device)
        weights = [ladder.guidance(guidance, cfg, l, L) for l in range(1, L + 1)]
        condition, cache = self.condition(labels, text), {} if self.cfg.context == "all" else None
        branches = 2 if any(w != 1 for w in weights) else 1
        if branches == 2:                                # the conditional images, then the unconditional ones
            null = self.condition(labels, text, torch.ones(B, dtype=torch.bool, device=device))
            both = lambda a, b: torch.cat([a, b])
            condition = both(condition[0], null[0]), condition[1] and tuple(map(both, condition[1], null[1]))
        y, drawn = self.band(torch.zeros(B, C, H, H, device=device), 0), []
        for l, (k_in, k, w) in enumerate(zip((0, *bands), bands, weights), 1):
            lower = self.raise_band(y, k_in, k).repeat(branches, 1, 1, 1)             # (B or 2B, C, g, g)
            share = ladder.mask_share(self.cfg.mask, l, L)
            seen = [self.choose_seen(share, k, draw, B).repeat(branches, 1)] if masked else None
            z = self.transformer([lower], [k], condition, seen, cache)                # (B or 2B, N, D)
            z = z[:B] if w == 1 else z                        # no second branch where it would have no weight
            noise = lambda N=z.shape[1]: draw(torch.randn, B, N, C)
            tau = temperature * (ladder.cooling(l, L) if cool else 1)
            S = ladder.diffusion_steps(*steps, l, L)
            head_condition = self.head.condition(z, float(k_in))                      # (B or 2B, N, W)
            tokens = self.head.sample(head_condition, noise, S, sampler, w, tau, hold)    # (B, N, C)
            y = tokens.mT.unflatten(2, (self.side(k), -1))                                # (B, C, g, g)
            y = self.band(y, k) if self.cfg.target == "full" else y
            drawn.append(self.show_band(y, k))
            progress()
        return drawn


# ---- sizes. far_b, far_l and far_h are the paper's; the smaller ones are for a CPU or one small GPU

PRESETS = {
    # two draw a band jointly, half their weights in the head; drawn shapes need steps more than width
    "far_nano": dict(width=64, depth=1, n_head=2, n_cond=1, head_width=64, head_depth=2, head_attention=2,
                     head_lean=1, noise_levels=1, input_noise=0.8),
    "far_tiny": dict(width=128, depth=1, n_head=4, n_cond=1, head_width=128, head_depth=3, head_attention=4,
                     noise_levels=1, input_noise=0.8),
    "far_s": dict(width=384, depth=6, n_head=6, n_cond=4, head_width=384, head_depth=4),
    "far_b": dict(width=768, depth=12, n_head=12, n_cond=64, head_width=1024, head_depth=6, dropout=0.1),
    "far_l": dict(width=1024, depth=16, n_head=16, n_cond=64, head_width=1024, head_depth=3, dropout=0.1),
    "far_h": dict(width=1280, depth=20, n_head=16, n_cond=64, head_width=1024, head_depth=3, dropout=0.1),
}
PRESETS["far_t2i"] = dict(PRESETS["far_l"], text_dim=1536)     # of Qwen2-1.5B; any other size takes text too
# The small one needs training times with more noise, for a band's layout shows through all the rest and
# nothing then needs the text; and positions as large as tokens: word order and places are learnt together.
PRESETS["far_tiny_t2i"] = dict(PRESETS["far_tiny"], depth=2, text_dim=128, byte_depth=2, noise_levels=2,
                               input_noise=0.4, times_mean=1.0, pos_std=2.0)


def make_config(preset, layout, latent_size, latent_dim, n_class, **changes):
    """FARConfig of a preset in a layout (None: the preset's), with `changes`. ValueError."""
    layout = layout or default_layout(preset)
    bands = ladder.doubling_bands(latent_size) if layout == "band" else ladder.every_band(latent_size)
    data = dict(latent_size=latent_size, latent_dim=latent_dim, n_class=n_class, bands=bands)
    return FARConfig(layout, **{**PRESETS[preset], **LAYOUTS[layout], **data, **changes})


def default_layout(preset):
    """The paper's layout for the paper's sizes, ours for the small ones."""
    return "paper" if preset in ("far_b", "far_l", "far_h", "far_t2i") else "band"


def sampling_defaults(cfg):
    """Arguments of FAR.sample unless told otherwise; the released ten bands where any ladder will do."""
    bands = ladder.ten_bands(cfg.latent_size) if any_ladder(cfg) else cfg.bands
    settings = dict(SAMPLING[cfg.layout], bands=bands, masked=cfg.mask != "none")     # what it was trained on
    if cfg.text_dim and cfg.layout == "band":                 # being right counts more than variety
        settings.update(cfg=1.5, guidance="constant", temperature=0.7)
    elif cfg.head_lean and cfg.layout == "band":              # after minutes of training classes blend
        settings["cfg"] = 6.0
    if not cfg.label_drop:
        settings["cfg"] = 1.0                                 # there is no null condition
    return settings


def any_ladder(cfg):
    """Whether a model may climb other ladders than its own: it sees one lower band, and always learns x."""
    return cfg.context == "last" and cfg.target == "full"
