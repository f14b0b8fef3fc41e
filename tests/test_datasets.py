"""Readers of public data sets, on small trees with the published names, columns and separators."""

import csv
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from gradalign import cli
from gradalign.data import AudioError, DataError, SpeechDataset, Utterance, datasets, read_dataset
from gradalign.data.check import check, sha256_of
from gradalign.data.datasets import names, subsets
from gradalign.data.packed import PackedDataset, packed_splits


def audio(path, seconds=0.1, rate=16000, channels=1):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(path.name))
    shape = (round(seconds * rate), channels) if channels > 1 else round(seconds * rate)
    soundfile.write(path, 0.1 * rng.standard_normal(shape), rate)
    return path


def text(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


# Each writes a tree with the published names and returns the folder that the archive was unpacked in.


def corpus(root):
    for split, speaker in (("train", "p1"), ("dev", "p2"), ("test", "p3")):
        text(root / f"protocols/{split}.txt", f"{speaker} {split}_a - - bonafide\n{speaker} {split}_b - vits spoof\n")
        audio(root / f"flac/{split}_a.flac")
        audio(root / f"flac/{split}_b.flac")
    return root


def asvspoof2019(root):
    top = root / "LA"
    lines = {
        "train": ("train.trn", "LA_0079 LA_T_1138215 - - bonafide\nLA_0079 LA_T_1004644 - A01 spoof\n"),
        "dev": ("dev.trl", "LA_0069 LA_D_1047731 - - bonafide\nLA_0070 LA_D_1008730 - A04 spoof\n"),
        "eval": ("eval.trl", "LA_0039 LA_E_2834763 - A11 spoof\nLA_0014 LA_E_8877452 - A14 spoof\n"),
    }
    for split, (name, content) in lines.items():
        text(top / f"ASVspoof2019_LA_cm_protocols/ASVspoof2019.LA.cm.{name}.txt", content)
        for line in content.splitlines():
            audio(top / f"ASVspoof2019_LA_{split}/flac/{line.split()[1]}.flac")
    return root


KEYS_LA = """\
LA_0009 LA_E_9332881 alaw ita_tx A07 spoof notrim eval
LA_0048 LA_E_6866159 none loc_tx bonafide bonafide notrim eval
LA_0015 LA_E_2347121 opus sin_tx A15 spoof notrim progress
LA_0023 LA_E_5464494 pstn mad_tx A16 spoof trim hidden
"""


def asvspoof2021_la(root):
    text(root / "keys/LA/CM/trial_metadata.txt", KEYS_LA)
    for line in KEYS_LA.splitlines():
        audio(root / f"ASVspoof2021_LA_eval/flac/{line.split()[1]}.flac")
    return root


KEYS_DF = """\
LA_0023 DF_E_2000011 nocodec asvspoof A14 spoof notrim progress traditional_vocoder - - - -
TEF2 DF_E_2000013 low_m4a vcc2020 Task1-team20 spoof notrim eval neural_vocoder_nonautoregressive Task1 team20 FF E
TGF1 DF_E_2000024 mp3m4a vcc2020 Task2-team12 spoof notrim eval traditional_vocoder Task2 team12 FF G
LA_0043 DF_E_2000026 mp3m4a asvspoof - bonafide notrim eval bonafide - - - -
LA_0021 DF_E_2000027 high_ogg asvspoof A09 spoof trim hidden traditional_vocoder - - - -
"""


def asvspoof2021_df(root):
    text(root / "keys/DF/CM/trial_metadata.txt", KEYS_DF)
    for part, line in zip((0, 0, 1, 2, 3), KEYS_DF.splitlines(), strict=True):
        audio(root / f"ASVspoof2021_DF_eval_part0{part}/ASVspoof2021_DF_eval/flac/{line.split()[1]}.flac")
    return root


def asvspoof5(root):
    train = "T_4850 T_0000000000 F - - - AC3 A05 spoof -\nT_3734 T_0000000011 F - - - - bonafide bonafide -\n"
    dev = "D_0062 D_0000000001 F - - - AC1 A11 spoof -\nD_0461 D_0000000190 M - - - - bonafide bonafide -\n"
    test = (
        "E_1607 E_0009538969 M C05 3 E_0001465129 AC2 A21 spoof -\nE_0612 E_0002635489 F - - - - bonafide bonafide -\n"
    )
    for name, folder, content in (
        ("train", "flac_T", train),
        ("dev.track_1", "flac_D", dev),
        ("eval.track_1", "flac_E_eval", test),
    ):
        text(root / f"ASVspoof5.{name}.tsv", content)
        for line in content.splitlines():
            audio(root / f"{folder}/{line.split()[1]}.flac")
    return root


def in_the_wild(root):
    top = root / "release_in_the_wild"
    text(top / "meta.csv", "file,speaker,label\n0.wav,Alec Guinness,spoof\n4.wav,Christopher Hitchens,bona-fide\n")
    audio(top / "0.wav")
    audio(top / "4.wav")
    return root


def fake_or_real(root):
    for split in ("training", "validation", "testing"):
        audio(root / f"for-norm/{split}/fake/file10002.wav_16k.wav_norm.wav_mono.wav_silence.wav")
        audio(root / f"for-norm/{split}/real/file10002.wav_16k.wav_norm.wav_mono.wav_silence.wav")
    return root


HEADER_MLAAD = (
    "path|original_file|language|is_original_language|duration|training_data|model_name|architecture|transcript\n"
)
ORIGINAL = "en_US/by_book/female/judy_bieber/dorothy_and_wizard_oz/wavs/dorothy_and_wizard_oz_01_f000001.wav"


def mlaad(root):
    for language, folder, model in (
        ("en", "tts_models_en_ljspeech_glow-tts", "tts_models/en/ljspeech/glow-tts"),
        ("de", "Resemble.ai (April 12th, 2025)", "Resemble.ai (April 12th, 2025)"),
    ):
        file = f"fake/{language}/{folder}/dorothy_and_wizard_oz_01_f000001.wav"
        text(
            root / f"fake/{language}/{folder}/meta.csv",
            HEADER_MLAAD
            + f'./{file}|{ORIGINAL}|{language}|True|2.07|ljspeech|{model}|glow-tts|"To ""my"" | Readers."\n',
        )
        audio(root / file)
    audio(root / "M-AILABS" / ORIGINAL)
    return root


def plain_csv(root):
    text(
        root / "mine.csv",
        "path,label,speaker,attack,split,codec\n"
        "audio/a.wav,bonafide,ann,,train,\naudio/b.wav,spoof,ann,vits,train,mp3\n"
        f"{root}/elsewhere/c.wav,spoof,,,dev,\naudio/d e.wav,bonafide,bob,-,test,opus\n",
    )
    for name in ("audio/a.wav", "audio/b.wav", "elsewhere/c.wav", "audio/d e.wav"):
        audio(root / name)
    return root / "mine.csv"


TREES = {
    "corpus": corpus,
    "asvspoof2019-la": asvspoof2019,
    "asvspoof2021-la": asvspoof2021_la,
    "asvspoof2021-df": asvspoof2021_df,
    "asvspoof5": asvspoof5,
    "in-the-wild": in_the_wild,
    "for": fake_or_real,
    "mlaad": mlaad,
    "csv": plain_csv,
}


def facts(utterances):
    return [(u.name, u.speaker, u.attack, u.label, u.codec) for u in utterances]


# ---- what is read --------------------------------------------------------------------------------------------------


def test_every_reader_has_a_tree_here():
    assert list(TREES) == names()


@pytest.mark.parametrize("name", TREES)
def test_all_subsets_of_an_official_tree_are_read_and_their_audio_found(name, tmp_path):
    root = TREES[name](tmp_path)
    assert subsets(name, root) == subsets(name)
    for subset in subsets(name):
        utterances = read_dataset(name, root, subset)
        assert all(u.path.is_file() for u in utterances)
        assert not any(set(f"{u.name}{u.speaker}{u.attack}{u.codec}") & set(" \t\n") for u in utterances)
        assert all((u.attack == "-") == (u.label == 1) for u in utterances)
        data = SpeechDataset(utterances, root, num_samples=1600)
        assert [data[i].length for i in range(len(data))] == [1600] * len(utterances)
    assert read_dataset(name, root, "eval") == read_dataset(name, root, "test")


def test_asvspoof2019_la(tmp_path):
    asvspoof2019(tmp_path)
    train = read_dataset("asvspoof2019-la", tmp_path, "train")
    flac = tmp_path / "LA" / "ASVspoof2019_LA_train" / "flac"
    assert train == [
        Utterance("LA_T_1138215", "LA_0079", "-", 1, "-", flac / "LA_T_1138215.flac"),
        Utterance("LA_T_1004644", "LA_0079", "A01", 0, "-", flac / "LA_T_1004644.flac"),
    ]
    assert read_dataset("asvspoof2019-la", tmp_path / "LA", "train") == train


def test_asvspoof2021_la_has_subsets_and_codecs(tmp_path):
    asvspoof2021_la(tmp_path)
    found = {subset: facts(read_dataset("asvspoof2021-la", tmp_path, subset)) for subset in subsets("asvspoof2021-la")}
    assert found == {
        "test": [("LA_E_9332881", "LA_0009", "A07", 0, "alaw"), ("LA_E_6866159", "LA_0048", "-", 1, "none")],
        "progress": [("LA_E_2347121", "LA_0015", "A15", 0, "opus")],
        "hidden": [("LA_E_5464494", "LA_0023", "A16", 0, "pstn")],
    }
    # The keys are beside the audio's own folder, or in a folder named as their archive.
    inner = tmp_path / "ASVspoof2021_LA_eval"
    assert facts(read_dataset("asvspoof2021-la", inner, "test")) == found["test"]
    (tmp_path / "LA-keys-full").mkdir()
    (tmp_path / "keys").rename(tmp_path / "LA-keys-full" / "keys")
    assert facts(read_dataset("asvspoof2021-la", tmp_path, "test")) == found["test"]
    assert facts(read_dataset("asvspoof2021-la", inner, "test")) == found["test"]


@pytest.mark.parametrize("track", ["la", "df"])
def test_official_asvspoof2021_score_files_hold_all_phases(tmp_path, capsys, track):
    """As the published pipelines write them: every line of the official trial list, without labels."""
    TREES[f"asvspoof2021-{track}"](tmp_path)
    dataset = ["--dataset", f"asvspoof2021-{track}", "--root", str(tmp_path)]
    scores, fused = str(tmp_path / "scores.txt"), str(tmp_path / "fused.txt")
    trials = [line.split()[1] for line in {"la": KEYS_LA, "df": KEYS_DF}[track].splitlines()]
    text(tmp_path / "scores.txt", "".join(f"{name} {i}\n" for i, name in enumerate(trials)))
    test = read_dataset(f"asvspoof2021-{track}", tmp_path, "test")
    for folder in list(tmp_path.glob("**/flac")):
        # The keys are enough.
        shutil.rmtree(folder)

    assert cli.main(["evaluate", scores, *dataset, "--csv"]) == 0
    (row,) = csv.DictReader(capsys.readouterr().out.splitlines())
    assert (int(row["bonafide"]), int(row["spoof"])) == (1, len(test) - 1)
    assert cli.main(["fuse", scores, scores, *dataset, "-o", fused]) == 0
    assert [line.split() for line in Path(fused).read_text().splitlines()] == [
        [u.name, u.attack, u.label_name, str(trials.index(u.name))] for u in test
    ]

    text(tmp_path / "scores.txt", "".join(f"{name} 1\n" for name in [*trials, "LA_E_0"]))
    assert cli.main(["evaluate", scores, *dataset]) == 2
    assert "1 scores without a protocol line and 0 protocol lines" in capsys.readouterr().err


def test_of_asvspoof2021_the_test_phase_is_packed_as_it_is_asked_for(tmp_path):
    asvspoof2021_la(tmp_path)
    command = ["pack", str(tmp_path), str(tmp_path / "packed"), "--dataset", "asvspoof2021-la"]
    assert cli.main([*command, "--sample-rate", "8000", "--resample"]) == 0
    assert packed_splits(tmp_path / "packed") == ["test"]
    packed = PackedDataset(tmp_path / "packed", "test")
    assert packed.sample_rate == 8000
    assert facts(packed.utterances) == facts(read_dataset("asvspoof2021-la", tmp_path, "test"))


def test_asvspoof2021_df_lies_in_four_parts_or_in_one(tmp_path):
    asvspoof2021_df(tmp_path)
    found = read_dataset("asvspoof2021-df", tmp_path, "test")
    assert facts(found) == [
        ("DF_E_2000013", "TEF2", "Task1-team20", 0, "low_m4a"),
        ("DF_E_2000024", "TGF1", "Task2-team12", 0, "mp3m4a"),
        ("DF_E_2000026", "LA_0043", "-", 1, "mp3m4a"),
    ]
    assert [u.path.parents[2].name for u in found] == [f"ASVspoof2021_DF_eval_part0{i}" for i in range(3)]
    (tmp_path / "ASVspoof2021_DF_eval" / "flac").mkdir(parents=True)
    for path in list(tmp_path.rglob("*.flac")):
        path.rename(tmp_path / "ASVspoof2021_DF_eval" / "flac" / path.name)
    assert facts(read_dataset("asvspoof2021-df", tmp_path, "test")) == facts(found)


@pytest.mark.parametrize("pattern", ["flac_E_eval", "flac_E_aa/flac_E_eval", "ASVspoof5_eval/flac_E_eval"])
def test_asvspoof5_archives_may_be_unpacked_together_or_apart(tmp_path, pattern):
    asvspoof5(tmp_path)
    (tmp_path / "flac_E_eval").rename(tmp_path / "here")
    (tmp_path / pattern).parent.mkdir(exist_ok=True)
    (tmp_path / "here").rename(tmp_path / pattern)
    found = read_dataset("asvspoof5", tmp_path, "test")
    assert facts(found) == [("E_0009538969", "E_1607", "A21", 0, "C05"), ("E_0002635489", "E_0612", "-", 1, "none")]
    assert found[0].path == tmp_path / pattern / "E_0009538969.flac"


def test_asvspoof5_protocols_may_lie_in_the_folder_of_their_archive(tmp_path):
    asvspoof5(tmp_path)
    (tmp_path / "ASVspoof5_protocols").mkdir()
    for path in tmp_path.glob("*.tsv"):
        path.rename(tmp_path / "ASVspoof5_protocols" / path.name)
    assert facts(read_dataset("asvspoof5", tmp_path, "dev"))[0] == ("D_0000000001", "D_0062", "A11", 0, "none")


def test_in_the_wild(tmp_path):
    in_the_wild(tmp_path)
    found = read_dataset("in-the-wild", tmp_path, "test")
    assert facts(found) == [
        ("0.wav", "Alec_Guinness", "unknown", 0, "-"),
        ("4.wav", "Christopher_Hitchens", "-", 1, "-"),
    ]
    assert read_dataset("in-the-wild", tmp_path / "release_in_the_wild", "test") == found


def test_fake_or_real_is_read_one_version_at_a_time(tmp_path):
    fake_or_real(tmp_path)
    audio(tmp_path / "for-norm/validation/real/._hidden.wav")
    found = read_dataset("for", tmp_path, "dev")
    name = "file10002.wav_16k.wav_norm.wav_mono.wav_silence.wav"
    assert facts(found) == [(f"fake/{name}", "-", "unknown", 0, "-"), (f"real/{name}", "-", "-", 1, "-")]
    assert found[0].path == tmp_path / "for-norm" / "validation" / "fake" / name
    assert read_dataset("for", tmp_path / "for-norm", "dev") == found
    (tmp_path / "for-2seconds" / "validation").mkdir(parents=True)
    with pytest.raises(DataError, match=r"expected one version of Fake-or-Real; found for-norm, for-2seconds \(one"):
        read_dataset("for", tmp_path, "dev")


def test_mlaad_takes_bona_fide_speech_from_m_ailabs_where_it_is_there(tmp_path):
    mlaad(tmp_path)
    found = read_dataset("mlaad", tmp_path, "test")
    clip = "dorothy_and_wizard_oz_01_f000001.wav"
    assert facts(found) == [
        (f"fake/de/Resemble.ai_(April_12th,_2025)/{clip}", "-", "Resemble.ai_(April_12th,_2025)", 0, "-"),
        (f"fake/en/tts_models_en_ljspeech_glow-tts/{clip}", "-", "tts_models/en/ljspeech/glow-tts", 0, "-"),
        (f"M-AILABS/{ORIGINAL}", "judy_bieber", "-", 1, "-"),
    ]
    (tmp_path / "M-AILABS").rename(tmp_path / "elsewhere")
    assert read_dataset("mlaad", tmp_path, "test") == found[:2]
    (tmp_path / "elsewhere").rename(tmp_path / "M-AILABS")
    # Books with several readers do not say who reads.
    mixed = "en_US/by_book/mix/emma/wavs/emma_01_f000001.wav"
    other = "fake/en/tts_models_en_ljspeech_glow-tts/b.wav"
    with (tmp_path / other).with_name("meta.csv").open("a") as table:
        table.write(f"{other}|./{mixed}|en|True|2.07|ljspeech|glow-tts|glow-tts|text\n")
    audio(tmp_path / other)
    audio(tmp_path / "M-AILABS" / mixed)
    assert facts(read_dataset("mlaad", tmp_path, "test"))[3:] == [
        (f"M-AILABS/{ORIGINAL}", "judy_bieber", "-", 1, "-"),
        (f"M-AILABS/{mixed}", "-", "-", 1, "-"),
    ]


def test_csv_may_name_splits_or_be_one_file_each(tmp_path):
    table = plain_csv(tmp_path)
    assert facts(read_dataset("csv", table, "train")) == [
        ("audio/a.wav", "ann", "-", 1, "-"),
        ("audio/b.wav", "ann", "vits", 0, "mp3"),
    ]
    assert facts(read_dataset("csv", table, "dev")) == [(f"{tmp_path}/elsewhere/c.wav", "-", "unknown", 0, "-")]
    assert facts(read_dataset("csv", table, "test")) == [("audio/d_e.wav", "bob", "-", 1, "opus")]
    text(tmp_path / "train.csv", "label, path\n\nspoof,audio/b.wav\n\n")
    assert facts(read_dataset("csv", tmp_path, "train")) == [("audio/b.wav", "-", "unknown", 0, "-")]
    assert subsets("csv", tmp_path) == ["train"]
    assert facts(read_dataset("csv", tmp_path / "train.csv", "test")) == [("audio/b.wav", "-", "unknown", 0, "-")]
    assert subsets("csv", tmp_path / "train.csv") == ["test"]


def test_the_corpus_takes_audio_of_any_form_and_in_folders(tmp_path):
    corpus(tmp_path)
    (tmp_path / "flac" / "dev_a.flac").unlink()
    audio(tmp_path / "flac" / "dev_a.wav")
    audio(tmp_path / "flac" / "dev_b.wav")
    text(tmp_path / "protocols/test.txt", "p3 p3/long.name - - bonafide\np3 p3/b.mp3 - - bonafide\n")
    text(tmp_path / "metadata.csv", "utterance,split,channel\ndev_b,dev,g722 at 16 kHz\n")
    audio(tmp_path / "flac/p3/long.name.ogg")
    audio(tmp_path / "flac/p3/b.mp3")
    dev = read_dataset("corpus", tmp_path, "dev")
    assert [(u.path.name, u.codec) for u in dev] == [("dev_a.wav", "-"), ("dev_b.flac", "g722_at_16_kHz")]
    test = read_dataset("corpus", tmp_path, "test")
    assert [u.path.relative_to(tmp_path / "flac").as_posix() for u in test] == ["p3/long.name.ogg", "p3/b.mp3"]
    datasets.expect_files(test, tmp_path / "flac")
    with pytest.raises(AudioError, match=r"an audio file for each of 2 .*; found none for 2, such as .*/a\.flac$"):
        datasets.expect_files([Utterance("a", "s", "-", 1), Utterance("p3/b", "s", "-", 1)], tmp_path)
    text(tmp_path / "metadata.csv", "file_name,text\ndev_b.flac,one of another's\n")
    assert [u.codec for u in read_dataset("corpus", tmp_path, "dev")] == ["-", "-"]


# ---- what is wrong -------------------------------------------------------------------------------------------------


# The list to spoil in each tree, with the subset it is of.
LISTS = {
    "corpus": ("protocols/dev.txt", "dev"),
    "asvspoof2019-la": ("LA/ASVspoof2019_LA_cm_protocols/ASVspoof2019.LA.cm.dev.trl.txt", "dev"),
    "asvspoof2021-la": ("keys/LA/CM/trial_metadata.txt", "test"),
    "asvspoof2021-df": ("keys/DF/CM/trial_metadata.txt", "test"),
    "asvspoof5": ("ASVspoof5.dev.track_1.tsv", "dev"),
    "in-the-wild": ("release_in_the_wild/meta.csv", "test"),
    "mlaad": ("fake/en/tts_models_en_ljspeech_glow-tts/meta.csv", "test"),
    "csv": ("mine.csv", "train"),
}
TABLES = {"in-the-wild": ",", "mlaad": "|", "csv": ","}


@pytest.fixture(params=LISTS)
def spoilt(request, tmp_path):
    """(name, root, subset, list): a tree and the list to be spoilt."""
    root = TREES[request.param](tmp_path)
    path, subset = LISTS[request.param]
    return request.param, root, subset, tmp_path / path


def test_wrong_columns_are_named(spoilt):
    name, root, subset, path = spoilt
    lines = path.read_text().splitlines()
    number = len(lines) + 1
    separator = TABLES.get(name, " ")
    path.write_text("\n".join([*lines, lines[-1] + separator + "more"]) + "\n")
    with pytest.raises(DataError, match=rf"{path.name}:{number}: expected the \d+ columns `?\w+.*; found \d+: '"):
        read_dataset(name, root, subset)
    if name in TABLES:
        path.write_text("\n".join([lines[0].replace("label", "class").replace("path", "file name"), *lines[1:]]))
        with pytest.raises(DataError, match=rf"{path.name}:1: expected the columns \S+.*; found "):
            read_dataset(name, root, subset)
        path.write_text("\n".join(lines) + f'\n"unfinished{separator}')
        with pytest.raises(DataError, match=rf"{path.name}:\d+: expected a line of a table; found: unexpected end"):
            read_dataset(name, root, subset)


@pytest.mark.parametrize("header", ["path,label,speakr", "path,label,path"], ids=["unknown", "twice"])
def test_columns_that_are_unknown_or_named_twice_are_named(tmp_path, header):
    text(tmp_path / "test.csv", f"{header}\na.wav,spoof,b.wav\n")
    with pytest.raises(DataError, match=rf"test\.csv:1: expected the columns path,label and .*; found {header}"):
        read_dataset("csv", tmp_path, "test")


def test_utterances_named_twice_are_named(spoilt):
    name, root, subset, path = spoilt
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, lines[1]]) + "\n")
    with pytest.raises(DataError, match=rf"{path.name}:{len(lines) + 1}: expected each utterance once; found '.*again"):
        read_dataset(name, root, subset)


