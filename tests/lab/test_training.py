"""Which plans learn without warm-up, and a training run against one written out with torch alone."""

import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from llama_mini.errors import RequestError
from llama_mini.lab import race
from llama_mini.lab.measurement import random_llama
from llama_mini.lab.training import Race, sample_text


@pytest.fixture(scope="module")
def twelve_layers() -> Race:
    return race(["pre", "post", "none"], steps=100, seeds=2)


@pytest.mark.slow
def test_pre_learns_and_post_stays_near_the_unigram_loss(twelve_layers: Race) -> None:
    final, unigram = twelve_layers.final, twelve_layers.unigram
    assert final["pre"].final < unigram - 0.6
    assert final["post"].final == pytest.approx(unigram, abs=0.1)
    assert final["pre"].spread < 0.1
    assert twelve_layers.loss["pre"].shape == (2, 100)


@pytest.mark.slow
def test_none_diverges_and_is_data(twelve_layers: Race) -> None:
    assert not np.isfinite(twelve_layers.loss["none"]).any()
    assert np.isnan(twelve_layers.final["none"].final)
    assert [row.diverged for row in twelve_layers.table()] == [0, 0, 2]
    assert json.loads(twelve_layers.to_json())["loss"]["none"][0][0] is None
    assert "none" in repr(twelve_layers)


def test_a_training_that_diverges_later_keeps_what_came_before() -> None:
    found = race("none", steps=30, seeds=1, depth=2, dim=16, learning_rate=100.0).loss["none"][0]
    assert np.isfinite(found[0])
    assert not np.isfinite(found[-1])
    finite = np.isfinite(found)
    assert not finite[finite.argmin() :].any()


@pytest.mark.parametrize(("warmup", "rates"), [(0, [1e-2] * 4), (1, [1e-2] * 4), (3, [1e-2 / 3, 2e-2 / 3, 1e-2, 1e-2])])
def test_curve_equals_a_training_written_out(warmup: int, rates: list[float]) -> None:
    settings = {"seeds": 2, "depth": 2, "dim": 16, "learning_rate": 1e-2, "warmup_steps": warmup}
    found = race("peri", steps=4, **settings).loss["peri"][1]
    data = torch.frombuffer(bytearray(sample_text().encode()), dtype=torch.uint8).long()
    model = random_llama("peri", 2, 16, 256, seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0)
    generator = torch.Generator().manual_seed(1)
    for step, rate in enumerate(rates):
        optimizer.param_groups[0]["lr"] = rate
        starts = torch.randint(0, len(data) - 32, (8, 1), generator=generator).flatten().tolist()
        rows = torch.stack([data[start : start + 33] for start in starts])
        loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        assert found[step] == pytest.approx(loss.item(), rel=1e-4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_repeatable_and_seeds_differ() -> None:
    first, second = (race(["pre", "deep"], steps=3, seeds=2, depth=1, dim=8) for _ in range(2))
    for plan in ("pre", "deep"):
        np.testing.assert_array_equal(first.loss[plan], second.loss[plan])
    assert (first.loss["pre"][0] != first.loss["pre"][1]).all()


def test_final_is_of_the_last_20_steps() -> None:
    end = np.linspace(0.5, 1.5, 20)  # of mean 1
    curve = np.concatenate([np.full((2, 30), 9.0), np.array([[1.0], [3.0]]) * end], axis=1)
    final = Race({"pre": curve}, 3.0, 1e-3).final["pre"]
    assert (final.final, final.spread) == (pytest.approx(2.0), pytest.approx(math.sqrt(2)))
    alone = Race({"pre": curve[:1]}, 3.0, 1e-3)
    assert alone.final["pre"].spread is None
    assert alone.table().to_csv().splitlines()[1].split(",")[3] == ""
    assert "nan" not in str(alone.table())


def test_text_is_ascii_english_of_20_kb() -> None:
    text = sample_text()
    assert text.isascii()
    assert 19_000 < len(text) < 21_000
    assert text.startswith("Alice was beginning to get very tired")
    shares = [n / len(text) for n in Counter(text).values()]
    assert race("pre", steps=1, seeds=1, depth=1, dim=8).unigram == pytest.approx(-sum(p * math.log(p) for p in shares))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps must be a whole number from 1"),
        ({"seeds": True}, "seeds must be a whole number from 1"),
        ({"depth": 0}, "depth must be a whole number from 1"),
        ({"dim": 60}, "dim must be a multiple of 8"),
        ({"learning_rate": 0.0}, "learning_rate must be a finite number above 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be a finite number above 0"),
        ({"learning_rate": "1"}, "learning_rate must be a finite number above 0"),
        ({"warmup_steps": -1}, "warmup_steps must be a whole number from 0 to 150, not -1"),
        ({"warmup_steps": 151}, "warmup_steps must be a whole number from 0 to 150, not 151"),
    ],
)
def test_nonsense_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        race("pre", **settings)
