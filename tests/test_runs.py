"""Training and sampling: stopped, moved, several processes, bad input. `-m slow`: killed twenty times."""
import errno
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from itertools import chain, product, repeat
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import DEFAULT, Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import sample
import train
from blocks import MLP
from common import InputError, epochs, hold_lock, load_checkpoint, prefetch, previous, save_checkpoint
from data import load_data
from evaluate import feature_statistics, frechet_distance
from extras.benchmark import training_flops
from far import FAR, PRESETS, Randomness, make_config, sampling_defaults
from test_far import each_layout, run_of, small
from tokenizer import default_config

HERE = Path(__file__).parents[1]
TWO = "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--"


def start(*command):
    """A Python command in a process of its own, with one thread; after TWO in two processes."""
    return subprocess.Popen([sys.executable, *map(str, command)], cwd=HERE, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"},
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process):
    said, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-2000:]
    return said


def weights_of(out):
    """The step of a run's checkpoint, and its weights with their average."""
    content = load_checkpoint(os.path.join(out, "far.pt"))
    return content["step"], {**content["model"], **{f"ema {k}": v for k, v in content["ema"].items()}}


def same_weights(a, b):
    (step, a), (other, b) = weights_of(a), weights_of(b)
    return step == other and a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def log_of(out):
    """The lines of metrics.jsonl without what depends on the clock."""
    lines = Path(out, "metrics.jsonl").read_text().splitlines()
    return [dict(json.loads(line), images_per_s=0) for line in lines]


def press_ctrl_c_before(step, patch):
    def learning_rate(now, recipe, original=train.learning_rate):
        if now == step:
            os.kill(os.getpid(), signal.SIGINT)
        return original(now, recipe)
    patch.setattr(train, "learning_rate", learning_rate)


def full_disk(content, file):
    file.write(b"half")
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("module, name, failing, code, reason", [
    (train, "log", Mock(side_effect=KeyboardInterrupt), 130, "interrupted"),
    (torch, "save", full_disk, 2, "the disk is full"),
    (train, "learning_rate", lambda *_: np.nan, 2, "not finite between steps 5 and 12: try --dtype fp32")])
def test_a_run_that_was_stopped_moved_and_then_failed_goes_on_and_ends_as_the_unbroken_one_bit_for_bit(
        module, name, failing, code, reason, tiny, tiny_run, cli, tmp_path, monkeypatch):
    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        press_ctrl_c_before(4, patch)
        assert cli(train.main, *tiny[1], "--steps", 12, "--out", tmp_path / "first")[0] == 0
    shutil.copytree(tiny[0], tmp_path / "there", copy_function=shutil.copyfile)     # the files have new times
    out = shutil.move(tmp_path / "first", tmp_path / "there" / "stopped")
    words = [str(word).replace(str(tiny[0]), str(tmp_path / "there")) for word in tiny[1]]
    go_on = partial(cli, train.main, *words, "--steps", 12, "--out", out)
    with monkeypatch.context() as patch:
        patch.setattr(module, name, failing)
        found, _, line = go_on()
    assert found == code and reason in line and not list(out.glob("*.tmp"))
    assert weights_of(out)[0] == 5 and not (out / "samples.png").exists()
    assert signal.getsignal(signal.SIGINT) is handler, "Ctrl-C is dead"
    with open(out / "metrics.jsonl", "a") as log:                             # as of a run that was killed
        log.write('{"step": 7, "loss": 0.0}\n{"step": 9, "lo')
    found, said, line = go_on()
    assert found == 0 and "continuing from step 5" in said and same_weights(out, tiny_run), line
    first, last = log_of(out)
    assert (first["step"], last["step"]) == (5, 12) and len(last["bands"]) == 3 and 0 < last["loss"] < 10
    assert {"samples.png", "bands.png", "reconstructions.png"} <= set(os.listdir(out))
    assert cli(sample.main, "--ckpt", out, "--n", 2, "--steps", 1)[0] == 0


