"""Split a data set's classes into two tasks, train one network per task, sum their weights, and see what is lost.

    python examples/split_task.py --data digits --inputs disjoint
    python examples/split_task.py --data mnist --inputs raw --model mlp --depth 1 --weight-decay 5e-3
    python examples/split_task.py --data folder:my-images --model cnn --logger wandb

Copy what you need: ``SplitDataModule`` and ``Classifier`` are ordinary Lightning classes, and the lines that belong to
lightning_lowrank are the ``LowRankMonitor()`` in ``train`` and the ``WeightSumMerger`` in ``main``.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import auto_cli
from jsonargparse.typing import NonNegativeInt, PositiveInt
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_lowrank import LowRankMonitor, WeightSumMerger

Inputs = Literal["raw", "centered", "disjoint"]
Model = Literal["mlp", "linear", "cnn"]
Split = tuple[Tensor, Tensor]  # images in [0, 1], shape (samples, channels, height, width), and their labels


class DataUnavailableError(Exception):
    """The data is not there and can't be had; the message says what to do."""


class SplitDataModule(LightningDataModule):
    """One half of a data set's classes, the lower or the upper.

    Args:
        train: Images and labels of all classes.
        test: Images and labels of all classes.
        half: 0 for the lower classes, 1 for the upper.
        inputs: What the network sees. "raw": the images. "centered": the images minus the mean training image of all
            classes. "disjoint": twice as many channels, of which each half uses its own, so that inputs of different
            halves are orthogonal, and so are their patches.
        batch_size: Training images per step.
    """

    def __init__(self, train: Split, test: Split, half: int, inputs: Inputs = "raw", batch_size: int = 256) -> None:
        super().__init__()
        self.half = half
        self.inputs = inputs
        self.batch_size = batch_size
        self.classes = int(train[1].max()) + 1
        self.mean = train[0].mean(0)
        self.train, self.test = (self.task(*split) for split in (train, test))

    def task(self, images: Tensor, labels: Tensor) -> TensorDataset:
        """The half's samples, with inputs as the network sees them."""
        upper = labels >= (self.classes + 1) // 2
        mine = upper if self.half else ~upper
        images, labels = images[mine], labels[mine]
        if self.inputs == "centered":
            images = images - self.mean
        elif self.inputs == "disjoint":
            nothing = torch.zeros_like(images)
            images = torch.cat([nothing, images] if self.half else [images, nothing], dim=1)
        return TensorDataset(images, labels)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test, batch_size=1000)


class Classifier(LightningModule):
    """A network without biases, trained by SGD with weight decay.

    Args:
        model: "mlp" (ReLU), "linear" (the same without ReLU) or "cnn" (3x3 convolutions with ReLU and average pooling).
        channels: Of the input images.
        size: Height (and width) of the input images.
        classes: Outputs; both halves' classes, so that two networks can be summed.
        depth: Hidden layers.
        width: Units of a hidden layer, or channels of a convolution.
        learning_rate: At the start; it falls to 0 along a cosine.
        weight_decay: Coefficient of the L2 penalty as torch.optim means it.
        max_epochs: Length of the cosine.
    """

    def __init__(
        self,
        model: Model,
        channels: int,
        size: int,
        classes: int,
        depth: int = 1,
        width: int = 512,
        learning_rate: float = 0.2,
        weight_decay: float = 5e-3,
        max_epochs: int = 40,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        layers: list[nn.Module] = []
        if model == "cnn":
            for layer in range(depth):
                layers += [nn.Conv2d(width if layer else channels, width, 3, padding=1, bias=False), nn.ReLU()]
                layers += [nn.AvgPool2d(2, ceil_mode=True)]
            layers += [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, classes, bias=False)]
        else:
            layers += [nn.Flatten()]
            for layer in range(depth):
                layers += [nn.Linear(width if layer else channels * size**2, width, bias=False)]
                layers += [nn.ReLU()] if model == "mlp" else []
            layers += [nn.Linear(width, classes, bias=False)]
        self.net = nn.Sequential(*layers)
        gain = "linear" if model == "linear" else "relu"
        for weight in self.net.parameters():
            nn.init.kaiming_normal_(weight, nonlinearity=gain)
        self.accuracy = MulticlassAccuracy(num_classes=classes, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: Split, batch_idx: int) -> Tensor:
        images, labels = batch
        loss = nn.functional.cross_entropy(self(images), labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def test_step(self, batch: Split, batch_idx: int) -> None:
        images, labels = batch
        logits = self(images)
        self.accuracy(logits, labels)
        self.log("test_loss", nn.functional.cross_entropy(logits, labels))
        self.log("test_acc", self.accuracy)

    def configure_optimizers(self) -> Any:
        p = self.hparams
        optimizer = torch.optim.SGD(self.parameters(), lr=p.learning_rate, momentum=0.9, weight_decay=p.weight_decay)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, p.max_epochs))]


