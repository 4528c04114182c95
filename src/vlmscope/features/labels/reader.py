"""The labels of a study as they are used: hand labels first, then of the automatic ones that of the surest score.

labels = Labels(StudyFolder("outputs/study/..."))
labels.of(FeatureId(5, 123)).text
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from vlmscope.core.artifacts import read_yaml
from vlmscope.core.errors import UserError
from vlmscope.core.ids import FeatureId
from vlmscope.features.labels.label import FOLDER, NONE, Label, read_labels
from vlmscope.features.study.records import StudyFolder

HAND = "hand.yaml"  # beside the sets; no task writes it


class Labels:
    """All labels of a study."""

    def __init__(self, study: StudyFolder, hand: str | Path | None = None) -> None:
        """Read every set of the study and the hand labels.

        Args:
            study: the study.
            hand: a YAML file `L5/123: text`; by default `labels/hand.yaml` of the study, if it is there.

        Raises:
            UserError: a file cannot be read, or names a feature that the study does not have.
        """
        self.study = study
        self.automatic: dict[FeatureId, Label] = {}
        for path in sorted((study.path / FOLDER).glob("*.parquet")):
            for feature, label in read_labels(path).items():
                if _rank(label) > _rank(self.automatic.get(feature, NONE)):
                    self.automatic[feature] = label
        path = Path(hand) if hand is not None else study.path / FOLDER / HAND
        self.hand = read_hand(path, study) if hand is not None or path.is_file() else {}

    def of(self, feature: FeatureId) -> Label:
        """The label of a feature; one without text when there is none.

        Raises:
            UserError: the study does not have the feature.
        """
        self.study.check(feature)
        return self.hand.get(feature) or self.automatic.get(feature, NONE)

    def all(self) -> dict[FeatureId, Label]:
        """Every label."""
        return {**self.automatic, **self.hand}

    def trusted(self) -> dict[FeatureId, Label]:
        """Hand labels, and those that beat chance."""
        return {feature: one for feature, one in self.all().items() if one.source == "hand" or one.beats_chance}

    def texts(self) -> dict[FeatureId, str]:
        """The trusted labels, each with its score."""
        return {feature: str(label) for feature, label in self.trusted().items()}


def read_hand(path: Path, study: StudyFolder) -> dict[FeatureId, Label]:
    """Read labels that a person wrote.

    Raises:
        UserError: the file cannot be read, or an entry is not `L<layer>/<index>: text` of the study's features.
    """
    body = read_yaml(path)
    if body is None:
        return {}
    if not isinstance(body, dict):
        raise UserError(f"{path}: it holds no labels; write a line such as 'L5/123: red planet' for each")
    found = {}
    for name, text in body.items():
        try:
            feature = FeatureId.parse(str(name))
            study.check(feature)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{path}: {name} has no text; write a line such as '{name}: red planet'")
        found[feature] = Label(" ".join(text.split()), "hand")
    return found


def labels_for(path: str | Path, model: str, n_features: Mapping[int, int] | None) -> Labels:
    """The labels of a study, for a model with its transcoders.

    Args:
        path: of the study.
        model: the model's name.
        n_features: of the transcoders, by layer; None where they are not known.

    Raises:
        UserError: the study is of another model or of other transcoders, or has no labels.
    """
    study = StudyFolder(path)
    check_same(study, model, n_features)
    found = Labels(study)
    if not found.all():
        raise UserError(f"{study.path} has no labels; run task=label study.path={path}")
    return found


def check_same(study: StudyFolder, model: str, n_features: Mapping[int, int] | None) -> None:
    """Refuse a study of another model or of other transcoders.

    Raises:
        UserError: it is.
    """
    if study.info.model != model:
        raise UserError(f"{study.path} is a study of the model {study.info.model}, not of {model}; give one of {model}")
    if n_features is not None and study.info.n_features != dict(n_features):
        raise UserError(
            f"{study.path} is a study of other transcoders ({_widths(study.info.n_features)}) than these "
            f"({_widths(n_features)}); run task=study with them"
        )


def _widths(n_features: Mapping[int, int]) -> str:
    return f"{len(n_features)} layers, {sum(n_features.values()):,} features"


def _rank(label: Label) -> tuple[bool, float]:
    return bool(label.text), -1.0 if label.low is None else label.low
