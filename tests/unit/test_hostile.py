"""What comes from elsewhere may lie: names, sizes, indexes. Whatever it says, no other file is opened, little memory taken."""

import io
import json
import pickle
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from data_pipelines.errors import BadSample, DataError
from data_pipelines.names import is_below, is_safe
from data_pipelines.prepare.config import PrepareConfig
from data_pipelines.prepare.raw_inputs import open_inputs
from data_pipelines.samples.latents import check_source, read_about, read_latent
from data_pipelines.shards.index import SCHEMA, TEXT_MAX, Row, index_bytes, index_directory, scan_tar
from data_pipelines.shards.storage import CacheConfig, Directory, open_storage
from data_pipelines.shards.tars import ShardSet, ShardWriter
from megasora.checkpoint.contents import open_checkpoint
from megasora.checkpoint.load import load
from megasora.checkpoint.manifest import FileSum, Manifest, file_sum, read_manifest, verify, write_manifest
from megasora.checkpoint.metadata import read_metadata
from megasora.checkpoint.save import save
from megasora.errors import CheckpointError

FACTS = {"kind": "video", "frames": 5, "fps": 24.0, "height": 64, "width": 96}
OUTSIDE = [
    "",
    ".",
    "..",
    "../a",
    "a/../../b",
    "/a",
    "//a",
    "a\0.mp4",
    "a\nb",
    "\x1b[2J",
    "\udcff",
    "a/..",
    "\u202egpj.a",
]
NOT_SHORT = ["./a", "a//b", "a/", "a/./b"]  # as a tar or a list may write them


@pytest.mark.parametrize("name", [*OUTSIDE, *NOT_SHORT])
def test_names_that_are_not_safe(name: str) -> None:
    assert not is_safe(name)
    assert is_below(name, Path("/videos")) == (name in NOT_SHORT)


@pytest.mark.parametrize(
    "name", ["a", ".metadata", "a/b.mp4", "..a", "a..b/c", "zero/blocks.0.weight/fp32.pt", "é 1\\"]
)
def test_names_that_are(name: str) -> None:
    assert is_safe(name)
    assert is_below(name, Path("/videos"))
    assert is_below(f"/videos/{name}", Path("/videos"))
    assert is_below(f"/anywhere/{name}", Path("/"))
    assert not is_below(f"/videos2/{name}", Path("/videos"))
    assert not is_below(f"/videos/../{name}", Path("/videos"))


# Tars


def member(tar: tarfile.TarFile, name: str, content: bytes, **fields: Any) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    tar.addfile(info, io.BytesIO(content))


def whole_sample(tar: tarfile.TarFile, key: str, about: bytes = json.dumps(FACTS).encode(), **fields: Any) -> None:
    for suffix, content in (("mp4", b"a video"), ("txt", b"a caption"), ("json", about)):
        member(tar, f"{key}.{suffix}", content, **fields)


def found_in(path: Path) -> tuple[list[str], dict[str, str]]:
    with path.open("rb") as file:
        rows, problems = scan_tar(file)
    return [row.key for row in rows], {problem.key: problem.reason for problem in problems}