def test_the_folder_of_another_run_or_of_a_running_one_is_refused(tiny, tiny_run, cli, tmp_path):
    own, again = Path(tiny_run, "tokenizer.pt"), [*tiny[1], "--steps", 12, "--out", tiny_run]
    before, content = own.read_bytes(), torch.load(own, weights_only=True)
    content["model"] = {name: value * 1.01 for name, value in content["model"].items()}
    torch.save(content, tmp_path / "other.pt")
    for flags, words in ((["--seed", 3], "another seed: choose another --out (0 there, 3 now)"),
                         (["--tokenizer", tmp_path / "other.pt"], "another tokenizer")):
        code, _, line = cli(train.main, *again, *flags)
        assert code == 2 and words in line
    with hold_lock(os.path.join(tiny_run, "lock"), wait=False):
        code, _, line = cli(train.main, *again)
    assert code == 2 and "another training" in line and own.read_bytes() == before


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
        assert max(500, recipe["warmup"]) < recipe["steps"] < 150_000
        assert recipe["lr"] <= (0.025 if model == "far_nano" else 0.015)
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


# ---- several processes

def test_two_processes_train_like_one_and_sample_what_one_samples(tiny, tmp_path):
    one, two, at = tmp_path / "one", tmp_path / "two", tiny[1].index("--tokenizer")
    words = [*tiny[1][:at], *tiny[1][at + 2:], "tokenizer=3", "--data-dir", tmp_path / "data", "--steps", 12]
    trainings = [start("train.py", *words, "--out", one),
                 start(*TWO, "train.py", *words, "--batch", 4, "--out", two)]
    said = [finish(training) for training in trainings]
    assert sum("dB on held-out images" in text for text in said) == 1, "both have trained a tokenizer"
    weights, others = weights_of(one)[1], weights_of(two)[1]
    # attention ignores the keys' bias: its gradient is rounding alone, and Adam makes large steps of that
    names = [name for name in weights if not name.endswith("qkv.bias")]
    assert max((weights[name] - others[name]).abs().max() for name in names) < 1e-5
    assert abs(log_of(one)[0]["loss"] - log_of(two)[0]["loss"]) < 1e-5
    sampling = "sample.py", "--ckpt", two, "--n", 300, "--steps", 2, "--npz"               # in files of 250
    finish(start(*sampling, "--out", one / "drawn"))
    finish(start(*TWO, *sampling, "--out", two / "drawn"))
    assert (one / "drawn.npz").read_bytes() == (two / "drawn.npz").read_bytes()
    assert not [path for path in tmp_path.rglob("*.*") if path.suffix[:6] in (".tmp", ".lock", ".parts")]


def test_gradients_are_shared_with_the_last_micro_batch_only():
    model, shared = small(), []
    model.register_forward_hook(lambda *_: shared.append(model.require_backward_grad_sync))
    train.train_step(run_of(model, world=2), [train.some_inputs(model.cfg, 2, "cpu")] * 3, 0)
    assert shared == [False, False, True]


def test_sigterm_ends_a_training_of_two_processes_with_a_save(tiny, tmp_path):
    process = start(*TWO, "train.py", *tiny[1], "--batch", 4, "--steps", 100_000, "--out", tmp_path)
    while process.poll() is None and not (tmp_path / "far.pt").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said, errors = process.communicate(timeout=60)
    assert "all is saved" in said and weights_of(tmp_path)[0] in range(150, 100_000, 50), errors[-2000:]


@pytest.mark.slow
def test_twenty_kills_change_nothing(tiny, tmp_path):
    """At any time, and in the middle of a save: weights and log are those of an unbroken run."""
    out, words = tmp_path / "killed", [*tiny[1], "dropout=0.1", "--steps", 12_000, "--out"]
    finish(start("train.py", *words, tmp_path / "whole"))                     # it is saved every 500 steps
    pictures, half = out / "samples.png", out / "far.pt.tmp"
    for kill in range(20):
        process, began = start("train.py", *words, out), time.time()
        if kill % 2:
            time.sleep(0.4 * kill)
        else:                            # pictures are drawn after a save: this is in the second from here
            while process.poll() is None and not (half.exists() and pictures.exists()
                                                  and pictures.stat().st_mtime > began):
                pass
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL, f"the run ended after {kill} kills"
    finish(start("train.py", *words, out))
    assert same_weights(tmp_path / "whole", out) and log_of(tmp_path / "whole") == log_of(out)


# ---- sampling

