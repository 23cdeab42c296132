"""Adapters of the real PEFT, in modules and in files."""

import copy
import json

import peft
import pytest
import torch
from torch import nn

from lightning_lowrank import MergeError, MergePolicy, merge_checkpoints, merge_modules
from lightning_lowrank.cli import main


class Backbone(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(9, 8)
        self.q = nn.Linear(8, 8)
        self.conv = nn.Conv1d(8, 6, 3, padding=1)
        self.out = nn.Linear(6, 4)

    def forward(self, tokens):
        hidden = self.q(self.embed(tokens)).relu()
        return self.out(self.conv(hidden.mT).relu().mT)


def adapted(seed, rank=2, alpha=8, **options):
    """A backbone with an adapter of random factors."""
    targets = options.pop("target_modules", ["embed", "q", "conv", "out"])
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, **options)
    model = peft.get_peft_model(Backbone(), config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(generator=generator, std=0.3)
    return model


def weights(model):
    """The effective weights, by PEFT's own merging."""
    merged = copy.deepcopy(model).merge_and_unload()
    return {name: tensor.double() for name, tensor in merged.state_dict().items()}


def expected_weights(models, coefficients):
    start = {name: tensor.double() for name, tensor in Backbone().state_dict().items()}
    found = [weights(model) for model in models]
    return {
        name: w0 + sum(c * (w[name] - w0) for c, w in zip(coefficients, found, strict=True))
        for name, w0 in start.items()
    }


def assert_close(found, expected):
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5, msg=name)


SETTINGS = [
    ({}, {}),
    ({"rank": 2, "alpha": 8}, {"rank": 3, "alpha": 4}),
    ({"use_rslora": True}, {"rank": 4}),
    ({"rank_pattern": {"q": 4}, "alpha_pattern": {"out": 2}}, {"alpha": 3}),
]


@pytest.mark.parametrize(("one", "two"), SETTINGS)
def test_adapted_modules_merge_to_the_sum_of_the_updates(one, two):
    models = [adapted(1, **one), adapted(2, **two)]
    merged = merge_modules(*models, coefficients=[1.0, 0.5])
    assert_close(weights(merged), expected_weights(models, [1.0, 0.5]))
    tokens = torch.arange(6)[None]
    torch.testing.assert_close(merged(tokens), copy.deepcopy(merged).merge_and_unload()(tokens), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("one", "two"), SETTINGS)
def test_adapters_in_folders_merge_to_an_adapter(tmp_path, one, two):
    models = [adapted(1, **one), adapted(2, **two)]
    for number, model in enumerate(models):
        model.save_pretrained(tmp_path / str(number))
    (tmp_path / "merged").mkdir()
    out = tmp_path / "merged" / "adapter_model.safetensors"
    merge_checkpoints([tmp_path / "0", tmp_path / "1"], out, coefficients=[1.0, 0.5])
    loaded = peft.PeftModel.from_pretrained(Backbone(), str(tmp_path / "merged"))
    assert_close(weights(loaded), expected_weights(models, [1.0, 0.5]))


def test_truncated_adapters_have_the_rank_that_was_asked_for(tmp_path):
    models = [adapted(1), adapted(2, rank=3)]
    for number, model in enumerate(models):
        model.save_pretrained(tmp_path / str(number))
    (tmp_path / "merged").mkdir()
    out = tmp_path / "merged" / "adapter_model.safetensors"
    report = merge_checkpoints([tmp_path / "0", tmp_path / "1"], out, policy=MergePolicy(lora_rank=2))
    config = json.loads((tmp_path / "merged" / "adapter_config.json").read_text())
    assert config["r"] == 2
    assert not config["rank_pattern"]
    assert not any("base models" in note or "build the module" in note for note in report.notes)
    assert sum("truncation left out" in note for note in report.notes) == 4
    loaded = peft.PeftModel.from_pretrained(Backbone(), str(tmp_path / "merged"))
    whole, start, found = expected_weights(models, [1, 1]), Backbone().state_dict(), weights(loaded)
    for name in ("q.weight", "out.weight"):
        update = whole[name] - start[name].double()
        u, sigma, v = torch.linalg.svd(update, full_matrices=False)
        nearest = u[:, :2] * sigma[:2] @ v[:2]
        torch.testing.assert_close(found[name] - start[name].double(), nearest, rtol=1e-4, atol=1e-4)


