"""The gradient of every batch of a training dataloader at fixed weights, through the module's own ``training_step``.

The pass takes no optimizer step and leaves no trace: a run in which it happens goes on bit for bit as without it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.utils.data import DistributedSampler

from lightning_lowrank._compat import (
    attached,
    attached_trainer,
    batch_size,
    clone_batch,
    move_batch,
    namespace_of,
    quiet_trainer,
    silenced,
    takes,
)
from lightning_lowrank.fetching import Batches, check_loader, seed_generators
from lightning_lowrank.functional._tensors import real_view
from lightning_lowrank.preserve import FixedParameters, Snapshot, preserved

# Two gradients of one batch that differ by less come from the same random numbers, or from none: summation order on a
# GPU, where it differs between two calls, moves a float32 gradient by 1e-8 to 1e-7. Where it moves it by more, taking
# the pass for a random one costs time and nothing else.
_SAME_GRADIENT = 1e-6


@dataclass(frozen=True)
class BatchGradients:
    """The gradients of one batch.

    Attributes:
        samples: Number of samples in the batch, its weight in the mean over the data; 1 for every batch where that
            can't be known.
        draws: One list of gradients, or two that are independent given the samples where ``training_step`` or the
            dataset is random. A gradient has the shape of its parameter; None where the loss does not depend on it.
    """

    samples: int
    draws: tuple[list[Tensor | None], ...]


class TrainingPass:
    """One pass over training data at fixed weights, as an iterable of :class:`BatchGradients`.

    The loss is what ``training_step`` returns, in training's precision and without loss scaling, in the mode that the
    module is in. Every batch starts from the module's present state: buffers and attributes that a step changes are put
    back after it. When the iteration ends, or is left early, everything is (see
    :func:`lightning_lowrank.preserve.preserved`), global random numbers included; so what the consumer draws in between
    is forgotten too, and what it logs through the Trainer's loggers is lost.

    The first batch is differentiated twice with different random numbers. If the gradients agree there is one draw per
    batch, else two. A ``DataLoader`` of a map-style dataset that forms batches itself fetches the samples of each batch
    anew for each draw, so that augmentation is drawn too; from any other iterable a batch is fetched once.

    In a distributed run every process goes through its own dataloader, and nothing is communicated but by
    ``training_step`` itself.

    Args:
        module: A LightningModule with automatic optimization.
        loader: One dataloader, or anything else that yields batches each time it is iterated over.
        parameters: What to differentiate with respect to.
        trainer: The Trainer for code that asks, with its precision and hooks. None: the module's own, or for the time
            of the pass one that logs and saves nothing.
        limit_batches: Stop after as many batches.
        seed: Random numbers are a function of it, the batch's number, the draw and the process.
        progress: Called with the number of batches done and the total (None if unknown) after each batch.

    Attributes:
        stochastic: Whether gradients depend on random numbers; None before the first batch.
        skipped: Batches for which ``training_step`` returned None.
        notes: What a reader of the results has to know.

    Raises:
        TypeError: If the module is no LightningModule.
        ValueError: If the module or the loader does not allow such a pass; while iterating, if ``training_step``
            returns no scalar loss that can be differentiated, or changes a parameter.

    Example:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> module, data = BoringModel(), [torch.randn(4, 32), torch.randn(2, 32)]
        >>> for batch in TrainingPass(module, data, list(module.parameters())):
        ...     print(batch.samples, len(batch.draws), [tuple(gradient.shape) for gradient in batch.draws[0]])
        4 1 [(2, 32), (2,)]
        2 1 [(2, 32), (2,)]
    """

    def __init__(
        self,
        module: nn.Module,
        loader: Any,
        parameters: Sequence[Tensor],
        *,
        trainer: Any = None,
        limit_batches: int | None = None,
        seed: int = 0,
        progress: Callable[[int, int | None], object] | None = None,
    ) -> None:
        check_module(module)
        check_loader(loader)
        if not any(parameter.requires_grad for parameter in parameters):
            raise ValueError("none of the parameters requires a gradient; pass at least one that does")
        self._module: Any = module
        self._loader = loader
        self._parameters = list(parameters)
        self._trainer = trainer
        self._limit = limit_batches
        self._seed = seed
        self._progress = progress
        self._start()

    def _start(self) -> None:
        self.stochastic: bool | None = None
        self.skipped = 0
        self.notes: list[str] = []

    def __iter__(self) -> Iterator[BatchGradients]:
        self._start()
        own = attached_trainer(self._module)
        trainer = self._trainer or own or quiet_trainer(self._module)
        with ExitStack() as stack:
            if trainer is not own:
                stack.enter_context(attached(self._module, trainer))
            stack.enter_context(silenced(self._module, trainer))
            datamodule = getattr(trainer, "datamodule", None)
            state = stack.enter_context(preserved(self._module, self._loader, datamodule))
            self._consider_ranks(trainer)
            yield from self._batches(trainer, state)

    def _batches(self, trainer: Any, state: Snapshot) -> Iterator[BatchGradients]:
        guard = FixedParameters(_named(self._module, state.parameters))
        weights = _Weights(self._note)
        batches = Batches(self._loader, seed=self._seed, rank=trainer.global_rank, limit=self._limit)
        done = 0
        for number, fetched in enumerate(batches.fetch(lambda: self.stochastic)):
            draws: list[list[Tensor | None]] = []
            for draw, batch in enumerate(fetched):
                seed_generators(self._seed, number, draw, trainer.global_rank)
                gradients = self._gradients(trainer, guard, batch, number)
                draws += [] if gradients is None else [gradients]
                del gradients
                state.rewind()
            if len(draws) < len(fetched):
                self.skipped += 1
            else:
                if self.stochastic is None:
                    self.stochastic = not _agree(*draws)
                kept = draws if self.stochastic else draws[:1]
                found = BatchGradients(weights.of(batch_size(fetched[0])), tuple(kept))
                # Kept references would hold these gradients in memory while the next ones are made.
                del draws, kept
                yield found
                del found
                done += 1
            if self._progress is not None:
                self._progress(number + 1, batches.total)
        if self.skipped:
            self._note(f"training_step returned no loss for {self.skipped} batches, which are left out")
        if done == 0:
            self._note("the dataloader yielded no batch with a loss")

    def _gradients(self, trainer: Any, guard: FixedParameters, batch: Any, number: int) -> list[Tensor | None] | None:
        """The gradients for one batch with the random numbers that come next; None if training skips the batch."""
        if batch is None:
            return None
        step = self._module.training_step
        with torch.enable_grad():
            # A step that changes its batch in place must not change a dataset in memory, nor the next draw.
            batch = move_batch(clone_batch(batch), self._module, trainer, self._parameters[0].device)
            arguments = (batch, number) if takes(step, "batch_idx", position=2) else (batch,)
            with guard, trainer.precision_plugin.train_step_context():
                output = step(*arguments)
            if output is None:
                return None
            # Backward runs without autocast, as in training.
            return self._differentiate(_loss(output))

    def _differentiate(self, loss: Tensor) -> list[Tensor | None]:
        trained = [parameter for parameter in self._parameters if parameter.requires_grad]
        found = iter(torch.autograd.grad(loss, trained, allow_unused=True))
        gradients = [next(found) if parameter.requires_grad else None for parameter in self._parameters]
        return [g.to_dense() if g is not None and g.layout is not torch.strided else g for g in gradients]

    def _consider_ranks(self, trainer: Any) -> None:
        if trainer.world_size == 1:
            return
        of_batches = getattr(self._loader, "batch_sampler", None)
        samplers = [getattr(owner, "sampler", None) for owner in (self._loader, of_batches)]
        if not any(isinstance(sampler, DistributedSampler) for sampler in (of_batches, *samplers)):
            self._note(
                "processes may have different numbers of batches, as no DistributedSampler gives them equal shares"
            )
        if any(isinstance(part, nn.SyncBatchNorm) for part in self._module.modules()):
            # Its statistics are a collective, so that no process may decide by itself how often the step runs.
            self.stochastic = True

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


def check_module(module: nn.Module) -> None:
    """Refuse a module whose loss can't be had by calling its ``training_step``.

    Raises:
        TypeError: If it is no LightningModule.
        ValueError: With the reason and what to do.
    """
    namespace, name = namespace_of(module), type(module).__name__
    if namespace is None:
        raise TypeError(f"a pass over training data needs a LightningModule, got {name}")
    step: Any = module.training_step
    if getattr(step, "__func__", None) is namespace.LightningModule.training_step:
        raise ValueError(f"{name} has no training_step, so there is no training loss to differentiate; define one")
    if not module.automatic_optimization:
        raise ValueError(
            f"{name} optimizes manually: its training_step takes the optimizer steps itself, so it can't run at fixed"
            " weights. Pass a LightningModule with automatic optimization whose training_step returns the loss."
        )
    if takes(step, "dataloader_iter"):
        raise ValueError(
            f"training_step of {name} takes a dataloader_iter and fetches its data itself; let it take a batch instead"
        )
    if any(isinstance(parameter, UninitializedParameter) for parameter in module.parameters()):
        raise ValueError(f"{name} has lazy parameters without a shape; run one forward pass first")


class _Weights:
    """What each batch counts in the mean over the data."""

    def __init__(self, note: Callable[[str], None]) -> None:
        self._note = note
        self._last: int | None = None
        self._equal = False

    def of(self, samples: int | None) -> int:
        if self._last is None and samples is None:
            self._equal = True
            self._note("all batches count the same, as their numbers of samples can't be told")
        if self._equal:
            return 1
        if samples is None:
            self._note("the number of samples can't be told for all batches; one without counts as the one before it")
        self._last = samples or self._last
        assert self._last is not None
        return self._last


def _loss(output: Any) -> Tensor:
    if isinstance(output, Mapping):
        output = output.get("loss")
    if not isinstance(output, Tensor) or output.numel() != 1:
        given = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"training_step must return a scalar loss, or a dict with one under 'loss'; got {given}")
    if not output.requires_grad:
        raise ValueError("the loss that training_step returns does not depend on a trainable parameter")
    return output


def _agree(one: Sequence[Tensor | None], other: Sequence[Tensor | None]) -> bool:
    """Whether two gradients are the same but for rounding."""
    if [g is None for g in one] != [g is None for g in other]:
        return False
    pairs = [(a, b) for a, b in zip(one, other, strict=True) if a is not None and b is not None]
    difference = math.hypot(*(_norm(a - b) for a, b in pairs))
    return difference <= _SAME_GRADIENT * math.hypot(*(_norm(a) for a, _ in pairs))


def _norm(gradient: Tensor) -> float:
    return float(torch.linalg.vector_norm(real_view(gradient), dtype=torch.float64))


def _named(module: nn.Module, more: Iterable[nn.Parameter]) -> dict[str, nn.Parameter]:
    """The module's parameters by name, and those that it holds outside of its submodules."""
    named = dict(module.named_parameters())
    known = {id(parameter) for parameter in named.values()}
    hidden = [parameter for parameter in more if id(parameter) not in known]
    return named | {f"<hidden {index}>": parameter for index, parameter in enumerate(hidden)}
