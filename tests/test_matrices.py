"""Which matrix a parameter is, against what the layers compute."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from lightning_lowrank.matrices import (
    Layout,
    check_overrides,
    layouts_of_names,
    layouts_of_parameters,
    weight_layouts,
)
from lightning_lowrank.weights import named_weights

QKV = ("query", "key", "value")


def svd(matrix):
    return np.linalg.svd(np.asarray(matrix, dtype=np.float64), compute_uv=False)


def shapes_of(module):
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


def sigma_of(layout, tensor):
    """All singular values of what a layout makes of a tensor."""
    return np.sort(np.concatenate([svd(block) for block in layout.blocks(tensor.double()).numpy()]))


def jacobian(function, *shape):
    """The linear map of a layer without bias, as numpy matrix."""
    basis = torch.eye(int(np.prod(shape)), dtype=torch.float64).reshape(-1, *shape)
    with torch.no_grad():
        return function(basis).flatten(1).numpy().T


CONVOLUTIONS = [(kind, groups) for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d) for groups in (1, 2, 4)] + [
    (kind, groups) for kind in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d) for groups in (1, 2, 4)
]


@pytest.mark.parametrize(("kind", "groups"), CONVOLUTIONS, ids=lambda value: getattr(value, "__name__", value))
def test_a_convolution_is_the_map_of_its_patches_block_diagonal_in_its_groups(kind, groups):
    torch.manual_seed(0)
    transposed = "Transpose" in kind.__name__
    layer = kind(4, 8, 2, groups=groups, bias=False).double()
    dimensions = int(kind.__name__[-2])
    # On one patch (transposed: one input pixel) the layer is exactly that map.
    patch = (4, *((1,) if transposed else (2,)) * dimensions)
    truth = jacobian(layer, *patch)
    layout = weight_layouts(layer)["weight"]
    assert layout.groups == groups
    assert layout.kind == ("transposed convolution" if transposed else "convolution")
    found = sigma_of(layout, layer.weight.detach())
    expected = np.sort(svd(truth))
    assert found == pytest.approx(expected, abs=1e-12)


def test_plain_layers_are_their_own_matrix_and_vectors_are_left_out():
    net = nn.ModuleDict(
        {
            "linear": nn.Linear(4, 3),
            "table": nn.Embedding(5, 4),
            "bag": nn.EmbeddingBag(5, 4),
            "bilinear": nn.Bilinear(2, 3, 4),
            "norm": nn.LayerNorm((3, 4)),
            "batch": nn.BatchNorm1d(3),
            "slope": nn.PReLU(3),
        }
    )
    layouts = weight_layouts(net)
    kinds = {name: layout.kind for name, layout in layouts.items()}
    assert kinds == {
        "linear.weight": "linear",
        "table.weight": "embedding",
        "bag.weight": "embedding",
        "bilinear.weight": "other",
    }
    blocks = layouts["bilinear.weight"].blocks(net["bilinear"].weight)
    assert blocks.shape == (1, 4, 6)
    assert blocks.data_ptr() == net["bilinear"].weight.data_ptr()


@pytest.mark.parametrize(
    ("layer", "gates"),
    [
        (nn.LSTM(3, 4, 2, bidirectional=True), ("input", "forget", "cell", "output")),
        (nn.LSTM(3, 4, proj_size=2), ("input", "forget", "cell", "output")),
        (nn.GRU(3, 4), ("reset", "update", "new")),
        (nn.RNN(3, 4), ()),
        (nn.LSTMCell(3, 4), ("input", "forget", "cell", "output")),
        (nn.GRUCell(3, 4), ("reset", "update", "new")),
        (nn.RNNCell(3, 4), ()),
    ],
    ids=lambda value: type(value).__name__,
)
def test_gates_are_matrices_of_their_own_in_modules_and_in_state_dicts(layer, gates):
    layouts = weight_layouts(layer)
    assert set(layouts) == {name for name, p in layer.named_parameters() if p.ndim == 2}
    for name, layout in layouts.items():
        assert layout.parts == (() if "_hr_" in name else gates)
    assert layouts_of_names(shapes_of(layer)) == layouts
    net = nn.ModuleDict({"rnn": layer})
    assert list(layouts_of_names(shapes_of(net)).values()) == list(layouts.values())
    if gates:
        weight = layer.get_parameter(next(iter(layouts)))
        pieces = next(iter(layouts.values())).pieces(weight)
        assert torch.equal(torch.cat(list(pieces.values())), weight)


def test_multihead_attention_is_queries_keys_and_values_fused_or_not():
    fused = nn.MultiheadAttention(8, 2, add_bias_kv=True)
    layouts = weight_layouts(fused)
    assert {name: layout.parts for name, layout in layouts.items()} == {"in_proj_weight": QKV, "out_proj.weight": ()}
    assert layouts_of_names(shapes_of(fused)) == layouts
    key = layouts["in_proj_weight"].pieces(fused.in_proj_weight)["key"]
    assert torch.equal(key, fused.in_proj_weight[8:16])
    separate = nn.MultiheadAttention(8, 2, kdim=4, vdim=6)
    layouts = weight_layouts(separate)
    assert {name: layout.kind for name, layout in layouts.items()} == dict.fromkeys(
        ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"], "linear"
    )


class Conv1D(nn.Module):
    """As transformers': the weight has its outputs last."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.zeros(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


