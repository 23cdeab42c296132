"""The package as a whole: what it exports, what it needs, what it says of itself."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import lightning_lowrank

ROOT = Path(__file__).parents[1]


def test_core_imports_without_wandb_matplotlib_torchvision_sklearn_and_tensorboard():
    absent = ["wandb", "matplotlib", "torchvision", "sklearn", "tensorboard", "pandas"]
    code = f"""
import sys
from importlib.machinery import PathFinder
class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in {absent} else PathFinder.find_spec(name, path, target)
    @classmethod
    def find_distributions(cls, context):
        return [] if context.name in {absent} else PathFinder.find_distributions(context)
sys.meta_path = [Without if finder is PathFinder else finder for finder in sys.meta_path]
import lightning_lowrank, lightning_lowrank.cli, lightning_lowrank.functional
print(lightning_lowrank.LowRankMonitor())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "LowRankMonitor" in done.stdout


def test_importing_is_silent():
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", "import lightning_lowrank"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_public_names_exist_and_are_described():
    for name in lightning_lowrank.__all__:
        assert getattr(lightning_lowrank, name).__doc__
    for name in lightning_lowrank.functional.__all__:
        assert "Example" in getattr(lightning_lowrank.functional, name).__doc__ or name in (
            "InnerProducts",
            "SpectralNorm",
        )


def test_version_is_that_of_the_metadata():
    assert lightning_lowrank.__version__ == version("lightning-lowrank")


def test_the_documents_name_every_logged_key():
    from lightning_lowrank.callbacks._keys import Keys

    keys = Keys("window", True, True, frozenset({"linf", "spectral"}), "full", True)
    text = (ROOT / "docs" / "metrics.md").read_text()
    for key in keys.scalars:
        assert f"`{key}`" in text, key
    for key in keys.of_layers:
        assert f"`{key}/<name>`" in text, key
