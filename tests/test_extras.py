"""Tests of extras: baselines, ablations, counted costs, the authors' files, the checker of text-to-image."""
import argparse
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import evaluate
import sample
import train
from common import InputError
from extras import ablate, baselines, benchmark, export, geneval, gpu_check, published
from far import FAR, LAYOUTS, Randomness, make_config, sampling_defaults
from shapes import COLORS, HELD_OUT, SHAPES, caption
from test_far import small
from tokenizer import AutoencoderKL, TokenizerConfig, default_config


def small_baseline(method):
    """A small model of a method for latents (4, 4, 4) of 4 classes, and the arguments that sample it."""
    torch.manual_seed(0)
    changes = dict(baselines.configure(method, 4, 4, 4)[1], width=32, depth=1, head_width=32, head_depth=2)
    cfg = make_config("far_nano", "band", 4, 4, 4, **changes)
    settings = dict(sampling_defaults(cfg), steps=(10, 10), cfg=2.0, bands=cfg.bands)
    return baselines.METHODS[method](cfg), dict(settings, seed=1, first=0, progress=lambda: None)


@pytest.mark.parametrize("method", ["mar_random", "mar_raster"])
def test_mar_draws_every_token_once(method, monkeypatch):
    (model, settings), number = small_baseline(method), iter(range(1, 100))
    monkeypatch.setattr(model, "draws", 6)
    monkeypatch.setattr(model.head, "sample", lambda z, noise, *_: torch.full_like(noise(), next(number)))
    grids = torch.stack(model.eval().sample(torch.arange(2), **settings))[:, :, 0].flatten(2)    # (6, B, 16)
    for before, after in zip(grids, grids[1:]):
        assert (after[before > 0] == before[before > 0]).all() and (after > 0).sum() > (before > 0).sum()
    in_order = (grids[-1].diff(dim=1) >= 0).all().item()
    assert (grids[-1] > 0).all() and in_order == (method == "mar_raster"), "raster: row by row; random: not"