def module(name="Attention", **parts):
    """A module of this class name with these children and attributes."""
    made = type(name, (nn.Module,), {})()
    for key, value in parts.items():
        setattr(made, key, value)
    return made


def linear(outputs, inputs):
    return nn.Linear(inputs, outputs, bias=False)


def test_timm_blocks():
    block = module("Block", attn=module(num_heads=2, qkv=linear(24, 8), proj=linear(8, 8)), fc1=linear(32, 8))
    layouts = weight_layouts(block)
    assert layouts["attn.qkv.weight"] == Layout("fused attention", parts=QKV)
    assert layouts["attn.proj.weight"] == layouts["fc1.weight"] == Layout("linear")
    assert layouts_of_names(shapes_of(block)) == layouts


def test_gpt2_blocks_have_their_outputs_last_and_cross_attention_has_no_queries_in_c_attn():
    own = module("GPT2Attention", num_heads=2, c_attn=Conv1D(24, 8), c_proj=Conv1D(8, 8))
    cross = module("GPT2Attention", num_heads=2, c_attn=Conv1D(24, 12), q_attn=Conv1D(12, 12), c_proj=Conv1D(12, 12))
    net = nn.ModuleDict({"wte": nn.Embedding(6, 8), "attn": own, "cross": cross})
    layouts = weight_layouts(net)
    assert layouts["attn.c_attn.weight"] == Layout("fused attention", parts=QKV, part_dim=1)
    assert layouts["cross.c_attn.weight"] == Layout("fused attention", parts=("key", "value"), part_dim=1)
    assert layouts_of_names(shapes_of(net)) == layouts
    value = layouts["attn.c_attn.weight"].pieces(own.c_attn.weight)["value"]
    assert torch.equal(value, own.c_attn.weight[:, 16:])


def test_nanogpt_has_its_outputs_first():
    attention = module("CausalSelfAttention", n_head=2, c_attn=linear(24, 8), c_proj=linear(8, 8))
    attention.register_buffer("bias", torch.ones(1, 1, 4, 4))
    net = nn.ModuleDict({"attn": attention})
    assert weight_layouts(net)["attn.c_attn.weight"] == Layout("fused attention", parts=QKV)
    assert layouts_of_names(shapes_of(net)) == weight_layouts(net)


