"""Enhanced (multi-frame) MR images in DICOM: each frame as the slice that it would be in a classic series.

What a classic file says at its top stands here in functional groups, shared by all frames or of each (PS3.3,
C.7.6.16): plane position and orientation, pixel measures, pixel value transformation, frame content, echo, diffusion.
"""

from typing import TYPE_CHECKING

from aldm.data.dicom_files import Slice, whole_number
from aldm.errors import UserError

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

MAX_FRAMES = 2**14
"""Frames of one image: what each is takes milliseconds to read."""
_SHARED, _PER_FRAME = "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"
_GROUPS = {
    "UnassignedSharedConvertedAttributesSequence": ("EchoTime", "InversionTime"),  # of legacy converted images
    "UnassignedPerFrameConvertedAttributesSequence": ("EchoTime", "EchoNumbers", "InversionTime", "TriggerTime"),
    "PlanePositionSequence": ("ImagePositionPatient",),
    "PlaneOrientationSequence": ("ImageOrientationPatient",),
    "PixelMeasuresSequence": ("PixelSpacing", "SliceThickness"),
    "PixelValueTransformationSequence": ("RescaleSlope", "RescaleIntercept"),
    "FrameContentSequence": ("StackID", "TemporalPositionIndex", "DimensionIndexValues"),
    "MRImageFrameTypeSequence": ("FrameType", "ComplexImageComponent"),
    "MREchoSequence": ("EffectiveEchoTime",),
    "MRModifierSequence": ("InversionTimes",),
    "CardiacSynchronizationSequence": ("NominalCardiacTriggerDelayTime",),
    "MRDiffusionSequence": ("DiffusionBValue", "DiffusionGradientDirectionSequence"),
}
"""Functional group -> the attributes of it that are kept."""
_DIRECTION = "DiffusionGradientDirectionSequence"


def is_enhanced(item: Slice) -> bool:
    """Whether a file keeps its geometry in functional groups."""
    return _PER_FRAME in item.header


def frames_of(item: Slice, max_voxels: int) -> list[Slice]:
    """Return the frames of an enhanced file as slices.

    Args:
        item: the file.
        max_voxels: limit on all its frames together.

    Raises:
        UserError: more voxels than that or too many frames, or not one set of functional groups for each frame.
    """
    header = item.header
    sizes = [whole_number(item, keyword, 1) for keyword in ("Columns", "Rows", "NumberOfFrames")]
    if sizes[0] * sizes[1] * sizes[2] > max_voxels:
        raise UserError(f"{item.path}: {'x'.join(map(str, sizes))} voxels, the limit is {max_voxels:,}")
    if sizes[2] > MAX_FRAMES:
        raise UserError(f"{item.path}: {sizes[2]:,} frames, the limit is {MAX_FRAMES:,}; convert it to NIfTI")
    groups = header[_PER_FRAME].value
    if len(groups) != sizes[2]:
        raise UserError(f"{item.path}: damaged DICOM file: {sizes[2]} frames, functional groups for {len(groups)}")
    shared = header[_SHARED].value[0] if header.get(_SHARED) else None
    return [Slice(item.path, _classic(header, shared, own), item.size, number) for number, own in enumerate(groups)]


def _classic(header: "Dataset", shared: "Dataset | None", own: "Dataset") -> "Dataset":
    """Return what the file says of one frame as a classic header."""
    from pydicom.dataset import Dataset

    made = Dataset()
    made.update({tag: header.get_item(tag, keep_deferred=True) for tag in header.keys()})  # noqa: SIM118
    for keyword in (_SHARED, _PER_FRAME):
        if keyword in made:
            del made[keyword]
    made.file_meta = header.file_meta
    for sequence, keywords in _GROUPS.items():
        group = _first(own, sequence) or _first(shared, sequence)
        if group is not None:
            made.update({group[keyword].tag: group[keyword] for keyword in keywords if keyword in group})
    direction = _first(made, _DIRECTION)
    if direction is not None and "DiffusionGradientOrientation" in direction:
        made["DiffusionGradientOrientation"] = direction["DiffusionGradientOrientation"]
    return made


def _first(groups: "Dataset | None", sequence: str) -> "Dataset | None":
    items = groups.get(sequence) if groups is not None else None
    return items[0] if items else None
