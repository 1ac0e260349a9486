"""The scores of a model: its loss, its accuracies and, of a text, its bits per byte."""

import math
from typing import Any

import torch
from torch import Tensor

from statemix.backbone import State
from statemix.model import SequenceModel
from statemix.tasks import IGNORE_INDEX, Batch, Score
from statemix.tasks.base import Task
from statemix.training.config import TrainConfig, at_length


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
        if state is not None:
            state = tuple(layer[: len(batch.tokens)] for layer in state) if carry else None
        here = Batch._make(None if part is None else part.to(device) for part in batch)
        logits, state = answer(model, here, state)
        part = Score.of(logits.argmax(-1), here.targets)
        score = part if score is None else score + part
        total_loss += cross_entropy(logits, here.targets).item()
        all_targets.append(batch.targets.flatten())
    model.train(training)
    assert score is not None
    loss = total_loss / int(score.scored.sum())
    scores = {"loss": loss} | accuracies(score) | {"mad_accuracy": score.mad_accuracy}
    scores |= text_figures(task, loss, torch.cat(all_targets))
    return scores | {"accuracy_by_position": score.accuracy_by_position}


def scores_on(
    split: str, config: TrainConfig, task: Task, model: torch.nn.Module, device: torch.device
) -> dict[str, Any]:
    """The scores of a run's model on a split, with no more tokens at once than in a training step."""
    sequences, at_once = config.eval_sequences, config.sequences_at_once(task)
    return evaluate(model, task, split, sequences, at_once, device, carry=config.carry)


def final_tasks(config: TrainConfig, task: Task) -> dict[str, Task]:
    """The task at every length of the final test; none if there is nothing to test on."""
    if "test" not in task.splits:
        return {}
    lengths = config.test_lengths or (task.seq_len,)
    return {str(length): at_length(task, length) for length in lengths}


def final_scores(config: TrainConfig, task: Task, model: torch.nn.Module, device: torch.device) -> dict[str, Any]:
    """The scores of the final test at each length."""
    tasks = final_tasks(config, task)
    return {length: scores_on("test", config, task, model, device) for length, task in tasks.items()}


def answer(model: torch.nn.Module, batch: Batch, state: State | None) -> tuple[Tensor, State]:
    """The model's logits (B, T, V) and final state; an autoencoder, which has no use for a state, is given none.

    Where most tokens are not scored, their logits are zeros, and cost nothing.
    """
    scored = batch.targets != IGNORE_INDEX
    if isinstance(getattr(model, "module", model), SequenceModel) and 2 * int(scored.sum()) <= scored.numel():
        wanted, state = model(batch.tokens, state, batch.reset, scored)
        return wanted.new_zeros(*scored.shape, wanted.shape[1]).masked_scatter(scored[..., None], wanted), state
    if state is None and batch.reset is None:
        logits, state = model(batch.tokens)
    else:
        logits, state = model(batch.tokens, state, batch.reset)
    return logits, state


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The sum over scored targets, in nats, in float32."""
    flat = logits.flatten(0, 1).float()
    return torch.nn.functional.cross_entropy(flat, targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")


def accuracies(score: Score) -> dict[str, float]:
    """All three: what one hides another shows."""
    names = ("token_accuracy", "sequence_accuracy", "macro_accuracy")
    return {name: getattr(score, name) for name in names}


def text_figures(task: Task, loss: float, targets: Tensor) -> dict[str, float]:
    """Of a text, the loss in bits per byte of the scored targets, comparable between tokenizers, and exp(loss).

    Of any other task nothing.
    """
    if task.vocabulary is None:
        return {}
    scored = targets[targets != IGNORE_INDEX].cpu().numpy()
    size = int(task.vocabulary.byte_lengths[scored].sum())
    perplexity = math.exp(loss) if loss < 700 else math.inf  # beyond lies an OverflowError
    return {"bits_per_byte": loss * len(scored) / math.log(2) / size, "perplexity": perplexity}
