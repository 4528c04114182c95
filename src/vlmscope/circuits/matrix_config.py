"""Settings of a matrix of concepts, each turned into each other: plain records, free of torch, for Hydra."""

from __future__ import annotations

from dataclasses import dataclass

from vlmscope.circuits.config import QuestionConfig
from vlmscope.core.errors import UserError


@dataclass
class ConceptMatrixConfig:
    """Every ordered pair of concepts: a circuit each, steered and patched on pictures that did not choose it.

    A question counts for a pair only if its two answers differ. What is done follows the `intervention` group.

    Attributes:
        concepts: their names; each is recipient and donor in turn.
        questions: name -> question; the first is also asked about third concepts.
        pictures: training pictures a concept.
        graphs: attribution graphs a concept and question.
        per_layer: features a layer, concept and question.
        test: unseen pictures a concept.
        third: of these, how many of each concept outside a pair show what the donor's circuit does to them.
        least: rightly answered pictures of a cell below which it is no result.
        alpha: false discovery rate over all cells.
        seed: of pictures and controls.
    """

    concepts: list[str]
    questions: dict[str, QuestionConfig]
    pictures: int = 24
    graphs: int = 2
    per_layer: int = 24
    test: int = 12
    third: int = 2
    least: int = 5
    alpha: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        where = f"concept_matrix.concepts={list(self.concepts)}"
        if len(self.concepts) < 2 or len(set(self.concepts)) < len(self.concepts):
            raise UserError(f"{where}: a matrix needs two or more different concepts")
        if not self.questions:
            raise UserError("concept_matrix.questions is empty: give at least one question")
        for name, question in self.questions.items():
            missing = [c for c in self.concepts if c not in question.answers]
            if missing:
                raise UserError(f"concept_matrix.questions.{name}.answers lacks {', '.join(missing)}")
        for key in ("pictures", "graphs", "per_layer", "test", "third", "least"):
            if getattr(self, key) < 1:
                raise UserError(f"concept_matrix.{key}={getattr(self, key)}: it must be at least 1")
        if self.least > self.test:
            raise UserError(f"concept_matrix.least={self.least} is more than concept_matrix.test={self.test} pictures")
        if not 0 < self.alpha < 1:
            raise UserError(f"concept_matrix.alpha={self.alpha}: it must lie between 0 and 1")