@pytest.mark.parametrize("name", [name for name in LISTS if name != "mlaad"])
def test_unknown_labels_are_named(name, tmp_path):
    root = TREES[name](tmp_path)
    path, subset = tmp_path / LISTS[name][0], LISTS[name][1]
    lines = path.read_text().splitlines()
    lines[1] = lines[1].replace("spoof", "forged").replace("bonafide", "human")
    path.write_text("\n".join(lines))
    expected = rf"{path.name}:2: expected the label bona-?fide or spoof; found '(forged|human)'"
    with pytest.raises(DataError, match=expected):
        read_dataset(name, root, subset)


def test_empty_lists_are_named(spoilt):
    name, root, subset, path = spoilt
    header = path.read_text().splitlines()[0]
    path.write_text("")
    with pytest.raises(DataError, match=rf"{path.name}: expected (at least one|a) line"):
        read_dataset(name, root, subset)
    if name in TABLES:
        path.write_text(header)
        with pytest.raises(DataError, match=rf"{path.name}: expected (at least one line|lines whose column split)"):
            read_dataset(name, root, subset)


def test_lists_that_are_not_there_are_looked_for_by_name(spoilt):
    name, root, subset, path = spoilt
    path.unlink()
    with pytest.raises(
        DataError, match=rf"expected .*{path.name}.*; found (none of them|nothing there)|(meta|mine)\.csv: expected"
    ):
        read_dataset(name, root, subset)
    with pytest.raises(DataError, match=r"no such folder|nothing there"):
        read_dataset(name, root.parent / "absent", subset)


