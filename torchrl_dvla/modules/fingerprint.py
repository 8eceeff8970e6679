# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Fingerprint of a policy: what it does with one made-up observation."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from tensordict import NonTensorStack, TensorDict
from torchrl.envs.utils import ExplorationType, set_exploration_type

from torchrl_dvla.differences import join_some
from torchrl_dvla.saved_state import Number, require_form

__all__ = ["check_fingerprint", "hash_weights", "take_fingerprint"]

#: Numbers of each kind that are kept.
_NUM_KEPT = 8
#: Largest difference, in units of the largest number, by the network's dtype: other machines add
#: up in another order.
_TOLERANCES = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.02}
_CHUNK = ("vla_action", "chunk")
_PATH, _PATH_STEP = ("vla_action", "path"), ("vla_action", "path_step")
_FORM = {"instruction": str, "actions": [Number()], "log_probs": [Number()]}


def take_fingerprint(policy: Any) -> dict[str, Any] | None:
    """First greedy actions and log-probabilities on a made-up observation.

    The log-probabilities are those of the greedy tokens, or of a made-up denoising path. Neither
    depends on the state of a random generator. Nothing of the policy changes.

    Args:
        policy (TransformersVLA or FlowVLA): the policy.

    Returns:
        Plain data for :func:`check_fingerprint`; ``None`` if the policy's numbers are not finite,
        and for one whose tokenizer knows no word.

    Examples:
        >>> from torchrl_dvla.modules import FlowVLA
        >>> from torchrl_dvla.modules.fingerprint import check_fingerprint, take_fingerprint
        >>> policy = FlowVLA.tiny(["lift the cup"], action_dim=2, chunk_size=4)
        >>> stored = take_fingerprint(policy)
        >>> sorted(stored), len(stored["actions"])
        (['actions', 'instruction', 'log_probs'], 8)
        >>> check_fingerprint(policy, stored, "cup")
    """
    instruction = _instruction(policy)
    if instruction is None:
        return None
    found = _numbers(policy, instruction)
    if not all(bool(torch.isfinite(torch.tensor(values)).all()) for values in found.values()):
        return None
    return {"instruction": instruction, **found}


def check_fingerprint(policy: Any, stored: Mapping[str, Any], source: str) -> None:
    """Compare a policy with its fingerprint.

    Args:
        policy (TransformersVLA or FlowVLA): the policy, in the dtype that it was saved in.
        stored (Mapping): what :func:`take_fingerprint` returned before.
        source (str): where it was found, for the error.

    Raises:
        ValueError: if the policy does something else now, with what differs.
    """
    require_form(_FORM, dict(stored), f"{source}.fingerprint")
    found = _numbers(policy, stored["instruction"])
    problems = []
    for name, values in found.items():
        expected = torch.tensor(stored[name], dtype=torch.float64)
        now = torch.tensor(values, dtype=torch.float64)
        if expected.shape != now.shape:
            problems.append(f"{name} has {len(now)} numbers instead of {len(expected)}")
            continue
        difference = float((now - expected).abs().max())
        scale = max(1.0, float(expected.abs().max()))
        if not difference <= _TOLERANCES[policy.config.dtype] * scale:
            problems.append(
                f"{name} differ by {difference:.3g}: {_short(now)} instead of {_short(expected)}"
            )
    if problems:
        raise ValueError(
            f"the policy in {source} must do what it did when it was saved, got other "
            f"{join_some(problems)}. The weights, the tokenizer or the version of transformers "
            "(or torch) is another one than then: use those that it was saved with."
        )


def hash_weights(policy: torch.nn.Module) -> str:
    """SHA-256 of all parameters and buffers, with their names, types and shapes.

    Args:
        policy (torch.nn.Module): without lazy parameters.

    Returns:
        64 hexadecimal digits, the same for equal weights on any device and machine.

    Examples:
        >>> layer = torch.nn.Linear(2, 1)
        >>> before = hash_weights(layer)
        >>> with torch.no_grad():
        ...     _ = layer.bias.add_(1)
        >>> before == hash_weights(layer)
        False
    """
    digest = hashlib.sha256()
    for name, entry in sorted(policy.state_dict().items()):
        if not isinstance(entry, torch.Tensor):  # what get_extra_state returned
            digest.update(f"{name} {entry!r}\n".encode())
            continue
        digest.update(f"{name} {entry.dtype} {list(entry.shape)}\n".encode())
        numbers = entry.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(numbers.numpy().data)
    return digest.hexdigest()


def _short(values: torch.Tensor) -> str:
    return f"[{', '.join(f'{value:.4g}' for value in values[:3].tolist())}, ...]"


def _instruction(policy: Any) -> str | None:
    """A few words that the policy's tokenizer knows."""
    words = "pick up the object and place it"
    tokenizer = policy.tokenizer
    unknown = tokenizer.unk_token_id
    ids = tokenizer(words, add_special_tokens=False)["input_ids"]
    if unknown is None or unknown not in ids:
        return words
    # Of words: the first of them that is no special token.
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    known = [word for word, _ in vocabulary if word.isalpha()]
    return " ".join(known[:4]) or None


@torch.no_grad()
def _numbers(policy: Any, instruction: str) -> dict[str, list[float]]:
    config = policy.config
    device = next(policy.parameters()).device
    generator = torch.Generator().manual_seed(0)
    shape = (1, 3, *config.image_size)
    images = [torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8) for _ in "ab"]
    observation = {"image": images[0]}
    if config.num_cameras == 2:
        observation["wrist_image"] = images[1]
    if config.state_dim:
        observation["state"] = torch.rand(1, config.state_dim, generator=generator) - 0.5
    td = TensorDict(
        {"observation": observation, "language_instruction": NonTensorStack(instruction)},
        batch_size=[1],
    ).to(device)
    was_training = policy.training
    policy.eval()
    try:
        actions, log_probs = _kind_of(policy)(policy, td, generator)
    finally:
        policy.train(was_training)
    kept = {"actions": actions, "log_probs": log_probs}
    return {
        name: [float(value) for value in values.double().flatten()[:_NUM_KEPT].tolist()]
        for name, values in kept.items()
    }


def _kind_of(policy: Any) -> Any:
    if policy.action_head == "continuous" and policy.get_dist is None:
        return lambda policy, td, _: (policy(td)[_CHUNK], td["vla_action", "log_probs"])
    return _of_tokens if hasattr(policy, "action_logits") else _of_flow


def _of_tokens(policy: Any, td: TensorDict, generator: torch.Generator) -> tuple[Any, Any]:
    """Of the network alone: temperature and modes of output belong to a run."""
    log_probs, tokens = policy.action_logits(td).log_softmax(-1).max(-1)
    return policy.action_tokenizer.decode(tokens), log_probs


def _of_flow(policy: Any, td: TensorDict, generator: torch.Generator) -> tuple[Any, Any]:
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        td = policy(td)
    path = td[_PATH]
    drawn = 0.1 * torch.randn(path.shape, generator=generator).to(path.device)
    td.set(_PATH, drawn)
    td.set(_PATH_STEP, torch.zeros_like(td[_PATH_STEP]))
    return td[_CHUNK], policy.get_dist(td).log_prob(drawn)
