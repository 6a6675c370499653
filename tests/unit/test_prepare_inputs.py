"""What prepare reads: lists of files, webdatasets, several captions; and how machines divide it."""

import csv
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines.errors import DataError
from data_pipelines.prepare.captions import Known, read_texts
from data_pipelines.prepare.parts import make_parts
from data_pipelines.prepare.raw_inputs import Source, make_slugs
from data_pipelines.prepare.run import PrepareConfig, prepare, which_part
from data_pipelines.shards.index import index_directory
from data_pipelines.shards.storage import open_storage
from data_pipelines.shards.tars import ShardSet
from data_pipelines.video.files import decode
from data_pipelines.video.write import encode_image
from tests.clips import noise, numbered, read_number, video_bytes, write_clip


def run(source: Path, output: Path, **options: object) -> tuple[dict, ShardSet]:
    config = PrepareConfig(input=str(source), output=str(output), shot_threshold=250.0, **options)
    return prepare(config, lambda *_: None), ShardSet.open(output)


def samples(shards: ShardSet) -> dict[str, dict[str, bytes]]:
    return {shards.key(i): shards.read(i) for i in range(len(shards))}


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    for name, seed in (("one", 1), ("two", 2), ("deep/three", 3)):
        write_clip(tmp_path / "videos" / f"{name}.mp4", noise(20, seed=seed))
    encode_image(noise(1, seed=4)[0], tmp_path / "videos" / "four.jpg")
    return tmp_path / "videos"


ROWS = [
    {"path": "two.mp4", "caption": "the second", "label": 2},
    {"path": "one.mp4", "captions": ["first", "the  first one"], "weights": [1.0, 3.0]},
    {"path": "deep/three.mp4", "caption": "third"},
    {"path": "four.jpg", "caption": "a picture"},
    {"path": "gone.mp4", "caption": "not there"},
    {"path": "one.mp4", "captions": ["bad weight"], "weights": [0.0]},
    {"path": "two.mp4", "caption": None},
]


def write_list(path: Path, rows: list[dict]) -> Path:
    names = ["path", "caption", "captions", "weights", "label"]
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist([{name: row.get(name) for name in names} for row in rows]), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, names)
            table.writeheader()
            for row in rows:
                table.writerow({k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()})
    return path


def test_a_list_may_be_parquet_csv_or_jsonl(videos, tmp_path):
    made = {}
    for suffix in (".parquet", ".csv", ".jsonl"):
        listed = write_list(tmp_path / f"list{suffix}", ROWS)
        report, shards = run(listed, tmp_path / f"out{suffix}", root=str(videos))
        assert report["sources"] == 5
        assert report["dropped"].pop(f"unreadable row of list{suffix}") == 1
        assert report["dropped"] == {"unreadable file": 1}
        assert report["examples"]["unreadable file"] == ["gone.mp4 (No such file or directory)"]
        made[suffix] = samples(shards)
        assert list(made[suffix]) == ["two-000000", "one-000000", "deep-three-000000", "four-000000"]  # as listed
    assert made[".parquet"] == made[".csv"] == made[".jsonl"]
    one, two = made[".csv"]["one-000000"], made[".csv"]["two-000000"]
    assert (one["txt"], two["txt"], two["cls"]) == (b"first", b"the second", b"2")
    assert json.loads(one["json"])["captions"] == [["first", 1.0], ["the first one", 3.0]]
    assert "captions" not in json.loads(two["json"])
    assert "cls" not in one


def test_rows_of_one_file_add_captions_and_paths_are_relative_to_the_list(videos, tmp_path):
    rows = [{"path": "one.mp4", "caption": "a"}, {"path": str(videos / "two.mp4"), "caption": "c"}]
    rows += [{"path": "one.mp4", "caption": "b"}]
    _, shards = run(write_list(videos / "list.jsonl", rows), tmp_path / "out")
    one, two = samples(shards).values()
    assert json.loads(one["json"])["captions"] == [["a", 1.0], ["b", 1.0]]
    assert two["txt"] == b"c"