@pytest.mark.parametrize("name", [name for name in TREES if name != "for"])
def test_missing_audio_is_counted_and_named_unless_it_may_be_missing(name, tmp_path):
    root = TREES[name](tmp_path)
    whole = read_dataset(name, root, "test")
    whole[0].path.unlink()
    expected = rf"expected an audio file for each of {len(whole)} utterances; found none for 1, such as .*"
    with pytest.raises(AudioError, match=expected + rf"{whole[0].path.name} \(`gradalign data check {name}"):
        read_dataset(name, root, "test")
    if len(whole) > 1:
        assert read_dataset(name, root, "test", allow_missing=True) == whole
    for utterance in whole:
        utterance.path.unlink(missing_ok=True)
    # Where nothing is there, the folder is the wrong one.
    with pytest.raises(AudioError, match=rf"found none for {len(whole)}, such as"):
        read_dataset(name, root, "test", allow_missing=True)


def test_a_folder_of_audio_that_is_not_there_is_looked_for_by_name(tmp_path):
    asvspoof2021_df(tmp_path)
    for path in list(tmp_path.glob("ASVspoof2021_DF_eval_part0?")):
        path.rename(tmp_path / f"x{path.name}")
    for lenient in (False, True):
        with pytest.raises(AudioError, match=r"found none for \d+, such as .*/ASVspoof2021_DF_eval/flac/DF_E_"):
            read_dataset("asvspoof2021-df", tmp_path, "test", allow_missing=lenient)
    fake_or_real(tmp_path)
    for path in (tmp_path / "for-norm/testing/real").iterdir():
        path.unlink()
    (tmp_path / "for-norm/testing/real").rmdir()
    with pytest.raises(DataError, match=r"testing: expected audio files at real; found none of them"):
        read_dataset("for", tmp_path, "test")


