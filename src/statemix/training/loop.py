"""train(config): the training loop, its progress bar, and the final test."""

import contextlib
import dataclasses
import json
import math
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

import statemix
from statemix.model import AutoEncoder, SequenceModel, State, TokenModel, load_model
from statemix.tasks import IGNORE_INDEX, Batch, Score, build_task
from statemix.tasks.base import Task, finite_batch
from statemix.text.tokenizer import save_tokenizer
from statemix.training.checkpoint import (
    CONFIG_FILE,
    CURVES_FILE,
    RESULT_FILE,
    RunFolder,
    load_carried,
    load_optimizer,
    locked,
    optimizer_tensors,
)
from statemix.training.config import OptimizerConfig, TrainConfig, first_difference
from statemix.training.curves import plot_curves
from statemix.training.optimizer import make_optimizer
from statemix.training.processes import all_rows, make_accelerator, own_rows, prepare, whole, whole_model
from statemix.training.regularization import dropout_seed, hidden_blocks, row_entropies

RESUME = ("auto", "never")


class Result(NamedTuple):
    """What training ends with. `summary` is also in out/result.json, `metrics` in out/metrics.jsonl.

    summary: version of statemix, parameters, mixer_parameters and state_size (numbers), steps (taken), best_step,
    train_tokens_per_s (median over the log), threads, processes, and what `evaluate` returns for the best checkpoint:
    valid, and test for each length, of which there is none for a text without a part for the test. Of a text also data,
    the fingerprint of the tokens.
    """

    out: Path
    summary: dict[str, Any]
    metrics: list[dict[str, Any]]


def train(
    config: TrainConfig, out: str | Path = "runs/default", *, resume: str = "auto", progress: bool = True
) -> Result:
    """Train the model of a config, keep the checkpoint with the lowest validation loss, and test that one once.

    A run that was killed goes on from its last checkpoint when called again with the same config and folder, and ends
    with the same weights and metrics as one that was never stopped, bit for bit on one process of as many threads.

    Args:
        config: what to train.
        out: folder of the run; see checkpoint.py for what is in it.
        resume: "auto": go on from the last checkpoint in `out`, if there is one. "never": delete that run, start again.
        progress: show a progress bar on standard error, or lines where that is not a terminal.

    Returns:
        The result; that of the finished run if there is nothing left to do.

    Raises:
        ValueError: `out` cannot be used, or holds a run with another config, or a damaged one, or another process is at
            work in it; or the task has no sequence for validation, or for the test at one of its lengths.
        RuntimeError: the loss is no longer finite, or the disk is full; earlier checkpoints are intact.
    """
    if resume not in RESUME:
        raise ValueError(f"train: `resume` must be one of {sorted(RESUME)}, got {resume!r}.")
    folder = RunFolder(out)
    try:
        return _train(config, folder, resume, progress)
    except OSError as error:
        last = folder.checkpoint("last")
        kept = (
            f"The last checkpoint is '{last}'; the run resumes from there." if last else "There is no checkpoint yet."
        )
        raise RuntimeError(f"train: cannot write to '{out}': {error}. {kept}") from error


def _train(config: TrainConfig, folder: RunFolder, resume: str, progress: bool) -> Result:
    task = build_task(config.task)
    with torch.random.fork_rng():  # the caller's random state is not ours to change
        torch.manual_seed(config.seed)
        model = build_model(config, task)
    accelerator = make_accelerator(config.mixed_precision)
    main = accelerator.is_main_process
    with locked(folder.path, "train: `out`") if main else contextlib.nullcontext():
        return _run(config, task, model, accelerator, folder, resume, progress)


