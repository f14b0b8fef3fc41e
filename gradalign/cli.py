"""The command line: ``gradalign train | score | evaluate | conflicts | augment | corpus | report | info``.

Every command is a thin shell over one library function, which is imported when the command runs, so that ``--help`` is
instant. Errors a user can mend are one line, ``gradalign: error: ...``, with exit code 2 (the command cannot be
understood or its input is wrong) or 1 (it failed underway); ``GRADALIGN_DEBUG=1`` shows the traceback too.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line that names what to read next."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"gradalign: error: {message} (see `{self.prog} --help`)\n")


class _Resumable(KeyboardInterrupt):
    """Ctrl-C in a command that can go on later; the argument says how."""


# ---- handlers ------------------------------------------------------------------------------------------------------


def _evaluate(args: argparse.Namespace) -> int:
    from gradalign import evaluation

    rates: tuple[float, float, float] | None = args.asv_rates
    if args.asv_scores is not None:
        rates = evaluation.asv_rates_at_eer(evaluation.read_asv_scores(args.asv_scores))
    scores = evaluation.read_scores(args.scores, args.protocol)
    rows = evaluation.evaluate(scores, by=args.by, asv_rates=rates, tdcf_version=args.tdcf)
    if args.format == "json":
        print(evaluation.format_json(rows), end="")
    elif args.format == "csv":
        print(evaluation.format_csv(rows), end="")
    else:
        print(evaluation.format_table(rows))
        print(
            "\nEER: equal error rate. min/act DCF: detection cost at the best and at the Bayes threshold "
            "(P_spoof 0.05, C_miss 1, C_fa 10).\nact DCF and Cllr read the scores as log-likelihood ratios."
        )
        if rates is not None:
            print(f"min t-DCF {args.tdcf}: ASV p_fa {rates[0]:.4f}, p_miss {rates[1]:.4f}, p_fa_spoof {rates[2]:.4f}.")
    return 0


def _augment(args: argparse.Namespace) -> int:
    from gradalign import augmentation

    planned = augmentation.plan(args.source, args.target)
    try:
        result = augmentation.augment_files(
            planned,
            algo=args.algo,
            seed=args.seed,
            overwrite=args.overwrite,
            skip_existing=args.skip_existing,
            skip_bad=args.skip_bad,
        )
    except KeyboardInterrupt:
        raise _Resumable("files written so far are complete; --skip-existing goes on from here") from None
    print(f"{result.written} files written to {args.target} (RawBoost algorithm {args.algo}, seed {args.seed})")
    if result.kept:
        print(f"{result.kept} were there already and kept")
    if result.scaled:
        print(f"{result.scaled} were scaled down to full scale, which their sample format cannot exceed")
    if result.skipped:
        print(f"{len(result.skipped)} skipped:")
        for _, reason in result.skipped:
            print(f"  {reason}")
    return 0


def _report(args: argparse.Namespace) -> int:
    from gradalign import report

    path = report.write_report(args.runs)
    print(report.text_summary(args.runs))
    print(f"report: {path}")
    return 0


def _corpus_build(args: argparse.Namespace) -> int:
    from gradalign.corpus import build_corpus

    try:
        build_corpus(args.directory, profile=args.profile)
    except KeyboardInterrupt:
        raise _Resumable("the same command goes on from here") from None
    return 0


def _info(args: argparse.Namespace) -> int:
    from gradalign import info

    print(info.report())
    return 0


# ---- arguments -----------------------------------------------------------------------------------------------------


def _rates(text: str) -> tuple[float, float, float]:
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) != 3 or not all(0 <= v <= 1 for v in values):
        raise argparse.ArgumentTypeError(f"expected p_fa,p_miss,p_fa_spoof in [0, 1]; found {text!r}")
    return values[0], values[1], values[2]


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], about: str, example: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=about,
        description=about[0].upper() + about[1:] + ".",
        epilog=f"example:\n{example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def build_parser() -> argparse.ArgumentParser:
    """The whole command line as one argparse parser."""
    parser = _Parser(
        prog="gradalign",
        description="Gradient alignment and RawBoost augmentation for speech-deepfake detectors.",
        epilog="Each command's --help shows an example. GRADALIGN_DEBUG=1 shows tracebacks.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    evaluate = _command(
        commands,
        "evaluate",
        _evaluate,
        "error rates of a score file: EER, DCF, Cllr, t-DCF",
        "  gradalign evaluate runs/pcgrad-seed0/scores_test.txt --by attack",
    )
    evaluate.add_argument("scores", type=Path, help="lines `utterance attack label score`; higher is more bona fide")
    evaluate.add_argument("--protocol", type=Path, help="labels from `speaker utterance - attack label` lines")
    asv = evaluate.add_mutually_exclusive_group()
    asv.add_argument("--asv-scores", type=Path, metavar="FILE", help="speaker verification scores, for the min t-DCF")
    asv.add_argument("--asv-rates", type=_rates, metavar="P_FA,P_MISS,P_FA_SPOOF", help="or its error rates")
    evaluate.add_argument("--tdcf", choices=["2019", "2021"], default="2021", help="t-DCF definition (default: 2021)")
    evaluate.add_argument("--by", choices=["attack"], help="one more row for each attack")
    form = evaluate.add_mutually_exclusive_group()
    form.add_argument("--json", dest="format", action="store_const", const="json", help="print JSON, every digit")
    form.add_argument("--csv", dest="format", action="store_const", const="csv", help="print CSV, every digit")

    augment = _command(
        commands,
        "augment",
        _augment,
        "RawBoost over audio files: a FLAC or WAV file, or every one in a folder",
        "  gradalign augment data/flac augmented/flac --algo 4 --seed 0",
    )
    augment.add_argument("source", type=Path, metavar="IN", help="a file or a folder")
    augment.add_argument("target", type=Path, metavar="OUT", help="a file or a folder; relative paths are kept")
    augment.add_argument("--algo", type=int, choices=range(9), default=4, help="RawBoost algorithm (default: 4)")
    augment.add_argument("--seed", type=int, default=0, help="each file's draws follow from this and its path")
    existing = augment.add_mutually_exclusive_group()
    existing.add_argument("--overwrite", action="store_true", help="replace outputs that are there")
    existing.add_argument("--skip-existing", action="store_true", help="keep outputs that are there, write the rest")
    augment.add_argument("--skip-bad", action="store_true", help="list unreadable files at the end and go on")

    corpus = _command(
        commands, "corpus", _corpus_build, "assemble or check the small real corpus", "  gradalign corpus build data"
    )
    actions = corpus.add_subparsers(dest="action", metavar="ACTION", required=True)
    build = _command(
        actions,
        "build",
        _corpus_build,
        "download packages of real and synthetic speech and make a small corpus of them",
        "  gradalign corpus build data --profile default",
    )
    build.add_argument("directory", type=Path, metavar="DIR", help="made if it is not there; resumed if it is")
    build.add_argument("--profile", choices=["default", "full"], default="default", help="how much (default: default)")

    report = _command(
        commands,
        "report",
        _report,
        "write report.html, report.png and summary.json over all runs of a folder",
        "  gradalign report runs",
    )
    report.add_argument("runs", type=Path, metavar="RUNS", help="the folder given to `gradalign train --out`")

    _command(commands, "info", _info, "versions, build facts and the backend that serves each op", "  gradalign info")
    return parser


# ---- entry ---------------------------------------------------------------------------------------------------------


def _fail(message: str, code: int) -> int:
    if os.environ.get("GRADALIGN_DEBUG") == "1":
        traceback.print_exc()
    print(f"gradalign: error: {' '.join(message.split())}", file=sys.stderr)
    return code


def _os_error(error: OSError) -> str:
    if error.strerror is None or error.filename is None:
        return str(error)
    return f"{error.filename}: {error.strerror}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 1 (failed), 2 (wrong command or input) or 130 (interrupted)."""
    try:
        args = build_parser().parse_args(argv)
    except SystemExit as stop:
        return int(stop.code or 0)
    try:
        return int(args.run(args))
    except KeyboardInterrupt as stop:
        print(f"gradalign: interrupted{f'; {stop}' if str(stop) else ''}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of a pipe went away (`| head`): Python would complain again when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ImportError as error:
        return _fail(f"{error}. Optional packages come with `pip install 'gradalign[train]'`", 1)
    except OSError as error:
        return _fail(_os_error(error), 2 if isinstance(error, (FileNotFoundError, FileExistsError)) else 1)
    except (ValueError, TypeError) as error:
        return _fail(str(error), 2)
    except Exception as error:
        return _fail(f"{type(error).__name__}: {error} (GRADALIGN_DEBUG=1 shows where)", 1)


if __name__ == "__main__":
    sys.exit(main())
