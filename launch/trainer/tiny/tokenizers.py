"""Tokenizers of the pipelines' own classes, their vocabularies learnt on the spot.

A vocabulary is learnt from the templates that a pipeline puts around a prompt, so that a word of a
template is one token, as it is in the published vocabularies: a pipeline that drops the first 34
tokens then drops the template and no more. What no merge covers is spelled by character or byte, so
that any caption has ids of its own.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)
"""How Qwen's models are asked."""
INSTRUCT = (
    "<s>{% for message in messages %}"
    "{% if message['role'] == 'system' %}[SYSTEM_PROMPT]{% else %}[INST]{% endif %}"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}"
    "{% if message['role'] == 'system' %}[/SYSTEM_PROMPT]{% else %}[/INST]{% endif %}{% endfor %}"
)
"""How Mistral's models are asked, in the processor's form: a message is a list of parts."""


def clip_tokenizer(pad_token: str = "<|endoftext|>") -> Any:
    """Bytes and bytes at a word's end, without merges."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    ends = [f"{letter}</w>" for letter in letters]
    vocab = {token: i for i, token in enumerate([*letters, *ends])}
    # The end of text has the highest id: older classes of CLIP find it by that.
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocab[special] = len(vocab)
    return CLIPTokenizer(vocab=vocab, merges=[], pad_token=pad_token, model_max_length=77)


def t5_tokenizer() -> Any:
    """Pieces of one printable character; others are unknown."""
    from transformers import T5Tokenizer

    pieces = ["<pad>", "</s>", "<unk>", "▁", *map(chr, range(33, 127))]
    # A piece without its own score would never be chosen by the unigram model.
    vocab = [(piece, 0.0 if i < 3 else -2.0) for i, piece in enumerate(pieces)]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=512)


def qwen_tokenizer(texts: Sequence[str]) -> Any:
    """Bytes and the words of the texts, with a chat template."""
    from transformers import Qwen2Tokenizer

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    words = ["user assistant system", *texts]
    vocab, merges = _learnt(Qwen2Tokenizer().backend_tokenizer, words, specials)
    return Qwen2Tokenizer(
        vocab=vocab,
        merges=merges,
        extra_special_tokens=specials[1:],
        chat_template=_CHATML,
        model_max_length=2048,
    )


def instruct_tokenizer(texts: Sequence[str]) -> Any:
    """As Mistral's: bytes and the words of the texts, padded on the left."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

    marks = ["[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]"]
    specials = ["<s>", "</s>", "<pad>", *marks, "[IMG]", "[IMG_BREAK]", "[IMG_END]"]
    # Byte-level words, as the published file has them.
    backend: Tokenizer = Qwen2Tokenizer().backend_tokenizer
    _learnt(backend, texts, specials)
    kinds = ("bos_token", "eos_token", "pad_token")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **dict(zip(kinds, specials, strict=False)),
        extra_special_tokens=specials[3:],
        padding_side="left",
        model_max_length=2048,
    )


def gemma_tokenizer(texts: Sequence[str]) -> Any:
    """Characters and the words of the texts, spaces written as ▁."""
    from transformers import GemmaTokenizer

    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    vocab, merges = _spelled(texts, specials)
    return GemmaTokenizer(vocab=vocab, merges=merges, add_bos_token=True, model_max_length=1024)


def llama_tokenizer(texts: Sequence[str]) -> Any:
    """As Gemma's, with the marks of Llama 3's templates, padded on the right."""
    from transformers import LlamaTokenizerFast

    marks = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    vocab, merges = _spelled(texts, ["<unk>", "<s>", "</s>", *marks])
    return LlamaTokenizerFast(
        vocab=vocab,
        merges=merges,
        add_bos_token=True,
        pad_token="</s>",
        extra_special_tokens=marks,
        # The network's mask is of the leading tokens; the class would pad on the left.
        padding_side="right",
    )


def _spelled(
    texts: Sequence[str], specials: Sequence[str]
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Learn words with a leading ▁; bytes stand for what is not ASCII."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.BPE(byte_fallback=True))
    # Digits and line breaks are tokens of their own, as in Llama's vocabulary: so many tokens the
    # pipeline drops.
    cuts = [
        pre_tokenizers.Metaspace(),
        pre_tokenizers.Punctuation(),
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.Split(Regex(r"\n+"), "isolated"),
    ]
    backend.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    spelled = [f"<0x{byte:02X}>" for byte in range(256)]
    return _learnt(backend, texts, [*specials, *spelled], ["▁", "\n", *map(chr, range(33, 127))])


def _learnt(
    backend: Any, texts: Sequence[str], specials: Sequence[str], letters: Sequence[str] = ()
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Train byte-pair merges until every word of the texts is one token."""
    from tokenizers import pre_tokenizers, trainers

    trainer = trainers.BpeTrainer(
        vocab_size=100_000,
        show_progress=False,
        special_tokens=list(specials),
        initial_alphabet=list(letters) or pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(texts, trainer)
    model = json.loads(backend.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]