def test_parts_of_a_video_are_cut_where_the_list_says(tmp_path):
    write_clip(tmp_path / "long.mp4", numbered(60), fps=10)
    rows = [
        {"path": "long.mp4", "start": 3.05, "end": 5.0, "caption": "late"},
        {"path": "long.mp4", "start": 0.4, "end": 1.9, "caption": "early"},
    ]
    report, shards = run(
        write_list(tmp_path / "list.jsonl", rows), tmp_path / "out", min_frames=1, clip_seconds=1.0, duplicates=-1
    )
    assert report["dropped"] == {}
    found = {}
    for index in range(len(shards)):
        row, members = shards.row(index), shards.read(index)
        clip = decode(members["mp4"], frames=row.frames, height=row.height, width=row.width)
        found[shards.key(index)] = (members["txt"].decode(), [read_number(frame) for frame in clip])
    assert found == {
        "long-000004": ("early", list(range(4, 14))),
        "long-000014": ("early", list(range(14, 19))),
        "long-000031": ("late", list(range(31, 41))),
        "long-000041": ("late", list(range(41, 50))),
    }


def test_hdr_and_interlaced_video_is_counted(tmp_path):
    kinds = {
        "pq": {"color_trc": "smpte2084"}, "hlg": {"color_trc": "arib-std-b67"}, "fields": {"flags": "+ildct+ilme"},
        "plain": {"color_trc": "bt709"},
    }  # fmt: skip
    (tmp_path / "in").mkdir()
    for name, settings in kinds.items():
        (tmp_path / "in" / f"{name}.mp4").write_bytes(video_bytes(noise(20), settings=settings))
        (tmp_path / "in" / f"{name}.txt").write_text(name)
    report, shards = run(tmp_path / "in", tmp_path / "out")
    assert report["dropped"] == {"HDR": 2, "interlaced": 1}
    assert [shards.read(i)["txt"] for i in range(len(shards))] == [b"plain"]


def test_a_folder_that_cannot_be_listed_is_counted_and_the_input_itself_refused(videos, tmp_path, monkeypatch):
    def locked(name: str) -> None:
        listed = os.scandir

        def scandir(path):
            if isinstance(path, str | Path) and Path(path).name == name:
                raise PermissionError(13, "Permission denied", str(path))
            return listed(path)

        monkeypatch.setattr(os, "scandir", scandir)

    for name in ("one", "two", "four"):
        (videos / f"{name}.txt").write_text(name)
    (videos / ".hidden").mkdir()
    locked(".hidden")
    locked("deep")
    report, _ = run(videos, tmp_path / "out", min_frames=4)
    assert report["dropped"] == {"unreadable folder": 1}
    assert report["examples"] == {"unreadable folder": ["deep (Permission denied)"]}
    locked(videos.name)
    with pytest.raises(DataError, match=f"prepare.input={videos}: Permission denied"):
        run(videos, tmp_path / "other")


def test_captions_that_cannot_be_read_are_refused(videos, tmp_path, monkeypatch):
    (videos / "captions.jsonl").write_text("")
    opened = Path.open

    def denied(path, *how, **more):
        if path.name == "captions.jsonl":
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *how, **more)

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(DataError, match=r"captions\.jsonl: Permission denied"):
        run(videos, tmp_path / "out")


def test_captions_jsonl_may_have_several_captions(tmp_path):
    write_clip(tmp_path / "in" / "clip.mp4", noise(20))
    line = {"file": "clip.mp4", "captions": [["long", 2], ["short", 1]]}
    (tmp_path / "in" / "captions.jsonl").write_text(json.dumps(line))
    _, shards = run(tmp_path / "in", tmp_path / "out")
    assert json.loads(shards.read(0)["json"])["captions"] == [["long", 2.0], ["short", 1.0]]
    assert shards.read(0)["txt"] == b"long"


