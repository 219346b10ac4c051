"""
The authors' FAR checkpoints (far_base, far_large, far_huge) as an ordinary run folder.

    python -m extras.published checkpoint-last.pth kl16.ckpt runs/far_b
    python sample.py --ckpt runs/far_b --classes 207,360

The network is the `released` layout of far.py, only the names differ; sizes are read from the shapes of the
tensors. Missing or unexpected names are refused. Their files hold an argparse.Namespace beside the tensors,
the one class that is allowed in; nothing in them is executed.
"""
import argparse
import os
import shlex
from dataclasses import asdict

import torch

from bands import every_band
from common import InputError, OneLineParser, command_line, load_checkpoint, reading, save_checkpoint
from far import FAR, LAYOUTS, FARConfig
from tokenizer import fingerprint, load_tokenizer, save_tokenizer

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
    """
    The name in far.py of a tensor of the authors' checkpoint. An unknown name stays as it is, and is refused
    later.
    """
    start = max((theirs for theirs in NAMES if name.startswith(theirs)), key=len, default="")
    name = NAMES.get(start, "") + name[len(start):]
    if name.startswith("head.blocks."):
        for theirs, ours in IN_HEAD_BLOCK.items():
            name = name.replace(f".{theirs}", f".{ours}")
    return name


def config_of(weights, n_head=None):
    """
    The FARConfig of their tensors, by the shapes; n_head only for widths other than theirs. Raises KeyError
    and kin.
    """
    n_class, width = weights["class_emb.weight"].shape
    n_tokens = weights["diffusion_pos_embed_learned"].shape[1]
    size = int(n_tokens ** 0.5)
    count = lambda start: len({name[len(start):].split(".")[0] for name in weights if name.startswith(start)})
    return FARConfig(
        layout="released", latent_size=size, latent_dim=weights["z_proj.weight"].shape[1], n_class=n_class,
        bands=every_band(size), width=width, n_head=n_head or HEADS[width], depth=count("encoder_blocks."),
        n_cond=weights["encoder_pos_embed_learned"].shape[1] - n_tokens, dropout=0.1,
        head_width=weights["diffloss.net.input_proj.weight"].shape[0],
        head_depth=count("diffloss.net.res_blocks."), **LAYOUTS["released"])


def load_published(path, n_head=None):
    """
    The authors' checkpoint -> its FARConfig, and the averaged and the raw weights by our names (dicts).
    Raises InputError on a file that is not one, with the names that do not fit.
    """
    content = load_checkpoint(path, allow=[argparse.Namespace])
    if not (isinstance(content, dict) and "model_ema" in content and "model" in content):
        raise InputError(f"{path} is not a checkpoint of FAR's authors: it has no model and model_ema")
    with reading(path):
        cfg = config_of(content["model_ema"], n_head)
        states = []
        for weights in (content["model_ema"], content["model"]):
            # theirs has no std per band: the head learns x itself
            state = {our_name(name): value for name, value in weights.items()}
            state["band_std"] = torch.ones(cfg.latent_size + 1)
            with torch.device("meta"):
                FAR(cfg).load_state_dict(state, assign=True)         # strict: what does not fit is named here
            states.append(state)
    return cfg, *states


def main(argv=None):
    parser = OneLineParser(prog="extras.published", description=__doc__,
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="their checkpoint-last.pth")
    parser.add_argument("tokenizer", help="their kl16.ckpt")
    parser.add_argument("out", help="folder of the run to write, e.g. runs/far_b")
    parser.add_argument("--heads", type=int, help="attention heads, for widths other than 768, 1024 and 1280")
    args = parser.parse_args(argv)
    cfg, ema, raw = load_published(args.checkpoint, args.heads)
    tokenizer = load_tokenizer(args.tokenizer)
    tokenizer.cfg.image_size = cfg.latent_size * tokenizer.cfg.stride    # convolutional: it takes any size
    data = dict(name="imagenet", source=None, size=tokenizer.cfg.image_size, channels=3,
                data_dir=os.path.abspath("data"), class_names=[str(i) for i in range(cfg.n_class)],
                tokenizer=fingerprint(tokenizer))
    os.makedirs(args.out, exist_ok=True)
    save_tokenizer(os.path.join(args.out, "tokenizer.pt"), tokenizer)
    save_checkpoint(os.path.join(args.out, "far.pt"), dict(
        kind="far", step=0, run={}, dtype="fp32", config=asdict(cfg), data=data, model=raw, ema=ema))
    print(f"written: {args.out}/far.pt and tokenizer.pt\n"
          f"next:    python sample.py --ckpt {shlex.quote(args.out)} --classes 207,360")


if __name__ == "__main__":
    command_line(main)
