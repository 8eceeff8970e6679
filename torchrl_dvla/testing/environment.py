# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""An environment with known answers, at decision level and nearly free of cost."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from tensordict import NonTensorData, TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.data import Bounded, Categorical, Composite, NonTensor, Unbounded
from torchrl.data.vla import ActionTokenizerBase
from torchrl.envs import EnvBase

from torchrl_dvla.data import schema
from torchrl_dvla.testing.device import Latency

__all__ = ["CountingChunkEnv", "CountingOracle", "Scene"]

LengthLaw = Literal["fixed", "heavy_tailed"]
#: Shape of the Pareto law of episode lengths: finite mean, infinite variance.
_TAIL_INDEX = 1.5


@dataclass(frozen=True)
class Scene:
    """What an initial state of :class:`CountingChunkEnv` fixes.

    Args:
        scene_id (int): shown in the first image channel, ``0 <= scene_id < 256``.
        target (tuple of float): the direction to push in, each ``+1`` or ``-1``; ``A`` of them.
        num_env_steps (int): the episode's time limit.
    """

    scene_id: int
    target: tuple[float, ...]
    num_env_steps: int


class CountingChunkEnv(EnvBase):
    """Counts the env steps whose action points the right way; enough of them are a success.

    A scene hides nothing: the state shows a target direction ``[A]`` of signs. An env step is
    *right* if its action has a positive inner product with the target. The episode succeeds, and
    with *stop_on_success* ends, once ``required_fraction`` of the scene's time limit were right
    steps; at the time limit it is truncated. Independent coin flips succeed now and then, a policy
    that has learned to read the signs always, :class:`CountingOracle` in the fewest decisions. With
    ``action_dim=1, max_env_steps=8`` a small policy learns it in ten updates of 64 episodes.

    One :meth:`step` is one decision: up to ``chunk_size`` env steps, fewer at the episode's end,
    the others being marked in ``("next", "action_is_pad")`` ``[chunk_size]``. Everything that comes
    out can be worked out by hand: the state is
    ``[*target, env steps done / limit, right steps / limit]``, and the image is filled, channel by
    channel, with the scene's number, the number of decisions and the count of right steps, so that
    a row that was mixed up betrays itself (:meth:`expected_image`).

    The scene depends on the seed, on ``"init_state_id"`` in the reset tensordict (``-1`` or absent:
    on the number of resets since :meth:`set_seed` instead) and on nothing else (:meth:`scene`): a
    group shares it by passing the same seed and id.

    Keyword Args:
        action_dim (int): ``A``. Defaults to ``2``.
        chunk_size (int): env steps per decision. Defaults to ``4``.
        max_env_steps (int): longest time limit. Defaults to ``16``.
        length (str): ``"fixed"`` (every limit is *max_env_steps*) or ``"heavy_tailed"`` (Pareto,
            from a quarter of it, cut at *max_env_steps*). Defaults to ``"fixed"``.
        required_fraction (float): in ``(0, 1]``. Defaults to ``0.6``.
        stop_on_success (bool): whether success ends the episode. Without it the length does not
            depend on the policy. Defaults to ``True``.
        image_size (tuple of int): height and width. Defaults to ``(16, 16)``.
        instruction (str): given back in every observation.
        step_latency_s (float or Latency): time a decision takes, without holding a core or the GIL.
            Defaults to ``0.0``, no wait at all.
        seed (int, optional): as for :meth:`set_seed`. Defaults to ``0``.

    Raises:
        ValueError: for a number out of range.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> env = CountingChunkEnv(chunk_size=4, max_env_steps=10)
        >>> reset = env.reset(TensorDict({"init_state_id": torch.tensor([3])}))
        >>> env.rollout(10, CountingOracle(env), auto_reset=False, tensordict=reset)["next"][
        ...     "action_is_pad"].tolist()
        [[False, False, False, False], [False, False, True, True]]
    """

    def __init__(
        self,
        *,
        action_dim: int = 2,
        chunk_size: int = 4,
        max_env_steps: int = 16,
        length: LengthLaw = "fixed",
        required_fraction: float = 0.6,
        stop_on_success: bool = True,
        image_size: tuple[int, int] = (16, 16),
        instruction: str = "push the way the arrow points",
        step_latency_s: float | Latency = 0.0,
        seed: int | None = 0,
    ) -> None:
        if min(action_dim, chunk_size, max_env_steps, *image_size) < 1:
            raise ValueError(
                "action_dim, chunk_size, max_env_steps and image_size must be positive, got "
                f"{action_dim}, {chunk_size}, {max_env_steps} and {image_size}. "
                "An episode has at least one env step."
            )
        if length not in get_args(LengthLaw):
            raise ValueError(
                f"length must be one of {list(get_args(LengthLaw))}, got {length!r}. "
                "'fixed' makes every time limit max_env_steps."
            )
        if not 0 < required_fraction <= 1:
            raise ValueError(
                f"required_fraction must be in (0, 1], got {required_fraction}. No policy can be "
                "right more often than always."
            )
        super().__init__(batch_size=torch.Size([]))
        self.action_dim = action_dim
        self.chunk_size = chunk_size
        self.max_env_steps = max_env_steps
        self.length = length
        self.required_fraction = required_fraction
        self.stop_on_success = stop_on_success
        self.image_size = image_size
        self.instruction = instruction
        self.latency: Latency | None = None
        if isinstance(step_latency_s, Latency):
            self.latency = step_latency_s
        elif step_latency_s > 0:
            self.latency = Latency(step_latency_s)
        self._make_specs()
        # Wrapped once: a tensordict takes 40 us to wrap a bare string, most of a decision's cost.
        self._instruction = NonTensorData(instruction)
        # All masks a decision can end with, so that a step only picks one.
        steps = torch.arange(chunk_size)
        self._pads = [steps >= executed for executed in range(chunk_size + 1)]
        self._flags = (torch.zeros(1, dtype=torch.bool), torch.ones(1, dtype=torch.bool))
        self._seed, self._num_resets = 0, 0
        self._init_state_id = torch.tensor([-1])
        self._set_seed(seed)
        self._begin(self.scene(self._seed))

    def _make_specs(self) -> None:
        height, width = self.image_size
        flag = Categorical(2, dtype=torch.bool, shape=(1,))
        init_state_id = Unbounded(shape=(1,), dtype=torch.int64)
        self.observation_spec = Composite(
            {
                "observation": Composite(
                    image=Unbounded(shape=(3, height, width), dtype=torch.uint8),
                    state=Unbounded(shape=(self.action_dim + 2,)),
                ),
                schema.INSTRUCTION_KEY: NonTensor(shape=(), example_data=self.instruction),
                "success": flag.clone(),
                schema.ACTION_IS_PAD_KEY: Categorical(
                    2, dtype=torch.bool, shape=(self.chunk_size,)
                ),
                schema.INIT_STATE_ID_KEY: init_state_id.clone(),
            }
        )
        group, leaf = schema.ACTION_CHUNK_KEY
        chunk = Bounded(-1.0, 1.0, shape=(self.chunk_size, self.action_dim))
        self.full_action_spec = Composite({group: Composite({leaf: chunk})})
        self.reward_spec = Unbounded(shape=(1,))
        self.state_spec = Composite({schema.INIT_STATE_ID_KEY: init_state_id})
        self.full_done_spec = Composite(
            {name: flag.clone() for name in ("done", "terminated", "truncated")}
        )

    # -- the known answers -----------------------------------------------------------------------
    def scene(self, seed: int, init_state_id: int = -1, reset_index: int = 0) -> Scene:
        """What the environment will be after :meth:`set_seed` and a reset.

        Args:
            seed (int): the seed.
            init_state_id (int): the reset's ``"init_state_id"``. Defaults to ``-1``, none.
            reset_index (int): number of resets since the seed was set. Only counts without an id.

        Returns:
            Scene: target and time limit.
        """
        if init_state_id >= 0:
            reset_index = 0
        # A string seeds Python's generator alike in every process.
        draw = random.Random(f"{seed}/{init_state_id}/{reset_index}")
        scene_id = draw.randrange(256)
        target = tuple(draw.choice((-1.0, 1.0)) for _ in range(self.action_dim))
        limit = self.max_env_steps
        if self.length == "heavy_tailed":
            shortest = max(1, limit // 4)
            limit = min(limit, int(shortest * draw.paretovariate(_TAIL_INDEX)))
        return Scene(scene_id, target, limit)

    def num_required(self, scene: Scene) -> int:
        """Right env steps that make *scene* a success."""
        # Rounded first: 0.6 * 5 is 3.0000000000000004 for a computer that should say 3.
        return max(1, -int(-round(self.required_fraction * scene.num_env_steps, 6) // 1))

    def expected_image(self, scene: Scene, num_decisions: int, num_right: int) -> torch.Tensor:
        """The image ``[3, H, W]`` after *num_decisions* decisions and *num_right* right steps."""
        channels = (scene.scene_id, num_decisions % 256, num_right % 256)
        # Expanded, not filled: it costs the same for every image size.
        return torch.tensor(channels, dtype=torch.uint8).view(3, 1, 1).expand(3, *self.image_size)

    # -- EnvBase ---------------------------------------------------------------------------------
    def _set_seed(self, seed: int | None) -> None:
        if seed is not None:
            self._seed, self._num_resets = seed, 0

    def _begin(self, scene: Scene) -> None:
        self.current_scene = scene
        self._target = torch.tensor(scene.target)
        self._required = self.num_required(scene)
        self.num_env_steps, self.num_decisions, self.num_right = 0, 0, 0

    def _observe(self, success: bool, num_executed: int) -> dict[str, object]:
        scene = self.current_scene
        limit = scene.num_env_steps
        state = torch.tensor((*scene.target, self.num_env_steps / limit, self.num_right / limit))
        image = self.expected_image(scene, self.num_decisions, self.num_right)
        return {
            "observation": TensorDict({"image": image, "state": state}),
            schema.INSTRUCTION_KEY: self._instruction,
            "success": self._flags[success].clone(),
            schema.ACTION_IS_PAD_KEY: self._pads[num_executed].clone(),
            schema.INIT_STATE_ID_KEY: self._init_state_id.clone(),
        }

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: object) -> TensorDictBase:
        key = schema.INIT_STATE_ID_KEY
        chosen = None if tensordict is None else tensordict.get(key, None)
        init_state_id = -1 if chosen is None else int(chosen)
        self._init_state_id = torch.tensor([init_state_id])
        self._begin(self.scene(self._seed, init_state_id, self._num_resets))
        self._num_resets += 1
        no = self._flags[0]
        done = {"done": no.clone(), "terminated": no.clone(), "truncated": no.clone()}
        return TensorDict({**self._observe(False, self.chunk_size), **done})

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        if self.latency is not None:
            time.sleep(self.latency.sample())
        limit = self.current_scene.num_env_steps
        right_steps = ((tensordict.get(schema.ACTION_CHUNK_KEY) @ self._target) > 0).tolist()
        num_executed, success = 0, False
        for right in right_steps[: limit - self.num_env_steps]:
            num_executed += 1
            self.num_right += right
            success = self.num_right >= self._required
            if success and self.stop_on_success:
                break
        self.num_env_steps += num_executed
        self.num_decisions += 1
        success = self.num_right >= self._required
        terminated = success and self.stop_on_success
        truncated = not terminated and self.num_env_steps >= limit
        # Paid once: the decision that reaches the goal, or with which the episode ends.
        paid = success and (terminated or truncated)
        return TensorDict(
            {
                **self._observe(success, num_executed),
                "reward": torch.tensor([float(paid)]),
                "done": self._flags[terminated or truncated].clone(),
                "terminated": self._flags[terminated].clone(),
                "truncated": self._flags[truncated].clone(),
            }
        )


class CountingOracle(TensorDictModuleBase):
    """Solves :class:`CountingChunkEnv` by reading the target off the state.

    Args:
        env (CountingChunkEnv): the environment to solve, or one like it.

    Keyword Args:
        action_tokenizer (ActionTokenizerBase, optional): if given, tokens are written as well, and
            the chunk is what they decode to.

    Examples:
        >>> env = CountingChunkEnv()
        >>> bool(env.rollout(10, CountingOracle(env))["next", "success"][-1])
        True
    """

    def __init__(
        self, env: CountingChunkEnv, *, action_tokenizer: ActionTokenizerBase | None = None
    ) -> None:
        super().__init__()
        self.chunk_size = env.chunk_size
        self.action_dim = env.action_dim
        self.action_tokenizer = action_tokenizer
        self.in_keys = [schema.STATE_KEY]
        self.out_keys = [schema.ACTION_CHUNK_KEY]
        if action_tokenizer is not None:
            self.out_keys.append(schema.ACTION_TOKENS_KEY)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the chunk ``[*B, chunk_size, A]``, every step of it the target."""
        target = tensordict.get(schema.STATE_KEY)[..., None, : self.action_dim]
        chunk = target.expand(*target.shape[:-2], self.chunk_size, self.action_dim).clone()
        if self.action_tokenizer is not None:
            tokens = self.action_tokenizer.encode(chunk)
            tensordict.set(schema.ACTION_TOKENS_KEY, tokens)
            chunk = self.action_tokenizer.decode(tokens)
        return tensordict.set(schema.ACTION_CHUNK_KEY, chunk)
