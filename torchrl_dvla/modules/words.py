# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""A word-level tokenizer for policies that read a small, known set of instructions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["PAD_TOKEN", "UNKNOWN_TOKEN", "word_tokenizer"]

PAD_TOKEN = "<pad>"
UNKNOWN_TOKEN = "<unk>"


def word_tokenizer(instructions: Iterable[str]) -> PreTrainedTokenizerFast:
    """Build a tokenizer whose vocabulary is the words of some instructions.

    Words are lower-cased and split at white space and punctuation. Padding has id 0, unknown words
    have id 1, and known words follow in alphabetical order, so that the same set of instructions
    gives the same ids whatever its order.

    Args:
        instructions (iterable of str): the sentences to take words from.

    Returns:
        A ``transformers`` fast tokenizer that can be saved with a checkpoint.

    Raises:
        ValueError: if there is no word at all.

    Examples:
        >>> from torchrl_dvla.modules import word_tokenizer
        >>> tokenizer = word_tokenizer(["pick up the bowl", "Open the drawer"])
        >>> sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
        ['<pad>', '<unk>', 'bowl', 'drawer', 'open', 'pick', 'the', 'up']
        >>> tokenizer("pick up the mug")["input_ids"]
        [5, 7, 6, 1]
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    lowercase = normalizers.Lowercase()
    split = pre_tokenizers.Whitespace()
    words = {
        word
        for instruction in instructions
        for word, _ in split.pre_tokenize_str(lowercase.normalize_str(instruction))
    }
    if not words:
        raise ValueError(
            "instructions must contain at least one word, got none. Pass the task descriptions "
            "the policy will be asked to follow."
        )
    vocabulary = {PAD_TOKEN: 0, UNKNOWN_TOKEN: 1}
    for word in sorted(words):
        vocabulary[word] = len(vocabulary)
    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token=UNKNOWN_TOKEN))
    tokenizer.normalizer = lowercase
    tokenizer.pre_tokenizer = split
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        unk_token=UNKNOWN_TOKEN,
        model_input_names=["input_ids", "attention_mask"],
    )
