"""Shards on real servers of S3 and HTTP, through the bounded cache of blocks."""

import functools
import http.server
import os
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import pytest

from data_pipelines.errors import BadSample, DataError
from data_pipelines.shards.index import index_directory
from data_pipelines.shards.storage import BlockCache, CacheConfig, Remote, open_storage
from data_pipelines.shards.tars import ShardSet, ShardWriter

SAMPLES = 12


def content(number: int) -> bytes:
    return random.Random(number).randbytes(3000)


def write(directory: Path) -> None:
    with ShardWriter(directory, samples_per_shard=5) as writer:
        for i in range(SAMPLES):
            facts = {"kind": "video", "frames": 17 + i, "fps": 24.0, "height": 64, "width": 96}
            writer.write({"__key__": f"s{i:03d}", "mp4": content(i), "txt": "a caption", "json": facts})


@pytest.fixture
def bucket(s3: str, tmp_path: Path) -> str:
    client = boto3.client("s3", endpoint_url=s3)
    name = f"videos-{random.randrange(1 << 40):x}"
    client.create_bucket(Bucket=name)
    write(tmp_path / "shards")
    for path in (tmp_path / "shards").iterdir():
        client.upload_file(str(path), name, f"shards/{path.name}")
    return name


def test_shards_on_s3_are_the_same_as_on_disk(bucket: str, tmp_path: Path) -> None:
    here = ShardSet.open(tmp_path / "shards")
    for cache in (CacheConfig(tmp_path / "cache", 1 << 30), CacheConfig(tmp_path / "none", 0)):
        there = ShardSet.open(f"s3://{bucket}/shards", cache)
        assert there.fingerprint == here.fingerprint
        assert [there.read(i) for i in range(SAMPLES)] == [here.read(i) for i in range(SAMPLES)]
    assert not (tmp_path / "none").exists()


def test_foreign_tars_on_s3_are_indexed_in_place(bucket: str, s3: str, tmp_path: Path) -> None:
    client = boto3.client("s3", endpoint_url=s3)
    for shard in range(3):
        client.delete_object(Bucket=bucket, Key=f"shards/shard-{shard:06d}.arrow")
    cache = CacheConfig(tmp_path / "cache", 1 << 30)
    with pytest.raises(DataError, match=r"s3://.*shard-000000\.arrow: missing; `megasora index`"):
        ShardSet.open(f"s3://{bucket}/shards", cache)
    report = index_directory(open_storage(f"s3://{bucket}/shards", cache), lambda *_: None)
    assert (report["shards"], report["samples"]) == (3, SAMPLES)
    there, here = ShardSet.open(f"s3://{bucket}/shards", cache), ShardSet.open(tmp_path / "shards")
    assert there.fingerprint == here.fingerprint


def test_an_object_that_changes_is_read_anew(bucket: str, s3: str, tmp_path: Path) -> None:
    client = boto3.client("s3", endpoint_url=s3)
    client.put_object(Bucket=bucket, Key="shards/a.txt", Body=b"before")
    cache = CacheConfig(tmp_path / "cache", 1 << 30)
    assert open_storage(f"s3://{bucket}/shards", cache).read("a.txt") == b"before"
    client.put_object(Bucket=bucket, Key="shards/a.txt", Body=b"after!")
    assert open_storage(f"s3://{bucket}/shards", cache).read("a.txt") == b"after!"


def test_a_shard_that_vanishes_costs_its_samples(bucket: str, s3: str, tmp_path: Path) -> None:
    there = ShardSet.open(f"s3://{bucket}/shards", CacheConfig(tmp_path / "cache", 0))
    boto3.client("s3", endpoint_url=s3).delete_object(Bucket=bucket, Key="shards/shard-000001.tar")
    assert there.read(0)["mp4"] == content(0)
    with pytest.raises(BadSample, match=r"s005: cannot read shard-000001\.tar"):
        there.read(5)


