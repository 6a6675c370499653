"""The verbs. Each lives in `megasora/verbs`, imported only when called; errors end here, as one line and an exit code."""

import argparse
import atexit
import contextlib
import difflib
import gc
import importlib
import json
import logging
import os
import sys
import time
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from data_pipelines.errors import DataError
from megasora import __version__
from megasora.errors import ConfigError, MegasoraError, NotWritable, not_written

VERBS: dict[str, str] = {
    "prepare": "raw videos, images and captions -> webdataset shards with an index",
    "index": "index webdataset tars in place",
    "buckets": "show what the buckets make of the shards",
    "train-vae": "train the video VAE on the shards",
    "encode": "shards -> latent shards, through the VAE and the text encoder",
    "train": "train the generator on the latent shards",
    "sample": "prompts -> mp4 and a contact sheet, from a checkpoint",
    "bench": "measure the training step: a table and JSON",
    "parity": "check that layouts compute what one process computes",
    "plan": "before the queue: does it fit, how fast, which layout is best",
    "replay": "one step of a run again, sample by sample",
    "ckpt": "list, verify, convert, export, compare and average checkpoints",
    "doctor": "is this node, and are the links between nodes, fit for a job?",
    "accept": "doctor, kernels, parity and bench of a new cluster, in one record",
    "compare": "runs side by side, and whether their losses agree",
    "goodput": "where the wall time of a run went",
    "launch": "start a verb on several processes, here or under SLURM, keeping its exit code",
}


def build_parser() -> argparse.ArgumentParser:
    lines = [f"  {verb:<10} {what}" for verb, what in VERBS.items()]
    parser = argparse.ArgumentParser(
        prog="megasora",
        usage="megasora VERB --config FILE [--section.key=value ...]",
        description="Distributed pretraining of Sora-like video generators.\n\nverbs:\n" + "\n".join(lines),
        epilog="`megasora VERB --help` shows a verb's keys and examples.\n"
        "exit codes: 0 done, 1 a check failed, 2 usage or config, 3 data, 4 checkpoint, 75 stopped early, run again to go on\n"
        "\nexamples:\n"
        "  megasora train --config configs/demo.yaml --run.steps=20\n"
        "  megasora launch local --nproc 2 train --config configs/demo.yaml --parallel.layout=dp2,zero3",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"megasora {__version__}")
    parser.add_argument("verb", metavar="VERB", choices=VERBS, nargs="?")
    return parser


