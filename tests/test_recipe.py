"""
How FAR is trained: order of the images, rates, optimizers, averages; and the authors' file format.

    python -m pytest -q tests/test_recipe.py
"""
import argparse
import math
from itertools import islice
from types import SimpleNamespace

import pytest
import torch

import train
from blocks import MLP
from common import InputError, epochs
from extras.published import load_published, our_name
from far import PRESETS, Randomness, make_config
from blocks import orthogonalise
from test_far import small


def test_an_epoch_shows_every_image_once_and_a_stream_starts_anywhere():
    take = lambda start, count, n: torch.cat(list(islice(epochs(start, count, 10, seed=0), n)))
    whole = take(0, 4, 10)
    for epoch in whole.view(4, 10):
        assert sorted(epoch.tolist()) == list(range(10))
    assert whole[:10].tolist() != whole[10:20].tolist()
    assert torch.equal(take(13, 9, 3), whole[13:40])


def recipe_of(model, n_images, world=1, **flags):
    args = SimpleNamespace(**{**dict(model=model, batch=None, accum=1, steps=None), **flags})
    return train.make_recipe(args, {}, make_config(model, None, 16, 16, 1000), n_images, world)


def test_every_size_has_a_recipe_and_far_b_on_imagenet_has_the_paper_s():
    for name in set(PRESETS) - {"far_l", "far_h"}:
        recipe = recipe_of(name, 50_000)
        assert 500 < recipe["steps"] < 150_000 and recipe["warmup"] < recipe["steps"]
        assert recipe["lr"] <= 1.5e-2
    recipe = recipe_of("far_b", 1_281_167, 8)
    assert recipe["effective"] == 1024 and recipe["lr"] == pytest.approx(4e-4)
    assert recipe["steps"] == 400 * 1_281_167 // 1024 and recipe["warmup"] == math.ceil(recipe["steps"] / 4)
    assert recipe_of("far_b", 1_281_167, 4, accum=2)["steps"] == recipe["steps"]
    rates = [train.learning_rate(step, recipe) for step in (0, recipe["warmup"] - 1, recipe["steps"] - 1)]
    assert rates == pytest.approx([4e-4 / recipe["warmup"], 4e-4, 4e-4])
    decaying = recipe_of("far_tiny", 50_000)
    assert train.learning_rate(decaying["steps"] - 1, decaying) < 1e-3 * decaying["lr"]


def test_the_average_of_the_weights_warms_up():
    model, ema = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    for step, decay in ((0, 0.1), (1, 2 / 11), (10 ** 6, 0.9999)):
        torch.nn.init.zeros_(ema.weight), torch.nn.init.ones_(model.weight)
        train.update_ema(ema, model, step, 0.9999)
        assert ema.weight.item() == pytest.approx(1 - decay, rel=1e-3)


def test_the_paper_s_sizes_decay_positions_and_mask_token_too_but_not_the_head():
    model = small("paper")
    optimizer = train.make_optimizer(model, dict(lr=1e-3, muon=False))
    decay = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        free = name.startswith("head.") or name.endswith("bias") or "norm" in name
        assert decay[p] == (0.0 if free else 0.02), name
    assert all(decay[p] for p in (model.encoder_pos, model.decoder_pos, model.head_pos, model.mask_token))


def test_muon_gives_every_direction_about_the_same_step():
    torch.manual_seed(0)
    g = torch.randn(3, 24, 40) * torch.logspace(0, -1.5, 40)     # some columns count thirty times more
    for matrices in (g, g.mT):
        u, _, v = torch.linalg.svd(matrices, full_matrices=False)
        found = orthogonalise(matrices)
        values = u.mT @ found @ v.mT                                    # in the basis of the singular vectors
        diagonal = values.diagonal(dim1=1, dim2=2)
        assert found.shape == matrices.shape and (values - torch.diag_embed(diagonal)).abs().max() < 1e-3
        assert 0.6 < diagonal.min() and diagonal.max() < 1.25


