"""
The diffusion head, FAR's diffusion loss: p(x | z) of a continuous token x given the transformer's z for it.

Shapes: M tokens of any number of images and bands, C channels of a token, D width of z, W width of the head,
T diffusion steps of training (t = 0 is almost clean, T - 1 almost pure noise), S steps of sampling.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from blocks import JointBlock


def alphas_cumprod(name, T):
    """Signal variance left at each step, float64 (T,): Nichol & Dhariwal 2021 eq. 17, or Ho et al. 2020."""
    if name == "linear":
        beta = torch.linspace(1e-4 * 1000 / T, 0.02 * 1000 / T, T, dtype=torch.float64, device="cpu")
    else:
        u = torch.arange(T + 1, dtype=torch.float64, device="cpu") / T
        f = torch.cos((u + 0.008) / 1.008 * math.pi / 2).square()
        beta = (1 - f[1:] / f[:-1]).clamp(max=0.999)   # the clip keeps the last step from being a singularity
    return torch.cumprod(1 - beta, dim=0)


class Chain:
    """All or some steps of a diffusion of cumulated signal `abar` (T,): Nichol & Dhariwal 2021 section 4."""

    def __init__(self, abar, times=None, device=None):
        self.times = torch.arange(len(abar)) if times is None else times             # (S,), increasing
        abar = abar.double().cpu()[self.times]
        before = torch.cat([abar.new_ones(1), abar[:-1]])                            # abar of the step below
        beta = 1 - abar / before
        variance = beta * (1 - before) / (1 - abar)                     # of q(x_{s-1} | x_s, x_0), DDPM eq. 7
        tables = dict(
            alpha=abar.sqrt(), sigma=(1 - abar).sqrt(),                        # x_s = alpha x_0 + sigma noise
            to_x0=beta * before.sqrt() / (1 - abar),                  # posterior mean = to_x0 x_0 + to_xt x_s
            to_xt=(1 - before) * (1 - beta).sqrt() / (1 - abar),
            # the variance is 0 at s = 0, where its logarithm is clipped to that of the next step
            log_small=torch.cat([variance[1:2] if len(variance) > 1 else beta[:1], variance[1:]]).log(),
            log_large=beta.log())
        self.tables = {name: table.float().to(device) for name, table in tables.items()}

    def at(self, s, *names):
        """Table values for steps s, an int or a LongTensor (...), shaped to multiply (..., C)."""
        return [self.tables[name][s, None] for name in names]

    def posterior_mean(self, x0, xt, s):
        """Mean of q(x_{s-1} | x_s, x_0), DDPM eq. 7. x0, xt (..., C) -> (..., C)."""
        to_x0, to_xt = self.at(s, "to_x0", "to_xt")
        return to_x0 * x0 + to_xt * xt

    def log_variance(self, v, s):
        """Learned log-variance between its bounds: v (..., C) in [-1, 1], Nichol & Dhariwal 2021 eq. 15."""
        small, large = self.at(s, "log_small", "log_large")
        return small + (v + 1) / 2 * (large - small)


def normal_kl(mean_a, logvar_a, mean_b, logvar_b):
    """KL divergence between diagonal Gaussians, elementwise, in nats."""
    ratio = (logvar_a - logvar_b).exp() + (mean_a - mean_b).square() * (-logvar_b).exp()
    return 0.5 * (logvar_b - logvar_a - 1 + ratio)


def discretised_nll(x, mean, logvar, half_bin=1 / 255):
    """-log of the mass that N(mean, exp(logvar)) has in a bin around x, in nats (DDPM eq. 13)."""
    cdf = lambda y: 0.5 * (1 + torch.erf((y - mean) * (-0.5 * logvar).exp() / math.sqrt(2)))
    return -(cdf(x + half_bin) - cdf(x - half_bin)).clamp(min=1e-12).log()


class TimeEmbedding(nn.Module):
    """Step t -> (W,): 256 sinusoids, cosines first, then a small MLP."""

    def __init__(self, width, n_freq=256):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(n_freq, width), nn.Linear(width, width)
        frequencies = torch.exp(-math.log(10000) * torch.arange(n_freq // 2) / (n_freq // 2))
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, t):
        angle = t.float()[..., None] * self.frequencies                              # (..., 128)
        return self.fc2(F.silu(self.fc1(torch.cat([angle.cos(), angle.sin()], dim=-1))))


class HeadBlock(nn.Module):
    """Residual MLP on one token, steered by adaLN: h + gate * MLP(LN(h) * (1 + scale) + shift)."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.fc1, self.fc2 = nn.Linear(width, width), nn.Linear(width, width)
        self.modulation = nn.Linear(width, 3 * width)

    def forward(self, h, y):
        shift, scale, gate = self.modulation(y).chunk(3, dim=-1)                     # (M, W) each
        return h + gate * self.fc2(F.silu(self.fc1(self.norm(h) * (1 + scale) + shift)))


