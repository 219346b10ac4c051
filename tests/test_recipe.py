"""How FAR is trained: order of the images, rates, optimizers, averages; and the authors' file format."""
import argparse
from itertools import product
from types import SimpleNamespace

import pytest
import torch

import sample
import train
from blocks import MLP
from common import InputError, epochs
from extras import export, published
from extras.benchmark import training_flops
from far import PRESETS
from test_far import small
from tokenizer import AutoencoderKL, TokenizerConfig, default_config


def test_an_epoch_shows_every_image_once_and_a_stream_starts_anywhere():
    streams = epochs(0, 4, 10, seed=0), epochs(8, 2, 10, seed=0)
    first, later = (torch.cat([next(stream) for _ in range(6)]) for stream in streams)
    assert sorted(first[:10].tolist()) == sorted(first[10:20].tolist()) == list(range(10))
    assert first[:10].tolist() != first[10:20].tolist() and torch.equal(first[8:20], later)


def test_every_size_has_a_recipe_far_b_on_imagenet_has_the_paper_s_and_the_average_warms_up():
    def recipe_of(model, n_images=50_000, world=1, accum="1", size=256):
        args = train.get_args(["--model", model, "--accum", accum])
        data = type("Data", (), dict(n_class=1000, __len__=lambda self: n_images))()
        return train.configure(args, data, default_config(size, 3), None, world)

    for size, model in product((32, 256), PRESETS):
        cfg, recipe = recipe_of(model, size=size)
        assert max(500, recipe["warmup"]) < recipe["steps"] < 150_000 and recipe["lr"] <= 0.015
        assert (train.learning_rate(recipe["steps"] - 1, recipe) < 1e-3 * recipe["lr"]) == recipe["decay"]
        if model == "far_b":                                   # an hour of a GPU
            seconds = training_flops(cfg, 1) * recipe["effective"] * recipe["steps"] / (0.4 * 400e12)
            assert seconds == pytest.approx(3600, rel=0.25)
    (_, recipe), steps = recipe_of("far_b", 1_281_167, world=8), 400 * 1_281_167 // 1024
    assert recipe == recipe_of("far_b", 1_281_167, world=4, accum="2")[1]
    assert (recipe["effective"], recipe["steps"], recipe["warmup"]) == (1024, steps, -(-steps // 4))
    rates = [train.learning_rate(step, recipe) for step in (0, recipe["warmup"] - 1, steps - 1)]
    assert rates == pytest.approx([4e-4 / recipe["warmup"], 4e-4, 4e-4])
    for step, decay in ((0, 0.1), (1, 2 / 11), (10 ** 6, 0.9999)):
        model, ema = (torch.nn.ParameterList([torch.full((1,), value)]) for value in (1.0, 0.0))
        train.update_ema(ema, model, step, 0.9999)
        assert ema[0].item() == pytest.approx(1 - decay, rel=1e-3)


def test_adamw_decays_positions_and_mask_token_too_and_muon_steps_alike_in_every_direction():
    model = small("paper")
    optimizer = train.make_optimizer(model, dict(lr=1e-3, muon=False))
    decay = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        free = name.startswith("head.") or name.endswith("bias") or "norm" in name
        assert decay[p] == (0.0 if free else 0.02), name
    optimizer = train.make_optimizer(model, dict(lr=1e-2, muon=True))
    matrices, others = (group["params"] for group in optimizer.param_groups)
    assert all(p.ndim == 2 for p in matrices) and {*matrices, *others} == set(decay)
    for weight in (model.encoder[0].mlp.fc1.weight, model.encoder[0].mlp.fc2.weight):        # tall, and wide
        before = weight.detach().clone()
        weight.grad = torch.randn_like(weight) * torch.logspace(0, -1.5, weight.shape[1])   # unlike columns
        u, _, v = torch.linalg.svd(weight.grad, full_matrices=False)
        optimizer.step()
        sizes = u.mT @ (before * (1 - 1e-2 * 0.02) - weight).detach() @ v.mT      # by singular vectors
        assert (sizes - sizes.diag().diag()).abs().max() < 1e-3 * sizes.max() < 2.1e-3 * sizes.diag().min()


def test_an_mlp_drops_after_its_activation_and_after_its_second_layer():
    y = MLP(SimpleNamespace(width=64, dropout=0.5)).train()(torch.ones(200, 64))
    assert 0.45 < (y == 0).float().mean() < 0.55 and len(y[:, 0].unique()) > 20


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
    model, theirs, run, given = small("released", 4, 16, 5), *(str(tmp_path / name) for name in "abc")
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
