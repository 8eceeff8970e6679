# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What an environment's next step starts from."""

from __future__ import annotations

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, is_leaf_nontensor
from torchrl.envs import EnvBase

from torchrl_dvla.data.schema import ACTION_CHUNK_KEY, INIT_STATE_ID_KEY

__all__ = ["Root"]

#: Steps in a row that have to look alike before ``step_mdp`` is left out.
_NUM_PROBES = 2


class Root:
    """The tensordict that the steps of one environment go out from, rollout after rollout.

    TorchRL moves from one step to the next by ``env.step_mdp``, which builds a new root of what the
    environment has just returned and of what only the root before had. That costs more than
    everything else a worker does for a decision (:doc:`/decisions/0032-step-without-step-mdp`), and
    comes out as what stands in ``"next"`` already: without the reward, with a few entries carried
    along. So the first steps of an environment are compared with ``step_mdp``, and from then on
    ``"next"`` itself becomes the root. An environment that returns the same tensordict again keeps
    ``step_mdp`` for good.

    Args:
        env (EnvBase): the environment, without batch dimensions.

    Examples:
        >>> from torchrl_dvla.testing import CountingChunkEnv
        >>> root = Root(CountingChunkEnv(chunk_size=4, action_dim=2))
        >>> _ = root.reset(seed=0, init_state_id=0)
        >>> for _ in range(3):
        ...     root.take(torch.ones(4, 2))
        ...     done = root.step()["done"]
        ...     root.advance()
        >>> root.leaves_out_step_mdp
        True
    """

    def __init__(self, env: EnvBase) -> None:
        self.env = env
        self._tensordict: TensorDictBase = TensorDict({})
        #: What the last step has led to.
        self.next_tensordict: TensorDictBase = self._tensordict
        self._reward_keys = list(env.reward_keys)
        # A request is no state: unless the environment speaks of it too, it ends with the reset.
        self._request_is_foreign = INIT_STATE_ID_KEY not in set(env.observation_spec.keys())
        #: Entries that ``step_mdp`` takes from the root before, not from ``"next"``.
        self._carried_keys: list[NestedKey] = []
        self._previous_nodes: list[TensorDictBase] = []
        self._num_probes_left = _NUM_PROBES
        #: Whether ``"next"`` serves as the next root.
        self.leaves_out_step_mdp = False

    def reset(self, seed: int, init_state_id: int) -> TensorDictBase:
        """Begin a rollout; returns the first observation.

        Args:
            seed (int): of the scene.
            init_state_id (int): the environment's numbered initial state; -1 lets it sample one.
        """
        # Not static, it would make a generator to draw a next seed that nobody asks for.
        self.env.set_seed(seed, static_seed=True)
        request = TensorDict({INIT_STATE_ID_KEY: torch.tensor([init_state_id])})
        self._tensordict = self.env.reset(request)
        if self._request_is_foreign:
            self._tensordict.pop(INIT_STATE_ID_KEY, None)
        return self._tensordict

    def take(self, chunk: torch.Tensor) -> None:
        """Take the ``chunk`` ``[chunk_size, A]`` that :meth:`step` executes."""
        self._tensordict.set(ACTION_CHUNK_KEY, chunk)

    def step(self) -> TensorDictBase:
        """Execute the chunk; returns what is under ``"next"`` then."""
        self._tensordict = self.env.step(self._tensordict)
        self.next_tensordict = self._tensordict.get("next")
        return self.next_tensordict

    def advance(self) -> None:
        """The rollout goes on: prepare the next step. What :meth:`step` returned is spent."""
        before, root = self._tensordict, self.next_tensordict
        if self.leaves_out_step_mdp:
            for key in self._carried_keys:
                root.set(key, before.get(key))
            for key in self._reward_keys:
                root.del_(key)
            self._tensordict = root
        else:
            self._tensordict = self.env.step_mdp(before)
            if self._num_probes_left:
                self._probe(root)

    def _probe(self, next_tensordict: TensorDictBase) -> None:
        """Compare ``"next"`` with the root that ``step_mdp`` made of it."""
        nodes = [next_tensordict]
        nodes += [node for node in next_tensordict.values() if isinstance(node, TensorDictBase)]
        is_reused = any(node is old for node in nodes for old in self._previous_nodes)
        if is_reused or next_tensordict.is_locked or type(next_tensordict) is not TensorDict:
            self._num_probes_left = 0
            return
        self._previous_nodes = nodes
        has = _keys(next_tensordict)
        carried = _keys(self._tensordict) - has - set(self.env.action_keys)
        if carried != set(self._carried_keys):  # the first probe, or entries that come and go
            self._carried_keys, self._num_probes_left = list(carried), _NUM_PROBES
        self._num_probes_left -= 1
        self.leaves_out_step_mdp = not self._num_probes_left


def _keys(tensordict: TensorDictBase) -> set[NestedKey]:
    return set(tensordict.keys(True, True, is_leaf=is_leaf_nontensor))
