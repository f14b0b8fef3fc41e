"""RawBoost over audio files and folders: what ``gradalign augment`` does."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from gradalign._errors import AudioError
from gradalign._files import expect_folder_or_nothing, remove_leftovers_of

SUFFIXES = (".flac", ".wav")
"""Audio files that are augmented; the output keeps the input's format."""


@dataclass
class AugmentResult:
    """What `augment_files` did: files written, kept (already there), skipped with their reason, and scaled down."""

    written: int = 0
    kept: int = 0
    scaled: int = 0
    skipped: list[tuple[Path, str]] = field(default_factory=list)


def file_seed(name: str, seed: int) -> int:
    """The RawBoost seed of a file, from its relative path and the run's seed: the same in any order and any subset.

    Returns a value in [0, 2^63).

    >>> file_seed("speaker/a.flac", 0) == file_seed("speaker/a.flac", 0) != file_seed("speaker/a.flac", 1)
    True
    """
    # A file's name need not be UTF-8.
    digest = hashlib.blake2b(f"{seed}:{name}".encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def plan(source: Path, target: Path) -> list[tuple[str, Path, Path]]:
    """The ``(relative name, input, output)`` of every audio file under ``source``, sorted by name.

    ``source`` is a file or a folder; for a file, ``target`` is the output file, or an existing folder to write it into.
    Hidden files, and those below ``target``, are no inputs. Raises FileNotFoundError when there is no audio,
    ValueError for an output of another format, NotADirectoryError where a folder's output would be a file.
    """
    from gradalign.data.audio import list_audio

    if source.is_file():
        if source.suffix.lower() not in SUFFIXES:
            raise AudioError(f"{source}: expected a file ending in {' or '.join(SUFFIXES)}; found {source.suffix!r}")
        output = target / source.name if target.is_dir() else target
        if output.suffix.lower() != source.suffix.lower():
            raise ValueError(
                f"{output}: the output keeps the input's format; expected {source.suffix!r}, found {output.suffix!r}"
            )
        return [(source.name, source, output)]
    if not source.is_dir():
        raise FileNotFoundError(f"{source}: expected an audio file or a folder; found nothing there")
    expect_folder_or_nothing(target)
    inside = target.resolve()
    same = inside == source.resolve()
    files = [path for path in list_audio(source, SUFFIXES) if same or inside not in path.resolve().parents]
    if not files:
        raise FileNotFoundError(f"{source}: expected files ending in {' or '.join(SUFFIXES)}; found none")
    names = [path.relative_to(source) for path in files]
    return [(name.as_posix(), path, target / name) for name, path in zip(names, files, strict=True)]


def augment_file(source: Path, target: Path, *, algo: int, seed: int) -> bool:
    """Write RawBoost of one file to another, atomically; returns whether it was scaled down to full scale.

    Sample rate, channels, format and sample width are the input's. Each channel gets the same draws. Bands above
    the file's Nyquist frequency are not drawn. Raises AudioError naming the file, and writes nothing, when it cannot be
    read, holds no samples or values that are not finite, has a sample rate below 40 Hz (RawBoost's bands begin at 20
    Hz), or when the result is not finite.
    """
    import numpy as np
    import torch

    from gradalign.data.audio import opened, read_channels, write_audio
    from gradalign.rawboost import RawBoost, RawBoostConfig

    with opened(source) as file:
        wave, rate, form, subtype = read_channels(source, file), file.samplerate, file.format, file.subtype
    if not np.isfinite(wave).all():
        raise AudioError(f"{source}: expected finite samples; found NaN or Inf")
    least = 2 * RawBoostConfig.min_f
    if rate < least:
        raise AudioError(f"{source}: expected a sample rate of at least {least:g} Hz; found {rate} Hz")
    boost = RawBoost(algo=algo, sample_rate=rate, max_f=min(8000, rate / 2))
    seeds = torch.full((wave.shape[1],), seed, dtype=torch.int64)
    boosted = boost(torch.from_numpy(np.ascontiguousarray(wave.T)), seeds=seeds).numpy().T
    peak = float(np.abs(boosted).max())
    if not np.isfinite(peak):
        loudest = float(np.abs(wave).max())
        raise AudioError(f"{source}: expected a finite result; found NaN or Inf (samples up to {loudest:.3g} going in)")
    scaled = peak > 1 and subtype not in ("FLOAT", "DOUBLE")
    if scaled:
        # The noise of algorithms 3, 4, 6 and 7 is added after the last normalisation: integer formats would clip it.
        boosted = boosted / peak
    target.parent.mkdir(parents=True, exist_ok=True)
    write_audio(target, boosted, rate, form, subtype)
    return scaled


def augment_files(
    files: Iterable[tuple[str, Path, Path]],
    *,
    algo: int = 4,
    seed: int = 0,
    overwrite: bool = False,
    skip_existing: bool = False,
    skip_bad: bool = False,
) -> AugmentResult:
    """Augment every ``(name, input, output)`` of `plan`; the seed of each follows from its name.

    Existing outputs raise FileExistsError before anything is written, unless ``overwrite`` or ``skip_existing``; an
    output that would replace an input is a ValueError always. With ``skip_bad``, files that cannot be augmented
    are listed in the result instead of raising AudioError. What killed runs left of the same outputs an hour ago or
    earlier is removed.
    """
    planned = list(files)
    existing = [output for _, _, output in planned if output.exists()]
    # Links are followed: to any of the inputs.
    inputs = {source.resolve() for _, source, _ in planned}
    for output in existing:
        if output.resolve() in inputs:
            raise ValueError(
                f"{output}: expected another file than the inputs; found one of them, which it would replace"
            )
    if existing and not (overwrite or skip_existing):
        raise FileExistsError(
            f"{existing[0]}: already there ({len(existing)} of {len(planned)} outputs); "
            "--overwrite replaces them, --skip-existing keeps them and writes the rest"
        )
    from tqdm import tqdm

    remove_leftovers_of(output for _, _, output in planned)
    result = AugmentResult()
    for name, source, target in tqdm(planned, unit="file", desc="augment", disable=None, mininterval=0.5):
        if skip_existing and target.exists():
            result.kept += 1
            continue
        try:
            result.scaled += augment_file(source, target, algo=algo, seed=file_seed(name, seed))
            result.written += 1
        except AudioError as error:
            if not skip_bad:
                raise
            result.skipped.append((source, str(error)))
    return result
