"""The score: its four accuracies by hand, and that the scores of parts add up."""

import dataclasses

import pytest
import torch

from statemix.tasks import IGNORE_INDEX, Score, scaled_accuracy

X = IGNORE_INDEX
TARGETS = torch.tensor([[1, 2, 3, X], [4, X, 1, X], [0, 0, 0, X], [2, 2, 2, X]])
PREDICTIONS = torch.tensor([[1, 2, 3, 0], [4, 9, 1, X], [0, 1, 0, X], [1, 1, 1, X]])


def test_a_score_by_hand():
    score = Score.of(PREDICTIONS, TARGETS)
    # by position: 3 of 4, 1 of 3, 3 of 4, and nothing; rows 0 and 1 are all right
    assert score.right.tolist() == [3, 1, 3, 0]
    assert score.scored.tolist() == [4, 3, 4, 0]
    assert score.token_accuracy == pytest.approx(7 / 11, rel=1e-6)
    assert score.sequence_accuracy == 2 / 4
    assert score.accuracy_by_position == [3 / 4, 1 / 3, 3 / 4, None]


def test_scores_add_up_to_the_score_of_all():
    whole = Score.of(PREDICTIONS, TARGETS)
    for cut in (1, 2, 3):
        parts = [Score.of(PREDICTIONS[rows], TARGETS[rows]) for rows in (slice(cut), slice(cut, None))]
        total = parts[0] + parts[1]
        assert torch.equal(total.right, whole.right)
        assert torch.equal(total.scored, whole.scored)
        assert total.token_accuracy == whole.token_accuracy
        assert total.sequence_accuracy == whole.sequence_accuracy
        assert total.accuracy_by_position == whole.accuracy_by_position
        # unequal parts: a mean of means would be another number
        assert total.token_accuracy != (parts[0].token_accuracy + parts[1].token_accuracy) / 2


def test_the_macro_accuracy_by_hand():
    score = Score.of(PREDICTIONS, TARGETS)
    # targets 0: 2 of 3 right, 1: 2 of 2, 2: 1 of 4, 3: 1 of 1, 4: 1 of 1
    assert score.class_right.tolist() == [2, 2, 1, 1, 1]
    assert score.class_scored.tolist() == [3, 2, 4, 1, 1]
    assert score.macro_accuracy == pytest.approx((2 / 3 + 1 + 1 / 4 + 1 + 1) / 5, rel=1e-6)
    assert score.macro_accuracy != pytest.approx(score.token_accuracy, rel=1e-3)


def test_a_target_that_never_occurs_has_no_part_in_the_macro_accuracy():
    score = Score.of(torch.tensor([[7, 7, 9]]), torch.tensor([[7, 7, 2]]))
    assert score.macro_accuracy == 1 / 2  # 2 and 7; not 0, 1, 3, ... nor 9, which is only predicted
    assert score.mad_accuracy == pytest.approx(1 / 3)  # but for MAD 9 is a class that scores 0


def torchmetrics_macro(predictions, targets):
    """MulticlassAccuracy(average="macro", ignore_index=-100) from its definition: classes with tp + fp + fn > 0."""
    pairs = [(p, t) for p, t in zip(predictions.flatten().tolist(), targets.flatten().tolist(), strict=True) if t != X]
    recalls = []
    for c in range(20):
        tp = sum(p == t == c for p, t in pairs)
        fp = sum(p == c != t for p, t in pairs)
        fn = sum(t == c != p for p, t in pairs)
        if tp + fp + fn:
            recalls.append(tp / (tp + fn) if tp + fn else 0.0)
    return sum(recalls) / len(recalls)


def test_mads_number_is_the_mean_of_the_macro_averages_of_batches(generator):
    targets = torch.randint(12, (30, 7), generator=generator)
    predictions = torch.where(torch.rand(30, 7, generator=generator) < 0.6, targets, targets.roll(1, 0) % 9)
    targets[torch.rand(30, 7, generator=generator) < 0.3] = X
    parts, numbers = [], []
    for rows in (slice(0, 10), slice(10, 20), slice(20, 30)):
        parts.append(Score.of(predictions[rows], targets[rows]))
        numbers.append(torchmetrics_macro(predictions[rows], targets[rows]))
        assert parts[-1].mad_accuracy == pytest.approx(numbers[-1], rel=1e-6)
    total = parts[0] + parts[1] + parts[2]
    assert total.mad_accuracy == pytest.approx(sum(numbers) / 3, rel=1e-6)
    whole = Score.of(predictions, targets)
    assert total.macro_accuracy == whole.macro_accuracy
    assert abs(total.mad_accuracy - whole.mad_accuracy) > 1e-3  # it does depend on the batches
    unequal = Score.of(predictions[:25], targets[:25]) + Score.of(predictions[25:], targets[25:])
    shares = [25 * torchmetrics_macro(predictions[:25], targets[:25])]
    shares.append(5 * torchmetrics_macro(predictions[25:], targets[25:]))
    assert unequal.mad_accuracy == pytest.approx(sum(shares) / 30, rel=1e-6)


def test_parts_with_different_targets_add_up():
    low, short = Score.of(torch.tensor([[0, 1]]), torch.tensor([[0, 2]])), Score.of(TARGETS[:, :1], TARGETS[:, :1])
    with pytest.raises(ValueError, match=r"^Score: lengths must agree to add up, got 2 and 1\.$"):
        low + short
    high = Score.of(torch.tensor([[9, 2]]), torch.tensor([[9, 2]]))
    for total in (low + high, high + low):
        assert total.class_scored.tolist() == [1, 0, 2, 0, 0, 0, 0, 0, 0, 1]
        assert total.class_right.tolist() == [1, 0, 1, 0, 0, 0, 0, 0, 0, 1]
        assert total.macro_accuracy == pytest.approx((1 + 1 / 2 + 1) / 3)


def test_a_score_changes_none_of_its_arguments():
    parts = [Score.of(PREDICTIONS, TARGETS) for _ in range(2)]
    before = [{f.name: getattr(part, f.name) for f in dataclasses.fields(part)} for part in parts]
    copies = [{k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in part.items()} for part in before]
    parts[0] + parts[1]
    for part, copy in zip(before, copies, strict=True):
        assert all(torch.equal(part[k], v) if isinstance(v, torch.Tensor) else part[k] == v for k, v in copy.items())


def test_shapes_must_agree():
    text = r"^Score: `predictions` must have the shape of `targets` = \(4, 4\), got \(4, 3\)\.$"
    with pytest.raises(ValueError, match=text):
        Score.of(PREDICTIONS[:, :3], TARGETS)


def test_scaled_accuracy():
    assert scaled_accuracy(0.5, 0.5) == 0
    assert scaled_accuracy(1.0, 0.2) == 1
    assert scaled_accuracy(0.6, 0.2) == pytest.approx(0.5)
    assert scaled_accuracy(0.0, 0.5) == -1
    for chance in (1, -0.1, 1.5):
        with pytest.raises(ValueError, match=r"^scaled_accuracy: `chance` must be in \[0, 1\), got "):
            scaled_accuracy(0.5, chance)
