"""Two processes on one data folder: what lies there is made by one of them, and both read the same."""
import os
import subprocess
import sys

import numpy as np

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
WORKER = """
import sys, time
import numpy as np, torch
import data, evaluate, text
folder, made = sys.argv[1], []
captions = type("Captioned", (), dict(name="x", captions=["a"] * 30, __len__=lambda self: 30))()

class Encoder:
    fingerprint, name = "e", "stub"
    def token_ids(self, captions):
        return [[1, 2]] * len(captions)
    def encode(self, captions):
        made.append("text")
        time.sleep(1)
        return torch.ones(len(captions), 2, 4), torch.ones(len(captions), 2, dtype=torch.bool)

real = evaluate.train_classifier
def slow(net, images, device):
    made.append("classifier")
    time.sleep(1)
    return real(net, images, device, steps=2)
evaluate.train_classifier = slow
copy = data.write_atomically
data.write_atomically = lambda path, write: made.append("copy") or time.sleep(1) or copy(path, write)
vectors, _ = text.CachedText(Encoder(), captions, folder, batch=30)([0, 29], [0.0, 0.0])
evaluate.classifier_features(data.load_data("shapes", 16), "cpu", folder)
pixels = data.load_data("imagenet64", None, folder).batch([0, 1])
print("RESULT", ",".join(made) or "none", int(vectors.sum()), int(pixels.sum()))
"""


def test_text_vectors_classifier_and_imagenet_copies_are_made_by_one_of_two_processes(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 3 * 16 * 16), np.uint8)
    np.savez(tmp_path / "train_data_batch_1.npz", data=pixels, labels=np.arange(1, 7))
    np.savez(tmp_path / "val_data.npz", data=pixels, labels=np.arange(1, 7))
    command = [sys.executable, "-c", WORKER, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1"}
    started = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    results = [process.communicate()[0].split("RESULT ")[1].split() for process in started]
    made = [name for names, *_ in results for name in names.split(",") if name != "none"]
    assert sorted(made) == ["classifier", "copy", "text"], results
    assert results[0][1:] == results[1][1:]
