"""The benchmarks: their arithmetic, their gates, their reports; tiny runs, no figure is judged."""

import argparse
import importlib.util
import itertools
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import alignment_ops
import alignment_study
import batched
import gpu_check
import inputs
import loading
import measure
import numpy as np
import peers
import pytest
import report
import run
import shapes
import soundfile
import torch
import train_step

import gradalign as ga
from gradalign import _dispatch, ops

DATA = Path(__file__).parent / "data"
CPU = torch.device("cpu")
TINY = ("--ops", "isd", "--samples", "300", "--rounds", "3")
PUBLISHED = """
import numpy as np

def LnL_convolutive_noise(x, *parameters):
    assert parameters == (5, 5, 20, 8000, 100, 1000, 10, 100, 0, 0, 5, 20, 16000)
    return x

def ISD_additive_noise(x, p, g_sd):
    assert (p, g_sd) == (10, 2)
    return x

def SSI_additive_noise(x, *parameters):
    assert parameters == (10, 40, 5, 20, 8000, 100, 1000, 10, 100, 0, 0, 16000)
    return x

def normWav(x, always):
    return x
"""


@pytest.fixture(autouse=True)
def results(tmp_path, monkeypatch):
    """Results go to a temporary folder; the machine's rates are not measured."""
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    monkeypatch.setattr(measure, "ceilings", lambda device: {"copy_gb_per_s": 10.0, "fp32_tflop_per_s": 0.1})
    return tmp_path


# ---- measuring ----


def test_contenders_take_turns_and_a_share_is_scaled_up():
    order = []
    contenders = [
        measure.Contender("a", lambda i: order.append("a"), before=lambda i: order.append("prepare")),
        measure.Contender("b", lambda i: order.append("b"), share=0.5),
    ]
    times = measure.interleave(contenders, CPU, rounds=4, seconds=60)
    assert [len(times[name].wall) for name in "ab"] == [4, 4]
    turns = [name for name in order if name != "prepare"]
    changes = sum(one != two for one, two in itertools.pairwise(turns))
    # Calibrating a then b, a b, b a, a b, b a: every round changes once, and there and back join.
    assert changes == 1 + 1 + 4
    assert order.count("prepare") == order.count("a")


def test_ratio_is_taken_repetition_by_repetition():
    times = {
        "slow": measure.Times("clock", wall=[2.0, 40.0, 6.0]),
        "fast": measure.Times("clock", wall=[1.0, 10.0, 2.0]),
    }
    assert measure.ratio(times, "slow", "fast") == {"median": 3.0, "p20": 2.0, "p80": 4.0}


def test_spread_of_one_to_ten():
    assert measure.spread(range(1, 11)) == {"median": 5.5, "p20": 2.0, "p80": 8.0}


def test_peak_memory_counts_what_lives_at_once():
    def run():
        for _ in range(3):
            torch.ones(1 << 18) + 1

    # Beside two large tensors, a few bytes of scalars.
    assert measure.peak_bytes(run, CPU) == pytest.approx(2 * 4 * (1 << 18), abs=100)


# ---- workloads ----


@pytest.mark.parametrize("name", shapes.WAVE_OPS)
def test_arguments_fit_the_op(name):
    args = shapes.arguments(name, 3, 700, CPU, 0)
    result = _dispatch.ops()[name](*args)
    assert (result if isinstance(result, torch.Tensor) else result[0]).shape[0] == 3
    few = tuple(shapes.rows(value, 3, [2]) for value in args)
    alone = _dispatch.ops()[name](*few)
    torch.testing.assert_close(run._take(result, [2]), alone if isinstance(alone, torch.Tensor) else tuple(alone))


def test_work_of_a_batch_is_the_papers_count():
    work = shapes.wave_work("rawboost", 64, 64600, algo=4)
    assert work.flop == pytest.approx(13.4e9, rel=0.01)
    assert work.bytes == pytest.approx(33e6, rel=0.01)
    assert shapes.gradient_work("align", 300_000_000, 2).bytes == 5 * 4 * 300_000_000