def test_what_is_not_there(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipelines.shards.storage.PAUSES", ())
    cache = CacheConfig(tmp_path / "cache", 1 << 20)
    for address, said in (
        ("s3://no-such-bucket/shards", "s3://no-such-bucket/shards"),
        ("nosuch://x/y", "nosuch://x/y: Protocol not known"),
        ("http://127.0.0.1:9/shards", "http://127.0.0.1:9/shards"),
    ):
        with pytest.raises(DataError, match=said):
            ShardSet.open(address, cache)


def test_shards_behind_http(tmp_path: Path) -> None:
    write(tmp_path / "shards")
    handler = functools.partial(_Ranges, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            address = f"http://127.0.0.1:{server.server_port}/shards"
            there = ShardSet.open(address, CacheConfig(tmp_path / "cache", 1 << 30))
            assert [there.read(i)["mp4"] for i in range(SAMPLES)] == [content(i) for i in range(SAMPLES)]
        finally:
            server.shutdown()


def test_a_server_that_is_away_at_the_start_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "shards")
    asked = []

    class Waking(_Ranges):
        def send_head(self):
            asked.append(self.path)
            return super().send_head() if len(asked) > 5 else self.send_error(503, "Slow Down")

    monkeypatch.setattr("data_pipelines.shards.storage.PAUSES", 8 * (0.01,))
    handler = functools.partial(Waking, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            address = f"http://127.0.0.1:{server.server_port}/shards"
            assert ShardSet.open(address, CacheConfig(tmp_path / "cache", 1 << 30)).read(0)["mp4"] == content(0)
        finally:
            server.shutdown()
    assert len(asked) > 5
    (said,) = [record.getMessage() for record in caplog.records if record.name == "megasora.storage"]
    assert said.startswith(f"{address} does not answer, tried again")


class _Ranges(http.server.SimpleHTTPRequestHandler):
    """Python's server does not know ranges: without one, a client may give the whole file."""

    def log_message(self, *_: object) -> None:
        pass

    def send_head(self):
        path = Path(self.translate_path(self.path))
        if "Range" not in self.headers or not path.is_file():
            return super().send_head()
        first, last = self.headers["Range"].removeprefix("bytes=").split("-")
        whole = path.read_bytes()
        part = whole[int(first) : int(last) + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(whole)}")
        self.end_headers()
        self.wfile.write(part)
        return None


# The cache


def test_the_cache_stays_within_its_bound_and_gives_what_was_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BlockCache, "BLOCK", 1000)
    files = {name: random.Random(name).randbytes(10_500) for name in ("a", "b", "c")}
    fetched: list[str] = []
    cache = BlockCache(tmp_path, 12_000)
    choose = random.Random(1)
    for _ in range(2000):
        name = choose.choice("abc")
        offset = choose.randrange(10_500)
        end = min(10_500, offset + choose.randrange(1, 2500))

        def fetch(first: int, last: int, name: str = name) -> bytes:
            fetched.append(name)
            return files[name][first:last]

        assert cache.read(name, 10_500, offset, end, fetch) == files[name][offset:end]
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 12_000 + 1000
    assert 33 < len(fetched) < 4000


def test_a_block_is_fetched_once_whoever_wants_it(tmp_path: Path) -> None:
    fetched: list[int] = []
    cache = BlockCache(tmp_path, 1 << 30)

    def fetch(first: int, last: int) -> bytes:
        fetched.append(first)
        return bytes(last - first)

    threads = [threading.Thread(target=cache.read, args=("a", 5000, 0, 5000, fetch)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert fetched == [0]


def test_what_a_crash_cut_short_is_fetched_again(tmp_path: Path) -> None:
    for cut in (0, 300):
        (tmp_path / "a-000000").write_bytes(bytes(cut))
        (tmp_path / "b-whole").write_bytes(bytes(cut))
        cache = BlockCache(tmp_path, 1 << 30)
        assert cache.read("a", 500, 100, 400, lambda first, last: b"x" * (last - first)) == b"x" * 300
        assert cache.whole("b", 500, lambda: b"x" * 500).read_bytes() == b"x" * 500
        assert (tmp_path / "a-000000").read_bytes() == b"x" * 500


def test_hidden_files_of_dead_writers_go(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path, 1 << 30)
    old, new = tmp_path / ".a-000007.123.456", tmp_path / ".a-000008.123.456"
    for path in (old, new):
        path.write_bytes(b"half a block")
    os.utime(old, (0, 0))
    cache.read("b", 500, 0, 500, lambda first, last: bytes(last - first))
    assert (old.exists(), new.exists()) == (False, True)


def test_many_small_files_are_mapped_without_waiting_for_each_other(tmp_path: Path) -> None:
    storage = Remote(f"memory://{tmp_path}", CacheConfig(tmp_path / "cache", 1 << 30))
    names = [f"{i:03d}.arrow" for i in range(300)]  # of 64 groups that are locked together, more than one each
    for name in [*names, "empty"]:
        storage._files.pipe_file(f"{storage._root}/{name}", b"" if name == "empty" else name.encode())
    found: dict[str, bytes] = {}

    def map_every_fourth(first: int) -> None:
        for name in names[first::4]:
            with storage.mapped(name) as file:
                found[name] = file.read()

    threads = [threading.Thread(target=map_every_fourth, args=(i,), daemon=True) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert found == {name: name.encode() for name in names}
    assert storage.read("empty") == b""


def test_reads_that_fail_are_tried_again_for_two_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Remote(f"memory://{tmp_path}", CacheConfig(tmp_path / "cache", 0))
    storage._files.pipe_file(f"{storage._root}/a", b"content")
    slept: list[float] = []
    monkeypatch.setattr("data_pipelines.shards.storage.time.sleep", slept.append)
    errors: list[Exception] = []

    def failing(read: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            if errors:
                raise errors.pop()
            return read(*args, **more)

        return call

    for name in ("cat_file", "info", "ls"):
        monkeypatch.setattr(storage._files, name, failing(getattr(storage._files, name)), raising=False)
    errors += [OSError("reset by peer"), RuntimeError("client error")]
    assert storage.names() == ["a"]
    storage._facts.clear()
    errors += [OSError("reset by peer"), RuntimeError("client error")]
    assert storage._fact("a")[0] == 7
    errors += [OSError("reset by peer"), RuntimeError("client error")]
    assert storage.read("a") == b"content"
    assert slept == [0.1, 0.4] * 3
    slept.clear()
    errors += [OSError("reset by peer")] * 100
    with pytest.raises(OSError, match="reset by peer"):
        storage.read("a")
    assert 110 < sum(slept) < 130
    errors[:] = [FileNotFoundError("a")]
    slept.clear()
    with pytest.raises(FileNotFoundError):
        storage.read("a")
    assert not slept
