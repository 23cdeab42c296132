import dataclasses
import json
import math
import warnings

import lightning.pytorch
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_lowrank import MergeError, MergeReport, WeightSumMerger, merge_modules
from lightning_lowrank.merging.comparison import _class_axis
from tests.conftest import RowLogger, make_classifier, make_loader, make_trainer, mlp, wandb_records

MODELS = ("m1", "m2", "sum", "average", "ensemble")


def task_loader(task, shuffle=False, samples=30):
    """Six inputs, classes 0-2 or 3-5."""
    generator = torch.Generator().manual_seed(task)
    inputs = torch.randn(samples, 6, generator=generator)
    labels = torch.randint(3 * task, 3 * task + 3, (samples,), generator=generator)
    return DataLoader(TensorDataset(inputs, labels), batch_size=8, shuffle=shuffle)


def pair(namespace=lightning.pytorch):
    return [make_classifier(mlp((6, 16, 12, 6), bias=True, seed=seed), namespace) for seed in (0, 1)]


def expected_metrics(one, two, loader, task):
    """The report's own figures once more, from whole-data-set outputs in float64 and numpy."""
    inputs, labels = (t.numpy() for t in loader.dataset.tensors)
    nets = {
        "m1": one,
        "m2": two,
        "sum": merge_modules(one, two),
        "average": merge_modules(one, two, coefficients=[0.5, 0.5]),
    }
    with torch.no_grad():
        outputs = {name: net(torch.tensor(inputs)).numpy().astype(np.float64) for name, net in nets.items()}
    outputs["ensemble"] = (outputs["m1"] + outputs["m2"]) / 2
    own = outputs[f"m{task + 1}"]
    classes = np.arange(3 * task, 3 * task + 3)
    return {
        name: {
            "joint_accuracy": (f.argmax(1) == labels).mean(),
            "masked_accuracy": (classes[f[:, classes].argmax(1)] == labels).mean(),
            "output_change": np.linalg.norm(f - own) / np.linalg.norm(own),
            "test_loss": nn.functional.cross_entropy(torch.tensor(f), torch.tensor(labels)).item(),
            "test_acc": (f.argmax(1) == labels).mean(),
        }
        for name, f in outputs.items()
    }


@pytest.mark.parametrize("shuffle", [False, True])
def test_every_figure_agrees_with_numpy(namespace, shuffle):
    one, two = pair(namespace)
    loaders = {f"task {task}": task_loader(task, shuffle) for task in (0, 1)}
    report = WeightSumMerger().evaluate(one, two, loaders)
    assert report.models == list(MODELS)
    assert report.tasks == {"task 0": "m1", "task 1": "m2"}
    assert len(report.metrics) == 2 * 5 * 5
    for task, (name, loader) in enumerate(loaders.items()):
        for model, metrics in expected_metrics(one, two, loader, task).items():
            for metric, value in metrics.items():
                assert report.metrics[f"{name}/{model}/{metric}"] == pytest.approx(value, rel=1e-5, abs=1e-6), (
                    model,
                    metric,
                )
    assert report.notes == []


def test_validation_step_serves_where_there_is_no_test_step():
    class Validated(lightning.pytorch.LightningModule):
        def __init__(self, seed):
            super().__init__()
            self.net = mlp((6, 8, 6), seed=seed)
            self.accuracy = MulticlassAccuracy(num_classes=6, average="micro")

        def forward(self, inputs):
            return self.net(inputs)

        def validation_step(self, batch, batch_idx):
            self.accuracy(self(batch[0]), batch[1])
            self.log("val/acc", self.accuracy)

    report = WeightSumMerger().evaluate(Validated(0), Validated(1), [task_loader(0), task_loader(1)])
    for model in MODELS:
        assert report.value("task_1", model, "val/acc") == pytest.approx(
            report.value("task_1", model, "joint_accuracy")
        )
    assert report.settings["step"] == "validation_step"


