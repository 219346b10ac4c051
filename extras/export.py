"""
A run's averaged weights and tokenizer in half precision, small enough to give away.

    python train.py --text && python -m extras.export runs/shapes_text_far_tiny_t2i pretrained

The folder is an ordinary run folder for sample.py and evaluate.py; a training cannot go on from it.
"""
import argparse
import os

from common import OneLineParser, command_line, load_checkpoint, save_checkpoint


def halve(state):
    """A state dict with its floating-point tensors in float16."""
    return {name: value.half() if value.is_floating_point() else value for name, value in state.items()}


def main(argv=None):
    parser = OneLineParser(prog="extras.export", description=__doc__,
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of a trained run")
    parser.add_argument("out", help="folder to write")
    args = parser.parse_args(argv)
    far = load_checkpoint(os.path.join(args.run, "far.pt"), "far")
    tokenizer = load_checkpoint(os.path.join(args.run, "tokenizer.pt"), "tokenizer")
    data = dict(far["data"], data_dir="data")                            # no path of this machine
    os.makedirs(args.out, exist_ok=True)
    save_checkpoint(os.path.join(args.out, "far.pt"), dict(
        kind="far", step=far["step"], run=far["run"], dtype="fp32", config=far["config"], data=data,
        ema=halve(far["ema"])))
    save_checkpoint(os.path.join(args.out, "tokenizer.pt"), dict(tokenizer, model=halve(tokenizer["model"])))
    size = sum(os.path.getsize(os.path.join(args.out, name)) for name in ("far.pt", "tokenizer.pt"))
    print(f"written: {args.out}/far.pt and tokenizer.pt, {size / 1e6:.1f} MB together")


if __name__ == "__main__":
    command_line(main)
