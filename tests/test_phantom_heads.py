"""Simulated heads: their equations against pulses one by one, their tissues, their files."""

import hashlib
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest

from aldm.data.modalities import MODALITIES
from aldm.data.phantom import write_phantom
from aldm.data.phantom_heads import Session, canvas_step_mm, draw_head, scan_head, simulate_head
from aldm.data.phantom_lesions import LABELS, Lesions
from aldm.data.phantom_sequences import (
    FIELDS_T,
    TISSUES,
    Contrast,
    GradientEcho,
    Mprage,
    Sequence,
    SpinEcho,
    Subject,
    Tissue,
    derivatives,
)
from aldm.data.phantom_shapes import Canvas, Ellipsoid, Tube, between
from aldm.data.store import VolumeStore
from pipelines.prepare import main as prepare

SPACING_MM = 9.0


def relaxed(mz: float, time_ms: float, tissue: Tissue) -> float:
    """Mz after free recovery."""
    return 1 + (mz - 1) * float(np.exp(-time_ms / tissue.t1_ms))


def pulse_by_pulse(sequence: Sequence, tissue: Tissue) -> float:
    """Signal of a sequence after many repetitions, one event after another (Bloch's equations, ideal spoiling)."""
    mz = signal = 0.0
    for _ in range(60 if not isinstance(sequence, GradientEcho) else 3000):
        if isinstance(sequence, SpinEcho):
            if sequence.ti_ms is not None:
                mz = relaxed(-mz, sequence.ti_ms, tissue)
            signal, mz = mz * float(np.exp(-sequence.te_ms / tissue.t2_ms)), 0.0
            mz = -relaxed(mz, sequence.te_ms / 2, tissue)
            mz = relaxed(mz, sequence.tr_ms - (sequence.ti_ms or 0) - sequence.te_ms / 2, tissue)
            continue
        flip = np.deg2rad(sequence.flip_deg)
        decay = float(np.exp(-sequence.te_ms / tissue.t2_star_ms))
        if isinstance(sequence, GradientEcho):
            signal, mz = mz * float(np.sin(flip)) * decay, mz * float(np.cos(flip))
            mz = relaxed(mz, sequence.tr_ms, tissue)
            continue
        before = sequence.ti_ms - sequence.spacing_ms * (sequence.num_pulses // 2)
        mz = relaxed(-mz, before, tissue)
        for pulse in range(sequence.num_pulses):
            if pulse == sequence.num_pulses // 2:
                signal = mz * float(np.sin(flip)) * decay
            mz = relaxed(mz * float(np.cos(flip)), sequence.spacing_ms, tissue)
        mz = relaxed(mz, sequence.tr_ms - before - sequence.spacing_ms * sequence.num_pulses, tissue)
    return tissue.proton_density * signal


@pytest.mark.parametrize(
    "sequence",
    [
        SpinEcho(500, 12),
        SpinEcho(4000, 100),
        GradientEcho(12, 4, 22),
        Mprage(2000, 3, 900, 9, 7.5, 161),
        Mprage(2300, 3, 1000, 8, 8.0, 120),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["white", "csf", "fat"])
def test_signals_are_those_of_one_pulse_after_another(sequence: Sequence, name: str) -> None:
    for tissue in TISSUES[name].values():
        assert sequence.signal(tissue) == pytest.approx(pulse_by_pulse(sequence, tissue), rel=1e-6)


@pytest.mark.parametrize("name", ["white", "csf", "fat"])
def test_inversion_recovery_is_that_of_one_pulse_after_another(name: str) -> None:
    """The repetition time counts from excitation to excitation."""
    for tissue in TISSUES[name].values():
        for sequence in (SpinEcho(9000, 120, 2400), SpinEcho(2200, 12, 900)):
            assert sequence.signal(tissue) == pytest.approx(pulse_by_pulse(sequence, tissue), rel=1e-6)


def test_contrast_of_every_drawn_protocol_is_that_of_its_modality() -> None:
    for seed in range(300):
        generator = np.random.default_rng(seed)
        field_t = float(generator.choice(FIELDS_T))
        subject = Subject.draw(field_t, generator)
        signal = {}
        for modality in MODALITIES:
            contrast = Contrast.draw(modality, field_t, generator)
            tissues = (subject.with_contrast() if modality == "t1ce" else subject).tissues
            signal[modality] = {name: abs(contrast.signal(name, tissues[name])) for name in tissues}
        for modality in ("t1", "t1ce"):
            assert signal[modality]["white"] > signal[modality]["grey"] > signal[modality]["csf"]
        assert signal["t2"]["csf"] > signal["t2"]["grey"] > signal["t2"]["white"]
        # short repetitions weigh by T1 too, so white matter may be a little brighter
        assert signal["flair"]["grey"] > 0.85 * signal["flair"]["white"]
        assert signal["flair"]["white"] > 2 * signal["flair"]["csf"]
        assert signal["pd"]["grey"] > signal["pd"]["white"]
        assert signal["flair"]["plaque"] > signal["flair"]["white"]
        assert signal["t2"]["stroke"] > signal["t2"]["grey"]
        assert signal["t1ce"]["enhancing"] > signal["t1ce"]["white"]
        for one in signal.values():
            assert one["bone"] < 0.05 * one["grey"]


def test_contrast_agent_shortens_by_its_relaxivity() -> None:
    subject = Subject.draw(1.5, np.random.default_rng(0))
    before, after = subject.tissues["blood"], subject.with_contrast().tissues["blood"]
    mm = subject.gadolinium_mm["blood"]
    assert 1000 / after.t1_ms - 1000 / before.t1_ms == pytest.approx(4.1 * mm)
    assert 1000 / after.t2_ms - 1000 / before.t2_ms == pytest.approx(4.6 * mm)
    assert subject.with_contrast().tissues["csf"] == subject.tissues["csf"]


def test_suppressed_fat_is_dark_and_water_stays() -> None:
    contrast = Contrast(SpinEcho(500, 12))
    suppressed = replace(contrast, fat=0.1)
    tissues = {name: at[1.5] for name, at in TISSUES.items()}
    assert suppressed.signal("white", tissues["white"]) == contrast.signal("white", tissues["white"])
    assert suppressed.signal("fat", tissues["fat"]) < 0.2 * contrast.signal("fat", tissues["fat"])


def test_derivatives_predict_the_signal_of_a_tissue_a_little_off() -> None:
    contrast, tissue = Contrast(Mprage(2000, 3, 900, 9, 7.5, 161)), TISSUES["grey"][3.0]
    value, by_t1, by_t2 = derivatives(contrast, "grey", tissue)
    other = replace(tissue, t1_ms=tissue.t1_ms * 1.04, t2_star_ms=tissue.t2_star_ms * 0.97)
    predicted = value + by_t1 * np.log(1.04) + by_t2 * np.log(0.97)
    assert contrast.signal("grey", other) == pytest.approx(predicted, rel=2e-3)


# --------------------------------------------------------------------------------------------------------------- shapes


def test_distances_of_shapes_are_right_at_and_near_the_surface() -> None:
    x, y, z = (np.array([value]) for value in (4.0, 0.0, 0.0))
    assert Ellipsoid((0, 0, 0), (4, 2, 3)).distance(x, y, z) == pytest.approx(0)
    assert Ellipsoid((0, 0, 0), (5, 5, 5)).distance(x, y, z) == pytest.approx(-1)
    assert Tube((0, -9, 0), (0, 9, 0), 1.0).distance(x, y, z) == pytest.approx(3)
    assert Tube((0, 0, -10), (0, 0, 10), 1.0, 3.0).distance(x, y, z) == pytest.approx(2)


def test_between_interpolates_linearly_and_keeps_its_edge() -> None:
    values = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    result = between(values, [np.array([0.5]), np.array([-3.0, 1.25]), np.array([2.0, 99.0])])
    assert result.tolist() == [[[8.0, 9.0], [13.0, 14.0]]]


# ---------------------------------------------------------------------------------------------------------------- heads


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file of every subject below a folder."""
    files = sorted(folder.rglob("*.nii.gz"))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("heads") / "raw"
    write_phantom(folder, "heads", 4, seed=0, spacing_mm=SPACING_MM)
    return folder


def test_a_subject_is_the_same_alone_and_with_any_number_of_processes(tree: Path, tmp_path: Path) -> None:
    write_phantom(tmp_path / "two", "heads", 2, seed=0, spacing_mm=SPACING_MM, num_processes=2)
    write_phantom(tmp_path / "other", "heads", 1, seed=1, spacing_mm=SPACING_MM)
    two, four = digests(tmp_path / "two"), digests(tree)
    assert two.items() <= four.items()
    assert len(set(four.values())) == len(four)
    assert not set(digests(tmp_path / "other").values()) & set(four.values())


def test_every_subject_has_all_modalities_and_labels_of_what_it_has(tree: Path) -> None:
    for folder in tree.glob("Head_*"):
        roles = {path.name.split("_")[2].split(".")[0] for path in folder.iterdir()}
        assert roles - {"seg"} == set(MODALITIES)
        if "seg" in roles:
            labels = np.asanyarray(nibabel.load(folder / f"{folder.name}_seg.nii.gz").dataobj)
            assert set(np.unique(labels)) <= {0, *LABELS.values()}


def session_of(seed: int, *, stripped: bool) -> int:
    """The first index from 0 whose session is skull-stripped, or not."""
    for index in range(99):
        stream = np.random.SeedSequence([seed, index, 2]).spawn(5)[3]
        if Session.draw(np.random.default_rng(stream)).stripped == stripped:
            return index
    raise AssertionError("no such session")


def test_skull_stripped_is_the_whole_head_times_a_mask() -> None:
    index = session_of(0, stripped=True)
    stored, scans = simulate_head(0, index, SPACING_MM), scan_head(0, index, SPACING_MM)
    assert scans.mask is not None
    inside = scans.mask.data > 0
    for modality, whole in scans.volumes.items():
        data = stored[modality].data
        assert np.array_equal(data > 0, inside)
        gain = data[inside].max() / whole.data[inside].max()
        assert np.abs(data - gain * whole.data * inside).max() <= 1.5
        assert whole.data[~inside].max() > 0.5 * whole.data[inside].max()  # there was a head around it


def test_a_whole_head_has_more_in_it_than_a_brain() -> None:
    volume = simulate_head(0, session_of(0, stripped=False), SPACING_MM)["t1"]
    voxel_ml = abs(np.linalg.det(volume.affine[:3, :3])) / 1000
    assert 2200 < voxel_ml * np.count_nonzero(volume.data > 0.1 * np.percentile(volume.data, 99)) < 7000


def test_lesions_lie_in_the_brain() -> None:
    for kind in ("tumour", "plaques", "stroke"):
        canvas = Canvas(canvas_step_mm(4.0))
        lesions = Lesions(kind, np.random.default_rng(3))
        anatomy = draw_head(canvas, np.random.default_rng(1), lesions)
        labelled = anatomy.labels > 0
        assert labelled.any()
        assert (anatomy.stripping[labelled] < 3).all()
        total = np.zeros(anatomy.labels.size)
        for parts in anatomy.tissues.values():
            for voxels, share in parts:
                total[voxels] += share
        assert total.max() < 1 + 1e-4


def test_prepare_takes_them(tree: Path, tmp_path: Path) -> None:
    shape = ["--spacing-mm", "9", "9", "9", "--spatial-shape", "24", "28", "24"]
    words = [str(tree), str(tmp_path / "store"), "--layout", "brats", *shape, "--num-processes", "1"]
    prepare([*words, "--log-level", "error"])
    records = VolumeStore.open(tmp_path / "store").subjects()
    assert [tuple(record.modalities) for record in records] == [MODALITIES] * 4
    assert {record.region for record in records} <= {"brain", "foreground"}
