"""The texts of heal: what they are, that they do not meet, and what the model writes."""

from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch

from llama_mini import Tokenizer
from llama_mini.lab.healing_texts import fingerprint, held_out_texts, rows_of, samples, training_text
from llama_mini.lab.training import sample_text
from tests.tiny_models import tiny_model


def test_half_a_megabyte_to_train_on_and_eight_other_rows(tiny_dir: Path) -> None:
    tokenizer = Tokenizer.from_pretrained(tiny_dir)
    text, held = training_text(tokenizer), held_out_texts(tokenizer, 256)
    assert 300_000 < len(text) < 1_000_000  # a byte is a token here
    assert [len(row) for row in held] == [256] * 8
    novel = tokenizer.decode(torch.cat(held[:4]).tolist())
    assert sample_text().startswith(novel)
    documentation = tokenizer.decode(torch.cat(held[4:]).tolist())
    assert "mean" in documentation
    trained_on = "\n".join(topics.values())
    assert text.tolist() == tokenizer.encode(trained_on)
    assert not [line for line in (novel + documentation).splitlines() if len(line) > 40 and line in trained_on]


def test_rows_hold_whole_pieces_in_order() -> None:
    rows = rows_of([torch.arange(7), torch.arange(10, 12), torch.arange(20, 23)], 3)
    assert rows.tolist() == [[0, 1, 2], [3, 4, 5], [20, 21, 22]]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "llama_mini" / "samples"


def test_samples_follow_the_models_distribution(cache: Path) -> None:
    model = tiny_model(1, vocab_size=5, max_seq_len=64, bos_id=2)
    found = samples(model, 40)
    assert found.shape == (64, 40)
    assert (found[:, 0] == 2).all()
    p = model(found).softmax(-1)[:, :-1].double()  # of each next token
    counts = torch.nn.functional.one_hot(found[:, 1:], 5).double()
    expected, variance = p.sum((0, 1)), (p * (1 - p)).sum((0, 1))
    assert ((counts.sum((0, 1)) - expected).abs() < 4 * variance.sqrt()).all()
    assert (p - 0.2).abs().mean() > 0.05  # far from uniform


def test_samples_are_made_once_and_a_broken_file_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(1)
    found = samples(model, 5)
    (file,) = cache.iterdir()
    monkeypatch.setattr("llama_mini.lab.healing_texts._sampled", lambda *_: found + 1)
    assert torch.equal(samples(model, 5), found)
    assert torch.equal(samples(tiny_model(2), 5), found + 1)  # another model
    for broken in (b"", b"\x93NUMPY", file.read_bytes()[:-9]):
        file.write_bytes(broken)
        assert torch.equal(samples(model, 5), found + 1)
    np.save(file, np.full((64, 5), 97))  # not in the vocabulary
    assert torch.equal(samples(model, 5), found + 1)


def test_without_a_cache_samples_are_still_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "llama_mini").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert samples(tiny_model(1), 3).shape == (64, 3)


def test_a_fingerprint_changes_with_bits_shapes_dtypes_and_text() -> None:
    x = torch.arange(6.0)
    others = [x + 1, x.view(2, 3), x.double(), x.bfloat16()]
    assert len({fingerprint([one]) for one in [x, *others]} | {fingerprint([x], "a"), fingerprint([x, x])}) == 7
    assert fingerprint([x.clone()]) == fingerprint([x])
