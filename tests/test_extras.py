"""Tests of extras: the baselines, the ablations' rows and verdicts, counted costs, foreign checkpoints."""
import argparse
import json
import os
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import sample
import train
from common import InputError
from extras import ablate, baselines, benchmark, export, gpu_check, published
from far import FAR, LAYOUTS, PRESETS, Randomness, make_config, sampling_defaults
from tokenizer import AutoencoderKL, TokenizerConfig, default_config

torch.set_num_threads(1)
SMALL = dict(width=32, depth=1, n_head=4, n_cond=1, head_width=32, head_depth=2)


class Fashion:
    """As much of Fashion-MNIST as a configuration needs."""
    name, size, channels, n_class, captions = "fashion_mnist", 32, 1, 10, None

    def __len__(self):
        return 60000


def small(method, H=4, C=4, n_class=4):
    """A small model of a method of extras/baselines.py."""
    torch.manual_seed(0)
    changes = {**baselines.config_changes(method, "far_nano", H, C, n_class), **SMALL}
    return baselines.METHODS[method](make_config("far_nano", "band", H, C, n_class, **changes))


# ---- MAR and DiT

@pytest.mark.parametrize("method", ["mar_random", "mar_raster"])
def test_mar_draws_every_token_once(method, monkeypatch):
    model, number = small(method).eval(), iter(range(1, 100))
    monkeypatch.setattr(model, "draws", 6)
    count = lambda condition, noise, *_: torch.full_like(noise(), next(number))
    monkeypatch.setattr(model.head, "sample", count)
    grids = torch.stack(model.sample(torch.arange(2), cfg=2.0))[:, :, 0].flatten(2)              # (6, B, 16)
    for before, after in zip(grids, grids[1:]):
        assert (after[before > 0] == before[before > 0]).all() and (after > 0).sum() > (before > 0).sum()
    assert (grids[-1] > 0).all()
    in_order = (grids[-1].diff(dim=1) >= 0).all().item()
    assert in_order == (method == "mar_raster"), "raster: row by row; random: not"