def test_the_modules_the_trainer_its_callbacks_and_loggers_are_left_alone():
    class Count(lightning.pytorch.Callback):
        calls = 0

        def on_test_start(self, trainer, pl_module):
            Count.calls += 1

    logger = RowLogger()
    one, two = pair()
    trainer = make_trainer(logger=logger, callbacks=[Count()])
    trainer.fit(one, make_loader(classes=6))
    rows, metrics = len(logger.rows), dict(trainer.callback_metrics)
    before = [{name: t.clone() for name, t in module.state_dict().items()} for module in (one, two)]
    one.train()
    WeightSumMerger(trainer).evaluate(one, two, [task_loader(0), task_loader(1)])
    assert (Count.calls, len(logger.rows)) == (0, rows)
    assert one.trainer is trainer
    assert one.training
    assert trainer.callback_metrics == metrics
    for module, kept in zip((one, two), before, strict=True):
        assert all(torch.equal(tensor, kept[name]) for name, tensor in module.state_dict().items())


def test_the_trainers_precision_and_limits_are_used():
    one, two = pair()
    seen = set()

    def outputs(module, batch):
        seen.add(module(batch[0]).dtype)
        return module(batch[0])

    trainer = make_trainer(precision="bf16-mixed", limit_test_batches=1)
    report = WeightSumMerger(trainer, outputs=outputs).evaluate(one, two, [task_loader(0), task_loader(1)])
    assert seen == {torch.bfloat16}
    assert report.value("task_1", "m1", "joint_accuracy") * 8 == pytest.approx(
        round(report.value("task_1", "m1", "joint_accuracy") * 8)
    )


def test_base_and_coefficients_reach_the_merge():
    one, two = pair()
    base = make_classifier(mlp((6, 16, 12, 6), bias=True, seed=5))
    merger = WeightSumMerger(base=base, coefficients=[0.3, 0.8])
    loader = task_loader(0)
    report = merger.evaluate(one, two, [loader, task_loader(1)])
    merged = merge_modules(one, two, base=base, coefficients=[0.3, 0.8])
    inputs, labels = loader.dataset.tensors
    loss = nn.functional.cross_entropy(merged(inputs), labels).item()
    assert report.value("task_1", "sum", "test_loss") == pytest.approx(loss, rel=1e-5)
    assert report.settings == {
        "module": "Classifier", "coefficients": [0.3, 0.8], "base": True, "step": "test_step", "start": "undetermined",
    }  # fmt: skip


class DictBatches(lightning.pytorch.LightningModule):
    """Batches and outputs as Hugging Face models have them."""

    def __init__(self, seed):
        super().__init__()
        self.net = mlp((6, 8, 6), seed=seed)

    def forward(self, **batch):
        return {"logits": self.net(batch["inputs"])}

    def test_step(self, batch, batch_idx):
        labels = batch.pop("labels")
        self.log("loss", nn.functional.cross_entropy(self(**batch)["logits"], labels))


def dict_loader(task):
    inputs, labels = task_loader(task).dataset.tensors
    return DataLoader([{"inputs": x, "labels": y} for x, y in zip(inputs, labels, strict=True)], batch_size=8)


def test_dict_batches_need_outputs_and_work_with_them():
    one, two = DictBatches(0), DictBatches(1)
    report = WeightSumMerger().evaluate(one, two, [dict_loader(0), dict_loader(1)])
    assert math.isfinite(report.value("task_1", "ensemble", "loss"))
    assert "task_1/sum/output_change" not in report.metrics
    assert "pass outputs=lambda module, batch" in report.notes[0]
    merger = WeightSumMerger(outputs=lambda module, batch: module(inputs=batch["inputs"])["logits"])
    report = merger.evaluate(one, two, [dict_loader(0), dict_loader(1)])
    inputs, labels = task_loader(0).dataset.tensors
    accuracy = (one.net(inputs).argmax(1) == labels).float().mean().item()
    assert report.value("task_1", "m1", "joint_accuracy") == pytest.approx(accuracy)
    assert report.notes == []


def test_a_step_that_goes_around_forward_has_no_metrics_for_the_ensemble():
    one, two = pair()
    for module in (one, two):
        type(module).test_step = lambda self, batch, batch_idx: self.log("acc", self.net(batch[0]).mean())
    report = WeightSumMerger().evaluate(one, two, [task_loader(0), task_loader(1)])
    assert math.isnan(report.value("task_1", "ensemble", "acc"))
    assert math.isfinite(report.value("task_1", "ensemble", "joint_accuracy"))
    assert "does not call the module itself" in report.notes[0]
    assert len(report.notes) == 1
    assert " - " in str(report)