@each_layout
def test_the_default_sampler_of_a_short_training_draws_pictures_and_no_noise(layout):
    """In the data's range, and as near to the data as a few steps of the solver; latents are drawn shapes."""
    x = F.interpolate(load_data("shapes", 16).batch(torch.arange(400)).float(), 4, mode="area")
    x = (x - x.mean()) / x.std()                                                           # (400, 3, 4, 4)
    torch.manual_seed(0)
    model = FAR(make_config("far_nano", layout, 4, 3, 1, width=32, depth=1, head_width=32))
    model.measure_band_std(x)
    run, labels = run_of(model), torch.zeros(64, dtype=torch.long)
    for step in range(100):
        few = x[torch.randint(0, 400, (24,))]
        train.train_step(run, [(few, Randomness(0, step), labels[:24], None)], step)
    settings = dict(sampling_defaults(model.cfg), cfg=1.0)
    if layout == "released":            # has the authors' plain chain, for their numbers and their weights
        settings["hold"] = 5.0
    draw = lambda **changes: run.ema.eval().sample(labels, **{**settings, **changes})[-1]
    statistics = lambda y: feature_statistics(y.flatten(1).numpy())
    distance = lambda y: frechet_distance(*statistics(x), *statistics(y))
    y, solved = draw(), draw(sampler="dpmpp", steps=(10, 10), cool=False)
    assert (y.abs() > 2 * x.abs().max()).float().mean() < 0.02 and y.abs().mean() < 1.5 * x.abs().mean()
    assert distance(y) < 1.3 * distance(solved)
    if layout != "band":                                           # the noise that there is without `hold`
        assert distance(draw(hold=None)) > 1000 * distance(y)


def test_the_same_seed_gives_the_same_bytes_and_fewer_images_are_the_first_ones(tiny_run, cli, tmp_path):
    def draw(name, *flags):
        out = tmp_path / name
        assert cli(sample.main, "--ckpt", tiny_run, "--out", out, "--steps", 2, "--npz", *flags)[0] == 0
        return [Path(f"{out}{end}").read_bytes() for end in (".png", "_bands.png", ".npz")]

    first = draw("a", "--n", 6)
    assert first == draw("b", "--n", 6)
    images, labels = np.load(tmp_path / "a.npz").values()
    assert images.shape == (6, 16, 16, 3) and images.dtype == np.uint8 and labels.tolist() == [0, 1] * 3
    draw("few", "--n", 3, "--batch", 2)
    assert np.abs(np.load(tmp_path / "few.npz")["arr_0"].astype(int) - images[:3]).max() <= 1
    for change in (["--seed", 1], ["--no-ema"]):
        assert draw("other", "--n", 6, *change)[0] != first[0]
    assert draw("name", "--n", 2, "--classes", "red") == draw("number", "--n", 2, "--classes", "1")


def test_more_classes_than_a_picture_shows_are_all_in_the_npz(tiny_run, cli, monkeypatch, tmp_path):
    monkeypatch.setattr(sample, "COLUMNS", 1)
    for n, shown in ((3, 3), (9, 4)):
        flags = ["--ckpt", tiny_run, "--out", tmp_path / "all", "--steps", 1, "--npz", "--n", n]
        code, said, _ = cli(sample.main, *flags)
        assert code == 0 and f"{shown} of {n} images" in said
        assert np.load(tmp_path / "all.npz")["arr_1"].tolist() == [i % 2 for i in range(n)]
        assert Image.open(tmp_path / "all.png").size == (2 * 16, 2 * (17 * shown - 1))


def test_interrupted_sampling_goes_on(monkeypatch, tmp_path):
    numbers = torch.arange(600).remainder(251).byte()[:, None]
    generate = Mock(wraps=lambda run, part, seed, first, *rest: numbers[first:first + len(part)])
    generate.side_effect = [DEFAULT] * 11 + [KeyboardInterrupt]
    monkeypatch.setattr(sample, "generate", generate)
    sample_all = partial(sample.sample_in_parts, None, [0] * 600, str(tmp_path), batch=50)
    with pytest.raises(KeyboardInterrupt):
        sample_all()
    generate.reset_mock(side_effect=True)
    assert torch.equal(sample_all(), numbers)
    assert [call.args[3] for call in generate.call_args_list] == [500, 550]


# ---- what a user can get wrong: one line and exit code 2, a case for every kind of mistake

