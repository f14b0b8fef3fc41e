import csv
import io
import json

import numpy as np
import pytest

from gradalign import cli, evaluation, metrics
from gradalign._errors import DataError
from gradalign.data import Utterance

SCORES = "h1 - bonafide 2.5\nh2 - bonafide 0.5\ns1 A spoof -1\ns2 A spoof 1.0\ns3 B spoof -2e0\n"
PROTOCOL = "p1 h1 - - bonafide\np1 h2 - - bonafide\np2 s1 - A spoof\np2 s2 - A spoof\np2 s3 - B spoof\n"


@pytest.fixture
def files(tmp_path):
    (tmp_path / "scores.txt").write_text(SCORES)
    (tmp_path / "plain.txt").write_text(
        "".join(f"{line.split()[0]} {line.split()[3]}\n" for line in SCORES.splitlines())
    )
    (tmp_path / "protocol.txt").write_text(PROTOCOL)
    return tmp_path


def test_read_scores_gives_classes_and_attacks(files):
    scores = evaluation.read_scores(files / "scores.txt")
    bonafide, spoof = scores.split()
    assert bonafide.tolist() == [2.5, 0.5]
    assert spoof.tolist() == [-1.0, 1.0, -2.0]
    assert scores.split({"A"})[1].tolist() == scores.split("A")[1].tolist() == [-1.0, 1.0]
    assert len(scores.split("AB")[1]) == 0
    assert scores.attack_names() == ["A", "B"]
    assert len(scores) == 5


def test_protocol_labels_a_plain_score_file(files):
    plain = evaluation.read_scores(files / "plain.txt", files / "protocol.txt")
    full = evaluation.read_scores(files / "scores.txt")
    assert plain.attacks == full.attacks
    assert np.array_equal(plain.values, full.values)
    assert np.array_equal(plain.bonafide, full.bonafide)


@pytest.mark.parametrize("form", evaluation.FORMATS)
def test_every_format_is_read_as_it_was_written(files, form):
    scores = evaluation.read_scores(files / "scores.txt")
    evaluation.write_scores(files / "out.txt", scores, form)
    found = evaluation.read_scores(files / "out.txt", files / "protocol.txt")
    assert found.utterances == scores.utterances
    assert found.attacks == scores.attacks
    assert np.array_equal(found.bonafide, scores.bonafide)
    assert np.array_equal(found.values, scores.values)


def test_formats_are_those_of_the_challenges(files):
    scores = evaluation.read_scores(files / "scores.txt")
    first = {}
    for form in evaluation.FORMATS:
        evaluation.write_scores(files / "out.txt", scores, form)
        first[form] = (files / "out.txt").read_text().splitlines()[:2]
    assert first["2019"] == ["h1 - bonafide 2.5", "h2 - bonafide 0.5"]
    assert first["2021"] == ["h1 2.5", "h2 0.5"]
    assert first["5"] == ["filename\tcm-score", "h1\t2.5"]
    with pytest.raises(ValueError, match="format must be one of 2019, 2021, 5; found '2020'"):
        evaluation.write_scores(files / "out.txt", scores, "2020")


def test_bad_utterances_have_no_score():
    utterances = [Utterance("a", "p", "-", 1, "mp3"), Utterance("b", "q", "A", 0, "ogg")]
    scores = evaluation.Scores.of(utterances, np.array([np.nan, -1.5]))
    assert (scores.utterances, scores.attacks, scores.codecs, scores.speakers) == (["b"], ["A"], ["ogg"], ["q"])
    assert scores.values.tolist() == [-1.5]


@pytest.fixture
def many():
    """400 utterances of 8 speakers, 2 codecs and 2 attacks; speakers differ in how easy they are."""
    rng = np.random.default_rng(4)
    utterances, values = [], []
    for i in range(400):
        label, speaker = i % 2, i % 8 // 2
        codec = "-" if i < 20 else ("mp3", "ogg")[i % 3 == 0]
        speaker_name = f"s{speaker}{'h' if label else 'x'}"
        utterances.append(Utterance(f"u{i}", speaker_name, "-" if label else "AB"[i % 4 == 0], label, codec))
        values.append((1 if label else -1) + 0.7 * speaker + rng.normal())
    return utterances, np.array(values)


