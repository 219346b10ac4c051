"""
The authors' FAR checkpoints (far_base, far_large, far_huge: checkpoint-last.pth), loaded into the FAR class of far.py.

    python sample.py --ckpt checkpoint-last.pth --tokenizer kl16.ckpt --classes 207,360 --cfg 3

The network is the same, only the names differ; sizes are read from the shapes of the tensors. Missing or unexpected
names are refused. Their files hold an argparse.Namespace beside the tensors, the one class that is allowed in.
"""
import argparse

import torch

from common import InputError, load_checkpoint
from far import FAR, LAYOUTS, FARConfig, default_bands
from tokenizer import load_exactly

# theirs -> ours, applied to the start of a name
NAMES = {
    "class_emb.": "class_embed.",
    "fake_latent": "null_cond",
    "mask_token": "mask_token",
    "z_proj.": "token_in.",
    "z_proj_ln.": "norm_in.",
    "encoder_pos_embed_learned": "encoder_pos",
    "encoder_blocks.": "encoder.",
    "encoder_norm.": "encoder_norm.",
    "decoder_embed.": "decoder_in.",
    "decoder_pos_embed_learned": "decoder_pos",
    "decoder_blocks.": "decoder.",
    "decoder_norm.": "decoder_norm.",
    "diffusion_pos_embed_learned": "head_pos",
    "diffloss.net.time_embed.mlp.0.": "head.time.fc1.",
    "diffloss.net.time_embed.mlp.2.": "head.time.fc2.",
    "diffloss.net.cond_embed.": "head.cond.",
    "diffloss.net.index_cond_embed.": "head.level.",
    "diffloss.net.input_proj.": "head.input.",
    "diffloss.net.res_blocks.": "head.blocks.",
    "diffloss.net.final_layer.linear.": "head.output.",
    "diffloss.net.final_layer.adaLN_modulation.1.": "head.modulation.",
}
# and inside a residual block of the head
IN_HEAD_BLOCK = {"in_ln.": "norm.", "mlp.0.": "fc1.", "mlp.2.": "fc2.", "adaLN_modulation.1.": "modulation."}
HEADS = {768: 12, 1024: 16, 1280: 16}                  # attention heads by width; the tensors do not tell


def our_name(name):
    """The name in far.py of a tensor of the authors' checkpoint. An unknown name stays as it is, and is refused later."""
    start = max((theirs for theirs in NAMES if name.startswith(theirs)), key=len, default="")
    name = NAMES.get(start, "") + name[len(start):]
    if name.startswith("head.blocks."):
        for theirs, ours in IN_HEAD_BLOCK.items():
            name = name.replace(f".{theirs}", f".{ours}")
    return name


def load_published_far(path, ema=True, n_head=None):
    """
    A FAR model in eval mode from the authors' checkpoint: the averaged weights, or the raw ones. n_head only for widths
    other than theirs. Raises InputError on a file that is not one, with the names that do not fit.
    """
    content = load_checkpoint(path, allow=[argparse.Namespace])
    weights = content.get("model_ema" if ema else "model") if isinstance(content, dict) else None
    try:
        n_class, width = weights["class_emb.weight"].shape
        n_tokens = weights["diffusion_pos_embed_learned"].shape[1]
        size = int(n_tokens ** 0.5)
        cfg = FARConfig(
            latent_size=size, latent_dim=weights["z_proj.weight"].shape[1], bands=default_bands(size, "paper"),
            n_class=n_class, width=width, n_head=n_head or HEADS[width],
            depth=len({name.split(".")[1] for name in weights if name.startswith("encoder_blocks.")}),
            n_cond=weights["encoder_pos_embed_learned"].shape[1] - n_tokens, dropout=0.1,
            head_width=weights["diffloss.net.input_proj.weight"].shape[0],
            head_depth=len({name.split(".")[3] for name in weights if name.startswith("diffloss.net.res_blocks.")}),
            **LAYOUTS["paper"])
    except (KeyError, TypeError, AttributeError, ValueError, IndexError, ZeroDivisionError) as error:
        raise InputError(f"{path} is neither a checkpoint of this program nor one of FAR's authors ({error})")
    model = FAR(cfg)
    # theirs has no std per band: the head learns x itself
    load_exactly(model, {"band_std": torch.ones(size + 1), **{our_name(k): v for k, v in weights.items()}}, path)
    return model.eval()
