"""`aldm serve`: the translation service on this machine, or on the Ray cluster that RAY_ADDRESS names."""

import argparse
import logging
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from pydantic_core import PydanticUndefined

from aldm.errors import UserError
from aldm.words import counted
from pipelines.arguments import JobParser, job_parser
from serve.models import Model, find_model
from serve.security import check_no_proxy, is_loopback, new_token, read_tokens
from serve.settings import Settings
from serve.work_folder import check_free, locked

if TYPE_CHECKING:
    from serve.store import StoreHandle

logger = logging.getLogger(__name__)

DESCRIPTION = """Translate volumes over HTTP: a page at /, the interface's own documentation at /docs. Ctrl-C or SIGTERM
lets running translations finish, and the exit code is 0; what is queued is made after the next start with the same
--work-dir."""
NAME = "aldm"
_OWN_FLAGS = ("use_gpu", "precision")  # --device and --precision say so


def main(argv: Sequence[str] | None = None) -> int:
    """Run `aldm serve ARGUMENTS` until it is told to stop.

    Raises:
        UserError: everything that the user can fix.
    """
    args = _parser().parse_args(argv)
    if args.preset is not None or args.set:
        raise UserError("--preset and --set: a served model carries its own configuration; leave them out")
    if args.new_token is not None:
        return _new_token(args)
    if not args.drain_seconds >= 0:  # NaN is neither
        raise UserError(f"--drain-seconds is {args.drain_seconds:g}, wanted 0 or more")
    settings = _settings(args)
    tokens = _check_open(args, settings)
    _check_port(args.host, args.port)
    model = find_model(settings.model, settings.folder)
    print(f"model: {model.name}: {model.description}")
    if args.dry_run:
        check_free(settings.folder)
        return _dry_run(args, settings, model, tokens)
    locked(settings.folder).close()
    return _serve(args, settings)


def _serve(args: argparse.Namespace, settings: Settings) -> int:
    """Start everything, wait for a signal, let running jobs finish, and end everything."""
    from pipelines.ray_session import check_cluster_has, ray_session

    with ray_session():
        from ray import serve

        from serve.app import build_app
        from serve.store import end_store, start_store

        check_cluster_has(settings.num_replicas, use_gpu=settings.use_gpu)
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        serve.start(http_options={"host": args.host, "port": args.port})
        store = None
        try:
            serve.run(build_app(settings), name=NAME, route_prefix="/")
            store = start_store(settings)
            host = f"[{args.host}]" if ":" in args.host else args.host
            print(f"ready: http://{host}:{args.port}", flush=True)
            while True:
                time.sleep(3600)
        except KeyboardInterrupt:
            if store is None:
                raise  # it has not served
            _drain(store, args.drain_seconds)
        finally:
            serve.shutdown()
            if store is not None:
                end_store()
    return 0


def _drain(store: "StoreHandle", seconds: float) -> None:
    """Wait until no job is running; a second signal ends the wait, and what is running then."""
    until = time.monotonic() + seconds
    said = False
    try:
        while (running := store.call("drain")) and time.monotonic() < until:
            if not said:
                jobs = counted(running, "translation")
                print(f"stopping: {jobs} still running; once more to stop at once", flush=True)
                said = True
            time.sleep(0.5)
    except KeyboardInterrupt:
        print("stopping at once: what was running is made after the next start", flush=True)
    store.call("halt")


def _new_token(args: argparse.Namespace) -> int:
    if args.token_file is None:
        raise UserError("--new-token adds to a file: give --token-file FILE as well")
    token = new_token(Path(args.token_file), args.new_token)
    print(token)
    logger.info("%s holds its hash; the token itself is kept nowhere, so keep it now", args.token_file)
    return 0


def _settings(args: argparse.Namespace) -> Settings:
    values: dict[str, Any] = {name: getattr(args, name) for name in Settings.model_fields if name not in _OWN_FLAGS}
    values["precision"] = args.precision
    if args.device != "cpu":
        from aldm.device import select_device

        values["use_gpu"] = select_device(args.device).type == "cuda"
    if args.token_file is not None:
        values["token_file"] = str(Path(args.token_file).expanduser().absolute())  # a link may be turned later
    values["work_dir"] = str(Path(args.work_dir).expanduser().resolve())
    try:
        return Settings(**values)
    except ValidationError as error:
        raise UserError("; ".join(map(_wrong, error.errors()))) from error


def _wrong(item: Any) -> str:
    """Say what is wrong with a setting, or with several together, in the words of the flags."""
    if item["loc"]:
        return f"--{item['loc'][0]}".replace("_", "-") + f" is {item['input']}: {item['msg']}"
    words = item["msg"].removeprefix("Value error, ")
    for name in Settings.model_fields:
        words = words.replace(name, f"--{name}".replace("_", "-"))
    return str(words)


def _check_open(args: argparse.Namespace, settings: Settings) -> dict[str, str]:
    """Refuse to run open: beyond this machine only with tokens."""
    if settings.token_file is not None:
        return read_tokens(Path(settings.token_file))
    if not is_loopback(args.host):
        raise UserError(
            f"--host {args.host} is more than this machine, so tokens are needed: make one with aldm serve --new-token "
            "NAME --token-file FILE, then give --token-file FILE"
        )
    check_no_proxy()
    return {}


def _check_port(host: str, port: int) -> None:
    if not 1 <= port <= 65535:
        raise UserError(f"--port is {port}, wanted 1 to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: cannot listen there: {error.strerror or error}") from error


def _dry_run(args: argparse.Namespace, settings: Settings, model: Model, tokens: dict[str, str]) -> int:
    from serve.worker import load

    who = f"clients with one of {counted(len(tokens), 'token')}" if tokens else "clients on this machine"
    print(f"would listen on {args.host}:{args.port} and answer {who}")
    print(f"would keep uploads and results in {settings.folder} for {settings.keep_hours:g} h")
    translator = load(model.folder, settings)
    from aldm.memory import gigabytes, resident_bytes

    held, needed = resident_bytes(), translator.predictor.needed_bytes()
    print(f"memory of a copy: program and weights {gigabytes(held)} GB, a translation {gigabytes(needed)} GB more")
    return 0


def _parser() -> JobParser:
    parser = job_parser("serve", DESCRIPTION, default_preset="the model's own configuration")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; beyond this machine with tokens only"
    )
    parser.add_argument("--port", type=int, default=8000, help="port to listen on")
    parser.add_argument(
        "--new-token", metavar="NAME", help="make a token, print it, add its hash to --token-file, stop"
    )
    parser.add_argument(
        "--drain-seconds",
        type=float,
        default=1800,
        metavar="S",
        help="longest wait for running translations when stopping",
    )
    for name, field in Settings.model_fields.items():
        if name in _OWN_FLAGS:
            continue
        kind = next((one for one in (int, float) if one in (field.annotation, *_members(field.annotation))), str)
        default = None if field.default is PydanticUndefined else field.default
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=kind,
            default=default,
            metavar=_METAVARS.get(kind, "X"),
            help=field.description,
        )
    return parser


_METAVARS: dict[type, str] = {int: "N", float: "F", str: "NAME"}


def _members(annotation: Any) -> tuple[Any, ...]:
    return tuple(getattr(annotation, "__args__", ()))
