import copy
import warnings

import pytest
import torch
from torch import nn

from lightning_lowrank import MergeError, MergePolicy, merge_checkpoints, merge_modules
from lightning_lowrank.merging.kinds import Kind
from lightning_lowrank.merging.policy import DEFAULTS


class Zoo(nn.Module):
    """A tensor of every kind that a module tells."""

    def __init__(self, value=1.0, rank=2):
        super().__init__()
        self.tokens = nn.Embedding(5, 4)
        self.pos_embed = nn.Parameter(torch.full((1, 3, 4), value))
        self.conv = nn.Conv1d(4, 4, 3)
        self.norm = nn.BatchNorm1d(4)
        self.slope = nn.PReLU(4)
        self.layer_scale = nn.Parameter(torch.full((4, 1, 1), value))
        self.attention = nn.MultiheadAttention(4, 2)
        self.recurrent = nn.LSTM(4, 3)
        self.linear = nn.Linear(4, 4)
        self.linear.lora_A = nn.Parameter(torch.full((rank, 4), value))
        self.linear.lora_B = nn.Parameter(torch.full((4, rank), value))
        self.raw = nn.Parameter(torch.full((2, 2), value))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.register_buffer("table", torch.ones(3))
        self.register_buffer("order", torch.arange(3))
        self.register_buffer("mask", torch.ones(3, dtype=torch.bool))
        self.head = nn.Linear(4, 2)


KINDS = {
    "pos_embed": "embedding",
    "layer_scale": "gain",
    "raw": "other",
    "frozen": "frozen",
    "table": "buffer",
    "order": "integer",
    "mask": "buffer",
    "tokens.weight": "embedding",
    "conv.weight": "convolution",
    "conv.bias": "bias",
    "norm.weight": "normalisation",
    "norm.bias": "normalisation",
    "norm.running_mean": "statistic",
    "norm.running_var": "statistic",
    "norm.num_batches_tracked": "integer",
    "slope.weight": "gain",
    "attention.in_proj_weight": "linear",
    "attention.in_proj_bias": "bias",
    "attention.out_proj.weight": "linear",
    "attention.out_proj.bias": "bias",
    "recurrent.weight_ih_l0": "linear",
    "recurrent.weight_hh_l0": "linear",
    "recurrent.bias_ih_l0": "bias",
    "recurrent.bias_hh_l0": "bias",
    "linear.weight": "linear",
    "linear.bias": "bias",
    "linear.lora_A": "lora",
    "linear.lora_B": "lora",
    "head.weight": "linear",
    "head.bias": "bias",
}


def test_every_tensor_has_its_kind_and_the_default_rule_of_it():
    plan = MergePolicy().plan(Zoo(), Zoo())
    assert {entry.name: entry.kind for entry in plan.entries} == KINDS
    for entry in plan.entries:
        rule, reason = DEFAULTS[Kind(entry.kind)]
        assert (entry.rule, entry.reason) == (rule.value, reason)


def test_kinds_in_a_file_are_told_by_names_and_shapes(tmp_path):
    for name in ("a.pt", "b.pt"):
        torch.save(Zoo().state_dict(), tmp_path / name)
    plan = MergePolicy().plan(tmp_path / "a.pt", tmp_path / "b.pt")
    # What a file does not tell: which parameters were frozen, and what a tensor of no common name is.
    told = {**KINDS, "frozen": "unknown", "raw": "unknown", "table": "unknown", "slope.weight": "normalisation"}
    assert {entry.name: entry.kind for entry in plan.entries} == told


def test_the_printed_plan_has_tensor_kind_rule_and_reason():
    policy = MergePolicy(kinds={"embedding": "mean"}, names={"head.*": "first", "*.bias": "mean"})
    lines = str(policy.plan(Zoo(), Zoo())).splitlines()
    assert lines[0].split() == ["tensor", "shape", "type", "kind", "rule", "reason"]
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in lines[2:] if line and not line.startswith(" ")}
    assert rows["tokens.weight"] == "5x4 float32 embedding mean asked for by the kind 'embedding'"
    assert rows["head.bias"] == "2 float32 bias first asked for by the pattern 'head.*'"
    assert rows["conv.bias"] == "4 float32 bias mean asked for by the pattern '*.bias'"
    assert rows["norm.num_batches_tracked"].startswith("scalar int64 integer first counters")
    assert "30 tensors of 2 networks (sum of c_i W_i): 2 embedding: mean, " in " ".join(lines)


