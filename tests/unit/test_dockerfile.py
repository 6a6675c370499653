"""What can be said of the Dockerfile without an engine to build it: its sources, its arguments, its scripts, who it runs as."""

import re
import shlex
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "Dockerfile").read_text()


def test_everything_that_is_copied_is_in_the_context() -> None:
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for name in allowed:
        assert (ROOT / name).exists(), name
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    tops = {place.split("/")[0] for files in packages["data-files"].values() for place in files}
    assert {"megasora", "data_pipelines", "kernels", "pyproject.toml", *tops} <= set(allowed)
    for sources in re.findall(r"^COPY (?!--)(.+) \S+$", TEXT, flags=re.MULTILINE):
        assert all(source == "." or any(fnmatch(source, name) for name in allowed) for source in sources.split())


def test_every_argument_is_declared_in_the_stage_that_uses_it() -> None:
    for stage in re.split(r"^FROM .*$", TEXT, flags=re.MULTILINE)[1:]:
        commands = re.sub(r"^#.*$", "", stage, flags=re.MULTILINE)
        declared = set(re.findall(r"^(?:ARG|ENV) (\w+)", commands, flags=re.MULTILINE))
        assert set(re.findall(r"\$\{(\w+)\}", commands)) <= declared
    assert {"APEX_REF", "FA3_REF", "TE_REF"} <= set(re.findall(r"^ARG (\w+)", TEXT, flags=re.MULTILINE))


def test_the_list_of_requirements_leaves_the_bases_own_torch_alone() -> None:
    script = TEXT.partition("<<'PYTHON'\n")[2].partition("\nPYTHON\n")[0]
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    names = [re.split(r"[<>=\[ ]", line)[0] for line in done.stdout.splitlines()]
    assert {"numpy", "pydantic", "flash-attn", "transformer-engine", "deepspeed", "transformers"} <= set(names)
    assert "torch" not in names
    assert "-c /opt/megasora/constraints-image.txt" in TEXT


def test_the_shell_in_it_is_sound() -> None:
    heredoc = TEXT.partition("<<'SCRIPT'\n")[2].partition("\nSCRIPT\n")[0]
    runs = [run.replace("\\\n", " ") for run in re.findall(r"^RUN ((?:\\\n|[^<\n])+)$", TEXT, flags=re.MULTILINE)]
    assert len(runs) >= 5
    for script in [heredoc, *runs]:
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_it_runs_as_nobody_special_and_says_how_it_is() -> None:
    last = re.split(r"^FROM .*$", TEXT, flags=re.MULTILINE)[-1]
    assert re.findall(r"^USER (.+)$", last, flags=re.MULTILINE) == ["${UID}"]
    assert re.search(r"^ARG UID=[1-9]\d*$", last, flags=re.MULTILINE)
    (check,) = re.findall(r"^HEALTHCHECK .*\\\n\s+CMD \[(.+)\]$", last, flags=re.MULTILINE)
    words = [word.rstrip(",") for word in shlex.split(check)]
    assert words[0] == "python"
    done = subprocess.run([sys.executable, *words[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == ""
    import torch

    assert done.returncode == (0 if torch.cuda.device_count() else 1)
