"""Labels by contrast on planted features: what is known, what is proposed, that scores know chance; labels by hand."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from sklearn.metrics import roc_auc_score

from vlmscope.core.errors import UserError
from vlmscope.core.records import FeatureId
from vlmscope.core.study import StudyInfo, item_hash
from vlmscope.features.item_facts import ItemFacts, KnownItems, content_halves, content_of, known_items
from vlmscope.features.labels import (
    Detection,
    Label,
    Labels,
    Part,
    Predicate,
    Rule,
    detection,
    discoveries,
    labels_for,
    set_path,
    would_pass,
    write_labels,
)
from vlmscope.features.proposals import propose, score_rule
from vlmscope.features.study_files import EXAMPLE_TABLE, StudyFolder

PLANETS = ("mars", "earth", "venus", "saturn", "moon")
WORDS = ("mars", "colour", "how", "covers")
TOP, SAMPLES, N, F = 6, 40, 1200, 40


def empty_study(folder: Path, widths: dict[int, int], samples: int, items: int) -> StudyFolder:
    info = StudyInfo("planted", {}, widths, {}, {"samples": samples}, items, items, {})
    (folder / "study.json").write_text(json.dumps({"format": "vlmscope-study", "version": 1, **vars(info)}))
    return StudyFolder(folder)


class Planted:
    """Items with a planet (or none) and words.

    Feature 0 fires on mars, seen or said, 1 on earth or venus, 2 on questions about the colour of mars; the others at
    random, 39 on most items.
    """

    def __init__(self) -> None:
        rng = np.random.default_rng(3)
        ids = np.arange(N) * 256
        self.ids = ids[np.argsort(item_hash(ids))]
        planet = rng.integers(-1, len(PLANETS), N)
        said = rng.random((N, len(WORDS))) < 0.2
        names = (*(Predicate("planet", p) for p in PLANETS), *(Predicate("question", w) for w in WORDS))
        names = (*names, Predicate("about", "mars"))
        columns = [planet[:, None] == np.arange(len(PLANETS)), said, ((planet == 0) | said[:, 0])[:, None]]
        matrix = np.concatenate(columns, axis=1).astype(np.float32)
        half = (item_hash(self.ids) & 1).astype(bool)
        self.facts = ItemFacts(self.ids, half, names, matrix)
        fires = rng.random((N, F)) < np.linspace(0.05, 0.45, F)
        fires[:, 0] = (planet == 0) | said[:, 0]
        fires[:, 1] = (planet == 1) | (planet == 2)
        fires[:, 2] = (planet == 0) & said[:, 1]
        fires[:, 39] = rng.random(N) < 0.9
        self.activations = (fires * rng.uniform(0.1, 5, (N, F))).astype(np.float32)
        self.activations[:, 39] += 4 * fires[:, 39] * (planet == 3)

    def study(self, folder: Path) -> StudyFolder:
        """Only the head, and the layer's counts."""
        study = empty_study(folder, {0: F}, SAMPLES, N)
        counts = (self.activations > 0).sum(0)
        study.layer = lambda _layer: type("Counts", (), {"items_fired": counts})()  # type: ignore[method-assign,assignment]
        return study

    def examples(self) -> pa.Table:
        """By the definition of top examples and samples."""
        rows = []
        for feature in range(F):
            own = self.activations[:, feature]
            strongest = np.lexsort((self.ids, -own))[:TOP]
            drawn = np.flatnonzero(own > 0)[:SAMPLES]
            for group, places in (("top", strongest[own[strongest] > 0]), ("q1", drawn)):
                for rank, place in enumerate(places.tolist()):
                    peak = float(own[place])
                    rows.append((feature, group, rank, peak, int(self.ids[place]), 0, [0], [255]))
        columns = list(zip(*rows, strict=True))
        return pa.table(dict(zip(EXAMPLE_TABLE.names, columns, strict=True)), schema=EXAMPLE_TABLE)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Planted, KnownItems]:
    world = Planted()
    study = world.study(tmp_path_factory.mktemp("study"))
    return world, known_items(study, 0, world.examples(), world.facts)