def test_codecs_are_told_apart_on_both_sides(many):
    utterances, values = many
    scores = evaluation.Scores.of(utterances, values)
    rows = evaluation.evaluate(scores, by="codec")
    assert [row["condition"] for row in rows] == ["all", "mp3", "ogg"]
    for row in rows[1:]:
        chosen = [u.codec == row["condition"] for u in utterances]
        label = np.array([u.label for u, c in zip(utterances, chosen, strict=True) if c], bool)
        assert row["eer"] == metrics.eer(values[chosen][label], values[chosen][~label])
        assert (row["bonafide"], row["spoof"]) == (label.sum(), (~label).sum())


def test_speakers_of_one_class_are_left_out(many):
    utterances, values = many
    scores = evaluation.Scores.of(utterances, values)
    assert [row["condition"] for row in evaluation.evaluate(scores, by="speaker")] == ["all"]
    assert evaluation.one_sided(scores, "speaker") == sorted({u.speaker for u in utterances})
    assert evaluation.one_sided(scores, "codec") == evaluation.one_sided(scores, None) == []


def test_intervals_are_over_speakers_where_they_are_known(many):
    utterances, values = many
    scores = evaluation.Scores.of(utterances, values)
    bonafide, spoof = scores.split()
    names = tuple([u.speaker for u in utterances if u.label == label] for label in (1, 0))
    row = evaluation.evaluate(scores, resamples=500)[0]
    assert (row["eer_low"], row["eer_high"]) == metrics.eer_interval(bonafide, spoof, 0.95, 500, clusters=names)
    alone = evaluation.Scores(scores.utterances, scores.attacks, scores.bonafide, scores.values)
    narrow = evaluation.evaluate(alone, resamples=500)[0]
    assert (narrow["eer_low"], narrow["eer_high"]) == metrics.eer_interval(bonafide, spoof, 0.95, 500)
    assert row["eer_high"] - row["eer_low"] > 1.5 * (narrow["eer_high"] - narrow["eer_low"])
    few = "speakers (so few that it is too narrow)"
    assert evaluation.drawn(scores) == evaluation.drawn(scores, "speaker") == few
    assert evaluation.drawn(alone) == "utterances"
    for count in (3, 11):
        for i in range(len(scores)):
            # Each speaker with both classes, alone in its row.
            scores.speakers[i] = f"s{i % count}"
        expected = few if count == 3 else "speakers"
        assert evaluation.drawn(scores) == expected
        apart = ", and of utterances in rows with fewer than two of them or an unknown one"
        assert evaluation.drawn(scores, "speaker") == expected + apart


def test_intervals_are_over_utterances_where_a_speaker_is_unknown(many):
    """All unknown speakers as one would be drawn together."""
    scores = evaluation.Scores.of(*many)
    bonafide, spoof = scores.split()
    for i in np.flatnonzero(~scores.bonafide):
        scores.speakers[i] = "-"
    row = evaluation.evaluate(scores, resamples=500)[0]
    assert (row["eer_low"], row["eer_high"]) == metrics.eer_interval(bonafide, spoof, 0.95, 500)
    assert evaluation.drawn(scores) == "utterances"


def test_what_the_scores_do_not_say_is_an_error(files):
    scores = evaluation.read_scores(files / "scores.txt")
    with pytest.raises(ValueError, match="--by codec: expected codec names from --dataset; found none"):
        evaluation.evaluate(scores, by="codec")
    with pytest.raises(ValueError, match="`by` must be None, 'attack', 'codec', 'speaker'; found 'sex'"):
        evaluation.evaluate(scores, by="sex")


