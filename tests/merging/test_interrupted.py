"""Merges in real processes that are stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lightning_lowrank.cli import main

ROOT = Path(__file__).parents[2]


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_merges_leave_no_damaged_output(tmp_path):
    command = [sys.executable, "-m", "tests.merging.killed", "--folder", tmp_path, "--times", "15", "--megabytes", "20"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=environment())
    counts = json.loads(done.stdout)
    assert counts["damaged"] == counts["changed_inputs"] == 0
    assert counts["whole"] + counts["absent"] == 15
    # The check means something: merges were caught in the act.
    assert counts["stopped_while_writing"] > 0


# The command, held up when the file is written and before it has its name.
HELD_UP = """
import sys, time
from pathlib import Path
from lightning_lowrank import cli
from lightning_lowrank.merging import checkpoints

original = checkpoints._write

def write(*arguments):
    notes = original(*arguments)
    Path("written").touch()
    time.sleep(100)
    return notes

checkpoints._write = write
sys.exit(cli.main(["merge", "0.pt", "1.pt", "-o", "m.pt"]))
"""


@pytest.mark.parametrize("end", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_an_ended_command_cleans_up(tmp_path, pair, end):
    before = {path.name for path in tmp_path.iterdir()}
    process = subprocess.Popen(
        [sys.executable, "-c", HELD_UP],
        cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (tmp_path / "written").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [*tmp_path.glob(".m.pt.*.tmp/m.pt")]
    process.send_signal(getattr(signal, end))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.strip() == "lightning-lowrank merge: interrupted"
    assert {path.name for path in tmp_path.iterdir()} == before | {"written"}


@pytest.fixture
def pair(tmp_path):
    for seed in range(2):
        torch.manual_seed(seed)
        torch.save({"a.weight": torch.randn(3, 3), "a.bias": torch.randn(3)}, tmp_path / f"{seed}.pt")
    return [str(tmp_path / "0.pt"), str(tmp_path / "1.pt")]


def test_the_command_merges_and_tells_what_it_did(tmp_path, pair, capsys):
    out = tmp_path / "m.pt"
    assert (
        main(
            [
                "merge",
                *pair,
                "-o",
                str(out),
                "--coefficients",
                "0.5",
                "2",
                "--rule",
                "bias=mean",
                "--rule",
                "*.weight=sum",
            ]
        )
        == 0
    )
    printed = capsys.readouterr()
    assert printed.out.startswith("m.pt (0.0 MB): 0.pt, 1.pt merged; 1 linear: sum, 1 bias: mean")
    assert printed.err == ""
    states = [torch.load(path) for path in pair]
    merged = torch.load(out)
    torch.testing.assert_close(merged["a.weight"], 0.5 * states[0]["a.weight"] + 2 * states[1]["a.weight"])
    torch.testing.assert_close(merged["a.bias"], (states[0]["a.bias"] + states[1]["a.bias"]) / 2)
    command = json.loads((tmp_path / "m.pt.card.json").read_text())["card"]["command"]
    assert command.startswith("lightning-lowrank merge ")
    assert "--rule bias=mean --rule '*.weight=sum'" in command


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path, pair, capsys):
    before = sorted(path.name for path in tmp_path.iterdir())
    assert main(["merge", *pair, "-o", str(tmp_path / "m.pt"), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "a.weight  3x3    float32  linear  sum" in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--coefficients", "1"], "coefficients must be 2 finite numbers, one per network"),
        (["--rule", "bias"], "--rule takes a pattern of names or a kind, and a rule"),
        (["--rule", "bias=max"], "there is no rule 'max'"),
        (["--rule", "nothing.*=first"], "the policy's pattern 'nothing.*' matches no tensor"),
        (["--base", "missing.pt"], "there is no file or folder 'missing.pt'"),
        (["--raw"], "WeightAveraging"),
        (["--lora-rank", "0"], "lora_rank must be a positive integer"),
        (["--evaluation", "missing.json"], "missing.json"),
    ],
)
def test_mistakes_end_in_one_sentence(tmp_path, pair, capsys, extra, message):
    assert main(["merge", *pair, "-o", str(tmp_path / "m.pt"), *extra]) == 1
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.startswith("lightning-lowrank merge: ")
    assert printed.err.count("\n") == 1
    assert not (tmp_path / "m.pt").exists()
