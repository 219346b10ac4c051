"""
Long runs and bad files: several processes, kills, signals, and every file that the programs read, damaged.

    python -m pytest -q test_runs.py           # about a minute on 2 cores
    python -m pytest -m slow test_runs.py      # kills a training 20 times, a few minutes
"""
import gc
import glob
import io
import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image

import data
import evaluate
import tokenizer
import train
from common import InputError, load_checkpoint, prefetch, previous, save_checkpoint
from data import load_data, load_image, read_list
from far import Randomness
from published import load_published_far
from sample import load_run, read_chunk, sample_in_chunks
from test_data import cifar_content, fashion_files, imagenet_batch
from test_far import HERE, cli, mini, mini_run, published, small, weights_of  # noqa: F401 (fixtures)
from tokenizer import AutoencoderKL, TokenizerConfig, cache_latents, load_tokenizer, save_tokenizer


def start(script, *arguments, processes=1):
    """A script in processes of its own, one thread each."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "--"] if processes > 1 else []
    return subprocess.Popen([sys.executable, *launch, os.path.join(HERE, script), *map(str, arguments)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def finish(script, *arguments, processes=1):
    process = start(script, *arguments, processes=processes)
    said, errors = process.communicate()
    assert process.returncode == 0, errors[-2000:]
    return said


# ---------------------------------------------------------------------------------------------------------------------
# Several processes

def test_a_training_shows_its_scores_and_a_resumed_one_the_same(mini, cli, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="the chart of a training needs matplotlib")
    root, arguments = mini
    monkeypatch.setattr(evaluate.train_classifier, "__defaults__", (20, 16))
    monkeypatch.setattr(evaluate.Judge.__init__, "__defaults__", (40,))
    monkeypatch.setitem(train.RECIPES, "far_nano", dict(train.RECIPES["far_nano"], warmup=1))
    flags = [*arguments, "--steps", 4, "--eval-every", 2, "--save-every", 2]
    timing = ("images_per_s", "waiting", "memory_gib", "sampling_seconds")
    read = lambda out: [{key: value for key, value in json.loads(line).items() if key not in timing}
                        for line in open(out / "metrics.jsonl")]
    assert cli("train", *flags, "--out", tmp_path / "one")[0] == 0
    scores = [line for line in read(tmp_path / "one") if "frechet_distance" in line]
    assert [line["step"] for line in scores] == [2, 4] and all(0 <= line["accuracy"] <= 1 for line in scores)
    assert Image.open(tmp_path / "one" / "progress.png").size[0] > 500
    # stopped in the second evaluation: the same command repeats it, and no line is there twice
    judge, calls = evaluate.Judge.__call__, []

    def interrupted(self, run):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return judge(self, run)
    with monkeypatch.context() as patch:
        patch.setattr(evaluate.Judge, "__call__", interrupted)
        assert cli("train", *flags, "--out", tmp_path / "two")[0] != 0
    gc.collect()                                        # in this process, the lock goes with the interrupted call's frame
    assert cli("train", *flags, "--out", tmp_path / "two")[0] == 0
    assert read(tmp_path / "two") == read(tmp_path / "one")


def test_a_checkpoint_moves_between_one_process_ddp_and_fsdp(mini, cli, tmp_path, monkeypatch):
    root, arguments = mini
    common_flags = ["--set", "dropout=0", "--steps", 8]
    one = [*arguments, *common_flags, "--out", root / "moves"]
    halves = [*arguments, *common_flags, "--batch", 4, "--out"]
    assert cli("train", *arguments, *common_flags, "--out", root / "unbroken")[0] == 0
    _, unbroken = weights_of(root / "unbroken")

    def crash(step, recipe, original=train.learning_rate):
        if step == 3:
            raise KeyboardInterrupt
        return original(step, recipe)

    with monkeypatch.context() as patch:
        patch.setattr(train, "learning_rate", crash)
        assert cli("train", *one, "--save-every", 2)[0] == 130
    # one process to step 2, FSDP to step 6, DDP to step 7, one process to step 8
    said = finish("train.py", *halves, root / "moves", "--fsdp", "--checkpoint-activations", "--save-every", 2, processes=2)
    assert "continuing from step 2" in said
    sharded = weights_of(root / "moves")[1]
    assert all(type(value) is torch.Tensor for value in sharded.values())
    assert load_run(str(root / "moves")).step == 8, "it does not open on one process"
    assert (root / "moves" / "samples.png").exists()
    os.replace(root / "moves" / "far.prev.pt", root / "moves" / "far.pt")
    assert "continuing from step 6" in finish("train.py", *halves, root / "moves", "--save-every", 1, processes=2)
    parallel = weights_of(root / "moves")[1]
    os.replace(root / "moves" / "far.prev.pt", root / "moves" / "far.pt")
    code, said, _ = cli("train", *one)
    assert code == 0 and "continuing from step 7" in said
    for name, weights in dict(fsdp=sharded, ddp=parallel, one=weights_of(root / "moves")[1]).items():
        assert max((weights[key] - unbroken[key]).abs().max() for key in unbroken) < 1e-5, name
    lines = [[json.loads(line)["loss"] for line in open(root / out / "metrics.jsonl")] for out in ("unbroken", "moves")]
    assert np.allclose(*lines, atol=1e-5), "the loss of the broken interval is not that of the whole one"


def test_fsdp_without_torchrun_is_refused(mini, cli, tmp_path):
    code, _, line = cli("train", *mini[1], "--fsdp", "--out", tmp_path)
    assert code == 2 and "torchrun" in line


def test_checkpointed_activations_give_the_same_gradients_with_dropout():
    model = small(dropout=0.5).train()
    gradients = []
    for model.checkpoint_activations in (False, True):
        torch.manual_seed(1)
        model(torch.randn(4, 4, 8, 8), Randomness(0, 0), torch.zeros(4, dtype=torch.long))[0].backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*gradients))


def test_processes_share_the_latents_and_leave_what_one_leaves(mini, tmp_path, monkeypatch):
    """Two threads stand for two processes."""
    pictures = load_data(str(mini[0] / "pictures"), 16, str(mini[0] / "data"))
    network = AutoencoderKL(tokenizer.default_config(16, 3, 4)).eval()
    alone = cache_latents(network, pictures, str(tmp_path / "one"), batch=4, flush_every=1)
    here, meet, found = threading.local(), threading.Barrier(2), {}
    monkeypatch.setattr(tokenizer, "rank_and_world", lambda: (here.rank, 2))
    monkeypatch.setattr(tokenizer, "barrier", lambda: meet.wait(30))

    def work(rank):
        here.rank = rank
        found[rank] = cache_latents(network, pictures, str(tmp_path / "two"), batch=4, flush_every=1)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert (found[0] == alone).all() and (found[1] == alone).all() and len(os.listdir(tmp_path / "two")) == 1


def test_two_processes_sample_what_one_samples(mini_run, tmp_path, cli):
    flags = ("--ckpt", mini_run, "--n", 260, "--steps", 2, "--npz", "--out")
    assert cli("sample", *flags, tmp_path / "one")[0] == 0
    finish("sample.py", *flags, tmp_path / "two", processes=2)
    one, two = ((tmp_path / f"{name}.npz").read_bytes() for name in ("one", "two"))
    assert one == two
    assert sorted(os.listdir(tmp_path)) == sorted(f"{name}{end}" for name in ("one", "two") for end in (".png", "_bands.png", ".npz"))


def test_interrupted_sampling_goes_on_and_damaged_chunks_are_made_again(mini_run, tmp_path, monkeypatch):
    import sample
    run = load_run(mini_run)
    labels, folder, calls = torch.arange(600) % 2, str(tmp_path), []

    def generate(run, part, first, **settings):
        calls.append(first)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return (torch.arange(first, first + len(part)) % 251).to(torch.uint8)[:, None, None, None].expand(-1, 3, 16, 16)

    monkeypatch.setattr(sample, "generate", generate)
    with pytest.raises(KeyboardInterrupt):
        sample_in_chunks(run, labels, folder)
    path = os.path.join(folder, "000250.npy")
    with open(path, "r+b") as file:
        file.truncate(1000)
    images, made = sample_in_chunks(run, labels, folder)
    assert calls == [0, 250, 500, 250, 500] and made == 350
    assert (images[:, 0, 0, 0] == (torch.arange(600) % 251).to(torch.uint8)).all()


# ---------------------------------------------------------------------------------------------------------------------
# Interruptions

def same_log(a, b):
    """Whether two metrics.jsonl agree in all but times."""
    read = lambda path: [{k: v for k, v in json.loads(line).items() if k not in ("images_per_s", "waiting", "memory_gib")} for line in open(path)]
    return read(a) == read(b)


@pytest.mark.slow
def test_twenty_kills_change_nothing(mini, tmp_path):
    """Killed at random moments, from the start of the process to the middle of a save: weights and log are those of an unbroken run."""
    pictures, rng, killed, moments = mini[0] / "pictures", random.Random(0), 0, []
    flags = ["--data", pictures, "--size", 16, "--stride", 4, "--model", "far_nano", "--batch", 8, "--dtype", "fp32", "--device", "cpu",
             "--tokenizer-steps", 20, "--steps", 330, "--save-every", 7, "--set", "dropout=0.1"]
    finish("train.py", *flags, "--data-dir", tmp_path / "data_a", "--out", tmp_path / "a")
    path = tmp_path / "b" / "far.pt"
    stamp = lambda: os.stat(path).st_mtime_ns if path.exists() else 0
    while killed < 20:
        process = start("train.py", *flags, "--data-dir", tmp_path / "data_b", "--out", tmp_path / "b")
        before, kind = stamp(), ("any time", "writing", "between saves", "renaming")[killed % 4]
        deadline = time.time() + (rng.uniform(0.5, 8) if kind == "any time" else 60)
        while time.time() < deadline and process.poll() is None:
            if kind == "writing" and stamp() != before and glob.glob(f"{path}.new.tmp"):
                break
            if kind == "renaming" and stamp() != before and (os.path.exists(f"{path}.new") or os.path.exists(f"{path}.old")):
                break
            if kind == "between saves" and stamp() != before:
                time.sleep(rng.uniform(0, 0.6))
                break
        process.kill()
        process.communicate()
        if process.returncode != -signal.SIGKILL:
            break
        killed += 1
        moments.append((kind, weights_of(tmp_path / "b")[0] if path.exists() else 0))
    assert killed == 20, f"the run ended after {killed} kills: {moments}"
    print("\nkilled (when, step of the checkpoint then):", *moments)
    finish("train.py", *flags, "--data-dir", tmp_path / "data_b", "--out", tmp_path / "b")
    (step, ours), (_, unbroken) = weights_of(tmp_path / "b"), weights_of(tmp_path / "a")
    assert step == 330 and all(torch.equal(ours[name], unbroken[name]) for name in unbroken)
    assert same_log(tmp_path / "a" / "metrics.jsonl", tmp_path / "b" / "metrics.jsonl")


@pytest.mark.parametrize("name,processes", [("SIGINT", 1), ("SIGTERM", 2)])
def test_a_signal_ends_training_with_a_save(name, processes, mini, tmp_path):
    process = start("train.py", *mini[1], "--steps", 100_000, "--save-every", 1000, "--out", tmp_path, processes=processes)
    metrics = tmp_path / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.05)
    process.send_signal(getattr(signal, name))
    said, errors = process.communicate(timeout=60)
    assert "it is saved" in said and "Traceback" not in errors.replace("torch/distributed", "") or processes > 1, errors[-2000:]
    assert processes > 1 or process.returncode == 0
    step = load_checkpoint(str(tmp_path / "far.pt"), "far")["step"]
    assert 50 <= step < 1000 and f"stopped after step {step}" in said


class Died(BaseException):
    """Stands for the end of the process."""


def test_dying_between_any_two_file_operations_of_a_save_leaves_a_whole_checkpoint(tmp_path, monkeypatch):
    path = str(tmp_path / "far.pt")
    save_checkpoint(path, dict(step=0))
    saved = 0
    for at in range(12):
        for _ in range(2):                         # two saves in a row, each of which dies there
            left = [at]

            def dying(original):
                def call(*args):
                    left[0] -= 1
                    if left[0] < 0:
                        raise Died
                    return original(*args)
                return call

            with monkeypatch.context() as patch:
                for name in ("replace", "link", "remove", "fsync"):
                    patch.setattr(os, name, dying(getattr(os, name)))
                try:
                    save_checkpoint(path, dict(step=saved + 1))
                except Died:
                    pass
            found = load_checkpoint(path)["step"]
            assert found in (saved, saved + 1)
            saved = found
    assert saved > 0 and load_checkpoint(previous(path))["step"] in (saved - 1, saved)


def test_a_damaged_checkpoint_never_takes_the_place_of_the_good_one(tmp_path):
    path = str(tmp_path / "far.pt")
    content = dict(kind="far", run={}, dtype="fp32", config={}, model={}, ema={}, optimizer={}, data={})
    save_checkpoint(path, dict(content, step=1))
    save_checkpoint(path, dict(content, step=2))
    with open(path, "r+b") as file:
        file.truncate(100)
    assert train.resume_point(path, {})["step"] == 1
    save_checkpoint(path, dict(content, step=3))
    assert load_checkpoint(previous(path))["step"] == 1 and train.resume_point(path, {})["step"] == 3


def test_prefetched_batches_come_in_order_and_with_their_errors():
    def fetch(i):
        if i == 7:
            raise InputError("bad picture")
        return i

    found = []
    with pytest.raises(InputError, match="bad picture"):
        for i in prefetch(fetch, range(10)):
            found.append(i)
    assert found == list(range(7)) and list(prefetch(fetch, [])) == []


def test_the_memory_of_caching_and_reading_latents_does_not_grow_with_the_data(tmp_path):
    class Grey:
        name, size, channels, flip = "grey", 16, 3, True

        def __init__(self, n):
            self.n, self.fingerprint = n, str(n)

        def __len__(self):
            return self.n

        def batch(self, indices):
            return torch.full((len(indices), 3, 16, 16), 127, dtype=torch.uint8)

    network = AutoencoderKL(TokenizerConfig(image_size=16, patch=4, width=8, mult=(1,), latent_dim=64)).eval()
    peaks = []
    for n in (256, 4096):
        tracemalloc.start()
        latents = cache_latents(network, Grey(n), str(tmp_path), batch=32, flush_every=2)
        train.draw_latents(latents, torch.tensor([0, n - 1, n // 2]), 1.0, Randomness(0, 0), "cpu")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert isinstance(latents, np.memmap) and latents.mode == "r" and latents.nbytes == 4096 * 2 * 2 * 64 * 16 * 2
    assert peaks[1] < peaks[0] + latents.nbytes / 20, peaks


def test_a_full_disk_while_caching_is_one_line(mini, tmp_path, monkeypatch):
    pictures = load_data(str(mini[0] / "pictures"), 16, str(mini[0] / "data"))
    network = AutoencoderKL(tokenizer.default_config(16, 3, 4)).eval()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space left"):
        cache_latents(network, pictures, str(tmp_path))


def test_a_tokenizer_that_diverges_stops_with_its_step_and_images(mini, tmp_path):
    pictures = load_data(str(mini[0] / "pictures"), 16, str(mini[0] / "data"))
    with pytest.raises(InputError, match=r"not finite at step \d+ \(images \[\d+, .*--dtype fp32"):
        tokenizer.train_tokenizer(pictures, tokenizer.default_config(16, 3, 4), str(tmp_path / "t.pt"), steps=50, batch=4, lr=1e30)
    network = AutoencoderKL(tokenizer.default_config(16, 3, 4)).eval()
    torch.nn.init.constant_(network.quant_conv.weight, 1e30)
    with pytest.raises(InputError, match="non-finite latents for images 0 to"):
        cache_latents(network, pictures, str(tmp_path))


# ---------------------------------------------------------------------------------------------------------------------
# Bad files: never a traceback, a hang, or a wrong result without a word

def mutations(content, rng, n):
    """n damaged versions of a file's bytes: cut, overwritten, shuffled, repeated, or something else entirely."""
    def noise(at, length):
        return content[:at] + rng.randbytes(length) + content[at + length:]

    for i in range(n):
        at = rng.randrange(len(content))
        yield (content[:at], noise(at, 1), noise(at, min(64, len(content) - at)), noise(0, min(16, len(content))),
               content[at:] + content[:at], content + rng.randbytes(50), rng.randbytes(200), b"", b"[" * 5000, content[:50] * 40)[i % 10]


