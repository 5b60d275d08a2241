"""``python -m patchscale.bench``: the benchmark where the command line's packages (tyro, rich) are missing."""

import argparse
import dataclasses
import sys
from pathlib import Path

from patchscale.bench.command import KINDS, Options, bench
from patchscale.errors import UserError


def main(arguments: list[str] | None = None) -> int:
    """Run it; returns the exit status: 0, 2 for bad input, 130 when interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m patchscale.bench", description=Options.__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("kind", choices=KINDS)
    for field in dataclasses.fields(Options):
        kind = Path if field.name == "out" else type(field.default) if field.default is not None else str
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default)
    given = vars(parser.parse_args(arguments))
    try:
        bench(given.pop("kind"), Options(**given))
    except UserError as e:
        print(f"patchscale bench: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("patchscale bench: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
