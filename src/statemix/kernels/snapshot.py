"""Whether objects of Python are as they were: some nanoseconds a look (csrc/snapshot.h), where Python's take fifty."""

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, cast

from torch import Tensor

from statemix.kernels.library import Look, Place, SnapshotCall, library

SIGHTS = {name: i for i, name in enumerate(("size", "contents", "item", "class", "result", "attribute", "place"))}
DLPACK = 1  # the major version whose table of functions is known here
NUMBER = 8  # bytes of an address, and of a size


class DLPackFunctions(ctypes.Structure):
    """What torch offers to whoever reads its tensors: `DLPackExchangeAPI` of DLPack 1.3."""

    _fields_ = [("major", ctypes.c_uint32), ("minor", ctypes.c_uint32)] + [
        (name, ctypes.c_void_p) for name in ("older", "allocate", "from_object", "to_object", "place_of", "stream_of")
    ]


class Snapshot:
    """Objects as they are now, and whether they still are.

    Only which objects are there is compared: a value that is exchanged for an equal one is another.

    Args:
        sizes: dictionaries, of which the number of entries counts.
        contents: dictionaries, of which the values count, in their order.
        items: (dictionary, key), of which the values count.
        objects: of which the classes count.
        results: functions without arguments, of which the results count: None, small integers, what lasts.
        attributes: (owner, name), of which the values count. Whoever keeps this keeps the owners.
        tensors: of which addresses, dtypes, shapes and strides count.
    """

    def __init__(
        self,
        *,
        sizes: Sequence[dict[str, Any]],
        contents: Sequence[dict[str, Any]],
        items: Sequence[tuple[dict[str, Any], str]],
        objects: Sequence[object],
        results: Sequence[Callable[[], Any]],
        attributes: Sequence[tuple[object, str]],
        tensors: Sequence[Tensor],
    ) -> None:
        values = [value for dictionary in contents for value in (*dictionary.values(), _end)]
        found = [dictionary[key] for dictionary, key in items]
        classes, were = [type(item) for item in objects], [function() for function in results]
        names, attached = [name for _, name in attributes], [getattr(*attribute) for attribute in attributes]
        looks = [_look("size", dictionary, len(dictionary)) for dictionary in sizes]
        # what is compared lies together, in order: so the processor fetches it before it is asked for
        addresses = (ctypes.c_void_p * len(values))(*(None if value is _end else id(value) for value in values))
        at = ctypes.addressof(addresses)
        for dictionary in contents:
            looks.append(_look("contents", dictionary, at))
            at += NUMBER * (len(dictionary) + 1)
        for (dictionary, key), value in zip(items, found, strict=True):
            looks.append(_look("item", dictionary, id(value), key))
        looks += [_look("class", item, id(known)) for item, known in zip(objects, classes, strict=True)]
        looks += [_look("result", function, id(result)) for function, result in zip(results, were, strict=True)]
        for (owner, name), value in zip(attributes, attached, strict=True):
            looks.append(_look("attribute", owner, id(value), name))
        self._unseen: Sequence[Tensor] = () if _place_of else tensors
        self._were = _described(self._unseen)
        seen = tensors if _place_of else ()
        places, numbers = _places(seen)
        for tensor, place in zip(seen, places, strict=True):
            looks.append(_look("place", tensor, ctypes.addressof(place)))
        array = (Look * len(looks))(*looks)
        call = SnapshotCall(
            count=len(looks),
            looks=ctypes.addressof(array),
            size=_address(ctypes.pythonapi.PyDict_Size),
            next=_address(ctypes.pythonapi.PyDict_Next),
            item=_address(ctypes.pythonapi.PyDict_GetItemWithError),
            class_of=_address(ctypes.pythonapi.PyObject_Type),
            result=_address(ctypes.pythonapi.PyObject_CallNoArgs),
            attribute=_address(ctypes.pythonapi.PyObject_GetAttr),
            release=_address(ctypes.pythonapi.Py_DecRef),
            forget_error=_address(ctypes.pythonapi.PyErr_Clear),
            place=_address(_place_of) if _place_of else None,
        )
        # an address is that of one object as long as this keeps the object
        self._kept = sizes, contents, items, objects, results, names, tensors, values, found, classes, were, attached
        self._memory = array, addresses, places, numbers
        self._as_it_was, self._call = library().as_it_was, ctypes.byref(call)

    def holds(self) -> bool:
        """Whether all are as they were."""
        return self._as_it_was(self._call) == 1 and (not self._unseen or _described(self._unseen) == self._were)


def _look(sight: str, item: object, wanted: int, name: str | None = None) -> Look:
    return Look(sight=SIGHTS[sight], object=id(item), name=None if name is None else id(name), wanted=wanted)


def _address(function: Any) -> int | None:
    return ctypes.cast(function, ctypes.c_void_p).value


def _places(tensors: Sequence[Tensor]) -> tuple[Any, Any]:
    """Where tensors lie, as an array, and the shapes and strides to which it points."""
    places = (Place * len(tensors))()
    numbers = (ctypes.c_int64 * sum(2 * tensor.ndim for tensor in tensors))()
    numbers[:] = [number for tensor in tensors for number in (*tensor.shape, *tensor.stride())]
    at = ctypes.addressof(numbers)
    for place, tensor in zip(places, tensors, strict=True):
        cast(Callable[..., int], _place_of)(tensor, ctypes.byref(place))
        place.sizes, place.strides = at, at + NUMBER * tensor.ndim
        at += 2 * NUMBER * tensor.ndim
    return places, numbers


def _described(tensors: Sequence[Tensor]) -> list[Any]:
    """Where tensors lie, where DLPack does not say it."""
    return [(tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()) for tensor in tensors]


def _find_place_of() -> Callable[..., int] | None:
    """DLPack's function that says where a tensor lies and makes nothing; None where torch has none, before 2.10."""
    table = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if table is None:
        return None
    get_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)
    pointer = get_pointer(("PyCapsule_GetPointer", ctypes.pythonapi))(table, b"dlpack_exchange_api")
    functions = DLPackFunctions.from_address(pointer)
    if functions.major != DLPACK or not functions.place_of:
        return None
    return ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.POINTER(Place))(functions.place_of)


_end = object()
_place_of = _find_place_of()
