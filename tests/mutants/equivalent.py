"""Changes that nothing could notice: (file, change) -> the reason."""

EQUIVALENT: dict[tuple[str, str], str] = {}
