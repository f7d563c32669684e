"""``python -m backbones [--markdown] [NAME …]``: the model zoo as a table."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from backbones.commands.zoo import describe, zoo_table
from backbones.common.console import make_parser, run_command, show_progress
from backbones.registry import list_models


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; return the exit status."""
    parser = make_parser(
        "backbones",
        "Print the model zoo: sizes, cost, published accuracy, activation memory.",
        """\
examples:
  python -m backbones
  python -m backbones rev_vit_base vit_base --markdown""",
    )
    parser.add_argument("names", metavar="NAME", nargs="*", help="models; without any, all")
    parser.add_argument("--markdown", action="store_true", help="as a Markdown table")
    return run_command(parser, _print_zoo, arguments)


def _print_zoo(options: argparse.Namespace) -> None:
    names = options.names or list_models()
    entries = []
    for index, name in enumerate(names, start=1):
        show_progress(f"{index}/{len(names)} {name}")
        entries.append(describe(name))
    show_progress("")
    print(zoo_table(entries, options.markdown))


if __name__ == "__main__":
    sys.exit(main())
