"""Translators in MLflow's model registry: a folder of `aldm export` goes in, and MLflow loads it back as a function.

The function takes a table with the columns volume (bytes of a NIfTI file, gzipped or not), source and target
(modalities), and returns the column volume: the same bytes that `aldm translate` writes. The registered model holds the
translator folder and this program's code; its pip requirements are the versions that it was registered with.
"""

import gzip
import re
import tempfile
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aldm.errors import UserError
from pipelines.tracking_server import EXPERIMENT, answering, connect, default_server, experiment_id

if TYPE_CHECKING:
    import pandas

    from aldm.config import Config
    from aldm.translate import Translator

REQUIREMENTS = ("PyYAML", "mlflow", "nibabel", "numpy", "psutil", "safetensors", "scipy", "torch", "tqdm")
"""Packages that translating needs."""
EXAMPLE_SPACING_MM = 16.0


class VolumeFunction:
    """What `mlflow.pyfunc.load_model` returns a wrapper of."""

    def __init__(self, translator: "Translator") -> None:
        self.translator = translator

    def predict(self, model_input: "pandas.DataFrame") -> "pandas.DataFrame":
        """Translate every row: volume (NIfTI bytes), source, target -> volume (NIfTI bytes).

        Raises:
            UserError: a volume that `aldm translate` would refuse, or an unknown modality.
        """
        import pandas

        rows = zip(model_input["volume"], model_input["source"], model_input["target"], strict=True)
        return pandas.DataFrame({"volume": [self._translate(bytes(volume), *names) for volume, *names in rows]})

    def _translate(self, content: bytes, source: str, target: str) -> bytes:
        from aldm.data.volume import load_nifti

        suffix = ".nii.gz" if content.startswith(b"\x1f\x8b") else ".nii"
        with tempfile.TemporaryDirectory(prefix="aldm-") as folder:
            given, made = Path(folder) / f"volume{suffix}", Path(folder) / f"synthetic{suffix}"
            given.write_bytes(content)
            volume, grid = load_nifti(given)
            result = self.translator.translate(volume, source, target)
            result.save(made, grid)
            return made.read_bytes()


def _load_pyfunc(data_path: str) -> VolumeFunction:
    """Load the function from a translator folder; MLflow calls it by this name."""
    import torch

    from aldm.translate import Translator

    return VolumeFunction(Translator.load(data_path, "cuda" if torch.cuda.is_available() else "cpu"))


def check_names(name: str, alias: str | None) -> None:
    """Refuse names that MLflow does not take, before any work.

    Raises:
        UserError: one of them.
    """
    for flag, text in (("--register", name), ("--alias", alias)):
        if text is not None and not re.fullmatch(r"[\w-]+", text, flags=re.ASCII):
            raise UserError(f"{flag} is {text!r}: wanted letters, digits, - and _")
    if alias is not None and re.fullmatch(r"latest|v\d+", alias, flags=re.IGNORECASE):
        raise UserError(f"--alias is {alias!r}, which MLflow keeps for itself: take a name such as champion")


def register(model_dir: Path, name: str, alias: str | None, tracking_uri: str, *, experiment: str = EXPERIMENT) -> int:
    """Register a translator folder as a new version of a model.

    Args:
        model_dir: written by `aldm export`.
        name: of the registered model; made if there is none.
        alias: points to the new version from now on, as in models:/NAME@ALIAS; None leaves the aliases alone.
        tracking_uri: of the MLflow server that holds the registry.
        experiment: MLflow's experiment that the model is listed in; made if there is none.

    Returns:
        The version's number.

    Raises:
        UserError: a name that MLflow does not take, not a translator folder, or the server does not take the model.
    """
    check_names(name, alias)
    from aldm.checkpoint import config_of, read_checkpoint_record

    record = read_checkpoint_record(model_dir)
    client = connect(tracking_uri)
    from mlflow import MlflowException
    from mlflow.models import Model

    tags = {"kind": record["kind"], "hash": record["hash"], "fingerprint": _fingerprint(record)}
    with answering(tracking_uri), default_server(tracking_uri), tempfile.TemporaryDirectory(prefix="aldm-") as folder:
        place = experiment_id(client, tracking_uri, experiment)
        model = client.create_logged_model(place, name=name, tags=tags, model_type="translator")
        packed = Path(folder) / "model"
        _pack(packed, model_dir, config_of(record, model_dir), Model(model_id=model.model_id))
        client.log_model_artifacts(model.model_id, str(packed))
        client.finalize_logged_model(model.model_id, "READY")
        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        card = model_dir / "README.md"
        text = card.read_text() if card.is_file() else None
        version = client.create_model_version(
            name, f"models:/{model.model_id}", tags=tags, description=text, model_id=model.model_id
        )
        if alias is not None:
            client.set_registered_model_alias(name, alias, version.version)
    return int(version.version)


def _pack(folder: Path, model_dir: Path, config: "Config", model: Any) -> None:
    """Write an MLflow model: the translator folder, this program's code, signature, example and requirements."""
    import mlflow.pyfunc
    import pandas
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema

    root = Path(__file__).resolve().parent.parent
    columns = {"volume": "binary", "source": "string", "target": "string"}
    mlflow.pyfunc.save_model(
        path=str(folder),
        loader_module="pipelines.registry",
        data_path=str(model_dir),
        code_paths=[str(root / package) for package in ("aldm", "pipelines")],
        pip_requirements=requirements(),
        signature=ModelSignature(
            inputs=Schema([ColSpec(kind, name) for name, kind in columns.items()]),
            outputs=Schema([ColSpec("binary", "volume")]),
        ),
        input_example=pandas.DataFrame([example(config)]),
        mlflow_model=model,
    )


def requirements() -> list[str]:
    """Return the pip requirements of a registered model: the versions that are installed here, as NAME==VERSION."""
    return [f"{name}=={metadata.version(name).partition('+')[0]}" for name in REQUIREMENTS]


def example(config: "Config") -> dict[str, Any]:
    """Return a row that the function takes: a coarse simulated volume."""
    import nibabel

    from aldm.data.phantom import MODALITIES_OF_LAYOUT, simulate_subject

    names = config.modalities
    source, layout = next(
        (name, layout) for layout, known in MODALITIES_OF_LAYOUT.items() for name in names if name in known
    )
    volume = simulate_subject(0, 0, layout, EXAMPLE_SPACING_MM)[source]
    content = gzip.compress(nibabel.Nifti1Image(volume.data, volume.affine).to_bytes(), mtime=0)
    return {"volume": content, "source": source, "target": next(name for name in reversed(names) if name != source)}


def _fingerprint(record: dict[str, Any]) -> str:
    return str(record["meta"]["data"].get("fingerprint", "unknown"))