def test_unknown_names_and_subsets_are_named(tmp_path):
    with pytest.raises(DataError, match=r"expected a data set among corpus, .*csv; found 'asvspoof'"):
        read_dataset("asvspoof", tmp_path, "train")
    with pytest.raises(
        DataError, match=r"asvspoof2021-la: expected a subset among test, progress, hidden; found 'train'"
    ):
        read_dataset("asvspoof2021-la", tmp_path, "train")
    asvspoof2021_la(tmp_path)
    text(tmp_path / "keys/LA/CM/trial_metadata.txt", KEYS_LA.replace("hidden", "secret"))
    with pytest.raises(DataError, match=r":4: expected a subset among eval, progress, hidden; found 'secret'"):
        read_dataset("asvspoof2021-la", tmp_path, "test")
    text(tmp_path / "keys/LA/ASV/trial_metadata.txt", "LA_0009 LA_E_1 alaw ita_tx bonafide target notrim secret\n")
    with pytest.raises(DataError, match=r"ASV/.*:1: expected a subset among eval, progress, hidden; found 'secret'"):
        datasets.read_asv_trials(tmp_path)
    text(tmp_path / "my.csv", "path,label,split\na.wav,spoof,train\nb.wav,spoof,valid\n")
    with pytest.raises(DataError, match=r"my\.csv:3: expected the split train, dev, test; found 'valid'"):
        read_dataset("csv", tmp_path / "my.csv", "train")
    with pytest.raises(DataError, match=r"my\.csv: expected lines whose column split is dev; found train, valid"):
        read_dataset("csv", tmp_path / "my.csv", "dev")


