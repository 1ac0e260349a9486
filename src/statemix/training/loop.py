"""train(config): a run from its first step, or its last checkpoint, to its test."""

import contextlib
import dataclasses
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor

import statemix
from statemix import records
from statemix.backbone import State
from statemix.files import locked
from statemix.mixers.library import describe_kernels
from statemix.model import AutoEncoder, SequenceModel, load_model
from statemix.tasks import IGNORE_INDEX, Batch, Score, build_task
from statemix.tasks.base import Task, finite_batch
from statemix.text.tokenizer import save_tokenizer
from statemix.training.checkpoint import (
    AGAIN,
    CONFIG_FILE,
    CURVES_FILE,
    RESULT_FILE,
    STATE_FILE,
    TRAIN_FILE,
    TRIAL_FILE,
    RunFolder,
    load_before,
    load_carried,
    load_optimizer,
    optimizer_tensors,
    read_result,
    step_of,
)
from statemix.training.config import TrainConfig, first_difference
from statemix.training.curriculum import Curriculum
from statemix.training.curves import plot_curves
from statemix.training.evaluate import (
    accuracies,
    answer,
    cross_entropy,
    final_scores,
    final_tasks,
    scores_on,
    text_figures,
)
from statemix.training.lineage import Lineage
from statemix.training.listeners import Listener, check_listeners, give_all, listening
from statemix.training.optimizer import learning_rate, make_optimizer, set_learning_rate
from statemix.training.processes import all_rows, make_accelerator, own_rows, prepare, whole, whole_model
from statemix.training.progress import Bar, Stopwatch
from statemix.training.pruning import Pruning
from statemix.training.regularization import one_hot_gates, penalty, regularized, row_entropies, strengths

RESUME = ("auto", "best", "never")


class Result(NamedTuple):
    """What training ends with. `summary` is also in out/result.json, `metrics` in out/metrics.jsonl.

    summary: version of statemix, parameters, mixer_parameters and state_size (numbers), steps (taken), best_step,
    train_tokens_per_s (median over the log), threads, processes, kernels (whose ran the mixer: "own", or those of a
    package and its version), and what `evaluate` returns for the best checkpoint: valid, and test for each length, of
    which there is none for a text without a part for the test. Of a text also data, the fingerprint of the tokens; and
    where there is something to say, init_from, whose weights came first, and lengthened, each time that the run was.
    """

    out: Path
    summary: dict[str, Any]
    metrics: list[dict[str, Any]]


def train(
    config: TrainConfig,
    out: str | Path = "runs/default",
    *,
    resume: str = "auto",
    progress: bool = True,
    on_log: Listener | None = None,
    tracker: str | None = None,
    init_from: str | Path | None = None,
    lengthen: bool = False,
) -> Result:
    """Train the model of a config, keep the checkpoint with the lowest validation loss, and test that one once.

    A run that was killed goes on from its last checkpoint when called again with the same config and folder, and ends
    with the same weights and metrics as one that was never stopped, bit for bit on one process of as many threads.

    Args:
        config: what to train.
        out: folder of the run; see checkpoint.py for what is in it.
        resume: "auto": go on from the last checkpoint in `out`, if there is one. "best": from the best one, as where
            the last is damaged. "never": delete that run, start again.
        progress: show a progress bar on standard error, or lines where that is not a terminal.
        on_log: called in the main process with a copy of each line of metrics, of a validation once its checkpoint is
            written. After a kill the lines since the last checkpoint come again. An exception ends the run, which
            resumes as after a kill.
        tracker: "mlflow", "tensorboard" or "wandb", whose package must be installed: it is given each line
            of metrics once, also those from before it was named, and a resumed run goes on with its series.
            TensorBoard's events are in out/tensorboard.
        init_from: folder of another run, or of a checkpoint or model, whose (best) weights are the first of this one.
            Its model must have the same options, and a text the same tokens. A run that resumes is past that.
        lengthen: let the run in `out`, of this config with fewer steps, which it has taken, go on to those of the
            config. The learning rate, and all else that goes by the share of the steps taken, is from there on that of
            a run of so many steps.

    Returns:
        The result; that of the finished run if there is nothing left to do.

    Raises:
        ValueError: `out` cannot be used, or holds a run with another config, or one whose files are not as they were
            written, or another process is at work in it; or the task has no sequence for validation, or for the test at
            one of its lengths; or a tracker is not installed, or what the run is to come from is not there.
        RuntimeError: the loss is no longer finite, the disk is full, or `on_log` or the tracker raised an exception;
            earlier checkpoints are intact.
    """
    if resume not in RESUME:
        raise ValueError(f"train: `resume` must be one of {sorted(RESUME)}, got {resume!r}.")
    check_listeners(on_log, tracker)
    lineage = Lineage(out, resume, init_from, lengthen)
    folder = RunFolder(out)
    try:
        run = Training(config, folder, lineage)
        with locked(folder.path, "train: `out`") if run.is_main else contextlib.nullcontext():
            return _train(run, resume, progress, on_log, tracker)
    except OSError as error:
        raise RuntimeError(f"train: cannot write to '{out}': {error}. {folder.kept()}") from error