@pytest.mark.parametrize("script, flags, words", [
    (train, "--nope", "--nope"), (train, "--batch 0", "--batch"), (train, "--data cifar11", "cifar10"),
    (train, "--set wdth=3", "NAME one of"), (train, "--set width=abc", "width=abc"),
    (train, "--set depth=0", "depth"), (train, "--set lr=0", "lr"), (train, "--size 18", "16 px"),
    (train, "--device cuda:77", "cuda:77"), (train, "--tokenizer nothing.pt", "No such file"),
    (train, f"--out {__file__}/run", "test_runs.py"), (train, "--text", "caption"),
    (train, "--model far_t2i", "--text"), (sample, "--sampler euler", "dpmpp"), (sample, "--cfg nan", "nan"),
    (sample, "--prompt cat", "--classes"), (sample, "--classes green", "green"),
    (sample, "--steps 10,1001", "--steps"), (sample, "--ckpt nowhere", "nowhere could not be read"),
    (sample, f"--ckpt {__file__}", "not a checkpoint"), (sample, "--bands 1,2", "--bands"),
    (sample, "--bands 3,4", "--layout paper")])
def test_bad_input_is_one_line_and_exit_code_2(script, flags, words, tiny, tiny_run, cli, tmp_path):
    good = dict(train=[*tiny[1], "--out", tmp_path / "run"], sample=["--ckpt", tiny_run])[script.__name__]
    code, _, line = cli(script.main, *good, *flags.split())
    assert code == 2 and line.startswith("error: ") and words in line and not list(tmp_path.glob("run/far*"))


def test_a_damaged_or_dangerous_checkpoint_is_refused_and_never_takes_the_place_of_the_one_before(tmp_path):
    path, content = tmp_path / "far.pt", dict(kind="far", run={}, step=1, weights=torch.arange(1000.0))
    code = type("Code", (), dict(__reduce__=lambda self: (os.mkdir, (str(tmp_path / "made"),))))()
    for _ in range(2):
        save_checkpoint(path, content)
    whole = path.read_bytes()
    changed = whole.replace(content["weights"].numpy().tobytes()[400:440], bytes(40))
    for damaged in (whole[:len(whole) // 2], b"", os.urandom(500), pickle.dumps(code, 2), changed):
        path.write_bytes(damaged)
        with pytest.raises(InputError):
            load_checkpoint(path, "far")
        assert train.resume_point(path, {})["step"] == 1 and not path.exists()
        save_checkpoint(path, dict(content, step=2))
        assert load_checkpoint(previous(path))["step"] == 1
    for foreign, words in ((dict(kind="far", x=code), "code"), (dict(kind="tokenizer"), "not a far check")):
        torch.save(foreign, path)
        with pytest.raises(InputError, match=words):
            load_checkpoint(path, "far")
    assert not (tmp_path / "made").exists()


def test_dying_between_any_two_file_operations_of_a_save_leaves_a_whole_checkpoint(tmp_path, monkeypatch):
    path, step = tmp_path / "far.pt", 0
    save = lambda step: save_checkpoint(path, dict(kind="far", run={}, step=step))
    save(step)
    for at in sorted([*range(6)] * 2):                          # two saves in a row, each of which dies there
        what_happens = chain([DEFAULT] * at, repeat(KeyboardInterrupt))
        with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
            for name in ("replace", "fsync"):
                patch.setattr(os, name, Mock(wraps=getattr(os, name), side_effect=what_happens))
            save(step + 1)
        found = train.resume_point(path, {})["step"]
        assert found in (step, step + 1)
        step = found
    assert step > 0 and not list(tmp_path.glob("*.damaged"))


def test_prefetched_items_come_in_order_and_with_their_errors():
    found = []
    with pytest.raises(ZeroDivisionError):
        found.extend(prefetch(lambda i: 1 / (7 - i), range(10)))
    assert found == [1 / (7 - i) for i in range(7)] and list(prefetch(abs, [])) == []


def test_every_module_imports_and_locks_without_fcntl_and_resource_as_on_windows(tmp_path):
    modules = [path.stem for path in HERE.glob("*.py") if "test_" not in path.name]
    modules += [f"extras.{path.stem}" for path in HERE.glob("extras/*.py")]
    finish(start("-c", "import sys\nsys.modules['fcntl'] = sys.modules['resource'] = None\n"
                 f"import {', '.join(modules)}\npath = sys.argv[1]\n"
                 "with common.only_one(path): open(path, 'w').close()\n"
                 "assert common.hold_lock(path + '.lock', False)\n", tmp_path / "made"))
