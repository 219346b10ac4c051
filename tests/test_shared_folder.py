"""Two processes on one data folder: what lies there is made by one of them, and both read the same."""
import os
import subprocess
import sys

import numpy as np

WORKER = """
import sys, time
import torch
import data, evaluate, text
folder, made = sys.argv[1], []
captions = type("Captioned", (), dict(name="x", captions=[("a",)] * 30, __len__=lambda self: 30))()
class Encoder:
    fingerprint, name = "e", "stub"
    def token_ids(self, captions):
        return [[1, 2]] * len(captions)
    def encode(self, captions):
        return torch.ones(len(captions), 2, 4), torch.ones(len(captions), 2, dtype=torch.bool)
def slowly(name, function, **more):
    def call(*args):
        made.append(name)
        time.sleep(1)
        return function(*args, **more)
    return call
Encoder.encode = slowly("text", Encoder.encode)
evaluate.train_classifier = slowly("classifier", evaluate.train_classifier, steps=2)
data.write_atomically = slowly("copy", data.write_atomically)
vectors, _ = text.text_source(Encoder(), captions, folder, batch=30)([0, 29], [0.0, 0.0])
evaluate.classifier_features(data.load_data("shapes", 16), "cpu", folder)
pixels = data.load_data("imagenet64", None, folder).batch([0, 1])
print("RESULT", ",".join(made) or "none", int(vectors.sum()), int(pixels.sum()))
"""


def test_text_vectors_classifier_and_imagenet_copies_are_made_by_one_of_two_processes(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 3 * 16 * 16), np.uint8)
    (tmp_path / "imagenet64").mkdir()
    np.savez(tmp_path / "imagenet64" / "train_data_batch_1.npz", data=pixels, labels=np.arange(1, 7))
    command, here = [sys.executable, "-c", WORKER, str(tmp_path)], os.path.dirname(os.path.dirname(__file__))
    started = [subprocess.Popen(command, cwd=here, env={**os.environ, "OMP_NUM_THREADS": "1"},
                                stdout=subprocess.PIPE, text=True) for _ in range(2)]
    results = [process.communicate()[0].split("RESULT ")[1].split() for process in started]
    made = [name for names, *_ in results for name in names.split(",") if name != "none"]
    assert sorted(made) == ["classifier", "copy", "text"] and results[0][1:] == results[1][1:], results