def png(**options):
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (24, 20, 3), np.uint8)
    Image.fromarray(pixels).save(file, **options)
    return file.getvalue()


def read_far(path):
    run = load_run(path, tokenizer=os.path.join(os.path.dirname(path), "tok.pt"))
    return run.model.state_dict()


def read_metrics(path):
    before = [line for line in open(path, "rb").read().split(b"\n")]
    train.Metrics(path, 100).file.close()
    lines = open(path, encoding="utf-8").read().splitlines()
    assert all(json.loads(line)["step"] <= 100 for line in lines) and len(lines) <= len(before)
    return None


def read_latent_images(path):
    images, labels = evaluate.to_images(evaluate.read_arrays(path), path)
    return dict(images=images, labels=torch.from_numpy(labels) if labels is not None else torch.zeros(1))


def prepare(kind, folder):
    """A good file of a kind: its path, its reader, and whether its format can tell that bytes were changed."""
    images = lambda name: lambda _: load_data(name, data_dir=str(folder)).batch(range(4))
    if kind in ("png", "jpeg", "gif", "webp", "bmp", "tiff"):
        path = folder / f"a.{kind}"
        path.write_bytes(png(format=kind))
        return path, lambda p: torch.from_numpy(load_image(p, 16)), False
    if kind == "idx":
        fashion_files(folder / "fashion_mnist", zipped=False)
        return folder / "fashion_mnist" / "train-images-idx3-ubyte", images("fashion_mnist"), False
    if kind == "idx.gz":
        fashion_files(folder / "fashion_mnist")
        return folder / "fashion_mnist" / "train-images-idx3-ubyte.gz", images("fashion_mnist"), True
    if kind == "imagenet npz":
        imagenet_batch(folder / "train_data_batch_1.npz")
        return folder / "train_data_batch_1.npz", images("imagenet64"), True
    if kind == "cifar":
        for name, content in cifar_content().items():
            (folder / name).write_bytes(content.tobytes())
        return folder / "data_batch_2.bin", images("cifar10"), False
    if kind == "list":
        path = folder / "list.jsonl"
        path.write_text("".join(json.dumps(dict(file_name=f"{i}.png", text=f"picture {i}")) + "\n" for i in range(9)))
        return path, lambda p: read_list(p) and None, False
    if kind == "samples npz":
        path = folder / "made.npz"
        evaluate.write_samples(path, torch.randint(256, (5, 3, 8, 8), dtype=torch.uint8), np.arange(5))
        return path, read_latent_images, True
    if kind == "chunk":
        path = folder / "000000.npy"
        np.save(path, np.zeros((4, 3, 8, 8), np.uint8))
        return path, lambda p: len(read_chunk(p, dict(channels=3, size=8))) and None, False
    if kind == "metrics":
        path = folder / "metrics.jsonl"
        path.write_text("".join(json.dumps(dict(step=50 * i, loss=1.0, bands=[1.0, None])) + "\n" for i in range(5)))
        return path, read_metrics, False
    cfg = TokenizerConfig(image_size=16, patch=4, width=8, mult=(1,))
    save_tokenizer(str(folder / "tok.pt"), AutoencoderKL(cfg))
    if kind == "tokenizer":
        return folder / "tok.pt", lambda p: load_tokenizer(p).state_dict(), True
    if kind == "far":
        model = small(size=4)
        content = dict(kind="far", step=3, run={}, dtype="fp32", config=vars(model.cfg), model=model.state_dict(), ema=model.state_dict(),
                       optimizer={}, data=dict(name="x", source="shapes", size=16, channels=3, class_names=["a"] * 10, data_dir="data"))
        save_checkpoint(str(folder / "far.pt"), content)
        return folder / "far.pt", read_far, True
    if kind == "published":
        return published(folder)[0], lambda p: load_published_far(p, n_head=4).state_dict(), True


