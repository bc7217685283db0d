"""What launchers would be given, parsed by their own parsers and by that of the command line."""

import argparse
from collections.abc import Sequence

from torch.distributed.run import get_args_parser

from ospo_fast import cli
from ospo_fast.config import load_config


def parse_torchrun(words: Sequence[str]) -> tuple[argparse.Namespace, argparse.Namespace]:
    """Return the options of torchrun and the arguments of the `ospo_fast` command that it launches."""
    options = get_args_parser().parse_args(list(words))
    assert (options.module, options.training_script) == (True, "ospo_fast")
    return options, parse_command(options.training_script_args)


def parse_command(words: Sequence[str]) -> argparse.Namespace:
    """Return the arguments of a command of ospo_fast, whose settings are those of the configuration."""
    args = cli._parse(list(words))
    load_config(args.settings)
    return args
