"""aldm k8s roll: bring a registered model into a running RayService, or into its configuration file.

    aldm k8s roll --model models:/translator@champion              # checks and tries it, says what would be done
    aldm k8s roll --model models:/translator/7 --apply             # and gives it to the RayService
    aldm k8s roll --model models:/translator/7 --out serve.yaml    # and writes the configuration instead

1. An alias is resolved to a version once. The service is given the version, which never changes under it. An alias in
   its configuration would be resolved by Ray Serve itself, without any of these checks, whenever the service's cluster
   or its configuration is made again.
2. The model is downloaded and its weights are hashed again; another hash than the registry's is refused.
3. One translation of a simulated volume has to give a finite volume on the input's grid.
4. `spec.serveConfigV2` of the RayService is patched (its `args.model` alone), with the version of the object that was
   read, so that nobody else's change is lost, and the former model noted in the annotation aldm/previous-model. KubeRay
   hands the configuration to Ray Serve, which starts new copies and ends the old ones when those are loaded and warm
   (`serve.app.SURGE_PERCENT`): requests are answered all along, running translations finish. The cluster needs room for
   both; without it the old copies go on, and the new ones wait until --timeout-minutes are over.
5. The new application has to be RUNNING; when it fails, or is not within --timeout-minutes, the former model is put
   back into the configuration as it is then, and the command fails. Nothing is put back where somebody else has given
   the service yet another model meanwhile, or where the former model is not known (this roll continues one that was
   stopped, and the annotation is gone).

To go back by hand, roll to the former version, which the last line of a roll names:

    aldm k8s roll --model models:/translator/6 --apply
    aldm promote --register translator --rollback        # and let the alias champion point to it again

In a pod the service account is used, elsewhere the kubeconfig; it needs get and patch of rayservices in the namespace.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from aldm.errors import UserError
from aldm.files import atomic_path
from pipelines.arguments import JobParser, job_parser
from pipelines.kubernetes_service import BUILT_IN, RayService
from pipelines.registry_download import Registered, fetch, resolve
from pipelines.serve_config import APPLICATION, model_of, read_serve_text, with_model
from pipelines.tracking_server import tracking_uri

SERVICE, NAMESPACE = "aldm-translator", "aldm"
PUT_BACK_TRIES = 5
"""Others may change the service just then, or the API server be away; each try begins with what there is then."""
DESCRIPTION = """Check a registered model (its weights' hash, one translation of a simulated volume) and bring it into a
RayService: the configuration is patched, the new application has to run, otherwise the former model is put back. With
--out the changed configuration is written instead. Without --apply and --out nothing is changed."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `aldm k8s roll ARGUMENTS`.

    Raises:
        UserError: everything that the user can fix, a model that does not run among it.
    """
    args = _parser().parse_args(argv)
    if args.apply and args.out is not None:
        raise UserError("--apply changes the RayService and --out writes a file: give one of them")
    if args.manifest is not None and args.out is None:
        raise UserError("--manifest is the file whose changed copy goes to --out: give --out too, or leave it out")
    if args.timeout_minutes <= 0:
        raise UserError(f"--timeout-minutes is {args.timeout_minutes:g}, wanted a number above 0")
    server = tracking_uri(args.out or Path.cwd() / "model")
    model = resolve(args.model, server)
    print(f"{args.model} is {model.address}, hash {model.hash[:12]}", flush=True)
    if args.apply:
        return _apply(args, model, server)
    manifest = read_serve_text(args.manifest)
    changed = with_model(manifest, model.address, args.application)
    try_out(model, server, args)
    before = model_of(manifest, args.application)
    if args.out is None or args.dry_run:
        place = args.out or f"the RayService {args.service} in {args.namespace} (--apply)"
        print(f"would change the model of {place}" + (f" from {before} to {model.address}" if args.out else ""))
        return 0
    with atomic_path(args.out, overwrite=True) as temporary:
        temporary.write_text(changed)
    print(f"{args.out}: model {model.address} (before: {before})")
    return 0


def try_out(model: Registered, server: str, args: argparse.Namespace) -> None:
    """Download a model, check its weights, and make one translation with it.

    Raises:
        UserError: it is not what was registered, or does not work.
    """
    from aldm.device import select_device
    from aldm.smoke_test import smoke_test

    device = "cpu" if args.device == "auto" else str(select_device(args.device))
    with tempfile.TemporaryDirectory(prefix="aldm-roll-") as folder:
        found = fetch(model, Path(folder), server)
        print(f"{model.address}: the weights are those registered", flush=True)
        try:
            print(smoke_test(found, device=device, max_memory_gb=args.max_memory_gb), flush=True)
        except UserError as error:
            raise UserError(f"{model.address} is not rolled out: {str(error).replace(str(found), 'it')}") from error


def _apply(args: argparse.Namespace, model: Registered, server: str) -> int:
    """Give the model to the RayService and wait until it runs."""
    service = RayService.connect(args.namespace, args.service, args.context)
    state = service.read()
    now = model_of(state.config, args.application)
    stopped = now == model.address  # a roll that was stopped while it waited, if it does not run
    former = state.former_model if stopped else (now or BUILT_IN)
    if stopped and service.runs(state, args.application):
        print(f"{args.service} serves {model.address} already (before: {_named(former)})")
        return 0
    try_out(model, server, args)
    if args.dry_run:
        print(f"would change the model of {args.service} in {args.namespace} from {_named(former)} to {model.address}")
        return 0
    wanted = with_model(state.config, model.address, args.application)
    generation = service.change(wanted, former_model=former, version=state.version)
    print(f"{args.service}: from {_named(former)} to {model.address}; waiting until it runs", flush=True)
    try:
        service.wait(generation, args.application, args.timeout_minutes * 60, args.poll_seconds)
    except UserError as error:
        # what was served before the former one is known only where this roll has replaced the note of it
        outcome = _back(args, service, model, former, None if stopped else state.former_model)
        raise UserError(f"{model.address} does not run: {error}. {outcome}") from error
    print(f"{args.service} serves {model.address}")
    if former:
        print(
            f"to go back: aldm k8s roll --model {former} --service {args.service} --namespace {args.namespace} --apply"
        )
    return 0


def _back(
    args: argparse.Namespace, service: RayService, model: Registered, former: str | None, note: str | None
) -> str:
    """Put the former model back and wait for it, unless that is no longer wanted; return what became of it.

    Args:
        args: of the command.
        service: to change.
        model: that this command has given it.
        former: model before that; None where it is not known.
        note: the annotation before that.
    """
    if former is None or former == model.address:
        return (
            "Nothing was put back: the model before it is not known, so the configuration is left as it is; roll to a "
            f"version that works: aldm k8s roll --model models:/{model.name}/VERSION --apply"
        )
    name = _named(former)
    for left in reversed(range(PUT_BACK_TRIES)):
        try:
            state = service.read()
            now = model_of(state.config, args.application)
            if now != model.address:
                return f"Nothing was put back: somebody else has given the service {_named(now or BUILT_IN)} meanwhile"
            back = with_model(state.config, former or None, args.application)
            generation = service.change(back, former_model=note, version=state.version)
            break
        except UserError as error:
            if not left:
                return f"{name} could not be put back, so the service is left with {model.address}: {error}"
            time.sleep(args.poll_seconds)
    try:
        service.wait(generation, args.application, args.timeout_minutes * 60, args.poll_seconds)
    except UserError as error:
        return f"{name} was put back, but does not run either: {error}"
    return f"{name} was put back and runs"


def _named(former: str | None) -> str:
    """Return the words for a model as the annotation has it."""
    return {None: "a model that is not known", BUILT_IN: "the model inside the package"}.get(former, str(former))


def _parser() -> JobParser:
    parser = job_parser("k8s roll", DESCRIPTION)
    parser.add_argument(
        "--model",
        required=True,
        metavar="models:/NAME/VERSION|models:/NAME@ALIAS",
        help="registered model, at MLFLOW_TRACKING_URI or in the file mlflow.db beside --out",
    )
    parser.add_argument("--apply", action="store_true", help="change the RayService, and wait until the model runs")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="write the changed --manifest here instead (default: nothing written)"
    )
    parser.add_argument(
        "--manifest",
        type=Path,
        metavar="FILE",
        help="with --out: manifest of a RayService, or configuration of Ray Serve, to change (default: the package's "
        "serve/deploy.yaml)",
    )
    parser.add_argument("--service", default=SERVICE, metavar="NAME", help="the RayService")
    parser.add_argument("--namespace", default=NAMESPACE, metavar="NAME", help="its namespace")
    parser.add_argument("--application", default=APPLICATION, metavar="NAME", help="its application of Ray Serve")
    parser.add_argument(
        "--context",
        metavar="NAME",
        help="context of the kubeconfig (default: the current one; in a pod its own account)",
    )
    parser.add_argument(
        "--timeout-minutes", type=float, default=30.0, metavar="M", help="the longest wait for the new model to run"
    )
    parser.add_argument("--poll-seconds", type=float, default=5.0, metavar="S", help="between two looks at its state")
    parser.add_argument(
        "--max-memory-gb",
        type=float,
        metavar="G",
        help="most memory of the translation that is tried, GB (10^9 bytes) (default: no limit)",
    )
    return parser


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"aldm k8s roll: {error}", file=sys.stderr)
        sys.exit(2)