def test_planning_computes_and_changes_nothing():
    nets = [Zoo(), Zoo()]
    before = copy.deepcopy([net.state_dict() for net in nets])
    with torch.device("meta"):
        plan = MergePolicy().plan(Zoo(), Zoo())
    assert len(plan.entries) == len(KINDS)
    MergePolicy().plan(*nets)
    for net, kept in zip(nets, before, strict=True):
        assert all(torch.equal(kept[name], tensor) for name, tensor in net.state_dict().items())


def test_rules_do_what_they_are_called():
    one, two = (nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(2))
    policy = MergePolicy(kinds={"bias": "mean"}, names={"0.weight": "first"})
    merged = merge_modules(one, two, policy=policy)
    assert torch.equal(merged[0].weight, one[0].weight)
    assert torch.equal(merged[1].weight, one[1].weight + two[1].weight)
    assert torch.equal(merged[1].bias, (one[1].bias + two[1].bias) / 2)
    with pytest.raises(MergeError, match=r"1.weight: linear weights must be equal in all networks, .* differ by up to"):
        merge_modules(one, two, policy=MergePolicy(names={"1.weight": "equal"}))
    with pytest.raises(MergeError, match=r"1.bias: the policy refuses it \(asked for by the pattern '1.bias'\)"):
        merge_modules(one, two, policy=MergePolicy(names={"1.bias": "error"}))


def test_pooled_statistics_are_those_of_the_data_together():
    torch.manual_seed(0)
    nets = [nn.BatchNorm1d(3, momentum=None) for _ in range(3)]
    data = [torch.randn(40, 3) * (k + 1) + k for k in range(3)]
    for net, batch in zip(nets, data, strict=True):
        net(batch)
        net.running_var.copy_(batch.var(0, correction=0))
    merged = merge_modules(*nets, policy=MergePolicy(kinds={"statistic": "pooled"}))
    together = torch.cat(data)
    torch.testing.assert_close(merged.running_mean, together.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(merged.running_var, together.var(0, correction=0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kinds": {"weight": "sum"}}, r"there is no kind 'weight'; there are linear, convolution, bias, norm"),
        ({"kinds": {"head": "sum"}}, r"there is no kind 'head'"),
        (
            {"kinds": {"bias": "average"}},
            r"there is no rule 'average'; there are sum, mean, first, equal, pooled, error",
        ),
        ({"names": {"*": "max"}}, r"there is no rule 'max'"),
        ({"names": ["*"]}, r"kinds and names are dicts of rules, got \['\*'\]"),
        ({"kinds": {"integer": "sum"}}, r"'sum' has no meaning for kind 'integer': integers count"),
        ({"kinds": {"bias": "pooled"}}, r"'pooled' has no meaning for kind 'bias': only running statistics"),
        ({"lora_rank": 0}, r"lora_rank must be a positive integer or None, got 0"),
        ({"lora_rank": 2.0}, r"lora_rank must be a positive integer or None, got 2.0"),
    ],
)
def test_wrong_policies_are_refused_when_they_are_made(arguments, message):
    with pytest.raises(ValueError, match=message):
        MergePolicy(**arguments)


def test_rules_without_meaning_for_a_named_tensor_are_refused_in_the_plan():
    nets = [Zoo(), Zoo()]
    for name, rule, message in (
        ("order", "sum", "order: integer buffer can't have rule 'sum': integers count"),
        ("table", "sum", "table: buffer can't have rule 'sum': it belongs to the architecture"),
        ("conv.weight", "pooled", "conv.weight: convolution weight can't have rule 'pooled'"),
        ("linear.lora_A", "first", "linear.lora_A has rule 'first' and linear.lora_B 'sum'; a pair has one rule"),
    ):
        with pytest.raises(MergeError, match=message):
            MergePolicy(names={name: rule}).plan(*nets)


def test_a_pattern_that_fits_nothing_is_a_mistake():
    with pytest.raises(
        ValueError, match=r"the policy's pattern 'backbone.\*' matches no tensor; there are: weight, bias"
    ):
        merge_modules(nn.Linear(2, 2), nn.Linear(2, 2), policy=MergePolicy(names={"backbone.*": "first"}))


def test_sums_of_gains_without_a_common_start_are_warned_about_by_name():
    policy = MergePolicy(kinds={"normalisation": "sum"})
    nets = [nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)) for _ in range(2)]
    for net in nets:
        nn.init.normal_(net[1].weight)
    assert policy.plan(*nets).notes == [
        "1.weight, 1.bias: gains, statistics or frozen parameters are summed because the policy says so; without base="
        " that multiplies what the networks have in common"
    ]
    with pytest.warns(UserWarning, match=r"^1.weight, 1.bias: gains"):
        merged = merge_modules(*nets, policy=policy)
    assert torch.equal(merged[1].weight, nets[0][1].weight + nets[1][1].weight)
    # With a common start the sum of the changes has a meaning, and nothing is said.
    assert policy.plan(*nets, base=copy.deepcopy(nets[0])).notes == []