def test_the_det_curve_is_a_picture(files, many):
    scores = evaluation.Scores.of(*many)
    # Speakers have one class only.
    for by in ("attack", "speaker"):
        evaluation.write_det(scores, files / f"{by}.png", by=by)
        assert (files / f"{by}.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"ends in \.png; found '.*det\.pdf'"):
        evaluation.write_det(scores, files / "det.pdf")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("h1 - bonafide\n", r"scores\.txt:1: expected `utterance attack label score`"),
        ("h1 - bonafide 1\nh2 - bonefide 1\n", r"scores\.txt:2: .*'h2 - bonefide 1'"),
        ("h1 - bonafide nan\n", r"scores\.txt:1: expected a finite score; found 'nan'"),
        ("h1 - bonafide x\n", r"scores\.txt:1: expected a finite score; found 'x'"),
        ("h1 - bonafide 1\nh1 - bonafide 2\n", r"scores\.txt:2: .*'h1' again"),
        ("h1 1.0\n", r"scores\.txt:1: .*--protocol"),
        ("\n", r"scores\.txt: expected at least one score; found none"),
    ],
)
def test_broken_score_files_are_named(tmp_path, text, message):
    (tmp_path / "scores.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        evaluation.read_scores(tmp_path / "scores.txt")


def test_binary_file_is_named(tmp_path):
    (tmp_path / "scores.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"scores\.txt: expected a text file"):
        evaluation.read_scores(tmp_path / "scores.txt")


def test_protocol_of_other_utterances_is_an_error(files):
    (files / "protocol.txt").write_text(PROTOCOL.replace("h2", "h9"))
    message = r"1 scores without a protocol line and 1 protocol lines without a score.*'h2' and 'h9'"
    with pytest.raises(DataError, match=message):
        evaluation.read_scores(files / "scores.txt", files / "protocol.txt")


def test_scores_of_other_subsets_only_are_an_error(files):
    known = [Utterance("h3", "p", "-", 1)]
    with pytest.raises(
        DataError, match=r"expected at least one score of this subset; found 5 of .* other subsets only"
    ):
        evaluation.read_scores(files / "scores.txt", known=known, others={"h1", "h2", "s1", "s2", "s3"})


def test_a_line_of_neither_form_is_named_with_both(files):
    (files / "plain.txt").write_text("h1,2.5\n")
    with pytest.raises(
        DataError, match=r"plain\.txt:1: expected .*bonafide or spoof, or `utterance score`; found 'h1,2"
    ):
        evaluation.read_scores(files / "plain.txt", files / "protocol.txt")


def test_inverted_scores_are_suspected(files, capsys):
    assert cli.main(["evaluate", str(files / "scores.txt")]) == 0
    assert "above 50%" not in capsys.readouterr().out
    (files / "scores.txt").write_text("h1 - bonafide -1\ns1 A spoof 1\n")
    assert cli.main(["evaluate", str(files / "scores.txt")]) == 0
    assert "An EER above 50%: are these scores higher for spoofed speech?" in capsys.readouterr().out


def test_protocol_that_contradicts_a_label_is_an_error(files):
    (files / "protocol.txt").write_text(PROTOCOL.replace("A spoof", "A bonafide", 1))
    with pytest.raises(DataError, match=r"scores\.txt:3: 's1' is spoof here and not so in .*protocol\.txt"):
        evaluation.read_scores(files / "scores.txt", files / "protocol.txt")


def test_protocol_with_a_typo_is_named(files):
    (files / "protocol.txt").write_text(PROTOCOL.replace("B spoof", "B spof"))
    with pytest.raises(DataError, match=r"protocol\.txt:5: expected .*found 'spof'"):
        evaluation.read_scores(files / "plain.txt", files / "protocol.txt")


def test_asv_rates_come_from_the_three_kinds_of_scores(tmp_path):
    rng = np.random.default_rng(0)
    kinds = {"target": rng.normal(2, 1, 300), "nontarget": rng.normal(-1, 1, 400), "spoof": rng.normal(0, 1, 200)}
    lines = [f"- {kind} {value:.17g}" for kind, values in kinds.items() for value in values]
    (tmp_path / "asv.txt").write_text("\n".join(lines))
    scores = evaluation.read_asv_scores(tmp_path / "asv.txt")
    assert scores.rates() == metrics.AsvRates.from_scores(**kinds)
    assert not any(scores.name_any(by, ["-", "A07"]) for by in ("attack", "codec", "speaker", None))


def test_asv_file_without_spoof_is_an_error(tmp_path):
    (tmp_path / "asv.txt").write_text("- target 1\n- nontarget 0\n")
    with pytest.raises(DataError, match=r"asv\.txt: .*found none of spoof"):
        evaluation.read_asv_scores(tmp_path / "asv.txt")


@pytest.fixture
def la2021(tmp_path):
    """Keys, detector and ASV scores as of ASVspoof 2021 LA: the root, the ASV trials and their scores."""
    rng = np.random.default_rng(2)
    phases, codecs, attacks = ("eval", "eval", "progress", "hidden"), ("none", "alaw"), ("A07", "A08")
    cm, scores, asv, values = [], [], [], []
    for i in range(160):
        attack, kind = ("bonafide", "bonafide") if i % 4 == 0 else (attacks[i % 3 % 2], "spoof")
        cm.append(f"LA_{i % 5} LA_E_{i} {codecs[i % 5 % 2]} loc_tx {attack} {kind} notrim {phases[i % 7 % 4]}")
        scores.append(f"LA_E_{i} {rng.normal(0.5 if kind == 'spoof' else 1):.6f}")
    for i in range(600):
        kind = ("target", "nontarget", "spoof")[i % 3]
        attack = attacks[i % 2] if kind == "spoof" else "bonafide"
        codec = codecs[i % 5 % 2]
        asv.append(
            f"LA_1-{codec}-x LA_E_{i // 2}-{codec}-x {codec} x {attack} {kind} notrim {phases[i % 7 % 4]}".split()
        )
        values.append(
            round(rng.normal({"target": 2, "nontarget": -1, "spoof": {"A07": 0.5, "A08": 2}.get(attack)}[kind]), 2)
        )
    for name, lines in (("CM", cm), ("ASV", [" ".join(trial) for trial in asv])):
        (tmp_path / "keys/LA" / name).mkdir(parents=True)
        (tmp_path / "keys/LA" / name / "trial_metadata.txt").write_text("\n".join(lines) + "\n")
    (tmp_path / "scores.txt").write_text("\n".join(scores) + "\n")
    rows = [f"{trial[0]} {trial[1]} {value}" for trial, value in zip(asv, values, strict=True)]
    (tmp_path / "asv.txt").write_text("\n".join(rows) + "\n")
    return tmp_path, asv, values


@pytest.mark.parametrize("subset", ["test", "progress", "hidden"])
@pytest.mark.parametrize("by", ["attack", "codec"])
def test_asv_scores_of_2021_are_decomposed_as_the_detectors(la2021, capsys, subset, by):
    """Like the official package: phase, attack and codec of each line are those of the same line of the keys."""
    root, trials, values = la2021
    data = ["--dataset", "asvspoof2021-la", "--root", str(root), "--subset", subset]
    command = ["evaluate", str(root / "scores.txt"), *data, "--by", by, "--asv-scores", str(root / "asv.txt")]
    assert cli.main([*command, "--csv"]) == 0
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert [row["condition"] for row in rows] == ["all", *(("A07", "A08") if by == "attack" else ("alaw", "none"))]
    keys = [line.split() for line in (root / "keys/LA/CM/trial_metadata.txt").read_text().splitlines()]
    detector = [float(line.split()[1]) for line in (root / "scores.txt").read_text().splitlines()]

    def chosen(lines, scores, kind, name):
        return [
            score
            for (_, _, codec, _, attack, found, _, phase), score in zip(lines, scores, strict=True)
            if found == kind
            and phase == {"test": "eval"}.get(subset, subset)
            and (name == "all" or name == (codec if by == "codec" else attack) or (by == "attack" and kind != "spoof"))
        ]

    for row in rows:
        asv = metrics.AsvRates.from_scores(
            *(chosen(trials, values, kind, row["condition"]) for kind in ("target", "nontarget", "spoof"))
        )
        bonafide, spoof = (chosen(keys, detector, kind, row["condition"]) for kind in ("bonafide", "spoof"))
        assert float(row["min_tdcf"]) == metrics.min_tdcf(bonafide, spoof, asv)
    assert cli.main(command) == 0
    assert f"; in each {by}'s row with its own." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda lines: lines[:-1],
            "of the 600 trials of .*; found 599 scores, and the end of the file instead of 'LA_E_299",
        ),
        (lambda lines: lines + lines[:1], "found 601 scores, and 'LA_E_0-none-x' in line 601 instead of the end"),
        (
            lambda lines: lines[:7] + lines[8:],
            "found 599 scores, and 'LA_E_4-alaw-x' in line 8 instead of 'LA_E_3-none-x'",
        ),
        (
            lambda lines: ["speaker trial score", *lines],
            r"asv\.txt:1: expected `speaker trial score` with a finite score",
        ),
        (
            lambda lines: [line.split(" ", 1)[1] for line in lines],
            r"asv\.txt:1: expected `speaker .*'LA_E_0-none-x [-.0-9]+'",
        ),
    ],
)
def test_asv_scores_of_other_trials_are_an_error(la2021, change, message):
    root, _, _ = la2021
    lines = (root / "asv.txt").read_text().splitlines()
    (root / "asv.txt").write_text("\n".join(change(lines)) + "\n")
    with pytest.raises(DataError, match=message):
        evaluation.read_asv_scores(root / "asv.txt", root)


