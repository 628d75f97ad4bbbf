"""The translator that ships with the package: small, trained on simulated subjects, to try things out with."""

from pathlib import Path

DESCRIPTION = (
    "the built-in default model: T1, T2 and PD at 3 mm, trained for minutes on simulated subjects; it shows how things "
    "work, not what the method can do"
)


def default_model() -> Path:
    """Return its translator folder. README.md there says how it was made and how well it does."""
    return Path(__file__).parent
