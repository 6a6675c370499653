import errno
import io
import json
import pickle
import random
import shutil
import tarfile
import threading
from collections import deque
from pathlib import Path

import pytest
import webdataset

from data_pipelines.errors import BadSample, DataError
from data_pipelines.shards.index import Problem, Row, index_directory, index_shard, scan_tar
from data_pipelines.shards.storage import Directory, open_storage
from data_pipelines.shards.tars import ShardFile, ShardSet, ShardWriter, _opened
from tests.clips import numbered, video_bytes


def sample(number: int, size: int = 300, **about: object) -> dict:
    rng = random.Random(number)
    facts = {"kind": "video", "frames": 17 + number, "fps": 24.0, "height": 64, "width": 96, **about}
    return {
        "__key__": f"clip-{number:03d}",
        "mp4": rng.randbytes(size + number),
        "txt": f"câption {number}",
        "json": facts,
    }


def write(directory: Path, count: int, **options: int) -> ShardSet:
    with ShardWriter(directory, **options) as writer:
        for number in range(count):
            writer.write(sample(number, caption_tokens=number))
    return ShardSet.open(directory)


def scan(tar: Path) -> tuple[list[Row], list[Problem]]:
    with tar.open("rb") as file:
        return scan_tar(file)


def add(tar: tarfile.TarFile, name: str, content: bytes = b"x", **fields: object) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    tar.addfile(info, io.BytesIO(content) if info.isreg() else None)


FACTS = json.dumps({"kind": "video", "frames": 5, "fps": 24, "height": 64, "width": 96}).encode()


def add_sample(tar: tarfile.TarFile, key: str) -> None:
    add(tar, f"{key}.json", FACTS)
    add(tar, f"{key}.mp4", b"video of " + key.encode())
    add(tar, f"{key}.txt", b"caption")


