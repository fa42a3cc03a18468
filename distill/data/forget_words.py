"""SFD's words to forget in prompts, and their replacements (distill/methods/wrappers/forget.py)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Words:
    """Words to forget and their replacements. Longer words are matched first, in upper or lower case.

    A word that begins or ends with a letter a-z or a digit matches there at a word boundary only.
    """

    forget: tuple[str, ...]
    override: tuple[str, ...]

    def validate(self) -> None:
        """ValueError if a replacement is missing, is empty or contains a word to forget."""
        held = [other for other in self.override if not other.strip() or self.pattern.search(other)]
        if len(self.forget) != len(self.override) or held or not all(word.strip() for word in self.forget):
            raise ValueError(
                f"--data.forget is {self.forget} and --data.override {self.override}: give one override for each, that "
                "says something and holds nothing that is to be forgotten"
            )

    @cached_property
    def order(self) -> list[int]:
        return sorted(range(len(self.forget)), key=lambda i: -len(self.forget[i]))

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        whole = lambda word: r"\b" * bool(re.match("[a-z0-9]", word[:1].lower()))  # \b is for scripts with spaces
        each = (f"({whole(w)}{re.escape(w)}{whole(w[::-1])})" for w in (self.forget[i] for i in self.order))
        return re.compile("|".join(each) or "(?!)", re.IGNORECASE)

    def replace_words(self, text: str) -> str | None:
        """The text with its words to forget replaced; None if it has none of them."""
        new = self.pattern.sub(lambda match: self.override[self._number(match)], text)
        return None if new == text else new

    def override_rows(self, texts: list[str], prompts: int, where: str) -> Tensor:
        """The row of the text that replaces each text, or its own row: int64 [len(texts)].

        texts: the prompts first. where: the source, for errors. ValueError if a word to forget is in no prompt, if a
        replaced prompt still holds one, or if a replaced prompt is not among the texts.
        """
        replaced = {i: other for i in range(prompts) if (other := self.replace_words(texts[i])) is not None}
        self._validate_replaced([texts[i] for i in replaced], list(replaced.values()), where)
        row = {text: i for i, text in enumerate(texts)}
        if absent := [other for other in replaced.values() if other not in row]:
            raise ValueError(
                f"{len(absent)} of {len(replaced)} prompts with other words in place of --data.forget {self.forget} "
                f"are not in {where}, {absent[0]!r} for one: write them beside the others and make it again"
            )
        rows = torch.arange(len(texts))
        rows[list(replaced)] = torch.tensor([row[other] for other in replaced.values()])
        return rows

    def _validate_replaced(self, originals: list[str], replaced: list[str], where: str) -> None:
        words = {self._word(match) for text in originals for match in self.pattern.finditer(text)}
        if absent := [word for word in self.forget if word not in words]:
            raise ValueError(f"no prompt of {where} holds {absent}, which --data.forget names: add some that do")
        if left := [other for other in replaced if self.pattern.search(other)]:
            raise ValueError(
                f"with other words in place of --data.forget, {left[0]!r} still holds one: change the prompt"
            )

    def _word(self, match: re.Match[str]) -> str:
        """The word to forget that was matched."""
        return self.forget[self._number(match)]

    def _number(self, match: re.Match[str]) -> int:
        return self.order[(match.lastindex or 1) - 1]
