"""The pass gives the gradients of the data at fixed weights, and a run with it is the run without it."""

from __future__ import annotations

import random
from typing import Any

import lightning.pytorch
import numpy as np
import pytest
import torch
import torchmetrics
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from lightning_lowrank._compat import NAMESPACES, Callback
from lightning_lowrank.training_pass import TrainingPass
from tests.conftest import RowLogger, make_classifier, make_data, make_loader, make_trainer, mlp, sgd


class Noisy(Dataset):
    """Augments with every kind of random number that datasets use."""

    def __init__(self, data: TensorDataset) -> None:
        self.data = data
        self.own = np.random.default_rng(3)
        self.fetched = 0

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.fetched += 1
        inputs, target = self.data[index]
        scale = 1 + 0.1 * (random.random() + np.random.rand() + self.own.random())  # noqa: NPY002
        return inputs * scale + 0.1 * torch.randn_like(inputs), target


class Measure(Callback):
    def __init__(self) -> None:
        super().__init__()
        self.gradients: list[list[Tensor | None]] = []
        self.stochastic: list[bool | None] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        training_pass = TrainingPass(pl_module, trainer.train_dataloader, list(pl_module.parameters()))
        # Adding up random numbers, too, is nothing that the run may notice.
        self.gradients += [[*batch.draws[0], torch.rand(1)] for batch in training_pass]
        self.stochastic.append(training_pass.stochastic)


