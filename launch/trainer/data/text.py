"""Text for language models: local files, cut into tokens by the model's own tokenizer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_layerlr import fields
from dist_layerlr.errors import ConfigError
from launch.trainer.cli import blame
from launch.trainer.objectives.causal_lm import IGNORED, LABELS

_SUFFIXES = (".txt", ".jsonl")
Document = tuple[str, Tensor]
"""Where it comes from, for messages, and its token ids, (N,) int32."""


class TextBlocks:
    """Documents as token ids. Satisfies ``Dataset``.

    A .txt file is one document, and each line of a .jsonl file is. With ``pack``, documents are
    put behind each other, an end-of-text token after each, and cut into blocks of ``length``; the
    rest that fills no block is left out. Positions begin anew in each document, and its first
    token, which nothing of it precedes, is not predicted. Without ``pack``, each line of a .txt
    file and of a .jsonl file is a sample of its own, of at most ``length`` tokens.

    All ids are in memory, 4 bytes each.

    Raises:
        ConfigError: a field is out of range, no such folder, or too little text.
        ModelSourceError: a file or tokenizer that cannot be read.
    """

    def __init__(
        self,
        files: str,
        tokenizer: str,
        length: int = 1024,
        pack: bool = True,
        field: str = "text",
    ) -> None:
        """Read and tokenize everything.

        Args:
            files: A .txt or .jsonl file, or a folder of them.
            tokenizer: Folder of the tokenizer, such as the model's.
            length: Tokens of a block, 2 or more.
            pack: Whether documents share blocks.
            field: Of a line of .jsonl: where its text is.
        """
        self._length = fields.integer(2)("data.length", length)
        self._pack, self._field = fields.boolean("data.pack", pack), field
        self._tokenizer = _load_tokenizer(tokenizer)
        if self._tokenizer.eos_token_id is None:
            raise ConfigError(
                f"Invalid data.tokenizer={tokenizer!r}: it has no end-of-text token (eos_token),"
                " which parts documents. Name one in its tokenizer_config.json."
            )
        documents = [self._cut(where, text) for where, text in self._texts(Path(files))]
        self._samples = self._packed(documents) if self._pack else self._single(documents)
        if not self._samples:
            tokens = sum(len(ids) for _, ids in documents)
            raise ConfigError(
                f"Invalid data.files={files!r}: {len(documents)} documents of {tokens} tokens fill"
                f" no sample of data.length={length}. Lower data.length, or add text."
            )

    @property
    def vocabulary(self) -> int:
        """Number of tokens that the tokenizer knows."""
        return len(self._tokenizer)

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self._samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return ``input_ids``, ``position_ids`` and ``labels``, each (L,) int64."""
        _, ids, positions = self._samples[index]
        tokens, places = ids.long(), positions.long()
        first = places == 0
        return {
            "input_ids": tokens,
            "position_ids": places,
            LABELS: tokens.masked_fill(first, IGNORED),
        }

    def name(self, index: int) -> str:
        """Return where the sample begins: file, and line of a .jsonl."""
        return self._samples[index][0]

    def key(self, index: int) -> str:
        """Return a digest of the sample's tokens: one file may be many samples."""
        return hashlib.sha256(self._samples[index][1].numpy().tobytes()).hexdigest()

    def _texts(self, root: Path) -> Iterator[tuple[str, str]]:
        """All documents in the order of their files' names."""
        files = sorted(path for path in root.rglob("*") if path.suffix in _SUFFIXES)
        if root.is_file():
            files = [root]
        if not files or root.is_file() and root.suffix not in _SUFFIXES:
            raise fields.invalid(
                "data.files", str(root), "a .txt or .jsonl file, or a folder of them"
            )
        for file in files:
            with blame(f"Cannot read {str(file)!r}", "it must be text in UTF-8"):
                text = file.read_text(encoding="utf-8")
            if file.suffix == ".jsonl":
                yield from self._lines(file, text)
            elif self._pack:
                yield file.name, text
            else:
                for number, line in enumerate(text.splitlines(), 1):
                    if line.strip():
                        yield f"{file.name}:{number}", line

    def _lines(self, file: Path, text: str) -> Iterator[tuple[str, str]]:
        # Not splitlines, which also parts at marks that JSON allows within a string.
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            where = f"{file.name}:{number}"
            allowed = f'needed: {{"{self._field}": "..."}} on each line (data.field)'
            with blame(f"Cannot read {str(file)!r}, line {number}", allowed):
                found = json.loads(line)[self._field]
                if not isinstance(found, str):
                    raise TypeError(f"{self._field} is no string")
            yield where, found

    def _cut(self, where: str, text: str) -> Document:
        """Token ids of a document and the end of text behind them."""
        # Special tokens are those of the tokenizer, such as Llama's at the beginning.
        ids: list[int] = self._tokenizer(text, verbose=False)["input_ids"]
        end = self._tokenizer.eos_token_id
        return where, torch.tensor(ids if ids[-1:] == [end] else [*ids, end], dtype=torch.int32)

    def _packed(self, documents: list[Document]) -> list[tuple[str, Tensor, Tensor]]:
        if not documents:
            return []
        ids = torch.cat([one for _, one in documents])
        places = torch.cat([torch.arange(len(one), dtype=torch.int32) for _, one in documents])
        starts = torch.tensor([len(one) for _, one in documents]).cumsum(0)
        found = []
        for first in range(0, len(ids) - self._length + 1, self._length):
            block = slice(first, first + self._length)
            inside = int(torch.searchsorted(starts, first, right=True))
            # A document that goes on from the block before begins at 0 here: what was before is
            # not seen, and models have no room for positions beyond their longest text.
            positions = places[block]
            begun = int((positions == 0).int().argmax()) if bool((positions == 0).any()) else None
            moved = positions.clone()
            moved[:begun] -= int(positions[0])
            found.append((documents[inside][0], ids[block], moved))
        return found

    def _single(self, documents: list[Document]) -> list[tuple[str, Tensor, Tensor]]:
        found = []
        for where, ids in documents:
            kept = ids[: self._length]
            if len(kept) > 1:
                found.append((where, kept, torch.arange(len(kept), dtype=torch.int32)))
        return found


def _load_tokenizer(folder: str) -> Any:
    from transformers import AutoTokenizer

    if not Path(folder).is_dir():
        raise fields.invalid("data.tokenizer", folder, "the folder of a tokenizer")
    with blame(f"Invalid data.tokenizer={folder!r}: no tokenizer can be read", "copy it again"):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