def test_asv_scores_of_2021_need_their_keys(la2021):
    root, _, _ = la2021
    with pytest.raises(
        DataError, match=r"asv\.txt:1: .*or `speaker trial score` with --dataset asvspoof2021-la; found"
    ):
        evaluation.read_asv_scores(root / "asv.txt")
    with pytest.raises(DataError, match="expected a subset among test, progress, hidden; found 'dev'"):
        evaluation.read_asv_scores(root / "asv.txt", root, "dev")
    keys = root / "keys/LA/ASV/trial_metadata.txt"
    keys.write_text(keys.read_text().replace("A08 spoof notrim progress", "A08 spoof notrim eval"))
    evaluation.read_asv_scores(root / "asv.txt", root, "progress").rates("attack", "A07")
    keys.write_text(keys.read_text().replace("spoof notrim progress", "spoof notrim eval"))
    with pytest.raises(DataError, match=r"asv\.txt: .*found none of spoof in the subset progress"):
        evaluation.read_asv_scores(root / "asv.txt", root, "progress")
    keys.write_text(keys.read_text().replace(" target ", " bonafide ", 1))
    with pytest.raises(DataError, match=r"trial_metadata\.txt:1: expected a kind among target, .*; found 'bonafide'"):
        evaluation.read_asv_scores(root / "asv.txt", root)
    keys.unlink()
    with pytest.raises(DataError, match=r"ASV/trial_metadata\.txt: expected .*; found nothing there"):
        evaluation.read_asv_scores(root / "asv.txt", root)


