"""Laws of remote shards: the samples of the local ones, whatever the network does, in a cache no crash spoils."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from conftest import REPOSITORY, picture
from remote_kit import FolderServer, environment, s3_server, serving

from data import downloader, remote, transfer
from data.cache import Cache, Full, cache_from_environment, parse_size
from data.dataset import ShardedDataset
from data.errors import DamagedData, UserError
from data.fetcher import Fetcher
from data.inspect import inspect
from data.loader import Loader
from data.transfer import Remote


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of its own for each test, and no downloader left behind."""
    for name, value in environment(tmp_path / "cache").items():
        monkeypatch.setenv(name, value)
    yield tmp_path / "cache"
    downloader.stop_all()
    remote._downloaders.clear()


@pytest.fixture
def served(picture_shards: Path, tmp_path: Path) -> Iterator[FolderServer]:
    """A server whose folder `ds` holds 50 pictures in shards of 7, which a test may damage."""
    shutil.copytree(picture_shards, tmp_path / "www" / "ds")
    with serving(tmp_path / "www") as server:
        yield server


def everything(dataset: ShardedDataset) -> list[tuple[bytes, int]]:
    return [dataset.image(int(identity)) for identity in dataset.all_ids()]


def stream(source: object, **arguments: int) -> list[tuple[int, bytes]]:
    loader = Loader(ShardedDataset(source), batch_size=10, seed=1, canvas=8, **arguments)  # type: ignore[arg-type]
    return [(int(b.ids[i]), b.images[i].numpy().tobytes()) for b in islice(loader, 12) for i in range(len(b))]


def downloads(server: FolderServer) -> int:
    return sum(count for (method, name), count in server.requests.items() if method == "GET" and name.endswith(".tar"))


@pytest.mark.parametrize("ranges", [True, False])
def test_http_gives_what_the_local_files_give(picture_shards: Path, tmp_path: Path, ranges: bool) -> None:
    """Also through workers, and again from the cache without a word to the server."""
    with serving(picture_shards.parent, ranges) as server:
        url = f"{server.url}/{picture_shards.name}"
        assert ShardedDataset(url).fingerprint == ShardedDataset(picture_shards).fingerprint
        assert stream(url, workers=2) == stream(picture_shards)
        assert downloads(server) == 8
        server.fault = lambda method, number, name: "500" if name.endswith((".tar", ".index")) else None
        again = pickle.loads(pickle.dumps(ShardedDataset(url)))
        assert everything(again) == everything(ShardedDataset(picture_shards))
        assert not list((tmp_path / "cache").glob("*.partial"))


def test_braces_lists_folders_and_globs_of_foreign_tars(served: FolderServer, tmp_path: Path) -> None:
    (tmp_path / "www" / "tars").mkdir()
    for number in range(3):
        shutil.copy(tmp_path / "www" / "ds" / f"shard-{number:06d}.tar", tmp_path / "www" / "tars")
    url = f"{served.url}/tars"
    names = [f"{url}/shard-{number:06d}.tar" for number in range(3)]
    local = ShardedDataset(tmp_path / "www" / "tars")
    for source in (f"{url}/shard-{{000000..000002}}.tar", names, url, f"{url}/", f"{url}/*.tar"):
        found = ShardedDataset(source)
        assert found.fingerprint == local.fingerprint
        assert everything(found) == everything(local)
    assert downloads(served) == 3  # indexed once, kept
    with pytest.raises(UserError, match="some of the shards lie here and some elsewhere"):
        ShardedDataset([names[0], tmp_path / "www" / "tars" / "shard-000001.tar"])
    with pytest.raises(UserError, match=r"ds is a whole dataset"):
        ShardedDataset([f"{served.url}/ds"])
    (tmp_path / "www" / "none").mkdir()
    with pytest.raises(UserError, match=r"none holds neither"):
        ShardedDataset(f"{served.url}/none")


