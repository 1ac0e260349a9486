"""kernels/snapshot.py: a snapshot holds as long as nothing of it is exchanged, and no longer."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from statemix import kernels
from statemix.kernels import snapshot

pytestmark = pytest.mark.skipif(kernels.load_problem() is not None, reason=f"no kernels: {kernels.load_problem()}")


class Item:
    pass


class Other:
    pass


class Thing:
    """What is looked at, in each way."""

    def __init__(self) -> None:
        self.counted: dict[str, Any] = {"a": 1}
        self.empty: OrderedDict[int, Any] = OrderedDict()
        self.held: dict[str, Any] = {"left": object(), "none": None}
        self.bare: dict[str, Any] = {}
        self.options: dict[str, Any] = {"p": 0.5, "other": 1}
        self.item, self.level, self.answer = Item(), 3, 5
        self.weight = nn.Parameter(torch.ones(3, 3))
        self.scalar = torch.tensor(1.0)

    def snapshot(self) -> kernels.Snapshot:
        return kernels.Snapshot(
            sizes=[self.counted, self.empty],
            contents=[self.held, self.bare],
            items=[(self.options, "p")],
            objects=[self.item],
            results=[lambda: self.answer],
            attributes=[(self, "level")],
            tensors=[self.weight, self.scalar],
        )


CHANGES: dict[str, Callable[[Thing], Any]] = {
    "an entry more": lambda thing: thing.counted.update(b=2),
    "an entry less": lambda thing: thing.counted.clear(),
    "the first entry of an ordered dictionary": lambda thing: thing.empty.update({1: 2}),
    "another value": lambda thing: thing.held.update(left=object()),
    "a value for None": lambda thing: thing.held.update(none=object()),
    "a value more": lambda thing: thing.held.update(right=object()),
    "a value less": lambda thing: thing.held.pop("none"),
    "another order": lambda thing: thing.held.update(left=thing.held.pop("left")),
    "the first value": lambda thing: thing.bare.update(first=None),
    "another item": lambda thing: thing.options.update(p=0.25),
    "no item": lambda thing: thing.options.pop("p"),
    "another class": lambda thing: setattr(thing.item, "__class__", Other),
    "another result": lambda thing: setattr(thing, "answer", 6),
    "an error for a result": lambda thing: delattr(thing, "answer"),
    "another attribute": lambda thing: setattr(thing, "level", 4),
    "no attribute": lambda thing: delattr(thing, "level"),
    "other data": lambda thing: setattr(thing.weight, "data", torch.ones(3, 3)),
    "shared memory": lambda thing: thing.weight.untyped_storage().share_memory_(),
    "another shape": lambda thing: setattr(thing.weight, "data", thing.weight.data[:2]),
    "other strides": lambda thing: setattr(thing.weight, "data", thing.weight.data.T),
    "another dtype where it lies": lambda thing: setattr(thing.scalar, "data", thing.scalar.data.view(torch.int32)),
    "another tensor's memory": lambda thing: thing.scalar.set_(torch.tensor(1.0)),
}


@pytest.fixture(params=["DLPack", "torch alone"])
def places(request, monkeypatch) -> None:
    """Where tensors lie: as DLPack says, or as in torch before 2.10."""
    if request.param == "torch alone":
        monkeypatch.setattr(snapshot, "_place_of", None)
    elif snapshot._place_of is None:
        pytest.skip("this torch does not say through DLPack where a tensor lies")


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(places, change):
    thing = Thing()
    before = thing.snapshot()
    assert before.holds()
    CHANGES[change](thing)
    assert not before.holds()
    assert not before.holds()


def test_what_does_not_count_is_not_seen(places):
    thing = Thing()
    before = thing.snapshot()
    thing.counted["a"] = 2
    thing.options["other"] = 2
    thing.item.name = "new"
    with torch.no_grad():
        thing.weight.mul_(2)
    assert all(before.holds() for _ in range(1000))