@pytest.mark.parametrize(("options", "version"), [([], "2019"), (["--tdcf", "2021"], "2021")])
def test_the_tandem_dcf_of_a_2019_data_set_is_the_one_of_2019(tmp_path, capsys, options, version):
    protocol = tmp_path / "ASVspoof2019_LA_cm_protocols/ASVspoof2019.LA.cm.eval.trl.txt"
    protocol.parent.mkdir()
    protocol.write_text("p h1 - - bonafide\np h2 - - bonafide\nq s1 - A07 spoof\nq s2 - A08 spoof\n")
    (tmp_path / "scores.txt").write_text("h1 2\nh2 -1\ns1 1\ns2 -2\n")
    data = ["--dataset", "asvspoof2019-la", "--root", str(tmp_path)]
    rates = ["--asv-rates", "0.05,0.1,0.3"]
    assert cli.main(["evaluate", str(tmp_path / "scores.txt"), *data, *rates, *options, "--json"]) == 0
    expected = metrics.min_tdcf([2, -1], [1, -2], metrics.AsvRates(0.05, 0.1, 0.3), version)
    assert json.loads(capsys.readouterr().out)[0]["min_tdcf"] == expected


def test_an_attack_without_asv_scores_is_an_error(files):
    """Where they name no attack of the table, every row has the rates over all."""
    scores = evaluation.read_scores(files / "scores.txt")
    lines = "bonafide target 2\nbonafide target 0\nbonafide nontarget -1\nbonafide nontarget 1\nA spoof 3\nC spoof -3\n"
    (files / "asv.txt").write_text(lines)
    asv = evaluation.read_asv_scores(files / "asv.txt")
    assert asv.rates().p_fa_spoof == 0.5
    assert asv.rates("attack", "A").p_fa_spoof == 1
    with pytest.raises(ValueError, match="nontarget and spoof trials of the attack B; found none of spoof"):
        evaluation.evaluate(scores, by="attack", asv=asv)
    (files / "asv.txt").write_text(lines.replace("A spoof", "D spoof"))
    asv = evaluation.read_asv_scores(files / "asv.txt")
    assert evaluation.evaluate(scores, by="attack", asv=asv) == evaluation.evaluate(
        scores, by="attack", asv=asv.rates()
    )


