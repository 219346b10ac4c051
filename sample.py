"""
Draw images from a trained run: a grid, what every band adds, or an npz for evaluators.

    python sample.py                                                  # the weights that come with the code
    python sample.py --prompt "a red circle left of a blue star" "two green squares"
    python sample.py --ckpt runs/fashion_mnist_far_tiny --classes bag,sandal --n 16 --cfg 2
    python sample.py --ckpt runs/cifar10_far_s --n 50000 --npz    # (N, H, W, 3) uint8 for evaluators; resumes
    torchrun --nproc_per_node 8 -- sample.py ... --npz                # every process makes its share

The same seed and arguments give the same bytes; image i depends on (seed, i) only, whatever --n.
"""
import os
import shutil
from argparse import RawDescriptionHelpFormatter
from types import SimpleNamespace

import torch
from tqdm import tqdm

from bands import check_bands
from common import (InputError, OneLineParser, autocast, command_line, digest, join_processes,
                    load_checkpoint, make_parts, number, pick_device, positive, rank_and_world, reading,
                    seed_number, whole_numbers)
from data import save_grid, save_npz
from diffusion import SAMPLERS
from far import FAR, FARConfig, any_ladder, sampling_defaults
from text import encode, load_encoder
from tokenizer import fingerprint, load_tokenizer, to_uint8

PRETRAINED = os.path.join(os.path.dirname(os.path.abspath(__file__)), "pretrained")
COLUMNS = 24                     # the most classes or prompts that a picture shows


def load_run(path, device="cpu", ema=True, build=FAR):
    """
    A trained run, from its folder or its far.pt with tokenizer.pt beside it: its attributes are model (made
    by build(cfg)) and tokenizer in eval mode, data (see train.main), encoder, step, and so on. InputError.
    """
    path = os.path.join(path, "far.pt") if os.path.isdir(path) else path
    checkpoint = load_checkpoint(path, "far")
    with reading(path):
        data, model = checkpoint["data"], build(FARConfig(**checkpoint["config"]))
        weights = checkpoint["ema" if ema or "model" not in checkpoint else "model"]
        model.load_state_dict({name: value.float() for name, value in weights.items()})
    tokenizer = load_tokenizer(os.path.join(os.path.dirname(path), "tokenizer.pt"))
    if model.cfg.latent_dim != tokenizer.cfg.latent_dim:
        raise InputError(f"the tokenizer.pt beside {path} makes other latents than the model reads")
    encoder = load_encoder(data["text"], device, data["text_dtype"]) if data.get("text") else None
    if encoder and encoder.fingerprint != data["text_fingerprint"]:
        raise InputError(f"{data['text']} has changed: it is not the text model that {path} was trained with")
    return SimpleNamespace(
        model=model.eval().requires_grad_(False).to(device), tokenizer=tokenizer.to(device), data=data,
        encoder=encoder, step=checkpoint["step"], device=torch.device(device), dtype=checkpoint["dtype"],
        folder=os.path.dirname(path))


@torch.inference_mode()
def generate(run, shown, seed=0, first=0, batch=64, every_band=False, progress=lambda: None, **sampling):
    """
    Images of what is shown, class numbers or prompts (N of them), image i with the noise of (seed, first +
    i); `sampling` goes to FAR.sample. -> uint8 (N, c, S, S); with `every_band` a list of those, one per band.
    """
    decode = lambda x: to_uint8(run.tokenizer.decode(x / run.tokenizer.latent_scale)).cpu()
    rows = []
    for i in range(0, len(shown), batch):
        part = shown[i:i + batch]
        if run.model.cfg.text_dim:
            condition = dict(text=tuple(t.to(run.device) for t in encode(run.encoder, part)))
        else:
            condition = dict(labels=torch.as_tensor(part, device=run.device))
        with autocast(run.device, run.dtype):
            bands = run.model.sample(**condition, seed=seed, first=first + i, progress=progress, **sampling)
            bands = bands if every_band else bands[-1:]                                   # (B, C, H, H) each
            rows.append([torch.cat([decode(few) for few in x.split(64)]) for x in bands])
    images = [torch.cat(band) for band in zip(*rows)]
    return images if every_band else images[-1]


def sample_in_parts(run, shown, folder, seed=0, batch=64, **sampling):
    """
    Images of class numbers or prompts, uint8 (N, c, S, S), by way of files of 250 in `folder`: an interrupted
    call goes on, a longer one begins with them, several processes share the work; process 0 has the result.
    """
    def make(rows):
        return generate(run, shown[rows.start:rows.stop], seed, rows.start, batch, **sampling).numpy()

    parts = make_parts(folder, len(shown), make, "sampling", size=250, batch=batch)
    return torch.from_numpy(parts[range(len(shown))]) if rank_and_world()[0] == 0 else None


def what_to_draw(run, prompts=None, classes=None):
    """Prompts, or the numbers of `classes`, "bag,3"; by default all that the checkpoint knows. InputError."""
    names, chosen = run.data["class_names"], classes.split(",") if classes else []
    right, wrong = ("prompt", "classes") if run.model.cfg.text_dim else ("classes", "prompt")
    if dict(prompt=prompts, classes=classes)[wrong]:
        raise InputError(f"this model draws from --{right}, not from --{wrong}")
    numbers = {str(i): i for i in range(len(names))} | {name: i for i, name in enumerate(names)}
    for text in chosen:
        if text not in numbers:
            raise InputError(f"--classes: {text!r} is neither a class nor a number below {len(names)}")
    everything = run.data["prompts"] if run.model.cfg.text_dim else range(len(names))
    return prompts or [numbers[text] for text in chosen] or list(everything)