class DiffusionHead(nn.Module):
    """
    A DDPM of single tokens; its network is a small adaLN MLP (MAR: Li et al. 2024, section 3.2 and appendix).
    With `n_head` it draws the N tokens of a band jointly, at one step t: its blocks attend among them.
    `lean`: steered once for a band, its MLPs half as wide, and noise has a way past the narrow network.
    """

    def __init__(self, token_dim, z_dim, width, depth, schedule="cosine", predict="eps", n_head=0,
                 lean=False):
        super().__init__()
        self.predict, self.joint, self.lean = predict, n_head > 0, lean
        self.time = TimeEmbedding(width)
        self.cond = nn.Linear(z_dim, width)
        self.level = nn.Linear(1, width)                 # of the raw cut-off of the transformer's input
        self.input = nn.Linear(token_dim, width)
        block = lambda: JointBlock(width, n_head, 2 if lean else 4) if n_head else HeadBlock(width)
        self.blocks = nn.ModuleList(block() for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, 2 * token_dim)    # the prediction, and v of the learned variance
        self.skip = nn.Linear(width, token_dim) if lean else None     # c_skip of Karras et al. 2022, learned
        for linear in [m for m in self.modules() if isinstance(m, nn.Linear)]:
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        for linear in (self.time.fc1, self.time.fc2):
            nn.init.normal_(linear.weight, std=0.02)
        last = [self.modulation, self.output] + [self.skip] * lean
        for linear in [block.modulation for block in self.blocks] + last:
            nn.init.zeros_(linear.weight)             # every block starts as the identity, the output as zero
        self.abar = alphas_cumprod(schedule, 1000)       # float64, and so on the CPU: mps has none
        self.chains = {}                                 # (steps, device) -> Chain

    def chain(self, times=None):
        """The chain with these steps (all by default), its tables on the head's device."""
        device = self.level.weight.device
        key = (None if times is None else tuple(times.tolist()), device)
        if key not in self.chains:
            self.chains[key] = Chain(self.abar, times, device)
        return self.chains[key]

    def condition(self, z, k_in):
        """The part of the condition that does not change with t: z (..., D), k_in a number -> (..., W)."""
        return self.cond(z) + self.level(z.new_full((1,), k_in))

    def forward(self, xt, time, condition):
        """Tokens (..., C), joint: (B, N, C); time and condition (..., W) -> prediction and v, (..., C)."""
        h = self.input(xt)                                                           # (..., W)
        if self.lean:
            h, condition = h + condition, condition.mean(dim=1, keepdim=True)
        y = F.silu(time + condition)                                        # (..., W), or lean: (B, 1, W)
        for block in self.blocks:
            h = block(h, y)
        shift, scale = self.modulation(y).chunk(2, dim=-1)
        prediction, v = self.output(self.norm(h) * (1 + scale) + shift).float().chunk(2, dim=-1)
        return (prediction + self.skip(y) * xt if self.lean else prediction), v

    def to_x0(self, prediction, xt, alpha, sigma):
        """The clean token that a prediction of noise, or of v (Salimans & Ho 2022), implies."""
        return (xt - sigma * prediction) / alpha if self.predict == "eps" else alpha * xt - sigma * prediction

    def draw_times(self, kind, draw, *shape, mean=0.0):
        """Steps t of training, of this shape: `uniform`, or `logit-normal` (Esser et al. 2024, sec. 3.1)."""
        u = draw(torch.rand, *shape) if kind == "uniform" else (draw(torch.randn, *shape) + mean).sigmoid()
        return (u * len(self.abar)).long().clamp(max=len(self.abar) - 1)

    def loss(self, x0, condition, t, noise):
        """
        Nichol & Dhariwal 2021 eq. 16: squared error of the prediction, and the variational term in bits,
        which only trains the variance. Clean tokens and noise (..., C), condition (..., W), steps t (...),
        for a joint head (B, 1). -> both terms, (...).
        """
        chain = self.chain()
        alpha, sigma, small = chain.at(t, "alpha", "sigma", "log_small")
        xt = alpha * x0 + sigma * noise                                              # DDPM eq. 4
        prediction, v = self(xt, self.time(t), condition)
        target = noise if self.predict == "eps" else alpha * noise - sigma * x0
        mse = (prediction - target).square().mean(dim=-1)
        mean = chain.posterior_mean(self.to_x0(prediction.detach(), xt, alpha, sigma), xt, t)
        logvar = chain.log_variance(v, t)
        kl = normal_kl(chain.posterior_mean(x0, xt, t), small, mean, logvar)
        nll = discretised_nll(x0, mean, logvar)
        bits = torch.where((t == 0)[..., None], nll, kl).mean(dim=-1) / math.log(2)
        return mse, bits

    def predict_guided(self, xt, time, condition, guidance):
        """
        Prediction and v for xt, (..., C) each; with guidance != 1 the condition holds the conditional tokens,
        then the unconditional ones: u + guidance (c - u) (Ho & Salimans 2022 eq. 6).
        """
        if guidance == 1:
            return self(xt, time, condition)
        prediction, v = self(torch.cat([xt, xt]), time, condition)                   # (2B, ..., C) each
        c, u = prediction.chunk(2)
        return u + guidance * (c - u), v.chunk(2)[0]

    def sample(self, condition, noise, steps, sampler="ddpm", guidance=1.0, temperature=1.0, hold=None):
        """
        Draw tokens -> (B, N, C). condition (B, N, W), or (2B, N, W) with guidance != 1; noise() gives fresh
        unit normals (B, N, C). hold: x_0 is kept within +- hold, as DDPM's code clips it, for at the chain's
        end x_0 = (x_t - sigma noise) / alpha multiplies the network's error by up to 20,000.
        """
        chain = self.chain(sampling_times(self.abar, steps, sampler, self.predict))
        embedded = self.time(chain.times.to(condition.device))                   # (S, W), once for all tokens

        def denoise(x, s):
            """x_s (B, N, C) -> the clean tokens that the network sees in it, and its v."""
            prediction, v = self.predict_guided(x, embedded[s:s + 1], condition, guidance)
            x0 = self.to_x0(prediction, x, *chain.at(s, "alpha", "sigma"))
            return (x0 if hold is None else x0.clamp(-hold, hold)), v

        return SAMPLERS[sampler](chain, denoise, noise, temperature)


