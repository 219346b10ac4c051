"""
The blocks that transformer, diffusion head and text encoder are made of, and Muon, their optimizer.
Shapes: B images, N tokens, D or W width, M text tokens, d = D / heads.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F


def attend(q, k, v, n_head, mask=None, dropout=0.0):
    """q (B, N, D), k and v (B, M, D) -> (B, N, D). On a CPU in float32: there bf16's backward is slow."""
    dtype = torch.float32 if q.is_cpu else q.dtype
    q, k, v = (part.to(dtype).unflatten(-1, (n_head, -1)).transpose(1, 2) for part in (q, k, v))
    with torch.autocast("cpu", enabled=False):                                            # (B, heads, ., d)
        return F.scaled_dot_product_attention(q, k, v, mask, dropout).transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Multi-head attention. `cache` (a dict, in sampling) keeps the keys and values of the lower bands."""

    def __init__(self, cfg):
        super().__init__()
        self.n_head, self.dropout = cfg.n_head, cfg.dropout
        self.qkv, self.proj = nn.Linear(cfg.width, 3 * cfg.width), nn.Linear(cfg.width, cfg.width)

    def forward(self, x, mask=None, cache=None):
        q, kv = self.qkv(x).split([x.shape[-1], 2 * x.shape[-1]], dim=-1)                 # keys, then values
        if cache is not None:
            kv = cache[self] = torch.cat([cache.get(self, kv[:, :0]), kv], dim=1)         # (B, lower + N, 2D)
        y = attend(q, *kv.chunk(2, dim=-1), self.n_head, mask, self.dropout if self.training else 0.0)
        return F.dropout(self.proj(y), self.dropout, self.training)                       # (B, N, D)


class CrossAttention(nn.Module):
    """Attention to the text, not its padding; with a cache, keys and values are computed once per image."""

    def __init__(self, cfg):
        super().__init__()
        self.n_head = cfg.n_head
        self.q, self.kv = nn.Linear(cfg.width, cfg.width), nn.Linear(cfg.width, 2 * cfg.width)
        self.proj = nn.Linear(cfg.width, cfg.width)

    def forward(self, x, text, cache=None):
        vectors, visible = text                                                           # (B, M, D), (B, M)
        cache = {} if cache is None else cache
        if self not in cache:
            cache[self] = self.kv(vectors).chunk(2, dim=-1)                               # (B, M, D) each
        return self.proj(attend(self.q(x), *cache[self], self.n_head, visible[:, None, None]))    # (B, N, D)


class MLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(cfg.width, 4 * cfg.width), nn.Linear(4 * cfg.width, cfg.width)
        self.dropout = nn.Dropout(cfg.dropout)                                # twice, as in the released code

    def forward(self, x):
        return self.dropout(self.fc2(self.dropout(F.gelu(self.fc1(x)))))


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


class JointBlock(nn.Module):
    """A block with adaLN-zero on the tokens of one band, as in DiT (Peebles & Xie 2023, sec. 3.2)."""

    def __init__(self, width, n_head, mlp=4):
        super().__init__()
        self.n_head = n_head
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, mlp * width), nn.Linear(mlp * width, width)
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, h, y):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(y).chunk(6, dim=-1)    # (B, N or 1, W)
        q, k, v = self.qkv(self.norm1(h) * (1 + scale1) + shift1).chunk(3, dim=-1)
        h = h + gate1 * self.proj(attend(q, k, v, self.n_head))
        return h + gate2 * self.fc2(F.gelu(self.fc1(self.norm2(h) * (1 + scale2) + shift2)))


def orthogonalise(g, steps=5):
    """About U V^T of each g = U S V^T, (n, a, b): singular values over 1/500 of its norm end at .7 to 1.2."""
    tall = g.shape[1] > g.shape[2]
    x = (g.mT if tall else g).contiguous()                      # (n, short, long): x x^T is the small product
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):        # Newton-Schulz: x <- 3.4445 x - 4.7750 x x^T x + 2.0315 (x x^T)^2 x
        a = x @ x.mT                                                                      # (n, short, short)
        b = torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, b, x, beta=3.4445)
    return x.mT if tall else x


class Muon(torch.optim.AdamW):
    """
    AdamW, but groups marked `matrices=True` step along their momentum with its singular values set to one, so
    that rare directions learn as fast as common ones: Jordan et al. 2024, kellerjordan.github.io/posts/muon.
    """

    @torch.no_grad()
    def step(self, momentum=0.95):
        for group in [group for group in self.param_groups if group.get("matrices")]:
            by_shape = {}
            for p in group["params"]:
                if p.grad is not None:
                    if p not in self.state:               # AdamW asks for a step of every state that it loads
                        self.state[p] = dict(step=torch.zeros(()), momentum=torch.zeros_like(p))
                    average = self.state[p]["momentum"].lerp_(p.grad, 1 - momentum)
                    by_shape.setdefault(p.shape, []).append((p, p.grad.lerp(average, momentum)))  # Nesterov's
                    p.grad = None
            for shape, pairs in by_shape.items():              # of one shape together: fewer, larger products
                size = group["lr"] * 0.2 * max(shape) ** 0.5   # about AdamW's: arXiv 2502.16982, section 2.2
                updates = orthogonalise(torch.stack([direction for _, direction in pairs])).float()
                for (p, _), update in zip(pairs, updates):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-size)
        super().step()                                                   # passes over what has no gradient
