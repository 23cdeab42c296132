"""The demo as a user runs it, with the claims that the README makes for it."""

import csv
import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

FIRST = "net.0.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    output = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "lightning_lowrank.cli", "demo", "--seeds", *"01234", f"--output={output}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=output, check=False)
    assert done.returncode == 0, done.stderr
    (output / "stdout.txt").write_text(done.stdout)
    return output


@pytest.fixture(scope="module")
def pairs(folder):
    found = json.loads((folder / "report.json").read_text())["pairs"]
    return {decays: [p for p in found if bool(p["weight_decay"]) is decays] for decays in (True, False)}


def lost(pair):
    """Points that the sum loses against each task's own network."""
    tasks, metrics = pair["report"]["tasks"], pair["report"]["metrics"]
    return [100 * (metrics[f"{task}/{own}/test_acc"] - metrics[f"{task}/sum/test_acc"]) for task, own in tasks.items()]


def mean(pairs, key):
    return statistics.fmean(value for pair in pairs for value in pair[key].values())


def test_with_decay_the_networks_are_stationary_balanced_and_of_low_rank(pairs):
    for pair in pairs[True]:
        for layers in pair["alignment"].values():
            assert len(layers) == 3
            assert layers[FIRST] >= 0.95
            assert min(value for name, value in layers.items() if name != FIRST) >= 0.98
        assert max(pair["norm_spread"].values()) <= 1.03
        assert max(pair["stable_rank"].values()) <= 4


def test_with_decay_the_sum_loses_next_to_nothing(pairs):
    first_three = [pair for pair in pairs[True] if pair["seed"] < 3]
    for task in (0, 1):
        assert statistics.fmean(lost(pair)[task] for pair in first_three) <= 0.5


def test_without_decay_rank_and_leak_stay_and_the_sum_loses(pairs):
    assert [pair["seed"] for pair in pairs[False]] == [0, 1, 2, 3, 4]
    assert mean(pairs[False], "stable_rank") >= 5 * mean(pairs[True], "stable_rank")
    assert mean(pairs[False], "leak") >= 10 * mean(pairs[True], "leak")
    assert statistics.fmean(max(lost(pair)) for pair in pairs[False]) >= 2


def test_files_and_table(folder, pairs):
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len({row["run"] for row in rows}) == 20
    last = [row for row in rows if row["run"] == "seed0-wd0.005-digits-0-4"][-1]
    logged = float(last[f"lowrank/alignment/{FIRST}"])
    assert logged == pytest.approx(pairs[True][0]["alignment"]["digits 0-4"][FIRST], rel=1e-5)
    assert (folder / "demo.png").read_bytes().startswith(b"\x89PNG")
    printed = (folder / "stdout.txt").read_text()
    assert "On its worse task the sum loses" in printed
    assert "Wrote report.json, metrics.csv and demo.png" in printed


def test_a_missing_dependency_and_an_unusable_folder_end_in_one_sentence(tmp_path):
    hide = "import sys; sys.modules['sklearn.datasets'] = None"
    hidden = f"{hide}; from lightning_lowrank import cli; sys.exit(cli.main(['demo']))"
    blocked = Path(tmp_path / "file")
    blocked.write_text("")
    demo = [sys.executable, "-m", "lightning_lowrank.cli", "demo"]
    for command, message in (
        ([sys.executable, "-c", hidden], "the demo needs scikit-learn: pip install 'lightning-lowrank[examples]'"),
        ([*demo, f"--output={blocked / 'below'}"], "Not a directory"),
    ):
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
        assert done.returncode == 1
        assert message in done.stderr
        assert "Traceback" not in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "code", "message"), [(["--help"], 0, "demo"), (["nothing"], 2, "nothing"), ([], 2, "")]
)
def test_usage(arguments, code, message):
    command = [sys.executable, "-m", "lightning_lowrank.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert message in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
