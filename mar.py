"""
The baseline that FAR is measured against: the same transformer and head, but tokens go by position, not by frequency.

    python train.py --layout random        # masked autoregression in random order (MAR, Li et al. 2024)
    python train.py --layout raster        # row by row
    python sample.py --ckpt runs/shapes_far_tiny_random --ar-steps 8

In training a random share of the tokens is hidden, and the head learns the hidden ones from what the decoder says at
their places. In sampling everything is hidden at first, and every step draws some of the hidden tokens.

Shapes: B images, N = H^2 tokens, C channels of a token, M hidden tokens of all images.
"""
import math

import torch

from diffusion import n_noise
from far import FAR, mask_ratio


class MAR(FAR):
    """FAR's network on the plain latent grid, its tokens drawn in random or raster order."""

    def ranks(self, noise):
        """The place of every token in its image's order, LongTensor (B, N), from uniform noise (B, N)."""
        raster = torch.arange(noise.shape[1], device=noise.device).expand(len(noise), -1)
        return raster if self.cfg.order == "raster" else noise.argsort(dim=1).argsort(dim=1)

    def forward(self, x, draw, labels=None, text=None):
        """The loss of the hidden tokens; arguments and results as FAR.forward, with one "band"."""
        cfg, (B, C, H, _) = self.cfg, x.shape
        N, r, whole = H * H, cfg.noise_levels, (H, H)
        drop = draw(torch.rand, B) < cfg.label_drop
        # MAR section 4: the hidden share is normal, mean 1, std 0.25, cut to [0.7, 1]; in raster order any share occurs
        share = draw(torch.rand, B, 1)
        if cfg.order == "random":
            share = torch.tensor([[mask_ratio("truncnorm", H, H, float(u))] for u in share]).to(x)
        hidden = self.ranks(draw(torch.rand, B, N)) >= N - (share * N).ceil().clamp(min=1)       # (B, N)
        z = self.transformer([x], [whole], self.condition(labels, text, drop), hidden)[hidden]   # (M, D)
        condition = self.head.condition(z, z.new_zeros(1, 1))[:, None].expand(-1, r, -1)         # (M, r, W)
        t = self.head.draw_times(cfg.times, draw, B, N, r, mean=cfg.times_mean)[hidden]        # (M, r)
        target = x.flatten(2).mT[hidden][:, None].expand(-1, r, -1)                              # (M, r, C)
        mse, bits = self.head.loss(target, condition, t, draw(torch.randn, B, N, r, C)[hidden])
        return (mse + bits).mean(), mse.detach().mean()[None]

    @torch.inference_mode()
    def sample(self, labels=None, text=None, seed=0, first=0, bands=None, cfg_scale=1.0, temperature=1.0, steps=(10, 10),
               sampler="dpmpp", masked=False, progress=lambda: None, ar_steps=8):
        """Draw images in ar_steps steps; other arguments as FAR.sample. -> x after every step, not yet drawn tokens 0."""
        cfg, device = self.cfg, self.band_std.device
        B, C, H = len(labels if text is None else text[0]), cfg.latent_dim, cfg.latent_size
        N, S = H * H, min(ar_steps, H * H)
        generators = [torch.Generator().manual_seed(seed * 1_000_003 + first + i) for i in range(B)]
        draw = lambda kind, *shape: torch.stack([kind(*shape, generator=g) for g in generators]).to(device)
        condition, guided = self.condition(labels, text), cfg_scale != 1
        if guided:
            null = self.condition(labels, text, torch.ones(B, dtype=torch.bool, device=device))
            join = lambda a, b: torch.cat([a, b])
            condition = (join(condition[0], null[0]), condition[1] and tuple(map(join, condition[1], null[1])))
        rank, tokens, known, drawn = self.ranks(draw(torch.rand, N)), torch.zeros(B, N, C, device=device), 0, []
        for s in range(S):
            # few tokens at first, more as the image takes shape: MAR's cosine; row by row at an even pace
            left = math.floor(N * (math.cos(math.pi / 2 * (s + 1) / S) if cfg.order == "random" else 1 - (s + 1) / S))
            after = N if s == S - 1 else min(max(N - left, known + 1), N - (S - 1 - s))
            x, hidden = tokens.mT.reshape(B, C, H, H), rank >= known
            if guided:
                x, hidden = torch.cat([x, x]), torch.cat([hidden, hidden])
            new = (rank >= known) & (rank < after)                       # (B, N), equally many in each image
            z = self.transformer([x], [(H, H)], condition, hidden)                               # (B or 2B, N, D)
            z = z[new.repeat(1 + guided, 1)].view(len(z), after - known, -1)
            noise = draw(torch.randn, n_noise(steps[0], sampler), after - known, C)              # (B, n, new, C)
            z = self.head.condition(z, z.new_zeros(1, 1, 1))
            w = 1 + (cfg_scale - 1) * after / N if cfg.guidance == "linear" else cfg_scale       # linear: as MAR's code
            made = self.head.sample(z, noise, steps[0], sampler, w, temperature)                 # (B, new, C)
            tokens = tokens.masked_scatter(new[..., None], made.to(tokens))
            drawn.append(tokens.mT.reshape(B, C, H, H))
            known = after
            progress()
        return drawn


def make_model(cfg):
    """The model that a configuration describes: FAR, or the baseline."""
    return FAR(cfg) if cfg.order == "frequency" else MAR(cfg)