def test_summing_factors_instead_has_cross_terms():
    """What PEFT's own "linear" combination does; the reason why factors are concatenated here."""
    model = adapted(1, target_modules=["q"])
    model.add_adapter("second", peft.LoraConfig(r=2, lora_alpha=8, target_modules=["q"]))
    torch.nn.init.normal_(model.base_model.model.q.lora_B["second"].weight)
    layer = model.base_model.model.q
    exact = sum(layer.get_delta_weight(name) for name in ("default", "second"))
    model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "summed", combination_type="linear")
    relative = (layer.get_delta_weight("summed") - exact).norm() / exact.norm()
    assert relative > 0.3
    # The two adapters, as two networks.
    one, two = adapted(1, target_modules=["q"]), adapted(1, target_modules=["q"])
    for side in ("lora_A", "lora_B"):
        source = getattr(layer, side)["second"].weight
        getattr(two.base_model.model.q, side)["default"].weight.data.copy_(source)
    merged = merge_modules(one, two).base_model.model.q
    torch.testing.assert_close(merged.get_delta_weight("default"), exact, rtol=1e-5, atol=1e-6)


def test_mistakes_with_adapters_are_told(tmp_path, capsys):
    adapted(1).save_pretrained(tmp_path / "a")
    adapted(2).save_pretrained(tmp_path / "b")
    words = ["merge", str(tmp_path / "a"), str(tmp_path / "b"), "-o"]
    assert main([*words, str(tmp_path / "m.safetensors")]) == 1
    assert "a merged adapter must be called adapter_model.safetensors" in capsys.readouterr().err
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "adapter_config.json").write_text("{}")
    assert main([*words, str(tmp_path / "m" / "adapter_model.safetensors")]) == 1
    assert "adapter_config.json' exists" in capsys.readouterr().err
    torch.save(Backbone().state_dict(), tmp_path / "full.pt")
    with pytest.raises(MergeError, match="some of the networks are PEFT adapters and some are not"):
        merge_checkpoints([tmp_path / "a", tmp_path / "full.pt"], tmp_path / "x.pt")
    config = tmp_path / "b" / "adapter_config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps({**content, "base_model_name_or_path": "another"}))
    (tmp_path / "n").mkdir()
    report = merge_checkpoints([tmp_path / "a", tmp_path / "b"], tmp_path / "n" / "adapter_model.safetensors")
    assert any(note.startswith("the adapters name different base models: ") for note in report.notes)
    config.write_text(json.dumps({**content, "use_dora": True}))
    with pytest.raises(MergeError, match="only plain LoRA adapters are merged, and this one uses use_dora"):
        merge_checkpoints([tmp_path / "a", tmp_path / "b"], tmp_path / "x.safetensors")
    config.write_text("[]")
    with pytest.raises(ValueError, match="is not the configuration of a LoRA adapter"):
        merge_checkpoints([tmp_path / "a", tmp_path / "b"], tmp_path / "x.safetensors")


@pytest.mark.parametrize(("one", "two"), SETTINGS)
def test_a_merged_module_can_be_saved_and_loaded_by_peft(tmp_path, one, two):
    models = [adapted(1, **one), adapted(2, **two)]
    merge_modules(*models).save_pretrained(tmp_path / "merged")
    loaded = peft.PeftModel.from_pretrained(Backbone(), str(tmp_path / "merged"))
    assert_close(weights(loaded), expected_weights(models, [1.0, 1.0]))
    assert models[0].peft_config["default"].r == one.get("rank", 2)


def test_weight_decomposed_updates_are_refused():
    models = [adapted(seed, use_dora=True, target_modules=["q"]) for seed in (1, 2)]
    with pytest.raises(MergeError, match=r"lora_magnitude_vector.*: DoRA's updates have no sum in their factors"):
        merge_modules(*models)