def test_mean_taps_are_those_of_the_draws():
    taps = ga.RawBoost(algo=4).draw(torch.arange(2000), 1).lnl.taps
    # Bands of L taps in series make a filter of sum(L) - 4.
    assert float(taps.sum(-1).double().mean()) - 4 == pytest.approx(shapes.MEAN_TAPS, rel=0.01)


def test_parameter_lists():
    counts = {name: sum(size.numel() for size in shapes.parameter_shapes(name)) for name in shapes.PARAMETER_LISTS}
    assert counts["aasist"] == sum(p.numel() for p in ga.detectors.create("aasist").parameters())
    assert counts["xlsr-300m"] == 315_437_696
    assert counts["xlsr-1b"] == 962_496_128
    assert counts["xlsr-300m/4"] == pytest.approx(counts["xlsr-300m"] / 16, rel=0.05)


def test_gradients_conflict():
    paths = shapes.gradients([torch.Size([100, 100]), torch.Size([50])], 3, CPU, 0)
    flat = [torch.cat([g.flatten() for g in path]) for path in paths]
    for other in flat[1:]:
        assert -0.35 < torch.cosine_similarity(flat[0], other, dim=0) < -0.2


@pytest.mark.parametrize("algo", shapes.ALGORITHMS)
def test_batched_baseline_computes_rawboost(algo):
    torch.manual_seed(algo)
    boost, x = ga.RawBoost(algo=algo), shapes.wave(2, 3000, CPU, algo)
    draws = batched.draw(boost.config, 2, 3000, CPU)
    with ga.use_backends("reference"):
        expected = boost.apply(x.double(), draws)
    assert measure.worst_error(batched.apply(boost.config, x, draws), expected) < measure.TOLERANCE
    assert not torch.equal(expected, x.double())


def test_fast_length_has_only_small_factors():
    for least in (1, 2, 7, 491, 16490, 65090, 400490):
        found = rest = batched.fast_length(least)
        for factor in (2, 3, 5):
            while rest % factor == 0:
                rest //= factor
        assert rest == 1
        assert least <= found < 1.1 * least + 2


# ---- the programs ----


def test_run_times_backends_beside_the_published_code(tmp_path, results, capsys):
    (tmp_path / "RawBoost.py").write_text(PUBLISHED)
    options = "--ops rawboost lnl ssi gram combine_ --batch 2 --samples 500 --algo 4 8 --parameters aasist --rounds 3"
    published = str(tmp_path / "RawBoost.py")
    assert run.main([*options.split(), "--published", published, "--name", "small"]) == 0
    result = json.loads((results / "small.json").read_text())
    who = {(row["op"], row["contender"]) for row in result["rows"]}
    assert {("rawboost", "published"), ("rawboost", "batched torch"), ("gram", "reference")} <= who
    assert {(op, "torchaudio") for op in ("lnl", "ssi")} <= who
    assert all(row["wall_ms"]["median"] > 0 for row in result["rows"])
    assert result["environment"]["threads"] == torch.get_num_threads()
    text = report.markdown(result)
    assert "rawboost, batch 2, samples 500, algo 4" in text
    assert "published" in text
    # One thread and T = 64600 were not asked for.
    assert "not measured" in capsys.readouterr().out


def test_run_without_the_published_file_says_so(results):
    assert run.main([*TINY, "--batch", "1", "--name", "alone"]) == 0
    result = json.loads((results / "alone.json").read_text())
    assert ["--published" in text for text in result["skipped"]] == [True]
    assert "Left out: the published NumPy code" in report.markdown(result)


def test_nothing_wrong_is_timed(monkeypatch, results, capsys):
    op = _dispatch.ops()["isd"]
    broken = _dispatch.Backend("cpp", lambda x, *_: 1.001 * x, lambda: "", lambda *_: "")
    monkeypatch.setitem(op.backends, "cpp", broken)
    assert run.main([*TINY, "--batch", "2", "--name", "wrong"]) == 1
    result = json.loads((results / "wrong.json").read_text())
    assert [row["contender"] for row in result["rows"]] == ["reference"]
    assert "isd cpp" in result["failed"][0]
    assert "WRONG" in capsys.readouterr().out
    assert "Not timed, wrong: isd cpp" in report.markdown(result)