# ---- samplers: denoise(x_s, s) -> x_0 and v; s counts down over the steps of the chain

def ddpm(chain, denoise, noise, temperature):
    """Ancestral, with the learned variance (Ho et al. 2020, algorithm 2); temperature scales its noise."""
    x = noise()
    for s in reversed(range(len(chain.times))):
        x0, v = denoise(x, s)
        x = chain.posterior_mean(x0, x, s)
        if s > 0 and temperature:
            x = x + (0.5 * chain.log_variance(v, s)).exp() * temperature * noise()
    return x


def dpmpp(chain, denoise, noise, temperature):
    """DPM-Solver++(2M), Lu et al. 2022, algorithm 2: second order, for few steps."""
    x, before, h_before = noise() * temperature, None, None
    for s in reversed(range(len(chain.times))):
        x0, _ = denoise(x, s)
        if s > 0:
            (alpha, sigma), (alpha_next, sigma_next) = (chain.at(i, "alpha", "sigma") for i in (s, s - 1))
            h = ((alpha_next / sigma_next) / (alpha / sigma)).log()                 # step in half the log-SNR
            d = x0 if before is None else x0 + h / (2 * h_before) * (x0 - before)
            x = sigma_next / sigma * x - alpha_next * torch.expm1(-h) * d
            before, h_before = x0, h
    return x0


SAMPLERS = dict(ddpm=ddpm, dpmpp=dpmpp)


def sampling_times(abar, steps, sampler, predict="v"):
    """
    The steps t of sampling, increasing, LongTensor (S,), for cumulated signal `abar` (T,). `ddpm`: evenly
    spaced from 0 to T - 1, as the released code. `dpmpp`: evenly spaced and ending at T - 1, but starting at
    T/S - 1, from where it jumps to the clean token; where the network predicts noise it leaves out the end of
    the chain that has less than a thousandth of the signal.
    """
    T = len(abar)
    if sampler == "ddpm" and steps > 1:
        return torch.linspace(0, T - 1, steps, dtype=torch.float64).round().long()
    end = int((abar > 1e-3).sum()) if predict == "eps" else T
    return (torch.arange(1, steps + 1, dtype=torch.float64) * max(end, steps) / steps).round().long() - 1
