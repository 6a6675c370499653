"""x"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--links", action="store_true")


def run(args: argparse.Namespace) -> None:
    pass