@pytest.mark.parametrize("where", ["module", "config"])
def test_grouped_queries_are_cut_unequally(where):
    # Phi-3: 4 query heads, 2 key heads, of 2 rows each; 16 is also no multiple of 3.
    numbers = {"num_attention_heads": 4, "num_key_value_heads": 2}
    numbers = numbers if where == "module" else {"config": SimpleNamespace(**numbers)}
    attention = module("Phi3Attention", qkv_proj=linear(16, 8), o_proj=linear(8, 8), **numbers)
    layouts = weight_layouts(nn.ModuleDict({"a": attention}))
    assert layouts["a.qkv_proj.weight"] == Layout("fused attention", parts=QKV, sizes=(8, 4, 4))
    assert layouts_of_names(shapes_of(nn.ModuleDict({"a": attention}))) == layouts
    pieces = layouts["a.qkv_proj.weight"].pieces(attention.qkv_proj.weight)
    assert [tuple(piece.shape) for piece in pieces.values()] == [(8, 8), (4, 8), (4, 8)]


def test_a_length_that_three_divides_is_no_proof_of_equal_parts():
    # 12 = 8 + 2 + 2, of which nothing but the output projection tells.
    attention = module(qkv_proj=linear(12, 8), o_proj=linear(8, 8))
    net = nn.ModuleDict({"a": attention})
    assert weight_layouts(net)["a.qkv_proj.weight"].sizes == (8, 2, 2)
    assert layouts_of_names(shapes_of(net)) == weight_layouts(net)
    assert layouts_of_names({"a.qkv.weight": (12, 8)})["a.qkv.weight"] == Layout("linear")


@pytest.mark.parametrize("kind", ["GPTNeoXAttention", "BloomAttention", "FalconAttention", "PersimmonAttention"])
def test_heads_that_follow_each_other_are_taken_apart(kind):
    # Rows: query, key, value of head 0, then of head 1, of 3 rows each.
    attention = module(kind, num_heads=2, query_key_value=linear(18, 6), dense=linear(6, 6))
    layout = weight_layouts(nn.ModuleDict({"a": attention}))["a.query_key_value.weight"]
    weight = attention.query_key_value.weight
    heads = weight.view(2, 3, 3, 6)
    for i, (name, piece) in enumerate(layout.pieces(weight).items()):
        assert name == QKV[i]
        assert torch.equal(piece, heads[:, i].reshape(6, 6))


def test_falcons_grouped_and_single_key_heads():
    grouped = module("FalconAttention", num_heads=4, num_kv_heads=2, query_key_value=linear(16, 8), dense=linear(8, 8))
    layout = weight_layouts(nn.ModuleDict({"a": grouped}))["a.query_key_value.weight"]
    weight = grouped.query_key_value.weight
    rows = weight.view(2, 4, 2, 8)
    pieces = layout.pieces(weight)
    assert torch.equal(pieces["query"], rows[:, :2].reshape(8, 8))
    assert torch.equal(pieces["value"], rows[:, 3].reshape(4, 8))
    single = module("FalconAttention", num_heads=4, num_kv_heads=1, query_key_value=linear(12, 8), dense=linear(8, 8))
    layout = weight_layouts(nn.ModuleDict({"a": single}))["a.query_key_value.weight"]
    assert torch.equal(layout.pieces(weight[:12])["key"], weight[8:10])


def test_what_is_not_known_to_be_cut_in_order_stays_whole():
    net = nn.ModuleDict(
        {
            "a": module("GLMAttention", num_heads=2, query_key_value=linear(24, 8), dense=linear(8, 8)),
            "b": module("CodeGenAttention", num_attention_heads=2, qkv_proj=linear(24, 8), out_proj=linear(8, 8)),
            "c": module("MambaMixer", in_proj=linear(32, 8), out_proj=linear(8, 16)),
            "d": module("FalconAttention", query_key_value=linear(24, 8), dense=linear(8, 8)),
        }
    )
    assert set(weight_layouts(net).values()) == {Layout("linear")}
    assert set(layouts_of_names(shapes_of(net)).values()) == {Layout("linear")}
    chosen = weight_layouts(net, {"a.query*": "qkv", "b.qkv*": "qkv*2"})
    assert (chosen["a.query_key_value.weight"].repeats, chosen["b.qkv_proj.weight"].repeats) == (1, 2)


