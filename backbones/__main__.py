"""Look at the models, at their memory and at what they see. Each command has its own --help.

examples:
  python -m backbones zoo                                        # which models there are
  python -m backbones memory --model rev_vit_base --input 64x3x224x224 --budget 8GB
  python -m backbones drift --model rev_vit_small --precision bf16
  python -m backbones evaluate --model rev_vit_base --pretrained --data imagenet
  python -m backbones predict photos --model rev_vit_small --pretrained
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from backbones.common.console import explain, make_parser, run_command

# Modules of backbones.commands, of which only what is asked for is imported.
_COMMANDS = {
    "zoo": "list the models: size, cost, published accuracy, activation memory",
    "memory": "show where the memory of a training step goes, and what fits a budget",
    "drift": "measure how exactly a model rebuilds its activations",
    "evaluate": "measure top-1 and top-5 accuracy on folders of images",
    "export": "write a model as a graph of torch.export or ONNX",
    "predict": "print the likeliest classes of images, or save their features",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command as :func:`run_command` does; return its exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = make_parser("python -m backbones", __doc__)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, summary in _COMMANDS.items():
        command = commands.add_parser(name, help=summary)
        if name in arguments:
            module = importlib.import_module(f"backbones.commands.{name}")
            explain(command, module.__doc__)
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    if not arguments:
        parser.print_help(sys.stderr)
        return 2
    return run_command(parser, lambda options: options.run(options), arguments)


if __name__ == "__main__":
    sys.exit(main())
