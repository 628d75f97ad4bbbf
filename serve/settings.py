"""How a translation service is run: the arguments of `serve.app:build_app` and, as flags, of `aldm serve`."""

import math
import os
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from aldm.errors import UserError

JOB_STORE = "aldm-jobs"
"""Name of the actor that keeps the jobs."""
NAMESPACE = "aldm-serve"


class Settings(BaseModel):
    """What a service needs to know. Paths are on the machines of the cluster; all replicas must see `work_dir`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str | None = Field(None, description="translator folder or models:/NAME@ALIAS; none takes the built-in one")
    work_dir: str = Field("aldm-service", description="folder of uploads, jobs and results, on a shared file system")
    token_file: str | None = Field(
        None, description="file of hashed tokens (aldm serve --new-token); without one only this machine is answered"
    )
    num_replicas: int = Field(1, ge=1, description="copies of the model, the fewest where there may be more")
    max_replicas: int | None = Field(
        None, ge=1, description="most copies: one more for every job that waits, fewer again when idle; none keeps them"
    )
    use_gpu: bool = Field(False, description="give each copy of the model a GPU")
    precision: Literal["fp32", "tf32", "bf16"] | None = Field(
        None, description="arithmetic; none takes the model's own"
    )
    threads: int | None = Field(None, ge=1, description="CPU threads of a copy; none shares this machine's cores")
    max_batch_size: int = Field(1, ge=1, le=64, description="translations that a copy makes in one pass")
    max_memory_gb: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="most memory of a copy on a CPU, GB (10^9 bytes)"
    )
    max_queue: int = Field(8, ge=1, description="jobs waiting or being uploaded; more are answered 503")
    max_upload_mb: float = Field(512, gt=0, allow_inf_nan=False, description="largest request, MB (10^6 bytes)")
    max_upload_seconds: float = Field(
        300, gt=0, allow_inf_nan=False, description="longest time that a request's body may take to arrive"
    )
    max_voxels: int = Field(2**26, ge=8, description="largest volume, voxels")
    max_grid_voxels: int = Field(2**26, ge=8, description="largest volume on the model's grid, voxels")
    max_samples: int = Field(16, ge=1, description="most samples of one translation")
    max_evaluations: int = Field(4096, ge=1, description="most network evaluations of one job, samples and targets in")
    keep_hours: float = Field(
        24, gt=0, allow_inf_nan=False, description="hours that a finished job and its results are kept"
    )
    max_folder_gb: float = Field(
        20, gt=0, allow_inf_nan=False, description="largest work_dir, GB; the oldest finished jobs go first"
    )

    @model_validator(mode="after")
    def _check_replicas(self) -> "Settings":
        if self.max_replicas is not None and self.max_replicas < self.num_replicas:
            raise ValueError(f"max_replicas is {self.max_replicas}, wanted at least num_replicas, {self.num_replicas}")
        return self

    @model_validator(mode="after")
    def _check_folder(self) -> "Settings":
        wanted = self.bytes_of_upload(self.max_upload_bytes) / 1e9
        if self.max_folder_gb < wanted:
            raise ValueError(
                f"max_folder_gb is {self.max_folder_gb:g}, one upload of max_upload_mb {self.max_upload_mb:g} and "
                f"max_voxels {self.max_voxels} may take {wanted:.3g} GB: raise the first or lower the others"
            )
        return self

    def bytes_of_upload(self, size: int) -> int:
        """Return what the work folder has to hold while a request of `size` bytes is checked.

        That is the request, a copy of its file or what is unpacked of it (64-bit voxels and 64 kB of header a file, of
        which there are at most 4096 and which take 76 bytes at least when packed), and its voxels in float32.
        """
        return 2 * size + 13 * self.max_voxels + min(2**28, 1000 * size)

    @property
    def max_upload_bytes(self) -> int:
        """Largest body of a request."""
        return math.floor(self.max_upload_mb * 1e6)

    @property
    def folder(self) -> Path:
        """The work folder, absolute; $NAME in it stands for a variable of the environment.

        Raises:
            UserError: there is no such variable.
        """
        path = os.path.expandvars(self.work_dir)
        if "$" in path:
            raise UserError(
                f"--work-dir {path}: there is no such variable in the environment: set it, or name a folder"
            )
        return Path(path).expanduser().resolve()
