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
    """Return what an operation holds besides its inputs and its result: a convolution's copies in its own layout.

    As oneDNN does on a CPU: forward, a copy of the input and of the output, then of the output beside the output itself;
    backward, of the output's gradient and of the input or its gradient.
    """
    if func is _aten.convolution.default:
        copy = _blocked_bytes(result)
        return max(_blocked_bytes(args[0]) + copy - _nbytes(result), copy)
    if func is _aten.convolution_backward.default:
        return _blocked_bytes(args[0]) + _blocked_bytes(args[1])
    return 0


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