def test_mlaad_models_without_a_list_and_files_in_two_lists_are_named(tmp_path):
    (tmp_path / "fake").mkdir()
    with pytest.raises(DataError, match=r"fake: expected <language>/<model>/meta\.csv; found none"):
        read_dataset("mlaad", tmp_path, "test")
    mlaad(tmp_path)
    folder = tmp_path / "fake/en/new-model"
    folder.mkdir()
    with pytest.raises(
        DataError, match=r"new-model/meta\.csv: expected the list of a model's files; found nothing there"
    ):
        read_dataset("mlaad", tmp_path, "test")
    other = tmp_path / "fake/en/tts_models_en_ljspeech_glow-tts/meta.csv"
    text(folder / "meta.csv", other.read_text())
    with pytest.raises(DataError, match=r"expected each file in one list; found 'fake/en/tts_models.*new-model.*too"):
        read_dataset("mlaad", tmp_path, "test")


def test_a_list_with_damage_anywhere_is_read_or_named(spoilt):
    name, root, subset, path = spoilt
    rng = np.random.default_rng(7)
    whole = path.read_bytes()
    pieces = [b"", b'"', b"|", b",", b"\n", b" ", b"\0", b"\r", b"../", b"/", b"#", b"\xff", b"\xe2\x80\xa8"]
    for _ in range(40):
        start = rng.integers(len(whole))
        path.write_bytes(whole[:start] + pieces[rng.integers(len(pieces))] + whole[start + rng.integers(3) :])
        try:
            message, found = "", read_dataset(name, root, subset)
        except DataError as error:
            message, found = str(error), []
        assert all(u.path.exists() for u in found)
        assert str(root) in message or found


