"""Lists the presets with their parameters, counted without building any weights. The planner itself is not in this version.

example:
  megasora plan --list-presets --json
"""

import argparse
import json

from megasora.errors import ConfigError
from megasora.models.families import PRESETS, parameter_count


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--list-presets", action="store_true", help="every preset and its parameters")
    parser.add_argument("--json", action="store_true", help='print {"NAME": {"parameters": N, "family": F}, ...}')


def run(args: argparse.Namespace) -> None:
    if args.overrides or not args.list_presets:
        raise ConfigError("plan: this version has --list-presets (with --json) only")
    presets = {
        name: {"parameters": parameter_count(config), "family": config.family}  # type: ignore[attr-defined]
        for name, config in PRESETS.items()
    }
    if args.json:
        print(json.dumps(presets))
        return
    for name, facts in presets.items():
        print(f"{name:<22} {facts['family']:<10} {facts['parameters']:>16,}")