def test_train_step_compares_plain_and_aligned(results):
    options = "--detector light --batch 2 --samples 4000 --rounds 3 --name step"
    assert train_step.main(options.split()) == 0
    result = json.loads((results / "step.json").read_text())
    assert [row["contender"] for row in result["rows"]] == [
        "plain split",
        "aligned split",
        "plain joint",
        "aligned joint",
        *[name for name in ("pytorch_optimizer", "torchjd") if importlib.util.find_spec(name)],
    ]
    peak = {row["contender"]: row["peak_mib"] for row in result["rows"]}
    assert peak["aligned split"] < peak["aligned joint"]


OFFICIAL_AASIST = """
import numpy as np
import torch
import gradalign as ga
from gradalign.detectors.aasist import our_key

class Model(torch.nn.Module):  # the network by its official names
    def __init__(self, settings):
        super().__init__()
        assert settings == {"first_conv": 128}
        self.ours = ga.detectors.create("aasist-l")

    def state_dict(self, *args, **kwargs):
        ours = self.ours.state_dict()
        return {key: ours[our_key(key)] for key in NAMES}

    def load_state_dict(self, state):
        self.ours.load_state_dict({our_key(key): value for key, value in state.items()})

    def forward(self, wave):
        return None, OFFSET + self.ours(wave)
"""


@pytest.mark.parametrize("offset", [0.0, 0.1])
def test_train_step_times_the_official_network_once_its_logits_are_ours(results, tmp_path, capsys, offset):
    names = list(json.loads(str(np.load(DATA / "aasist_logits.npz")["aasist-l_shapes"])))
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "AASIST.py").write_text(f"{OFFICIAL_AASIST}\nOFFSET, NAMES = {offset}, {names}\n")
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "AASIST-L.conf").write_text('{"model_config": {"first_conv": 128}}')
    pcgrad = tmp_path / "pcgrad.py"
    pcgrad.write_text(
        "class PCGrad:\n    def __init__(self, inner): self.inner = inner\n"
        "    def ga_backward(self, losses): self.inner.zero_grad(); sum(losses).backward()\n"
    )
    options = f"--detector aasist-l --batch 2 --samples 4000 --rounds 3 --name step --official-aasist {tmp_path}"
    command = [*options.split(), "--ways", "aligned split"]
    with pytest.raises(SystemExit):
        train_step.main(command)
    assert "needs --detector aasist or aasist-l, and --published-pcgrad" in capsys.readouterr().err
    assert train_step.main([*command, "--published-pcgrad", str(pcgrad)]) == (offset > 0)
    result = json.loads((results / "step.json").read_text())
    if offset:
        assert not result["rows"]
        assert result["failed"][0].startswith("published, official AASIST: relative error")
    else:
        assert [row["contender"] for row in result["rows"]] == ["aligned split", "published, official AASIST"]
        assert result["rows"][1]["relative_error"] == 0.0
        assert [(c["slower"], c["faster"]) for c in result["comparisons"]] == [
            ("published, official AASIST", "aligned split")
        ]


def test_peers_agree_with_our_alignment(results):
    options = "--parameters aasist --rounds 3 --name peers"
    assert peers.main(options.split()) == 0
    result = json.loads((results / "peers.json").read_text())
    rows = {row["contender"]: row for row in result["rows"]}
    assert {"gradalign reference", "foreach"} <= set(rows)
    assert rows["foreach"]["relative_error"] < 1e-4
    assert not result["failed"]


PUBLISHED_LOADER = """
import numpy as np
import soundfile
import torch

class Dataset_train(torch.utils.data.Dataset):
    def __init__(self, args, names, labels, base, algo):
        assert (args.N_f, args.SNRmax, args.minBiasLinNonLin, algo) == (5, 40, 5, 4)
        self.names, self.base, self.labels = names, base, labels
    def __len__(self):
        return len(self.names)
    def __getitem__(self, index):
        wave, _ = soundfile.read(self.base + "flac/" + self.names[index] + ".flac", dtype="float32")
        wave = torch.from_numpy(np.tile(wave, self.cut // len(wave) + 1)[: self.cut])
        return wave, wave * SCALE, self.labels[self.names[index]]
"""


