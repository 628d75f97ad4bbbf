"""The scores' own test: what real volumes with a known fault score against themselves."""

import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pandas
import pytest
from scipy.ndimage import gaussian_filter

from aldm.errors import UserError
from aldm.score_reactions import CORRUPTIONS, UNCHANGED, gain, ghost, noise, reaction_table, reactions, shift
from aldm.score_rows import mean_scores, read_csv
from pipelines.evaluate import main

PERFECT = {"psnr_db": math.inf, "nmse": 0, "ssim": 1, "mae": 0, "ms_ssim": 1, "nmi": 2, "sharpness": 1}


class Blobs:
    """Stands in for a store: one subject with a head of smooth tissues and sharp borders, in two modalities."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        x, y, z = np.meshgrid(*(np.linspace(-1, 1, 24),) * 3, indexing="ij")
        self._mask = x**2 + y**2 + z**2 < 0.8
        field = gaussian_filter(rng.standard_normal((24, 24, 24)), 2)
        tissue = np.digitize(field, np.quantile(field[self._mask], (0.3, 0.7)))
        texture = 0.05 * field / field.std()
        self._volumes = {
            name: np.where(self._mask, np.take(levels, tissue) + texture, -1.0) for name, levels in LEVELS.items()
        }

    def volume(self, subject_id: str, name: str) -> np.ndarray:
        return self._volumes[name]

    def mask(self, subject_id: str) -> np.ndarray:
        return self._mask

    def seg(self, subject_id: str) -> None:
        return None


LEVELS = {"t1": (-0.2, 0.0, 0.2), "t2": (0.3, 0.1, 0.0)}


@pytest.fixture(scope="module")
def rows():
    record = SimpleNamespace(subject_id="s", region="brain", modalities=tuple(LEVELS))
    return reactions(Blobs(), [record])


@pytest.fixture(scope="module")
def means(rows):
    """Method -> mean scores inside the brain."""
    table = mean_scores([row for row in rows if row.region == "brain"], with_codec=True)
    return table.droplevel(["sampler", "num_inference_steps", "region"])


def test_the_volumes_themselves_have_the_perfect_value_of_every_score(rows):
    unchanged = [row for row in rows if row.method == UNCHANGED]
    assert [(row.source, row.region) for row in unchanged] == [
        (name, region) for name in LEVELS for region in ("volume", "brain", "edges")
    ]
    for row in unchanged:
        assert {name: getattr(row, name) for name in PERFECT} == pytest.approx(PERFECT, abs=1e-6)


def test_every_fault_moves_some_score_and_more_of_it_moves_the_error_more(means):
    weak, strong = CORRUPTIONS[::2], CORRUPTIONS[1::2]
    for one, other in zip(weak, strong, strict=True):
        assert one.name.split()[0] == other.name.split()[0]
        assert 0.001 < means.nmse[one.name] < means.nmse[other.name]
        assert means.mae[one.name] < means.mae[other.name]


def test_sharpness_sees_the_blur_that_ssim_hardly_sees(means):
    blurred = means.loc["blur, sigma 0.5 voxels"]
    assert blurred.sharpness < 0.7
    assert blurred.ssim > 0.95


def test_nmi_minds_noise_more_than_a_gain(means):
    assert means.nmi["gain 0.8"] > means.nmi["noise, SD 0.02"] + 0.3


def test_a_ghost_is_every_second_line_of_k_space_weakened():
    x = np.random.default_rng(0).uniform(0.2, 0.8, (4, 10, 6))
    lines = np.where(np.arange(10) % 2, 0.7, 1.0)[None, :, None]
    expected = np.fft.ifft(np.fft.fft(x, axis=1) * lines, axis=1).real
    np.testing.assert_allclose(ghost(x, np.random.default_rng(0), 0.3), expected, atol=1e-12)


def test_shift_moves_and_gain_scales():
    x = np.random.default_rng(0).random((5, 4, 3))
    moved = shift(x, np.random.default_rng(0), 2)
    np.testing.assert_array_equal(moved[2:], x[:-2])
    np.testing.assert_array_equal(moved[:2], x[[0, 0]])
    np.testing.assert_array_equal(gain(x, np.random.default_rng(0), 0.5), 0.5 * x)


def test_noise_is_that_of_a_magnitude():
    """Rayleigh where there is no signal: mean sqrt(pi / 2) SD; Gaussian where there is much."""
    draw = partial(noise, rng=np.random.default_rng(0), std=0.02)
    empty, full = draw(np.zeros((40, 40, 40))), draw(np.full((40, 40, 40), 0.5))
    assert empty.mean() == pytest.approx(0.02 * math.sqrt(math.pi / 2), rel=0.01)
    assert full.std() == pytest.approx(0.02, rel=0.01)


def test_the_table_shows_each_score_s_distance_as_a_share_of_its_largest(rows, means):
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in reaction_table(rows, "brain").splitlines()]
    assert lines[0] == ["", "PSNR (dB)", "NMSE", "SSIM", "MAE", "MS-SSIM", "NMI", "sharpness"]
    cells = {line[0]: line[1:] for line in lines[2:]}
    assert list(cells) == [UNCHANGED, *(each.name for each in CORRUPTIONS)]
    assert cells[UNCHANGED] == ["exact", "0.000", "1.000", "0.000", "1.000", "2.000", "1.000"]
    distance = 1 - means.ssim.drop(UNCHANGED)
    name = "noise, SD 0.02"
    assert cells[name][2] == f"{means.ssim[name]:.3f} ({distance[name] / distance.max():.0%})"


def test_the_job_needs_no_model(ixi_store, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["--self-test", "--store", str(ixi_store.path), "--out", str(out), "--max-subjects", "1"]
    assert main([*words, "--dry-run"]) == 0
    assert f"3 volumes, unchanged and with {len(CORRUPTIONS)} faults each" in capsys.readouterr().out
    assert not out.exists()
    assert main(words) == 0
    rows = read_csv(out / "scores.csv")
    assert len(rows) == 3 * 11 * 3  # modalities, faults and none, regions
    assert len(pandas.read_parquet(out / "scores.parquet")) == len(rows)
    assert "ghosting, 30 %" in (out / "scores.md").read_text()
    with pytest.raises(UserError, match="leave out --model"):
        main([*words, "--overwrite", "--model", "somewhere"])
    with pytest.raises(SystemExit):
        main(words[1:])
    assert "required: --model" in capsys.readouterr().err
