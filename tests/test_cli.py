"""``lightning-lowrank inspect`` as a user runs it."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import torch
from torch import nn

from lightning_lowrank import WeightReport, inspect_weights
from lightning_lowrank.cli import main
from tests.conftest import mlp
from tests.test_inspection import bad_files


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": mlp((20, 30, 10, 3)).state_dict()}, path)
    return path


def test_it_prints_the_table_and_writes_report_and_figure(checkpoint, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    code = main(["inspect", str(checkpoint), "--json", "out.json", "--figure", "out.png"])
    out, err = capsys.readouterr()
    expected = inspect_weights(checkpoint)
    assert (code, err) == (0, "")
    assert out.rstrip() == str(expected)
    assert WeightReport.load(tmp_path / "out.json") == expected or repr(WeightReport.load("out.json")) == repr(expected)
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.ckpt", "out.json", "out.png"]


@pytest.mark.parametrize(
    "matrices",
    [
        ["--matrices", "0.*=groups:5", "4.*=none"],
        ["--matrices", '{"0.*": "groups:5", "4.*": null}'],
        ["--matrices", '{"0.*": "groups:5"}', "4.*=none"],
    ],
)
def test_options_are_those_of_inspect_weights(checkpoint, matrices, capsys):
    assert main(["inspect", str(checkpoint), *matrices, "--fast", "--exclude", "2.*", "--json", "out.json"]) == 0
    [row] = WeightReport.load("out.json").matrices
    assert (row.name, row.groups, row.shape, row.singular_values) == ("0.weight", 5, (6, 20), ())
    assert math.isnan(row.effective_rank)
    assert main(["inspect", str(checkpoint), "--include", "0.*", "4.*", "--json", "out.json"]) == 0
    assert [row.name for row in WeightReport.load("out.json").matrices] == ["0.weight", "4.weight"]


def test_what_is_not_finite_is_a_note_and_no_failure(tmp_path, capsys):
    torch.save({"a": torch.full((2, 2), math.nan), "b": torch.eye(2)}, tmp_path / "nan.pt")
    assert main(["inspect", str(tmp_path / "nan.pt")]) == 0
    out, err = capsys.readouterr()
    assert "Note: entries that are not finite, so values are NaN: a" in out
    assert err == ""


def test_unreadable_files_end_in_one_sentence_and_leave_nothing_behind(tmp_path, capsys):
    files = bad_files(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for name in files:
        assert main(["inspect", str(tmp_path / name), "--json", "out.json", "--figure", "out.png"]) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert len(err.splitlines()) == 1
        assert err.startswith("lightning-lowrank inspect: ")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--matrices", "0.*"], "--matrices takes pattern=kind, as '*.attn.weight=qkv', got '0.*'"),
        (["--matrices", "{0"], "--matrices '{0' is not JSON"),
        (["--matrices", "0.*=cube"], "'0.*' is said to be 'cube'; choose a Layout, None or one of \"linear\""),
        (["--matrices", "nothing=qkv"], "'nothing' matches no weight of two or more dimensions"),
        (["--include", "nothing"], "'nothing' matches no weight matrix; there are: 0.weight"),
        (["--json", "out.txt"], "'out.txt' should end in .json"),
        (["--figure", "out.jpg"], "'out.jpg' should end in .png or .pdf or .svg"),
        (["--figure", "nowhere/out.png"], "there is no folder 'nowhere'; make it first"),
    ],
)
def test_wrong_arguments_end_in_one_sentence_and_leave_nothing_behind(checkpoint, tmp_path, capsys, arguments, message):
    assert main(["inspect", str(checkpoint), *arguments]) == 1
    _, err = capsys.readouterr()
    assert message in err
    assert len(err.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model.ckpt"]


def test_a_figure_needs_matplotlib_and_says_so(checkpoint, monkeypatch, capsys):
    monkeypatch.setattr("lightning_lowrank.cli.find_spec", lambda name: None)
    assert main(["inspect", str(checkpoint), "--figure", "out.png"]) == 1
    assert "figures need matplotlib: pip install 'lightning-lowrank[examples]'" in capsys.readouterr().err


def test_as_a_process_on_a_file_of_safetensors(tmp_path):
    from safetensors.torch import save_file

    save_file(nn.Linear(3, 4).state_dict(), tmp_path / "a.safetensors")
    command = [sys.executable, "-m", "lightning_lowrank.cli", "inspect", "a.safetensors", "--json=out.json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "1 matrices, 12 entries" in done.stdout
    assert json.loads((tmp_path / "out.json").read_text())["schema_version"] == 1