@pytest.fixture
def small_corpus(tmp_path):
    (tmp_path / "data" / "protocols").mkdir(parents=True)
    (tmp_path / "data" / "flac").mkdir()
    rng = np.random.default_rng(0)
    lines = []
    for i in range(6):
        soundfile.write(tmp_path / "data" / "flac" / f"u{i}.flac", 0.1 * rng.standard_normal(1500 + 900 * i), 16000)
        lines.append(f"s u{i} - {'A01 spoof' if i % 2 else '- bonafide'}\n")
    (tmp_path / "data" / "protocols" / "train.txt").write_text("".join(lines))
    return tmp_path / "data"


def test_alignment_ops_compares_what_agrees(results, monkeypatch, capsys):
    arguments = ["--methods", "pcgrad", "nashmtl", "--paths", "3", "--segments", "2", "--parameters", "aasist"]
    arguments += ["--rounds", "3", "--seconds", "0.1", "--name", "tiny"]
    assert alignment_ops.main(arguments) == 0
    result = json.loads((results / "tiny.json").read_text())
    assert {row["contender"] for row in result["rows"]} == {"functions", "weigh", "in turn", "align_"}
    assert [c["ours"] for c in result["comparisons"]] == ["weigh", "weigh", "align_"]
    assert "weights, method nashmtl, paths 3, segments 2" in report.markdown(result)
    monkeypatch.setattr(alignment_ops, "_TOLERANCE", -1.0)
    assert alignment_ops.main(arguments) == 1
    assert "WRONG, not timed: merge" in capsys.readouterr().out


def test_a_numbered_gpu_becomes_the_current_one(monkeypatch):
    chosen, parser = [], argparse.ArgumentParser()
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    measure.add_common_arguments(parser)
    for name in ("cpu", "cuda", "cuda:1"):
        assert parser.parse_args(["--device", name]).device == torch.device(name)
    assert chosen == [torch.device("cuda:1")]


def test_filter_forms_marks_what_is_inexact(results, monkeypatch, capsys):
    filter_forms = pytest.importorskip("filter_forms", reason="Triton is not installed")
    assert filter_forms.main(["--device", "cpu"]) == 2
    assert "expected a CUDA GPU and --device cuda; found --device cpu" in capsys.readouterr().err

    def contenders(samples):
        def rough(x, filters):
            return 1.001 * filter_forms.exact(filter_forms.ALONE, x, filters)

        name = filter_forms.OVERLAP_SAVE if samples == 700 else filter_forms.DIRECT_CUDA
        whole = (filter_forms.WHOLE, name, lambda x, filters: ops.lnl(x, filters, None))
        return [whole, (filter_forms.ALONE, filter_forms.FORMS[0].name, rough)]

    monkeypatch.setattr(filter_forms, "WORKLOADS", ((7, 600), (6, 700)))
    monkeypatch.setattr(filter_forms, "contenders", contenders)
    result = filter_forms.bench(filter_forms.parse(["--rounds", "3", "--seconds", "0.1", "--name", "tiny"]))
    assert [row["within_tolerance"] for row in result["rows"]] == [True, False] * 2
    assert [c["times_faster_wall"]["median"] == 1 for c in result["comparisons"]].index(True) == 2
    filter_forms.show(result["rows"])
    assert capsys.readouterr().out.count("error 1.0e-03, OUTSIDE the tolerance of 1e-05") == 2
    text = report.markdown(json.loads(json.dumps(result)))
    assert "lnl, batch 6, samples 700" in text
    inexact = "Toeplitz, tf32x3, 64 x 32 x 16 (lnl filters, batch 7, samples 600): relative error 0.001"
    assert f"Timed, though outside the tolerance: {inexact}" in text


def test_loading_compares_packed_data_with_the_published_loader(small_corpus, results):
    checkout = small_corpus.parent / "checkout"
    checkout.mkdir()
    (checkout / "data_utils.py").write_text(PUBLISHED_LOADER.replace("SCALE", "2"))
    options = f"{small_corpus} --published {checkout} --published-utterances 3 --batch 2 --samples 4000"
    assert loading.main([*options.split(), "--rounds", "3", "--detector", "light", "--name", "loading"]) == 0
    result = json.loads((results / "loading.json").read_text())
    assert [row["contender"] for row in result["rows"]] == ["published loader", "files", "packed", loading.LOADED]
    assert [c["faster"] for c in result["comparisons"]] == ["files", "packed"]
    assert [goal["found"] is not None for goal in result["goals"]] == [True, True]
    assert 0 < result["rows"][-1]["wait_share"]["median"] < 1
    assert result["pack"]["utterances"] == 6
    assert "loading epoch, utterances 6, batch 2" in report.markdown(result)


