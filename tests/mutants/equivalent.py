"""Changes that nothing could notice: (file, change) -> the reason."""

_BRIDGE = "noise_kept = math.sqrt(max(to_std**2 - variance, 0.0)) / now_std if now_std > 0 else 0.0"

EQUIVALENT: dict[tuple[str, str], str] = {
    ("aldm/sampling.py", f"{_BRIDGE}  ->  {_BRIDGE[:-3]}1.0"): "at tau = 1 it multiplies z - z_start, which is 0",
    ("aldm/pace.py", "RECENT_STEPS = 50  ->  RECENT_STEPS = 51"): "a choice: tests take it from here",
}
