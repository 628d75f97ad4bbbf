"""`aldm k8s SUBCOMMAND`: what a cluster under Kubernetes needs beside the jobs themselves."""

import importlib
import sys
from collections.abc import Sequence

SUBCOMMANDS = {
    "render": ("pipelines.kubernetes_render", "fill in the manifests, check them, and say whether the preset fits"),
    "roll": ("pipelines.kubernetes_roll", "let the translation service run another registered model"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `aldm k8s SUBCOMMAND ARGUMENTS`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in SUBCOMMANDS:
        return int(importlib.import_module(SUBCOMMANDS[arguments[0]][0]).main(arguments[1:]) or 0)
    asked = bool(arguments) and arguments[0] in ("-h", "--help")
    wanted = "\n".join(f"  {name:<8} {text}" for name, (_, text) in SUBCOMMANDS.items())
    print(
        f"usage: aldm k8s SUBCOMMAND [ARGUMENTS]\n\nsubcommands:\n{wanted}\n\n"
        "aldm k8s SUBCOMMAND --help explains the arguments.",
        file=sys.stdout if asked else sys.stderr,
    )
    return 0 if asked else 2
