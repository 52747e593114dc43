"""Apply the user's rules to all parameters of a model; the first match wins.

A rule that never applies is an error or a note, never silent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dist_layerlr.errors import ConfigError
from dist_layerlr.plan.entries import ParamInfo
from dist_layerlr.plan.names import ParamPath
from dist_layerlr.plan.patterns import compile_pattern, nearest


class Rules:
    """Rules with a ``match``, against names and names in the base model."""

    def __init__(self, infos: Sequence[ParamInfo], paths: Sequence[ParamPath]):
        self._infos = infos
        self._resolved = [path.base_name for path in paths]
        self.notes: list[str] = []
        """Rules that an earlier one hides, or that match frozen parameters only."""

    def first_match(self, rules: Sequence[Any], field: str) -> list[Any]:
        """For each parameter the first rule that matches it, or None.

        Raises:
            ConfigError: a rule that matches no parameter.
        """
        chosen: list[Any] = [None] * len(self._infos)
        for number, rule in enumerate(rules):
            path = f"{field}[{number}].match"
            hits = self.matching(rule.match, path)
            won = [i for i in hits if chosen[i] is None]
            for i in won:
                chosen[i] = rule
            if not won:
                self.notes.append(
                    f"{path}={rule.match!r} never applies: earlier rules take all that it matches"
                )
        return chosen

    def matching(self, pattern: str, path: str) -> list[int]:
        """Indices of the parameters that a pattern matches.

        Raises:
            ConfigError: the pattern matches no parameter.
        """
        matches = compile_pattern(pattern)
        both = zip(self._infos, self._resolved, strict=True)
        hits = [
            i for i, (info, resolved) in enumerate(both) if matches(info.name) or matches(resolved)
        ]
        if not hits:
            raise self._no_match(path, pattern)
        if not any(self._infos[i].trainable for i in hits):
            self.notes.append(f"{path}={pattern!r} matches frozen parameters only")
        return hits

    def _no_match(self, path: str, pattern: str) -> ConfigError:
        near = nearest(pattern, (i.name for i in self._infos))
        hint = (
            f" Nearest names: {', '.join(near)}."
            if near
            else f" The first name is {self._infos[0].name!r}."
        )
        return ConfigError(
            f"Invalid {path}={pattern!r}: it matches no parameter.{hint} "
            "A glob starts at the first segment; '*.' in front matches at any depth."
        )
