"""Training on two processes: the same as on one, and continued on one."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from inputs import CLIPS, config_of
from torch import nn

from gradalign import _ranks
from gradalign._checkpoint import load_checkpoint
from gradalign._errors import ConfigError
from gradalign.config import TrainConfig
from gradalign.trainer import train


def torchrun(config: TrainConfig, *options: str, program: tuple[str, ...] = ("-m", "gradalign")) -> str:
    """Train as a user does; returns what was printed."""
    path = Path(config.out).with_suffix(".json")
    path.write_text(config.to_json())
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", *program]
    command += ["train", "--config", str(path), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def assert_same_run(found: Path, expected: Path) -> None:
    """Weights, losses and scores agree to 1e-5; conflicts and epochs exactly."""
    ours, theirs = (load_checkpoint(folder / "checkpoint.pt") for folder in (found, expected))
    for key, value in theirs["model"].items():
        scale = float(value.abs().max()) or 1.0
        assert float((ours["model"][key] - value).abs().max()) <= 1e-5 * scale, key
    rows = [[json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in (found, expected)]
    for a, b in zip(*rows, strict=True):
        for key in ("train_loss_clean", "train_loss_augmented", "dev_loss", "cosine_mean"):
            assert a[key] == pytest.approx(b[key], rel=1e-5, abs=1e-6), key
        assert a["conflict_rate"] == b["conflict_rate"]
        assert a["steps"] == b["steps"]
    scores = [(f / "scores_test.txt").read_text().split() for f in (found, expected)]
    for a, b in zip(*(s[3::4] for s in scores), strict=True):
        assert float(a) == pytest.approx(float(b), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize(
    ("align", "path", "shard"), [("pcgrad", "split", False), ("gradvac", "joint", False), ("pcgrad", "split", True)]
)
def test_two_processes_train_as_one_with_the_whole_batch(align, path, shard, tmp_path):
    one = train(config_of(tmp_path / "one", align=align, path=path), progress=False)
    config = config_of(tmp_path / "two", align=align, path=path, shard=shard)
    printed = torchrun(config)
    assert printed.count("report:") == 1
    assert_same_run(config.run_dir, one)


def test_a_run_of_two_processes_goes_on_with_one(tmp_path):
    one = train(config_of(tmp_path / "one"), progress=False)
    config = config_of(tmp_path / "two", epochs=2)
    torchrun(config)
    assert len(load_checkpoint(config.run_dir / "checkpoint.pt")["rng_cpu"]) == 2
    again = Path(shutil.copytree(config.run_dir, tmp_path / "two_again" / config.run_dir.name))
    train(replace(config, epochs=3), progress=False)
    assert_same_run(config.run_dir, one)
    # And bit for bit with two, if it is killed there and goes on.
    torchrun(replace(config, out=str(tmp_path / "two_again"), epochs=3))
    assert_same_run(again, one)


def test_two_processes_go_on_bit_for_bit(tmp_path):
    """With dropout and batch-norm: random numbers are each process' own, averages are until an epoch ends."""
    settings = {
        "detector": "aasist-l",
        "detector_options": {},
        "num_samples": 2500,
        "batch_size": 2,
        "epochs": 2,
        "path": "joint",
    }
    whole, parts = (config_of(tmp_path / name, **settings) for name in ("whole", "parts"))
    torchrun(whole)
    torchrun(replace(parts, epochs=1))
    torchrun(parts)
    found, expected = (load_checkpoint(config.run_dir / "checkpoint.pt") for config in (parts, whole))
    assert all(torch.equal(found["model"][key], value) for key, value in expected["model"].items())
    assert not torch.equal(*expected["rng_cpu"])
    rows = [
        [json.loads(line) for line in (c.run_dir / "metrics.jsonl").read_text().splitlines()] for c in (parts, whole)
    ]
    assert [row["dev_loss"] for row in rows[0]] == [row["dev_loss"] for row in rows[1]]


def test_two_processes_train_one_method_after_the_other(tmp_path):
    config = config_of(tmp_path / "runs", epochs=1)
    torchrun(config, "--align", "none,mean")
    assert {path.parent.name for path in Path(config.out).glob("*/results.json")} == {"none-seed0", "mean-seed0"}