def _run(
    config: TrainConfig,
    task: Task,
    model: TokenModel,
    accelerator: Accelerator,
    folder: RunFolder,
    resume: str,
    progress: bool,
) -> Result:
    """Resume or start, train, and test."""
    parts = config.accumulate * accelerator.num_processes
    if config.batch_size % parts:
        raise ValueError(
            f"train: `batch_size` must be a multiple of `accumulate` times the number of processes = {parts}, "
            f"got {config.batch_size}."
        )
    last = None if resume == "never" else folder.checkpoint("last")
    step, best_loss, best_step, reached = 0, math.inf, 0, False
    carried: State | None = None  # of this process's rows, from one step to the next
    if last is not None:
        state = folder.progress(last)
        step, best_loss = state["step"], state["best_loss"]
        difference = first_difference(json.loads(config.to_json()), state["config"])
        if difference is not None:
            raise ValueError(
                f"train: checkpoint '{last}' {difference}. Use --resume=never, another folder, or change the config."
            )
        if state.get("data") != task.fingerprint:
            raise ValueError(
                f"train: checkpoint '{last}' was made with another text: what `task.source` names has changed since. "
                "Use --resume=never, another folder, or the text as it was."
            )
        summary, metrics = folder.read_json(RESULT_FILE), folder.metrics()
        if summary is not None:
            return Result(folder.path, summary, metrics)
        best_checkpoint = folder.checkpoint("best")
        assert best_checkpoint is not None
        for checkpoint in (best_checkpoint, last):  # a damaged best one is better found now than after training
            model.load_weights(checkpoint)
        if config.carry:
            carried = tuple(own_rows(accelerator, rows) for rows in load_carried(last, model, config.batch_size))
        best_step = _step_of(best_checkpoint)
        reached = any(_reached(config, line) for line in metrics if line["step"] <= step)
    else:
        trained = [task.with_seq_len(length) for length in config.train_lengths] or [task]
        splits = {"train": trained, "valid": [task], "test": _test_tasks(config, task)}
        for split, part in ((split, part) for split, parts in splits.items() for part in parts):
            part.draw(split, 1, seed=0, index=0)  # what cannot be drawn is better found now than after training
        if accelerator.is_main_process:
            if resume == "auto":
                folder.check_remains()
            folder.clear()  # of a run that is not wanted, or that had no checkpoint yet
    accelerator.wait_for_everyone()
    wrapped, optimizer = prepare(accelerator, model, lambda model: make_optimizer(model, config.optimizer))
    if last is not None:
        load_optimizer(optimizer, last)
    if accelerator.is_main_process:
        folder.write(CONFIG_FILE, config.to_json().encode())
        if task.vocabulary is not None:
            save_tokenizer(task.vocabulary, folder.path)
        folder.forget_metrics_after(step)
        folder.delete_unused()

    with _Bar(config.steps, step, enabled=progress and accelerator.is_main_process) as bar:
        clock, clock_step = time.perf_counter(), step
        ends_early = config.patience is not None or config.stop_accuracy is not None
        while step < config.steps and not reached and not _impatient(config, step, best_step):
            batch = _training_batch(config, task, step)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config.optimizer, step, config.steps) * group["lr_share"]
            may_end = step + 1 == config.steps or (ends_early and (step + 1) % config.eval_every == 0)
            logged = (step + 1) % config.log_every == 0 or may_end
            penalty = config.row_entropy * max(0.0, 2 * step / config.steps - 1)
            hidden = config.block_dropout if 2 * step < config.steps else 0.0
            with row_entropies(model, enabled=penalty > 0) as entropies, hidden_blocks(model, hidden):
                args = (wrapped, accelerator, batch, carried, config.accumulate)
                with dropout_seed(config, step, accelerator.process_index):
                    done = _gradients(*args, predict=logged, penalty=penalty, entropies=entropies)
            carried = done.state if config.carry else None
            clip = math.inf if config.optimizer.clip is None else config.optimizer.clip
            grad_norm = accelerator.clip_grad_norm_(wrapped.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
            step += 1

            if logged:
                loss = float(accelerator.reduce(done.loss, "sum"))
                predictions, targets = (all_rows(accelerator, rows) for rows in (done.predictions, done.targets))
                line = {"step": step, "loss": loss, **_accuracies(Score.of(predictions, targets))}
                line |= _text_figures(task, loss, targets)
                line |= {"grad_norm": float(whole(grad_norm)), "lr": optimizer.param_groups[0]["lr"]}
                _require_finite(line, ("loss", "grad_norm"), config, folder)
                now = time.perf_counter()
                line["tokens_per_s"] = (step - clock_step) * batch.tokens.numel() / (now - clock)
                clock, clock_step = now, step
                if accelerator.is_main_process:
                    folder.append_metrics(line)
                bar.update(line)
            if step % config.eval_every == 0 or step == config.steps:
                rows, device = config.batch_size, accelerator.device
                with row_entropies(model, enabled=config.row_entropy > 0) as entropies:
                    valid = evaluate(wrapped, task, "valid", config.eval_sequences, rows, device, carry=config.carry)
                if entropies:  # the mean over layers and batches
                    valid["row_entropy"] = float(sum(entropies)) / len(entropies)
                [valid] = broadcast_object_list([valid])  # so that all processes stop at the same step
                line = {"step": step} | {f"valid_{key}": value for key, value in valid.items()}
                _require_finite(line, ("valid_loss",), config, folder)
                penalised = valid["loss"] + config.row_entropy * valid.get("row_entropy", 0.0)
                best = penalised < best_loss
                best_loss, best_step = (penalised, step) if best else (best_loss, best_step)
                reached = _reached(config, line)
                saved = whole_model(accelerator, wrapped), optimizer_tensors(optimizer)
                all_carried = None if carried is None else [all_rows(accelerator, rows) for rows in carried]
                if accelerator.is_main_process:
                    folder.append_metrics(line)
                    bar.update(line)
                    state = {"step": step, "best_loss": best_loss, "config": json.loads(config.to_json())}
                    state |= {} if task.fingerprint is None else {"data": task.fingerprint}
                    state |= {} if task.vocabulary is None else {"tokenizer": task.vocabulary.fingerprint}
                    folder.save_checkpoint(*saved, state, best, all_carried)
                clock, clock_step = time.perf_counter(), step

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _test(config, task, folder, step, accelerator)
    accelerator.wait_for_everyone()
    return Result(folder.path, folder.read_json(RESULT_FILE), folder.metrics())


def build_model(config: TrainConfig, task: Task) -> SequenceModel | AutoEncoder:
    """The untrained model of a config and its task, initialised from torch's global random state."""
    options = dataclasses.asdict(config.model)
    if task.autoencoder:
        return AutoEncoder(task.vocab_size, mixer=config.mixer, seq_len=task.length, **options)
    return SequenceModel(task.vocab_size, mixer=config.mixer, **options)


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Of step 0 .. steps - 1: lr (step + 1) / warm-up steps, then a cosine or a line from lr to final_lr."""
    warmup = round(config.warmup * steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    left = 1 - progress if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.final_lr + (config.lr - config.final_lr) * left


class _Done(NamedTuple):
    """What a step leaves besides gradients: `loss` is this process's share of it, and the rest is of its rows.

    predictions: (rows, T), or (0,) where they were not asked for.
    """

    loss: Tensor
    predictions: Tensor
    targets: Tensor
    state: State


def _gradients(
    model: torch.nn.Module,
    accelerator: Accelerator,
    batch: Batch,
    state: State | None,
    parts: int,
    *,
    predict: bool,
    penalty: float,
    entropies: list[Tensor],
) -> _Done:
    """Add up the gradients of the mean loss over the scored targets of a global batch, in so many parts.

    The mean is over the targets of all parts and processes, so that it is one loss however they divide the batch. A
    part that is answered without an error adds its share of the penalty times the sum of `entropies`, which its forward
    fills.
    """
    scored = max(1, int((batch.targets != IGNORE_INDEX).sum()))  # 0 if each of few short windows ends its document
    tokens, targets, reset = (None if rows is None else own_rows(accelerator, rows) for rows in batch)
    assert tokens is not None
    assert targets is not None
    losses, predictions, states = [], [], []
    for number in range(parts):
        rows = slice(number * len(tokens) // parts, (number + 1) * len(tokens) // parts)
        before = None if state is None else tuple(layer[rows] for layer in state)
        with contextlib.nullcontext() if number == parts - 1 else accelerator.no_sync(model):
            logits, after = _logits(model, tokens[rows], before, None if reset is None else reset[rows])
            loss = _cross_entropy(logits, targets[rows]) / scored
            total = loss * accelerator.num_processes  # whose gradients are averaged, not added up
            if entropies and bool(((logits.argmax(-1) == targets[rows]) | (targets[rows] == IGNORE_INDEX)).all()):
                total = total + penalty / parts * sum(entropies)
            entropies.clear()
            accelerator.backward(total)
        losses.append(loss.detach())
        predictions.append(logits.argmax(-1) if predict else targets.new_empty(0))
        states.append([layer.detach() for layer in after])
    whole_state = tuple(torch.cat(layer) if parts > 1 else layer[0] for layer in zip(*states, strict=True))
    return _Done(torch.stack(losses).sum(), torch.cat(predictions), targets, whole_state)


def _logits(model: torch.nn.Module, tokens: Tensor, state: State | None, reset: Tensor | None) -> tuple[Tensor, State]:
    """The model's answer; an autoencoder has no use for a state."""
    logits, state = model(tokens) if state is None and reset is None else model(tokens, state, reset)
    return logits, state


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    task: Task,
    split: str,
    sequences: int,
    batch_size: int,
    device: torch.device | str = "cpu",
    *,
    carry: bool = False,
) -> dict[str, Any]:
    """Loss in nats per scored token and the accuracies of a model on the first sequences of a split.

    Args:
        model: of tokens, on the device.
        task: whose `evaluation` has the sequences.
        split: "valid" or "test".
        sequences: how many.
        batch_size: of them at a time, at most.
        device: of the model.
        carry: each row of a batch begins with the state that the same row of the last one ended with. False: with none.

    Returns:
        loss, the accuracies; and of a text bits_per_byte and perplexity, exp(loss).
    """
    training = model.training
    model.eval()
    total_loss, score, state, all_targets = 0.0, None, None, []
    for batch in task.evaluation(split, sequences, batch_size):
        rows, reset = len(batch.tokens), batch.reset
        state = tuple(layer[:rows] for layer in state) if carry and state is not None else None
        targets = batch.targets.to(device)
        logits, state = _logits(model, batch.tokens.to(device), state, None if reset is None else reset.to(device))
        part = Score.of(logits.argmax(-1), targets)
        score = part if score is None else score + part
        total_loss += _cross_entropy(logits, targets).item()
        all_targets.append(batch.targets.flatten())
    model.train(training)
    assert score is not None
    loss = total_loss / int(score.scored.sum())
    figures = {**_accuracies(score), "mad_accuracy": score.mad_accuracy}
    figures |= _text_figures(task, loss, torch.cat(all_targets))
    return {"loss": loss, **figures, "accuracy_by_position": score.accuracy_by_position}


