"""Which modules are changed, and which tests should notice."""

TARGETS = {
    "aldm/diffusion.py": ["diffusion", "sampling"],
    "aldm/sampling.py": ["sampling"],
    "aldm/losses.py": ["losses"],
    "aldm/models/quantizer.py": ["quantizer"],
    "aldm/pace.py": ["training"],
    "aldm/data/preprocess.py": ["preprocess"],
    "aldm/data/intensity.py": ["intensity", "preprocess"],
    "aldm/data/foreground.py": ["preprocess", "intensity"],
    "aldm/data/volume.py": ["volume"],
    "pipelines/champion.py": ["champion"],
    "serve/security.py": ["serve_security", "serve_tokens", "serve_guard"],
    "serve/uploads.py": ["serve_uploads", "serve_inflation", "serve_guard"],
    "serve/jobs.py": ["serve_jobs", "serve_guard"],
}
"""Changed all over: a file and its tests (tests/test_NAME.py)."""

NAMED_ONLY = {
    "aldm/models/denoiser.py": ["denoiser"],
    "aldm/engine.py": ["training"],
    "aldm/training.py": ["training"],
    "aldm/data/dataset.py": ["dataset", "latents"],
    "aldm/data/dicom_header.py": ["dicom"],
    "aldm/models/ms_spade.py": ["ms_spade"],
    "aldm/metrics.py": ["metrics"],
    "aldm/similarity.py": ["metrics"],
    "aldm/references.py": ["references"],
    "aldm/significance.py": ["significance"],
    "aldm/data/layouts.py": ["layouts"],
    "aldm/checkpoint.py": ["checkpoint"],
}
"""Changed where named.py says so."""


def tests_of(file: str) -> list[str]:
    """Return the test files that should notice a change of a file."""
    return [f"tests/test_{name}.py" for name in (TARGETS | NAMED_ONLY)[file]]