# ---- size ----------------------------------------------------------------------------------------------------------


def test_600_000_lines_are_indexed_in_under_10_s(tmp_path):
    count = 600_000
    kinds = ["bonafide bonafide -", *(f"A{17 + i} spoof -" for i in range(4))]
    ends = [f"M C{i % 12:02d} 3 E_0001465129 AC{i % 3 + 1} {kinds[i % 5]}\n" for i in range(60)]
    lines = (f"E_{i % 737:04d} E_{i:010d} {ends[i % 60]}" for i in range(count))
    text(tmp_path / "ASVspoof5.eval.track_1.tsv", "".join(lines))
    flac = tmp_path / "flac_E_eval"
    flac.mkdir()
    # Making 600,000 files takes longer than indexing them: a folder that lists as if it had them.
    listed = [f"E_{i:010d}.flac" for i in range(count)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.os, "listdir", lambda path: listed if Path(path) == flac else os.listdir(path))
        # Processor time: other processes of the machine do not count.
        began = time.process_time()
        utterances = read_dataset("asvspoof5", tmp_path, "test")
        seconds = time.process_time() - began
    assert len(utterances) == count
    assert utterances[7] == Utterance("E_0000000007", "E_0007", "A18", 0, "C07", flac / "E_0000000007.flac")
    assert sum(u.label for u in utterances) == count // 5
    assert seconds < 10


# ---- check ---------------------------------------------------------------------------------------------------------


