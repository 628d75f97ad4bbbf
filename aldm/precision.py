"""The arithmetic that a device can do at speed."""

import functools
import logging

import torch

logger = logging.getLogger(__name__)


def usable_precision(precision: str, device: torch.device | str) -> str:
    """Return the precision to compute in: fp32 instead of bf16 on a CPU without bf16 instructions, which is logged.

    There a convolution in bf16 is emulated and takes about thirty times as long as in fp32. GPUs are taken at their
    word.

    Args:
        precision: fp32 or bf16, as the configuration says.
        device: where the networks run.
    """
    if precision == "bf16" and torch.device(device).type == "cpu" and not _cpu_has_bf16():
        _log_once()
        return "fp32"
    return precision


@functools.cache
def _cpu_has_bf16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@functools.cache
def _log_once() -> None:
    logger.info("this processor has no bf16 instructions: computing in fp32")
