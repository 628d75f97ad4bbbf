"""Changes that nothing could notice: (file, change) -> the reason."""

_BRIDGE = "noise_kept = math.sqrt(max(to_std**2 - variance, 0.0)) / now_std if now_std > 0 else 0.0"

_LEFT = "left = (1 - fraction) / max(1 - config.decay_start, 1e-9)"
_STEPS = "self.num_steps = max(min(fitting, self._planned), 1)"

_OUTSIDE = "outside = share_outside(inside, np.eye(4), [box], config.spatial_shape)"
_TOUCHING = "touching = np.zeros(count + 1, bool)"

EQUIVALENT: dict[tuple[str, str], str] = {
    ("aldm/sampling.py", f"{_BRIDGE}  ->  {_BRIDGE[:-3]}1.0"): "at tau = 1 it multiplies z - z_start, which is 0",
    ("aldm/pace.py", "RECENT_STEPS = 50  ->  RECENT_STEPS = 51"): "a choice: tests take it from here",
    ("aldm/pace.py", f"{_LEFT}  ->  {_LEFT[:-5]}1.25e-09)"): "keeps a division by 0 away; any small number does",
    ("aldm/pace.py", "_planned: int = 0  ->  _planned: int = 1"): "Pace.plan, the only way to one, always gives it",
    (
        "aldm/pace.py",
        "_fitted: bool = False  ->  _fitted: bool = True",
    ): "Pace.plan, the only way to one, always gives it",
    ("aldm/pace.py", f"{_STEPS}  ->  {_STEPS[:-2]}2)"): "nothing is fitted before MEASURED_STEPS - 1 steps are done",
    (
        "aldm/data/preprocess.py",
        f"{_OUTSIDE}  ->  {_OUTSIDE.replace('4', '5')}",
    ): "of an affine the first three rows and four columns are read",
    ("aldm/data/volume.py", f"{_TOUCHING}  ->  {_TOUCHING.replace('1', '2')}"): "no label names the last entry",
}