def test_integer_tables_that_differ_are_warned_about_by_name():
    nets = [nn.Linear(2, 2) for _ in range(2)]
    for net, order in zip(nets, ([0, 1], [1, 0]), strict=True):
        net.register_buffer("order", torch.tensor(order))
        net.register_buffer("count", torch.tensor(order[0]))
    with pytest.warns(UserWarning, match=r"^order: integers that differ between the networks, of which the first"):
        merged = merge_modules(*nets)
    assert merged.order.tolist() == [0, 1]


def test_policies_show_themselves():
    policy = MergePolicy({"bias": "mean"}, {"head.*": "first"}, lora_rank=4)
    assert repr(policy) == "MergePolicy(kinds={'bias': 'mean'}, names={'head.*': 'first'}, lora_rank=4)"


def lora(rank, seed):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    for layer in net:
        layer.requires_grad_(False)
        nn.init.ones_(layer.weight)
        nn.init.ones_(layer.bias)
        layer.lora_A = nn.Parameter(torch.randn(rank, layer.in_features))
        layer.lora_B = nn.Parameter(torch.randn(layer.out_features, rank))
    return net


def update(layer):
    return layer.lora_B.double() @ layer.lora_A.double()


def test_lora_updates_are_summed_and_not_their_factors():
    nets = [lora(rank, seed) for seed, rank in enumerate((2, 3))]
    merged = merge_modules(*nets, coefficients=[0.5, 2.0])
    for index, layer in enumerate(merged):
        expected = 0.5 * update(nets[0][index]) + 2 * update(nets[1][index])
        torch.testing.assert_close(update(layer), expected, rtol=1e-5, atol=1e-5)
        assert layer.lora_A.shape[0] == layer.lora_B.shape[1] == 5
        assert layer.lora_A.requires_grad
    # The backbone was frozen, is equal, and is there once.
    assert merged[0].weight.unique().tolist() == [1.0]


def test_lora_updates_truncated_to_a_rank_are_the_nearest_of_that_rank():
    nets = [lora(2, 0), lora(3, 1)]
    merged = merge_modules(*nets, policy=MergePolicy(lora_rank=2))
    for index, layer in enumerate(merged):
        whole = update(nets[0][index]) + update(nets[1][index])
        u, sigma, v = torch.linalg.svd(whole)
        expected = u[:, :2] * sigma[:2] @ v[:2]
        torch.testing.assert_close(update(layer), expected, rtol=1e-4, atol=1e-4)
        assert layer.lora_A.shape[0] == layer.lora_B.shape[1] == 2


def test_lora_updates_around_a_base():
    one, two, base = lora(2, 0), lora(2, 1), lora(2, 2)
    merged = merge_modules(one, two, base=base, coefficients=[0.5, 1.5])
    for index, layer in enumerate(merged):
        start = update(base[index])
        expected = start + 0.5 * (update(one[index]) - start) + 1.5 * (update(two[index]) - start)
        torch.testing.assert_close(update(layer), expected, rtol=1e-5, atol=1e-5)