class Regression(lightning.pytorch.LightningModule):
    def __init__(self, seed):
        super().__init__()
        self.net = mlp((6, 8, 1), seed=seed)

    def forward(self, inputs):
        return self.net(inputs)

    def test_step(self, batch, batch_idx):
        self.log("mse", nn.functional.mse_loss(self(batch[0]), batch[1]))

    def predict_step(self, batch, batch_idx):
        return 2 * self(batch[0])


def test_regression_has_no_accuracies_and_predict_step_gives_the_outputs():
    data = [DataLoader(TensorDataset(torch.randn(9, 6), torch.randn(9, 1)), batch_size=4) for _ in range(2)]
    report = WeightSumMerger().evaluate(Regression(0), Regression(1), data)
    assert report.metric_names("task_1") == ["mse", "output_change"]


def test_segmentation_and_token_outputs_count_classes_in_their_own_dimension():
    class Pixels(lightning.pytorch.LightningModule):
        def __init__(self, seed, last):
            super().__init__()
            torch.manual_seed(seed)
            self.net, self.last = nn.Conv1d(2, 4, 1), last

        def forward(self, inputs):
            outputs = self.net(inputs)
            return outputs.movedim(1, -1) if self.last else outputs

        def test_step(self, batch, batch_idx):
            self(batch[0])

    torch.manual_seed(0)
    inputs, labels = torch.randn(10, 2, 5), torch.randint(4, (10, 5))
    labels[0] = -100
    loaders = [DataLoader(TensorDataset(inputs, labels), batch_size=4)] * 2
    for last in (False, True):
        one, two = Pixels(0, last), Pixels(1, last)
        report = WeightSumMerger().evaluate(one, two, loaders)
        right = (one.net(inputs).argmax(1) == labels)[labels >= 0].float().mean().item()
        assert report.value("task_1", "m1", "joint_accuracy") == pytest.approx(right)


@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    name: str = "output"


def test_the_ensemble_averages_outputs_inside_dataclasses():
    class Wrapped(lightning.pytorch.LightningModule):
        def __init__(self, seed):
            super().__init__()
            self.net = mlp((6, 8, 6), seed=seed)

        def forward(self, inputs):
            return Output(self.net(inputs))

        def test_step(self, batch, batch_idx):
            self.log("loss", nn.functional.cross_entropy(self(batch[0]).logits, batch[1]))

    one, two = Wrapped(0), Wrapped(1)
    report = WeightSumMerger().evaluate(one, two, [task_loader(0), task_loader(1)])
    inputs, labels = task_loader(0).dataset.tensors
    expected = nn.functional.cross_entropy((one.net(inputs) + two.net(inputs)) / 2, labels).item()
    assert report.value("task_1", "ensemble", "loss") == pytest.approx(expected, rel=1e-5)


def test_a_list_of_batches_is_a_dataloader():
    batches = [list(task_loader(task)) for task in (0, 1)]
    report = WeightSumMerger().evaluate(*pair(), batches)
    usual = WeightSumMerger().evaluate(*pair(), [task_loader(0), task_loader(1)])
    assert report.metrics == pytest.approx(usual.metrics)


@pytest.mark.parametrize(
    ("loaders", "message"),
    [
        ({"a": []}, "one dataloader per network, 2, got 1"),
        ({"a/b": [], "c": []}, "can't be empty or contain '/', got 'a/b'"),
        (7, "must be .* or a pair, got int"),
        ([iter([]), []], "'task_1' is a list_iterator, which can be gone through only once"),
    ],
)
def test_wrong_dataloaders_are_named(loaders, message):
    with pytest.raises(ValueError, match=message):
        WeightSumMerger().evaluate(*pair(), loaders)


def test_an_empty_dataloader_is_named():
    empty = DataLoader(TensorDataset(torch.zeros(0, 6), torch.zeros(0, dtype=torch.long)))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(zero|empty)")
        with pytest.raises(ValueError, match="the dataloader of task 'b' yields no batch"):
            WeightSumMerger().evaluate(*pair(), {"a": task_loader(0), "b": empty})


