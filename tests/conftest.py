"""What the tests share: a command line called in this process, two at once, a run trained once for all."""
import gc
import time
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock

import pytest
import torch
from PIL import Image

from common import command_line
from data import load_data
from tokenizer import TokenizerConfig, train_tokenizer
from train import main

torch.set_num_threads(1)       # as in the subprocesses: other numbers of threads round sums differently


@pytest.fixture
def cli(capsys):
    """main(argv) of a script as from the command line: (exit code, stdout, last line of stderr)."""
    def run(main, *argv):
        code = 0
        try:
            command_line(lambda: main([str(word) for word in argv]))
        except SystemExit as stop:
            code = stop.code or 0
        gc.collect()                        # a run's lock goes with the frame of a main that was interrupted
        said, errors = capsys.readouterr()
        return code, said, errors.strip().split("\n")[-1]
    return run


def two_at_once(work):
    """What two calls of work() at once return: locks are held by open files, so threads have their own."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda _: work(), range(2)))


def slowly(function):
    """The function, so slow that the other one of two comes in between; it knows how often it was called."""
    return Mock(side_effect=lambda *args, **more: time.sleep(0.1) or function(*args, **more))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with pictures of two classes, and the arguments that train the smallest model on them."""
    root = tmp_path_factory.mktemp("tiny")
    for name in ("red", "blue"):
        (root / "pictures" / name).mkdir(parents=True)
        for i in range(12):
            red, blue = (100 + 13 * i, 0) if name == "red" else (0, 100 + 13 * i)
            Image.new("RGB", (20, 20), (red, 0, blue)).save(root / "pictures" / name / f"{i}.png")
    data = load_data(str(root / "pictures"), 16, str(root / "data"))
    train_tokenizer(data, TokenizerConfig(3, 16, 4, 8, 16), str(root / "tokenizer.pt"), steps=10)
    return root, ["--data", root / "pictures", "--size", 16, "--data-dir", root / "data",
                  "--tokenizer", root / "tokenizer.pt", "--model", "far_nano", "--batch", 8,
                  "--dtype", "fp32", "--device", "cpu", "--set", "width=32", "depth=1", "head_width=32",
                  "head_depth=1", "n_head=2", "mask=linear"]


@pytest.fixture(scope="session")
def tiny_run(tiny):
    """The folder of a finished run of twelve steps."""
    main([str(word) for word in [*tiny[1], "--steps", 12, "--out", tiny[0] / "run"]])
    return str(tiny[0] / "run")
