"""
A run's averaged weights and tokenizer in half precision, small enough to give away: a folder for sample.py
and evaluate.py, which a training cannot go on from.

    python train.py --text && python -m extras.export runs/shapes_text_far_tiny_t2i pretrained
"""
import os

import torch

from common import OneLineParser, command_line, load_checkpoint, write_atomically


def main(argv=None):
    parser = OneLineParser(prog="-m extras.export", description=__doc__.split("\n\n")[0])
    parser.add_argument("run", help="folder of a trained run")
    parser.add_argument("out", help="folder to write")
    args = parser.parse_args(argv)
    halve = lambda state: {name: p.half() if p.is_floating_point() else p for name, p in state.items()}
    far = load_checkpoint(os.path.join(args.run, "far.pt"), "far")
    far = {key: far[key] for key in ("kind", "step", "run", "config", "data", "ema")}
    tokenizer = load_checkpoint(os.path.join(args.run, "tokenizer.pt"), "tokenizer")
    far["data"]["data_dir"] = "data"                                       # no path of this machine
    far.update(dtype="fp32", ema=halve(far["ema"]))
    tokenizer["model"] = halve(tokenizer["model"])
    os.makedirs(args.out, exist_ok=True)
    for name, content in (("far.pt", far), ("tokenizer.pt", tokenizer)):
        write_atomically(os.path.join(args.out, name), lambda file: torch.save(content, file))
    print(f"written: {args.out}/far.pt and tokenizer.pt")


if __name__ == "__main__":
    command_line(main)
