import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from lightning_lowrank.functional import shared_start, unit_match

NOT_TESTED = pytest.approx(math.nan, nan_ok=True)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def near(weight, distance=1.0, seed=99):
    return weight + distance * random(*weight.shape, seed=seed)


# --- the statistic


@pytest.mark.parametrize("shape", [(24, 12), (12, 24), (20, 1, 3, 3)])
def test_z_is_the_excess_over_permutations_in_their_standard_deviations(shape):
    """Against numpy's correlations and a standard deviation over 20,000 random pairings."""
    a = random(*shape)
    b = near(a, 2.0)
    x, y = (w.double().flatten(1).numpy() for w in (a, b))
    if len(x) < 16:
        x, y = x.T, y.T
    count = len(x)
    r = np.corrcoef(x, y)[:count, count:]
    generator = np.random.default_rng(0)
    totals = np.array([r[np.arange(count), generator.permutation(count)].sum() for _ in range(20_000)])
    assert totals.mean() == pytest.approx(r.sum() / count, abs=0.05 * totals.std())
    # Centred on both sides, and without the three units that agree best.
    kept = np.sort(np.diag(r - r.mean(0) - r.mean(1, keepdims=True) + r.mean()))[:-3]
    found = unit_match(a, b)
    assert found.z == pytest.approx(kept.sum() / totals.std(), rel=0.03)
    assert found.resolution == pytest.approx(5 * totals.std() / (count - 3), rel=0.03)
    assert found.cosine == pytest.approx(np.sum(x * y) / np.linalg.norm(x) / np.linalg.norm(y), rel=1e-12)


@given(seed=st.integers(0, 1000), scale=st.floats(1e-20, 1e20), rows=st.integers(16, 40))
@settings(max_examples=30, deadline=None)
def test_order_of_the_networks_order_of_the_units_and_scales_do_not_matter(seed, scale, rows):
    a = random(rows, 10, seed=seed).double()
    b = near(a, 2.0, seed=seed + 5000)
    generator = torch.Generator().manual_seed(seed)
    order, columns = torch.randperm(rows, generator=generator), torch.randperm(10, generator=generator)
    z = unit_match(a, b).z
    assert unit_match(b, a).z == pytest.approx(z, rel=1e-9)
    assert unit_match(a * scale, b).z == pytest.approx(z, rel=1e-9)
    assert unit_match(a[order][:, columns], b[order][:, columns]).z == pytest.approx(z, rel=1e-9)


def test_without_a_common_start_z_is_a_standard_normal_less_what_is_left_out():
    matches = [unit_match(random(48, 64, seed=2 * k), random(48, 64, seed=2 * k + 1)) for k in range(200)]
    for side in ("rows", "columns"):
        z = torch.tensor([getattr(match, side) for match in matches])
        # Three of n normal variables, the largest ones, are missing: about 6 / sqrt(n).
        assert -1.2 < z.mean() < -0.5
        assert 0.8 < z.std() < 1.1
        assert z.max() < 3.5


@pytest.mark.parametrize("cosine", [0.5, 0.2])
def test_what_lies_above_the_resolution_is_seen(cosine):
    a = random(64, 96)
    b = cosine * a + math.sqrt(1 - cosine**2) * random(64, 96, seed=1)
    found = unit_match(a, b)
    assert 0.05 < found.resolution < cosine
    assert found.matched
    assert found.cosine == pytest.approx(cosine, abs=0.02)


def test_a_unit_that_only_decayed_still_shows_its_start():
    """Half the units trained, each on its own; the others a million times smaller, and the same but for that."""
    start = random(64, 80)
    a, b = (random(64, 80, seed=seed) for seed in (1, 2))
    a[32:], b[32:] = 1e-6 * start[32:], 3e-7 * start[32:]
    assert unit_match(a, b).rows > 10
    assert unit_match(a, b).cosine < 0.05


def test_large_weights_are_sampled_by_a_generator_of_their_own():
    a = random(700, 900)
    b = near(a, 3.0)
    before = torch.get_rng_state()
    found = unit_match(a, b, limit=64)
    assert torch.equal(torch.get_rng_state(), before)
    assert found == unit_match(a, b, limit=64)
    assert found != unit_match(a, b, limit=64, seed=1)
    assert found.matched
    # Two blocks of 32 x 32: each correlation has a standard deviation of 1 / sqrt(32).
    assert found.resolution == pytest.approx(5 / math.sqrt(32) / math.sqrt(64), rel=0.15)


# --- what is no match


def test_the_same_units_in_another_order_do_not_match():
    a = random(64, 48)
    assert not unit_match(a, a[torch.randperm(64, generator=torch.Generator().manual_seed(0))]).matched


@pytest.mark.parametrize(
    "start",
    [
        torch.eye(48),
        torch.eye(48).repeat(4, 1),
        torch.eye(48).repeat(1, 3),
        torch.nn.init.dirac_(torch.empty(48, 48, 3, 3)),
    ],
    ids=["square", "gates", "projections", "convolution"],
)
def test_an_identity_initialisation_is_no_common_start(start):
    a, b = (near(start, 0.02, seed=seed) for seed in (1, 2))
    assert torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.5
    found = unit_match(a, b)
    assert not found.matched
    assert found.resolution < 0.2