def test_members_with_hostile_names_are_left_out(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        whole_sample(tar, "./good")
        for key in ("../up", "a/../../b", "/etc/passwd", "line\nbreak"):
            whole_sample(tar, key)
        for suffix in ("mp4", "txt", "json"):  # a NUL fits into no plain header
            member(tar, "x", json.dumps(FACTS).encode(), pax_headers={"path": f"nul\0/../x.{suffix}"})
    rows, problems = found_in(tmp_path / "a.tar")
    assert rows == ["./good"]
    assert set(problems.values()) == {"unsafe path"}
    assert len(problems) == 5


def huge_header(kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = kind, 1 << 33
    return info


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK])
def test_a_header_that_declares_gigabytes_is_not_read(kind: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        whole_sample(tar, "good")
    with path.open("r+b") as file:
        file.seek(6 * 512)
        file.write(huge_header(kind).tobuf(tarfile.GNU_FORMAT))
        file.truncate(1 << 33)  # a hole: the file has as much as the header says
    tracemalloc.start()
    rows, problems = found_in(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (rows, problems) == (["good"], {"": "tar header too large"})
    assert peak < 1 << 22


@pytest.mark.timeout(20)
def test_a_chain_of_headers_ends(tmp_path: Path) -> None:
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, 13
    one = info.tobuf(tarfile.USTAR_FORMAT) + b"13 comment=x\n".ljust(512, b"\0")
    (tmp_path / "a.tar").write_bytes(one * 20_000)
    assert found_in(tmp_path / "a.tar") == ([], {"": "tar header too large"})


@pytest.mark.timeout(20)
def test_a_header_that_python_parses_slowly_is_cut(tmp_path: Path) -> None:
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, 30_000  # CVE-2024-6232: time goes with the square of the size
    (tmp_path / "a.tar").write_bytes(info.tobuf() + b"1" * 30_208 + bytes(1024))
    found_in(tmp_path / "a.tar")
    info.size = 1 << 20
    (tmp_path / "a.tar").write_bytes(info.tobuf() + b"1" * (1 << 20) + bytes(1024))
    assert found_in(tmp_path / "a.tar") == ([], {"": "tar header too large"})


def test_metadata_of_gigabytes_is_not_parsed(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        member(tar, "a.mp4", b"a video")
        member(tar, "a.txt", b"a caption")
    header = tarfile.TarInfo("a.json")
    header.size = TEXT_MAX + 1
    with path.open("r+b") as file:
        file.seek(4 * 512)
        file.write(header.tobuf())
        file.truncate(TEXT_MAX + (1 << 14))
    assert found_in(path) == ([], {"a": "member too large"})
    # Nor where an index of somebody else's asks for it.
    row = Row("a", 0, TEXT_MAX + 512 * 6, "video", 5, 24.0, 64, 96, -1)
    (tmp_path / "a.arrow").write_bytes(index_bytes([row]))
    with pytest.raises(BadSample, match="not as it was indexed"):
        ShardSet.open(tmp_path).read(0)


@pytest.mark.parametrize("scores", [{"x": 10**400}, {"\ud800": 1}, {"x": [1]}, {"x\0": 1}, [1], {"x": 1e400}])
def test_hostile_scores_are_passed_over(scores: object, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        whole_sample(tar, "a", json.dumps({**FACTS, "scores": scores}).encode())
    assert index_directory(open_storage(tmp_path), lambda *_: None)["samples"] == 1
    assert ShardSet.open(tmp_path).row(0).scores == {}


@pytest.mark.parametrize(
    "facts",
    [{"captions": [["a", 10**400]]}, {"captions": 5}, {"captions": [["a"]]}, [], {"captions": [["a", float("inf")]]}],
)
def test_hostile_captions_cost_one_sample(facts: object) -> None:
    with pytest.raises(BadSample):
        read_about("key", {"txt": b"a caption", "json": json.dumps(facts).encode()})


@pytest.mark.parametrize("facts", [b"[" * 100_000, b'{"temporal_compression": 0, "fps": 1, "label": 1}', b"{}", b"5"])
def test_hostile_facts_of_latents_cost_one_sample(facts: bytes) -> None:
    from safetensors.torch import save as to_bytes

    tensors = to_bytes({name: torch.zeros(2, 3, 4, 4) for name in ("mean", "logvar", "text")})
    with pytest.raises(BadSample):
        read_latent("key", {"safetensors": bytearray(tensors), "json": facts}, frames=5)


# Indexes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offset": -512}, "damaged"),
        ({"length": -1}, "damaged"),
        ({"length": 0}, "damaged"),
        ({"length": 1 << 62}, "truncated"),
        ({"offset": (1 << 63) - 1}, "truncated"),
        ({"key": "../../etc/passwd"}, "not as it was indexed"),
    ],
)
def test_an_index_that_points_elsewhere_costs_its_samples(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with ShardWriter(tmp_path) as writer:
        for key in ("a", "b"):
            writer.write({"__key__": key, "mp4": b"a video", "txt": "a caption", "json": dict(FACTS)})
    rows = [ShardSet.open(tmp_path).row(i) for i in range(2)]
    changed = Row(**{**vars(rows[1]), **change})
    (tmp_path / "shard-000000.arrow").write_bytes(index_bytes([rows[0], changed]))
    shards = ShardSet.open(tmp_path)
    assert shards.read(0)["txt"] == b"a caption"
    with pytest.raises(BadSample, match=message):
        shards.read(1)


@pytest.mark.parametrize("text", ["a-long-key", "digest"])
def test_an_index_whose_texts_are_none_is_an_error_of_one_line(text: str, tmp_path: Path) -> None:
    with ShardWriter(tmp_path) as writer:
        writer.write({"__key__": "a-long-key", "mp4": b"a video", "txt": "a caption", "json": dict(FACTS)})
    file = tmp_path / "shard-000000.arrow"
    wanted = ShardSet.open(tmp_path).digests["shard-000000.tar"].split()[1] if text == "digest" else text
    file.write_bytes(file.read_bytes().replace(wanted.encode(), b"\xff" * len(wanted)))

    def use() -> None:
        shards = ShardSet.open(tmp_path)
        assert shards.fingerprint
        shards.key(0)

    with pytest.raises(DataError, match=r"shard-000000\.arrow: .*write it again"):
        use()


def test_an_index_with_empty_cells_is_refused(tmp_path: Path) -> None:
    with ShardWriter(tmp_path) as writer:
        writer.write({"__key__": "a", "mp4": b"a video", "txt": "a caption", "json": dict(FACTS)})
    with pa.memory_map(str(tmp_path / "shard-000000.arrow")) as file:
        schema = pa.ipc.open_file(file).schema
    table = pa.table([pa.nulls(1, kind.type) for kind in SCHEMA], schema=schema)
    with pa.OSFile(str(tmp_path / "shard-000000.arrow"), "wb") as sink, pa.ipc.new_file(sink, schema) as out:
        out.write_table(table)
    with pytest.raises(DataError, match=r"shard-000000\.arrow: an index with empty cells"):
        ShardSet.open(tmp_path)


def test_a_listing_with_hostile_names_shows_the_others(tmp_path: Path) -> None:
    files = fsspec.filesystem("memory")
    for name in ("good.tar", "line\nbreak.tar", "\x1b[2Jx.tar", ".hidden.tar"):
        files.pipe_file(f"/hostile/{name}", b"x")
    assert open_storage("memory://hostile", CacheConfig(tmp_path, 0)).names() == ["good.tar"]


@pytest.mark.parametrize("report", ["", "[" * 100_000, "[]", "5", "{}", '{"input": "x"}'])
def test_a_report_of_latents_that_is_none_is_an_error_of_one_line(report: str, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(report)
    with pytest.raises(DataError, match=r"report\.json: damaged"):
        check_source(Directory(tmp_path))


def test_a_report_of_latents_leads_to_no_file_that_it_does_not_name(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "shards") as writer:
        writer.write({"__key__": "a", "mp4": b"a video", "txt": "a caption", "json": dict(FACTS)})
    names = ("shard-000000.tar", "shard-000000.arrow")
    files = {name: [f"file://{tmp_path}/shards/{name}"] for name in names}
    (tmp_path / "references.json").write_text(json.dumps({"version": 1, "refs": files}))
    chained = f"reference::file://{tmp_path}/references.json"
    (tmp_path / "report.json").write_text(json.dumps({"input": chained, "source": "another"}))
    assert open_storage(chained, CacheConfig(tmp_path, 0)).names() == sorted(names)  # it would be followed
    check_source(Directory(tmp_path))


# Lists of files


def test_a_list_opens_nothing_outside_of_its_root(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    names = [
        "a.mp4",
        "./b.mp4",
        "sub/c.mp4",
        "../secret.mp4",
        "/etc/passwd",
        "sub/../../d.mp4",
        str(tmp_path / "videos/e.mp4"),
    ]
    listed = tmp_path / "videos" / "list.jsonl"
    listed.write_text("".join(json.dumps({"path": name, "caption": "x"}) + "\n" for name in [*names, "a\0.mp4"]))
    dropped: list[tuple[str, str]] = []
    config = PrepareConfig(input=str(listed), output=str(tmp_path / "out"))
    inputs = open_inputs(config, tmp_path / "out", lambda why, what: dropped.append((why, what)))
    assert [source.name for source in inputs.sources] == [*names[:3], names[6]]
    outside = "outside of prepare.root"
    assert dropped == [*((outside, name) for name in names[3:6]), ("not a printable UTF-8 name", r"'a\x00.mp4'")]


# Checkpoints


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save(tmp_path / "checkpoints", 5, {"model/w": torch.arange(6.0).reshape(2, 3)}, {"step": 5})


@pytest.mark.parametrize("name", [*OUTSIDE, *NOT_SHORT])
def test_a_manifest_names_files_of_its_directory_only(name: str, saved: Path) -> None:
    old = read_manifest(saved)
    write_manifest(saved, Manifest(old.step, old.time, {**old.files, name: FileSum(1, "0")}))
    with pytest.raises(CheckpointError, match=r"which is not a file of this directory$") as error:
        read_manifest(saved)
    assert str(error.value).isprintable()


Change = Callable[[Any], None]


def widen(metadata: Any) -> None:
    metadata.state_dict_metadata["model/w"].size = torch.Size([1 << 40, 3])


def negate(metadata: Any) -> None:
    metadata.state_dict_metadata["model/w"].size = torch.Size([-2, -3])


def displace(metadata: Any) -> None:
    next(iter(metadata.storage_data.values())).length = 1 << 50


def precede(metadata: Any) -> None:
    next(iter(metadata.storage_data.values())).offset = -4


def swell(metadata: Any) -> None:
    metadata.state_dict_metadata["model/w"].chunks[0].sizes = torch.Size([1 << 40, 3])


def resealed(saved: Path, change: Change) -> None:
    """With a manifest that agrees, as an attacker would leave it."""
    metadata = FileSystemReader(saved).read_metadata()
    metadata.storage_meta = None
    change(metadata)
    (saved / ".metadata").write_bytes(pickle.dumps(metadata))
    old = read_manifest(saved)
    write_manifest(saved, Manifest(old.step, old.time, {name: file_sum(saved / name) for name in old.files}))
    assert verify(saved) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (widen, "more than its files"),
        (negate, "negative size"),
        (displace, r"outside of __0_0\.distcp"),
        (precede, r"outside of __0_0\.distcp"),
    ],
)
def test_tensors_that_files_cannot_hold_are_refused(change: Change, message: str, saved: Path) -> None:
    resealed(saved, change)
    with pytest.raises(CheckpointError, match=rf"\.metadata: refused: .*{message}"):
        read_metadata(saved)


def test_a_piece_that_files_cannot_hold_is_an_error_of_one_line(saved: Path) -> None:
    resealed(saved, swell)
    with pytest.raises(CheckpointError, match="model/w"):
        open_checkpoint(saved).read("model/w")
    with pytest.raises(CheckpointError, match="model/w"):
        load(saved, {"model/w": torch.zeros(2, 3)})


def test_a_type_that_is_unknown_here_is_named(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(2, dtype=torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    (tmp_path / "facts.json").write_text('{"step": 5}')
    write_manifest(tmp_path, Manifest(5, 0, {n: file_sum(tmp_path / n) for n in ("model.safetensors", "facts.json")}))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: w is of F8_E4M3"):
        open_checkpoint(tmp_path)
