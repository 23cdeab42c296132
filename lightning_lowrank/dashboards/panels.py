"""What a dashboard of a run shows: five questions, the panels that answer them, and how to read each.

Plain data, and the only place that says so: the W&B workspace, the W&B report and the HTML page are all made from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Panel:
    """One panel.

    Attributes:
        title: Its heading.
        keys: What it shows, without the prefix that keys begin with.
        text: How to read it, in plain words.
        kind: "line" for values over the steps; "layers" for keys ``<key>/<parameter name>`` (or ``<key>/q50`` and
            the like, of large models), a line each; "table" and "chart" for what only W&B has: a table, or one's chart.
        target: The value at a stationary point, if there is one.
        log: Whether the axis is logarithmic.
        fields: Of a chart: which column of its table is the x, y and stroke of ``preset``.
        preset: Of a chart: the name of W&B's preset.
    """

    title: str
    keys: tuple[str, ...]
    text: str
    kind: Literal["line", "layers", "table", "chart"] = "line"
    target: float | None = None
    log: bool = False
    fields: tuple[tuple[str, str], ...] = ()
    preset: str = ""


@dataclass(frozen=True)
class Section:
    """A question and its panels.

    Attributes:
        name: The question.
        text: What the answer means.
        panels: In the order of their importance.
        source: Whose keys they are: those of a training run ("run") or of a merge ("merge").
    """

    name: str
    text: str
    panels: tuple[Panel, ...]
    source: Literal["run", "merge"] = "run"


STATIONARY = Section(
    "Is it stationary?",
    "At a stationary point of the L2-regularised loss the full-batch gradient cancels the weight decay: alignment is 1,"
    " residual is 0. Only full-batch values can show that; those of mini-batches are drowned by gradient noise.",
    (
        Panel(
            "Alignment",
            ("alignment",),
            "The cosine of the decay wd * theta and the negative full-batch gradient. 1 at a stationary point. Gaps are"
            " steps at which it could not be measured: between windows, or where the weights moved too fast.",
            target=1.0,
        ),
        Panel(
            "Residual",
            ("residual",),
            "The size of the full-batch gradient of the regularised loss, relative to the decay. 0 at a stationary"
            " point, and about sqrt(2 (1 - alignment)) near one.",
            target=0.0,
        ),
        Panel(
            "Standard errors",
            ("alignment_stderr", "residual_stderr"),
            "How far alignment and residual may be off because gradients are noisy, as one standard error.",
        ),
        Panel(
            "Radial balance",
            ("radial_balance", "radial_balance_stderr"),
            "The gradient against the decay along the weights' own direction. 1 at a stationary point; unbiased on"
            " mini-batches too, but necessary only: it can be 1 far from one. With its standard error.",
            target=1.0,
        ),
        Panel(
            "Alignment by layer",
            ("alignment",),
            "The same cosine of each weight matrix by itself. Layers that lag behind are those to look at.",
            kind="layers",
            target=1.0,
        ),
        Panel(
            "Implied weight decay",
            ("implied_weight_decay",),
            "The weight decay that would balance this step's gradient. At a stationary point it is the run's own"
            " weight decay; above it the norms still grow, below it they shrink.",
        ),
        Panel(
            "Cumulative decay",
            ("cumulative_decay",),
            "tau, the learning rate times the weight decay, summed over the steps. exp(-tau) of the initialisation is"
            " left: below 3 it is still there, and it adds up as noise when networks are merged.",
        ),
        Panel(
            "Steps to stationarity",
            ("steps_to_stationarity",),
            "How many steps at the present rate until 1 % of the initialisation is left. A necessary time, not a"
            " sufficient one.",
            log=True,
        ),
        Panel(
            "Decoupled decay: alignment of the update",
            ("update_alignment",),
            "AdamW and its like do not descend the L2-regularised loss, so alignment is not defined for them. This is"
            " theta against their own direction: 1 at their fixed point.",
            target=1.0,
        ),
        Panel(
            "Decoupled decay: residual of the update",
            ("update_residual",),
            "The size of the step of AdamW and its like, without its learning rate, relative to the decay: 0 at their"
            " fixed point.",
            target=0.0,
        ),
        Panel(
            "Alignment of mini-batches",
            ("alignment_minibatch",),
            "The same cosine with the step's own gradient. Far from 1 on mini-batches, at a stationary point too: noise"
            " in the gradient is not noise in the alignment, it is a bias. Do not compare it between batch sizes.",
        ),
        Panel(
            "Residual of mini-batches",
            ("residual_minibatch",),
            "The residual with the step's own gradient: large on mini-batches, at a stationary point too.",
            log=True,
        ),
        Panel(
            "Alignment of mini-batches by layer",
            ("alignment_minibatch",),
            "Of each weight matrix with the step's own gradient, in runs that have no full-batch values.",
            kind="layers",
        ),
    ),
)

BALANCED = Section(
    "Are norms balanced?",
    "Layers that can trade a factor without changing the network (those of a bias-free ReLU chain, for instance) have"
    " equal norms at a stationary point. Gradient flow closes the gap as exp(-2 tau).",
    (
        Panel(
            "Norm spread",
            ("norm_spread",),
            "Largest over smallest norm among layers that can trade a factor, the worst of all such groups. 1 at a"
            " stationary point.",
            target=1.0,
        ),
        Panel(
            "Norm gap, measured and predicted",
            ("norm_gap", "norm_gap_predicted"),
            "The difference of squared norms between the two layers that began furthest apart, and what gradient flow"
            " predicts of it. Lines that part show large steps, noise, or layers that are no group.",
        ),
        Panel(
            "Frobenius norm by layer",
            ("frobenius_norm",),
            "The size of each weight matrix. Lines of a group meet when the norms are balanced.",
            kind="layers",
        ),
        Panel(
            "Implied weight decay by layer",
            ("implied_weight_decay",),
            "The weight decay that would balance this step's gradient in each matrix; noisy on mini-batches.",
            kind="layers",
        ),
    ),
)

LOW_RANK = Section(
    "How low is the rank, by layer?",
    "Weight decay keeps few directions. The stable rank |W|_F^2 / |W|_2^2 is at most the rank and moves smoothly: a few"
    " units where the theory holds, a good part of the width at a random start.",
    (
        Panel(
            "Stable rank",
            ("stable_rank",),
            "The mean over the weight matrices. Falls as the initialisation is forgotten.",
        ),
        Panel(
            "Stable rank by layer",
            ("stable_rank",),
            "Of each weight matrix.",
            kind="layers",
            log=True,
        ),
        Panel(
            "Spectral ratio",
            ("spectral_ratio",),
            "The mean of |W|_2 / |W|_F, which the paper bounds from below: 1 for matrices of rank one.",
        ),
        Panel(
            "Spectral norm by layer",
            ("spectral_norm",),
            "The largest singular value of each weight matrix.",
            kind="layers",
        ),
        Panel(
            "Effective rank by layer",
            ("effective_rank",),
            "exp of the entropy of the singular values, under spectral='full'. It counts the tail as well, which the"
            " stable rank does not see.",
            kind="layers",
            log=True,
        ),
        Panel(
            "Singular values",
            ("spectra_table",),
            "The spectrum of each weight matrix, relative to its largest singular value, under spectral='full'. A steep"
            " fall is low rank.",
            kind="chart",
            preset="wandb/line/v0",
            fields=(("x", "index"), ("y", "relative"), ("stroke", "layer")),
        ),
        Panel(
            "Layers",
            ("layers",),
            "Every weight matrix with its last values.",
            kind="table",
        ),
        Panel(
            "Age of the spectra",
            ("spectral_age",),
            "Steps since the oldest spectral value was measured. Those of large models, and of runs with short steps,"
            " take turns to stay within the budget.",
        ),
    ),
)

NOT_APPLICABLE = Section(
    "Where does the theory not apply?",
    "Layers in front of a normalisation never align, decoupled decay has another target, and layers that are no group"
    " need not have equal norms. monitor.regimes(), and W&B's table of layers, say what each is.",
    (
        Panel(
            "Homogeneity defect",
            ("homogeneity_defect",),
            "By how much <W, G> differs within a group, relative to |W| |G|. Rounding only, if the layers can trade a"
            " factor; more says that they can't, and that norm spread means nothing for them.",
            target=0.0,
            log=True,
        ),
        Panel(
            "Balance of scale-invariant layers",
            ("scale_invariant_balance",),
            "Layers in front of a normalisation turn instead of aligning. This is their squared gradient over its"
            " steady state: 1 where turning and decay balance.",
            target=1.0,
        ),
        Panel(
            "Bounds of decoupled decay",
            ("linf_decay", "spectral_decay"),
            "wd * max|theta| under AdamW, wd * |W|_2 under Muon: at most 1 at limit points. This is what decoupled"
            " decay bounds, in place of the L2 norm.",
            target=1.0,
        ),
        Panel(
            "Overhead",
            ("overhead",),
            "The share of the run's time that measuring took.",
        ),
    ),
)

MERGE = Section(
    "Merge results",
    "Both networks, their sum and average, and the ensemble of their logits, each on every task. The sum works where"
    " each network hardly sees the other's inputs.",
    (
        Panel(
            "Models and tasks",
            ("table",),
            "A row per model, a column per metric and task. Compare the sum with the network that was trained on the"
            " task, and look at output_change: accuracy can stay while outputs move by half their size.",
            kind="table",
        ),
        Panel(
            "Accuracy of each model on each task",
            ("bars_table",),
            "A bar per model and task.",
            kind="chart",
            preset="wandb/bar/v0",
            fields=(("label", "model on task"), ("value", "value")),
        ),
        Panel(
            "Leak by layer",
            ("leak",),
            "What the other networks' weights add to a layer's pre-activations on the task's inputs, relative to what"
            " was there. Near 0 the sum changes nothing in that layer, at 1 it adds as much as there was.",
            kind="table",
        ),
    ),
    source="merge",
)

SECTIONS = (STATIONARY, BALANCED, LOW_RANK, NOT_APPLICABLE, MERGE)