class Witness(Callback):
    """Sees what training would be changed by."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        state = {name: value.clone() for name, value in pl_module.state_dict().items()}
        own = random.getstate()[1], np.random.get_state()[1].tolist()  # noqa: NPY002
        generators = (torch.get_rng_state(), *map(torch.tensor, own))
        self.seen.append((outputs["loss"].clone(), batch[0].clone(), state, generators, list(pl_module.outputs)))


def make_module(namespace: Any, net: nn.Module) -> Any:
    class Module(namespace.LightningModule):
        """Keeps state in all the places where people keep it."""

        def __init__(self) -> None:
            super().__init__()
            self.net = net
            self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=3)
            self.outputs: list[float] = []
            self.steps = 0
            self.generator = torch.Generator().manual_seed(5)

        def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
            logits = self.net(batch[0] + 0.01 * torch.randn(1, generator=self.generator))
            loss = nn.functional.cross_entropy(logits, batch[1]) * (1 + 0.01 * self.steps)
            self.steps += 1
            self.outputs.append(loss.item())
            self.accuracy(logits, batch[1])
            self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
            self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
            for logger in self.loggers:
                logger.log_metrics({"direct": loss.item()}, step=self.global_step)
            return {"loss": loss}

        def on_train_epoch_end(self) -> None:
            self.log("mean_output", sum(self.outputs) / len(self.outputs))
            self.outputs.clear()

        def configure_optimizers(self) -> Any:
            return sgd(self.parameters())

    return Module()


def batch_norm_cnn() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3))
    return nn.Sequential(nn.Unflatten(1, (1, 2, 3)), *layers, nn.Linear(24, 3))


def noisy_loader(workers: int) -> DataLoader:
    return DataLoader(Noisy(make_data(20)), 8, shuffle=True, num_workers=workers, persistent_workers=workers > 0)


LOADERS = {
    "shuffled": lambda: make_loader(shuffle=True),
    "own_generator": lambda: DataLoader(
        make_data(20), batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(7)
    ),
    "augmented": lambda: noisy_loader(0),
    "persistent_workers": lambda: noisy_loader(2),
}


def run(namespace: Any, loader: DataLoader, *callbacks: Any, path: Any) -> tuple[Any, ...]:
    """A fit, and all that could tell two of them apart."""
    torch.manual_seed(11)
    random.seed(11)
    np.random.seed(11)  # noqa: NPY002
    witness, rows = Witness(), RowLogger()
    module = make_module(namespace, batch_norm_cnn())
    own_rows: Any = rows if namespace is lightning.pytorch else namespace.loggers.CSVLogger(path)
    trainer = make_trainer(namespace, callbacks=[witness, *callbacks], logger=[own_rows], max_epochs=3)
    trainer.fit(module, loader)
    logged = rows.rows or trainer.logger.experiment.metrics
    metrics = {name: value.clone() for name, value in trainer.callback_metrics.items()}
    optimizer = trainer.optimizers[0].state_dict()
    return witness.seen, logged, metrics, optimizer, module.steps, torch.get_rng_state(), module.generator.get_state()


# The data do not depend on the namespace.
@pytest.mark.parametrize(
    ("namespace", "loader"), [*((NAMESPACES[0], loader) for loader in LOADERS), (NAMESPACES[-1], "augmented")]
)
def test_a_run_with_the_pass_is_the_run_without(namespace, loader, tmp_path):
    measure = Measure()
    with_pass = run(namespace, LOADERS[loader](), measure, path=tmp_path / "with")
    without = run(namespace, LOADERS[loader](), path=tmp_path / "without")
    torch.testing.assert_close(with_pass, without, rtol=0, atol=0)
    assert len(without[0]) == 9
    assert len(measure.gradients) == 9
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in measure.gradients[0])
    assert measure.stochastic == [True] * 3


def weighted_mean(training_pass: TrainingPass) -> list[Tensor]:
    """The mean gradient over all samples and draws, in float64."""
    total: list[Any] = []
    samples = 0
    for batch in training_pass:
        mean = [
            sum(g.double() for g in same) / len(batch.draws) * batch.samples for same in zip(*batch.draws, strict=True)
        ]
        total = mean if not total else [a + b for a, b in zip(total, mean, strict=True)]
        samples += batch.samples
    return [gradient / samples for gradient in total]


def full_gradient(net: nn.Module, data: TensorDataset) -> list[Tensor]:
    """The gradient of the mean loss over all the data, in float64."""
    oracle = mlp()
    oracle.load_state_dict(net.state_dict())
    oracle.double()
    inputs, targets = data.tensors
    loss = nn.functional.cross_entropy(oracle(inputs.double()), targets)
    return list(torch.autograd.grad(loss, list(oracle.parameters())))


def test_gradients_weighted_by_size_are_those_of_the_whole_data():
    data = make_data(21)
    module = make_classifier(mlp())
    training_pass = TrainingPass(module, DataLoader(data, 8, shuffle=True), list(module.parameters()))
    torch.testing.assert_close(weighted_mean(training_pass), full_gradient(module.net, data), rtol=1e-5, atol=1e-7)
    assert training_pass.stochastic is False
    assert training_pass.notes == []
    assert module._trainer is None
    assert all(parameter.grad is None for parameter in module.parameters())


def test_both_draws_of_dropout_differ_and_average_to_its_mean():
    # Dropout before a linear layer with a linear loss: the mean over masks is the gradient without dropout.
    class Linear(lightning.pytorch.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 1, bias=False))

        def training_step(self, batch: Any) -> Tensor:
            return self.net(batch[0]).mean()

    module, data = Linear(), make_data(4000)
    found = list(TrainingPass(module, DataLoader(data, 20), list(module.parameters())))
    draws = torch.stack([torch.stack([draw[0][0] for draw in batch.draws]) for batch in found]).double()
    truth = data.tensors[0].double().mean(0)
    # Each mask doubles an input or drops it: a variance of x^2, over 20 samples a batch.
    noise: Tensor = (data.tensors[0].double().square().mean() / 20).sqrt()
    difference = draws[:, 0] - draws[:, 1]
    assert difference.std().item() == pytest.approx(noise.item() * 2**0.5, rel=0.1)
    assert (draws.mean((0, 1)) - truth).abs().max() < 4 * noise / (2 * len(found)) ** 0.5
    # Independent between draws and between batches.
    residual = draws - torch.stack([part.double().mean(0) for part in data.tensors[0].split(20)])[:, None]
    assert (residual[:, 0] * residual[:, 1]).mean().abs() < 4 * noise**2 / residual[:, 0].numel() ** 0.5
    assert (residual[1:, 0] * residual[:-1, 0]).mean().abs() < 4 * noise**2 / residual[1:, 0].numel() ** 0.5


@pytest.mark.parametrize("workers", [0, 2])
def test_augmentation_is_drawn_anew_from_the_same_samples(workers):
    # Every draw of a batch has its own noise of the dataset's own generator, also where workers copy that.
    class Own(Noisy):
        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            inputs, target = self.data[index]
            return inputs + float(self.own.normal()), target

    class Mean(lightning.pytorch.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(6))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return (self.scale * batch[0]).mean(0).sum()

    module, data = Mean(), make_data(12)
    training_pass = TrainingPass(module, DataLoader(Own(data), 4, num_workers=workers), [module.scale])
    found = [[draw[0] for draw in batch.draws] for batch in training_pass]
    assert training_pass.stochastic
    for index, (one, other) in enumerate(found):
        clean = data.tensors[0][4 * index : 4 * index + 4].mean(0)
        shifts = torch.stack([one - clean, other - clean])
        torch.testing.assert_close(shifts, shifts[:, :1].expand(-1, 6))
        assert (shifts[0] - shifts[1]).abs().min() > 1e-3


def test_results_are_a_function_of_the_seed():
    module = make_classifier(nn.Sequential(nn.Dropout(0.5), mlp()))
    loader = DataLoader(Noisy(make_data(16)), 8, shuffle=True)

    def gradients(seed: int) -> list[Any]:
        return [batch.draws for batch in TrainingPass(module, loader, list(module.parameters()), seed=seed)]

    first = gradients(1)
    torch.rand(3)
    random.random()
    torch.testing.assert_close(gradients(1), first, rtol=0, atol=0)
    assert not torch.equal(gradients(2)[0][0][0], first[0][0][0])


def test_every_batch_starts_from_the_same_module_state():
    class Counting(lightning.pytorch.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))
            self.calls: list[int] = []

        def training_step(self, batch: Tensor) -> Tensor:
            self.calls.append(1)
            batch.mul_(2)
            return (self.weight * batch.mean() * len(self.calls)).sum()

    module, data = Counting(), [torch.ones(2), torch.ones(3)]
    found = list(TrainingPass(module, data, [module.weight]))
    assert [(batch.samples, batch.draws[0][0].item()) for batch in found] == [(2, 2.0), (3, 2.0)]
    assert (module.calls, data[0].tolist()) == ([], [1.0, 1.0])


def test_mixed_precision_converts_and_casts_as_training_does():
    module = make_classifier(mlp())
    trainer = make_trainer(precision="bf16-mixed")
    args = (module, make_loader(), list(module.parameters()))
    plain, mixed = weighted_mean(TrainingPass(*args)), weighted_mean(TrainingPass(*args, trainer=trainer))
    error = max(((a - b).norm() / a.norm()).item() for a, b in zip(plain, mixed, strict=True))
    assert 1e-4 < error < 0.05
    double = make_classifier(mlp().double())
    exact = weighted_mean(
        TrainingPass(double, make_loader(), list(double.parameters()), trainer=make_trainer(precision=64))
    )
    torch.testing.assert_close(exact, full_gradient(mlp(), make_data()), rtol=1e-12, atol=1e-14)


def test_batches_go_through_the_hooks_of_module_and_datamodule():
    class Data(lightning.pytorch.LightningDataModule):
        def train_dataloader(self) -> DataLoader:
            return make_loader()

        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return [batch[0] * 0, batch[1]]

    class Hooked(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            training_pass = TrainingPass(pl_module, trainer.train_dataloader, list(pl_module.parameters()))
            self.norms = [sum(g.norm().item() for g in batch.draws[0]) for batch in training_pass]

    hooked = Hooked()
    trainer = make_trainer(callbacks=[hooked], max_epochs=1)
    trainer.fit(make_classifier(mlp()), datamodule=Data())
    assert hooked.norms == [0.0] * 3  # without biases nothing passes from inputs of zero


def test_leaving_early_puts_everything_back():
    module = make_classifier(nn.Sequential(nn.Dropout(0.5), mlp()))
    before = torch.get_rng_state()
    done: list[Any] = []
    for batch in TrainingPass(module, make_loader(), list(module.parameters()), progress=lambda *a: done.append(a)):
        assert len(batch.draws) == 2
        if done:
            break
    assert torch.equal(torch.get_rng_state(), before)
    assert done == [(1, 3)]
    assert "log" not in vars(module)
    assert module._trainer is None


def test_limit_and_frozen_parameters():
    module = make_classifier(mlp())
    parameters = list(module.parameters())
    parameters[1].requires_grad_(False)
    found = list(TrainingPass(module, make_loader(), parameters, limit_batches=2))
    assert [[g is None for g in batch.draws[0]] for batch in found] == [[False, True, False]] * 2


def test_skipped_batches_and_unknown_sizes_are_noted():
    class Skipping(lightning.pytorch.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
            return None if batch_idx % 2 == 0 else (self.weight * batch["a"].sum()).sum()

    module, data = Skipping(), [{"a": torch.ones(2), "b": torch.ones(3)}] * 5
    training_pass = TrainingPass(module, data, [module.weight])
    assert [(batch.samples, len(batch.draws)) for batch in training_pass] == [(1, 1)] * 2
    assert training_pass.skipped == 3
    assert training_pass.notes == [
        "all batches count the same, as their numbers of samples can't be told",
        "training_step returned no loss for 3 batches, which are left out",
    ]


def test_iterable_datasets_draw_the_forward_only():
    class Stream(IterableDataset):
        def __iter__(self) -> Any:
            return iter(torch.rand(6, 6))

    class Dropped(lightning.pytorch.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6, 5, bias=False), nn.Dropout(0.5))

        def training_step(self, batch: Any) -> Tensor:
            return self.net(batch).sum()

    module = Dropped()
    found = list(TrainingPass(module, DataLoader(Stream(), 4), list(module.parameters())))
    assert [(batch.samples, len(batch.draws)) for batch in found] == [(4, 2), (2, 2)]
    module.eval()
    training_pass = TrainingPass(module, DataLoader(Stream(), 4), list(module.parameters()))
    assert [len(batch.draws) for batch in training_pass] == [1, 1]


@pytest.mark.parametrize("how", ["in_place", "data", "replaced"])
def test_a_step_that_moves_parameters_is_refused_before_it_did(how):
    class Averaged(lightning.pytorch.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.target = nn.Linear(6, 3), nn.Linear(6, 3).requires_grad_(False)
            self.calls = 0

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if batch_idx == 1:  # not at the first batch
                if how == "in_place":
                    with torch.no_grad():
                        self.target.weight.lerp_(self.net.weight, 0.1)
                elif how == "data":
                    torch._foreach_mul_([parameter.data for parameter in self.target.parameters()], 0.9)
                else:
                    self.target.weight.data = self.target.weight.data * 0.9
            return nn.functional.mse_loss(self.net(batch[0]), self.target(batch[0]))

    module = Averaged()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    pointers = [parameter.data_ptr() for parameter in module.parameters()]
    with pytest.raises(ValueError, match=r"changes the parameter 'target\.weight', so it has no gradient at fixed"):
        list(TrainingPass(module, make_loader(), list(module.parameters())))
    torch.testing.assert_close(dict(module.state_dict()), before, rtol=0, atol=0)
    assert pointers == [parameter.data_ptr() for parameter in module.parameters()]


class OneShot(IterableDataset):
    def __iter__(self) -> OneShot:
        return self

    def __next__(self) -> Tensor:
        raise StopIteration


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (lambda: iter([torch.ones(2)]), "list_iterator can be gone through only once"),
        (lambda: DataLoader(OneShot()), "OneShot can be gone through only once"),
        (lambda: [make_loader(), make_loader()], "got several dataloaders .a list."),
        (lambda: {"a": make_loader()}, "got several dataloaders .a dict."),
        (
            lambda: lightning.pytorch.utilities.CombinedLoader([make_loader()]),
            "got several dataloaders .a CombinedLoader.",
        ),
        (lambda: 3, "iterable of batches, got int"),
    ],
)
def test_loaders_that_are_no_data_of_a_pass(loader, message):
    module = make_classifier(mlp())
    with pytest.raises(ValueError, match=message):
        TrainingPass(module, loader(), list(module.parameters()))


def test_modules_that_have_no_gradient_at_fixed_weights(namespace):
    class Bare(namespace.LightningModule):
        pass

    class Iterating(namespace.LightningModule):
        def training_step(self, dataloader_iter: Any) -> None:
            pass

    manual = make_classifier(mlp(), namespace)
    manual.automatic_optimization = False
    for module, message in (
        (Bare(), "Bare has no training_step"),
        (Iterating(), "takes a dataloader_iter"),
        (manual, "optimizes manually"),
        (make_classifier(nn.LazyLinear(3), namespace), "lazy parameters"),
    ):
        with pytest.raises(ValueError, match=message):
            TrainingPass(module, make_loader(), [])
    with pytest.raises(TypeError, match="needs a LightningModule, got Linear"):
        TrainingPass(nn.Linear(2, 2), make_loader(), [])
    with pytest.raises(ValueError, match="none of the parameters requires a gradient"):
        TrainingPass(make_classifier(mlp()), make_loader(), [torch.ones(2)])


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (lambda loss: loss * torch.ones(2), "scalar loss.*got shape .2,."),
        (lambda loss: {"total": loss}, "scalar loss.*got NoneType"),
        (lambda loss: loss.item(), "scalar loss.*got float"),
        (lambda loss: loss.detach(), "does not depend on a trainable parameter"),
    ],
)
def test_losses_that_cannot_be_differentiated(output, message):
    class Module(lightning.pytorch.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return output(self.net(batch[0]).sum())

    module = Module()
    with pytest.raises(ValueError, match=message):
        list(TrainingPass(module, make_loader(), list(module.parameters())))
