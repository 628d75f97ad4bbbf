"""Changes by name: faults that would decide what users see, in modules that are changed elsewhere only at random.

A row is (name, file, what stands there once, what stands there instead).
"""

from functools import cache
from pathlib import Path

from operators import Mutant, replaced

NAMED: list[tuple[str, str, str, str]] = [
    ("scaled-linear betas", "aldm/diffusion.py", "torch.linspace(start**0.5, end**0.5,", "torch.linspace(start, end,"),
    ("cosine's limit", "aldm/diffusion.py", "clamp(max=0.999)", "clamp(max=0.9999)"),
    ("time step of regression", "aldm/diffusion.py", "torch.full((batch,), float(last)", "torch.full((batch,), 0.0"),
    ("eta of DDIM", "aldm/sampling.py", "eta**2 * (to.sigma", "eta * (to.sigma"),
    (
        "start of regression",
        "aldm/sampling.py",
        'z_start if config.objective == "regression" else',
        "z_start if False else",
    ),
    ("DPM-Solver++'s step ratio", "aldm/sampling.py", "(h / (2 * previous_h))", "0.5"),
    ("DDPM's variance", "aldm/sampling.py", "variance = 1 - ratio**2", "variance = 1 - ratio"),
    ("rho of Karras", "aldm/sampling.py", "log_ratios = -7 *", "log_ratios = -6 *"),
    ("n - 1", "aldm/sampling.py", "squares / (num_samples - 1)", "squares / num_samples"),
    ("edges at full resolution only", "aldm/losses.py", "difference = F.avg_pool3d(difference, 2)", "pass"),
    ("weighted L1", "aldm/losses.py", "(errors * channel_weights.view(1, -1, 1, 1, 1)).mean()", "errors.mean()"),
    (
        "image's share of a noise prediction",
        "aldm/models/denoiser.py",
        "image_weights / (image_weights * squares).mean(dim=1, keepdim=True)",
        "image_weights / squares",
    ),
    ("sign of the hinge", "aldm/losses.py", "F.relu(1 + fake_logits", "F.relu(1 - fake_logits"),
    ("straight-through", "aldm/models/quantizer.py", "z_q = z + (z_q - z).detach()", "z_q = z + (z_q - z)"),
    ("first averages", "aldm/models/quantizer.py", "torch.where(self.step == 0, 0.0, self.decay)", "self.decay"),
    (
        "codes by error",
        "aldm/models/quantizer.py",
        "(rows - selected).square().sum(dim=1)",
        "torch.ones_like(rows[:, 0])",
    ),
    ("codes met once", "aldm/models/quantizer.py", "masked_fill_(counts > 0, 0)", "masked_fill_(counts > 1, 0)"),
    ("linear decay", "aldm/pace.py", "max(1 - config.decay_start, 1e-9)", "max(config.decay_start, 1e-9)"),
    ("warm-up", "aldm/pace.py", "(step + 1) / warmup", "step / warmup"),
    ("weight decay", "aldm/engine.py", "weight_decay=player.config.weight_decay,", "weight_decay=0.0,"),
    ("clipping", "aldm/engine.py", "math.inf if clip is None else clip", "math.inf"),
    ("average of the weights", "aldm/engine.py", "averages, news, 1 - decay", "averages, news, decay"),
    ("best score at resume", "aldm/training.py", 'state["step"], state["best"],', 'state["step"], None,'),
    ("step at resume", "aldm/training.py", '= state["step"], state', "= 0, state"),
    ("padding of validation", "aldm/training.py", "int(i < number)", "1"),
    (
        "diagonal of held-out latents",
        "aldm/data/dataset.py",
        'self._fraction = same_modality_fraction if split == "train" else 0.0\n        self._flips',
        "self._fraction = same_modality_fraction\n        self._flips",
    ),
    ("flips", "aldm/data/dataset.py", 'latents.num_flips if split == "train" else 1', "latents.num_flips"),
    (
        "rows and columns of DICOM",
        "aldm/data/dicom_header.py",
        "[row * spacing[1], column * spacing[0], step]",
        "[row * spacing[0], column * spacing[1], step]",
    ),
    ("uneven slices", "aldm/data/dicom_header.py", "if np.abs(residual @ normal).max() > tolerance:", "if False:"),
    (
        "gates",
        "aldm/models/ms_spade.py",
        "source * self.num_modalities + target",
        "target * self.num_modalities + source",
    ),
    ("1 + gamma", "aldm/models/ms_spade.py", ".to(gamma.dtype), 1 + gamma)", ".to(gamma.dtype), gamma)"),
    ("affine of a crop", "aldm/data/volume.py", "moved[:3, 3] += ", "moved[:3, 3] -= "),
    ("anti-aliasing", "aldm/data/volume.py", "np.maximum(step**2 - 1, 0)", "np.maximum(step**2, 0)"),
    ("anti-aliasing twice", "aldm/data/volume.py", "sigma = np.sqrt(", "sigma = 2 * np.sqrt("),
    (
        "padding",
        "aldm/data/preprocess.py",
        "crop_or_pad(whole, start, box, low)",
        "crop_or_pad(whole, start, box, 0.0)",
    ),
    ("outside the view", "aldm/data/preprocess.py", "fill=found.dark", "fill=0.0"),
    ("headroom", "aldm/data/intensity.py", "HEADROOM[rule] * (high - low)", "(high - low)"),
    ("lower PSNR wins", "pipelines/champion.py", "self.psnr_db > self.to_beat_db", "self.psnr_db < self.to_beat_db"),
    ("a tie wins", "pipelines/champion.py", "self.psnr_db > self.to_beat_db", "self.psnr_db >= self.to_beat_db"),
    ("pairs of one alone", "pipelines/champion.py", "own.keys() & theirs.keys()", "own.keys() | theirs.keys()"),
    ("any address", "serve/security.py", "if not _is_loopback(client):", "if False:"),
    ("eight digits", "serve/security.py", "compare_digest(digest, known)", "compare_digest(digest[:8], known[:8])"),
    ("Content-Length", "serve/security.py", "if int(length) > limit:", "if False:"),
    ("bodies that arrive", "serve/security.py", "if self.arriving and self.arriving + size > limit:", "if False:"),
    (
        "voxels of a NIfTI",
        "serve/uploads.py",
        "load_nifti(upload, max_voxels=settings.max_voxels)",
        "load_nifti(upload)",
    ),
    ("voxels of a series", "serve/uploads.py", "max_voxels=settings.max_voxels, patient=False", "patient=False"),
    ("bytes of a zip", "serve/uploads.py", "left -= _unpack_entry(", "_ = _unpack_entry("),
    ("links", "serve/uploads.py", "if stat.S_ISLNK(entry.external_attr >> 16):", "if False:"),
    ("encrypted", "serve/uploads.py", "if entry.flag_bits & 1:", "if False:"),
    ("queue's limit", "serve/jobs.py", "+ len(self._tickets) >= self.settings.max_queue", "> self.settings.max_queue"),
    ("counter of deaths", "serve/jobs.py", "job.deaths += 1", "pass"),
    ("head of the queue", "serve/jobs.py", "self._queue.insert(0, job_id)", "self._queue.append(job_id)"),
    ("SSIM's constant", "aldm/similarity.py", "K2 = 0.03", "K2 = 0.01"),
    ("Holm's factors", "aldm/significance.py", "np.arange(p.size, 0, -1)", "p.size"),
    (
        "mask of the intensity map",
        "aldm/references.py",
        "store.volume(record.subject_id, n)[mask]",
        "store.volume(record.subject_id, n).ravel()",
    ),
    ("middle of a quantile", "aldm/references.py", "- counts / 2)", "- counts)"),
    ("sign of the PSNR", "aldm/metrics.py", "-10 * math.log10(mean_square)", "-20 * math.log10(mean_square)"),
    ("split of 80", "aldm/data/layouts.py", "bucket < 80", "bucket < 70"),
    ("hash of a checkpoint", "aldm/checkpoint.py", 'if weights_hash(weights) != record["hash"]:', "if False:"),
]


@cache
def named_mutants() -> list[tuple[str, Mutant]]:
    """Return names and mutants.

    Raises:
        ValueError: a row whose text is not in its file, or more than once.
    """
    found = []
    for name, file, before, after in NAMED:
        source = Path(file).read_text()
        if source.count(before) != 1:
            raise ValueError(f"tests/mutants/named.py, {name!r}: {file} has {before!r} {source.count(before)} times")
        start = source.index(before)
        found.append((name, replaced(file, source, start, start + len(before), after)))
    return found