def test_what_is_written_is_read(tmp_path):
    shards = write(tmp_path, 10, samples_per_shard=4)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"shard-00000{shard}.{suffix}" for shard in range(3) for suffix in ("arrow", "tar")
    ]
    assert len(shards) == 10
    assert list(shards.tars) == ["shard-000000.tar", "shard-000001.tar", "shard-000002.tar"]
    assert [list(shards.rows_of(shard)) for shard in range(3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    for number in range(10):
        row = shards.row(number)
        assert (row.key, row.kind, row.frames, row.fps) == (f"clip-{number:03d}", "video", 17 + number, 24.0)
        assert (row.height, row.width, row.caption_tokens) == (64, 96, number)
        assert shards.key(number) == row.key
        read, wanted = shards.read(number), sample(number)
        assert sorted(read) == ["json", "mp4", "txt"]
        assert read["mp4"] == wanted["mp4"]
        assert read["txt"].decode() == wanted["txt"]
        assert json.loads(read["json"]).items() >= wanted["json"].items()
    assert [n for (frames,) in shards.columns("frames") for n in frames] == list(range(17, 27))
    for index in (-1, 10):
        with pytest.raises(IndexError):
            shards.read(index)


def test_offsets_are_those_of_the_tar(tmp_path):
    shards = write(tmp_path, 3)
    with tarfile.open(tmp_path / "shard-000000.tar") as tar:
        first_headers = [info.offset for info in tar if info.name.endswith(".json")]
    rows = [shards.row(number) for number in range(3)]
    assert [row.offset for row in rows] == first_headers
    assert [row.offset + row.length for row in rows[:-1]] == first_headers[1:]


def test_plain_webdataset_opens_it(tmp_path):
    write(tmp_path, 7, samples_per_shard=3)
    urls = [str(path) for path in sorted(tmp_path.glob("*.tar"))]
    found = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [each["__key__"] for each in found] == [f"clip-{number:03d}" for number in range(7)]
    for number, each in enumerate(found):
        assert each["mp4"] == sample(number)["mp4"]
        assert each["txt"].decode() == sample(number)["txt"]


def test_same_samples_same_bytes_and_fingerprint(tmp_path):
    one, two = write(tmp_path / "one", 6, samples_per_shard=4), write(tmp_path / "two", 6, samples_per_shard=4)
    for path in sorted((tmp_path / "one").iterdir()):
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    assert one.fingerprint == two.fingerprint
    fingerprints = {one.fingerprint, write(tmp_path / "split", 6, samples_per_shard=3).fingerprint}
    for name, change in {
        "order": lambda samples: samples[::-1],
        "size": lambda samples: [{**samples[0], "mp4": samples[0]["mp4"] + bytes(512)}, *samples[1:]],
        "key": lambda samples: [{**samples[0], "__key__": "clip-xxx"}, *samples[1:]],
        "shape": lambda samples: [{**samples[0], "json": {**samples[0]["json"], "frames": 18}}, *samples[1:]],
    }.items():
        with ShardWriter(tmp_path / name, samples_per_shard=4) as writer:
            for each in change([sample(number, caption_tokens=number) for number in range(6)]):
                writer.write(each)
        fingerprints.add(ShardSet.open(tmp_path / name).fingerprint)
    assert len(fingerprints) == 6


def test_max_bytes_ends_a_shard(tmp_path):
    with ShardWriter(tmp_path, max_bytes=10_000) as writer:
        for number in range(8):
            writer.write(sample(number, size=3000))
    assert writer.shards == 4 == len(ShardSet.open(tmp_path).tars)


def test_latents(tmp_path):
    with ShardFile(tmp_path / "shard-000007.tar") as shard:
        facts = {"kind": "latent", "frames": 17, "fps": 24.0, "height": 64, "width": 96}
        shard.write({"__key__": "a@64x96", "safetensors": b"latents", "json": facts})
    assert ShardSet.open(tmp_path).read(0)["safetensors"] == b"latents"
    with pytest.raises(DataError, match=r"shard-000007\.tar"):
        ShardFile(tmp_path / "shard-000007.tar")


def test_a_shard_is_there_completely_or_not_at_all(tmp_path):
    def three(number: int) -> dict:
        return sample(number) if number < 3 else {}["no more"]

    with pytest.raises(KeyError), ShardWriter(tmp_path, samples_per_shard=2) as writer:
        deque(map(writer.write, map(three, range(9))))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shard-000000.arrow", "shard-000000.tar"]
    with pytest.raises(DataError, match="holds shards already"):
        ShardWriter(tmp_path)


@pytest.mark.parametrize("key", ["a.b", "../a", "/a", "a/../b", "", "a b", "a//b", "é"])
def test_keys_that_would_not_come_back_are_refused(tmp_path, key):
    with ShardFile(tmp_path / "shard-000000.tar") as shard, pytest.raises(ValueError, match="a key is made of"):
        shard.write({**sample(0), "__key__": key})


def test_the_writer_refuses_a_second_use_of_a_key_and_missing_metadata(tmp_path):
    with ShardWriter(tmp_path, samples_per_shard=1) as writer:
        writer.write(sample(0))
        with pytest.raises(ValueError, match="clip-000: key used twice"):
            writer.write(sample(0))
        with pytest.raises(ValueError, match="clip-001: json needs"):
            writer.write({**sample(1), "json": {"kind": "video"}})
    assert len(ShardSet.open(tmp_path)) == 1


def test_a_truncated_tar_costs_the_samples_that_it_lost(tmp_path):
    shards = write(tmp_path, 6)
    tar = tmp_path / "shard-000000.tar"
    cut = shards.row(4).offset + 700
    with tar.open("r+b") as file:
        file.truncate(cut)
    for index in range(4):
        assert shards.read(index)["mp4"] == sample(index)["mp4"]
    for index in (4, 5):
        with pytest.raises(BadSample, match=r"clip-00[45]: shard-000000\.tar is truncated"):
            shards.read(index)
    report = index_shard(open_storage(tmp_path), tar.name)
    assert report["samples"] == 4
    assert report["problems"] == {"truncated tar": 1, "no video, image or latents": 1} or report["problems"] == {
        "truncated tar": 1,
        "cut off": 1,
    }
    assert ShardSet.open(tmp_path).key(3) == "clip-003"


def test_every_cut_yields_the_samples_before_it_and_says_that_it_was_cut(tmp_path):
    shards = write(tmp_path / "whole", 3)
    whole = (tmp_path / "whole" / "shard-000000.tar").read_bytes()
    ends = [shards.row(number).offset + shards.row(number).length for number in range(3)]
    for cut in range(0, ends[-1] + 1, 128):
        tar = tmp_path / "cut.tar"
        tar.write_bytes(whole[:cut])
        rows, problems = scan(tar)
        assert len(rows) == sum(end <= cut for end in ends), cut
        assert problems[-1].key == "", cut
        assert problems[-1].reason in ("truncated tar", "not a plain tar"), cut
    (tmp_path / "cut.tar").write_bytes(whole[: ends[-1] + 1024])
    assert scan(tmp_path / "cut.tar") == (scan(tmp_path / "whole" / "shard-000000.tar")[0], [])


def test_damage_is_found_when_read(tmp_path):
    shards = write(tmp_path, 5)
    tar = tmp_path / "shard-000000.tar"
    whole = tar.read_bytes()
    generator, found = random.Random(0), []
    for _ in range(300):  # a flipped bit anywhere in sample 2 is found, or fell on bytes that mean nothing
        row = shards.row(2)
        at = row.offset + generator.randrange(row.length)
        damaged = bytearray(whole)
        damaged[at] ^= 1 << generator.randrange(8)
        tar.write_bytes(damaged)
        again = ShardSet.open(tmp_path)
        try:
            read = again.read(2)
        except BadSample as bad:
            found.append(bad.key)
            continue
        assert (read["mp4"], read["txt"].decode()) == (sample(2)["mp4"], sample(2)["txt"])
    assert set(found) == {"clip-002"}
    assert len(found) > 50
    payload = bytearray(whole)
    payload[whole.index(sample(2)["mp4"]) + 100] ^= 1
    tar.write_bytes(payload)
    with pytest.raises(BadSample, match="clip-002: its bytes do not match their checksum"):
        ShardSet.open(tmp_path).read(2)
    assert ShardSet.open(tmp_path).read(3)["mp4"] == sample(3)["mp4"]


def test_a_tar_other_than_the_indexed_one(tmp_path):
    original = [sample(number, size=2000) for number in range(5)]
    other_keys = [sample(number, size=1995) for number in range(5, 10)]
    smaller_last = [sample(number, size=2000 if number < 4 else 0) for number in range(5)]
    for name, samples, index, message in [
        ("one", original, 0, None),
        ("keys", other_keys, 0, "clip-000: .*finds clip-005"),
        ("smaller", smaller_last, 4, "clip-004: .*another length"),
    ]:
        with ShardWriter(tmp_path / name) as writer:
            for each in samples:
                writer.write(each)
        if message is None:
            continue
        shutil.copy(tmp_path / name / "shard-000000.tar", tmp_path / "one")
        with pytest.raises(BadSample, match=message):
            ShardSet.open(tmp_path / "one").read(index)
    shards = ShardSet.open(tmp_path / "one")
    (tmp_path / "one" / "shard-000000.tar").unlink()
    with pytest.raises(BadSample, match="cannot read"):
        shards.read(1)


def test_unsafe_and_useless_members_are_refused_and_counted(tmp_path):
    path = tmp_path / "foreign.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        add(tar, "folder", b"", type=tarfile.DIRTYPE)
        add_sample(tar, "good-1")
        add_sample(tar, "../outside")
        add_sample(tar, "/absolute")
        add_sample(tar, "a/../../b")
        add(tar, "linked.mp4", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add(tar, "linked.txt")
        add(tar, "hard.mp4", b"", type=tarfile.LNKTYPE, linkname="good-1.mp4")
        add(tar, "device.mp4", b"", type=tarfile.CHRTYPE)
        add(tar, "silent.mp4")
        add(tar, "silent.json", FACTS)
        add(tar, "blank.mp4")
        add(tar, "blank.txt", b" \n")
        add(tar, "README")
        add(tar, "only.txt")
        add(tar, "both.mp4")
        add(tar, "both.jpg")
        add(tar, "both.txt")
        add(tar, "twice.mp4")
        add(tar, "twice.mp4")
        add(tar, "twice.txt")
        add(tar, "bare.safetensors")
        add(tar, "rubbish.mp4", b"no video")
        add(tar, "rubbish.txt")
        add_sample(tar, "k" * 200)
        add_sample(tar, "good-1")
        add_sample(tar, "last")
    rows, problems = scan(path)
    assert [row.key for row in rows] == ["good-1", "k" * 200, "last"]
    assert {problem.key: problem.reason for problem in problems} == {
        "../outside": "unsafe path",
        "/absolute": "unsafe path",
        "a/../../b": "unsafe path",
        "linked": "link, device or sparse member",
        "hard": "link, device or sparse member",
        "device": "link, device or sparse member",
        "silent": "no caption",
        "blank": "no caption",
        "README": "no key and suffix in the name",
        "only": "no video, image or latents",
        "both": "more than one video, image or latents",
        "twice": "two members of one name",
        "bare": "no metadata",
        "rubbish": "undecodable",
        "good-1": "duplicate key",
    }
    report = index_directory(open_storage(tmp_path), lambda *_: None)
    assert (report["shards"], report["samples"], sum(report["problems"].values())) == (1, 3, 15)
    assert report["problems"]["unsafe path"] == 3
    shards = ShardSet.open(tmp_path)
    assert shards.read(1)["mp4"] == b"video of " + b"k" * 200  # a long name takes two headers
    assert shards.read(2)["txt"] == b"caption"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["foreign.arrow", "foreign.tar"]


def test_absurd_sizes_and_sparse_members(tmp_path):
    for size in (1 << 40, 1 << 62):
        path = tmp_path / "big.tar"
        header = tarfile.TarInfo("big.mp4")
        header.size = size
        with tarfile.open(path, "w") as tar:
            add_sample(tar, "good")
        content = path.read_bytes().rstrip(b"\0")
        content += bytes(-len(content) % 512)
        path.write_bytes(content + header.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
        rows, problems = scan(path)
        assert [row.key for row in rows] == ["good"]
        assert [(problem.key, problem.reason) for problem in problems] == [
            ("big", "member too large"),
            ("", "truncated tar"),
        ]


def test_a_damaged_header_loses_the_rest_and_says_so(tmp_path):
    shards = write(tmp_path, 4)
    tar = tmp_path / "shard-000000.tar"
    content = bytearray(tar.read_bytes())
    content[shards.row(2).offset] ^= 1
    tar.write_bytes(content)
    rows, problems = scan(tar)
    assert [row.key for row in rows] == ["clip-000", "clip-001"]
    assert [(problem.key, problem.reason) for problem in problems] == [("", "damaged tar header")]


@pytest.mark.timeout(20)
def test_a_header_that_leads_backwards_does_not_loop(tmp_path):
    with tarfile.open(tmp_path / "loop.tar", "w") as tar:
        add_sample(tar, "good")
    content = (tmp_path / "loop.tar").read_bytes()[: 6 * 512]
    header = tarfile.TarInfo("back.mp4")
    for size in (-512, -1024, -(1 << 40)):
        header.size = size
        (tmp_path / "loop.tar").write_bytes(content + header.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
        rows, problems = scan(tmp_path / "loop.tar")
        assert [row.key for row in rows] == ["good"]
        assert problems[-1].reason == "damaged tar header"


def test_random_damage_never_breaks_the_scan(tmp_path):
    write(tmp_path, 4)
    tar = tmp_path / "shard-000000.tar"
    whole = tar.read_bytes()
    generator = random.Random(1)
    for _ in range(300):
        damaged = bytearray(whole)
        header = generator.choice(range(0, 512 * 12, 512))
        for _ in range(generator.randrange(1, 8)):
            damaged[header + generator.randrange(512)] = generator.randrange(256)
        if generator.random() < 0.7:  # make the checksum right again, so that the damage gets through
            block = damaged[header : header + 512]
            block[148:156] = b" " * 8
            damaged[header + 148 : header + 156] = b"%06o\0 " % sum(block)
        tar.write_bytes(damaged)
        rows, _ = scan(tar)
        assert len(rows) <= 4


def test_metadata_of_foreign_tars_comes_from_the_video(tmp_path):
    with tarfile.open(tmp_path / "foreign.tar", "w") as tar:
        for key, about in [("none", None), ("other", b'{"url": "x"}'), ("broken", b"{"), ("wild", b"[" * 100_000)]:
            add(tar, f"{key}.mp4", video_bytes(numbered(9), fps=12))
            add(tar, f"{key}.txt", b"nine frames")
            if about is not None:
                add(tar, f"{key}.json", about)
    rows, problems = scan(tmp_path / "foreign.tar")
    assert problems == []
    assert [(row.key, row.kind, row.frames, row.fps, row.height, row.width) for row in rows] == [
        (key, "video", 9, 12.0, 64, 96) for key in ("none", "other", "broken", "wild")
    ]


def test_what_is_no_data_set(tmp_path):
    with pytest.raises(DataError, match="nowhere: no such directory"):
        ShardSet.open(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no shard"):
        ShardSet.open(tmp_path)
    shards = write(tmp_path, 2, samples_per_shard=1)
    (tmp_path / "shard-000001.tar").rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"shard-000001\.arrow: its tar is missing"):
        ShardSet.open(tmp_path)
    (tmp_path / "elsewhere").rename(tmp_path / "shard-000001.tar")
    index = tmp_path / "shard-000001.arrow"
    content = index.read_bytes()
    index.unlink()
    with pytest.raises(DataError, match=r"shard-000001\.arrow: missing; `megasora index`"):
        ShardSet.open(tmp_path)
    index.write_bytes(content[:100])
    with pytest.raises(DataError, match=r"shard-000001\.arrow: damaged index"):
        ShardSet.open(tmp_path)
    index.write_bytes(content)
    assert ShardSet.open(tmp_path).fingerprint == shards.fingerprint
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    assert index_shard(open_storage(tmp_path), "empty.tar") == {"samples": 0, "problems": {}, "examples": {}}
    assert len(ShardSet.open(tmp_path)) == 2
    for path in tmp_path.glob("shard-*"):
        path.unlink()
    with pytest.raises(DataError, match="no sample in its 1 shards"):
        ShardSet.open(tmp_path)
    (tmp_path / "empty.tar").write_bytes(b"\x1f\x8b" + bytes(3000))
    with pytest.raises(DataError, match=r"no usable sample in 1 tars \(not a plain tar 1\)"):
        index_directory(open_storage(tmp_path), lambda *_: None)


def test_another_process_opens_the_same_shards_or_none(tmp_path):
    shards = write(tmp_path / "shards", 4, samples_per_shard=2)
    pickled = pickle.dumps(shards)
    write(tmp_path / "more", 2)
    for suffix in ("tar", "arrow"):  # between the two that are there
        shutil.copy(tmp_path / "more" / f"shard-000000.{suffix}", tmp_path / "shards" / f"shard-000000-b.{suffix}")
    _opened.cache_clear()
    again = pickle.loads(pickled)
    assert (again.tars, again.fingerprint, again.key(2)) == (shards.tars, shards.fingerprint, "clip-002")
    assert len(ShardSet.open(tmp_path / "shards")) == 6
    shutil.copy(tmp_path / "more" / "shard-000000.arrow", tmp_path / "shards" / "shard-000001.arrow")
    _opened.cache_clear()
    with pytest.raises(DataError, match="shards: its shards were changed"):
        pickle.loads(pickled)


def test_more_shards_than_may_be_mapped_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr("data_pipelines.shards.tars.MAPPED", 3)
    for count, mapped in ((3, 3), (4, 0)):
        shards = write(tmp_path / str(count), count, samples_per_shard=1)
        assert Path("/proc/self/maps").read_text().count(f"{tmp_path}/{count}/shard-") == mapped
        assert [shards.row(i).caption_tokens for i in range(count)] == list(range(count))


def test_an_index_that_cannot_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    write(tmp_path, 2, samples_per_shard=1)

    def refuse(self, name):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(Directory, "mapped", refuse)
    with pytest.raises(DataError, match=r"shard-000000\.arrow: cannot be read \(Cannot allocate memory\)"):
        ShardSet.open(tmp_path)


def test_many_threads_and_few_descriptors(tmp_path, monkeypatch):
    monkeypatch.setattr(Directory, "OPEN_FILES", 2)
    shards = write(tmp_path, 12, samples_per_shard=2)
    wrong: list[int] = []

    def read(seed: int) -> None:
        generator = random.Random(seed)
        for _ in range(150):
            index = generator.randrange(12)
            if shards.read(index)["mp4"] != sample(index)["mp4"]:
                wrong.append(index)

    before = len(list(Path("/proc/self/fd").iterdir()))
    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 2
    again = pickle.loads(pickle.dumps(shards))
    assert again.read(5)["mp4"] == sample(5)["mp4"]


def test_scores_and_variants_are_in_the_index(tmp_path):
    with ShardWriter(tmp_path) as writer:
        writer.write(sample(0, scores={"motion": 0.5, "sharp": 3}, variant=1))
        writer.write(sample(1, scores={"motion": "high", "sharp": float("nan")}, variant=1 << 40))
        writer.write(sample(2, scores=[1]))
    shards = ShardSet.open(tmp_path)
    assert [shards.row(i).scores for i in range(3)] == [{"motion": 0.5, "sharp": 3.0}, {}, {}]
    assert [shards.row(i).variant for i in range(3)] == [1, 0, 0]
    ((motion, variant),) = shards.columns("scores.motion", "variant")
    assert motion[0] == 0.5
    assert list(motion != motion) == [False, True, True]
    assert list(variant) == [1, 0, 0]