def test_experts_and_broadcast_parameters():
    net = module(
        "Net",
        experts=module("MixtralExperts", down_proj=nn.Parameter(torch.randn(3, 4, 5))),
        pos_embed=nn.Parameter(torch.randn(1, 6, 4)),
        cls_token=nn.Parameter(torch.randn(1, 1, 4)),
        gamma=nn.Parameter(torch.randn(4)),
        layer_scale=nn.Parameter(torch.randn(4, 1, 1)),
    )
    layouts = weight_layouts(net)
    assert layouts["experts.down_proj"].blocks(net.experts.down_proj).shape == (3, 4, 5)
    assert layouts["pos_embed"].blocks(net.pos_embed).shape == (1, 6, 4)
    assert set(layouts) == {"experts.down_proj", "pos_embed"}
    assert layouts_of_names(shapes_of(net)) == layouts


@pytest.mark.parametrize("kind", ["weight", "spectral", "orthogonal", "old weight", "old spectral"])
def test_behind_a_parametrisation_it_is_the_effective_weight_that_counts(kind, recwarn):
    torch.manual_seed(0)
    parametrisations = nn.utils.parametrizations
    make = {
        "weight": parametrisations.weight_norm,
        "spectral": parametrisations.spectral_norm,
        "orthogonal": parametrisations.orthogonal,
        "old weight": nn.utils.weight_norm,
        "old spectral": nn.utils.spectral_norm,
    }[kind]
    net = nn.Sequential(make(nn.Linear(4, 3)), nn.ReLU(), nn.Linear(3, 2))
    recwarn.clear()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    if kind == "old weight":
        # The attribute is that of the last forward pass.
        with torch.no_grad():
            net[0].weight_g.mul_(2)
            before["0.weight_g"] *= 2
    assert list(weight_layouts(net)) == ["0.weight", "2.weight"]
    value = named_weights(net)["0.weight"].value()
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(part.training for part in net.modules())
    net.eval()
    inputs = torch.randn(5, 4)
    assert torch.allclose(net[0](inputs), inputs @ value.mT + net[0].bias, atol=1e-6)
    parameters = {name: tuple(p.shape) for name, p in net.named_parameters()}
    assert list(layouts_of_parameters(net, parameters)) == ["2.weight"]


def test_wrappers_prefixes_and_ties():
    shared = nn.Linear(4, 4, bias=False)
    net = nn.ModuleDict({"a": shared, "b": nn.Linear(4, 4), "c": shared})
    net["b"].weight = shared.weight
    assert list(weight_layouts(net)) == ["a.weight"]
    attention = nn.ModuleDict({"_orig_mod": module(num_heads=2, qkv=linear(12, 4), proj=linear(4, 4))})
    wrapped = nn.ModuleDict({"attn": attention})
    assert weight_layouts(wrapped)["attn.qkv.weight"].parts == QKV
    lora = module(num_heads=2, qkv=module("Lora", base_layer=linear(12, 4), lora_A=linear(2, 4)), proj=linear(4, 4))
    layouts = weight_layouts(nn.ModuleDict({"attn": lora}))
    assert layouts["attn.qkv.base_layer.weight"].parts == QKV
    assert layouts["attn.qkv.lora_A.weight"].parts == ()
    assert layouts_of_names(shapes_of(nn.ModuleDict({"attn": lora}))) == layouts
    compiled = torch.compile(nn.Sequential(nn.Linear(2, 3)))
    assert list(weight_layouts(compiled)) == ["0.weight"]


def test_lazy_parameters_have_no_matrix_yet():
    assert weight_layouts(nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2))).keys() == {"1.weight"}


def test_shapes_tell_depthwise_kernels_from_the_ends_of_a_grey_picture():
    blocks = [nn.Conv2d(8, 8, 3, groups=8, bias=False), nn.Conv2d(8, 8, 1)]
    for first, last in (
        (nn.Conv2d(1, 8, 3), nn.Conv2d(8, 2, 1)),
        (nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1)),
        (nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 1, 2)),
        (nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 1, 2, bias=False)),
    ):
        net = nn.Sequential(first, *blocks, last)
        layouts = layouts_of_names(shapes_of(net))
        assert [layout.groups for layout in layouts.values()] == [1, 8, 1, 1]
        assert [layout.groups for layout in weight_layouts(net).values()] == [1, 8, 1, 1]
    tokens = {"embed.weight": (9, 8), "conv1d.weight": (8, 1, 4), "head.weight": (9, 8)}
    assert layouts_of_names(tokens)["conv1d.weight"].groups == 8
    reconstructing = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 1, 2), nn.Conv2d(1, 2, 1))
    assert [layout.groups for layout in layouts_of_names(shapes_of(reconstructing)).values()] == [1, 1, 1]


