"""Where the wall time of a run went: productive steps, data, checkpoints, start-up, lost work, restarts; an attempt a line and
over the whole history. Draws it as RUN/goodput.svg.

examples:
  megasora goodput runs/demo
"""

import argparse
import json
from pathlib import Path

from megasora.cluster.goodput import drawing, goodput, table
from megasora.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="a run directory")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> None:
    if args.overrides:
        raise ConfigError(f"goodput: {args.overrides[0]} is no option of goodput")
    result = goodput(args.run)
    picture = args.run / "goodput.svg"
    picture.write_text(drawing(result))
    print(json.dumps(result | {"picture": str(picture)}) if args.json else f"{table(result)}\n{picture}")
