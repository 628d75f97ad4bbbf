"""Changes that nothing could notice: (file, change) -> the reason."""

_LEFT = "left = (1 - fraction) / max(1 - config.decay_start, 1e-9)"
_READ = "content = self._stream.read(min(count, MAX_DIRECTORY + 1) if count >= 0 else MAX_DIRECTORY + 1)"
_STEPS = "self.num_steps = max(min(fitting, self._planned), 1)"

_OUTSIDE = "outside = share_outside(inside, np.eye(4), [box], config.spatial_shape)"
_TOUCHING = "touching = np.zeros(count + 1, bool)"

_ROUNDS = "_SAMPLES, _MAX_ROUNDS = 1_000_000, 50"
_CAST = "data = data.astype(np.float32, copy=False)"
_UNSCALE = "return (x.astype(np.float32, copy=False) + np.float32(1)) * np.float32((high - low) / 2) + np.float32(low)"

_NORM = "x, y, z = np.linalg.norm(self.affine[:3, :3], axis=0)"

_CHUNK = "chunk_rows = max(1, CHUNK_BYTES // (4 * codebook.shape[0]))"
_SHARE = "share = self.ema_count / self.ema_count.sum().clamp_min(1e-12)"
_USED = "used = (self.ema_count > 1e-6)[:, None]"

EQUIVALENT: dict[tuple[str, str], str] = {
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
    ("aldm/data/foreground.py", f"{_ROUNDS}  ->  {_ROUNDS.replace('50', '51')}"): "it has settled long before",
    ("aldm/data/intensity.py", f"{_UNSCALE}  ->  {_UNSCALE.replace('False', 'True')}"): "a copy more",
    ("aldm/data/volume.py", f"{_CAST}  ->  {_CAST.replace('False', 'True')}"): "a copy more",
    ("aldm/data/volume.py", f"{_NORM}  ->  {_NORM.replace('[:3, ', '[:4, ')}"): "the fourth row has 0 there",
    ("aldm/data/volume.py", f"{_TOUCHING}  ->  {_TOUCHING.replace('1', '2')}"): "no label names the last entry",
    ("aldm/models/quantizer.py", f"{_CHUNK}  ->  {_CHUNK.replace('max(1', 'max(2')}"): (
        "it sets memory alone, and only of millions of codes"
    ),
    ("aldm/models/quantizer.py", f"{_SHARE}  ->  {_SHARE.replace('1e-12', '1.25e-12')}"): (
        "keeps a division by 0 away; any small number does"
    ),
    ("aldm/models/quantizer.py", f"{_USED}  ->  {_USED.replace('>', '>=')}"): (
        "a count falls so low while nobody uses the code, which is then that mean already"
    ),
    ("serve/uploads.py", "_BLOCK = 2**20  ->  _BLOCK = 2**21"): "a choice: how much is copied at a time",
    (
        "serve/uploads.py",
        f"{_READ}  ->  {_READ.removesuffix('+ 1)')}- 1)",
    ): "zipfile reads to the end only of a zip's last 64 KiB",
}
