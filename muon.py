"""
Muon, the optimizer of the small models: for weight matrices the step is the momentum with all its singular
values set to one, so that rare directions learn as fast as common ones. Everything else gets AdamW.

Sources: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"; the size of the step
as in Liu et al. 2025, "Muon is scalable for LLM training" (arXiv 2502.16982), section 2.2, so that one
learning rate serves both.
"""
import torch


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
    """
    AdamW whose groups marked `matrices=True` take Muon's steps; convolutions (o, i, h, w) as matrices (o, i h
    w).
    """

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
                direction = p.grad.lerp(average, momentum).flatten(1)    # Nesterov's
                by_shape.setdefault(direction.shape, []).append((p, direction))
                p.grad = None
        for shape, pairs in by_shape.items():                  # of one shape together: fewer, larger products
            stack = torch.stack([direction for _, direction in pairs])
            size = group["lr"] * 0.2 * max(shape) ** 0.5                # about the step that AdamW would take
            for (p, _), update in zip(pairs, orthogonalise(stack).float()):
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update.view_as(p), alpha=-size)
