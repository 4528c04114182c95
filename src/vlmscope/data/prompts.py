"""Prompt sets of the case studies: plain records, free of torch, so that Hydra can register them."""

from __future__ import annotations

from dataclasses import dataclass, field

from vlmscope.core.errors import UserError

WORDINGS = ("paper", "ours")


@dataclass
class PromptConfig:
    """One prompt of a set.

    Attributes:
        prompt: what the user says; the model's template adds the pictures' placeholders.
        images: in words, the pictures that it needs, in order; none for text alone.
        answer: the word that a right answer has, None where none is expected.
        contrast: the name of the prompt of the same set that it is compared with or patched from.
        wording: whose words these are, `paper` or `ours`.
    """

    prompt: str
    images: list[str] = field(default_factory=list)
    answer: str | None = None
    contrast: str | None = None
    wording: str = "ours"

    def __post_init__(self) -> None:
        if self.wording not in WORDINGS:
            raise UserError(f"prompts: wording {self.wording!r} of {self.prompt!r}; choose {' or '.join(WORDINGS)}")


@dataclass
class PromptSetConfig:
    """The prompts of one case study.

    Attributes:
        source: which case study of the paper (arXiv 2602.20330) it is for, and what is known of it.
        prompts: name -> prompt.
    """

    source: str
    prompts: dict[str, PromptConfig]

    def __post_init__(self) -> None:
        for name, prompt in self.prompts.items():
            if prompt.contrast is not None and (prompt.contrast == name or prompt.contrast not in self.prompts):
                others = ", ".join(other for other in self.prompts if other != name)
                raise UserError(f"prompts.{name}.contrast={prompt.contrast}: no other such prompt; choose {others}")