@pytest.mark.parametrize("method", ["dit", "mar_random", "mar_raster"])
def test_a_baseline_is_as_large_as_far_and_learns_a_handful_of_latents(method):
    whole = [baselines.METHODS[name](baselines.configure(name, 4, 32, 10)[0]) for name in (method, "far")]
    ours, theirs = (sum(p.numel() for p in model.parameters()) for model in whole)
    assert 0.85 < ours / theirs < 1.15
    model, settings = small_baseline(method)
    wanted = torch.randn(4, 4, 4, 4, generator=torch.Generator().manual_seed(1)).sign()
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3)
    for step in range(150):
        loss, errors = model(wanted.repeat(4, 1, 1, 1), Randomness(0, step), torch.arange(16) % 4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    drawn, two = (model.eval().sample(torch.arange(n), **dict(settings, cfg=1.5))[-1] for n in (4, 2))
    assert errors.shape == (1,) and (drawn * wanted).mean() > 0.4, "drawn as asked for, by class"
    assert torch.allclose(drawn[:2], two, atol=1e-4), "an image depends on (seed, i) alone"


@pytest.mark.parametrize("module, work, flags, names, words", [
    (ablate, "run_rows", "--steps 2 --n 8 --only lowpass", ["spatial", "Fourier"], "8 samples"),
    (baselines, "judge", "--data {0}/pictures --size 16 --seconds 1 --n 8 --only far dit",
     ["real test images", "training images through the tokenizer", "far", "dit"], "| 2 |")])
def test_a_table_is_filled_once(module, work, flags, names, words, tiny, tmp_path, monkeypatch):
    slow, pool = evaluate.train_classifier, nullcontext(SimpleNamespace(imap_unordered=map))
    config = lambda size, channels: TokenizerConfig(channels, size, 4, 8, 16)
    for part, name, value in (                           # hours in seconds, and nothing in other processes
            (evaluate, "train_classifier", lambda *given: slow(*given, steps=3, batch=8)),
            (train, "default_config", config), (module, "default_config", config),
            (ablate, "DATA", str(tiny[0] / "pictures")), (ablate, "SIZE", 16), (module, "MODEL", "far_nano"),
            (ablate, "get_context", lambda kind: SimpleNamespace(Pool=lambda n: pool)),
            (baselines, "GRID", baselines.GRID[:2]), (baselines, "training_seconds", lambda *_: 0.5)):
        monkeypatch.setattr(part, name, value)
    command = f"{flags} --data-dir {{1}}/data --out {{1}}/out".format(tiny[0], tmp_path).split()
    module.main(command)
    text = next((tmp_path / "out").glob("*.md")).read_text()
    assert [line.split("|")[1].strip() for line in text.splitlines() if line[:2] == "| "][1:] == names
    assert words in text and len(list((tmp_path / "data").glob("tokenizer*.pt"))) == 1, "one for all"
    monkeypatch.setattr(module, work, None)                                  # every row is known by now
    module.main(command)
    assert next((tmp_path / "out").glob("*.md")).read_text() == text


@pytest.mark.parametrize("table", ablate.TABLES)
def test_every_row_is_a_model_that_trains_and_samples_as_the_row_says(table):
    data = type("Data", (), dict(n_class=10, __len__=lambda self: 60000))()
    for row in ablate.TABLES[table][1]:
        job = ablate.make_job(SimpleNamespace(out="out", data_dir="data", steps=10, n=8), row, 0)
        cfg, recipe = train.configure(train.get_args(job["command"]), data, default_config(32, 1), None, 1)
        flag, value = (row[1] or "--layout paper").split()
        name, _, choice = value.rpartition("=")
        assert recipe["steps"] == 10 and getattr(cfg, name or "layout") == choice
        assert flag == "--layout" or cfg.layout == "paper"
        model = FAR(cfg)
        loss, _ = model(torch.randn(4, cfg.latent_dim, 4, 4), Randomness(0, 0), torch.arange(4))
        loss.backward()
        settings = {**sampling_defaults(cfg), **job["sampling"], "steps": (1, 1)}
        drawn = model.eval().sample(torch.arange(2), **settings)[-1]
        assert torch.isfinite(loss) and torch.isfinite(drawn).all()


def test_a_difference_counts_only_beyond_the_spread_of_the_seeds():
    rest = dict(recall=0.5, accuracy=0.9, training_rate=300.0, sampling_seconds=2.0)
    rows = [(name, [dict(rest, frechet_distance=fd) for fd in pair]) for name, *pair in (
        ("first", 5, 6), ("near", 6, 6.2), ("far", 9, 9), ("low", 2, 3))]
    cells = [[cell.strip() for cell in line.split("|")] for line in ablate.write_table("what", rows)[2:]]
    assert [row[4] for row in cells] == ["-", "within the spread", "worse", "better"]
    assert cells[0][1:4] == ["first", "5.50", "1.00"]


def test_costs_are_those_of_a_whole_sampling_and_every_layout_is_timed(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "PRESETS", ["far_nano"])
    monkeypatch.setattr(benchmark, "IMAGENET", (4, 8, 10))
    rows = [[cell.strip() for cell in line.split("|")] for line in benchmark.counted()[2:]]
    assert {row[2]: int(row[6]) for row in rows} == dict(paper=17, released=17, band=1 + 4 + 16 + 1)
    for layout in LAYOUTS:
        with torch.device("meta"):
            model = FAR(make_config("far_nano", layout, 4, 8, 10)).eval()
        settings = dict(sampling_defaults(model.cfg), steps=(3, 6))
        with FlopCounterMode(display=False) as counter:
            model.sample(torch.zeros(1, dtype=torch.long, device="meta"), **settings)
        assert benchmark.sampling_flops(model, settings) == counter.get_total_flops()
    benchmark.main(["--model", "far_nano", "--batch", "2"])
    said = capsys.readouterr().out
    assert all(f"| far_nano, {name} | 2 |" in said for name in LAYOUTS)


def test_the_gpu_check_calls_what_there_is(monkeypatch, capsys):
    trained, sampled = [], []
    monkeypatch.setattr(gpu_check, "timed", lambda name, cfg, *_: f"| {name}, {cfg.layout} |")
    monkeypatch.setattr(train, "main", lambda argv: trained.append(train.get_args(argv).out))
    monkeypatch.setattr(sample, "main", lambda argv: sampled.append(sample.get_args(argv).ckpt))
    gpu_check.main([])
    said = capsys.readouterr().out
    assert all(f"| far_b, {name} |" in said for name in LAYOUTS) and len(trained) == 2 and trained == sampled


def test_the_authors_files_become_a_run_that_is_sampled_and_given_away(tmp_path, monkeypatch):
    block = "norm1 attn.qkv attn.proj norm2 mlp.fc1 mlp.fc2"
    layers = {"": "z_proj z_proj_ln encoder_norm decoder_embed decoder_norm",
              "encoder_blocks.{}.": block, "decoder_blocks.{}.": block,
              "diffloss.net.": "time_embed.mlp.0 time_embed.mlp.2 cond_embed index_cond_embed input_proj",
              "diffloss.net.res_blocks.{}.": "in_ln mlp.0 mlp.2 adaLN_modulation.1",
              "diffloss.net.final_layer.": "linear adaLN_modulation.1"}
    names = [f"{part}_pos_embed_learned" for part in ("encoder", "decoder", "diffusion")]
    names += ["class_emb.weight", "fake_latent", "mask_token"]
    names += [start.format(i) + layer + end for start, every in layers.items() for layer in every.split()
              for end in (".weight", ".bias") for i in (0, 1)]
    model, theirs, run, given = small("released", 4, 16, 5, head_lean=0), *(str(tmp_path / x) for x in "abc")
    state, kl16 = model.state_dict(), str(tmp_path / "kl16.ckpt")
    weights = {name: state[published.our_name(name)] for name in names}
    content = dict(model={n: w + 1 for n, w in weights.items()}, model_ema=weights, args=argparse.Namespace())
    torch.save(content, theirs)
    torch.save(dict(model=AutoencoderKL(TokenizerConfig(3, 256, 16, 16, 32, True)).state_dict()), kl16)
    monkeypatch.setitem(published.HEADS, model.cfg.width, model.cfg.n_head)
    published.main([theirs, kl16, run])
    export.main([run, given])
    sample.main(["--ckpt", given, "--classes", "3", "--n", "2", "--steps", "2"])
    ours, half = sample.load_run(run), sample.load_run(given).model.state_dict()
    assert dict(vars(ours.model.cfg), dropout=0.0) == vars(model.cfg)
    for name, value in ours.model.state_dict().items():
        assert torch.equal(value, state[name]) and torch.equal(half[name], value.half().float())
    assert torch.equal(sample.load_run(run, ema=False).model.null_cond, state["null_cond"] + 1)
    weights["surprise"] = weights.pop("z_proj_ln.bias")
    for wrong, message in ((content, "norm_in.bias(.|\n)*surprise"), (weights, "of FAR's authors")):
        torch.save(wrong, theirs)
        with pytest.raises(InputError, match=message):
            published.main([theirs, kl16, run])


PLACES = {"left of": dict(x=0.2), "right of": dict(x=0.8), "above": dict(y=0.2), "below": dict(y=0.8)}


def wrong(category, prompt):
    """A prompt with one thing wrong that its category looks at: shape, number, colour(s) or place."""
    kinds, where = list(prompt["kinds"]), next(other for other in PLACES if other != prompt["relation"])
    (color, shape), (last_color, last_shape) = kinds[0], kinds[-1]
    if category == "counting":
        kinds = kinds[:1] * (5 - len(kinds))
    elif category == "colour attribution" and color != last_color and shape != last_shape:
        kinds = [(last_color, shape), (color, last_shape)]
    elif category.startswith("colour"):
        kinds[0] = next(other for other in COLORS if other != color), shape
    elif category != "position":
        kinds[0] = color, next(other for other in SHAPES if other != shape)
    return dict(kinds=kinds, relation=where)


def test_the_checker_is_right_on_real_drawings_and_sees_what_is_wrong():
    shown = geneval.real(32, n=60)
    spoilt = {c: ([wrong(c, prompt) for prompt in asked], images) for c, (asked, images) in shown.items()}
    assert min(geneval.rate(shown).values()) >= 0.98 and max(geneval.rate(spoilt).values()) <= 0.02


def test_the_checker_finds_nothing_in_noise_grey_or_smears():
    noise = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    image = np.full((32, 32, 3), 125, np.uint8)
    assert not geneval.find_objects(image) and not any(one["shape"] for one in geneval.find_objects(noise))
    image[14:18, 2:30] = (225, 35, 35)                       # a red bar is none of the four shapes
    found, = geneval.find_objects(image)
    assert found["color"] == "red" and found["shape"] is None


def test_prompts_are_captions_of_the_training_data_or_held_out_from_them():
    for category, task in geneval.CATEGORIES.items():
        seen, unseen = geneval.prompts(category, False, 1000), geneval.prompts(category, True, 1000)
        for prompt in seen + unseen:
            things = [dict(color=c, shape=s, radius=0.195, x=0.5, y=0.5) for c, s in prompt["kinds"]]
            things[0].update(PLACES.get(prompt["relation"], {}))
            truth = dict(task=task, objects=things, say_size=False, say_background=False, say_place=None)
            assert prompt["text"] == caption(truth)
        pairs = [{frozenset(map(" ".join, prompt["kinds"])) for prompt in asked} for asked in (seen, unseen)]
        assert not pairs[0] & HELD_OUT and pairs[1] == (HELD_OUT if task in ("two", "position") else set())


def test_the_table_of_the_weights_that_come_with_the_code(monkeypatch, cli, tiny_run):
    monkeypatch.setattr(geneval, "prompts", lambda *asked, all=geneval.prompts: all(*asked, most=6))
    monkeypatch.setattr(geneval, "real", lambda size, all=geneval.real: all(size, n=20))
    code, said, _ = cli(geneval.main, "--n", 2, "--device", "cpu")
    rows = [line.split("|") for line in said.splitlines()[2:6]]
    means = {row[1].strip(): float(row[-2]) for row in rows}
    assert code == 0 and means.pop("real drawings") == 1 and len(means) == 3 and min(means.values()) >= 0.6
    code, _, error = cli(geneval.main, "--ckpt", tiny_run)
    assert code == 2 and "draws classes" in error
