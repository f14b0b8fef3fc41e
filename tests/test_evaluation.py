import csv
import io
import json

import numpy as np
import pytest

from gradalign import evaluation, metrics
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
    evaluation.write_det(scores, files / "det.png", by="attack")
    assert (files / "det.png").read_bytes().startswith(b"\x89PNG")
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
    with pytest.raises(DataError, match=r"1 scores without a protocol line and 1 protocol lines without a score.*'h2'"):
        evaluation.read_scores(files / "scores.txt", files / "protocol.txt")


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
    assert evaluation.read_asv_rates(tmp_path / "asv.txt") == metrics.AsvRates.from_scores(**kinds)


def test_asv_file_without_spoof_is_an_error(tmp_path):
    (tmp_path / "asv.txt").write_text("- target 1\n- nontarget 0\n")
    with pytest.raises(DataError, match=r"asv\.txt: .*found none of spoof"):
        evaluation.read_asv_rates(tmp_path / "asv.txt")


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
