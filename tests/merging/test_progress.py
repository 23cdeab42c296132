"""The progress bar of evaluations."""

import re
import sys

import pytest
from torch.utils.data import IterableDataset

from lightning_lowrank import WeightSumMerger
from lightning_lowrank.merging.progress import PassBar
from tests.conftest import make_trainer
from tests.merging.test_evaluation import pair, task_loader

LOADERS = {"cats": task_loader(0), "dogs": task_loader(1)}


def shown(monkeypatch, capsys, terminal, **options):
    """What an evaluation prints to standard error."""
    monkeypatch.setenv("TTY_COMPATIBLE", "1" if terminal else "0")
    monkeypatch.setenv("TTY_INTERACTIVE", "1")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    WeightSumMerger(make_trainer(), **options).evaluate(*pair(), LOADERS)
    printed = capsys.readouterr()
    assert "cats" not in printed.out
    return printed.err


def test_one_bar_names_each_pass_and_reaches_the_end(monkeypatch, capsys):
    states = []
    update = PassBar._end

    def end(self):
        update(self)
        [task] = self._progress.tasks
        states.append((task.description, task.completed, task.total))

    monkeypatch.setattr(PassBar, "_end", end)
    printed = shown(monkeypatch, capsys, terminal=True)
    models = ("m1", "m2", "sum", "average", "ensemble")
    expected = [f"cats: {model}" for model in models]
    expected += [f"dogs: {model}" for model in ("m2", "m1", "sum", "average", "ensemble")]
    assert [state[0] for state in states] == expected
    assert [state[1:] for state in states] == [(number, 10) for number in range(1, 11)]
    assert re.search("dogs: ", printed)


def test_what_is_printed_meanwhile_stays_where_it_belongs(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    one, two = pair()
    one.on_test_start = lambda: print("printed by the module")
    WeightSumMerger(make_trainer()).evaluate(one, two, LOADERS)
    assert "printed by the module" in capsys.readouterr().out


@pytest.mark.parametrize(("terminal", "progress"), [(True, False), (False, None)])
def test_there_is_none_where_it_is_not_wanted(monkeypatch, capsys, terminal, progress):
    assert "cats" not in shown(monkeypatch, capsys, terminal, progress=progress)


def test_batches_move_it_where_their_number_is_known():
    bar = PassBar(False)
    bar.expect(2)
    bar._begin([4])
    for _ in range(2):
        bar._batch()
    assert bar._progress.tasks[0].completed == 0.5
    bar._end()
    bar._begin([float("inf")])
    bar._batch()
    assert bar._progress.tasks[0].completed == 1
    bar._end()
    assert bar._progress.tasks[0].completed == bar._progress.tasks[0].total == 2


def test_sweeps_and_streams(monkeypatch, capsys):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(LOADERS["cats"].dataset)

    from torch.utils.data import DataLoader

    loaders = {"cats": DataLoader(Stream(), batch_size=8), "dogs": LOADERS["dogs"]}
    sweep = WeightSumMerger(make_trainer(), progress=True).sweep(*pair(), loaders, candidates=[[1, 1], [0.5, 0.5]])
    assert len(sweep.values) == 2
