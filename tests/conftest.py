"""What the tests share: a command line called in this process, and a run that is trained once for all."""
import gc
import signal

import numpy as np
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
        handler = signal.getsignal(signal.SIGTERM)
        try:
            command_line(lambda: main([str(word) for word in argv]))
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        finally:
            signal.signal(signal.SIGTERM, handler)
            gc.collect()                    # a run's lock goes with the frame of a main that was interrupted
        said, errors = capsys.readouterr()
        return code, said, errors.strip().split("\n")[-1]
    return run


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with pictures of two classes, and the arguments that train the smallest model on them."""
    root, rng = tmp_path_factory.mktemp("tiny"), np.random.default_rng(0)
    for channel, name in ((0, "red"), (2, "blue")):
        (root / "pictures" / name).mkdir(parents=True)
        for i in range(12):
            picture = np.zeros((20, 20, 3), np.uint8)
            picture[..., channel] = rng.integers(100, 255)
            Image.fromarray(picture).save(root / "pictures" / name / f"{i}.png")
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
