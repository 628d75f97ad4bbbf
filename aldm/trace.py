"""What a computation would hold and compute, found by running it on tensors without data."""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

_aten = torch.ops.aten


class Trace(TorchDispatchMode):
    """Counts the bytes of every tensor that is alive and the floating-point operations, operation by operation.

    Use inside FakeTensorMode: shapes and types are computed, no voxel is. Tensors that exist before count only where
    `hold` was told of them. FLOPs count a multiplication and an addition as two, and only matrix products, convolutions
    and attention, as torch.utils.flop_counter does.

    Attributes:
        live_bytes: bytes of the tensors alive now.
        peak_bytes: the most at any time, with the working memory of the operation at hand.
        flops: so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = 0
        self.peak_bytes = 0
        self.flops = 0
        self._storages: dict[int, weakref.ref[Any]] = {}

    def hold(self, tensors: Iterable[Tensor]) -> int:
        """Count tensors that exist already; return the bytes that they add (storages that are shared count once)."""
        before = self.live_bytes
        for tensor in tensors:
            self._count(tensor)
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        return self.live_bytes - before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        self.peak_bytes = max(self.peak_bytes, self.live_bytes + working_bytes(func, args, result))
        self.flops += _flops(func, args, kwargs or {}, result)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return

        def forget(_: object) -> None:
            del self._storages[key]
            self.live_bytes -= size

        self._storages[key] = weakref.ref(storage, forget)
        self.live_bytes += size


def working_bytes(func: Any, args: tuple[Any, ...], result: Any) -> int:
    """Return what an operation holds besides its inputs and its result: a convolution's copies, as on a CPU.

    oneDNN: forward, a copy of the input and of the output in its own layout, then of the output beside the output
    itself; backward, of the output's gradient and of the input or its gradient. Small tensors go another way, see
    `_unfolds`.
    """
    if func is _aten.convolution.default:
        x, weight, y = args[0], args[1], result
        if _unfolds(x, weight):
            return _unfolded_bytes(weight, y)
        return max(_blocked_bytes(x) + _blocked_bytes(y) - _nbytes(y), _blocked_bytes(y))
    if func is _aten.convolution_backward.default:
        y, x, weight = args[:3]
        return _unfolded_bytes(weight, y) if _unfolds(x, weight) else _blocked_bytes(y) + _blocked_bytes(x)
    return 0


def _unfolds(x: Tensor, weight: Tensor) -> bool:
    """Return whether torch computes a convolution as a matrix product of columns (its ConvParams::use_mkldnn)."""
    if x.dtype != torch.float32 or x.shape[0] > 1 or weight.shape[-1] > 3:
        return False
    return x.shape[1:4].numel() <= 20480


def _unfolded_bytes(weight: Tensor, y: Tensor) -> int:
    """Return the bytes of the columns: for each output voxel all inputs of its kernel (a 1^3 kernel needs no copy)."""
    kernel = weight.shape[1:].numel()
    return 0 if weight.shape[2:].numel() == 1 else kernel * y.shape[2:].numel() * y.element_size()


def _blocked_bytes(tensor: Tensor) -> int:
    """Return the bytes of a copy whose channels are padded to whole blocks of 16."""
    channels = tensor.shape[1]
    return _nbytes(tensor) // channels * (-(-channels // 16) * 16)


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _flops(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """Return the operations of a matrix product, convolution or attention; 0 for everything else."""
    if func is _aten._scaled_dot_product_flash_attention_for_cpu.default:
        return int(sdpa_flop_count(*(x.shape for x in args[:3])))
    if func is _aten._scaled_dot_product_flash_attention_for_cpu_backward.default:
        return int(sdpa_backward_flop_count(*(x.shape for x in args[:4])))
    formula = flop_registry.get(func._overloadpacket)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=result))
