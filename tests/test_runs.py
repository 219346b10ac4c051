"""
Runs: resumed, interrupted, in several processes, moved, on a full disk; and whatever a user can get wrong.

    python -m pytest -q tests/test_runs.py
    python -m pytest -q -m slow tests/test_runs.py      # kills a training twenty times, a few minutes
"""
import contextlib
import errno
import gc
import glob
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from copy import deepcopy
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import sample
import train
from common import InputError, hold_lock, load_checkpoint, prefetch, previous, save_checkpoint
from data import load_data
from far import FAR, LAYOUTS, Randomness, make_config, sampling_defaults

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def start(*command, processes=1):
    """A Python command in processes of its own, one thread each."""
    if processes > 1:
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes, "--"]
        command = [*launch, *command]
    return subprocess.Popen([sys.executable, *map(str, command)], cwd=HERE, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": HERE})


def finish(process):
    said, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-2000:]
    return said


def run_of(model, steps, world=1):
    """What train.train_step looks at, outside of train.main."""
    recipe = dict(lr=3e-3, warmup=10, steps=steps, decay=True, muon=False, ema=0.95, clip=3.0)
    return SimpleNamespace(model=model, ema=deepcopy(model), optimizer=train.make_optimizer(model, recipe),
                           recipe=recipe, device=torch.device("cpu"), dtype="fp32", world=world)


def weights_of(out):
    content = load_checkpoint(os.path.join(out, "far.pt"))
    return content["step"], {**content["model"], **{f"ema {k}": v for k, v in content["ema"].items()}}


def same_weights(a, b):
    (step, a), (other, b) = weights_of(a), weights_of(b)
    return step == other and all(torch.equal(a[name], b[name]) for name in a)


def log_of(out):
    """The lines of metrics.jsonl without what depends on the clock."""
    with open(os.path.join(out, "metrics.jsonl"), encoding="utf-8") as file:
        return [dict(json.loads(line), images_per_s=0, waiting=0) for line in file]


def interrupt(patch, step, what):
    """what() happens in the training before its step number `step`."""
    def learning_rate(now, recipe, original=train.learning_rate):
        if now == step:
            what()
        return original(now, recipe)
    patch.setattr(train, "learning_rate", learning_rate)


@pytest.fixture(scope="session")
def stopped_run(tiny):
    """A run that Ctrl-C stopped after five of twelve steps."""
    out = tiny[0] / "stopped"
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, 4, lambda: os.kill(os.getpid(), signal.SIGINT))
        train.main([str(word) for word in [*tiny[1], "--steps", 12, "--out", out]])
    gc.collect()                                                     # with the frame of main its lock goes
    return out


@pytest.fixture
def stopped(tiny, stopped_run, tmp_path):
    """A copy of the stopped run, and the arguments that go on with it."""
    shutil.copytree(stopped_run, tmp_path / "run")
    assert weights_of(stopped_run)[0] == 5 and not os.path.exists(stopped_run / "samples.png")
    return tmp_path / "run", [*tiny[1], "--steps", 12, "--out", tmp_path / "run"]


# ---- what a run leaves, and going on with it

def test_training_leaves_everything_a_user_needs(tiny_run):
    pictures = {"samples.png", "bands.png", "reconstructions.png"}
    assert {"far.pt", "tokenizer.pt", "metrics.jsonl"} | pictures <= set(os.listdir(tiny_run))
    line, = log_of(tiny_run)
    assert line["step"] == 12 and len(line["bands"]) == 3 and 0 < line["loss"] < 10
    assert Image.open(os.path.join(tiny_run, "samples.png")).size[0] >= 32


def test_a_stopped_run_goes_on_and_ends_as_the_unbroken_one_bit_for_bit(stopped, tiny_run, cli):
    out, arguments = stopped
    code, said, _ = cli(train.main, *arguments)
    assert code == 0 and "continuing from step 5" in said and same_weights(out, tiny_run)
    assert [line["step"] for line in log_of(out)] == [5, 12]


def test_a_crash_costs_what_came_after_the_last_save_and_nothing_else(stopped, tiny_run, cli, monkeypatch):
    def crash():
        raise KeyboardInterrupt

    out, arguments = stopped
    with monkeypatch.context() as patch:
        interrupt(patch, 9, crash)
        assert cli(train.main, *arguments)[0] == 130 and weights_of(out)[0] == 5
    with open(out / "metrics.jsonl", "a") as log:
        log.write('{"step": 7, "loss": 0.0}\n{"step": 9, "lo')                                  # half a line
    assert cli(train.main, *arguments)[0] == 0 and same_weights(out, tiny_run)
    assert [line["step"] for line in log_of(out)] == [5, 12]