def draw_pictures(run, what, n, paths, seed=0, batch=4 * COLUMNS, **sampling):
    """n images of `what` in turn, or some -> how many. paths[0]: a column of each; paths[1]: bands of 8."""
    columns = what[:COLUMNS]
    few = min(n, 4 * COLUMNS if len(what) > COLUMNS else 16 * len(columns))
    shown = [columns[i % len(columns)] for i in range(few)]
    with tqdm(total=-(-few // batch) * len(sampling["bands"]), desc="pictures", leave=False) as bar:
        ladder = generate(run, shown, seed, 0, batch, True, bar.update, **sampling)
    save_grid(paths[0], ladder[-1], min(len(columns), few))
    save_grid(paths[1], torch.stack([images[:8] for images in ladder], dim=1).flatten(0, 1), len(ladder))
    return few


# ---- the command line

def add_sampling_flags(parser):
    """The flags of every script that samples."""
    add = parser.add_argument
    add("--seed", type=seed_number, default=0, help="of the noise")
    add("--cfg", type=number, help="guidance, rising from 1 at the lowest band; 1 is none")
    add("--steps", type=whole_numbers, help="diffusion steps of all bands, or first and last: 40,100")
    add("--sampler", choices=SAMPLERS, help="of the diffusion head; by default the layout's")
    add("--temperature", type=number, help="scale of the noise: lower is plainer, higher is wilder")
    add("--bands", type=whole_numbers, help="the ladder to climb, e.g. 1,2,4,8; by default the model's")
    add("--no-ema", action="store_true", help="the raw weights instead of their average")
    add("--batch", type=positive, default=64, help="images at once")
    add("--device", help="cuda, mps or cpu; by default the best there is")
    add("--dtype", choices=("bf16", "fp32"), help="arithmetic; by default that of the training")


def sampling_settings(args, cfg):
    """Arguments of FAR.sample from the command line, else the model's defaults. InputError."""
    settings = sampling_defaults(cfg)
    settings |= {name: value for name, value in vars(args).items() if name in settings and value is not None}
    settings["steps"] = settings["steps"][0], settings["steps"][-1]          # one number is for all bands
    if max(settings["steps"]) > 1000:
        raise InputError("--steps must be between 1 and 1000, the steps of the training")
    if settings["cfg"] != 1 and cfg.label_drop == 0:
        raise InputError("--cfg needs a null condition, and this model was trained without one: use --cfg 1")
    try:
        check_bands(settings["bands"], cfg.latent_size)
    except ValueError as error:
        raise InputError(f"--bands: {error}")
    if settings["bands"] != cfg.bands and not any_ladder(cfg):
        raise InputError(f"--bands: trained on {cfg.bands} alone; --layout paper trains for all ladders")
    return settings


def get_args(argv=None):
    parser = OneLineParser(prog="sample.py", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ckpt", default=PRETRAINED, help="a run's folder, or its far.pt; by default ours")
    add("--classes", help="names or numbers, e.g. bag,3; by default all")
    add("--prompt", nargs="+", metavar="TEXT", help="for text models")
    add("--n", type=positive, help="how many images, the classes or prompts in turn; by default 4 of each")
    add("--out", help="the picture; by default sample.png in the run's folder")
    add("--npz", action="store_true", help="also an npz: arr_0 (N, H, W, 3) uint8, arr_1 labels")
    add_sampling_flags(parser)
    return parser.parse_args(argv)


def main(argv=None):
    args = get_args(argv)
    rank, _, device = join_processes(pick_device(args.device))
    run = load_run(args.ckpt, device, not args.no_ema)
    run.dtype = args.dtype or run.dtype
    settings, what = sampling_settings(args, run.model.cfg), what_to_draw(run, args.prompt, args.classes)
    folder = "." if args.ckpt == PRETRAINED else run.folder
    out = (args.out or os.path.join(folder, "sample")).removesuffix(".png")
    os.makedirs(os.path.dirname(out) or ".", exist_ok=True)
    n, files = args.n or 4 * len(what), [f"{out}.png", f"{out}_bands.png"]
    if args.npz:            # the same weights, things to draw and settings go on where they were interrupted
        networks = fingerprint(run.model), fingerprint(run.tokenizer)
        parts = f"{out}.parts-{digest(networks, settings, what, args.seed, args.batch, run.dtype)}"
        turns = [i % len(what) for i in range(n)]
        images = sample_in_parts(run, [what[i] for i in turns], parts, args.seed, args.batch, **settings)
    if rank:
        return                                                   # the pictures are few: process 0 draws them
    if args.npz:                                          # labels: class numbers, or places of the prompts
        save_npz(f"{out}.npz", images, turns if run.model.cfg.text_dim else [what[i] for i in turns])
        shutil.rmtree(parts)
        files.append(f"{out}.npz")
    few = draw_pictures(run, what, n, files, args.seed, args.batch, **settings)
    names = [repr(c) if isinstance(c, str) else f"{c} {run.data['class_names'][c]}" for c in what[:COLUMNS]]
    print(f"{few} of {n} images: {', '.join(f'{name} {value}' for name, value in settings.items())}\n"
          f"columns: {', '.join(names)}\nwritten: {', '.join(files)}")


if __name__ == "__main__":
    command_line(main)