def test_modules_that_cannot_be_evaluated_are_named():
    loaders = [task_loader(0), task_loader(1)]
    with pytest.raises(TypeError, match="two LightningModules of one Lightning package, got Linear and Linear"):
        WeightSumMerger().evaluate(nn.Linear(6, 6), nn.Linear(6, 6), loaders)
    bare = [lightning.pytorch.LightningModule(), lightning.pytorch.LightningModule()]
    with pytest.raises(TypeError, match="need a test_step or a validation_step"):
        WeightSumMerger().evaluate(*bare, loaders)
    with pytest.raises(MergeError, match="shape"):
        WeightSumMerger().evaluate(pair()[0], make_classifier(mlp((6, 3, 6))), loaders)


def test_a_single_row_of_samples_and_training_mode_do_not_matter():
    class Normalised(lightning.pytorch.LightningModule):
        def __init__(self, seed):
            super().__init__()
            torch.manual_seed(seed)
            self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 6))

        def forward(self, inputs):
            return self.net(inputs)

        def test_step(self, batch, batch_idx):
            self.log("loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    one, two = Normalised(0).train(), Normalised(1).train()
    batches = [DataLoader(task_loader(task).dataset, batch_size=1) for task in (0, 1)]
    report = WeightSumMerger().evaluate(one, two, batches)
    whole = WeightSumMerger().evaluate(one, two, [task_loader(0), task_loader(1)])
    assert report.metrics == pytest.approx(whole.metrics, rel=1e-4)


@pytest.fixture(scope="module")
def report():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(workers|LeafSpec)")
        found = WeightSumMerger().evaluate(*pair(), {"first": task_loader(0), "second": task_loader(1)})
    found.metrics["first/sum/odd"] = math.nan
    return found


def test_report_prints_every_figure(report):
    text = str(report)
    for word in ("first (m1)", "second (m2)", *MODELS, "test_loss", "masked_accuracy", "output_change"):
        assert word in text
    assert f"{report.value('first', 'sum', 'test_loss'):.4g}" in text
    assert max(map(len, text.splitlines())) <= 110


def test_report_is_saved_with_nan_as_null_and_loaded_again(report, tmp_path):
    path = report.save(tmp_path / "report.json")
    content = json.loads(path.read_text())
    assert content["schema_version"] == 1
    assert content["metrics"]["first/sum/odd"] is None
    loaded = MergeReport.load(path)
    assert loaded.metrics == pytest.approx(report.metrics, nan_ok=True)
    assert (loaded.tasks, loaded.models, loaded.settings) == (report.tasks, report.models, report.settings)
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_report_refuses_files_that_are_none(report, tmp_path):
    with pytest.raises(ValueError, match=r"saved as .json, or as an .html page, got 'report.txt'"):
        report.save(tmp_path / "report.txt")
    for content in (
        "",
        "[]",
        "{}",
        '{"schema_version": 1, "metrics": {}, "other": 1}',
        '{"schema_version": 1, "metrics": 3}',
    ):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(ValueError, match="is not a merge report"):
            MergeReport.load(tmp_path / "bad.json")
    (tmp_path / "bad.json").write_text('{"schema_version": 99}')
    with pytest.raises(ValueError, match="schema version 99; this version reads 1"):
        MergeReport.load(tmp_path / "bad.json")


def test_report_plot_draws_each_value_of_the_metric(report):
    figure, axes = report.plot("masked_accuracy")
    heights = sorted(patch.get_height() for patch in axes.patches)
    expected = sorted(v for key, v in report.metrics.items() if key.endswith("/masked_accuracy"))
    assert heights == pytest.approx(expected)
    assert report.plot()[1].get_ylabel() == "joint accuracy"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(MODELS)
    with pytest.raises(ValueError, match="no metric 'nothing' in this report; it has test_loss"):
        report.plot("nothing")


def test_report_goes_to_any_logger_and_to_wandb_as_table_and_summary(report, namespace, tmp_path):
    csv_logger = namespace.loggers.CSVLogger(tmp_path)
    wandb_logger = namespace.loggers.WandbLogger(save_dir=tmp_path, offline=True, project="test")
    report.log([csv_logger, wandb_logger])
    run = wandb_logger.experiment
    run.finish()
    assert "merge/first/sum/test_loss" in next(tmp_path.rglob("metrics.csv")).read_text()
    records = wandb_records(run)
    summaries = [record["summary"]["update"] for record in records if record["type"] == "summary"]
    summary = {key: value for update in summaries for key, value in update.items()}
    flat = json.dumps(summary)
    assert f"{report.value('first', 'sum', 'test_acc')}"[:8] in flat
    table = json.loads(next(tmp_path.rglob("merge/table_*.table.json")).read_text())
    assert table["columns"][0] == "model"
    assert [row[0] for row in table["data"]] == list(MODELS)
    cell = table["data"][MODELS.index("sum")][table["columns"].index("test_loss on first")]
    assert cell == pytest.approx(report.value("first", "sum", "test_loss"))


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_true_precisions_convert_every_model(precision):
    report = WeightSumMerger(make_trainer(precision=precision)).evaluate(*pair(), [task_loader(0), task_loader(1)])
    assert math.isfinite(report.value("task_1", "ensemble", "test_loss"))
    assert report.notes == []


class UsesTrainer(lightning.pytorch.LightningModule):
    """Asks for its Trainer in forward and its logger in the test step."""

    def __init__(self, seed):
        super().__init__()
        self.net = mlp((6, 8, 6), seed=seed)

    def forward(self, inputs):
        return self.net(inputs) * (1 + self.trainer.current_epoch)

    def predict_step(self, batch, batch_idx):
        return self(batch)

    def test_step(self, batch, batch_idx):
        self.logger.log_metrics({"own": 1.0})
        self.logger.experiment.add_scalar("picture", 1.0)
        self.log("loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))


def test_modules_may_use_their_trainer_and_logger_and_a_predict_step_that_fails_gives_way_to_forward():
    report = WeightSumMerger().evaluate(UsesTrainer(0), UsesTrainer(1), [task_loader(0), task_loader(1)])
    assert report.notes == []
    assert report.metric_names("task_1") == ["loss", "joint_accuracy", "masked_accuracy", "output_change"]


class OneLogit(Regression):
    def test_step(self, batch, batch_idx):
        self.log("mean", self(batch[0]).mean())


@pytest.mark.parametrize("labels", [[0] * 6, [0, 0, 0, 1, 1, 7]])
def test_a_single_logit_has_no_argmax(labels):
    data = TensorDataset(torch.randn(6, 6), torch.tensor(labels))
    report = WeightSumMerger().evaluate(OneLogit(0), OneLogit(1), [DataLoader(data, batch_size=2)] * 2)
    assert report.metric_names("task_1") == ["mean", "output_change"]


def test_labels_beyond_the_outputs_are_no_classes():
    data = TensorDataset(torch.randn(4, 6), torch.tensor([0, 1, 2, 9]))
    report = WeightSumMerger().evaluate(*pair_of_regressions(), [DataLoader(data, batch_size=2)] * 2)
    assert "joint_accuracy" not in report.metric_names("task_1")


def pair_of_regressions():
    modules = pair()
    for module in modules:
        type(module).test_step = lambda self, batch, batch_idx: self.log("mean", self(batch[0]).mean())
    return modules


def test_an_axis_that_could_be_either_is_not_guessed():
    # Outputs (2, 3, 3) with targets (2, 3): classes may be in the second or in the last dimension.
    assert _class_axis(torch.zeros(2, 3, 3), torch.zeros(2, 3)) is None
    assert _class_axis(torch.zeros(2, 3, 5), torch.zeros(2, 3)) == 2
    assert _class_axis(torch.zeros(2, 5, 3), torch.zeros(2, 3)) == 1
    assert _class_axis(torch.zeros(2, 5), torch.zeros(2)) == 1


def test_a_trainer_is_needed_where_one_is_named():
    with pytest.raises(TypeError, match="trainer must be a Lightning Trainer or None, got Sequential"):
        WeightSumMerger(mlp())


def test_report_names_a_folder_that_is_missing(report, tmp_path):
    with pytest.raises(ValueError, match=r"there is no folder '.*nowhere' to save a report in"):
        report.save(tmp_path / "nowhere" / "report.json")
