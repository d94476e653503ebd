"""What papers of 2026 say of massive tokens and attention sinks, on the default checkpoint.

The sink of gradients is in test_gradient_flow.py, and the sink that follows the massive activation in
test_attention_heads.py. That sinks can be trained without massive activations is a claim about training: not here.
"""

from itertools import combinations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from llama_mini import Llama, Tokenizer, lab
from llama_mini.lab.cost import Score
from llama_mini.lab.recording import Recording

pytestmark = pytest.mark.slow

TEXTS = (
    "Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do: once",
    "def f(x):\n    return x + 1\n" * 3,
    "Die Hauptstadt von Deutschland ist Berlin, und die von Frankreich ist Paris. Wer das nicht weiß, schlägt es nach.",
    "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18",
    "He had been there before, but not for long enough to know the name of the street or the colour of the door",
    "<html>\n<body>\n<h1>Hello</h1>\n<p>World</p>\n</body>\n</html>\n",
)
WITH_SPIKE = range(12, 29)  # layers that read the massive token
BRANCHES = ("attention", "feed_forward")


@pytest.fixture(scope="module")
def base(smollm2: Llama, alice: list[int]) -> Score:
    return lab.score(smollm2, alice)


@pytest.fixture(scope="module")
def recordings(smollm2: Llama, smollm2_tokenizer: Tokenizer) -> list[Recording]:
    return [lab.capture(smollm2, smollm2_tokenizer.encode(text)) for text in TEXTS]


def likeness(rows: list[Tensor]) -> tuple[float, float]:
    """The smallest and the mean cosine of each two."""
    units = normalize(torch.stack(rows).double(), dim=-1)
    cosines = [float(units[i] @ units[j]) for i, j in combinations(range(len(rows)), 2)]
    return min(cosines), float(np.mean(cosines))


def largest_share(row: Tensor) -> float:
    """Of the energy, that of the largest element."""
    return float(row.double().square().max() / row.double().square().sum())


def test_the_first_tokens_normed_row_is_nearly_constant(recordings: list[Recording]) -> None:
    """Sun et al. 2026 (2603.05498): the massive token's normed row is the same over texts and layers, and sparse.

    So it is over six texts in layers 12 to 28. In layers 10 and 11 no token is massive, and the row depends on the
    text. It is sparse before the gain; the gain of feed-forward norms 12 to 26 shuts the massive dimension out.
    """
    for i in range(10, 29):
        for branch in BRANCHES:
            path = f"layers.{i}.{branch}.pre_norm"
            first, later = (likeness([record[path].y[0, token] for record in recordings]) for token in (0, 20))
            before, after = (np.mean([largest_share(getattr(r[path], z)[0, 0]) for r in recordings]) for z in "xy")
            print(path, *(f"{x:.4f}" for x in (*first, *later, before, after)))
            if i not in WITH_SPIKE:
                assert first[0] < 0.9
                continue
            assert first[0] > 0.99
            assert later[1] < 0.9
            assert before > 0.98
            assert bool(after > 0.6) is (branch == "attention" or i > 26)
    rows = [recordings[0][f"layers.{i}.attention.pre_norm"] for i in WITH_SPIKE]
    over_layers = [likeness([getattr(row, z)[0, 0] for row in rows]) for z in "xy"]
    print("over layers", over_layers)
    assert over_layers[0][0] > 0.99  # before the gains
    assert over_layers[1][0] > 0.85  # after them


def first_of_507(recording: Recording, layer: int) -> float:
    return float(recording.resid.resid_post[layer].x[0, 0, 507])


def test_one_layer_makes_the_spike(smollm2: Llama, alice: list[int], base: Score) -> None:
    """Shi et al. 2026 (2605.08504): one layer makes it, by its norm's gain and its feed-forward layer together.

    The feed-forward layer of layer 11 adds 23,986 of it, and what comes after adds next to nothing until layers 28 and
    29 take it away; without that one branch no element of a later layer is massive. The gain has little part in it:
    with the mean in place of all gains the spike stays, and without the six largest gains it does too.
    """
    whole = lab.capture(smollm2, alice)
    stream = [float(whole.resid.resid_pre[0].x[0, 0, 507])]
    for i in range(30):
        stream += [float(whole.resid.resid_mid[i].x[0, 0, 507]), first_of_507(whole, i)]
    added = np.diff(stream).reshape(30, 2)  # by attention, by feed-forward
    print("added", added.round(1).tolist())
    assert added[11, 1] == pytest.approx(23_986, rel=0.01)
    assert abs(added[12:27]).max() < 50
    assert added[28:, 1].sum() < -19_000
    path = "layers.11.feed_forward.pre_norm"
    largest = smollm2.get_submodule(path).weight.abs().argsort(descending=True)
    for name, gain in {
        "mean": "mean",
        "six": {"dims": largest[:6].tolist()},
        "58": {"dims": largest[:58].tolist()},
    }.items():
        with lab.edit(smollm2, {path: {"gain": gain}}):
            spike = first_of_507(lab.capture(smollm2, alice), 11)
            cost = lab.score(smollm2, alice, against=base)
        print("gain", name, spike, cost.dloss, cost.se)
        assert spike > 10_000
    down = smollm2.layers[11].feed_forward.down_proj.weight
    kept = down.clone()
    down.zero_()
    try:
        without, cost = lab.capture(smollm2, alice, keep="stats"), lab.score(smollm2, alice, against=base)
    finally:
        down.copy_(kept)
    times = [point.max_over_median for point in without.resid.resid_post]
    print("without", cost.dloss, cost.se, [round(x) for x in times])
    assert max(times[10:]) < 100
    assert cost.dloss == pytest.approx(1.31, abs=0.1)


def test_masking_the_massive_dimension_does_not_help_this_model(smollm2: Llama, alice: list[int], base: Score) -> None:
    """The same paper masks such dimensions where attention reads them, which weakens the sinks and raises its scores.

    Here the sink weakens too, but the loss on a novel grows. Benchmarks of instructions are not measured.
    """
    found = {}
    for name, edits in {"whole": {}, "masked": {"layers.12-29.attention.pre_norm": {"gain": {"dims": [507]}}}}.items():
        with lab.edit(smollm2, edits):
            heads = [head for head in lab.attention(smollm2, alice) if head.layer >= 12]
            cost = lab.score(smollm2, alice, against=base)
        found[name] = np.mean([head.first_mass for head in heads]), np.mean([head.entropy for head in heads]), cost
        print(name, *found[name][:2], cost.dloss, cost.se, cost.top1)
    (mass, entropy, _), (masked, wider, cost) = found["whole"], found["masked"]
    assert masked < mass
    assert wider > entropy
    assert cost.dloss > 2 * cost.se > 0


def test_q_and_k_norms_bound_the_largest_logit(smollm2: Llama, alice: list[int]) -> None:
    """Gemma 3, OLMo 2 and 3, Qwen 3: with both norms |q·k|/√D is at most √D times the largest gains: 8 with gains 1."""
    bounded = lab.insert(smollm2, "layers.*.attention.[qk]_norm", alice, gain="one")
    before, after = (
        [max(head.largest_logit for head in heads if head.layer == i) for i in range(30)]
        for heads in (lab.attention(smollm2, alice), lab.attention(bounded, alice))
    )
    print("largest logits", [round(x, 1) for x in before], [round(x, 2) for x in after])
    assert max(after) <= 8
    assert max(before) > 16