def test_loading_makes_noise_where_there_is_no_speech(results):
    options = "--utterances 4 --batch 2 --samples 4000 --workers 1 --rounds 3 --name loading"
    assert loading.main(options.split()) == 0
    result = json.loads((results / "loading.json").read_text())
    assert [row["contender"] for row in result["rows"]] == ["files", "packed"]
    assert [what.split(":")[0] for what in result["skipped"]] == ["the published loader", "training steps"]


def test_loading_times_nothing_that_reads_other_samples(small_corpus, results, capsys):
    checkout = small_corpus.parent / "checkout"
    checkout.mkdir()
    (checkout / "data_utils.py").write_text(PUBLISHED_LOADER.replace("return wave,", "return wave + 1e-6,"))
    options = [str(small_corpus), "--published", str(checkout), "--batch", "2", "--samples", "4000"]
    (checkout / "data_utils.py").write_text((checkout / "data_utils.py").read_text().replace("SCALE", "2"))
    assert loading.main(options) == 1
    assert "WRONG, not timed: published loader: utterance 0 is not that of the file" in capsys.readouterr().out


def test_report_marks_a_missed_goal_and_keeps_losses():
    environment = {
        "device": "a processor",
        "threads": 1,
        "cores": 2,
        "load_average": [0.1, 0.1, 0.1],
        "versions": {"torch": "2.11.0"},
        "commit": "0123456789abcdef",
        "uncommitted": [],
        "date": "2026-11-23T12:00:00+00:00",
        "command": "python benchmarks/run.py",
    }
    fast, slow = ({"median": v, "p20": v, "p80": v} for v in (1.0, 2.5))
    result = {
        "name": "x",
        "environment": environment,
        "goals": [measure.goal("faster", 1.5, 2.0, at_least=True), measure.goal("unknown", None, 1, at_least=True)],
        "rows": [
            {"op": "gram", "parameters": "aasist", "contender": "cpp", "wall_ms": slow},
            {"op": "gram", "parameters": "aasist", "contender": "other", "wall_ms": fast},
        ],
        "skipped": [],
        "failed": [],
    }
    lines = report.markdown(result).splitlines()
    assert "| faster | at least 2 | 1.5 | **no** |" in lines
    assert not any("unknown" in line for line in lines)
    assert lines[-2:] == [
        "| gram, parameters aasist | other | 1 (1 to 1) |  | 1.00 |  |",
        "|  | cpp | 2.5 (2.5 to 2.5) |  | 2.50 |  |",
    ]


# ---- the check on a GPU, the study ----


def test_gpu_check_stages_are_commands_that_exist():
    """Their limits leave time to build the kernels; every benchmark's options are its own."""
    found = gpu_check.stages("h100", Path("RawBoost.py"), Path("grad_align"), Path("pcgrad.py"))
    assert sum(stage.limit_s for stage in found) <= 540
    parsers = {f"{m.__name__}.py": m.parse for m in (run, peers, alignment_ops, train_step, loading)}
    parsed = []
    for stage in found:
        for command in stage.commands:
            for at, word in enumerate(command):
                if Path(word).name in parsers:
                    assert Path(word).is_file()
                    parsed.append(parsers[Path(word).name](list(command[at + 1 :])).name)
    names = ("rawboost", "peers", "alignment-ops", "train-step", "xlsr-step", "loading", "ops")
    assert parsed == [f"h100-{name}" for name in names]
    tests = [word for command in found[1].commands for word in command if Path(word).name.startswith("test_")]
    assert len(tests) > 8
    assert all(Path(word.split("::")[0]).is_file() for word in tests)
    # Triton's tests are split by op, and none is lost.
    chosen = " ".join(command[-1] for command in found[1].commands if "equals_float64_reference and" in command[-1])
    assert all(re.search(rf"\b{op.split('_')[0]}", chosen) for op in inputs.CASES)