def test_check_counts_what_is_there(tmp_path):
    asvspoof2021_df(tmp_path)
    report = check("asvspoof2021-df", tmp_path, progress=False)
    assert report.count_wrong == 0
    assert [s.subset for s in report.subsets] == ["test", "progress", "hidden"]
    test = report.subsets[0]
    assert test.labels == {"bonafide": 1, "spoof": 2}
    assert test.attacks == {"Task1-team20": 1, "Task2-team12": 1, "-": 1}
    assert test.codecs == {"low_m4a": 1, "mp3m4a": 2}
    assert test.speakers == {"TEF2": 1, "TGF1": 1, "LA_0043": 1}
    assert test.sample_rates == {16000: 3}
    assert test.hours == pytest.approx(0.3 / 3600)
    assert report.text().splitlines() == [
        f"asvspoof2021-df in {tmp_path}",
        "test: 3 utterances (1 bonafide, 2 spoof), 3 speakers, 0.00 h, 16000 Hz",
        "  attacks: Task1-team20 1, Task2-team12 1",
        "  codecs: low_m4a 1, mp3m4a 2",
        "progress: 1 utterances (1 spoof), 1 speakers, 0.00 h, 16000 Hz",
        "  attacks: A14",
        "  codecs: nocodec",
        "hidden: 1 utterances (1 spoof), 1 speakers, 0.00 h, 16000 Hz",
        "  attacks: A09",
        "  codecs: high_ogg",
        "nothing is wrong",
    ]


@pytest.mark.parametrize("suffix", [".flac", ".wav", ".mp3", ".ogg"])
def test_check_reads_all_forms_of_audio(tmp_path, suffix):
    names = [f"{i}{suffix}" for i in range(150)]
    first = audio(tmp_path / names[0], seconds=0.5, rate=8000)
    for name in names[1:]:
        (tmp_path / name).symlink_to(first)
    text(tmp_path / "mine.csv", "path,label\n" + "".join(f"{name},spoof\n" for name in names))
    report = check("csv", tmp_path / "mine.csv", decode=True, workers=3, progress=False)
    assert report.count_wrong == 0, report.text()
    assert report.subsets[0].hours == pytest.approx(150 * 0.5 / 3600)
    assert report.absent == ["train", "dev"]


def test_check_lists_what_is_wrong(tmp_path):
    lines = "".join(f"{i}.wav,s,spoof\n" for i in range(9))
    root = tmp_path / "release_in_the_wild"
    text(root / "meta.csv", "file,speaker,label\n" + lines)
    for i in range(8):
        audio(root / f"{i}.wav", rate=8000 if i == 5 else 16000, channels=2 if i == 6 else 1)
    audio(root / "1.wav", seconds=0)
    (root / "2.wav").write_bytes(b"no audio")
    (root / "3.wav").write_bytes((root / "3.wav").read_bytes()[:1000])
    report = check("in-the-wild", tmp_path, progress=False)
    wrong = report.subsets[0].wrong
    assert wrong["missing"] == [str(root / "8.wav")]
    assert [line.split(": expected ")[0] for line in wrong["unreadable"]] == [str(root / f"{i}.wav") for i in (1, 2, 3)]
    assert "at least one sample; found none" in wrong["unreadable"][0]
    assert "(a truncated file?)" in wrong["unreadable"][2]
    assert wrong["sample rate"] == [f"{root / '5.wav'}: expected 16000 Hz, as most have; found 8000 Hz"]
    assert report.subsets[0].sample_rates == {16000: 4, 8000: 1}
    assert report.subsets[0].channels == {1: 4, 2: 1}
    assert report.count_wrong == 5
    shown = report.text(limit=2).splitlines()
    assert shown[1:3] == [
        "test: 9 utterances (9 spoof), 1 speakers, 0.00 h, 8000 Hz 1, 16000 Hz 4",
        "  channels: 1 4, 2 1",
    ]
    assert [line for line in shown if "more" in line] == ["    ... and 1 more"]
    assert shown[-1] == "5 wrong"


def test_check_finds_truncated_files_of_good_header_when_it_decodes(tmp_path):
    corpus(tmp_path)
    path = tmp_path / "flac" / "dev_b.flac"
    path.write_bytes(path.read_bytes()[:-300])
    assert check("corpus", tmp_path, ["dev"], progress=False).count_wrong == 0
    report = check("corpus", tmp_path, ["dev"], decode=True, progress=False)
    assert [path.name in line for line in report.subsets[0].wrong["unreadable"]] == [True]


def test_check_finds_files_of_two_subsets_and_lists_that_are_wrong(tmp_path):
    corpus(tmp_path)
    text(tmp_path / "protocols/dev.txt", "p1 train_b - vits spoof\n")
    text(tmp_path / "protocols/test.txt", "p1 a b\n")
    report = check("corpus", tmp_path, progress=False)
    assert report.subsets[1].wrong == {"shared": [f"{tmp_path / 'flac' / 'train_b.flac'}: in train too"]}
    assert list(report.subsets[2].wrong) == ["list"]
    assert "test.txt:1: expected the 5 columns" in report.subsets[2].wrong["list"][0]
    text(tmp_path / "protocols/test.txt", "p1 train_a - - bonafide\n")
    report = check("corpus", tmp_path, progress=False)
    assert report.subsets[2].wrong == {"shared": [f"{tmp_path / 'flac' / 'train_a.flac'}: in train too"]}
    (tmp_path / "protocols/test.txt").unlink()
    report = check("corpus", tmp_path, progress=False)
    assert (report.absent, len(report.subsets)) == (["test"], 2)
    assert "test: not there" in report.text().splitlines()
    with pytest.raises(DataError, match=r"expected the train protocol at protocols/train\.txt; found no such folder"):
        check("corpus", tmp_path / "absent", progress=False)
    with pytest.raises(DataError, match=r"corpus: expected subsets among train, dev, test; found 'hidden'"):
        check("corpus", tmp_path, ["hidden"], progress=False)
    with pytest.raises(DataError, match="`workers` must be at least 1; found 0"):
        check("corpus", tmp_path, workers=0, progress=False)


