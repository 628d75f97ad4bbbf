"""NaN around the patient is background, as resampling and masking programs write it; NaN inside is a fault."""

import logging

import nibabel
import numpy as np
import pytest

from aldm.config import PreprocessConfig
from aldm.data.foreground import find_foreground
from aldm.data.integrity import load_labels
from aldm.data.preprocess import prepare_volume
from aldm.data.volume import load_nifti
from aldm.errors import UserError

SHAPE = (24, 28, 20)
CONFIG = PreprocessConfig(spacing_mm=(6.0, 6.0, 6.0), spatial_shape=(24, 32, 24))


def brain() -> tuple[np.ndarray, np.ndarray]:
    """Intensities around 0, and where they are a brain's."""
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in SHAPE), indexing="ij")
    data = np.sin(7 * x) + 0.5 * np.cos(9 * y + z) + np.random.default_rng(0).normal(0, 0.1, SHAPE)
    return data.astype(np.float32), x**2 + y**2 + z**2 < 0.6


def saved(path, data):
    nibabel.save(nibabel.Nifti1Image(data, np.diag([6.0, 6, 6, 1])), path)
    return path


def test_nan_around_a_brain_is_what_zeros_around_it_are(tmp_path, caplog):
    data, inside = brain()
    with caplog.at_level(logging.WARNING):
        volume, _ = load_nifti(saved(tmp_path / "nan.nii", np.where(inside, data, np.float32(np.nan))))
    count = int((~inside).sum())
    assert f"nan.nii: {count} of {data.size} voxels are NaN around the patient: taken as background" in caplog.text
    assert volume.num_nan == count
    zeros, _ = load_nifti(saved(tmp_path / "zeros.nii", np.where(inside, data, np.float32(0))))
    assert zeros.num_nan == 0
    np.testing.assert_array_equal(find_foreground(volume).mask, inside)
    np.testing.assert_array_equal(prepare_volume(volume, CONFIG)[0], prepare_volume(zeros, CONFIG)[0])


def test_nan_inside_is_refused_with_the_count(tmp_path):
    data, inside = brain()
    data = np.where(inside, data, np.float32(np.nan))
    data[12, 14, 8:11] = np.nan
    with pytest.raises(UserError, match=rf"bad\.nii: 3 of {data.size} voxels are NaN inside the patient.*background"):
        load_nifti(saved(tmp_path / "bad.nii", data))
    with pytest.raises(UserError, match="every voxel is NaN, wanted finite numbers"):
        load_nifti(saved(tmp_path / "all.nii", np.full(SHAPE, np.nan, np.float32)))


def test_labels_may_have_nan_around_them_too(tmp_path):
    _, inside = brain()
    labels = np.where(inside, np.float32(0), np.float32(np.nan))
    labels[10:14, 12:16, 8:12] = 4
    np.testing.assert_array_equal(load_labels(saved(tmp_path / "seg.nii", labels)).data, np.nan_to_num(labels))
