"""What the processor that runs the tests can do."""

import pytest

from aldm.precision import usable_precision

HAS_BF16 = usable_precision("bf16", "cpu") == "bf16"
needs_bf16 = pytest.mark.skipif(
    not HAS_BF16,
    reason="this processor has no bf16 instructions: the jobs compute in fp32 here, and bf16 takes minutes",
)