def load(data: str, data_dir: Path) -> tuple[Split, Split]:
    """Train and test images of a data set: digits, mnist, fashion_mnist, cifar10 or folder:PATH.

    Raises:
        DataUnavailableError: If the files are neither there nor to be had.
    """
    if data == "digits":
        return load_digits()
    if data.startswith("folder:"):
        return load_folder(Path(data.removeprefix("folder:")))
    from torchvision import datasets

    known = {"mnist": datasets.MNIST, "fashion_mnist": datasets.FashionMNIST, "cifar10": datasets.CIFAR10}
    if data not in known:
        raise DataUnavailableError(f"--data {data} is not known; choose digits, {', '.join(known)} or folder:PATH")
    try:
        parts = [
            known[data](data_dir, train=train, download=not is_there(known[data], data_dir)) for train in (True, False)
        ]
    except Exception as error:  # torchvision raises URLError, RuntimeError, OSError and zipfile errors here
        raise DataUnavailableError(
            f"could not read or download {data} ({one_line(error)}); pass the folder that holds its files with"
            " --data-dir, or use --data digits, which needs no download"
        ) from error
    return to_split(parts[0].data, parts[0].targets), to_split(parts[1].data, parts[1].targets)


def is_there(dataset: Any, data_dir: Path) -> bool:
    """Whether torchvision finds the data set without a download."""
    try:
        dataset(data_dir, download=False)
    except RuntimeError:
        return False
    return True


def load_digits() -> tuple[Split, Split]:
    """scikit-learn's bundled 8 x 8 scans, 70 % to train and 30 % to test."""
    from sklearn.datasets import load_digits as bundled
    from sklearn.model_selection import train_test_split

    digits = bundled()
    parts = train_test_split(digits.images / 16, digits.target, test_size=0.3, random_state=0, stratify=digits.target)
    images = [torch.tensor(part, dtype=torch.float32).unsqueeze(1) for part in parts[:2]]
    labels = [torch.tensor(part, dtype=torch.long) for part in parts[2:]]
    return (images[0], labels[0]), (images[1], labels[1])


def load_folder(root: Path) -> tuple[Split, Split]:
    """An image folder with train/<class>/ and test/<class>/, all images brought to the size of the first."""
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    try:
        folders = [ImageFolder(root / part) for part in ("train", "test")]
        if folders[0].classes != folders[1].classes:
            raise FileNotFoundError(f"train/ has classes {folders[0].classes}, test/ has {folders[1].classes}")
        width, height = folders[0][0][0].size
        to_tensor = v2.Compose([v2.PILToTensor(), v2.Resize((min(height, width),) * 2, antialias=True)])
        splits = []
        for folder in folders:
            images = torch.stack([to_tensor(image) for image, _ in folder])
            splits.append(to_split(images.movedim(1, -1), folder.targets))
    except (OSError, ValueError) as error:
        raise DataUnavailableError(
            f"no usable image folder at {root} ({one_line(error)}); it needs train/<class>/ and test/<class>/ with the"
            " same classes; or pass --data-dir with a known data set, or --data digits"
        ) from error
    return splits[0], splits[1]


def to_split(images: Any, labels: Any) -> Split:
    """Images of 0 to 255, channels last or none, as torchvision's data sets keep them."""
    scaled = torch.as_tensor(images).float() / 255
    scaled = scaled.unsqueeze(1) if scaled.ndim == 3 else scaled.movedim(-1, 1)
    return scaled, torch.as_tensor(labels)


def one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def check_logger(kind: str) -> None:
    """Fail before training rather than after it where the logger's package is missing."""
    if kind in ("wandb", "tensorboard") and find_spec(kind) is None:
        raise ModuleNotFoundError(f"--logger {kind} needs a package: pip install {kind}")


def make_logger(kind: str, folder: Path, name: str) -> Logger | Literal[False]:
    """The logger of one run, everything below ``folder``."""
    if kind == "wandb":
        folder.mkdir(parents=True, exist_ok=True)
        return WandbLogger(project="lightning-lowrank", name=name, save_dir=folder)
    if kind == "tensorboard":
        return TensorBoardLogger(folder, name="", version=name)
    return CSVLogger(folder, name="", version=name) if kind == "csv" else False


