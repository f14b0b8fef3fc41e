"""The command line: ``gradalign train | score | evaluate | fuse | table | conflicts | augment | corpus | data | pack |
report | bench | info``.

Every command is a thin shell over one library function, which is imported when the command runs: each loads only the
packages it needs. Errors a user can mend are one line, ``gradalign: error: ...``, with exit code 2 (the command cannot
be understood or its input is wrong) or 1 (it failed underway); ``GRADALIGN_DEBUG=1`` shows the traceback too.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import traceback
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from gradalign._files import expect_file_or_nothing, expect_folder, expect_folder_or_nothing, own_output
from gradalign.data import datasets

if TYPE_CHECKING:
    from gradalign.data.packed import PackedDataset
    from gradalign.data.protocol import Utterance


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line that names what to read next."""

    def error(self, message: str) -> NoReturn:
        """Print the line and exit with code 2."""
        self.exit(2, f"{self.prog.split()[0]}: error: {message} (see `{self.prog} --help`)\n")


class _Resumable(KeyboardInterrupt):
    """Ctrl-C in a command that can go on later; the argument says how."""


# ---- arguments ------------------------------------------------------------------------------------------------------

_DATA_SETS = " or ".join(", ".join(datasets.names()).rsplit(", ", 1))


def _rates(text: str) -> tuple[float, float, float]:
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) != 3 or not all(0 <= v <= 1 for v in values):
        raise argparse.ArgumentTypeError(f"expected p_fa,p_miss,p_fa_spoof in [0, 1]; found {text!r}")
    return values[0], values[1], values[2]


def _names(text: str) -> list[str]:
    names = [part.strip() for part in text.split(",")]
    if not all(names) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"expected different names joined by commas; found {text!r}")
    return names


def _methods(text: str) -> list[str]:
    from gradalign.config import METHODS

    names = _names(text)
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise argparse.ArgumentTypeError(f"expected methods among {', '.join(METHODS)}; found {unknown[0]!r}")
    return names


def _whole(least: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}; found {text!r}")
        return value

    return read


_count_or_0, _count, _samples = _whole(0), _whole(1), _whole(2)


def _target(expect: Callable[[str], None]) -> Callable[[str], str]:
    """A path to write, looked at before the command begins: what fails at its end has cost hours."""

    def read(text: str) -> str:
        try:
            expect(text)
        except OSError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        return text

    return read


_file, _name, _folder = map(_target, (expect_file_or_nothing, expect_folder, expect_folder_or_nothing))


def _seeds(text: str) -> list[int]:
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        seeds = []
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise argparse.ArgumentTypeError(f"expected different whole numbers >= 0 joined by commas; found {text!r}")
    return seeds


