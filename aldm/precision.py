"""The arithmetic of the networks, and what a device can do of it at speed."""

import functools
import logging

import torch

logger = logging.getLogger(__name__)


def usable_precision(precision: str, device: torch.device | str) -> str:
    """Return the precision to compute in: fp32 instead of bf16 on a CPU without bf16 instructions, which is logged.

    There a convolution in bf16 is emulated and takes about thirty times as long as in fp32. GPUs are taken at their
    word.

    Args:
        precision: fp32, tf32 or bf16, as the configuration says.
        device: where the networks run.
    """
    if precision == "bf16" and torch.device(device).type == "cpu" and not _cpu_has_bf16():
        _log_once()
        return "fp32"
    return precision


def arithmetic(
    precision: str, device: torch.device | str, *, lower: bool = True, cache_enabled: bool = True
) -> torch.autocast:
    """Return the context in which networks compute: bf16 autocast, or none.

    From now on, and in the backward passes outside the context too, convolutions and matrix products of fp32 round
    their inputs on a GPU to TF32 (10 bits of fraction instead of 23) if the precision is tf32, and never otherwise:
    PyTorch lets convolutions do so unless it is told.

    Args:
        precision: fp32, tf32 or bf16.
        device: where the networks run.
        lower: False leaves out autocast, for a codec that is to stay lossless.
        cache_enabled: autocast keeps the bf16 copies of weights until the context ends.
    """
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    enabled = lower and precision == "bf16"
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=enabled, cache_enabled=cache_enabled)


@functools.cache
def _cpu_has_bf16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@functools.cache
def _log_once() -> None:
    logger.info("this processor has no bf16 instructions: computing in fp32")