def test_an_attack_that_the_asv_never_accepts_is_named(files):
    lines = "- target 2\n- target 0\n- nontarget -1\n- nontarget 1\nA spoof 3\nB spoof -3\n"
    (files / "asv.txt").write_text(lines)
    asv = evaluation.read_asv_scores(files / "asv.txt")
    with pytest.raises(ValueError, match=r"^attack B: these ASV error rates leave the detector no weight"):
        evaluation.evaluate(evaluation.read_scores(files / "scores.txt"), by="attack", asv=asv)


@pytest.mark.parametrize("line", ["- other 1", "target nontarget 1", "- target nan"])
def test_broken_asv_files_are_named(tmp_path, line):
    (tmp_path / "asv.txt").write_text(f"- target 1\n{line}\n")
    with pytest.raises(DataError, match=rf"asv\.txt:2: expected `attack kind score` with .*finite score.*'{line}'"):
        evaluation.read_asv_scores(tmp_path / "asv.txt")


def test_rows_per_attack_hold_the_metrics(files):
    scores = evaluation.read_scores(files / "scores.txt")
    rows = evaluation.evaluate(scores, by="attack", asv=metrics.AsvRates(0.05, 0.04, 0.3))
    assert [(r["condition"], r["bonafide"], r["spoof"]) for r in rows] == [("all", 2, 3), ("A", 2, 2), ("B", 2, 1)]
    for row, attack in zip(rows, [None, "A", "B"], strict=True):
        bonafide, spoof = scores.split(attack)
        assert row["eer"] == metrics.eer(bonafide, spoof)
        assert row["min_dcf"] == metrics.min_dcf(bonafide, spoof)
        assert row["act_dcf"] == metrics.act_dcf(bonafide, spoof)
        assert row["cllr"] == metrics.cllr(bonafide, spoof)
        assert row["min_tdcf"] == metrics.min_tdcf(
            bonafide, spoof, asv=metrics.AsvRates(0.05, 0.04, 0.3), version="2021"
        )


def test_one_class_alone_is_an_error(tmp_path):
    (tmp_path / "scores.txt").write_text("h1 - bonafide 1\n")
    with pytest.raises(ValueError, match="found 1 bona fide and 0 spoofed"):
        evaluation.evaluate(evaluation.read_scores(tmp_path / "scores.txt"))


def test_formats_hold_the_same_numbers():
    rows = [{"condition": "all", "bonafide": 2, "spoof": 3, "eer": 1 / 3, "min_dcf": 0.25}]
    assert json.loads(evaluation.format_json(rows)) == rows
    read = next(csv.DictReader(io.StringIO(evaluation.format_csv(rows))))
    assert float(read["eer"]) == 1 / 3
    heading, _, line = evaluation.format_table(rows).splitlines()
    assert heading.split() == ["condition", "bona", "fide", "spoof", "EER", "%", "min", "DCF"]
    assert line.split() == ["all", "2", "3", "33.33", "0.2500"]