def _train(run: "Training", resume: str, progress: bool, on_log: Listener | None, tracker: str | None) -> Result:
    """Begin or resume, take the steps that are left, and test."""
    if not run.is_main:
        on_log = tracker = None
    last = None if resume == "never" else run.folder.checkpoint("best" if resume == "best" else "last")
    if last is None:
        run.begin(resume)
    else:
        saved = run.check(last)
        if resume == "auto" and (run.folder.path / RESULT_FILE).exists() and not run.lineage.news:
            if tracker is not None:
                give_all(run.folder, run.config, tracker)
            return run.result()
        run.load(last, saved)
    run.prepare(last)
    with (
        Bar(run.config.steps, run.step, enabled=progress and run.is_main) as bar,
        listening(run.folder, run.config, bar.update, on_log, tracker) as tell,
    ):
        if run.lineage.news:
            bar.say(run.lineage.news)
        while not run.has_ended():
            outcome = run.train_step()
            if run.is_logged(run.step):
                tell(run.log(outcome))
            if run.is_validated(run.step):
                line = run.validate()
                run.save()
                tell(line)
    run.test()
    return run.result()


class Outcome(NamedTuple):
    """What a step leaves besides new weights, of this process's rows and of its share of the loss.

    predictions: (rows, T), or (0,) in a step that is not logged.
    """

    loss: Tensor
    predictions: Tensor
    targets: Tensor
    grad_norm: Tensor


