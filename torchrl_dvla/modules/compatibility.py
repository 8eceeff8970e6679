# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Does a policy fit an environment? Asked before any worker starts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torchrl.data.vla import ACTION_CHUNK_KEY, IMAGE_KEY, STATE_KEY
from torchrl.envs import EnvBase

from torchrl_dvla.modules.config import TransformersVLAConfig

__all__ = ["CompatibilityMixin", "require_compatible", "shapes_of"]


def shapes_of(env: EnvBase) -> dict[str, Any]:
    """Read what :func:`require_compatible` compares from an environment's specs.

    Args:
        env (EnvBase): an environment that speaks the canonical VLA schema.

    Returns:
        Those of ``chunk_size``, ``action_dim``, ``image_shape`` and ``state_dim`` the specs tell.

    Raises:
        ValueError: if the environment takes no action chunks.
    """
    try:
        chunk = env.full_action_spec_unbatched[ACTION_CHUNK_KEY]
    except KeyError:
        raise ValueError(
            f"env must take actions at {ACTION_CHUNK_KEY}, got action keys {env.action_keys}. "
            "Append MultiAction.from_vla() to the environment."
        ) from None
    observations = env.full_observation_spec_unbatched
    keys = set(observations.keys(True, True))
    shapes: dict[str, Any] = {"action_dim": chunk.shape[-1]}
    # MultiAction takes chunks of any size and says so with -1.
    if chunk.shape[-2] > 0:
        shapes["chunk_size"] = chunk.shape[-2]
    if IMAGE_KEY in keys:
        shapes["image_shape"] = tuple(observations[IMAGE_KEY].shape[-3:])
    if STATE_KEY in keys:
        shapes["state_dim"] = observations[STATE_KEY].shape[-1]
    return shapes


def require_compatible(
    *,
    policy: dict[str, Any],
    chunk_size: int | None = None,
    action_dim: int | None = None,
    image_shape: Sequence[int] | None = None,
    state_dim: int | None = None,
) -> None:
    """Compare a policy's sizes with an environment's; ``None`` is not compared.

    Keyword Args:
        policy (dict): the policy's ``chunk_size``, ``action_dim``, ``image_shape``, ``state_dim``.
        chunk_size (int, optional): env steps per decision.
        action_dim (int, optional): action dimension.
        image_shape (sequence of int, optional): ``(3, height, width)``.
        state_dim (int, optional): size of the proprioception vector.

    Raises:
        ValueError: if any differs; the message names each with its remedy.
    """
    remedies = {
        "chunk_size": "Set the environment's chunk_size, or train a policy for it.",
        "action_dim": "The policy was made for another robot or action space.",
        "image_shape": "Render at the policy's size (camera_height, camera_width).",
        "state_dim": "Use the proprioception keys the policy was trained with.",
    }
    given = {
        "chunk_size": chunk_size,
        "action_dim": action_dim,
        "image_shape": None if image_shape is None else tuple(image_shape),
        # A policy without proprioception does not care what the environment offers.
        "state_dim": state_dim if policy["state_dim"] else None,
    }
    problems = [
        f"{name} must be {policy[name]} as the policy's, got {value}. {remedies[name]}"
        for name, value in given.items()
        if value is not None and value != policy[name]
    ]
    if problems:
        raise ValueError(" ".join(problems))


class CompatibilityMixin(nn.Module):
    """Gives a policy with a config ``check_compatible``."""

    config: TransformersVLAConfig

    def check_compatible(
        self,
        env: EnvBase | None = None,
        *,
        chunk_size: int | None = None,
        action_dim: int | None = None,
        image_shape: Sequence[int] | None = None,
        state_dim: int | None = None,
    ) -> None:
        """Raise unless this policy fits an environment; what is not given is not compared.

        Args:
            env (EnvBase, optional): read the sizes from its specs.

        Keyword Args:
            chunk_size (int, optional): env steps per decision.
            action_dim (int, optional): action dimension.
            image_shape (sequence of int, optional): ``(3, height, width)``.
            state_dim (int, optional): size of the proprioception vector.

        Raises:
            ValueError: naming every size that differs, and what to do.

        Examples:
            >>> from torchrl_dvla.modules import TransformersVLA
            >>> policy = TransformersVLA.tiny(["lift the cup"], action_dim=7, chunk_size=8)
            >>> policy.check_compatible(chunk_size=8, action_dim=7, image_shape=(3, 128, 128))
            >>> policy.check_compatible(chunk_size=4)
            Traceback (most recent call last):
                ...
            ValueError: chunk_size must be 8 as the policy's, got 4. ...
        """
        given = {
            "chunk_size": chunk_size,
            "action_dim": action_dim,
            "image_shape": image_shape,
            "state_dim": state_dim,
        }
        sizes = {} if env is None else shapes_of(env)
        sizes.update({name: value for name, value in given.items() if value is not None})
        require_compatible(
            policy={
                "chunk_size": self.config.chunk_size,
                "action_dim": self.config.action_dim,
                "image_shape": (3, *self.config.image_size),
                "state_dim": self.config.state_dim,
            },
            **sizes,
        )