def _weights(text: str) -> tuple[float, float]:
    try:
        spoof, bonafide = (float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected SPOOF,BONAFIDE as two numbers; found {text!r}") from None
    return spoof, bonafide


def _options(text: str) -> dict[str, Any]:
    """``a=1,b=x`` as a dict; values are JSON where they can be, else strings."""
    options: dict[str, Any] = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        if not name or not equals:
            raise argparse.ArgumentTypeError(f"expected NAME=VALUE pairs joined by commas; found {text!r}")
        try:
            options[name] = json.loads(value)
        except json.JSONDecodeError:
            options[name] = value
    return options


# One flag for each setting of TrainConfig that is not given in another way: name, type, placeholder or choices, help.
# Their defaults are the configuration's own; a flag that is not given leaves what a file says.
_SETTINGS: tuple[tuple[str, Any, Any, str], ...] = (
    ("dataset", str, "NAME", _DATA_SETS),
    ("train_protocol", str, "FILE", "training protocol, when the data are no folder in corpus layout"),
    ("dev_protocol", str, "FILE", "dev protocol"),
    ("test_protocol", str, "FILE", "test protocol (may be missing)"),
    ("train_audio", str, "DIR", "folder of the training audio, files named by utterance"),
    ("dev_audio", str, "DIR", "folder of the dev audio"),
    ("test_audio", str, "DIR", "folder of the test audio"),
    ("align_options", _options, "NAME=VALUE,...", "of the method, such as c=0.5 for cagrad"),
    (
        "path",
        str,
        ["split", "joint"],
        "the views one after the other (less work and memory), or in one batch as published",
    ),
    ("scope", str, ["model", "parameter"], "one Gram matrix, or one for each parameter tensor"),
    ("detector", str, "NAME", "aasist, aasist-l, light, ..."),
    ("detector_options", _options, "NAME=VALUE,...", "of the detector"),
    ("algo", int, range(9), "RawBoost algorithm of the augmented view"),
    ("views", _names, "VIEW,...", "what the paths see: clean, rawboost, rawboost:ALGO, module:function"),
    ("rawboost", _options, "NAME=VALUE,...", "further RawBoost parameters, such as snr_min=15"),
    ("sample_rate", int, "HZ", "of the detector's input"),
    ("resample", bool, "", "convert audio of another sample rate instead of stopping at it"),
    ("num_samples", int, "N", "length of the detector's input: longer audio is cropped, shorter repeated"),
    ("crop", str, ["random", "start"], "where longer training audio is cropped"),
    ("batch_size", int, "N", "utterances in a step, each seen in both views"),
    ("accumulate", int, "N", "parts in which a step's batch goes through the detector, to save memory"),
    ("epochs", int, "N", "at most this many"),
    ("patience", int, "N", "stop after this many epochs without a lower dev loss; 0: never"),
    ("average_best", int, "N", "score with the mean weights of the N best epochs"),
    ("optimizer", str, ["adam", "adamw", "sgd"], "that takes the merged gradient"),
    ("lr", float, "RATE", "learning rate"),
    ("weight_decay", float, "RATE", "of the optimizer"),
    ("class_weights", _weights, "SPOOF,BONAFIDE", "of the cross-entropy"),
    ("amp", str, ["off", "bf16", "fp16"], "type of the forward pass under autocast"),
    ("shard", bool, "", "under torchrun, share the detector out over the processes too (FSDP2)"),
    ("compile", bool, "", "compile the detector with torch.compile"),
    ("device", str, "NAME", "as PyTorch names it, or auto"),
    ("threads", int, "N", "CPU threads of each run; 0: PyTorch's choice"),
    ("num_workers", int, "N", "processes that read audio ahead"),
    ("cache_mb", int, "MB", "memory for decoded audio"),
    ("checkpoint_steps", int, "N", "checkpoint within epochs too, every N steps; 0: at their ends"),
    ("tensorboard", bool, "", "write the metrics for TensorBoard too"),
    ("skip_bad", bool, "", "leave out and list audio that cannot be read instead of stopping"),
)
# Those of them that `gradalign conflicts` takes.
_MEASURED = ("detector", "algo", "batch_size", "lr", "num_samples", "device")


def _add_settings(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("settings", "Each overrides --config.")
    for name, kind, values, about in _SETTINGS:
        _add_setting(group, name, kind, values, about)


def _add_setting(parser: Any, name: str, kind: Any, values: Any, about: str) -> None:
    from gradalign.config import TrainConfig

    flag, default = "--" + name.replace("_", "-"), getattr(TrainConfig(), name)
    if isinstance(default, (list, tuple)):
        default = ",".join(map(str, default))
    if isinstance(default, (str, int, float)) and not isinstance(default, bool):
        about += f" (default: {default})"
    if kind is bool:
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=about)
    elif isinstance(values, str):
        parser.add_argument(flag, type=kind, metavar=values, help=about)
    else:
        parser.add_argument(flag, type=kind, choices=values, help=about)


def _add_labels(parser: argparse.ArgumentParser) -> None:
    labels = parser.add_mutually_exclusive_group()
    labels.add_argument(
        "--protocol", type=Path, metavar="FILE", help="labels from `speaker utterance - attack label` lines"
    )
    labels.add_argument("--dataset", metavar="NAME", help=f"labels, codecs and speakers of {_DATA_SETS}")
    parser.add_argument("--root", type=Path, metavar="DIR", help="the data set's folder, or a packed one")
    parser.add_argument(
        "--subset",
        default="test",
        metavar="S",
        help="of the data set (default: test); scores of ASVspoof 2021's other phases are left out",
    )


def _add_format(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--format",
        choices=["2019", "2021", "5"],
        default="2019",
        help="score file as of ASVspoof 2019 (with attack and label, the default), 2021 or 5",
    )


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
    # The parser too: what is left over is an error of the command's own.
    parser.set_defaults(run=run, parser=parser)
    return parser


# ---- commands ------------------------------------------------------------------------------------------------------


def _train_command(commands: Any) -> None:
    train = _command(
        commands,
        "train",
        _train,
        "train a detector on clean and RawBoost-augmented speech, once for each method and seed",
        "  gradalign train data --out runs --detector light --align none,pcgrad --seeds 0,1,2 --jobs 2\n"
        "  gradalign train configs/paper/xlsr_aasist.yaml align=gradvac data.root=/data/LA \\\n"
        "    detector_options.frontend.weights=/data/xlsr2_300m.pt\n"
        "  torchrun --nproc_per_node=4 -m gradalign train configs/paper/xlsr_aasist.yaml data.root=/data/LA \\\n"
        "    detector_options.frontend.weights=/data/xlsr2_300m.pt\n\n"
        "The default, AASIST and 24 utterances of 4 s in a step, takes more than 22 GB of memory on a CPU, and over\n"
        "a minute a step. On a small machine: --detector light; a smaller --batch-size; or --accumulate 8, which\n"
        "takes a step's batch in 8 parts, one after the other.\n\n"
        "Run the same command again to go on where it was stopped; finished runs are kept.",
    )
    train.add_argument(
        "target",
        nargs="*",
        metavar="DATA | CONFIG [KEY=VALUE ...]",
        help="folder of the data set; or settings in YAML or JSON by the names of TrainConfig, with changes to them",
    )
    train.add_argument(
        "--out", type=_folder, metavar="RUNS", help="folder of the runs and their report (default: runs)"
    )
    train.add_argument(
        "--align", type=_methods, metavar="METHOD,...", help="none, pcgrad, gradvac, cagrad, ... (default: pcgrad)"
    )
    train.add_argument(
        "--seeds", type=_seeds, metavar="SEED,...", help="one run for each, with every method (default: 0)"
    )
    train.add_argument("--jobs", type=_count, metavar="N", help="runs at the same time (default: 1)")
    train.add_argument("--config", type=Path, metavar="FILE", help="the same as CONFIG, beside DATA")
    _add_settings(train)


def _train(args: argparse.Namespace) -> int:
    from gradalign._errors import GradalignError
    from gradalign.config import Sweep, TrainConfig, read_sweep
    from gradalign.sweep import sweep

    target, *overrides = args.target or [None]
    if target is not None and "=" in target:
        raise ValueError(f"expected DATA or CONFIG before key=value; found {target!r}")
    path = args.config
    if target is not None and Path(target).suffix in (".yaml", ".yml", ".json"):
        if path is not None:
            raise ValueError(f"expected one configuration; found {target} and --config {path}")
        path, target = Path(target), None
    if path is None and overrides:
        raise ValueError(f"expected a configuration file before {overrides[0]!r}; without one, settings are flags")
    plan = Sweep(TrainConfig(), ["pcgrad"], [0]) if path is None else read_sweep(path, overrides)
    flags = {name: getattr(args, name) for name in ("out", *(setting[0] for setting in _SETTINGS))}
    flags["data"] = target
    config = replace(plan.config, **{name: value for name, value in flags.items() if value is not None})
    if config.data is None and config.train_protocol is None:
        raise ValueError("expected DATA, or --train-protocol and the like; found neither")
    jobs = plan.jobs if args.jobs is None else args.jobs
    try:
        sweep(config, args.align or plan.methods, args.seeds or plan.seeds, jobs)
    except KeyboardInterrupt:
        raise _Resumable("the same command goes on from the last checkpoint of each run") from None
    except GradalignError:
        if any(Path(config.out).glob("*/results.json")):
            _print_report(config.out)
        raise
    _print_report(config.out)
    return 0


def _print_report(runs: str | Path) -> None:
    from gradalign import _ranks, report

    if _ranks.rank() > 0:
        return
    path = report.write_report(runs)
    print(report.text_summary(runs))
    print(f"report: {path}")


def _score_command(commands: Any) -> None:
    score = _command(
        commands,
        "score",
        _score,
        "score audio with a trained detector: higher is more bona fide",
        "  gradalign score runs/pcgrad-seed0/best.pt data -o scores.txt\n"
        "  gradalign score runs/pcgrad-seed0/best.pt /data/LA --dataset asvspoof2021-la --format 2021 -o scores.txt\n"
        "  gradalign score runs/pcgrad-seed0/best.pt suspicious/*.wav -o scores.txt",
    )
    score.add_argument("model", type=Path, metavar="MODEL", help="folder of a run, or its best.pt")
    score.add_argument(
        "audio",
        type=Path,
        nargs="+",
        metavar="DATA",
        help="a folder in corpus layout, of --dataset or packed, or audio files and folders of them",
    )
    score.add_argument("-o", "--output", type=_file, required=True, metavar="FILE", help="the score file to write")
    which = score.add_mutually_exclusive_group()
    which.add_argument("--protocol", type=Path, metavar="FILE", help="utterances to score; DATA is then their folder")
    which.add_argument("--dataset", metavar="NAME", help=f"what DATA is: {_DATA_SETS}")
    score.add_argument(
        "--subset",
        default="test",
        metavar="S",
        help="of the data set (default: test); the official scripts of ASVspoof 2021 want test, progress and hidden in "
        "one file",
    )
    _add_format(score)
    score.add_argument("--device", default="auto", help="as PyTorch names it (default: a GPU where there is one)")
    score.add_argument("--batch-size", type=_count, default=24, metavar="N", help="utterances at once (default: 24)")
    score.add_argument(
        "--num-workers", type=_count_or_0, default=0, metavar="N", help="processes that read audio ahead"
    )
    score.add_argument("--resample", action="store_true", help="convert audio of another sample rate")
    score.add_argument("--skip-bad", action="store_true", help="list unreadable files at the end and go on")


def _score(args: argparse.Namespace) -> int:
    from gradalign import scoring
    from gradalign._files import write_text
    from gradalign.evaluation import Scores, write_scores

    data, folder, labelled = _to_score(args)
    values, bad = scoring.score(
        args.model,
        data,
        folder,
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        device=args.device,
        resample=args.resample,
        skip_bad=args.skip_bad,
    )
    utterances = data if isinstance(data, list) else data.utterances
    if labelled:
        write_scores(args.output, Scores.of(utterances, values), args.format)
    else:
        pairs = zip(utterances, values.tolist(), strict=True)
        write_text(args.output, "".join(f"{u.name} {score:.9g}\n" for u, score in pairs if score == score))
    about = _beside(args.output)
    print(f"scores: {args.output}", file=about)
    _list("skipped", bad, about)
    return 0


def _to_score(args: argparse.Namespace) -> tuple[list[Utterance] | PackedDataset, Path, bool]:
    """What `gradalign score` scores, the folder of its audio, and whether its labels are known.

    Single files, and every audio file below folders, are utterances named by their path.
    """
    from gradalign.data.audio import SUFFIXES, list_audio
    from gradalign.data.packed import PackedDataset, is_packed
    from gradalign.data.protocol import Utterance, read_protocol

    first: Path = args.audio[0]
    dataset, protocol = args.dataset, args.protocol
    if dataset is None and protocol is None and (first / "protocols").is_dir():
        dataset = "corpus"
    if (dataset or protocol) and len(args.audio) > 1:
        raise ValueError(f"expected one folder with {dataset or protocol}; found {len(args.audio)} paths")
    if protocol is not None:
        return read_protocol(protocol), first, True
    if len(args.audio) == 1 and is_packed(first):
        return PackedDataset(first, args.subset), first, True
    if dataset is not None:
        return datasets.read_dataset(dataset, first, args.subset, allow_missing=args.skip_bad), first, True
    utterances = []
    for path in args.audio:
        found = list_audio(path) if path.is_dir() else [path]
        if not found:
            raise FileNotFoundError(f"{path}: expected audio files ({', '.join(SUFFIXES)}) or protocols/; found none")
        utterances += [Utterance(str(file), "-", "-", 0, path=file) for file in found]
    return utterances, Path(), False


def _list(what: str, reasons: Sequence[str], file: TextIO | None = None) -> None:
    """Print how many there are, and each one's reason; nothing for none."""
    if reasons:
        print(f"{len(reasons)} {what}:", *(f"  {reason}" for reason in reasons), sep="\n", file=file)


def _beside(output: str) -> TextIO:
    """Where messages about an output go: not into what may be /dev/stdout."""
    return sys.stdout if Path(output).is_file() and own_output(output) is None else sys.stderr


def _evaluate_command(commands: Any) -> None:
    evaluate = _command(
        commands,
        "evaluate",
        _evaluate,
        "error rates of a score file: EER, DCF, Cllr, t-DCF",
        "  gradalign evaluate runs/pcgrad-seed0/scores_test.txt --by attack --interval --det det.png\n"
        "  gradalign evaluate scores.txt --dataset asvspoof2021-df --root /data/asvspoof2021 --by codec\n"
        "  gradalign evaluate scores.txt --dataset asvspoof2021-la --root /data/LA"
        " --asv-scores /data/LA/keys/LA/ASV/ASVTorch_Kaldi/score.txt",
    )
    evaluate.add_argument(
        "scores",
        type=Path,
        help="lines `utterance attack label score`, or, where labels are given, those of ASVspoof 2021 and 5; "
        "higher is more bona fide",
    )
    _add_labels(evaluate)
    asv = evaluate.add_mutually_exclusive_group()
    asv.add_argument(
        "--asv-scores",
        type=Path,
        metavar="FILE",
        help="speaker verification scores, for the min t-DCF: lines `attack kind score` (ASVspoof 2019) or, with "
        "--dataset asvspoof2021-la, keys/LA/ASV/*/score.txt",
    )
    asv.add_argument("--asv-rates", type=_rates, metavar="P_FA,P_MISS,P_FA_SPOOF", help="or its error rates")
    evaluate.add_argument(
        "--tdcf", choices=["2019", "2021"], help="t-DCF definition (default: 2019 with asvspoof2019-la, else 2021)"
    )
    evaluate.add_argument("--by", choices=["attack", "codec", "speaker"], help="one more row for each of them")
    evaluate.add_argument(
        "--interval",
        type=_samples,
        nargs="?",
        const=1000,
        metavar="N",
        help="the EER's 95%% interval from N bootstrap samples, over speakers where they are known (default: 1000)",
    )
    evaluate.add_argument("--det", type=_file, metavar="PNG", help="draw the DET curve, one for each row")
    form = evaluate.add_mutually_exclusive_group()
    form.add_argument("--json", dest="format", action="store_const", const="json", help="print JSON, every digit")
    form.add_argument("--csv", dest="format", action="store_const", const="csv", help="print CSV, every digit")


def _evaluate(args: argparse.Namespace) -> int:
    from gradalign import evaluation
    from gradalign.metrics import AsvRates

    scores = evaluation.read_scores(args.scores, args.protocol, *_labels(args))
    asv: AsvRates | evaluation.AsvScores | None = None if args.asv_rates is None else AsvRates(*args.asv_rates)
    if args.asv_scores is not None:
        root = args.root if args.dataset == "asvspoof2021-la" else None
        asv = evaluation.read_asv_scores(args.asv_scores, root, args.subset)
    tdcf = args.tdcf or ("2019" if args.dataset == "asvspoof2019-la" else "2021")
    rows = evaluation.evaluate(scores, by=args.by, asv=asv, tdcf_version=tdcf, resamples=args.interval or 0)
    if args.det is not None:
        evaluation.write_det(scores, args.det, by=args.by)
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
        if rows[0]["eer"] > 0.5:
            print("An EER above 50%: are these scores higher for spoofed speech? Higher is taken as more bona fide.")
        if asv is not None:
            pooled = asv if isinstance(asv, AsvRates) else asv.rates()
            rates = f"p_fa {pooled.p_fa:.4f}, p_miss {pooled.p_miss:.4f}, p_fa_spoof {pooled.p_fa_spoof:.4f}"
            if isinstance(asv, evaluation.AsvScores) and asv.name_any(args.by, [row["condition"] for row in rows]):
                rates += f"; in each {args.by}'s row with its own"
            print(f"min t-DCF of {tdcf}, with ASV {rates}.")
        if args.interval:
            drawn = evaluation.drawn(scores, args.by)
            print(f"from, to: 95% interval of the EER; {args.interval} bootstrap samples, of {drawn}.")
        if one_sided := evaluation.one_sided(scores, args.by):
            more = f" and {len(one_sided) - 1} more" if one_sided[1:] else ""
            print(f"Left out, as of one class only: {args.by} {one_sided[0]}{more}.")
        if args.det is not None:
            print(f"DET curve: {args.det}")
    return 0


def _labels(args: argparse.Namespace) -> tuple[list[Utterance] | None, Collection[str]]:
    """What --dataset knows of a score file, as `read_scores` takes it."""
    from gradalign.data.packed import PackedDataset, is_packed

    if (args.dataset is None) != (args.root is None):
        raise ValueError("expected --dataset and --root together; found one of them")
    if args.dataset is None:
        return None, ()
    if is_packed(args.root):
        return PackedDataset(args.root, args.subset).utterances, ()
    index = datasets.index_dataset(args.dataset, args.root, args.subset)
    return index.utterances, index.others


def _fuse_command(commands: Any) -> None:
    fuse = _command(
        commands,
        "fuse",
        _fuse,
        "fuse the scores of several detectors: their mean or, with dev scores, logistic regression",
        "  gradalign fuse a/scores_test.txt b/scores_test.txt -o fused.txt\n"
        "  gradalign fuse a/scores_test.txt b/scores_test.txt --dev a/scores_dev.txt b/scores_dev.txt -o fused.txt",
    )
    fuse.add_argument("scores", type=Path, nargs="+", metavar="SCORES", help="a score file of each detector")
    fuse.add_argument(
        "--dev",
        type=Path,
        nargs="+",
        metavar="SCORES",
        help="each detector's labelled scores to train on; the result is then a log-likelihood ratio",
    )
    _add_labels(fuse)
    fuse.add_argument("-o", "--output", type=_file, required=True, metavar="FILE", help="the score file to write")
    _add_format(fuse)


def _fuse(args: argparse.Namespace) -> int:
    from gradalign.evaluation import read_scores, write_scores
    from gradalign.fusion import Fusion

    labels = _labels(args)
    systems = [read_scores(path, args.protocol, *labels) for path in args.scores]
    if args.dev is None:
        fusion = Fusion.mean(len(systems))
    else:
        if len(args.dev) != len(systems):
            raise ValueError(
                f"expected dev scores of each of {len(systems)} detectors, in the same order; found {len(args.dev)}"
            )
        fusion = Fusion.fit([read_scores(path) for path in args.dev])
    write_scores(args.output, fusion(systems), args.format)
    about = _beside(args.output)
    for path, weight in zip(args.scores, fusion.weights, strict=True):
        print(f"{weight:+.6g} x {path}", file=about)
    print(f"{fusion.offset:+.6g} as the offset\nscores: {args.output}", file=about)
    return 0


def _table_command(commands: Any) -> None:
    table = _command(
        commands,
        "table",
        _table,
        "the results table over detectors, methods and data sets, in Markdown, CSV and HTML",
        "  gradalign table runs/aasist runs/rawnet2 -o results\n"
        "  gradalign table runs/aasist 'AASIST/published:test=published_scores.txt'",
    )
    table.add_argument(
        "items",
        nargs="+",
        metavar="RUNS | DETECTOR/METHOD:SET=SCORES",
        help="folders given to `gradalign train --out`, and score files of other detectors",
    )
    table.add_argument(
        "-o",
        "--output",
        type=_name,
        default="results",
        metavar="NAME",
        help="NAME.md, NAME.csv, NAME.html (default: results)",
    )


def _table(args: argparse.Namespace) -> int:
    from gradalign import results

    found = [result for item in args.items for result in results.read_item(item)]
    paths = results.write_table(found, args.output)
    print(results.format_markdown(found))
    print(f"written: {', '.join(str(path) for path in paths)}")
    return 0


def _conflicts_command(commands: Any) -> None:
    conflicts = _command(
        commands,
        "conflicts",
        _conflicts,
        "how often, when and in which layers the clean and the augmented view disagree",
        "  gradalign conflicts runs\n  gradalign conflicts data --detector light --steps 200\n\n"
        "The default on DATA, AASIST and 24 utterances of 4 s in a step, is for a GPU (see gradalign train --help).",
    )
    conflicts.add_argument(
        "sources",
        type=Path,
        nargs="+",
        metavar="RUN_or_DATA",
        help="training runs (or folders of them) to read; or folders in corpus layout, on which a short plain training "
        "is measured layer by layer",
    )
    conflicts.add_argument("--out", type=_folder, default="conflicts", help="folder to write (default: conflicts)")
    conflicts.add_argument(
        "--steps", type=_count, default=100, metavar="N", help="steps measured on DATA (default: 100)"
    )
    conflicts.add_argument("--seed", type=_count_or_0, metavar="N", help="of weights, order and augmentation, for DATA")
    for name, kind, values, about in _SETTINGS:
        if name in _MEASURED:
            _add_setting(conflicts, name, kind, values, f"{about}, for DATA")


def _conflicts(args: argparse.Namespace) -> int:
    from gradalign import conflicts
    from gradalign.config import TrainConfig

    runs, measured = [], {}
    for path in args.sources:
        found = conflicts.find_runs(path)
        runs += found
        if not found:
            flags = {name: getattr(args, name) for name in ("seed", *_MEASURED)}
            given = {name: value for name, value in flags.items() if value is not None}
            config = TrainConfig(data=str(path), epochs=args.steps, **given)
            measured[str(path)] = conflicts.measure(config, args.steps)
    if len({run.name for run in runs}) < len(runs):
        runs = [replace(run, name=str(run.folder)) for run in runs]
    analysis = conflicts.Analysis(runs, measured)
    paths = conflicts.write_analysis(analysis, args.out)
    print(conflicts.summary(analysis))
    print(f"written: {', '.join(str(path) for path in paths)}")
    return 0


def _augment_command(commands: Any) -> None:
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
    augment.add_argument("--seed", type=_count_or_0, default=0, help="each file's draws follow from this and its path")
    existing = augment.add_mutually_exclusive_group()
    existing.add_argument("--overwrite", action="store_true", help="replace outputs that are there")
    existing.add_argument("--skip-existing", action="store_true", help="keep outputs that are there, write the rest")
    augment.add_argument("--skip-bad", action="store_true", help="list unreadable files at the end and go on")


def _augment(args: argparse.Namespace) -> int:
    from gradalign import augmentation
    from gradalign._errors import AudioError

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
    except AudioError as error:
        raise AudioError(f"{error}. --skip-bad lists such files and goes on") from None
    except KeyboardInterrupt:
        raise _Resumable("files written so far are complete; --skip-existing goes on from here") from None
    files = "1 file" if result.written == 1 else f"{result.written} files"
    print(f"{files} written to {args.target} (RawBoost algorithm {args.algo}, seed {args.seed})")
    if result.kept:
        print(f"{result.kept} kept: there already")
    if result.scaled:
        print(f"{result.scaled} scaled down to full scale, which the sample format cannot exceed")
    _list("skipped", [reason for _, reason in result.skipped])
    return 0


def _corpus_command(commands: Any) -> None:
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
    build.add_argument("directory", type=_folder, metavar="DIR", help="made if it is not there; resumed if it is")
    build.add_argument("--profile", choices=["default", "full"], default="default", help="how much (default: default)")

    check = _command(
        actions,
        "check",
        _corpus_check,
        "verify every file of a finished corpus by its checksum",
        "  gradalign corpus check data",
    )
    check.add_argument("directory", type=Path, metavar="DIR", help="the folder given to `gradalign corpus build`")


def _corpus_build(args: argparse.Namespace) -> int:
    from gradalign.data.corpus import build_corpus

    try:
        build_corpus(args.directory, profile=args.profile)
    except KeyboardInterrupt:
        raise _Resumable("the same command goes on from here") from None
    return 0


def _corpus_check(args: argparse.Namespace) -> int:
    from gradalign.data.corpus import check_corpus

    print(f"{args.directory}: complete, {check_corpus(args.directory)} files as built")
    return 0


def _data_command(commands: Any) -> None:
    data = _command(
        commands, "data", _data_check, "look at public data sets", "  gradalign data check asvspoof2019-la /data/LA"
    )
    data_actions = data.add_subparsers(dest="action", metavar="ACTION", required=True)
    check = _command(
        data_actions,
        "check",
        _data_check,
        "count what a data set holds and list its missing, unreadable and odd files",
        "  gradalign data check asvspoof2019-la /data/LA\n"
        "  gradalign data check asvspoof2021-df /data/asvspoof2021 --subset test --decode\n"
        "  gradalign data check csv mine.csv --hash mine.sha256",
    )
    check.add_argument("name", metavar="NAME", help=_DATA_SETS)
    check.add_argument(
        "root", type=Path, metavar="ROOT", help="the folder its archive unpacks to, or the one around it"
    )
    check.add_argument(
        "--subset",
        action="append",
        metavar="S",
        help="train, dev, test, ...; may be repeated (default: all that are there)",
    )
    check.add_argument("--decode", action="store_true", help="decode every file whole, not its header alone")
    check.add_argument(
        "--hash",
        nargs="?",
        const="",
        metavar="FILE",
        help="compare every file with its SHA-256 in FILE, and add those not yet in it (default: ROOT/NAME.sha256)",
    )
    check.add_argument(
        "--jobs", type=_count, metavar="N", help="files read at the same time (default: CPUs and four more)"
    )
    check.add_argument("--all", action="store_true", help="list everything that is wrong, not ten of each kind")


def _data_check(args: argparse.Namespace) -> int:
    from gradalign.data.check import check

    folder: Path = args.root if args.root.is_dir() else args.root.parent
    manifest = folder / f"{args.name}.sha256" if args.hash == "" else args.hash
    # One that is there may need no more lines, and lie where nothing can be written.
    if manifest is not None and not Path(manifest).is_file():
        expect_file_or_nothing(manifest)
    report = check(
        args.name, args.root, args.subset, decode=args.decode, manifest=manifest, workers=args.jobs, progress=True
    )
    print(report.text(None if args.all else 10))
    return 1 if report.count_wrong else 0


def _pack_command(commands: Any) -> None:
    pack = _command(
        commands,
        "pack",
        _pack,
        "decode a data set once into 16-bit shards, which training then maps into memory",
        "  gradalign pack data packed\n"
        "  gradalign pack /data/LA packed/2019 --dataset asvspoof2019-la --jobs 16\n"
        "  gradalign train packed --out runs\n"
        "  gradalign pack --verify packed\n\n"
        "Run the same command again to go on where it was stopped, or after a file that is refused, with --resample,\n"
        "--round or --skip-bad added. Shards that are finished are kept: audio that has changed since is not packed\n"
        "anew; remove OUT for that.",
    )
    pack.add_argument("data", type=Path, nargs="?", metavar="DATA", help="the data set's folder")
    pack.add_argument("out", type=_folder, metavar="OUT", help="the folder to write: new, or begun by the same command")
    pack.add_argument("--verify", action="store_true", help="check every sample of OUT by its checksum instead")
    pack.add_argument("--dataset", default="corpus", metavar="NAME", help="what DATA is (default: corpus)")
    pack.add_argument("--splits", type=_names, metavar="S,...", help="default: those of train, dev and test there are")
    pack.add_argument("--sample-rate", type=_count, default=16000, metavar="HZ", help="of all files (default: 16000)")
    pack.add_argument("--resample", action="store_true", help="convert files of another rate, rounding them to 16 bits")
    pack.add_argument("--round", action="store_true", help="round files of more than 16 bits instead of stopping")
    pack.add_argument("--skip-bad", action="store_true", help="keep unreadable files as bad utterances and go on")
    pack.add_argument(
        "--jobs", type=_count, metavar="N", help="files decoded at the same time (default: one for each core)"
    )


def _pack(args: argparse.Namespace) -> int:
    from gradalign.data import packed

    if args.verify:
        found = packed.verify(args.out, progress=True)
    else:
        if args.data is None:
            raise ValueError("expected DATA and OUT, or --verify and OUT; found OUT alone")
        there = datasets.subsets(args.dataset, args.data)
        names = args.splits or [name for name in there if name in datasets.SPLITS]
        if not names:
            missing = "no list of one in it" if args.data.exists() else "nothing there"
            raise ValueError(f"{args.data}: expected a {args.dataset} data set; found {missing}")
        try:
            found = packed.pack(
                {
                    name: datasets.read_dataset(args.dataset, args.data, name, allow_missing=args.skip_bad)
                    for name in names
                },
                args.out,
                sample_rate=args.sample_rate,
                resample=args.resample,
                round_samples=args.round,
                skip_bad=args.skip_bad,
                workers=args.jobs,
                progress=True,
            )
        except KeyboardInterrupt:
            raise _Resumable("the same command goes on from the last finished shard") from None
    state = "as written" if args.verify else f"{found.samples * 2 / 2**20:.1f} MiB"
    print(f"{args.out}: {found.utterances} utterances, {state}")
    if found.kept:
        print(
            f"{found.kept} of them in shards that were finished before, which are kept: their audio is not read again "
            f"(where their audio has changed since, remove {args.out} and pack again)"
        )
    if found.rounded:
        print(f"{found.rounded} rounded to 16 bits, {found.clipped} of them cut to full scale")
    _list("bad", found.bad)
    return 0


def _report_command(commands: Any) -> None:
    report = _command(
        commands,
        "report",
        _report,
        "write report.html, report.png and summary.json over all runs of a folder",
        "  gradalign report runs",
    )
    report.add_argument("runs", type=Path, metavar="RUNS", help="the folder given to `gradalign train --out`")


def _report(args: argparse.Namespace) -> int:
    _print_report(args.runs)
    return 0


def _bench_command(commands: Any) -> None:
    # Its options, --help too, are those of benchmarks/run.py.
    bench = commands.add_parser("bench", help="time the ops and RawBoost, backend against backend", add_help=False)
    bench.set_defaults(run=_bench, options=[])


def _bench(args: argparse.Namespace) -> int:
    import runpy

    package = Path(__file__).parent
    # Beside the package in a checkout, within it once installed.
    script = next((p for p in (package.parent, package) if (p / "benchmarks" / "run.py").is_file()), None)
    if script is None:
        raise FileNotFoundError(f"{package}: expected benchmarks/run.py in or beside it; found none")
    folder = script / "benchmarks"
    sys.path.insert(0, str(folder))
    # What its own parser calls itself.
    before, sys.argv[0] = sys.argv[0], "gradalign bench"
    try:
        return int(runpy.run_path(str(folder / "run.py"))["main"](args.options))
    finally:
        sys.argv[0] = before
        sys.path.remove(str(folder))


def _info_command(commands: Any) -> None:
    _command(commands, "info", _info, "versions, build facts and the backend that serves each op", "  gradalign info")


def _info(args: argparse.Namespace) -> int:
    from gradalign import info

    print(info.report())
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The whole command line as one argparse parser."""
    parser = Parser(
        prog="gradalign",
        description="Gradient alignment and RawBoost augmentation for speech-deepfake detectors.",
        epilog="Each command's --help shows an example. GRADALIGN_DEBUG=1 shows tracebacks.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for add in (
        _train_command,
        _score_command,
        _evaluate_command,
        _fuse_command,
        _table_command,
        _conflicts_command,
        _augment_command,
        _corpus_command,
        _data_command,
        _pack_command,
        _report_command,
        _bench_command,
        _info_command,
    ):
        add(commands)
    return parser


# ---- entry ---------------------------------------------------------------------------------------------------------


# Of the errors of the file system, those that the user's own paths are to blame for.
_WRONG_PATH = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)


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
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal may lack a character, and a file's name need not be UTF-8: no reason to fail.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        args, rest = build_parser().parse_known_args(argv)
        if args.command == "bench":
            args.options = rest
        elif rest:
            args.parser.error(f"unrecognized arguments: {' '.join(rest)}")
        code = int(args.run(args))
        # Here, so that a reader who went away is noticed here, not when Python ends.
        sys.stdout.flush()
        return code
    except SystemExit as stop:
        return int(stop.code or 0)
    except KeyboardInterrupt as stop:
        print(f"gradalign: interrupted{f'; {stop}' if str(stop) else ''}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of a pipe went away (`| head`): Python would complain again when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ImportError as error:
        return _fail(f"{error}. Optional packages come with `pip install '.[train]'` in a checkout of gradalign", 1)
    except OSError as error:
        return _fail(_os_error(error), 2 if isinstance(error, _WRONG_PATH) else 1)
    except (ValueError, TypeError) as error:
        return _fail(str(error), 2)
    except Exception as error:
        return _fail(f"{type(error).__name__}: {error} (GRADALIGN_DEBUG=1 shows where)", 1)


if __name__ == "__main__":
    sys.exit(main())
