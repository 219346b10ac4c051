"""The ablations' script: every row is a model that exists, budgets are equal, tables say what the numbers say."""
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import ablate
from count import count_flops
from mar import make_model

FASHION = SimpleNamespace(size=32, channels=1, n_class=10)
ROWS = [(train_args, sampling) for _, rows in ablate.TABLES.values() for _, train_args, sampling in rows]
ROWS += [point for points in ablate.ORDERS.values() for point in points]


def test_every_row_is_a_model_that_trains_and_samples_as_the_row_says():
    for train_args, sampling in {str(row): row for row in ROWS}.values():
        model = make_model(ablate.config(train_args, "far_nano", FASHION)).eval()
        settings = {**ablate.sampling_defaults(model.cfg), **ablate.FAST,
                    **{key: value for key, value in sampling.items() if value is not None}, "steps": (1, 1)}
        model.cfg.guidance = settings.pop("guidance", model.cfg.guidance)
        assert torch.isfinite(model.sample(torch.tensor([3]), **settings)[-1]).all(), (train_args, sampling)


def test_every_row_has_the_same_training_compute():
    config = lambda train_args: ablate.config(train_args, "far_nano", FASHION)
    one = sum(count_flops(config([]))[:2])
    assert ablate.same_compute([], "far_nano", FASHION, 1000) == 1000
    for train_args, _ in ROWS:
        steps = ablate.same_compute(train_args, "far_nano", FASHION, 1000)
        assert steps * sum(count_flops(config(train_args))[:2]) == pytest.approx(1000 * one, rel=0.01)


def test_a_difference_counts_only_beyond_the_spread_of_the_seeds():
    row = lambda *fds: [dict(frechet_distance=fd, recall=0.5, accuracy=0.9, training_rate=100, sampling_seconds=2.0,
                             steps=10, n=1000) for fd in fds]
    table = ablate.write_table("what", [("first", row(5, 6)), ("near", row(6, 6.2)), ("far", row(9, 9)), ("low", row(2, 3))])
    assert [line.split("|")[6].strip() for line in table[2:]] == ["", "within the spread", "worse", "better"]
    assert table[2].split("|")[4].strip() == "5.50" and table[2].split("|")[-2].strip() == "2.0"


def test_charts_are_written(tmp_path):
    pytest.importorskip("matplotlib", reason="charts need matplotlib")
    results = [dict(frechet_distance=fd, sampling_seconds=2.0, n=10) for fd in (3.0, 4.0)]
    ablate.draw_bars(tmp_path / "bars.png", "title", [("a", results), ("b", results)])
    ablate.draw_orders(tmp_path / "orders.png", {"frequency": [(1, results), (2, results)], "random": [(1, results)]})
    assert all(Image.open(tmp_path / name).size[0] > 300 for name in ("bars.png", "orders.png"))