def scored(score: Detection | None) -> Detection:
    assert score is not None
    return score


def test_detection_is_the_auroc_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    up, down = rng.integers(0, 3, 25) / 2, rng.integers(0, 3, 60) / 2
    found = scored(detection(up, down))
    assert found.score == pytest.approx(roc_auc_score(np.repeat([1, 0], [25, 60]), np.concatenate([up, down])))
    assert found.low < found.score < found.high
    assert detection(up, down[:0]) is None
    sure = scored(detection(np.ones(10), np.zeros(30)))
    assert sure.score == sure.balanced_accuracy == 1 and sure.low < 0.9 and sure.p < 1e-6


def test_discoveries_and_what_chance_would_pass_beside_them() -> None:
    p = np.array([0.001, 0.013, 0.012, 0.04, 0.5, np.nan])
    assert discoveries(p).tolist() == [True, True, True, True, False, False]
    assert not discoveries(np.full(20, 0.3)).any()
    p, chance = np.array([0.001, 0.02, 0.9]), np.array([0.02, 0.021, np.nan, 0.0])
    assert would_pass(p, np.array([True, True, False]), chance).tolist() == [True, False, False, True]
    assert not would_pass(p, np.zeros(3, bool), chance).any()


def test_where_a_feature_is_known_not_to_fire_it_does_not(planted: tuple[Planted, KnownItems]) -> None:
    world, known = planted
    for feature in range(F):
        rows, reach = known.rows(feature), known.reach[feature]
        drawn = known.item[rows][known.drawn[rows]]
        assert np.array_equal(np.sort(drawn), np.flatnonzero(world.activations[:reach, feature] > 0))
        assert len(drawn) == SAMPLES or reach == N
        assert len(set(known.item[rows].tolist())) == len(known.item[rows])
        strongest = known.item[rows][known.top[rows]]
        assert world.activations[strongest, feature].min() >= np.sort(world.activations[:, feature])[-TOP]
    assert known.strong.nonzero()[0].tolist() == [39]


@pytest.mark.parametrize(
    ("feature", "rule"),
    [
        (0, Rule((Part("about", ("mars",)),))),
        (1, Rule((Part("planet", ("earth", "venus")),))),
        (2, Rule((Part("question", ("colour",)), Part("planet", ("mars",))))),
    ],
)
def test_planted_rules_are_proposed_and_score_high(
    planted: tuple[Planted, KnownItems], feature: int, rule: Rule
) -> None:
    world, known = planted
    found = propose(world.facts, known, feature)
    assert found is not None
    assert {(p.key, frozenset(p.values)) for p in found.parts} == {(p.key, frozenset(p.values)) for p in rule.parts}
    score, top = score_rule(world.facts, known, feature, found)
    assert scored(score).score > 0.99 and top is not None and top > 0.99


def test_no_content_is_in_both_halves_and_none_scores_twice() -> None:
    """By content: neither the number of an item, nor its place, case or spaces, decide."""
    rows = [{"users": [], "assistants": [], "text": f"what is {n % 40} ?", "n_pictures": 0} for n in range(200)]
    rows += [{**row, "text": row["text"].upper().replace(" ", "  ")} for row in rows[:40]]
    rows += [
        {"users": ["what ?"], "assistants": [], "text": "", "n_pictures": 1, "digest": f"{n % 30:x}"} for n in range(60)
    ]
    contents = [content_of(row) for row in rows]
    assert len(set(contents)) == 70
    half, repeats = content_halves(contents)
    for content in set(contents):
        places = np.array([each == content for each in contents])
        assert len(set(half[places])) == 1 and (~repeats[places]).sum() == 1 and not repeats[places.argmax()]
    assert 20 < half[~repeats].sum() < 50
    order = np.random.default_rng(0).permutation(len(rows))
    assert np.array_equal(content_halves([contents[i] for i in order])[0], half[order])