KINDS = ("png", "jpeg", "gif", "webp", "bmp", "tiff", "idx", "idx.gz", "imagenet npz", "cifar", "list", "samples npz", "chunk", "metrics",
         "tokenizer", "far", "published")


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_one_line_errors_or_still_right(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CIFAR_ROWS", 20)
    path, read, checked = prepare(kind, tmp_path)
    path, rng, refused = str(path), random.Random(kind), 0
    good, content = read(path), open(path, "rb").read()

    def hang(*_):
        raise AssertionError("it hangs")

    signal.signal(signal.SIGALRM, hang)
    for number, damaged in enumerate(mutations(content, rng, 20)):
        for copy in glob.glob(os.path.join(tmp_path, "*batch_1.npy")):   # ImageNet's pixels, copied out of the zip
            os.remove(copy)
        with open(path, "wb") as file:
            file.write(damaged)
        signal.alarm(20)
        try:
            found = read(path)
        except InputError as error:
            refused += 1
            assert "\n" not in str(error).strip(), number
            continue
        finally:
            signal.alarm(0)
        if checked:                                # what was read in spite of the damage is what was written
            found, right = (x if isinstance(x, dict) else dict(x=x) for x in (found, good))
            assert all(torch.equal(found[name], right[name]) for name in right), (number, kind)
        elif torch.is_tensor(found):
            assert found.shape == good.shape and found.dtype == good.dtype
    assert refused >= 8 or kind in ("metrics", "chunk"), refused


@pytest.mark.parametrize("kind", ["far", "tokenizer", "published"])
def test_checkpoints_of_the_wrong_form_are_one_line_errors(kind, tmp_path):
    """Keys missing, of wrong types, unknown fields, weights of other shapes or not finite: in sampling and in resuming."""
    path, read, _ = prepare(kind, tmp_path)
    path = str(path)
    content = torch.load(path, weights_only=kind != "published")
    wrong = [None, 7, "text", [1, 2], {}, {"a": 1}, torch.zeros(3), math.nan]
    used = dict(far=("kind", "config", "ema", "data", "step"), tokenizer=("kind", "config", "model", "step", "steps", "latent_scale"),
                published=("model_ema",))[kind]
    cases = [{k: v for k, v in content.items() if k != key} for key in used]
    cases += [{**content, key: value} for key in used for value in wrong if not (type(value) is int and key in ("step", "steps", "latent_scale"))]
    weights = dict(far="ema", tokenizer="model", published="model_ema")[kind]
    for name in list(content[weights])[::25]:
        value = content[weights][name]
        for bad in (value[None], value.flatten()[:1].expand(2, 3), value * math.nan, None, "text", 3):
            cases.append({**content, weights: {**content[weights], name: bad}})
    if kind != "published":
        for field, value in content["config"].items():
            cases += [{**content, "config": {**content["config"], field: bad}} for bad in (None, "text", 10 ** 9)]
        cases.append({**content, "config": {**content["config"], "surprise": 1}})
    cases += [None, 3, [], "text", torch.zeros(2)]
    good = read(path)
    for case in cases:
        torch.save(case, path)
        try:
            found = read(path)
        except InputError as error:
            assert "\n" not in str(error).strip()
            continue
        # some fields do not change the network; what was read must still be right
        assert isinstance(case, dict) and all(torch.equal(found[name], good[name]) for name in good), case.get("config")
