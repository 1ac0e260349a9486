"""From a tensor to an address that a kernel may read: nothing else in the package asks a tensor where it lies."""

from torch import Tensor

LOW = 2**40  # bytes: the address of what has no storage is its offset, below this; most others are above


def dense(x: Tensor) -> Tensor:
    """The tensor itself where its memory holds its numbers one after another, and otherwise a copy that does.

    Memory may hold them with the other sign: the imaginary part of a conjugate is a view with its negation pending.
    (A conjugation can be pending in complex numbers only, which no kernel takes.)
    """
    return x if x.is_contiguous() and not x.is_neg() else x.resolve_neg().contiguous()


def address(x: Tensor | None) -> int | None:
    """Where a tensor lies, dense or with strides that the kernel is told; None of no tensor, or of one without numbers.

    Raises:
        RuntimeError: its memory was given back, as FSDP does between the calls of a module.
    """
    if x is None:
        return None
    place = x.data_ptr()
    if place >= LOW:
        return place
    if x.numel() == 0:
        return None
    if x.untyped_storage().nbytes() == 0:
        raise RuntimeError(
            f"kernels: every tensor must have memory, got one of shape {tuple(x.shape)} with a storage of 0 bytes."
        )
    return place