def test_check_writes_a_manifest_and_verifies_it_later(tmp_path):
    asvspoof2019(tmp_path)
    manifest = tmp_path / "sums.sha256"
    check("asvspoof2019-la", tmp_path, ["dev"], manifest=manifest, progress=False)
    folder = tmp_path / "LA/ASVspoof2019_LA_dev/flac"
    assert manifest.read_text().splitlines() == [
        f"{sha256_of(folder / name)}  LA/ASVspoof2019_LA_dev/flac/{name}"
        for name in ("LA_D_1008730.flac", "LA_D_1047731.flac")
    ]
    assert check("asvspoof2019-la", tmp_path, manifest=manifest, progress=False).count_wrong == 0
    assert len(manifest.read_text().splitlines()) == 6
    assert not list(tmp_path.glob(".*"))
    before = manifest.read_text()
    audio(folder / "LA_D_1008730.flac", seconds=0.2)
    report = check("asvspoof2019-la", tmp_path, manifest=manifest, progress=False)
    assert [subset.wrong.get("content", []) for subset in report.subsets][0::2] == [[], []]
    assert "LA_D_1008730.flac: expected SHA-256 " in report.subsets[1].wrong["content"][0]
    assert manifest.read_text() == before
    manifest.write_text("what is this\n")
    with pytest.raises(DataError, match=r"sums\.sha256:1: expected `<SHA-256>  <path>`; found 'what is this'"):
        check("asvspoof2019-la", tmp_path, manifest=manifest, progress=False)


def test_a_manifest_names_files_from_the_folder_of_a_table(tmp_path):
    inside, outside = (audio(tmp_path / name, channels=2) for name in ("in/audio/a.wav", "out/b.wav"))
    text(tmp_path / "in/mine.csv", f"path,label\naudio/../audio/a.wav,spoof\n{outside},spoof\n")
    report = check("csv", tmp_path / "in/mine.csv", manifest=tmp_path / "sums", progress=False)
    sums = {f"{sha256_of(inside)}  audio/a.wav", f"{sha256_of(outside)}  {outside}"}
    assert set((tmp_path / "sums").read_text().splitlines()) == sums
    assert report.text().splitlines()[2:4] == ["  channels: 2", "  attacks: unknown"]
    assert "codecs" not in report.text()
    # Where the command puts it, and what it says of a file that is not as it was.
    command = ["data", "check", "csv", str(tmp_path / "in/mine.csv"), "--hash"]
    assert cli.main(command) == 0
    assert (tmp_path / "in/csv.sha256").read_text() == (tmp_path / "sums").read_text()
    audio(inside, seconds=0.2)
    assert cli.main(command) == 1


@pytest.mark.parametrize("form", ["{} *{}", "{}  ./{}", "{}  flac/../{}"])
def test_check_reads_the_lists_of_other_tools(tmp_path, form):
    corpus(tmp_path)
    manifest = tmp_path / "sums.sha256"
    files = sorted((tmp_path / "flac").iterdir())
    lines = [form.format(sha256_of(file), file.relative_to(tmp_path)) for file in files]
    text(manifest, "\r\n".join(lines) + "\r\n")
    before = manifest.read_bytes()
    assert check("corpus", tmp_path, manifest=manifest, progress=False).count_wrong == 0
    audio(files[0], seconds=0.2)
    report = check("corpus", tmp_path, manifest=manifest, progress=False)
    assert [list(subset.wrong) for subset in report.subsets] == [[], ["content"], []]
    assert manifest.read_bytes() == before
    text(manifest, f"{'0' * 64}  ./a\n{'1' * 64}  a\n")
    with pytest.raises(DataError, match=r"sums\.sha256:2: expected one SHA-256 for 'a'; found a second"):
        check("corpus", tmp_path, manifest=manifest, progress=False)
    manifest.unlink()
    manifest.mkdir()
    with pytest.raises(DataError, match=r"sums\.sha256: expected a list of SHA-256 sums; found a folder"):
        check("corpus", tmp_path, manifest=manifest, progress=False)


@pytest.mark.parametrize("odd", ["caf\udce9", "line\u2028separator", "next\x85line"])
def test_check_sums_files_of_any_name(tmp_path, odd):
    fake_or_real(tmp_path)
    file = audio(tmp_path / "for-norm/testing/real/new.wav").rename(tmp_path / f"for-norm/testing/real/{odd}.wav")
    manifest = tmp_path / "sums.sha256"
    for _ in range(2):
        assert check("for", tmp_path, manifest=manifest, progress=False).count_wrong == 0
    # The bytes of the name are those of the file system, as `sha256sum` writes them.
    assert os.fsencode(f"{sha256_of(file)}  {file.relative_to(tmp_path)}") in manifest.read_bytes().split(b"\n")
    file.write_bytes(file.read_bytes() + b"more")
    report = check("for", tmp_path, manifest=manifest, progress=False)
    assert report.count_wrong == 1
    report.text().encode()


def test_check_takes_eval_and_test_for_one_subset(tmp_path):
    corpus(tmp_path)
    report = check("corpus", tmp_path, ["test", "eval", "dev", "dev"], progress=False)
    assert [subset.subset for subset in report.subsets] == ["test", "dev"]
    assert report.absent == []
    assert report.count_wrong == 0