def test_a_few_units_that_stand_out_by_accident_do_not_match():
    """Two networks with 2 units alive out of 64, which happen to be the same."""
    a, b = torch.zeros(64, 40), torch.zeros(64, 40)
    a[[5, 9]] = random(2, 40)
    b[[5, 9]] = a[[5, 9]]
    b[20, 3] = 1e-3
    assert unit_match(a, b).rows < 2


def test_what_all_units_have_in_common_does_not_count():
    profile = 5 * random(1, 64).abs()
    a, b = (profile + random(48, 64, seed=seed) for seed in (1, 2))
    found = unit_match(a, b)
    assert found.cosine > 0.9
    assert abs(found.rows) < 3
    assert not found.matched


# --- sides and layers that can't tell


def test_sides_of_few_units_are_not_tested():
    classes = unit_match(random(10, 64), near(random(10, 64)))
    assert classes.rows == NOT_TESTED
    assert classes.z == classes.columns > 5
    channels = unit_match(random(64, 3), near(random(64, 3), 0.3))
    assert channels.columns == NOT_TESTED
    assert channels.z == channels.rows > 5
    tiny = unit_match(random(8, 8), random(8, 8))
    assert (tiny.z, tiny.resolution) == (NOT_TESTED, NOT_TESTED)
    assert not tiny.matched


@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(32, 24),
        torch.full((32, 24), 0.1),
        torch.eye(32),
        0.1 * torch.ones(32, 1),
        random(1, 24).expand(32, 24),
    ],
    ids=["zero", "constant", "identity", "constant rows", "equal rows"],
)
def test_units_that_are_all_alike_can_not_be_told_apart(weight):
    for other in (weight, 0.3 * weight):
        found = unit_match(weight, other)
        assert found.z == NOT_TESTED
        assert not found.matched
        assert found.identical is torch.equal(weight, other)


def test_identical_weights_are_told_as_such():
    weight = random(300, 20)
    found = unit_match(weight, weight.clone())
    assert found.identical
    assert found.cosine == pytest.approx(1)
    assert found.matched
    assert not unit_match(weight, 1.001 * weight).identical


# --- the verdict

# What became of a layer: it matches, has no trace, is identical in both, identical and without any structure, too small
# to tell, has no trace but could hide much.
LAYERS = {
    "m": lambda k: (random(32, 40, seed=k), near(random(32, 40, seed=k))),
    "u": lambda k: (random(32, 40, seed=k), random(32, 40, seed=k + 50)),
    "i": lambda k: (random(32, 40, seed=k),) * 2,
    "o": lambda k: (torch.zeros(32, 40),) * 2,
    "s": lambda k: (random(4, 5, seed=k), random(4, 5, seed=k + 50)),
    "w": lambda k: (random(16, 4, seed=k), random(16, 4, seed=k + 50)),
}


@pytest.mark.parametrize(
    ("layers", "verdict"),
    [
        ("mm", "shared"),
        ("mmmuu", "shared"),
        ("mmuu", "shared"),
        ("mi", "shared"),
        ("iiuu", "shared"),
        ("ii", "shared"),
        ("i", "shared"),
        ("o", "shared"),
        ("uu", "separate"),
        ("uus", "separate"),
        ("uw", "separate"),
        ("iuu", "separate"),
        ("ouu", "separate"),
        ("", "undetermined"),
        ("m", "undetermined"),
        ("u", "undetermined"),
        ("us", "undetermined"),
        ("iu", "undetermined"),
        ("ow", "undetermined"),
        ("ww", "undetermined"),
        ("ss", "undetermined"),
        ("mu", "undetermined"),
        ("mmuuu", "undetermined"),
    ],
)
def test_verdict(layers, verdict):
    found = shared_start({f"{kind}{k}": LAYERS[kind](k) for k, kind in enumerate(layers)})
    assert found.verdict == verdict
    assert [name[0] for name in found.layers] == list(layers)


def test_a_sentence_says_what_was_found():
    def sentence(layers):
        return str(shared_start({f"{kind}{k}": LAYERS[kind](k) for k, kind in enumerate(layers)}))

    assert sentence("mmus").startswith(
        "shared start: units correspond in 2 of 3 layers that can tell, median cosine 0.7"
    )
    assert sentence("iiiu").endswith("median cosine 1.00; 3 of all 4 are identical")
    assert sentence("uuo").startswith(
        "no trace of a common start: units correspond in 0 of 2 layers that can tell; 1 of all 3 are identical, where"
    )
    assert sentence("s").startswith(
        "undetermined whether the networks share a start: units correspond in 0 of 0 layers"
    )