class Training:
    """A run at work: its model and optimizer, and how far it is. Every process has one and makes the same calls.

    Args:
        config: what to train.
        folder: where the main process keeps it.
        lineage: where it comes from.
    """

    def __init__(self, config: TrainConfig, folder: RunFolder, lineage: Lineage) -> None:
        self.config, self.folder, self.lineage = config, folder, lineage
        self.task = build_task(config.task)
        with torch.random.fork_rng():  # the caller's random state is not ours to change
            torch.manual_seed(config.seed)
            self.model = build_model(config, self.task)
        self.accelerator = make_accelerator(config.mixed_precision)
        self.is_main = self.accelerator.is_main_process
        parts = config.accumulate * self.accelerator.num_processes
        if config.batch_size % parts:
            raise ValueError(
                f"train: `batch_size` must be a multiple of `accumulate` times the number of processes = {parts}, "
                f"got {config.batch_size}."
            )
        self.step, self.best_loss, self.best_step = 0, math.inf, 0
        self.is_accurate = False  # as `stop_accuracy` asks for
        self.carried: State | None = None  # of this process's rows, from one step to the next
        self.curriculum = None if config.curriculum.first is None else Curriculum(config, self.task)
        self.metrics_size = 0  # bytes of metrics.jsonl up to this step

    def begin(self, resume: str) -> None:
        """Take first weights, and clear the folder of a run that is not wanted, or that had no checkpoint yet."""
        self.lineage.begin(self.model, self.task, self.folder.path)
        trained = [self.task.with_seq_len(length) for length in self.config.train_lengths] or [self.task]
        if self.curriculum is not None:
            trained = self.curriculum.tasks()
        final = final_tasks(self.config, self.task).values()
        for split, tasks in (("train", trained), ("valid", [self.task]), ("test", final)):
            for task in tasks:
                task.draw(split, 1, seed=0, index=0)  # what cannot be drawn is better found now than after training
        if self.is_main:
            if resume != "never":
                self.folder.check_remains()
            self.folder.clear()

    def check(self, last: Path) -> dict[str, Any]:
        """What a checkpoint says of itself. Raises ValueError unless it and the best are whole, and of this run."""
        saved = self.folder.check(last)
        self.lineage.go_on(self.config, last, saved)
        self._check_same(last, saved)
        if self.curriculum is not None and "curriculum" not in saved:
            raise records.damaged("train", last / TRAIN_FILE, "`curriculum` is missing", AGAIN)
        if (best := self.folder.best_of(saved)) != last:
            self._check_same(best, self.folder.check(best))
        return saved

    def _check_same(self, checkpoint: Path, saved: dict[str, Any]) -> None:
        """Raise ValueError unless a checkpoint is of this config and of the same data."""
        difference = first_difference(self.lineage.config_at(self.config, saved["step"]), saved["config"])
        if difference is not None:
            shorter = "made with steps=" in difference and self.config.steps > saved["config"].get("steps", math.inf)
            longer = "--lengthen if it has ended, " if shorter else ""
            raise ValueError(
                f"train: checkpoint '{checkpoint}' {difference}. Use {longer}--resume=never, another folder, or change "
                "the config."
            )
        if saved.get("data") != self.task.fingerprint:
            raise ValueError(
                f"train: checkpoint '{checkpoint}' was made with another text (`data` in its {TRAIN_FILE}): what "
                "`task.source` names has changed since. Use --resume=never, another folder, or the text as it was."
            )

    def load(self, last: Path, saved: dict[str, Any]) -> None:
        """Take weights, state and how far it is from the last checkpoint."""
        best = self.folder.path / saved["best"]
        for checkpoint in (best, last):  # a best one of another model is better found now than after training
            self.model.load_weights(checkpoint)
        if self.config.carry:
            rows = load_carried(last, self.model, self.config.batch_size)
            self.carried = tuple(own_rows(self.accelerator, layer) for layer in rows)
        self.step, self.best_loss, self.best_step = saved["step"], saved["best_loss"], step_of(best)
        if self.curriculum is not None:
            try:
                self.curriculum.restore(saved["curriculum"], self.model)
            except ValueError as error:
                raise records.damaged("train", last / TRAIN_FILE, error, AGAIN) from error
        self.is_accurate = any(self._is_accurate(line) for line in self.folder.metrics() if line["step"] <= self.step)
        self.metrics_size = saved["metrics"]["bytes"]
        if self.lineage.news and self.has_ended():
            raise ValueError(
                f"train: `lengthen` is of a run that more steps would change, but '{last}' had come to its end by "
                "`patience`, `stop_accuracy` or its curriculum."
            )

    def prepare(self, last: Path | None) -> None:
        """Share the model between the processes, make its optimizer, and let the folder be as at this step."""
        self.accelerator.wait_for_everyone()
        self.wrapped, self.optimizer = prepare(
            self.accelerator, self.model, lambda model: make_optimizer(model, self.config.optimizer)
        )
        if last is not None:
            load_optimizer(self.optimizer, last)
        if (pruning := self._pruning) is not None and pruning.trial is not None:
            assert last is not None
            pruning.before = load_before(last, self.model, self.optimizer)
        if self.is_main:
            if self.lineage.news:
                self.folder.reopen()
            self.folder.write(CONFIG_FILE, self.config.to_json().encode())
            if self.task.vocabulary is not None:
                save_tokenizer(self.task.vocabulary, self.folder.path)
            if last is not None:
                self.folder.go_on_from(last)
            self.folder.keep_metrics(self.metrics_size)
            self.folder.delete_unused()
        self.stopwatch = Stopwatch(self.step)

    def has_ended(self) -> bool:
        """Whether all steps are taken, or no more are needed."""
        config = self.config
        in_vain = self.step - self.best_step  # steps since the best validation
        impatient = config.patience is not None and in_vain >= config.patience * config.eval_every
        return self.step >= config.steps or self.is_accurate or impatient or self._is_learned()

    @property
    def _pruning(self) -> Pruning | None:
        return None if self.curriculum is None else self.curriculum.pruning

    def _is_learned(self) -> bool:
        """Whether the curriculum has come to its end."""
        return self.curriculum is not None and self.curriculum.has_ended

    def is_logged(self, step: int) -> bool:
        """Whether a step, the first of which is 1, has a line in the metrics: also each that may be the last."""
        config = self.config
        ends_early = config.patience is not None or config.stop_accuracy is not None
        may_end = step == config.steps or (ends_early and step % config.eval_every == 0)
        return step % config.log_every == 0 or may_end or self._is_learned()

    def is_validated(self, step: int) -> bool:
        """Whether a validation and a checkpoint follow a step."""
        return step % self.config.eval_every == 0 or step == self.config.steps or self._is_learned()

    def train_step(self) -> Outcome:
        """Update the weights by the next batch."""
        config, accelerator, learner = self.config, self.accelerator, self.curriculum
        batch = training_batch(config, self.task, self.step) if learner is None else learner.batch(self.step)
        scored = max(1, int((batch.targets != IGNORE_INDEX).sum()))  # 0 if each of few short windows ends its document
        own = Batch._make(None if rows is None else own_rows(accelerator, rows) for rows in batch)
        strong = strengths(config, self.step, learner)
        rate = learning_rate(config.optimizer, self.step, config.steps)
        set_learning_rate(self.optimizer, strong.learning_rate * rate)
        with regularized(self.model, config, strong, self.step, accelerator.process_index) as entropies:
            loss, predictions = self._add_gradients(own, scored, entropies, strong.entropy)
        clip = math.inf if config.optimizer.clip is None else config.optimizer.clip
        grad_norm = accelerator.clip_grad_norm_(self.wrapped.parameters(), clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        if learner is not None:
            learner.observe(all_rows(accelerator, predictions), batch.targets.to(predictions.device))
            if learner.pruning is not None:
                learner.pruning.keep_silent(self.model)
            learner.prune(self.model, self.optimizer, self.step)
            learner.ask(self.model)
        return Outcome(loss, predictions, own.targets, grad_norm)

    def _add_gradients(
        self, own: Batch, scored: int, entropies: list[Tensor], entropy_weight: float
    ) -> tuple[Tensor, Tensor]:
        """Add up the gradients of a batch, part by part. Returns the loss, and the predictions where they are read.

        The loss is a mean over the `scored` targets of all parts and processes: one loss however they divide the batch.
        Each part adds its share of the penalty, of the `entropies` that its forward fills.
        """
        accelerator, parts, size = self.accelerator, self.config.accumulate, len(own.tokens)
        weight = entropy_weight / parts
        losses, predictions, states = [], [own.targets.new_empty(0)], []
        for number in range(parts):
            rows = slice(number * size // parts, (number + 1) * size // parts)
            part = Batch._make(None if tensor is None else tensor[rows] for tensor in own)
            before = None if self.carried is None else tuple(layer[rows] for layer in self.carried)
            with contextlib.nullcontext() if number == parts - 1 else accelerator.no_sync(self.wrapped):
                logits, after = answer(self.wrapped, part, before)
                loss = cross_entropy(logits, part.targets) / scored
                total = loss * accelerator.num_processes  # whose gradients are averaged, not added up
                accelerator.backward(total + penalty(entropies, weight, logits, part.targets))
            entropies.clear()
            losses.append(loss.detach())
            if self.curriculum is not None or self.is_logged(self.step + 1):
                predictions.append(logits.argmax(-1))
            if self.config.carry:
                states.append([layer.detach() for layer in after])
        if self.config.carry:
            self.carried = tuple(torch.cat(layer) for layer in zip(*states, strict=True))
        return torch.stack(losses).sum(), torch.cat(predictions)

    def log(self, outcome: Outcome) -> dict[str, Any]:
        """Write the line of metrics of a step, and return it."""
        loss = float(self.accelerator.reduce(outcome.loss, "sum"))
        predictions = all_rows(self.accelerator, outcome.predictions)
        targets = all_rows(self.accelerator, outcome.targets)
        line: dict[str, Any] = {"step": self.step, "loss": loss}
        line |= accuracies(Score.of(predictions, targets))
        line |= text_figures(self.task, loss, targets)
        line |= {"grad_norm": float(whole(outcome.grad_norm)), "lr": self.optimizer.param_groups[0]["lr"]}
        self._check_finite(line, "loss", "grad_norm")
        if self.curriculum is not None:
            line |= self.curriculum.figures()
        line["tokens_per_s"] = self.stopwatch.steps_per_second(self.step) * targets.numel()
        self._append(line)
        return line

    def validate(self) -> dict[str, Any]:
        """Score the model on the validation split, see whether it is the best so far, and write and return the line.

        Its rows of gates are one-hot where they are in training.
        """
        silenced = None if self.curriculum is None else self.curriculum.silenced
        with (
            row_entropies(self.model, enabled=self.config.row_entropy > 0) as entropies,
            one_hot_gates(self.model, silenced),
        ):
            valid = scores_on("valid", self.config, self.task, self.wrapped, self.accelerator.device)
        if entropies:  # the mean over layers and batches
            valid["row_entropy"] = float(sum(entropies)) / len(entropies)
        [valid] = broadcast_object_list([valid])  # so that all processes stop at the same step
        line = {"step": self.step} | {f"valid_{key}": value for key, value in valid.items()}
        self._check_finite(line, "valid_loss")
        penalised = valid["loss"] + self.config.row_entropy * valid.get("row_entropy", 0.0)
        if penalised < self.best_loss or self._is_learned():
            self.best_loss, self.best_step = penalised, self.step
        self.is_accurate = self._is_accurate(line)
        if self.curriculum is not None:
            self.curriculum.judge(valid["token_accuracy"])
        self._append(line)
        return line

    def save(self) -> None:
        """Write a checkpoint, the best one if the validation of this step was."""
        model, moments = whole_model(self.accelerator, self.wrapped), optimizer_tensors(self.optimizer)
        carried = None if self.carried is None else [all_rows(self.accelerator, layer) for layer in self.carried]
        if self.is_main:
            progress = {"step": self.step, "best_loss": self.best_loss, "config": json.loads(self.config.to_json())}
            if self.task.fingerprint is not None:
                progress["data"] = self.task.fingerprint
            if self.task.vocabulary is not None:
                progress["tokenizer"] = self.task.vocabulary.fingerprint
            if self.curriculum is not None:
                progress["curriculum"] = self.curriculum.state()
            progress |= self.lineage.facts()
            is_best = self.best_step == self.step
            others = {}
            if carried is not None:
                others[STATE_FILE] = {str(layer): part for layer, part in enumerate(carried)}
            if (pruning := self._pruning) is not None and pruning.before:
                others[TRIAL_FILE] = pruning.before
            self.folder.save_checkpoint(model, moments, progress, best=is_best, others=others)
        self.stopwatch.start(self.step)

    def test(self) -> None:
        """Score the best checkpoint on the test split, plot the curves, and write result.json last: the end."""
        self.accelerator.wait_for_everyone()
        if self.is_main:
            best = self.folder.checkpoint("best")
            if best is None:
                raise OSError("another program deleted it during the run")
            model, metrics = load_model(best).to(self.accelerator.device), self.folder.metrics()
            summary = self._summary(model, metrics, step_of(best))
            plot_curves({self.config.mixer["name"]: metrics}, self.folder.path / CURVES_FILE)
            self.folder.finish(summary)
        self.accelerator.wait_for_everyone()

    def result(self) -> Result:
        """What the folder of a run that has ended holds."""
        return Result(self.folder.path, read_result(self.folder.path, "train"), self.folder.metrics())

    def _summary(
        self, model: SequenceModel | AutoEncoder, metrics: list[dict[str, Any]], best_step: int
    ) -> dict[str, Any]:
        """The content of result.json, of the model of the best step."""
        [valid] = [line for line in metrics if line["step"] == best_step and "valid_loss" in line]
        speeds = [line["tokens_per_s"] for line in metrics if "tokens_per_s" in line]
        summary = {
            "version": statemix.__version__,
            "parameters": model.num_parameters(),
            "mixer_parameters": sum(p.numel() for mixer in model.mixers for p in mixer.parameters()),
            "state_size": model.state_size,
            "steps": self.step,
            "best_step": best_step,
            "train_tokens_per_s": sorted(speeds)[len(speeds) // 2],
            "threads": torch.get_num_threads(),
            "processes": self.accelerator.num_processes,
            "kernels": {self.config.mixer["name"]: describe_kernels([*self.model.mixers, *model.mixers])},
            "valid": {key.removeprefix("valid_"): value for key, value in valid.items() if key != "step"},
            "test": final_scores(self.config, self.task, model, self.accelerator.device),
        }
        summary |= self.lineage.facts()
        if self.task.fingerprint is not None:
            summary["data"] = self.task.fingerprint
        if self.curriculum is not None:
            summary |= self.curriculum.summary(model)
        if self.config.sharpen is not None:
            for mixer in model.mixers:
                mixer.sharpen(self.config.sharpen)
            summary["sharpened"] = final_scores(self.config, self.task, model, self.accelerator.device)
        return summary

    def _is_accurate(self, line: dict[str, Any]) -> bool:
        """Whether a line of metrics is a validation at the accuracy that ends training."""
        stop = self.config.stop_accuracy
        return stop is not None and line.get("valid_token_accuracy", 0.0) >= stop

    def _append(self, line: dict[str, Any]) -> None:
        if self.is_main:
            self.folder.append_metrics(line)

    def _check_finite(self, line: dict[str, Any], *names: str) -> None:
        """Raise RuntimeError unless the named numbers of a line of metrics are finite: the run has diverged."""
        if all(math.isfinite(line[name]) for name in names):
            return
        numbers = ", ".join(f"{name} is {line[name]}" for name in names)
        raise RuntimeError(
            f"train: at step {line['step']} {numbers}, with optimizer.lr={self.config.optimizer.lr} and "
            f"mixer.normalization={self.config.mixer.get('normalization')}. Lower the first, or take a bounded one. "
            f"{self.folder.kept()}"
        )


def build_model(config: TrainConfig, task: Task) -> SequenceModel | AutoEncoder:
    """The untrained model of a config and its task, initialised from torch's global random state."""
    options = dataclasses.asdict(config.model)
    if task.autoencoder:
        return AutoEncoder(task.vocab_size, mixer=config.mixer, seq_len=task.length, **options)
    return SequenceModel(task.vocab_size, mixer=config.mixer, **options)


def training_batch(config: TrainConfig, task: Task, step: int) -> Batch:
    """The global batch of a step: a pure function of its arguments, so that a run can go on anywhere."""
    if config.carry:
        return task.carried(config.batch_size, seed=config.seed, index=step)
    if config.train_lengths:
        now = task.with_seq_len(config.train_lengths[step * len(config.train_lengths) // config.steps])
        rows = max(1, config.batch_size * task.length // now.length)
        return now.sample("train", rows, seed=config.seed, index=step)
    if config.train_sequences is None:
        return task.sample("train", config.batch_size, seed=config.seed, index=step)
    return finite_batch(task, config.train_sequences, config.batch_size, seed=config.seed, step=step)