def test_names_tell_embeddings_gains_and_what_is_no_weight():
    names = ("token_emb.weight", "mlp.weight", "norm1.weight", "attn_mask", "x.cos_cached", "x.bias", "other")
    layouts = layouts_of_names(dict.fromkeys(names, (5, 4)))
    kinds = {name: layout.kind for name, layout in layouts.items()}
    assert kinds == {"token_emb.weight": "embedding", "mlp.weight": "linear", "other": "other"}


def test_parameters_that_a_module_does_not_know_are_read_by_name():
    shapes = {"0.weight": (3, 2), "group0.1": (4, 5), "0.bias": (3,)}
    assert list(layouts_of_parameters(nn.Sequential(nn.Linear(2, 3)), shapes)) == ["0.weight", "group0.1"]


def test_overrides():
    net = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Linear(4, 6), nn.Linear(6, 2))
    layouts = weight_layouts(net, {"2.*": None, "0.weight": "circular:8x8", "*.weight": Layout("mine")})
    assert layouts == {"0.weight": Layout("convolution", circular=(8, 8)), "1.weight": Layout("mine")}
    shapes = {"a.weight": (4, 2, 3), "b": (6, 3, 2), "c.weight": (4, 6)}
    layouts = layouts_of_names(shapes, {"a*": "groups:2", "b": "stack", "c*": "qkv:1*2"})
    assert layouts["a.weight"] == Layout("convolution", groups=2)
    assert layouts["b"].blocks(torch.zeros(6, 3, 2)).shape == (6, 3, 2)
    weight = torch.arange(24.0).reshape(4, 6)
    assert torch.equal(layouts["c.weight"].pieces(weight)["key"], weight[:, [1, 4]])
    net = {"x.weight": (4, 3, 3), "d.weight": (4, 1, 3), "y.weight": (2, 4, 1)}
    depthwise = layouts_of_names(net, {"d*": "circular:5"})
    assert depthwise["d.weight"] == Layout("convolution", groups=4, circular=(5,))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"*": "qvk"}, r"'\*' is said to be 'qvk'; choose a Layout, None or one of \"linear\", \"qkv\""),
        ({"*": 3}, r"is said to be 3; choose"),
        ({"*": "groups:0"}, r"is said to be 'groups:0'; choose"),
        ({"nothing*": "linear"}, r"'nothing\*' matches no weight of two or more dimensions; there are: 0.weight"),
        (
            {"0.*": "groups:3"},
            r"'0.\*' is not possible for 0.weight of shape \(4, 2\): its 4 rows are not 3 equal groups",
        ),
        ({"0.*": "qkv"}, r"dimension 0 of length 4 is not query, key, value"),
        ({"0.*": "qkv:5"}, r"it has 2 dimensions"),
        ({"0.*": "stack"}, r"it has 2 dimensions"),
        ({"0.*": "circular:4x4"}, r"its kernel \(\) does not fit into an input of size \(4, 4\)"),
        ({"0.*": Layout(parts=("a", "b"), sizes=(3, 2))}, r"dimension 0 of length 4 is not a, b"),
        ({"0.*": "qkv*3"}, r"dimension 0 of length 4 is not 3 times query, key, value"),
    ],
)
def test_overrides_that_are_wrong_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        weight_layouts(nn.Sequential(nn.Linear(2, 4)), overrides)


def test_short_forms_are_checked_without_a_module():
    check_overrides({"*": "qkv", "x": None})
    with pytest.raises(ValueError, match="is said to be 'qvk'"):
        check_overrides({"*": "qvk"})