def test_run_and_data_may_be_moved_and_copied(tiny, stopped, tiny_run, cli, tmp_path):
    shutil.move(stopped[0], tmp_path / "there")
    for name in ("pictures", "data"):
        shutil.copytree(tiny[0] / name, tmp_path / name, copy_function=shutil.copyfile)       # new file times
    moved = {tiny[0] / "pictures": tmp_path / "pictures", tiny[0] / "data": tmp_path / "data",
             tiny[0] / "tokenizer.pt": tmp_path / "there" / "tokenizer.pt"}
    arguments = [moved.get(word, word) for word in tiny[1]]
    code, said, line = cli(train.main, *arguments, "--steps", 12, "--out", tmp_path / "there")
    assert code == 0 and "continuing from step 5" in said, line
    assert same_weights(tmp_path / "there", tiny_run)
    assert cli(sample.main, "--ckpt", tmp_path / "there", "--n", 2, "--steps", 1)[0] == 0


def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_never_takes_its_place(stopped, tiny_run, cli):
    out, arguments = stopped
    path = str(out / "far.pt")
    shutil.copy(path, previous(path))
    with open(path, "r+b") as file:
        file.truncate(os.path.getsize(path) // 2)
    code, said, _ = cli(train.main, *arguments)
    assert code == 0 and "WARNING" in said and "continuing from step 5" in said
    assert same_weights(out, tiny_run) and load_checkpoint(previous(path))["step"] == 5
    for name in (path, previous(path)):
        with open(name, "r+b") as file:
            file.truncate(100)
    assert train.resume_point(path, {}) is None and os.path.exists(f"{path}.damaged")


def test_the_folder_of_another_run_or_of_a_running_one_is_refused(tiny, tiny_run, cli, tmp_path):
    arguments, own = [*tiny[1], "--out", tiny_run], os.path.join(tiny_run, "tokenizer.pt")
    with open(own, "rb") as file:
        before = file.read()
    code, _, line = cli(train.main, *arguments, "--steps", 12, "--seed", 3)
    assert code == 2 and "other settings" in line and "seed (0 there, 3 now)" in line
    with hold_lock(os.path.join(tiny_run, "lock"), wait=False):
        code, _, line = cli(train.main, *arguments, "--steps", 12)
        assert code == 2 and "another training" in line
    content = torch.load(tiny[0] / "tokenizer.pt", weights_only=True)
    content["model"] = {name: value * 1.01 for name, value in content["model"].items()}
    torch.save(content, tmp_path / "other.pt")
    code, _, line = cli(train.main, *arguments, "--steps", 12, "--tokenizer", tmp_path / "other.pt")
    assert code == 2 and "another tokenizer" in line
    with open(own, "rb") as file:
        assert file.read() == before


def test_a_loss_that_is_not_finite_stops_with_advice_before_it_is_saved(tiny, cli, monkeypatch, tmp_path):
    batches = train.Batches.__call__
    monkeypatch.setattr(train.Batches, "__call__", lambda self, start: (
        (x * float("nan"), *rest) for x, *rest in batches(self, start)))
    code, _, line = cli(train.main, *tiny[1], "--steps", 6, "--out", tmp_path)
    assert code == 2 and "not finite between steps 0 and 6" in line and "--dtype fp32" in line
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "Ctrl-C is dead"
    assert not os.path.exists(tmp_path / "far.pt")


def test_a_full_disk_is_one_line_and_what_was_saved_is_kept(stopped, cli, monkeypatch):
    def full(content, file):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    out, arguments = stopped
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        code, _, line = cli(train.main, *arguments)
    assert code == 2 and line.startswith("error: ") and "the disk is full" in line
    assert weights_of(out)[0] == 5 and not glob.glob(f"{out}/*.tmp")


# ---- several processes

def test_two_processes_train_like_one_and_sample_what_one_samples(tiny, tmp_path, cli):
    both, out = ["--steps", 20, "--out"], tmp_path / "two"
    script = tmp_path / "both.py"
    script.write_text("import sys, torch.distributed as dist, train, sample\nat = sys.argv.index('--then')\n"
                      "train.main(sys.argv[1:at])\ndist.barrier()\nsample.main(sys.argv[at + 1:])\n")
    draw = ["--n", 300, "--steps", 2, "--npz", "--seed", 5]
    two = start(script, *tiny[1], "--batch", 4, *both, out, "--then", "--ckpt", out, *draw, processes=2)
    assert cli(train.main, *tiny[1], *both, tmp_path / "one")[0] == 0
    finish(two)
    (_, one), (_, two) = weights_of(tmp_path / "one"), weights_of(tmp_path / "two")
    # attention ignores the keys' bias: its gradient is rounding alone, and Adam makes large steps of that
    names = [name for name in one if not name.endswith("qkv.bias")]
    assert max((one[name] - two[name]).abs().max() for name in names) < 1e-5
    losses = [log_of(tmp_path / out)[0]["loss"] for out in ("one", "two")]
    assert abs(losses[0] - losses[1]) < 1e-5
    shutil.copytree(tmp_path / "two", tmp_path / "again", ignore=shutil.ignore_patterns("sample*"))
    assert cli(sample.main, "--ckpt", tmp_path / "again", *draw)[0] == 0
    assert (tmp_path / "again" / "sample.npz").read_bytes() == (tmp_path / "two" / "sample.npz").read_bytes()
    assert not glob.glob(f"{tmp_path}/*/sample.parts*")


def test_gradients_are_shared_with_the_last_micro_batch_only():
    cfg = make_config("far_nano", "band", 4, 4, 10, width=16, n_head=2, depth=1)
    model, shared = FAR(cfg), []
    run = run_of(model, steps=9, world=2)
    model.register_forward_hook(lambda *_: shared.append(model.require_backward_grad_sync))
    train.train_step(run, [train.some_inputs(cfg, 2, "cpu")] * 3, 0)
    assert shared == [False, False, True]


def test_sigterm_ends_a_training_of_two_processes_with_a_save(tiny, tmp_path):
    process = start("train.py", *tiny[1], "--batch", 4, "--steps", 100_000, "--out", tmp_path, processes=2)
    metrics = tmp_path / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said, errors = process.communicate(timeout=60)
    assert "all is saved" in said, errors[-2000:]
    assert weights_of(tmp_path)[0] % 50 == 0


def test_two_trainings_at_once_on_one_data_folder_make_everything_once(tiny, tmp_path):
    at = tiny[1].index("--tokenizer")
    arguments = [*tiny[1][:at], *tiny[1][at + 2:], "tokenizer=3", "--data-dir", tmp_path / "data",
                 "--steps", 3]
    trainings = [start("train.py", *arguments, "--out", tmp_path / out) for out in ("a", "b")]
    said = [finish(training) for training in trainings]
    assert sum("dB on held-out images" in text for text in said) == 1
    assert same_weights(tmp_path / "a", tmp_path / "b")
    assert not glob.glob(f"{tmp_path}/data/**/*.tmp", recursive=True)


@pytest.mark.slow
def test_twenty_kills_change_nothing(tiny, tmp_path):
    """From the start of the process to the middle of a save: weights and log are those of an unbroken run."""
    rng, killed, moments, kills = random.Random(0), 0, [], 20
    arguments = [*tiny[1], "dropout=0.1", "--steps", 600 * kills]              # it is saved every 500 steps
    finish(start("train.py", *arguments, "--out", tmp_path / "a"))
    path = tmp_path / "b" / "far.pt"

    def stamp():
        try:
            return os.stat(path).st_mtime_ns
        except FileNotFoundError:                                         # not yet, or just being replaced
            return 0

    while killed < kills:
        process = start("train.py", *arguments, "--out", tmp_path / "b")
        before, kind = stamp(), ("any time", "writing", "between saves", "renaming")[killed % 4]
        deadline = time.time() + (rng.uniform(0.5, 8) if kind == "any time" else 120)
        while time.time() < deadline and process.poll() is None:
            new = stamp() != before
            if kind == "writing" and new and glob.glob(f"{path}.new.tmp"):
                break
            if kind == "renaming" and new and os.path.exists(f"{path}.new"):
                break
            if kind == "between saves" and new:
                time.sleep(rng.uniform(0, 1))
                break
        process.kill()
        process.communicate()
        if process.returncode != -signal.SIGKILL:
            break
        killed += 1
        moments.append((kind, weights_of(tmp_path / "b")[0] if path.exists() else 0))
    assert killed == kills, f"the run ended after {killed} kills: {moments}"
    print("\nkilled (when, step of the checkpoint then):", *moments)
    finish(start("train.py", *arguments, "--out", tmp_path / "b"))
    assert same_weights(tmp_path / "a", tmp_path / "b") and log_of(tmp_path / "a") == log_of(tmp_path / "b")


# ---- sampling

def frechet(a, b):
    """Fréchet distance of two sets of vectors, (n, d) each."""
    a_cov, b_cov = torch.cov(a.T).double(), torch.cov(b.T).double()
    cross = torch.linalg.eigvals(a_cov @ b_cov).real.clamp(min=0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + a_cov.trace() + b_cov.trace() - 2 * cross).item()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_default_sampler_of_a_short_training_draws_pictures_and_no_noise(layout):
    """In the data's range, and as near to the data as a few steps of the solver; latents are drawn shapes."""
    pixels = load_data("shapes", 16).batch(torch.arange(400)).float()
    x = F.interpolate(pixels, 4, mode="area")
    x = (x - x.mean()) / x.std()                                                           # (400, 3, 4, 4)
    torch.manual_seed(0)
    model = FAR(make_config("far_nano", layout, 4, 3, 1, width=32, depth=1, head_width=32))
    model.measure_band_std(x)
    run, labels = run_of(model, steps=100), torch.zeros(64, dtype=torch.long)
    for step in range(100):
        batch = x[torch.randint(0, 400, (24,))], Randomness(0, step), labels[:24], None
        train.train_step(run, [batch], step)
    settings = sampling_defaults(model.cfg)
    if layout == "released":            # has the authors' plain chain, for their numbers and their weights
        settings["hold"] = 5.0
    draw = lambda **changes: run.ema.eval().sample(labels, **{**settings, "cfg": 1.0, **changes})[-1]
    y, few = draw(), draw(sampler="dpmpp", steps=(10, 10), cool=False)
    assert (y.abs() > 2 * x.abs().max()).float().mean() < 0.02 and y.abs().mean() < 1.5 * x.abs().mean()
    distance = lambda y: frechet(x.flatten(1), y.flatten(1))
    assert distance(y) < 1.3 * distance(few)
    if layout != "band":                                           # the noise that there is without `hold`
        assert distance(draw(hold=None)) > 1000 * distance(y)


def test_the_same_seed_gives_the_same_bytes_and_fewer_images_are_the_first_ones(tiny_run, cli, tmp_path):
    def draw(name, *more):
        code, _, line = cli(sample.main, "--ckpt", tiny_run, "--out", tmp_path / name, "--steps", 2, *more)
        assert code == 0, line
        return (tmp_path / f"{name}.png").read_bytes(), (tmp_path / f"{name}_bands.png").read_bytes()

    first = draw("a", "--n", 6, "--npz")
    assert first == draw("b", "--n", 6, "--npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    images = np.load(tmp_path / "a.npz")
    assert images["arr_0"].shape == (6, 16, 16, 3) and images["arr_0"].dtype == np.uint8
    assert images["arr_1"].tolist() == [0, 1] * 3
    draw("c", "--n", 3, "--npz", "--batch", 2)
    assert np.abs(np.load(tmp_path / "c.npz")["arr_0"].astype(int) - images["arr_0"][:3]).max() <= 1
    for change in (["--seed", 1], ["--no-ema"]):
        assert draw("d", "--n", 6, *change)[0] != first[0]
    assert draw("g", "--n", 2, "--classes", "red") == draw("h", "--n", 2, "--classes", "1")


def test_interrupted_sampling_goes_on(tiny_run, monkeypatch, tmp_path):
    run, calls, shown = sample.load_run(tiny_run), [], [i % 2 for i in range(600)]

    def generate(run, part, seed, first, *rest, **settings):
        calls.append(first)
        if len(calls) == 12:
            raise KeyboardInterrupt
        numbers = torch.arange(first, first + len(part)).remainder(251).byte()
        return numbers[:, None, None, None].expand(-1, 3, 16, 16)

    monkeypatch.setattr(sample, "generate", generate)
    with pytest.raises(KeyboardInterrupt):
        sample.sample_in_parts(run, shown, str(tmp_path), batch=50)
    calls.clear()
    images = sample.sample_in_parts(run, shown, str(tmp_path), batch=50)
    assert calls == [500, 550] and (images[:, 0, 0, 0] == torch.arange(600).remainder(251).byte()).all()


# ---- what a user can get wrong: one line and exit code 2

FILE = os.path.join(HERE, "far.py")
BAD_TRAIN = {                                                           # flags: a word of the one line
    "--model far_q": "far_nano", "--data cifar11": "cifar10", "--nope": "--nope", "--set wdth=3": "width",
    "--set width=abc": "not a valid int", "--set n_class=3": "NAME one of", "--set bands=1,2,3": "end at",
    "--set noise_levels=0": "noise_levels", "--set times_mean=nan": "not a valid float", "--set lr=0": "lr",
    "--size 18": "16 px", "--batch 0": "--batch", "--seed -1": "--seed", "--device cuda:77": "cuda:77",
    "--tokenizer nothing.pt": "no file", f"--tokenizer {FILE}": "not a checkpoint",
    f"--out {FILE}/run": "far.py", f"--data-dir {FILE}/data": "far.py", "--text": "caption",
    "--model far_t2i": "--text",
}
BAD_SAMPLE = {
    "--classes green": "green", "--prompt cat": "--classes", "--bands 2,4": "--layout paper",
    "--sampler euler": "dpmpp", "--steps 10,1001": "--steps", "--cfg nan": "--cfg",
    "--ckpt nowhere": "no run", f"--ckpt {FILE}": "not a checkpoint", f"--out {FILE}/sample": "far.py",
}


@pytest.mark.parametrize("flags", BAD_TRAIN)
def test_bad_input_to_train_is_one_line_and_exit_code_2(flags, tiny, cli, tmp_path):
    code, _, line = cli(train.main, *tiny[1], "--out", tmp_path / "run", *flags.split())
    assert code == 2 and line.startswith("error: ") and BAD_TRAIN[flags] in line
    assert not os.path.exists(tmp_path / "run" / "far.pt")


@pytest.mark.parametrize("flags", BAD_SAMPLE)
def test_bad_input_to_sample_is_one_line_and_exit_code_2(flags, tiny_run, cli):
    code, _, line = cli(sample.main, "--ckpt", tiny_run, *flags.split())
    assert code == 2 and line.startswith("error: ") and BAD_SAMPLE[flags] in line


class Code:
    def __reduce__(self):
        return os.system, ("touch /tmp/far_was_here",)


def test_a_damaged_truncated_foreign_or_dangerous_checkpoint_is_refused(tmp_path):
    good, bad = str(tmp_path / "good.pt"), str(tmp_path / "bad.pt")
    save_checkpoint(good, dict(kind="far", weights=torch.arange(1000.0)))
    assert load_checkpoint(good, "far")["weights"][7] == 7
    with open(good, "rb") as file:
        content = file.read()
    middle = content.index(torch.arange(1000.0).numpy().tobytes()[400:440])
    for damaged in (content[:len(content) // 2], b"", os.urandom(500), b"hello\n", pickle.dumps(Code(), 2),
                    content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1:]):
        with open(bad, "wb") as file:
            file.write(damaged)
        with pytest.raises(InputError):
            load_checkpoint(bad, "far")
    for content, word in ((dict(kind="far", x=Code()), "code"), (dict(kind="tokenizer"), "not a far check")):
        torch.save(content, bad)
        with pytest.raises(InputError, match=word):
            load_checkpoint(bad, "far")
    assert not os.path.exists("/tmp/far_was_here")


class Died(BaseException):
    """Stands for the end of the process."""


def test_dying_between_any_two_file_operations_of_a_save_leaves_a_whole_checkpoint(tmp_path, monkeypatch):
    path, saved, content = str(tmp_path / "far.pt"), 0, dict(kind="far", run={})
    save_checkpoint(path, dict(content, step=0))
    for at in [n for n in range(10) for _ in range(2)]:         # two saves in a row, each of which dies there
        left = [at]

        def dying(*args, original):
            left[0] -= 1
            if left[0] < 0:
                raise Died
            return original(*args)

        with monkeypatch.context() as patch, contextlib.suppress(Died):
            for name in ("replace", "remove", "fsync"):
                patch.setattr(os, name, partial(dying, original=getattr(os, name)))
            save_checkpoint(path, dict(content, step=saved + 1))
        found = train.resume_point(path, {})["step"]
        assert found in (saved, saved + 1)
        saved = found
    assert saved > 0 and not glob.glob(f"{tmp_path}/*.damaged")


def test_prefetched_items_come_in_order_and_with_their_errors():
    found = []
    with pytest.raises(ZeroDivisionError):
        for value in prefetch(lambda i: 1 / (7 - i), range(10)):
            found.append(value)
    assert found == [1 / (7 - i) for i in range(7)] and list(prefetch(abs, [])) == []


def test_every_module_imports_and_locks_where_there_is_neither_fcntl_nor_resource(tmp_path):
    """As on Windows."""
    modules = [os.path.basename(path)[:-3] for path in glob.glob(f"{HERE}/*.py") if "test_" not in path]
    modules += [f"extras.{os.path.basename(path)[:-3]}" for path in glob.glob(f"{HERE}/extras/*.py")]
    program = ("import sys, importlib\nsys.modules['fcntl'] = sys.modules['resource'] = None\n"
               "for name in sys.argv[2:]: importlib.import_module(name)\n"
               "from common import only_one, hold_lock\nimport os\npath = sys.argv[1]\n"
               "with only_one(path):\n    open(path, 'w').close()\nassert hold_lock(path + '.lock', False)\n")
    finish(start("-c", program, tmp_path / "made", *modules))