def _text_figures(task: Task, loss: float, targets: Tensor) -> dict[str, float]:
    """Of a text, the loss in bits per byte of the scored targets, comparable between tokenizers, and exp(loss).

    Of any other task nothing.
    """
    if task.vocabulary is None:
        return {}
    scored = targets[targets != IGNORE_INDEX].cpu().numpy()
    size = int(task.vocabulary.byte_lengths[scored].sum())
    perplexity = math.exp(loss) if loss < 700 else math.inf  # beyond lies an OverflowError
    return {"bits_per_byte": loss * len(scored) / math.log(2) / size, "perplexity": perplexity}


def _accuracies(score: Score) -> dict[str, float]:
    """All three: what one hides another shows."""
    names = ("token_accuracy", "sequence_accuracy", "macro_accuracy")
    return {name: getattr(score, name) for name in names}


def _training_batch(config: TrainConfig, task: Task, step: int) -> Batch:
    """The global batch of a step: a pure function of its arguments, so that a run can go on anywhere."""
    if config.carry:
        return task.carried(config.batch_size, seed=config.seed, index=step)
    if config.train_lengths:
        task = task.with_seq_len(config.train_lengths[step * len(config.train_lengths) // config.steps])
        rows = max(1, config.batch_size * build_task(config.task).length // task.length)
        return task.sample("train", rows, seed=config.seed, index=step)
    if config.train_sequences is None:
        return task.sample("train", config.batch_size, seed=config.seed, index=step)
    return finite_batch(task, config.train_sequences, config.batch_size, seed=config.seed, step=step)


def _reached(config: TrainConfig, line: dict[str, Any]) -> bool:
    """Whether a line of metrics is a validation at the accuracy that ends training."""
    return config.stop_accuracy is not None and line.get("valid_token_accuracy", 0.0) >= config.stop_accuracy


def _impatient(config: TrainConfig, step: int, best_step: int) -> bool:
    """Whether so many validations have passed since the best one that training ends."""
    return config.patience is not None and step - best_step >= config.patience * config.eval_every


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def _test_tasks(config: TrainConfig, task: Task) -> list[Task]:
    """The task at every length of the final test; none if there is nothing to test on."""
    if "test" not in task.splits:
        return []
    return [task.with_seq_len(length) for length in config.test_lengths or (task.seq_len,)]


def _test(config: TrainConfig, task: Task, folder: RunFolder, step: int, accelerator: Accelerator) -> None:
    """Score the best checkpoint on the test split, plot the curves, and write result.json last: it marks the end."""
    best = folder.checkpoint("best")
    assert best is not None
    best_step = _step_of(best)
    model, device = load_model(best).to(accelerator.device), accelerator.device
    metrics = folder.metrics()
    test = {}
    for longer in _test_tasks(config, task):
        # no more tokens at once than in a training step
        batch_size = max(1, config.batch_size * task.length // longer.length)
        scores = evaluate(model, longer, "test", config.eval_sequences, batch_size, device, carry=config.carry)
        test[str(longer.seq_len)] = scores
    [valid] = [line for line in metrics if line["step"] == best_step and "valid_loss" in line]
    speeds = [line["tokens_per_s"] for line in metrics if "tokens_per_s" in line]
    plot_curves({config.mixer["name"]: metrics}, folder.path / CURVES_FILE)
    summary = {
        "version": statemix.__version__,
        "parameters": model.num_parameters(),
        "mixer_parameters": sum(p.numel() for mixer in model.mixers for p in mixer.parameters()),
        "state_size": model.state_size,
        "steps": step,
        "best_step": best_step,
        "train_tokens_per_s": sorted(speeds)[len(speeds) // 2],
        "threads": torch.get_num_threads(),
        "processes": accelerator.num_processes,
        "valid": {key.removeprefix("valid_"): value for key, value in valid.items() if key != "step"},
        "test": test,
    }
    summary |= {} if task.fingerprint is None else {"data": task.fingerprint}
    folder.write_json(RESULT_FILE, summary)


def _require_finite(line: dict[str, Any], names: tuple[str, ...], config: TrainConfig, folder: RunFolder) -> None:
    """Raise RuntimeError unless the named numbers of a line of metrics are finite: the run has diverged."""
    if all(math.isfinite(line[name]) for name in names):
        return
    numbers = ", ".join(f"{name} is {line[name]}" for name in names)
    last = folder.checkpoint("last")
    kept = f"The last checkpoint is '{last}'" if last else "There is no checkpoint yet"
    raise RuntimeError(
        f"train: at step {line['step']} {numbers}, with optimizer.lr={config.optimizer.lr} and "
        f"mixer.normalization={config.mixer.get('normalization')}. Lower the first, or take a bounded one. {kept}."
    )


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum over scored targets, in nats, in float32."""
    flat = logits.flatten(0, 1).float()
    return torch.nn.functional.cross_entropy(flat, targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")


class _Bar:
    """A rich progress bar on a terminal; a line per validation elsewhere."""

    def __init__(self, steps: int, done: int, enabled: bool) -> None:
        self.console = Console(stderr=True, quiet=not enabled)
        self.text, self.valid = "", ""
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=not enabled or not sys.stderr.isatty(),
        )
        self.id = self.progress.add_task("training", total=steps, completed=done)

    def __enter__(self) -> "_Bar":
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def update(self, line: dict[str, Any]) -> None:
        """Show a line of metrics.jsonl."""
        if "loss" in line:
            self.text = f"loss {line['loss']:.3f}  acc {line['token_accuracy']:.3f}  {line['tokens_per_s']:,.0f} tok/s"
        else:
            self.valid = f"  valid {line['valid_loss']:.3f} acc {line['valid_token_accuracy']:.3f}"
            if self.progress.disable:
                self.console.print(f"step {line['step']:>6}  {self.text}{self.valid}", highlight=False)
        self.progress.update(self.id, completed=line["step"], description=self.text + self.valid)