def test_a_feature_without_meaning_gets_no_rule(planted: tuple[Planted, KnownItems]) -> None:
    world, known = planted
    assert sum(propose(world.facts, known, feature) is not None for feature in range(3, 39)) <= 4


def test_scores_of_shuffled_labels_are_chance(planted: tuple[Planted, KnownItems]) -> None:
    """The true rule, on the same activations dealt out to other items."""
    world, known = planted
    rng, rule = np.random.default_rng(5), Rule((Part("planet", ("earth", "venus")),))
    found = [score_rule(world.facts, known.shuffled(rng, N), 1, rule) for _ in range(200)]
    scores = np.array([scored(score).score for score, _ in found])
    assert scores.mean() == pytest.approx(0.5, abs=0.02) and (scores > 0.75).mean() < 0.02
    assert np.mean([top for _, top in found if top is not None]) == pytest.approx(0.5, abs=0.05)


def test_what_a_label_is_proposed_from_does_not_move_its_score(planted: tuple[Planted, KnownItems]) -> None:
    world, known = planted
    facts, rule = world.facts, Rule((Part("planet", ("earth", "venus")),))

    def turned(half: np.ndarray) -> ItemFacts:
        return replace(facts, matrix=np.where(half[:, None], 1 - facts.matrix, facts.matrix))

    assert score_rule(turned(~facts.half), known, 1, rule)[0] == scored(score_rule(facts, known, 1, rule)[0])
    proposed = propose(facts, known, 1)
    assert proposed is not None and propose(turned(facts.half), known, 1) == proposed


@pytest.fixture
def study(tmp_path: Path) -> StudyFolder:
    return empty_study(tmp_path, {0: 9}, 4, 10)


def _labelled(text: str, low: float) -> Label:
    return Label(text, "auto", "items", low + 0.1, low, low + 0.2, beats_chance=low > 0.5)


def test_hand_labels_win_and_survive_a_rerun(study: StudyFolder) -> None:
    one, other = FeatureId(0, 1), FeatureId(0, 2)
    write_labels(set_path(study.path, "auto"), [(one, _labelled("a", 0.6)), (other, _labelled("b", 0.4))])
    write_labels(set_path(study.path, "vlm"), [(one, _labelled("surer", 0.7)), (other, _labelled("worse", 0.3))])
    assert [Labels(study).of(feature).text for feature in (one, other)] == ["surer", "b"]
    assert Labels(study).texts() == {one: "surer (0.80)"}
    (study.path / "labels/hand.yaml").write_text("# mine\nL0/2: mars, seen or named\n")
    write_labels(set_path(study.path, "auto"), [(other, _labelled("new", 0.9))])
    found = Labels(study)
    assert str(found.of(other)) == "mars, seen or named" and found.of(other).source == "hand"
    assert not found.of(FeatureId(0, 3)).text
    assert labels_for(study.path, "planted", {0: 9}).texts()[other] == "mars, seen or named"


@pytest.mark.parametrize(
    ("text", "message"),
    [("L0/9: x", "no feature L0/9"), ("L7/1: x", "no layer 7"), ("5: x", "not a feature id"), ("L0/1:", "has no text"),
     ("- a", "holds no labels"), ("a: [", "not valid YAML")],
)  # fmt: skip
def test_a_wrong_hand_label_is_one_line(study: StudyFolder, text: str, message: str) -> None:
    path = study.path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        Labels(study, path)
    assert "mine.yaml" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("model", "width", "message"),
    [("other", 9, "of the model planted, not of other"), ("planted", 8, "other transcoders"),
     ("planted", 9, "no labels; run task=label")],
)  # fmt: skip
def test_labels_of_another_model_are_refused(study: StudyFolder, model: str, width: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        labels_for(study.path, model, {0: width})
