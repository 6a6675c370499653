"""A SLURM job as one script to read: launch/slurm.sbatch with what the job asks for in front, and everything quoted."""

import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import megasora
from megasora.errors import ConfigError

TEMPLATE, ENVIRONMENT = "slurm.sbatch", "env.sh"
BODY = "# ---- the job"  # from this line on the template goes into every script as it is
WORD = re.compile(r"[A-Za-z0-9_.,:@+=/%\[\]-]+")  # what SLURM's own names and values are made of
TASK = '"$SLURM_ARRAY_TASK_ID"'

SLURM_VERBS = ("train", "encode", "prepare", "bench", "parity", "doctor", "accept", "train-vae")


def check_numbers(*options: tuple[str, int, int]) -> None:
    """(option, value, least). Raises ConfigError."""
    for option, value, least in options:
        if value < least:
            raise ConfigError(f"launch: {option}={value}: at least {least}")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What `megasora launch slurm` asks for. Paths are absolute. `options` are further ones of sbatch, such as --mem=0."""

    name: str
    verb: str
    arguments: tuple[str, ...]  # of the verb, without --config
    config: Path | None = None  # with a sweep: config-TASK.yaml beside it is each task's
    layouts: dict[int, str]  # node count -> parallel.layout, best first; an empty one is the config's own
    gpus_per_node: int
    nproc: int
    python: str
    directory: Path  # the job's working directory, to which paths in the config are relative
    log: Path  # its name with SLURM's %j, or %A and %a
    cache: Path
    time: str
    partition: str = ""
    account: str = ""
    qos: str = ""
    exclude: str = ""
    dependency: str = ""
    array: int = 0  # tasks; 0: no array
    sweep: bool = False
    container: str = ""
    mounts: str = ""
    warning: int = 120  # seconds
    max_restarts: int = 0
    stall: int = 0  # seconds
    doctor: tuple[str, ...] | None = None
    reports: Path | None = None
    options: tuple[str, ...] = field(default=())


def render(job: Job) -> str:
    """The batch script. Raises ConfigError, naming the option, for what can be quoted neither for SLURM nor for the shell."""
    template = launch_file(TEMPLATE)
    body = template[template.index(BODY) :]
    title = f"# {job.name}, written by megasora {megasora.__version__}. Submitted again with sbatch it goes on."
    head = ["#!/usr/bin/env bash", title, *_directives(job), "set -euo pipefail"]
    return "\n".join([*head, "", *_environment(job), "", *_settings(job), "", body])


def _directives(job: Job) -> list[str]:
    most, least = max(job.layouts), min(job.layouts)
    asked = {
        "job-name": job.name,
        "nodes": f"{least}-{most}" if least < most else str(most),
        "ntasks-per-node": "1",
        "gres": f"gpu:{job.gpus_per_node}" if job.gpus_per_node else "",
        "time": job.time,
        "partition": job.partition,
        "account": job.account,
        "qos": job.qos,
        "exclude": job.exclude,
        "dependency": job.dependency,
        "array": f"0-{job.array - 1}" if job.array else "",
        "signal": f"B:USR1@{job.warning}",
        "open-mode": "append",
    }
    lines = [f"#SBATCH --{option}={_word(option, value)}" for option, value in asked.items() if value]
    lines += ["#SBATCH --exclusive", "#SBATCH --requeue"]
    log = Path(str(job.log.parent).replace("%", "%%")) / job.log.name
    lines += [f"#SBATCH --chdir={_path('--chdir', job.directory)}", f"#SBATCH --output={_path('--output', log)}"]
    return lines + [f"#SBATCH {_word('sbatch', option)}" for option in job.options]


def _environment(job: Job) -> list[str]:
    """launch/env.sh, without the comment that says who reads it, and with the place of the caches."""
    text = launch_file(ENVIRONMENT)
    values = [line for line in text.splitlines() if not line.startswith(("# shellcheck", ': "${MEGASORA_CACHE:='))]
    return [f"MEGASORA_CACHE=${{MEGASORA_CACHE:-{shlex.quote(str(job.cache))}}}", *values]


def _settings(job: Job) -> list[str]:
    launch = ["--nproc", job.nproc, "--max-restarts", job.max_restarts, "--stall", job.stall]
    command = _words(job.verb)
    if job.config is not None:
        config = shlex.quote(str(job.config))
        if job.sweep:
            config = f"{shlex.quote(str(job.config.parent / 'config-'))}{TASK}.yaml"
        command += f" --config {config}"
    container = [f"--container-image={job.container}", f"--container-workdir={job.directory}"]
    container += [f"--container-mounts={job.mounts}"]
    return [
        f"export PYTHON={shlex.quote(job.python)}",
        f"export MEGASORA_WARNING={job.warning} # seconds that the warning comes before the end",
        f"launch=({_words(*launch)}) # of `megasora launch local`, on every node",
        f"command=({' '.join([command, _words(*job.arguments)]).strip()})",
        f"node_counts=({_words(*job.layouts)}) # that the job may go on with, best first",
        f"layouts=({_words(*job.layouts.values())}) # parallel.layout for each; empty: the config's own",
        f"container=({_words(*container) if job.container else ''}) # options of srun",
        f"doctor=({_words(*job.doctor or ())}) # options of `megasora doctor`",
        f"reports={shlex.quote(str(job.reports)) if job.doctor is not None else ''} # of the doctor; empty: it is not asked",
    ]


def _words(*words: object) -> str:
    """Quoted for the shell; also where only a reader, or shellcheck, could take a comma for one between the words."""
    quoted = [shlex.quote(str(word)) for word in words]
    return " ".join(f"'{word}'" if "," in word and word[0] != "'" else word for word in quoted)


def _word(option: str, value: str) -> str:
    if not WORD.fullmatch(value):
        raise ConfigError(f"--{option}={value}: letters, digits and _.,:@+=/%[]- are what SLURM takes here")
    return value


def _path(option: str, path: Path) -> str:
    """A path as sbatch reads it from a script: in double quotes, which a backslash would escape."""
    text = str(path)
    if any(not c.isprintable() or c == "\\" for c in text):
        raise ConfigError(f"{option}={text!r}: SLURM takes no path with a backslash or a line break")
    return '"' + text.replace('"', '\\"') + '"'


def launch_file(name: str) -> str:
    """A file of launch/: of the source tree, or what the wheel has installed."""
    above = Path(megasora.__file__).parents[1]
    places = [above / "launch", above / "share/megasora/launch", Path(sys.prefix) / "share/megasora/launch"]
    for place in places:
        if (place / name).is_file():
            return (place / name).read_text()
    raise ConfigError(f"launch/{name} is in none of {', '.join(map(str, places))}: install megasora again")


def submit(script: Path) -> str:
    """The job's id. Raises ConfigError with what sbatch says."""
    sbatch = shutil.which("sbatch")
    if sbatch is None:
        raise ConfigError("launch slurm: no sbatch on this machine; --dry-run shows the script")
    done = subprocess.run([sbatch, "--parsable", str(script)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ConfigError(f"launch slurm: sbatch refused {script}: {' '.join(done.stderr.split())}")
    return done.stdout.strip().partition(";")[0]