@pytest.mark.parametrize(
    "wrong",
    [{"caption": 3}, {"captions": "no list"}, {"captions": ["a"], "weights": [1, 2]}, {"captions": [["a", -1]]},
     {"captions": ["a"], "weights": [float("inf")]}, {"captions": [[1, 1]]}, {"caption": "half \ud800"}],
)  # fmt: skip
def test_captions_that_are_none_are_refused(wrong):
    with pytest.raises((ValueError, TypeError)):
        read_texts(wrong)


def test_a_list_without_the_columns_is_refused_and_hostile_rows_are_counted(videos, tmp_path):
    for name, text in (("a.csv", "file,text\nx,y\n"), ("b.parquet", "no parquet"), ("c.csv", "")):
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError, match=name):
            run(tmp_path / name, tmp_path / "out")
    rows = [b"path,caption", b'"one.mp4","a, ""quoted"" one"', b"two.mp4,caf\xe9", b"two.mp4,too,many", b"x\ty.mp4,tab"]
    (videos / "list.csv").write_bytes(b"\r\n".join(rows))
    report, shards = run(videos / "list.csv", tmp_path / "out")
    assert report["dropped"] == {"unreadable row of list.csv": 2, "not a printable UTF-8 name": 1}
    assert shards.read(0)["txt"] == b'a, "quoted" one'


def test_a_webdataset_is_prepared_again_with_all_it_says(videos, tmp_path):
    first, _ = run(write_list(tmp_path / "list.jsonl", ROWS), tmp_path / "first", root=str(videos), samples_per_shard=3)
    report, shards = run(tmp_path / "first", tmp_path / "second", clip_seconds=0.5, min_frames=9, duplicates=-1)
    assert (first["kept"], report["sources"], report["kept"]) == (4, 4, 4)
    assert report["dropped"] == {"too short": 3}
    second = samples(shards)
    assert json.loads(second["one-000000-000000"]["json"])["captions"] == [["first", 1.0], ["the first one", 3.0]]
    assert second["two-000000-000000"]["cls"] == b"2"
    assert json.loads(second["two-000000-000000"]["json"])["source"] == "shard-000000.tar/two-000000"
    assert shards.row(0).frames == 12


def test_a_foreign_webdataset_with_equal_keys(videos, tmp_path):
    import webdataset

    (tmp_path / "foreign").mkdir()
    for tar, name in (("a.tar", "one"), ("b.tar", "two")):
        with webdataset.TarWriter(str(tmp_path / "foreign" / tar)) as writer:
            writer.write({"__key__": "x/0", "mp4": (videos / f"{name}.mp4").read_bytes(), "txt": name})
    with pytest.raises(DataError, match="megasora index"):
        run(tmp_path / "foreign", tmp_path / "out")
    index_directory(open_storage(tmp_path / "foreign"), lambda *_: None)
    _, shards = run(tmp_path / "foreign", tmp_path / "out")
    assert sorted(members["txt"] for members in samples(shards).values()) == [b"one", b"two"]
    assert all(shards.key(i).startswith("x-0-") for i in range(2))


def test_the_times_of_frames_are_those_of_the_list():
    known = Known(parts=[(0.5, 1.0, (("a", 1.0),)), (2.0, float("inf"), (("b", 1.0),))], cuts=True)
    for fps in (24.0, 29.97, 12.5):
        wanted = [n for n in range(100) if known.wanted(n, fps)]
        assert wanted == [n for n in range(100) if 0.5 <= n / fps + 1e-9 < 1.0 or n / fps + 1e-9 >= 2.0]
        assert {wanted[0], wanted[-1] + 1} - known.edges(fps) == {100}
    assert Known(parts=known.parts).edges(24.0) == set()
    assert Known(parts=known.parts[:1], cuts=True).end(24.0) == 24