def train(network: LightningModule, data: SplitDataModule, logger: Any, max_epochs: int, progress: bool) -> Trainer:
    """Ordinary training; the callback is all that lightning_lowrank adds."""
    trainer = Trainer(
        max_epochs=max_epochs,
        callbacks=[LowRankMonitor()],
        logger=logger,
        log_every_n_steps=10,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=progress,
    )
    trainer.fit(network, data)
    return trainer


def main(
    data: str = "digits",
    data_dir: Path = Path("data"),
    inputs: Inputs = "raw",
    model: Model = "mlp",
    depth: PositiveInt = 1,
    width: PositiveInt = 512,
    learning_rate: float = 0.2,
    weight_decay: float = 5e-3,
    batch_size: PositiveInt = 256,
    max_epochs: PositiveInt = 40,
    base_epochs: NonNegativeInt = 0,
    seed: int = 0,
    logger: Literal["csv", "wandb", "tensorboard", "none"] = "csv",
    output: Path = Path("split-task"),
    progress: bool = True,
) -> int:
    """Train one network per half of the classes, sum their weights, evaluate on both halves.

    Options may be written with dashes or underscores.

    Args:
        data: digits, mnist, fashion_mnist, cifar10 or folder:PATH (an image folder with train/ and test/).
        data_dir: Where torchvision's data sets are, or are downloaded to.
        inputs: raw, centered or disjoint.
        model: mlp, linear or cnn.
        depth: Hidden layers.
        width: Units of a hidden layer, or channels of a convolution.
        learning_rate: At the start; it falls to 0 along a cosine.
        weight_decay: Coefficient of the L2 penalty as torch.optim means it.
        batch_size: Training images per step.
        max_epochs: Epochs on each half.
        base_epochs: Epochs of a common start on all classes; the merge then adds up the changes since (base=).
        seed: Of the initialisation and the shuffling.
        logger: csv, wandb, tensorboard or none.
        output: Folder for logs and the report.
        progress: Whether to show progress bars.
    """
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    try:
        check_logger(logger)
        train_split, test_split = load(data, data_dir)
    except (DataUnavailableError, ModuleNotFoundError) as error:
        print(f"split_task: {error}", file=sys.stderr)
        return 1
    halves = [SplitDataModule(train_split, test_split, half, inputs, batch_size) for half in (0, 1)]
    channels, size = halves[0].train[0][0].shape[:2]

    def network(epochs: int) -> Classifier:
        return Classifier(
            model, channels, size, halves[0].classes, depth, width, learning_rate, weight_decay, max_epochs=epochs
        )

    base = None
    if base_epochs:
        seed_everything(seed)
        base = network(base_epochs)
        both = SplitDataModule(train_split, test_split, 0, inputs, batch_size)
        both.train = torch.utils.data.ConcatDataset([half.train for half in halves])
        train(base, both, make_logger(logger, output, "base"), base_epochs, progress)

    trained = []
    for number, half in enumerate(halves):
        seed_everything(seed if base else 2 * seed + number)
        trained.append(network(max_epochs))
        if base is not None:
            trained[-1].load_state_dict(base.state_dict())
        run_logger = make_logger(logger, output, f"half-{number}")
        trainer = train(trained[-1], half, run_logger, max_epochs, progress)
        finish(trainer.loggers)

    names = [class_range(half) for half in halves]
    loaders = dict(zip(names, (half.test_dataloader() for half in halves), strict=True))
    report = WeightSumMerger(trainer, base=base).evaluate(*trained, loaders)
    print(report)
    output.mkdir(parents=True, exist_ok=True)
    report.save(output / "report.json")
    if logger != "none":
        merge_logger = make_logger(logger, output, "merge")
        report.log(merge_logger)
        finish([merge_logger])
    print(f"Wrote report.json and logs to {output}")
    return 0


def class_range(half: SplitDataModule) -> str:
    labels = half.test.tensors[1]
    return f"classes {labels.min()}-{labels.max()}"


def finish(loggers: Iterable[Any]) -> None:
    """Close W&B's run, so that the next one is a run of its own."""
    for one in loggers:
        if isinstance(one, WandbLogger):
            one.experiment.finish()


def underscored(argument: str) -> str:
    """``--weight-decay=0`` as ``--weight_decay=0``: the function's own spelling, which jsonargparse knows."""
    name, equals, value = argument.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}" if name.startswith("--") else argument


if __name__ == "__main__":
    sys.exit(auto_cli(main, as_positional=False, args=[underscored(argument) for argument in sys.argv[1:]]))