FAULTS = ["503", "reset", "short", "slow"]


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("kind", FAULTS)
def test_what_the_network_spoils_is_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, ranges: bool
) -> None:
    """Every second request of a download in many pieces goes wrong."""
    monkeypatch.setattr(transfer, "PIECE", 10_000)
    payload = np.random.default_rng(0).bytes(35_000)
    (tmp_path / "www").mkdir()
    (tmp_path / "www" / "file").write_bytes(payload)
    with serving(tmp_path / "www", ranges) as server:
        server.fault = lambda method, number, name: kind if number % 2 else None
        fetcher = Fetcher(cache_from_environment())
        (found,) = fetcher.look_up([f"{server.url}/file"])
        fetcher.fetch(found)
        assert fetcher.cache.path(found.key).read_bytes() == payload
        assert server.requests["GET", "file"] >= (4 if ranges else 2)


def test_what_stays_broken_is_one_sentence(served: FolderServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADWATER_PATIENCE", "0.5")
    url = f"{served.url}/ds"
    dataset = ShardedDataset(url)
    for fault, error, message in (
        ("503", UserError, r"shard-000000\.index could not be fetched within 0 s .HEADWATER_PATIENCE.: 503"),
        ("reset", UserError, r"could not be fetched within"),
        ("403", UserError, r"may not be read .HTTP 403.; check your credentials"),
    ):
        served.fault = lambda method, number, name, fault=fault: fault  # type: ignore[misc]
        began = time.monotonic()
        with pytest.raises(error, match=message) as caught:
            dataset.image(0)
        assert not isinstance(caught.value, DamagedData)  # an outage is no damage: no sample is replaced for it
        assert time.monotonic() - began < 10
    served.fault = lambda method, number, name: None
    for source, message in (
        (f"{served.url}/gone.tar", r"gone\.tar does not exist"),
        (f"{served.url}/gone", "could not be fetched|does not exist|holds neither"),
        ("nosuch://bucket/x.tar", "of a kind that fsspec does not read"),
    ):
        with pytest.raises(UserError, match=message):
            ShardedDataset(source)


def test_a_remote_shard_that_is_missing_or_another_is_damage(served: FolderServer, tmp_path: Path) -> None:
    folder = tmp_path / "www" / "ds"
    (folder / "shard-000001.tar").unlink()
    shutil.copy(folder / "shard-000003.tar", folder / "shard-000002.tar")
    raw = bytearray((folder / "shard-000004.tar").read_bytes())
    raw[700] ^= 1
    (folder / "shard-000004.tar").write_bytes(raw)
    dataset = ShardedDataset(f"{served.url}/ds")
    for identity, message in ((7, "does not exist"), (14, "bytes"), (28, "does not hold the bytes that its manifest")):
        with pytest.raises(DamagedData, match=message):
            dataset.image(identity)
    problems = inspect(f"{served.url}/ds")["problems"]
    assert {number for number in range(8) if any(f"shard-00000{number}.tar" in each for each in problems)} == {1, 2, 4}
    loader = Loader(ShardedDataset(f"{served.url}/ds", tolerance=40), batch_size=25, canvas=8)
    ids = {int(i) for batch in islice(loader, 2) for i in batch.ids}
    assert loader.damaged == 21
    assert not ids & {*range(7, 21), *range(28, 35)}


def test_a_foreign_tar_that_changes_is_not_mixed_up(served: FolderServer, tmp_path: Path) -> None:
    tar = tmp_path / "www" / "ds" / "shard-000000.tar"
    dataset = ShardedDataset([f"{served.url}/ds/shard-000000.tar"])
    shutil.copy(tar.with_name("shard-000001.tar"), tar)
    before = everything(dataset)  # still the cached one, whole
    assert [payload for payload, _ in before] == [picture(n, 5 + n % 4, 5 + n % 3) for n in range(7)]
    for path in (tmp_path / "cache").iterdir():
        if path.is_file():
            path.unlink()
    with pytest.raises(DamagedData, match="has changed since it was indexed"):
        everything(pickle.loads(pickle.dumps(dataset)))


def test_the_next_shards_come_before_they_are_asked_for(served: FolderServer) -> None:
    dataset = ShardedDataset(f"{served.url}/ds")
    dataset.storage.ahead([5, 2])
    until = time.monotonic() + 10
    while downloads(served) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    assert served.requests["GET", "ds/shard-000005.tar"] == served.requests["GET", "ds/shard-000002.tar"] == 1
    assert downloads(served) == 2
    dataset.image(35)
    assert downloads(served) == 2


def read_all(url: str, results: Any) -> None:
    dataset = ShardedDataset(url)
    results.put(sum(len(dataset.image(number)[0]) for number in range(50)))
    downloader.stop_all()


def test_processes_of_one_machine_download_once(served: FolderServer) -> None:
    served.fault = lambda method, number, name: "slow"
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    both = [context.Process(target=read_all, args=(f"{served.url}/ds", results)) for _ in range(2)]
    for process in both:
        process.start()
    assert len({results.get(timeout=60) for _ in both}) == 1
    for process in both:
        process.join(10)
    assert downloads(served) == 8


def replace_and_wait(url: str, results: Any) -> None:
    dataset = ShardedDataset(url)
    ((address, first),) = downloader._processes.items()
    first.kill()
    first.wait()
    dataset.image(0)
    results.put((address, first.pid, downloader._processes[address].pid))
    time.sleep(60)


def test_a_killed_downloader_is_replaced_and_ends_with_its_reader(served: FolderServer) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    reader = context.Process(target=replace_and_wait, args=(f"{served.url}/ds", results))
    reader.start()
    address, first, second = results.get(timeout=60)
    assert first != second
    assert Path(address).exists()
    reader.kill()
    until = time.monotonic() + 10
    while Path(address).parent.exists() and time.monotonic() < until:
        time.sleep(0.02)
    assert not Path(address).parent.exists()  # what the downloader does last, before it ends
    reader.join(10)


def test_s3(picture_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real S3 server, the settings by environment alone; ours, foreign tars, text with its tokenizer."""
    with s3_server() as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
        store = fsspec.filesystem("s3", endpoint_url=endpoint, skip_instance_cache=True)
        store.mkdir("bucket")
        for path in picture_shards.iterdir():
            store.put_file(str(path), f"bucket/deep/ds/{path.name}")
        assert stream("s3://bucket/deep/ds", workers=1) == stream(picture_shards)
        tars = [shutil.copy(tar, tmp_path) for tar in sorted(picture_shards.glob("*.tar"))]
        assert ShardedDataset("s3://bucket/deep/ds/*.tar").fingerprint == ShardedDataset(tars).fingerprint
        assert len(ShardedDataset("s3://bucket/deep/ds/shard-00000{0,2}.tar")) == 14
        for source in ("s3://bucket/none.tar", "s3://nobucket/none.tar"):
            with pytest.raises(UserError, match=r"none\.tar does not exist"):
                ShardedDataset(source)


def test_text_with_its_tokenizer_and_held_out_documents(sentences: Path) -> None:
    with serving(sentences.parent) as server:
        far = ShardedDataset(f"{server.url}/{sentences.name}", context=32)
        near = ShardedDataset(sentences, context=32)
        assert [far.row(n).tolist() for n in range(20)] == [near.row(n).tolist() for n in range(20)]
        assert (far.folder / "tokenizer.json").read_bytes() == (sentences / "tokenizer.json").read_bytes()
        if (sentences / "validation").exists():
            held = ShardedDataset(far.folder / "validation", context=8)
            assert held.fingerprint == ShardedDataset(sentences / "validation", context=8).fingerprint
            assert held.row(0).tolist() == ShardedDataset(sentences / "validation", context=8).row(0).tolist()


def test_memory(picture_shards: Path) -> None:
    store = fsspec.filesystem("memory")
    for path in picture_shards.iterdir():
        store.pipe_file(f"/ds/{path.name}", path.read_bytes())
    assert stream("memory://ds") == stream(picture_shards)
    assert len(ShardedDataset("memory://ds/shard-00000{0..1}.tar")) == 14
    store.rm("/ds", recursive=True)


def put(cache: Cache, number: int, size: int, **arguments: bool) -> str:
    key = f"{number:040x}"
    with cache.writing(key, size, **arguments) as descriptor:
        assert descriptor is not None
        os.pwrite(descriptor, bytes([number % 256]) * size, 0)
    return key


def test_the_cache_is_bounded_and_lets_go_of_what_was_used_longest_ago(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "c", 1000)
    keys = []
    for number in range(10):
        keys.append(put(cache, number, 100))
        time.sleep(0.002)
    os.close(cache.open(keys[0]) or 0)  # used: now the newest
    put(cache, 10, 250)
    assert [cache.path(key).exists() for key in keys] == [True] + [False] * 3 + [True] * 6
    assert cache.used() == 950
    held = [cache.open(key) for key in keys[4:]]
    put(cache, 11, 400)  # the two that nobody holds
    assert all(cache.path(key).exists() for key in keys[4:])
    assert cache.used() == 1000
    with pytest.raises(Full):
        put(cache, 12, 600)
    assert cache.used() <= 1000
    os.close(held[0] or 0)
    put(cache, 13, 100)
    assert not cache.path(keys[4]).exists()
    with pytest.raises(Full):
        put(cache, 14, 1001)


def test_downloads_count_from_their_beginning_and_leave_nothing_when_they_fail(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "c", 1000)
    with cache.writing("a" * 40, 600) as descriptor:
        assert descriptor is not None
        assert cache.used() == 600
        with cache.writing("a" * 40, 600) as second:
            assert second is None  # somebody is on it
        with pytest.raises(Full), cache.writing("b" * 40, 600):
            pass
    with pytest.raises(RuntimeError), cache.writing("c" * 40, 100):
        raise RuntimeError
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["a" * 40, "lock"]


def test_a_killed_download_leaves_only_what_the_next_process_clears(tmp_path: Path) -> None:
    script = """
        import sys, time
        from pathlib import Path
        from data.cache import Cache
        with Cache(Path(sys.argv[1]), 1000).writing("d" * 40, 600):
            print("inside", flush=True)
            time.sleep(60)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "c")]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "inside\n"
        cache = Cache(tmp_path / "c", 1000)
        cache.clear_leftovers()
        assert cache.used() == 600  # its writer lives
        process.send_signal(signal.SIGKILL)
    cache.clear_leftovers()
    assert cache.used() == 0
    put(cache, 13, 900)


