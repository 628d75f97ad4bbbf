"""Rigid registration of a subject's volumes onto one of them (SimpleITK, Mattes mutual information)."""

from typing import Any

import numpy as np

from aldm.data.volume import Volume
from aldm.errors import UserError

_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])  # ITK's world is LPS, ours RAS
_SEED = 1
_NUM_SAMPLES = 50_000


def register_rigid(fixed: Volume, moving: Volume) -> Volume:
    """Return `moving` with the affine that lays it over `fixed`; no voxel is changed.

    Mattes mutual information over about 50,000 voxels (fixed seed, one thread: the same result every time), gradient
    descent over rotation and translation at a quarter, half and full resolution. The step shrinks slowly (0.8): at 0.5
    the descent stopped 5 to 8 mm short on simulated heads, at 0.8 within 1 mm.

    Raises:
        UserError: the two do not overlap, or the optimiser fails.
    """
    import SimpleITK as sitk

    method = sitk.ImageRegistrationMethod()
    method.SetNumberOfThreads(1)
    method.SetMetricAsMattesMutualInformation(numberOfHistogramBins=50)
    method.SetMetricSamplingStrategy(method.RANDOM)
    method.SetMetricSamplingPercentage(min(1.0, _NUM_SAMPLES / fixed.data.size), seed=_SEED)
    method.SetInterpolator(sitk.sitkLinear)
    method.SetOptimizerAsRegularStepGradientDescent(
        learningRate=2.0, minStep=1e-2, numberOfIterations=100, relaxationFactor=0.8, gradientMagnitudeTolerance=1e-8
    )
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetShrinkFactorsPerLevel([4, 2, 1])
    method.SetSmoothingSigmasPerLevel([4.0, 2.0, 0.0])
    method.SmoothingSigmasAreSpecifiedInPhysicalUnitsOn()
    fixed_image, moving_image = to_sitk(fixed), to_sitk(moving)
    start = sitk.Euler3DTransform()
    centre = fixed.affine @ [*(np.array(fixed.data.shape) - 1) / 2, 1]
    start.SetCenter((_LPS @ centre)[:3].tolist())
    method.SetInitialTransform(start, inPlace=True)
    try:
        method.Execute(fixed_image, moving_image)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(f"rigid registration failed ({reason}); try `register` none, or align the volumes") from error
    # the last bits may differ from run to run: micrometres and microradians are enough, and the same every time
    start.SetParameters([round(value, 6 if i < 3 else 3) for i, value in enumerate(start.GetParameters())])
    # p_moving = R (p_fixed - c) + c + t in LPS: moving's voxels lie, over fixed, at the inverse of that
    matrix = np.eye(4)
    matrix[:3, :3] = np.array(start.GetMatrix()).reshape(3, 3)
    pivot = np.array(start.GetCenter())
    matrix[:3, 3] = pivot + np.array(start.GetTranslation()) - matrix[:3, :3] @ pivot
    to_fixed = np.round(_LPS @ np.linalg.inv(matrix) @ _LPS, 9)
    return Volume(moving.data, to_fixed @ moving.affine)


def to_sitk(volume: Volume) -> Any:
    """Return the volume as a SimpleITK image (world coordinates in LPS)."""
    import SimpleITK as sitk

    image = sitk.GetImageFromArray(np.ascontiguousarray(volume.data.transpose(2, 1, 0)))
    affine = _LPS @ volume.affine
    spacing = np.array(volume.spacing_mm)
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(affine[:3, 3].tolist())
    image.SetDirection((affine[:3, :3] / spacing).ravel().tolist())
    return image
