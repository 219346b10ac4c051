"""
What a model costs: parameters, tokens and floating-point operations per image, counted without running it.

    python count.py                                # the presets in the paper's setting, a table in Markdown
"""
import math

import torch

from far import FAR, PRESETS, FARConfig, guidance_weights, linear_steps, preset_fields, sampling_defaults


def count_parameters(preset, layout="paper", **changes):
    """Parameters, of all and of the head, of a preset on ImageNet and KL-16 latents, without allocating them."""
    with torch.device("meta"):
        model = FAR(FARConfig(latent_size=16, latent_dim=16, n_class=1000, **{**preset_fields(preset, layout, 16), **changes}))
    count = lambda module: sum(p.numel() for p in module.parameters())
    return count(model), count(model.head)


def band_tokens(cfg, bands):
    """N_l, the tokens of every band: a list of ints."""
    return [(k if cfg.grid == "band" else cfg.latent_size) ** 2 for k in bands]


def count_flops(cfg, sampling=None):
    """
    Floating-point operations for one image, a multiplication and an addition being two: of training (the forward pass and
    twice as much backward), or of sampling with these settings (see `sampling_defaults`). Returns transformer, head, tokens
    through the transformer. Counted are the matrix products of blocks and head; attention is counted without its mask.
    Text, its encoder and the attention to it are not counted.
    """
    D, W, C = cfg.width, cfg.head_width, cfg.latent_dim
    n_tokens = band_tokens(cfg, sampling["bands"] if sampling else cfg.bands)
    L = len(n_tokens)
    block = lambda n, seen: n * (24 * D * D + 4 * seen * D)              # qkv, proj and MLP; scores and values of `seen` tokens
    cond = 2 * D * W                                                     # of the head, once per token
    joint = cfg.head_attention > 0
    # once per token and noise level: in, out, blocks and adaLN; in a joint head also scores and values of n tokens
    call = 6 * C * W + ((36 if joint else 10) * cfg.head_depth + 4) * W * W
    look = lambda n: 4 * cfg.head_depth * n * W * joint
    if sampling is None:
        if cfg.context == "last":                                        # one band per image and step
            n_tokens = n_tokens[-1:]
        share = [0.5 if cfg.ladder == "random" else 1] * (len(n_tokens) - 1) + [1]           # how often a band is in a step
        N = sum(p * n for p, n in zip(share, n_tokens)) + cfg.n_cond
        levels = [cfg.noise_levels * (math.sqrt(max(n_tokens) / n) if cfg.context == "all" else 1) for n in n_tokens]
        time = lambda n: 2 * (256 + W) * W * (1 if joint else n)         # in training every token, or joint band, has its own
        head = sum(p * (n * cond + round(r) * (n * (call + look(n)) + time(n))) for p, n, r in zip(share, n_tokens, levels))
        return 3 * (2 * cfg.depth * block(N, N) + N * 2 * D * D), 3 * head, N
    weights = guidance_weights(cfg.guidance, sampling["cfg_scale"], L)
    branches, transformer, head, tokens, seen = 1 + any(w != 1 for w in weights), 0, 0, 0, 0
    for i, (n, w, steps) in enumerate(zip(n_tokens, weights, linear_steps(*sampling["steps"], L))):
        new = n + (cfg.n_cond if cfg.context == "last" or not i else 0)
        seen = new + (seen if cfg.context == "all" else 0)               # with keys and values of the lower bands
        transformer += branches * (2 * cfg.depth * block(new, seen) + new * 2 * D * D)
        tokens += branches * new
        head += n * (1 + (w != 1)) * (cond + steps * (call + look(n)))
    return transformer, head, tokens


def count_calls(cfg, sampling):
    """Calls of the head for one image, tokens x steps x branches, of sampling with these settings."""
    n_tokens = band_tokens(cfg, sampling["bands"])
    steps = linear_steps(*sampling["steps"], len(n_tokens))
    weights = guidance_weights(cfg.guidance, sampling["cfg_scale"], len(n_tokens))
    return sum(n * s * (1 + (w != 1)) for n, s, w in zip(n_tokens, steps, weights))


if __name__ == "__main__":
    print("ImageNet 256: 16 x 16 tokens of 16 channels, 1000 classes. GFLOPs of one image, guidance 3 in sampling.\n\n"
          "| preset | million parameters: transformer | head | total | layout | tokens, training | GFLOPs, training "
          "| GFLOPs, sampling (of that, head) |\n"
          "|---|---|---|---|---|---|---|---|")
    for preset in (name for name in PRESETS if name != "far_xl"):
        for layout in ("paper", "band"):
            total, head = count_parameters(preset, layout)
            cfg = FARConfig(latent_size=16, latent_dim=16, n_class=1000, **preset_fields(preset, layout, 16))
            training, drawing = count_flops(cfg), count_flops(cfg, dict(sampling_defaults(cfg), cfg_scale=3.0))
            cost = (f"{training[2]} | {sum(training[:2]) / 1e9:.0f} | {sum(drawing[:2]) / 1e9:,.0f} "
                    f"({drawing[1] / sum(drawing[:2]):.0%})") if not cfg.text_dim else "- | - | -"       # see count_flops
            print(f"| {preset} | {(total - head) / 1e6:.1f} | {head / 1e6:.1f} | {total / 1e6:.1f} | {layout} | {cost} |")
    print("\nThe authors report 451 for far_l and 564 for far_t2i.")