def test_a_reader_holds_its_file_until_it_closes_it(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "c", 1000)
    key = put(cache, 1, 900)
    descriptor = cache.open(key)
    assert descriptor is not None
    with pytest.raises(BlockingIOError), open(cache.path(key), "rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with pytest.raises(Full):
        put(cache, 2, 900)
    os.close(descriptor)
    put(cache, 2, 900)
    assert cache.open(key) is None


def test_a_small_cache_is_enough_for_reading_and_too_small_a_one_is_named(
    served: FolderServer, picture_shards: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Five shards of eight fit, the bound holds all the while, and every sample comes."""
    largest = max(path.stat().st_size for path in picture_shards.glob("*.tar"))
    monkeypatch.setenv("HEADWATER_CACHE_SIZE", str(5 * largest))
    dataset, seen = ShardedDataset(f"{served.url}/ds"), []
    for identity in range(50):
        seen.append(dataset.image(identity))
        assert Cache(tmp_path / "cache", 0).used() <= 5 * largest
    assert seen == everything(ShardedDataset(picture_shards))
    monkeypatch.setenv("HEADWATER_CACHE_SIZE", str(3 * largest))
    with pytest.raises(UserError, match=r"more than the .* of the cache; set data\.shuffle_samples=\d+ or"):
        stream(f"{served.url}/ds")
    monkeypatch.setenv("HEADWATER_CACHE_SIZE", str(largest))
    with pytest.raises(UserError, match="too few for shards of"):
        ShardedDataset(f"{served.url}/ds")


@pytest.mark.parametrize(
    ("text", "size"), [("1000", 1000), ("2K", 2048), ("1.5G", 3 * 2**29), ("200GB", 200 * 2**30), ("1 TiB", 2**40)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "much", "-1", "1X", "0"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match="is no size"):
        parse_size(text)


def test_names_from_elsewhere_never_become_paths() -> None:
    evil = Remote("https://host/../../etc/passwd\n../x.tar", 5, "../../v", "")
    assert len(evil.key) == 40
    assert set(evil.key) <= set("0123456789abcdef")
    with pytest.raises(AssertionError):
        Cache(Path("/tmp"), 1).path("../x")
