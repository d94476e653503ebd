"""Texts of different lengths: each function gives what it gives on the texts alone, and padding counts nowhere."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from llama_mini import Llama, Tokenizer, lab
from llama_mini.errors import NumericalError, RequestError
from llama_mini.lab.__main__ import parser
from llama_mini.lab.command_io import read_ids
from llama_mini.lab.cost import score, standard_error
from llama_mini.lab.texts import as_texts
from tests.tiny_models import random_tokens, tiny_model

LENGTHS = (9, 17, 4)
TEXTS = [random_tokens(1, n, seed=i)[0].tolist() for i, n in enumerate(LENGTHS)]
PATH = "layers.1.feed_forward.pre_norm"


@pytest.fixture(scope="module")
def model() -> Llama:
    return tiny_model(norm_plan="pre+qk")


def test_the_batch_is_padded_on_the_right(model: Llama) -> None:
    tokens, real = texts = as_texts(model, TEXTS)
    assert real.sum(1).tolist() == [*LENGTHS]
    assert [row[keep].tolist() for row, keep in zip(tokens, real, strict=True)] == TEXTS
    for again in (texts, [np.array(text) for text in TEXTS], [torch.tensor(text) for text in TEXTS]):
        assert all(map(torch.equal, as_texts(model, again), texts))


def test_a_score_is_that_of_the_texts_alone(model: Llama) -> None:
    other = tiny_model(1, norm_plan="pre+qk")
    base, changed = score(model, TEXTS), score(other, TEXTS, against=score(model, TEXTS))
    bases = [score(model, text) for text in TEXTS]
    alone = [score(other, text, against=one) for text, one in zip(TEXTS, bases, strict=True)]
    predicted = np.array(LENGTHS) - 1
    assert base.loss == pytest.approx(np.average([s.loss for s in bases], weights=predicted), rel=1e-6)
    assert changed.dloss == pytest.approx(np.average([s.dloss for s in alone], weights=predicted), rel=1e-5)
    for name in ("kl", "top1"):
        expected = np.average([getattr(s, name) for s in alone], weights=LENGTHS)
        assert getattr(changed, name) == pytest.approx(expected, rel=1e-5)
    for row, one, n in zip(base.losses, bases, predicted, strict=True):
        torch.testing.assert_close(row[:n], one.losses[0], rtol=1e-5, atol=1e-5)
        assert row[n:].isnan().all()
    differences = np.concatenate([(a.losses - b.losses)[0].numpy() for a, b in zip(alone, bases, strict=True)])
    assert changed.se == pytest.approx(differences.std(ddof=1) / np.sqrt(len(differences)), rel=1e-5)


def test_the_standard_error_is_over_texts_from_eight_on() -> None:
    draws = np.random.default_rng(0).standard_normal((8, 5)) + np.arange(8)[:, None]
    of_texts, of_tokens = draws.mean(1).std(ddof=1) / np.sqrt(8), draws[:7].std(ddof=1) / np.sqrt(35)
    assert standard_error(torch.from_numpy(draws)) == pytest.approx(of_texts)
    assert standard_error(torch.from_numpy(draws[:7])) == pytest.approx(of_tokens)
    assert of_texts > 2 * of_tokens
    draws[:4, 2:] = np.nan  # the weighted mean of texts of different lengths, as a ratio of two sums
    n, sums = np.sum(~np.isnan(draws), 1), np.nansum(draws, 1)
    apart = sums - n * np.nanmean(draws)
    assert standard_error(torch.from_numpy(draws)) == pytest.approx(np.sqrt(8 / 7 * (apart**2).sum()) / n.sum())
    assert np.isnan(standard_error(torch.ones(1, 1)))


def test_the_standard_error_is_the_spread_of_the_mean() -> None:
    """Of 2,000 draws of 50 differences each, against their own standard errors."""
    draws = torch.randn(2000, 1, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    spread = float(draws.mean((1, 2)).std())
    assert np.mean([standard_error(one) for one in draws]) == pytest.approx(spread, rel=0.05)


def test_a_recording_leaves_padding_out(model: Llama) -> None:
    records, alone = lab.capture(model, TEXTS), [lab.capture(model, text) for text in TEXTS]
    for path in (PATH, "layers.0.attention.q_norm"):
        x: list[Tensor] = [one[path].x[0] for one in alone]  # type: ignore[index]
        wide = torch.cat(x).double().numpy()
        energy = (wide.mean(-1) ** 2 / (wide**2).mean(-1)).mean()
        assert records[path].mean_energy == pytest.approx(energy, rel=1e-4)
        assert records[path].max_over_median == pytest.approx(max_over_median(wide), rel=1e-5)
        row, token, dim, value = records[path].peak
        assert x[row][token].flatten()[dim].item() == pytest.approx(value, rel=1e-5)
        assert abs(value) == pytest.approx(np.abs(wide).max(), rel=1e-5)


def max_over_median(x: np.ndarray) -> float:
    return np.abs(x).max() / np.sort(np.abs(x).ravel())[(x.size - 1) // 2]


def test_padding_changes_neither_a_frozen_norm_nor_the_table_of_layers(model: Llama) -> None:
    x = torch.cat([lab.capture(model, text)[PATH].x[0, 1:] for text in TEXTS])  # type: ignore[index]
    with lab.edit(model, {PATH: {"freeze": "quadratic"}}, TEXTS):
        frozen = model.get_submodule(PATH)
        expected = (x.double().pow(2).mean() + frozen.eps).rsqrt()
        assert float(frozen.inverse_root) == pytest.approx(float(expected), rel=1e-5)
    angles = [lab.skip_layers(model, text).column("angle") for text in TEXTS]
    expected_angles = np.average(angles, axis=0, weights=LENGTHS)
    np.testing.assert_allclose(lab.skip_layers(model, TEXTS).column("angle"), expected_angles, rtol=1e-5)
    assert [str(row) for row in lab.doctor(model, TEXTS)] == [str(row) for row in lab.doctor(model, TEXTS[1])]


def test_padding_brings_no_nan_and_nan_is_named() -> None:
    model = tiny_model()
    model.tok_embeddings.weight[0] = torch.nan  # NaN behind a causal mask is NaN all the same
    texts = [[5, 6, 7], [8, 9]]
    assert score(model, texts).loss == pytest.approx(score(tiny_model(), texts).loss)
    model.layers[1].attention.beta = float("nan")
    with pytest.raises(NumericalError, match=r"first at layers.1.attention, token 0 of row 0$"):
        score(model, texts)


def rows_of(tiny_dir: Path, *words: str) -> list[list[int]]:
    return read_ids(Tokenizer.from_pretrained(tiny_dir), parser().parse_args(["capture", *words]))


def test_rows_of_several_files(tiny_dir: Path, tmp_path: Path) -> None:
    tokenizer, files = Tokenizer.from_pretrained(tiny_dir), [tmp_path / "a.txt", tmp_path / "b.txt"]
    for i, file in enumerate(files):
        file.write_text(f"{i} once upon a time there was a text of many tokens, and then there was another one")
    words = [word for file in files for word in ("--text", str(file))]
    whole = [tokenizer.encode(file.read_text()) for file in files]
    plain = [tokenizer.encode(file.read_text(), add_special_tokens=False) for file in files]
    assert rows_of(tiny_dir, *words, "--tokens", "7") == [ids[:7] for ids in whole]
    rows = rows_of(tiny_dir, *words, "--tokens", "7", "--rows", "3", "--offset", "2")
    assert rows == [ids[start : start + 7] for ids in whole for start in (2, 9, 16)]
    rows = rows_of(tiny_dir, *words, "--tokens", "7", "--bos")
    assert rows == [[tokenizer.bos_id, *ids[:7]] for ids in plain]
    assert len(rows_of(tiny_dir, *words, "--tokens", "1000")[1]) == len(whole[1])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rows", "0"], "--rows must be a whole number of at least 1, not 0"),
        (["--offset", "-1"], "--offset must be a whole number of at least 0, not -1"),
        (["--offset", "999999"], "the default text has .* tokens, so row 0, from token 999999 on, has 0; at least 2"),
        (["--rows", "99"], r"so row \d+, from token \d+ on, has [01]; at least 2 are needed"),
    ],
)
def test_rows_that_are_not_there_are_refused(words: list[str], message: str, tiny_dir: Path) -> None:
    with pytest.raises(RequestError, match=message):
        rows_of(tiny_dir, *words)


def test_a_tokenizer_without_bos_is_refused(tiny_dir: Path) -> None:
    tokenizer = Tokenizer.from_pretrained(tiny_dir)
    tokenizer.bos_id = None
    with pytest.raises(RequestError, match="has no BOS token: leave --bos out"):
        read_ids(tokenizer, parser().parse_args(["capture", "--bos"]))