def main(argv: list[str]) -> int:
    """Runs one command; returns its exit code. Only the errors that are bugs leave as tracebacks."""
    try:
        if not argv or argv[0] not in VERBS:
            return _no_verb(argv)
        run_verb(argv)
    except (MegasoraError, DataError) as error:
        # A wrong config is wrong on every process alike: one of them says so. Where each works for itself, each speaks.
        alone = isinstance(error, NotWritable) or (isinstance(error, DataError) and argv[0] in ("prepare", "encode"))
        if alone or os.environ.get("RANK", "0") == "0":
            print(f"megasora: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        with contextlib.suppress(OSError):  # the disk of the log may be the one that is full
            _leave_word(error)
        # A worker's launcher is to see it die, not to read a verdict: on another node, or later, it may well go on.
        if (reason := not_written(error)) is None or "RANK" in os.environ:
            raise
        print(f"megasora: {reason}", file=sys.stderr)
        return NotWritable.exit_code
    return 0


def _leave_word(error: Exception) -> None:
    """The error that a worker dies of, for its launcher (in torchrun's format) and in the log of its rank."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        Path(file).write_text(json.dumps({"message": {"message": text, "extraInfo": {"timestamp": int(time.time())}}}))
    record = logging.makeLogRecord({"levelname": "ERROR", "msg": "".join(traceback.format_exception(error)).rstrip()})
    for handler in logging.getLogger("megasora").handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(record)


def run_verb(argv: list[str]) -> None:
    """Parses the arguments of `argv[0]` and runs it."""
    _module(argv[0]).run(parse_verb(argv))


def _module(verb: str) -> ModuleType:
    """Imports a verb. Meanwhile the garbage collector would look at torch's million objects again and again, a fifth of the time
    of a start; nor need it do so afterwards."""
    name = f"megasora.verbs.{verb.replace('-', '_')}"
    if name in sys.modules:
        return sys.modules[name]
    gc.disable()
    try:
        return importlib.import_module(name)
    finally:
        gc.freeze()
        gc.enable()


def parse_verb(argv: list[str]) -> argparse.Namespace:
    """The verb's own options, `config_file` and, in `overrides`, everything of the form --section.key=value."""
    args, overrides = verb_parser(argv[0]).parse_known_args(argv[1:])
    args.overrides = overrides
    return args


def verb_parser(name: str) -> argparse.ArgumentParser:
    """The options of one verb; its module's docstring is what --help says."""
    verb = _module(name)
    parser = _Parser(prog=f"megasora {name}", allow_abbrev=False, **taught(f"{verb.__doc__}"))
    verb.add_arguments(parser)
    return parser


def taught(text: str) -> dict[str, Any]:
    """A parser's description and, from the line `examples:` on, what --help ends with; a test runs every example's line
    through its parser."""
    what, heading, lines = text.partition("\nexamples:\n")
    return {
        "description": what.rstrip(),
        "epilog": f"{heading.lstrip()}{lines.rstrip()}",
        "formatter_class": argparse.RawDescriptionHelpFormatter,
    }


def check_command(argv: list[str]) -> None:
    """Raises ConfigError if `argv` (a verb and its arguments) cannot run: for launchers, before they start anything."""
    if not argv or argv[0] not in VERBS or argv[0] == "launch":
        raise ConfigError(f"{argv[0] if argv else 'nothing'}: not a verb to launch; known are {', '.join(VERBS)}")
    args = parse_verb(argv)
    if "config" in args and args.config is not None:
        from megasora.config import load_config

        load_config(args.config, args.overrides)


def add_config_argument(parser: argparse.ArgumentParser, *sections: str, required: bool = True) -> None:
    """--config, and in --help the keys of the sections that the verb reads."""
    parser.add_argument("--config", type=Path, required=required, metavar="FILE", help="YAML, see configs/")
    parser.set_defaults(sections=sections)


def _no_verb(argv: list[str]) -> int:
    parser = build_parser()
    if not argv:
        parser.print_help(sys.stderr)
        return 2
    if argv[0].startswith("-"):
        parser.parse_known_args(argv)  # ends here for --help and --version
        raise ConfigError(f"{argv[0]}: unknown option; `megasora --help` lists the verbs")
    nearest = difflib.get_close_matches(argv[0], VERBS, n=1, cutoff=0.0)[0]
    raise ConfigError(f"{argv[0]}: unknown verb; did you mean {nearest}?")


class _Parser(argparse.ArgumentParser):
    """argparse, with errors as one line and, in --help, the keys of the verb's sections before the examples."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog.removeprefix('megasora ')}: {message}")

    def format_help(self) -> str:
        sections = self.get_default("sections")
        if not sections:
            return super().format_help()
        from megasora.keys import describe  # only --help pays for it

        keys = [line for section in sections for line in describe(section)]
        options, heading, examples = super().format_help().partition("examples:\n")
        return f"{options}keys, with their defaults:\n" + "\n".join(keys) + f"\n\n{heading}{examples}"


def console() -> None:
    try:
        code = main(sys.argv[1:])
    except Exception:
        traceback.print_exc()
        code = 1
    if "torch.distributed" in sys.modules:
        _leave(code)
    sys.exit(code)


def _leave(code: int) -> NoReturn:
    """Ends the process without taking the interpreter down: a thread of gloo that drops the tensors of its last collective while
    that happens aborts, and the exit code would be 134 (seen in one of ten runs on a busy machine)."""
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
