# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Prompt of a batch of instructions: token ids, positions and attention."""

from __future__ import annotations

import logging
import re
from collections import OrderedDict
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

    from torchrl_dvla.modules.backbones import PromptStyle, VLABackbone

__all__ = ["InstructionEncoder", "Prompt", "PromptBuilder", "word_tokenizer"]

_log = logging.getLogger("torchrl_dvla")

_PAD, _UNKNOWN = "<pad>", "<unk>"

#: Attention biases of more elements than this are built anew at each call.
_MAX_CACHED_BIAS = 2**16


class Prompt(NamedTuple):
    """Token ids, positions and attention bias of a batch of instructions.

    The stream is ``frame | instruction | padding | queries``. The *frame* (text around images,
    image features, proprioception) has one layout for all rows; the instruction is padded on the
    right to the longest of the batch.
    """

    #: Instruction token ids, int64 ``[B, L]``.
    token_ids: torch.Tensor
    #: Position of every stream token, int64 ``[axes, B, S]``.
    position_ids: torch.Tensor
    #: Added to attention scores, 0 or -inf, ``[B or 1, 1, S, S]``.
    attention_bias: torch.Tensor


class InstructionEncoder:
    """Token ids of instructions inside a template, with a cache.

    Args:
        tokenizer (PreTrainedTokenizerBase): turns text into ids.
        template (str): text with ``"{instruction}"`` for the task and, perhaps, ``"{state}"``.

    Keyword Args:
        lowercase (bool): whether the task is filled in in small letters.
        cache_size (int): number of distinct instructions cached.

    Examples:
        >>> from torchrl_dvla.modules.prompt import InstructionEncoder, word_tokenizer
        >>> encoder = InstructionEncoder(word_tokenizer(["lift the cup"]), "{instruction}")
        >>> encoder.instruction_ids("lift the cup")
        tensor([3, 4, 2])
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str,
        *,
        lowercase: bool = False,
        cache_size: int = 256,
    ) -> None:
        self._tokenizer = tokenizer
        self._lowercase = lowercase
        self._template = template
        self._cache_size = cache_size
        self._ids: OrderedDict[tuple[str, str], torch.Tensor] = OrderedDict()

    def _encode(self, text: str) -> torch.Tensor:
        if not text:
            return torch.empty(0, dtype=torch.int64)
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return torch.tensor(ids, dtype=torch.int64)

    def instruction_ids(self, instruction: str, state: str = "") -> torch.Tensor:
        """Token ids ``[L]`` of one instruction, and of a state in words, inside the template."""
        ids = self._ids.get((instruction, state))
        if ids is None:
            words = instruction.lower() if self._lowercase else instruction
            ids = self._encode(self._template.format(instruction=words, state=state))
            if len(ids) == 0:
                raise ValueError(
                    f"language_instruction must contain at least one token, got {instruction!r}. "
                    "Give every episode the description of its task."
                )
            self._check_words(instruction, ids)
            self._ids[instruction, state] = ids
            if len(self._ids) > self._cache_size:
                self._ids.popitem(last=False)
        return ids

    def _check_words(self, instruction: str, ids: torch.Tensor) -> None:
        """Say which words the tokenizer does not know, all one token to it; refuse only such."""
        unknown_id = self._tokenizer.unk_token_id
        if unknown_id is None or not (ids == unknown_id).any():
            return
        words = re.findall(r"\w+", instruction)
        unknown = [word for word in words if unknown_id in self._encode(word)]
        if words and unknown == words:
            raise ValueError(
                "language_instruction must have a word that the tokenizer knows, got "
                f"{instruction!r}. Build the policy for the instructions of its tasks."
            )
        if unknown:
            _log.warning(
                "The tokenizer does not know %s of %r: the policy cannot tell them apart.",
                ", ".join(map(repr, unknown)),
                instruction,
            )


class PromptBuilder(InstructionEncoder):
    """Builder of the :class:`Prompt` of a batch, with a cache.

    Who attends to whom:

    - a prompt token sees the prompt up to itself, or all of it if ``bidirectional``;
    - a query sees the whole prompt and every query: action tokens are decoded in parallel;
    - no token sees padding, and the prompt does not see the queries, if the family's does not.

    The positions of queries count from the end of their own instruction, so that a row does not
    depend on how long the others of its batch are.

    Nothing here depends on parameters, so results are kept: an episode asks for the same prompt
    hundreds of times.

    Args:
        backbone (VLABackbone): supplies position ids of images and the longest possible stream.
        tokenizer (PreTrainedTokenizerBase): turns instructions into ids.

    Keyword Args:
        style (PromptStyle): the strings around images and instruction.
        num_cameras (int): images per decision.
        use_state (bool): whether the frame ends in a proprioception token.
        num_queries (int): action queries at the end of the stream.
        bidirectional (bool): whether prompt tokens see later prompt tokens.
        cache_size (int): number of distinct batches, and of distinct instructions, cached.
    """

    def __init__(
        self,
        backbone: VLABackbone,
        tokenizer: PreTrainedTokenizerBase,
        *,
        style: PromptStyle,
        num_cameras: int,
        use_state: bool,
        num_queries: int,
        bidirectional: bool,
        cache_size: int = 256,
    ) -> None:
        super().__init__(
            tokenizer, style.instruction, lowercase=style.lowercase, cache_size=cache_size
        )
        self._num_queries = num_queries
        self._bidirectional = bidirectional
        self._sees_queries = backbone.prompt_sees_queries
        self._max_tokens = backbone.max_tokens
        self._prompts: OrderedDict[tuple, Prompt] = OrderedDict()

        #: Text ids before the first image, before each image and after each image.
        self.start_ids = self._encode(style.start)
        self.image_start_ids = self._encode(style.image_start)
        self.image_end_ids = self._encode(style.image_end)

        axes = backbone.num_position_axes
        pieces: list[torch.Tensor] = []
        position = backbone.first_position

        def text(length: int) -> None:
            nonlocal position
            pieces.append(torch.arange(position, position + length).expand(axes, -1))
            position += length

        text(len(self.start_ids))
        for _ in range(num_cameras):
            text(len(self.image_start_ids))
            image, position = backbone.image_positions(position)
            pieces.append(image)
            text(len(self.image_end_ids))
        text(int(use_state))
        self._frame_positions = torch.cat(pieces, -1)
        self._next_position = position

    @property
    def frame_length(self) -> int:
        """Number of stream tokens before the instruction."""
        return self._frame_positions.shape[-1]

    def __call__(
        self, instructions: list[str], *, device: torch.device, dtype: torch.dtype
    ) -> Prompt:
        """The prompt of a batch.

        Args:
            instructions (list of str): ``B`` instructions.

        Keyword Args:
            device (torch.device): where the tensors are wanted.
            dtype (torch.dtype): dtype of the attention bias, that of the language model.

        Returns:
            The :class:`Prompt` of the batch.

        Raises:
            ValueError: if an instruction is empty, the tokenizer knows none of its words, or the
                stream is too long for the backbone.
        """
        key = (*instructions, device, dtype)
        prompt = self._prompts.get(key)
        if prompt is None:
            prompt = self._build(instructions, dtype)
            prompt = Prompt(*(tensor.to(device) for tensor in prompt))
            # Batches of the serving path are small and come again; those of a shuffled learner are
            # neither, and their masks would fill memory.
            if prompt.attention_bias.numel() <= _MAX_CACHED_BIAS:
                self._prompts[key] = prompt
                if len(self._prompts) > self._cache_size:
                    self._prompts.popitem(last=False)
        return prompt

    def _build(self, instructions: list[str], dtype: torch.dtype) -> Prompt:
        rows = [self.instruction_ids(instruction) for instruction in instructions]
        lengths = torch.tensor([len(row) for row in rows])
        token_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        text_length = token_ids.shape[1]
        prompt_length = self.frame_length + text_length
        num_tokens = prompt_length + self._num_queries
        if num_tokens > self._max_tokens:
            raise ValueError(
                f"the stream must not exceed the {self._max_tokens} tokens the backbone attends "
                f"to, got {num_tokens}. Use fewer cameras, a smaller image or a shorter chunk."
            )

        batch = len(rows)
        axes = self._frame_positions.shape[0]
        text = self._next_position + torch.arange(text_length).expand(batch, -1)
        queries = self._next_position + lengths[:, None] + torch.arange(self._num_queries)
        position_ids = torch.cat(
            [
                self._frame_positions[:, None].expand(-1, batch, -1),
                text.expand(axes, -1, -1),
                queries.expand(axes, -1, -1),
            ],
            -1,
        )

        visible = torch.ones(num_tokens, num_tokens, dtype=torch.bool)
        if not self._bidirectional:
            visible[:prompt_length, :prompt_length].tril_()
        visible[:prompt_length, prompt_length:] = self._sees_queries
        visible = visible.expand(batch if lengths.min() < text_length else 1, 1, -1, -1)
        if len(visible) > 1:
            column = torch.arange(num_tokens)
            padding = (column >= self.frame_length + lengths[:, None]) & (column < prompt_length)
            # Every row sees the frame at least: no softmax over nothing, hence no NaN.
            visible = visible & ~padding[:, None, None, :]
        bias = torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, -torch.inf)
        return Prompt(token_ids, position_ids, bias)


def word_tokenizer(instructions: Iterable[str]) -> PreTrainedTokenizerFast:
    """Word-level tokenizer whose vocabulary is the words of some instructions.

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
    vocabulary = {_PAD: 0, _UNKNOWN: 1}
    for word in sorted(words):
        vocabulary[word] = len(vocabulary)
    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token=_UNKNOWN))
    tokenizer.normalizer = lowercase
    tokenizer.pre_tokenizer = split
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=_PAD,
        unk_token=_UNKNOWN,
        model_input_names=["input_ids", "attention_mask"],
    )
