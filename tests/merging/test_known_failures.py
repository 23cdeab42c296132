"""How merging goes wrong elsewhere: each a failure that has been seen in other tools, and must not be seen here."""

import pickle

import pytest
import torch
from torch import nn

from lightning_lowrank import MergeError, merge_checkpoints, merge_modules
from lightning_lowrank.functional.start import shared_start


def saved(folder, *states):
    paths = [folder / f"{number}.pt" for number in range(len(states))]
    for path, state in zip(paths, states, strict=True):
        torch.save(state, path)
    return paths


def both_ways(folder, *nets, **options):
    """The state dicts of a merge of modules, and of the same networks in files."""
    merged = merge_modules(*nets, **options).state_dict()
    paths = saved(folder, *(net.state_dict() for net in nets))
    merge_checkpoints(paths, folder / "m.pt", force=True, **options)
    return merged, torch.load(folder / "m.pt", weights_only=True)


def test_a_sum_was_asked_for_and_an_average_returned(tmp_path):
    one, two = nn.Linear(2, 2), nn.Linear(2, 2)
    for state in both_ways(tmp_path, one, two):
        assert torch.equal(state["weight"], one.weight + two.weight)
    for state in both_ways(tmp_path, one, two, coefficients=[3.0, 1.0]):
        torch.testing.assert_close(state["weight"], 3 * one.weight + two.weight)


def test_lightning_checkpoints_could_not_be_read(tmp_path):
    states = [{"net.weight": torch.full((2, 2), float(number))} for number in (1, 2)]
    contents = [{"state_dict": state, "pytorch-lightning_version": "2.0.0", "epoch": 3} for state in states]
    merge_checkpoints(saved(tmp_path, *contents), tmp_path / "m.ckpt")
    assert torch.load(tmp_path / "m.ckpt")["state_dict"]["net.weight"].unique().tolist() == [3.0]


def test_an_integer_buffer_became_nan_or_crashed(tmp_path):
    one, two = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    one.num_batches_tracked += 7
    for state in both_ways(tmp_path, one, two):
        assert state["num_batches_tracked"].item() == 7
        assert state["num_batches_tracked"].dtype is torch.int64


def test_half_precision_overflowed_silently(tmp_path):
    nets = [nn.Linear(1, 1).half() for _ in range(2)]
    for net, value in zip(nets, (40000, 39968), strict=True):
        nn.init.constant_(net.weight, value)
    with pytest.raises(MergeError, match=r"weight: the sum overflows torch\.float16"):
        merge_modules(*nets)
    with pytest.raises(MergeError, match=r"weight: the sum overflows torch\.float16"):
        merge_checkpoints(saved(tmp_path, *(net.state_dict() for net in nets)), tmp_path / "m.pt")
    assert not (tmp_path / "m.pt").exists()


def test_tensors_were_paired_by_position(tmp_path):
    layers = {"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)}
    one = nn.ModuleDict(layers)
    two = nn.ModuleDict({"b": nn.Linear(2, 2, bias=False), "a": nn.Linear(2, 2, bias=False)})
    for state in both_ways(tmp_path, one, two):
        assert torch.equal(state["a.weight"], one["a"].weight + two["a"].weight)
        assert torch.equal(state["b.weight"], one["b"].weight + two["b"].weight)


def test_a_cosine_drew_other_entries_of_each_network():
    torch.manual_seed(0)
    pairs = {f"{layer}.weight": (weight := torch.randn(300, 300), weight.clone()) for layer in range(3)}
    found = shared_start(pairs)
    assert all(match.cosine == pytest.approx(1, abs=1e-12) for match in found.layers.values())
    assert found.verdict == "shared"


def test_factors_of_updates_were_summed(tmp_path):
    torch.manual_seed(0)
    nets = [nn.ParameterDict({"lora_A": torch.randn(2, 5), "lora_B": torch.randn(4, 2)}) for _ in range(2)]
    exact = sum(net["lora_B"] @ net["lora_A"] for net in nets)
    for state in both_ways(tmp_path, *nets):
        torch.testing.assert_close(state["lora_B"] @ state["lora_A"], exact)


def test_everything_after_the_first_mismatch_was_dropped(tmp_path):
    first = {"a.weight": torch.ones(2, 2), "b.weight": torch.ones(2, 2), "c.weight": torch.ones(2, 2)}
    second = {"a.weight": torch.ones(3, 2), "b.weight": torch.ones(2, 2), "d.weight": torch.ones(2, 2)}
    with pytest.raises(MergeError) as caught:
        merge_checkpoints(saved(tmp_path, first, second), tmp_path / "m.pt")
    for name in ("a.weight: shape", "c.weight: only in 0.pt", "d.weight: only in 1.pt"):
        assert name in str(caught.value)
    assert not (tmp_path / "m.pt").exists()


@pytest.mark.parametrize("layer", [nn.BatchNorm1d, nn.LayerNorm])
def test_gains_were_doubled(tmp_path, layer):
    for state in both_ways(tmp_path, layer(3), layer(3)):
        assert state["weight"].unique().tolist() == [1.0]


def test_tied_weights_were_summed_twice(tmp_path):
    nets = []
    for value in (1.0, 2.0):
        net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
        net[1].weight = net[0].weight
        nn.init.constant_(net[0].weight, value)
        nets.append(net)
    modules, files = both_ways(tmp_path, *nets)
    for state in (modules, files):
        assert state["0.weight"].unique().tolist() == state["1.weight"].unique().tolist() == [3.0]
        assert state["0.weight"].data_ptr() == state["1.weight"].data_ptr()


def test_whole_modules_were_unpickled(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "0.pt")
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "1.pt")
    with pytest.raises(ValueError, match=r"0.pt .*torch.nn.modules.linear.Linear"):
        merge_checkpoints([tmp_path / "0.pt", tmp_path / "1.pt"], tmp_path / "m.pt")


class Exploit:
    def __reduce__(self):
        return exec, ("open('ran', 'w').close()",)


def test_code_in_a_checkpoint_was_run(tmp_path):
    with (tmp_path / "0.pt").open("wb") as file:
        pickle.dump({"weight": Exploit()}, file)
    torch.save({"weight": Exploit()}, tmp_path / "1.pt")
    torch.save({"weight": torch.ones(2, 2)}, tmp_path / "2.pt")
    for bad in ("0.pt", "1.pt"):
        with pytest.raises(ValueError, match=bad):
            merge_checkpoints([tmp_path / "2.pt", tmp_path / bad], tmp_path / "m.pt")
    assert not [*tmp_path.rglob("ran")]


def test_whether_networks_share_a_start_was_not_said():
    torch.manual_seed(0)
    start = {f"{layer}.weight": torch.randn(64, 64) for layer in range(3)}
    tuned = {name: tensor + 0.1 * torch.randn(64, 64) for name, tensor in start.items()}
    other = {name: torch.randn(64, 64) for name in start}
    assert shared_start({name: (start[name], tuned[name]) for name in start}).verdict == "shared"
    assert shared_start({name: (start[name], other[name]) for name in start}).verdict == "separate"