@pytest.mark.parametrize("method", ["dit", "mar_random", "mar_raster"])
def test_mar_and_dit_learn_a_handful_of_latents(method):
    model = small(method)
    wanted = torch.randn(4, 4, 4, 4, generator=torch.Generator().manual_seed(1)).sign()
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3)
    for step in range(150):
        labels = torch.arange(16) % 4
        loss, errors = model(wanted[labels], Randomness(0, step), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    drawn = model.eval().sample(torch.arange(4), steps=(10, 10), bands=(4,), masked=False)[-1]
    assert errors.shape == (1,)
    assert (drawn * wanted).mean() > 0.4, "drawn as asked for, by class"


@pytest.mark.parametrize("method", list(baselines.METHODS))
def test_a_baseline_has_about_as_many_parameters_as_far(method):
    cfg = [make_config("far_tiny", "band", 4, 32, 10, **baselines.config_changes(m, "far_tiny", 4, 32, 10))
           for m in (method, "far")]
    ours, theirs = baselines.parameters(baselines.METHODS[method], cfg[0]), baselines.parameters(FAR, cfg[1])
    assert 0.85 < ours / theirs < 1.15
    model = small(method).eval()
    with torch.no_grad():
        one, two = (model.sample(torch.arange(n), seed=1, first=first, steps=(2, 2), cfg=2.0)[-1]
                    for n, first in ((2, 0), (1, 0)))
    assert torch.allclose(one[:1], two, atol=1e-5), "an image depends on (seed, i) alone"


# ---- a tiny folder of pictures, and a classifier that costs nothing

@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for name in ("dark", "light"):
        os.makedirs(root / name)
        for i in range(12):
            pixels = rng.integers(0, 120, (32, 32, 3)) + 120 * (name == "light")
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{i}.png")
    return str(root)


@pytest.fixture
def quick(monkeypatch):
    slow = evaluate.train_classifier
    monkeypatch.setattr(evaluate, "train_classifier", lambda *given: slow(*given, steps=3, batch=8))
    for module in (baselines, ablate):
        config = lambda size, channels: TokenizerConfig(channels, size, 8, 8, 16)
        monkeypatch.setattr(module, "default_config", config)


def test_the_baselines_are_trained_and_tabled_and_go_on_where_they_stopped(pictures, tmp_path, monkeypatch,
                                                                           quick, capsys):
    monkeypatch.setattr(baselines, "GRID", baselines.GRID[:2])
    monkeypatch.setattr(baselines, "training_seconds", lambda *_, **__: 0.5)                    # two steps
    command = ["--data", pictures, "--size", "32", "--data-dir", str(tmp_path / "data"),
               "--out", str(tmp_path / "out"), "--model", "far_nano", "--seconds", "1", "--n", "8",
               "--device", "cpu", "--only", "far", "dit"]
    baselines.main(command)
    table = (tmp_path / "out" / "baselines.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in table[2:]] == [
        "real test images", "training images through the tokenizer", "far", "dit"]
    found = json.loads((tmp_path / "out" / "baselines.json").read_text())
    assert found["dit"][0]["steps"] == 2 and found["dit"][0]["sampling"] in baselines.GRID
    monkeypatch.setattr(baselines, "judge", None)                                     # not judged again
    baselines.main(command)
    assert table[-1] in capsys.readouterr().out


# ---- ablations

ROWS = {str(row[1:]): row for _, rows in ablate.TABLES.values() for row in rows}.values()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_every_row_is_a_model_that_trains_and_samples_as_the_row_says(row):
    given = SimpleNamespace(model="far_nano", out="out", data="fashion_mnist", data_dir="data", steps=10, n=8)
    job = ablate.make_job(given, "tokenizer.pt", row, 0)
    cfg, recipe = train.configure(train.get_args(job["command"]), Fashion(), default_config(32, 1), None, 1)
    assert recipe["steps"] == 10 and cfg.layout == (row[1][1] if "--layout" in row[1] else "paper")
    model = FAR(cfg)
    loss, _ = model(torch.randn(4, cfg.latent_dim, 4, 4), Randomness(0, 0), torch.arange(4))
    loss.backward()
    drawn = model.eval().sample(torch.arange(2), **{**sampling_defaults(cfg), **row[2], "steps": (1, 1)})
    assert torch.isfinite(loss) and torch.isfinite(drawn[-1]).all()
    for item in row[1][1:] if row[1] and row[1][0] == "--set" else []:
        name, value = item.split("=")
        assert getattr(cfg, name) == value


def test_a_difference_counts_only_beyond_the_spread_of_the_seeds():
    row = lambda *fds: [dict(frechet_distance=fd, recall=0.5, accuracy=0.9, training_rate=100,
                             sampling_seconds=2.0) for fd in fds]
    table = ablate.write_table("what", [("first", row(5, 6)), ("near", row(6, 6.2)), ("far", row(9, 9)),
                                        ("low", row(2, 3))])
    assert [line.split("|")[4].strip() for line in table[2:]] == ["", "within the spread", "worse", "better"]
    assert table[2].split("|")[2].strip() == "5.50" and table[2].split("|")[3].strip() == "1.00"


def test_the_ablations_write_tables_and_go_on_where_they_stopped(pictures, tmp_path, monkeypatch, quick,
                                                                 capsys):
    here = lambda kind: SimpleNamespace(Pool=lambda n: nullcontext(SimpleNamespace(imap_unordered=map)))
    monkeypatch.setattr(ablate, "get_context", here)                                 # no processes, no charts
    monkeypatch.setattr(ablate, "pyplot", lambda: (_ for _ in ()).throw(InputError("charts need matplotlib")))
    monkeypatch.setitem(ablate.TABLES, "lowpass", (ablate.TABLES["lowpass"][0], [
        (name, change, dict(steps=(1, 1), bands=(4,))) for name, change, _ in ablate.TABLES["lowpass"][1]]))
    command = ["--data", pictures, "--data-dir", str(tmp_path / "data"), "--out", str(tmp_path / "out"),
               "--model", "far_nano", "--steps", "2", "--seeds", "1", "--n", "8", "--only", "lowpass"]
    ablate.main(command)
    text = (tmp_path / "out" / "ablations.md").read_text()
    assert "| spatial |" in text and "| Fourier |" in text
    assert "no lowpass.png: charts need" in capsys.readouterr().out
    monkeypatch.setattr(ablate, "run_row", None)                              # every row is known by now
    ablate.main(command)


# ---- costs

def test_the_table_of_costs_has_every_preset_in_every_layout(monkeypatch):
    monkeypatch.setattr(benchmark, "sampling_flops", lambda *_: (1e9, 0.5))
    monkeypatch.setattr(train, "count_flops", lambda *_: 2e9)
    monkeypatch.setattr(benchmark, "FAR", lambda cfg: DiffusionHeadAlone())
    rows = [line.split("|") for line in benchmark.counted(PRESETS)[2:]]
    assert [(row[1].strip(), row[2].strip()) for row in rows] == [(p, l) for p in PRESETS for l in LAYOUTS]
    assert benchmark.tokens(benchmark.imagenet("far_b", "band"), (1, 2, 4, 8, 16)) == 341 + 64
    assert benchmark.tokens(benchmark.imagenet("far_b", "paper"), (1, 16)) == 256 + 64


class DiffusionHeadAlone(torch.nn.Module):
    """A model that costs nothing to build."""

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(1, 1)


def test_counted_sampling_is_what_a_whole_sampling_takes():
    with torch.device("meta"):
        model = FAR(make_config("far_nano", "band", 4, 8, 10)).eval()
    settings = dict(sampling_defaults(model.cfg), steps=(3, 2))
    labels = torch.zeros(1, dtype=torch.long, device="meta")
    whole = benchmark.flops(lambda: model.sample(labels, **settings))
    # an embedding of the time of every step, once per band, is not in the estimate
    assert benchmark.sampling_flops(model, settings)[0] == pytest.approx(whole, rel=0.05)


def test_the_gpu_check_runs_through_without_a_gpu(tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(gpu_check.train, "main", calls.append)
    monkeypatch.setattr(gpu_check.sample, "main", calls.append)
    gpu_check.main(["--tiny", "--device", "cpu", "--out", str(tmp_path)])
    out = capsys.readouterr().out
    assert len(calls) == 4 and "far_nano, released" in out and "| fashion_mnist | 32 px |" in out


# ---- the authors' checkpoints, and runs to give away

def authors_name(ours):
    """The name of a tensor in their files."""
    for theirs, start in sorted(published.NAMES.items(), key=lambda pair: -len(pair[1])):
        if ours.startswith(start):
            name = theirs + ours[len(start):]
            break
    if "res_blocks" in name:
        for theirs, part in published.IN_HEAD_BLOCK.items():
            name = name.replace(f".{part}", f".{theirs}")
    return name


def test_published_files_become_a_run_that_is_sampled_and_given_away(tmp_path):
    torch.manual_seed(0)
    model = FAR(make_config("far_nano", "released", 4, 16, 5, **SMALL))
    weights = {authors_name(name): value for name, value in model.state_dict().items() if name != "band_std"}
    checkpoint, kl16 = str(tmp_path / "checkpoint-last.pth"), str(tmp_path / "kl16.ckpt")
    args = argparse.Namespace(model="far_base")
    tokenizer = TokenizerConfig(3, 256, 16, 16, 32, published=True)
    torch.save(dict(model=weights, model_ema=weights, epoch=3, args=args), checkpoint)
    torch.save(dict(model=AutoencoderKL(tokenizer).state_dict()), kl16)
    run, given = str(tmp_path / "run"), str(tmp_path / "given")
    published.main([checkpoint, kl16, run, "--heads", "4"])
    loaded = sample.load_run(run)
    assert loaded.model.cfg.layout == "released"
    assert loaded.tokenizer.latent_scale.item() == pytest.approx(0.2325)
    state = loaded.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    export.main([run, given])
    for folder in (run, given):
        sample.main(["--ckpt", folder, "--classes", "3", "--n", "2", "--steps", "2", "--device", "cpu"])
        assert Image.open(os.path.join(folder, "sample.png")).size[0] >= 64
    with pytest.raises(InputError, match="is not a checkpoint of FAR's authors"):
        published.main([os.path.join(run, "far.pt"), kl16, run])