class Transposed(nn.Module):
    """Factors as ``x @ A @ B``, and one for a convolution."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.lora_a = nn.Parameter(torch.randn(6, 2))
        self.lora_b = nn.Parameter(torch.randn(2, 5))
        self.conv = nn.ModuleDict({"lora_A": nn.Conv2d(3, 2, 3, bias=False), "lora_B": nn.Conv2d(2, 4, 1, bias=False)})


def test_transposed_and_convolutional_factors():
    one, two = Transposed(0), Transposed(1)
    merged = merge_modules(one, two)
    torch.testing.assert_close(merged.lora_a @ merged.lora_b, one.lora_a @ one.lora_b + two.lora_a @ two.lora_b)
    images = torch.randn(1, 3, 5, 5)

    def run(net):
        return net.conv["lora_B"](net.conv["lora_A"](images))

    torch.testing.assert_close(run(merged), run(one) + run(two), rtol=1e-4, atol=1e-5)


def tied():
    net = nn.ModuleDict({"emb": nn.Embedding(4, 3), "out": nn.Linear(3, 4, bias=False)})
    net["out"].weight = net["emb"].weight
    return net


def test_patterns_find_tied_tensors_by_any_of_their_names(tmp_path):
    one, two = tied(), tied()
    for net, name in ((one, "1.pt"), (two, "2.pt")):
        torch.save(net.state_dict(), tmp_path / name)
    for pattern in ("out.*", "emb.*"):
        policy = MergePolicy(names={pattern: "first"})
        assert torch.equal(merge_modules(one, two, policy=policy)["out"].weight, one["out"].weight)
        (entry,) = policy.plan(tmp_path / "1.pt", tmp_path / "2.pt").entries
        assert (entry.rule, entry.reason) == ("first", f"asked for by the pattern {pattern!r}; tied to out.weight")
    with pytest.raises(MergeError, match=r"emb.weight: the policy refuses it"):
        merge_modules(one, two, policy=MergePolicy(names={"out.*": "error"}))


def test_quantised_and_meta_modules_are_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own
        nets = [torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 4))) for _ in range(2)]
    with pytest.raises(MergeError, match=r"0 of model 1: a quantised layer, whose codes have no sum"):
        merge_modules(*nets)
    nets = [nn.Linear(2, 2, device="meta") for _ in range(2)]
    with pytest.raises(MergeError, match=r"weight, bias: on the meta device, without values; load the networks first"):
        merge_modules(*nets)


def test_what_is_merged_in_inference_mode_can_be_trained():
    with torch.inference_mode():
        merged = merge_modules(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = torch.optim.SGD(merged.parameters(), lr=0.1)
    merged(torch.ones(1, 2)).sum().backward()
    before = merged.weight.clone()
    optimizer.step()
    assert not torch.equal(merged.weight, before)


def test_the_rank_of_a_merged_update_is_at_most_the_exact_one():
    merged = merge_modules(lora(2, 0), lora(2, 1), policy=MergePolicy(lora_rank=30))
    assert merged[0].lora_A.shape == (4, 6)


def test_eight_bit_floats_are_weights_unless_scales_stand_beside_them(tmp_path):
    small = torch.tensor([[0.5, 1.0], [2.0, -0.25]]).to(torch.float8_e4m3fn)
    for name in ("a", "b"):
        torch.save({"weight": small}, tmp_path / f"{name}.pt")
        torch.save({"weight": small, "weight_scale": torch.ones(1)}, tmp_path / f"{name}-scaled.pt")
    merge_checkpoints([tmp_path / "a.pt", tmp_path / "b.pt"], tmp_path / "m.pt")
    assert torch.equal(torch.load(tmp_path / "m.pt")["weight"].float(), 2 * small.float())
    plan = MergePolicy().plan(tmp_path / "a-scaled.pt", tmp_path / "b-scaled.pt")
    assert {entry.name: entry.rule for entry in plan.entries} == {"weight": "equal", "weight_scale": "equal"}
    for name in ("a", "b"):
        torch.save({"weight": torch.full((2, 2), 400.0).to(torch.float8_e4m3fn)}, tmp_path / f"{name}.pt")
    with pytest.raises(MergeError, match=r"weight: the sum overflows torch.float8_e4m3fn"):
        merge_checkpoints([tmp_path / "a.pt", tmp_path / "b.pt"], tmp_path / "n.pt")
