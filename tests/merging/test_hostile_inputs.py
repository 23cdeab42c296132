"""Files that attack or are damaged, given to a merge: one sentence, exit code 1, no code run, nothing left behind."""

from pathlib import Path

import pytest
import torch

from lightning_lowrank.cli import main
from tests.hostile import FILES, TRACE


@pytest.mark.parametrize("name", FILES)
def test_a_hostile_file_makes_no_output(name, tmp_path, capsys):
    make, _ = FILES[name]
    make(tmp_path / name)
    torch.save({"weight": torch.ones(2, 2)}, tmp_path / "good.pt")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for order in ([tmp_path / name, tmp_path / "good.pt"], [tmp_path / "good.pt", tmp_path / name]):
        assert main(["merge", *map(str, order), "-o", str(tmp_path / "out.pt")]) == 1
        printed = capsys.readouterr()
        assert printed.err.startswith("lightning-lowrank merge: ")
        assert printed.err.count("\n") == 1
        assert str(tmp_path) in printed.err
        assert printed.out == ""
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert not Path(TRACE).exists()
