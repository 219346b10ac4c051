"""
The blocks that transformer, diffusion head and text encoder are made of, and Muon, the optimizer of their
matrices.

Shapes: B images, N tokens, D or W width, M text tokens, d = D / heads.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F


def fast_attention(q, k, v, mask=None, dropout=0.0):
    """Attention, (B, heads, N, d) each. On a CPU in float32: there bf16's backward is slow."""
    if q.device.type == "cpu":
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), mask, dropout)
    return F.scaled_dot_product_attention(q, k, v, mask, dropout)


class Attention(nn.Module):
    """Multi-head attention. `cache` (a dict, in sampling) keeps the keys and values of the lower bands."""

    def __init__(self, cfg):
        super().__init__()
        self.n_head, self.dropout = cfg.n_head, cfg.dropout
        self.qkv, self.proj = nn.Linear(cfg.width, 3 * cfg.width), nn.Linear(cfg.width, cfg.width)

    def forward(self, x, mask=None, cache=None):
        # (B, heads, N, d) each
        q, k, v = self.qkv(x).unflatten(-1, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4)
        if cache is not None:
            if self in cache:
                before = cache[self]                                         # (B, heads, lower, d) each
                k, v = torch.cat([before[0], k], dim=2), torch.cat([before[1], v], dim=2)
            cache[self] = k, v
        y = fast_attention(q, k, v, mask, self.dropout if self.training else 0.0)         # (B, heads, N, d)
        return F.dropout(self.proj(y.transpose(1, 2).flatten(2)), self.dropout, self.training)   # (B, N, D)


class CrossAttention(nn.Module):
    """Attention to the text; with a cache, its keys and values are computed once per image."""

    def __init__(self, cfg):
        super().__init__()
        self.n_head = cfg.n_head
        self.q, self.kv = nn.Linear(cfg.width, cfg.width), nn.Linear(cfg.width, 2 * cfg.width)
        self.proj = nn.Linear(cfg.width, cfg.width)

    def forward(self, x, text, cache=None):
        vectors, visible = text                                                           # (B, M, D), (B, M)
        cache = {} if cache is None else cache
        if self not in cache:
            cache[self] = self.kv(vectors).unflatten(-1, (2, self.n_head, -1)).permute(2, 0, 3, 1, 4)
        k, v = cache[self]                                                             # (B, heads, M, d) each
        q = self.q(x).unflatten(-1, (self.n_head, -1)).transpose(1, 2)                    # (B, heads, N, d)
        y = fast_attention(q, k, v, visible[:, None, None])                         # padding is not looked at
        return self.proj(y.transpose(1, 2).flatten(2))                                    # (B, N, D)


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

    def __init__(self, width, n_head):
        super().__init__()
        self.n_head = n_head
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, h, y):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(y).chunk(6, dim=-1)    # (B, N, W) each
        u = self.norm1(h) * (1 + scale1) + shift1
        q, k, v = self.qkv(u).unflatten(-1, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, N, d)
        h = h + gate1 * self.proj(fast_attention(q, k, v).transpose(1, 2).flatten(2))
        return h + gate2 * self.fc2(F.gelu(self.fc1(self.norm2(h) * (1 + scale2) + shift2)))


# ---- Muon: for weight matrices the step is the momentum with all its singular values set to one, so that
# rare directions learn as fast as common ones (Jordan et al. 2024, "Muon: An optimizer for hidden layers in
# neural networks"); its size as in Liu et al. 2025 (arXiv 2502.16982, section 2.2), so that one learning rate
# serves AdamW too

def orthogonalise(g, steps=5):
    """
    About U V^T of each matrix g = U S V^T, (n, a, b), without its singular values: Newton-Schulz iterations x
    <- c0 x + c1 (x x^T) x + c2 (x x^T)^2 x with Jordan's coefficients, which take the singular values to
    between 0.7 and 1.2, those below 1/500 of the norm excepted.
    """
    tall = g.shape[1] > g.shape[2]
    x = (g.mT if tall else g).contiguous()                      # (n, short, long): x x^T is the small product
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        a = x @ x.mT                                                     # (n, short, short)
        b = torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, b, x, beta=3.4445)
    return x.mT if tall else x


class Muon(torch.optim.AdamW):
    """AdamW whose groups marked `matrices=True` take Muon's steps."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            if group.get("matrices"):
                self.step_matrices(group)
        super().step()                                                   # passes over what has no gradient

    def step_matrices(self, group, momentum=0.95):
        by_shape = {}
        for p in group["params"]:
            if p.grad is not None:
                if p not in self.state:                   # AdamW asks for a step of every state that it loads
                    self.state[p] = dict(step=torch.zeros(()), momentum=torch.zeros_like(p))
                average = self.state[p]["momentum"]
                average.lerp_(p.grad, 1 - momentum)
                direction = p.grad.lerp(average, momentum)               # Nesterov's
                by_shape.setdefault(direction.shape, []).append((p, direction))
                p.grad = None
        for shape, pairs in by_shape.items():                  # of one shape together: fewer, larger products
            stack = torch.stack([direction for _, direction in pairs])
            size = group["lr"] * 0.2 * max(shape) ** 0.5                # about the step that AdamW would take
            for (p, _), update in zip(pairs, orthogonalise(stack).float()):
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-size)