def test_muon_steps_the_matrices_of_blocks_and_adamw_the_rest():
    model, recipe = small(), dict(lr=1e-2, muon=True)
    optimizer = train.make_optimizer(model, recipe)
    groups = {group.get("matrices"): group["params"] for group in optimizer.param_groups}
    assert all(p.ndim == 2 for p in groups[True])
    assert sum(map(len, groups.values())) == len(list(model.parameters()))
    weight = model.encoder[0].mlp.fc1.weight
    before = weight.detach().clone()
    model(torch.randn(4, 4, 8, 8), Randomness(0, 0), torch.zeros(4, dtype=torch.long))[0].backward()
    weight.grad.normal_()
    optimizer.step()
    values = torch.linalg.svdvals(weight - before * (1 - 1e-2 * 0.02))
    assert values.max() < 2 * values.min(), "one step, alike in every direction"


def test_an_mlp_drops_after_its_activation_and_after_its_second_layer():
    mlp = MLP(SimpleNamespace(width=64, dropout=0.5)).train()
    for p, value in zip(mlp.parameters(), (0.0, 1.0, 1.0, 0.0)):
        torch.nn.init.constant_(p, value)
    y = mlp(torch.randn(200, 64))
    assert 0.45 < (y == 0).float().mean() < 0.55                           # else the second one is missing
    assert y[y != 0].unique().numel() > 20                          # else the first: all would be one number


# ---- the authors' file format

# the names in the authors' files, spelled out independently of extras/published.py
both = lambda stems: [f"{stem}.{end}" for stem in stems for end in ("weight", "bias")]
BLOCK = both(["norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"])
HEAD_BLOCK = both(["in_ln", "mlp.0", "mlp.2", "adaLN_modulation.1"])
HEAD = both(["time_embed.mlp.0", "time_embed.mlp.2", "cond_embed", "index_cond_embed", "input_proj",
             "final_layer.linear", "final_layer.adaLN_modulation.1"])
AUTHORS_NAMES = [
    "class_emb.weight", "fake_latent", "mask_token", "encoder_pos_embed_learned", "decoder_pos_embed_learned",
    "diffusion_pos_embed_learned",
    *both(["z_proj", "z_proj_ln", "encoder_norm", "decoder_embed", "decoder_norm"]),
    *(f"{stack}_blocks.{i}.{name}" for stack in ("encoder", "decoder") for i in range(2) for name in BLOCK),
    *(f"diffloss.net.res_blocks.{i}.{name}" for i in range(2) for name in HEAD_BLOCK),
    *(f"diffloss.net.{name}" for name in HEAD)]


def test_the_authors_file_format_loads_whole_and_other_names_are_refused(tmp_path):
    model, path = small("released", 4, 16, 5), str(tmp_path / "checkpoint-last.pth")
    state = model.state_dict()
    weights = {theirs: state[our_name(theirs)] for theirs in AUTHORS_NAMES}
    assert len(weights) == len(state) - 1, "all but band_std"
    content = dict(model={name: value + 1 for name, value in weights.items()}, model_ema=weights, epoch=3,
                   optimizer=dict(state={}), scaler={}, args=argparse.Namespace(model="far_tiny"))
    torch.save(content, path)
    cfg, ema, raw = load_published(path, n_head=4)
    assert dict(vars(cfg), dropout=0.0) == dict(vars(model.cfg), noise_levels=cfg.noise_levels)
    assert set(ema) == set(state) and all(torch.equal(ema[name], state[name]) for name in state)
    assert torch.equal(raw["null_cond"], state["null_cond"] + 1)
    weights["surprise"] = weights.pop("z_proj_ln.bias")
    torch.save(content, path)
    with pytest.raises(InputError, match="norm_in.bias(.|\n)*surprise"):
        load_published(path, n_head=4)