def test_no_thread_of_the_group_outlives_it(tmp_path):
    """One that is still at work when the interpreter ends aborts the process."""
    (tmp_path / "program.py").write_text("""if True:
        import atexit, glob
        # What is registered first runs last.
        names = lambda: [open(path).read() for path in glob.glob("/proc/self/task/*/comm")]
        atexit.register(lambda: print("threads:", sum("gloo" in name for name in names())))
        from gradalign import cli
        raise SystemExit(cli.main())
    """)
    config = config_of(tmp_path / "runs", epochs=1)
    assert torchrun(config, program=(str(tmp_path / "program.py"),)).count("threads: 0") == 2


def test_sharded_layers_train_as_whole_ones(tmp_path):
    """With dropout: each process has the same random numbers either way."""
    options = {"detector": "xlsr-mlp", "detector_options": {"frontend": {"name": "tiny"}}, "epochs": 2}
    whole, sharded = (config_of(tmp_path / str(s), **options, shard=s, path="joint") for s in (False, True))
    torchrun(whole)
    torchrun(sharded)
    assert_same_run(sharded.run_dir, whole.run_dir)


def test_large_layers_are_shared_out_one_at_a_time(monkeypatch):
    shared = []
    monkeypatch.setattr(_ranks, "num_ranks", lambda: 2)
    monkeypatch.setattr("torch.distributed.device_mesh.init_device_mesh", lambda kind, shape: (kind, shape))
    monkeypatch.setattr("torch.distributed.fsdp.fully_shard", lambda module, mesh: shared.append((module, mesh)))
    large, inner, small = nn.Linear(60, 60), nn.Linear(60, 60), nn.Linear(2, 2)
    outer = nn.Sequential(nn.ModuleList([inner]), nn.Linear(60, 60))
    model = nn.Sequential(nn.ModuleList([large, outer, small]), nn.Linear(60, 60))
    _ranks.shard(model, torch.device("cpu"))
    # What holds another comes after it; a hundredth of the weights is large.
    assert shared == [(module, ("cpu", (2,))) for module in (inner, outer, large, model)]


def test_a_sharded_run_goes_on_alone_and_one_that_began_alone_goes_on_sharded(tmp_path):
    one = train(config_of(tmp_path / "one", average_best=2), progress=False)
    config = config_of(tmp_path / "sharded", average_best=2, shard=True)
    torchrun(replace(config, epochs=2))
    train(config, progress=False)
    assert_same_run(config.run_dir, one)
    config = replace(config, out=str(tmp_path / "alone"))
    train(replace(config, epochs=1), progress=False)
    torchrun(config)
    assert_same_run(config.run_dir, one)
    averages = [load_checkpoint(folder / "best.pt")["model"] for folder in (config.run_dir, one)]
    for key, value in averages[1].items():
        torch.testing.assert_close(averages[0][key], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", ["split", "joint"])
def test_a_sharded_process_without_utterances_waits_for_the_others(path, tmp_path):
    """Of each step's two utterances one process may have none: its file is broken. Further parts are empty too."""
    data = Path(shutil.copytree(CLIPS, tmp_path / "data"))
    for name in [line.split()[1] for line in (data / "protocols" / "train.txt").read_text().splitlines()][::3]:
        (data / "flac" / f"{name}.flac").write_bytes(b"broken")
    changes = {"data": str(data), "batch_size": 2, "epochs": 2, "skip_bad": True, "path": path}
    one = train(config_of(tmp_path / "one", **changes), progress=False)
    config = config_of(tmp_path / "two", **changes, accumulate=2, shard=True)
    torchrun(config)
    assert_same_run(config.run_dir, one)
    skipped = [(folder / "skipped.txt").read_text().splitlines() for folder in (config.run_dir, one)]
    assert sorted(skipped[0]) == sorted(skipped[1])


def test_loss_scaling_is_not_for_sharded_gradients(tmp_path):
    with pytest.raises(ConfigError, match="`amp` must be off or bf16 with `shard`; found 'fp16'"):
        config_of(tmp_path, shard=True, amp="fp16")


def test_more_processes_than_utterances_in_a_step(monkeypatch, tmp_path):
    monkeypatch.setattr("gradalign.trainer.num_ranks", lambda: 8)
    with pytest.raises(ConfigError, match="`batch_size` must be at least the number of processes, 8; found 4"):
        train(config_of(tmp_path / "runs"), progress=False)


def test_alone_everything_is_free():
    value = torch.ones(2)
    assert _ranks.rank() == 0
    assert _ranks.add_up(value) is value
    assert _ranks.gather("a") == ["a"]
    assert _ranks.share([3, 4]) == [3, 4]
    _ranks.wait()
    _ranks.copy_first([value])