def test_what_can_not_be_compared_is_refused():
    with pytest.raises(ValueError, match=r"shapes \(16, 3\) and \(16, 4\); pass two of one shape"):
        unit_match(torch.ones(16, 3), torch.ones(16, 4))
    for weight in (torch.ones(16), torch.ones(0, 16)):
        with pytest.raises(ValueError, match=r"have shapes .*; pass two of one shape \(out, in, \.\.\.\), not empty"):
            unit_match(weight, weight)
    with pytest.raises(ValueError, match="limit must be at least 16"):
        unit_match(torch.ones(16, 3), torch.ones(16, 3), limit=8)
    with pytest.raises(
        ValueError, match=r"net\.0\.weight: a weight of shape \(16, 3\) has entries that are not finite"
    ):
        shared_start({"net.0.weight": (torch.ones(16, 3), torch.full((16, 3), math.inf))})


# --- trained networks


def trained(starts, *, split, weight_decay, steps, lr=0.05, batch=64):
    """Networks of three layers without biases, all trained at once on digits; weights of shape (networks, out, in).

    With ``split``, even ones see the digits 0 to 4 and odd ones 5 to 9.
    """
    inputs, labels = load_digits(return_X_y=True)
    inputs, labels = torch.tensor(inputs / 16, dtype=torch.float32), torch.tensor(labels)
    generator = torch.Generator().manual_seed(0)
    weights = [start.clone().requires_grad_() for start in starts]
    count = len(weights[0])
    halves = [(labels < 5).nonzero().flatten(), (labels >= 5).nonzero().flatten()]
    optimizer = torch.optim.SGD(weights, lr=lr, momentum=0.9, weight_decay=weight_decay)
    for _ in range(steps):
        if split:
            rows = [half[torch.randint(len(half), (count // 2, batch), generator=generator)] for half in halves]
            indices = torch.stack(rows, 1).flatten(0, 1)
        else:
            indices = torch.randint(len(inputs), (count, batch), generator=generator)
        hidden = inputs[indices]
        for weight in weights[:-1]:
            hidden = (hidden @ weight.mT).relu()
        loss = torch.nn.functional.cross_entropy((hidden @ weights[-1].mT).flatten(0, 1), labels[indices].flatten())
        optimizer.zero_grad()
        (loss * count).backward()
        optimizer.step()
    return [weight.detach() for weight in weights]


def initialised(count, seed=0, sizes=(64, 48, 48, 10)):
    generator = torch.Generator().manual_seed(seed)
    pairs = itertools.pairwise(sizes)
    return [torch.randn(count, out, size, generator=generator) * math.sqrt(1 / size) for size, out in pairs]


def compared(weights):
    return [
        shared_start({str(k): (w[i], w[i + 1]) for k, w in enumerate(weights)}) for i in range(0, len(weights[0]), 2)
    ]


@pytest.mark.parametrize("split", [False, True], ids=["same task", "split task"])
@pytest.mark.parametrize("weight_decay", [0.0, 5e-3])
def test_separately_initialised_networks_are_never_called_shared(split, weight_decay):
    found = compared(trained(initialised(60), split=split, weight_decay=weight_decay, steps=100))
    assert {start.verdict for start in found} == {"separate"}
    hidden = [start.layers["1"] for start in found]
    z = torch.tensor([[match.rows, match.columns] for match in hidden] + [[s.layers["0"].rows] * 2 for s in found])
    assert 0.7 < z.std() < 1.3
    assert z.max() < 4


@pytest.mark.parametrize("split", [False, True], ids=["same task", "split task"])
@pytest.mark.parametrize("weight_decay", [0.0, 5e-3])
def test_networks_from_one_start_are_recognised(split, weight_decay):
    """With decay, a factor of .55 of the start is left."""
    starts = [start.repeat_interleave(2, 0) for start in initialised(12)]
    found = compared(trained(starts, split=split, weight_decay=weight_decay, steps=240))
    assert {start.verdict for start in found} == {"shared"}


def test_a_start_that_decay_has_erased_leaves_no_trace():
    """exp(-0.1 * 0.05 / (1 - 0.9) * 240) = 6e-6 of it is left, on tasks that share nothing either."""
    starts = [start.repeat_interleave(2, 0) for start in initialised(12)]
    found = compared(trained(starts, split=True, weight_decay=0.05, steps=240, lr=0.1))
    assert "shared" not in {start.verdict for start in found}


def test_one_trained_layer_can_match_by_what_it_is():
    """A linear classifier has classes in its rows and inputs in its columns: both are fixed, so it decides nothing."""
    inputs, labels = load_digits(return_X_y=True)
    inputs, labels = torch.tensor(inputs / 16, dtype=torch.float32), torch.tensor(labels)
    weights = [0.1 * random(10, 64, seed=seed) for seed in (1, 2)]
    for _ in range(200):
        for k, weight in enumerate(weights):
            errors = (inputs @ weight.T).softmax(1) - torch.nn.functional.one_hot(labels, 10)
            weights[k] = weight - 0.5 / len(inputs) * errors.T @ inputs
    found = shared_start({"weight": (weights[0], weights[1])})
    assert found.layers["weight"].matched
    assert found.verdict == "undetermined"
