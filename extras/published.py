"""
The authors' FAR checkpoints (far_base, far_large, far_huge) as an ordinary run folder.

    python -m extras.published checkpoint-last.pth kl16.ckpt runs/far_b
    python sample.py --ckpt runs/far_b --classes 207,360

The network is the `released` layout of far.py, only the names differ; sizes are read from the shapes of the
tensors. Missing or unexpected names are refused, and code: an argparse.Namespace alone may stand beside them.
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

# theirs -> ours, parts of names, replaced in this order: of the transformer, the head, and the head's blocks
NAMES = {
    "class_emb.": "class_embed.", "fake_latent": "null_cond", "z_proj.": "token_in.",
    "z_proj_ln.": "norm_in.", "encoder_blocks.": "encoder.", "decoder_blocks.": "decoder.",
    "decoder_embed.": "decoder_in.", "diffusion_pos_embed_learned": "head_pos", "_pos_embed_learned": "_pos",
    "diffloss.net.": "head.", "time_embed.mlp.0.": "time.fc1.", "time_embed.mlp.2.": "time.fc2.",
    "index_cond_embed.": "level.", "cond_embed.": "cond.", "input_proj.": "input.", "res_blocks.": "blocks.",
    "final_layer.linear.": "output.", "final_layer.adaLN_modulation.1.": "modulation.",
    "in_ln.": "norm.", "mlp.0.": "fc1.", "mlp.2.": "fc2.", "adaLN_modulation.1.": "modulation.",
}
HEADS = {768: 12, 1024: 16, 1280: 16}                  # attention heads by width; the tensors do not tell


def our_name(name):
    """The name in far.py of a tensor of the authors' checkpoint. Unknown names are refused later."""
    for theirs, ours in NAMES.items():
        name = name.replace(theirs, ours)
    return name


def config_of(weights, n_head=None):
    """The FARConfig of their tensors, by the shapes; n_head only for other widths than theirs. KeyError."""
    n_class, width = weights["class_emb.weight"].shape
    head_width, latent_dim = weights["diffloss.net.input_proj.weight"].shape
    n_tokens = weights["diffusion_pos_embed_learned"].shape[1]
    size = int(n_tokens ** 0.5)
    count = lambda start: len({name[len(start):].split(".")[0] for name in weights if name.startswith(start)})
    return FARConfig(
        layout="released", latent_size=size, latent_dim=latent_dim, n_class=n_class, bands=every_band(size),
        width=width, n_head=n_head or HEADS[width], depth=count("encoder_blocks."),
        n_cond=weights["encoder_pos_embed_learned"].shape[1] - n_tokens, dropout=0.1, head_width=head_width,
        head_depth=count("diffloss.net.res_blocks."), **LAYOUTS["released"])


def load_published(path, n_head=None):
    """
    The authors' checkpoint -> its FARConfig, and the averaged and the raw weights by our names (dicts).
    InputError if it is not one, with the names that do not fit.
    """
    content = load_checkpoint(path, allow=[argparse.Namespace])
    if not (isinstance(content, dict) and "model_ema" in content and "model" in content):
        raise InputError(f"{path} is not a checkpoint of FAR's authors: it has no model and model_ema")
    states = []
    with reading(path):
        cfg = config_of(content["model_ema"], n_head)
        for weights in (content["model_ema"], content["model"]):
            state = {our_name(name): value for name, value in weights.items()}
            state["band_std"] = torch.ones(cfg.latent_size + 1)      # theirs has none: its head learns x
            with torch.device("meta"):
                FAR(cfg).load_state_dict(state, assign=True)         # strict: what does not fit is named here
            states.append(state)
    return cfg, *states


def main(argv=None):
    parser = OneLineParser(prog="-m extras.published", description=__doc__.split("\n\n")[0])
    parser.add_argument("checkpoint", help="their checkpoint-last.pth")
    parser.add_argument("tokenizer", help="their kl16.ckpt")
    parser.add_argument("out", help="folder of the run to write, e.g. runs/far_b")
    args = parser.parse_args(argv)
    cfg, ema, raw = load_published(args.checkpoint)
    tokenizer = load_tokenizer(args.tokenizer)
    tokenizer.cfg.image_size = cfg.latent_size * tokenizer.cfg.stride    # convolutional: it takes any size
    data = dict(name="imagenet", source=None, size=tokenizer.cfg.image_size, channels=3,
                data_dir=os.path.abspath("data"), class_names=[str(i) for i in range(cfg.n_class)],
                tokenizer=fingerprint(tokenizer))
    os.makedirs(args.out, exist_ok=True)
    save_tokenizer(os.path.join(args.out, "tokenizer.pt"), tokenizer)
    save_checkpoint(os.path.join(args.out, "far.pt"), dict(
        kind="far", step=0, run={}, dtype="fp32", config=asdict(cfg), data=data, model=raw, ema=ema))
    print(f"written; next: python sample.py --ckpt {shlex.quote(args.out)} --classes 207,360")


if __name__ == "__main__":
    command_line(main)
