"""Keys and tokens in the environment: nothing that a run writes holds one, whether it goes well, crashes or is submitted."""

import gzip
import http.server
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from tests.integration.conftest import Road, environment

SECRETS = {
    "AWS_ACCESS_KEY_ID": "AKIASECRETONE0123456",
    "AWS_SECRET_ACCESS_KEY": "secrettwo/+abcdefghijklmnopqrstuvwxyz012",
    "AWS_SESSION_TOKEN": "secretthree0123456789",
    "WANDB_API_KEY": "5ec7e7f04" + "0123456789abcdef" * 2,
    "HF_TOKEN": "hf_secretfive0123456789abcdefghijkl",
    "GOOGLE_API_KEY": "secretsix0123456789",
    "SITE_PASSWORD": "secretseven0123456789",
}


def megasora(words: list[str], directory: Path, code: int, **variables: str) -> str:
    """What it prints, on both streams."""
    done = subprocess.run(
        [sys.executable, "-m", "megasora", *words], cwd=directory, text=True, capture_output=True, timeout=240,
        env=environment() | SECRETS | variables, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def leaks(said: str, *directories: Path) -> list[str]:
    return [
        f"{name} in {where}"
        for where, content in [("output", said.encode()), *contents(*directories)]
        for name, secret in SECRETS.items()
        if secret.encode() in content
    ]


def contents(*directories: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(path for directory in directories for path in directory.rglob("*")):
        yield str(path), str(path).encode()
        if path.is_file():
            content = path.read_bytes()
            yield str(path), gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content


def test_a_search_that_finds_nothing_could_have(tmp_path: Path) -> None:
    (tmp_path / "a").write_text(f"key={SECRETS['WANDB_API_KEY']};")
    (tmp_path / "b.gz").write_bytes(gzip.compress(SECRETS["HF_TOKEN"].encode()))
    assert leaks(SECRETS["AWS_SESSION_TOKEN"], tmp_path) == [
        "AWS_SESSION_TOKEN in output", f"WANDB_API_KEY in {tmp_path / 'a'}", f"HF_TOKEN in {tmp_path / 'b.gz'}",
    ]  # fmt: skip


def test_a_run_and_what_is_made_of_it(road: Road) -> None:
    run = road.directory / "secret-run"
    config = ["--config", str(road.config), f"--run.dir={run}"]
    boards = [] if not _has_wandb() else ["--observe.wandb=offline"]
    said = megasora(["launch", "local", "--nproc", "2", "train", *config, "--run.steps=2", "--checkpoint.every=2",
                     "--profile.steps=2-2", *boards], road.directory, 0)  # fmt: skip
    (step,) = (run / "checkpoints").glob("step-*")
    exported = road.directory / "secret-export"
    said += megasora(["ckpt", "convert", str(step), str(exported)], road.directory, 0)
    said += megasora(["replay", str(run), "--step", "2", "--json"], road.directory, 0)
    said += megasora(["goodput", str(run)], road.directory, 0)
    assert (run / "metrics.jsonl").exists()
    assert (run / "logs" / "rank-00001.log").exists()
    assert leaks(said, run, exported) == []


def test_a_crash_leaves_no_secret_behind(road: Road) -> None:
    run = road.directory / "secret-crash"
    run.mkdir()
    for name in ("events.jsonl", "metrics.jsonl"):
        (run / name).write_text("[1]\n")  # nothing foresees that
    words = ["train", "--config", str(road.config), f"--run.dir={run}"]
    said = megasora(["launch", "local", "--nproc", "2", *words], road.directory, 1)
    assert "Traceback" in said
    assert leaks(said, run) == []


def test_a_job_and_a_record_of_a_node(road: Road, tmp_path: Path) -> None:
    (tmp_path / "sbatch").write_text("#!/bin/sh\necho 7\n")
    (tmp_path / "sbatch").chmod(0o755)
    run, reports = road.directory / "secret-job", road.directory / "secret-doctor"
    job = ["launch", "slurm", "train", "--gpus-per-node", "2", "--config", str(road.config), f"--run.dir={run}"]
    said = megasora([*job, "--doctor"], road.directory, 0, PATH=f"{tmp_path}:{os.environ['PATH']}")
    said += megasora(["doctor", "--json", "--reports", str(reports)], road.directory, 0)
    assert (run / "launch" / "0000" / "job.sbatch").exists()
    assert leaks(said, run, reports) == []


def test_storage_that_refuses_does_not_say_with_which_key(road: Road) -> None:
    pytest.importorskip("s3fs")
    run = road.directory / "secret-s3"
    words = ["train", "--config", str(road.config), f"--run.dir={run}", "--data.path=s3://not-yours/latents"]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            said = megasora(words, road.directory, 3, AWS_ENDPOINT_URL=f"http://127.0.0.1:{server.server_port}")
        finally:
            server.shutdown()
    assert "s3://not-yours/latents" in said
    assert any(SECRETS["AWS_ACCESS_KEY_ID"] in one for one in _Refusing.asked)
    assert leaks(said, *([run] if run.exists() else [])) == []


class _Refusing(http.server.BaseHTTPRequestHandler):
    """Says who asks, as servers do."""

    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.headers["Authorization"])
        self.send_error(403, "Forbidden", f"not with {self.headers['Authorization']}")

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


def _has_wandb() -> bool:
    from megasora.errors import ConfigError
    from megasora.observe.boards import check_wandb

    try:
        check_wandb("offline")
    except ConfigError:
        return False
    return True