def test_parts_are_the_same_for_every_machine_and_cover_all(monkeypatch):
    monkeypatch.setattr("data_pipelines.prepare.parts.PART_BYTES", 100)
    sources = [
        Source(f"{n}", f"{n}", Path(f"{n}"), Known(), size) for n, size in enumerate([10, 10, 90, 200, 1, 1, 1, 1])
    ]
    parts = make_parts(sources, 3)
    assert [[source.bytes for source in part.sources] for part in parts] == [[10, 10, 90], [200], [1, 1, 1], [1]]
    assert [part.name for part in parts] == [f"part-{n:06d}" for n in range(4)]
    assert make_parts([], 3) == []


def test_the_share_of_a_machine():
    assert which_part("", {}) == (0, 1)
    assert which_part("3/8", {"RANK": "1", "WORLD_SIZE": "2"}) == (3, 8)
    assert which_part("", {"RANK": "1", "WORLD_SIZE": "2"}) == (1, 2)
    array = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "1"}
    assert which_part("", array | {"SLURM_ARRAY_TASK_STEP": "2"}) == (3, 4)
    assert which_part("", array | {"SLURM_ARRAY_TASK_STEP": "2", "RANK": "1", "WORLD_SIZE": "2"}) == (7, 8)
    with pytest.raises(DataError, match="gaps"):
        which_part("", array)
    # One task of the array that is run again by itself does all that is left.
    again = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "1", "SLURM_ARRAY_TASK_MIN": "7"}
    assert which_part("", again) == (0, 1)


def test_keys_are_unlike_each_other():
    slugs = make_slugs({"a/b": "a/b", "a-b": "a-b", "c": "c", "é": "é", "x" * 99: "x" * 99})
    assert slugs["c"] == "c"
    assert slugs["a/b"].startswith("a-b-")
    assert len(set(slugs.values())) == 5
    assert all(0 < len(slug) <= 60 for slug in slugs.values())
    taken = {"a/b": "a/b", "a-b": "a-b"} | {name: name for name in (slugs["a/b"],)}
    with pytest.raises(DataError, match="rename"):
        make_slugs(taken)


def test_keys_of_many_long_names_and_of_equal_ones_are_unlike_each_other():
    # Some 32-bit hashes are the same.
    names = [f"{folder}/{'x' * 60}{i}" for i in range(75_000) for folder in ("a", "b")]
    slugs = make_slugs({name: name for name in names} | {f"{i}.tar/clip": "clip" for i in range(1000)})
    assert len(set(slugs.values())) == 151_000
    assert max(map(len, slugs.values())) == 60


def test_the_second_of_two_equal_keys_among_many_is_found_at_once():
    names = [f"{i:06d}" for i in range(50_000)]
    hashed = make_slugs({"a/b": "a/b", "a-b": "a-b"})["a/b"]
    with pytest.raises(DataError, match="rename"):
        make_slugs({name: name for name in [*names, "a/b", "a-b", hashed]})


def test_machines_one_after_the_other_and_processes_give_the_same_bytes(videos, tmp_path):
    for path in videos.rglob("*.*"):
        path.with_suffix(".txt").write_text(path.stem)
    shutil.copy(videos / "one.mp4", videos / "zzz.mp4")  # a duplicate in another part
    (videos / "zzz.txt").write_text("again")
    options = {"samples_per_shard": 2, "part_files": 1}
    alone, _ = run(videos, tmp_path / "alone", **options)
    assert alone["dropped"] == {"duplicate": 1}
    said = []
    for part in ("1/3", "0/3", "2/3"):
        config = PrepareConfig(
            input=str(videos), output=str(tmp_path / "many"), shot_threshold=250.0, part=part, **options
        )
        said.append(prepare(config, lambda *_: None))
    assert [each["left_to_others"] for each in said] == [3, 1, 0]
    assert said[-1] == alone
    run(videos, tmp_path / "workers", workers=2, **options)
    run(videos, tmp_path / "parts", samples_per_shard=2, part_files=3)
    for name in ("many", "workers", "parts"):
        assert content(tmp_path / name) == content(tmp_path / "alone")
    assert np.isclose(alone["seconds"], 3 * 20 / 24, atol=1e-3)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