def test_gpu_check_keeps_what_a_stage_printed(tmp_path):
    log = tmp_path / "log"
    code = "import time; print('begun', flush=True); time.sleep({}); raise SystemExit({})"
    parts = [(sys.executable, "-c", code.format(*part)) for part in ((0, 0), (0, 7), (60, 0))]
    results = [gpu_check.run(gpu_check.Stage("s", commands, 3), log)["result"] for commands in (parts[:1], parts)]
    assert results == ["passed", "failed with exit code 7; stopped after 3 s"]
    assert log.read_text().count("begun\n") == 4
    missing = gpu_check.run(gpu_check.Stage("s", (("no-such-tool",),), 3), log)
    assert missing["result"] == "not run: no-such-tool is not on the PATH"


def test_gpu_check_without_a_gpu_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main(["--out", str(tmp_path)]) == 2
    assert "expected a CUDA GPU" in capsys.readouterr().err


def test_gpu_check_runs_chosen_stages(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    ran = []

    def run_stage(stage, log):
        ran.append(stage.name)
        return {"stage": stage.name, "result": "passed", "seconds": 0.0}

    monkeypatch.setattr(gpu_check, "run", run_stage)
    assert gpu_check.main(["--out", str(tmp_path), "--only", "data", "check"]) == 0
    assert ran == ["waiting for data", "memcheck", "racecheck"]
    assert json.loads((tmp_path / "gpu_check.json").read_text())["gpu"] == "NVIDIA H100 80GB HBM3"
    assert gpu_check.main(["--out", str(tmp_path), "--only", "nothing"]) == 2
    assert "expected words of what serves what, tests, " in capsys.readouterr().err


def test_the_study_takes_every_third_clip_of_each_kind(tmp_path):
    (tmp_path / "corpus" / "flac").mkdir(parents=True)
    (tmp_path / "corpus" / "protocols").mkdir()
    for split in ("train", "dev", "test"):
        lines = [f"s{i % 2} u{i} - {'-' if i < 10 else 'a'} {'bonafide' if i < 10 else 'spoof'}\n" for i in range(20)]
        (tmp_path / "corpus" / "protocols" / f"{split}.txt").write_text("".join(lines))
    folder = alignment_study.every_third(tmp_path / "corpus", tmp_path / "third")
    assert alignment_study.every_third(tmp_path / "corpus", tmp_path / "third") == folder
    kept = [line.split()[1] for line in (folder / "protocols" / "dev.txt").read_text().splitlines()]
    assert kept == ["u0", "u1", "u6", "u7", "u10", "u11", "u16", "u17"]
    assert (folder / "flac").resolve() == (tmp_path / "corpus" / "flac").resolve()


def test_the_study_writes_tables_and_a_figure(write_run, tmp_path, monkeypatch):
    def fake_sweep(config, methods, seeds, jobs):
        for method in methods:
            for seed in seeds:
                folder = write_run(Path(config.out), method, seed, gain=0.5 * (method == "pcgrad"))
                (folder / "config.json").write_text(replace(config, align=method, seed=seed).to_json())

    monkeypatch.setattr(alignment_study, "sweep", fake_sweep)
    out, results = tmp_path / "runs", tmp_path / "results"
    options = ["corpus", "--out", str(out), "--results", str(results), "--detectors", "light", "--seeds", "3"]
    assert alignment_study.main(options) == 0
    rows = (results / "alignment_study.csv").read_text().splitlines()
    assert len(rows) == 1 + 2 * 4 * 3
    assert rows[1].startswith("light,4,none,0,")
    text = (results / "alignment_study.md").read_text()
    assert "24 trainings: none, pcgrad, gradvac, cagrad" in text
    assert "## light, RawBoost algorithm 5" in text
    # A mean lies inside its interval, and plain training is compared with nothing.
    row = next(line for line in text.splitlines() if line.startswith("| none |"))
    mean, low, high = (float(word.strip("()")) for word in row.split("|")[2].replace(" to ", " ").split())
    assert low < mean < high
    assert row.split("|")[3].strip() == ""
    assert (results / "alignment_study.png").read_bytes().startswith(b"\x89PNG")
