"""``python -m backbones [--markdown] [NAME …]``: the model zoo as a table."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from backbones.models import list_models
from backbones.zoo import describe, zoo_table


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m backbones",
        description="Print the model zoo: sizes, cost, published accuracy, activation memory.",
    )
    parser.add_argument("names", metavar="NAME", nargs="*", help="models; without any, all")
    parser.add_argument("--markdown", action="store_true", help="as a Markdown table")
    options = parser.parse_args(arguments)
    names = options.names or list_models()
    show = sys.stderr.isatty()
    entries = []
    for index, name in enumerate(names):
        if show:
            # \033[K clears what a longer name left of the line.
            print(f"\r{index + 1}/{len(names)} {name}\033[K", end="", file=sys.stderr, flush=True)
        try:
            entries.append(describe(name))
        except ValueError as error:
            parser.error(str(error))
    if show:
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    print(zoo_table(entries, options.markdown))
    return 0


if __name__ == "__main__":
    sys.exit(main())
