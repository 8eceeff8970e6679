# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The init states an environment may start from."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch

from torchrl_dvla.envs.libero_setup import LiberoTask

__all__ = ["check_init_state_id", "init_state_table", "load_init_states"]

_MODES = ("sampled", "random", "cycle", "fixed")


def load_init_states(task: LiberoTask) -> np.ndarray:
    """Benchmark init states of a task.

    Args:
        task (LiberoTask): the task.

    Returns:
        array ``[N, D]`` of flattened simulator states (time, positions, velocities); ``N`` is 50 in
        the standard suites.

    Raises:
        FileNotFoundError: if the installation ships none for this task.
    """
    if task.init_states_file.is_file():
        # A pickled array that ships with the benchmark, as LIBERO itself loads it
        return np.asarray(torch.load(task.init_states_file, weights_only=False))
    raise FileNotFoundError(
        f"init states of {task.suite} task {task.task_id} must exist, got no file at "
        f"{task.init_states_file}. Reinstall LIBERO, or delete "
        f"{task.init_states_file.parent.parent} to have it written anew."
    )


def check_init_state_id(index: int, num_states: int) -> int:
    """Check one index into the init states, -1 meaning "sample".

    Args:
        index (int): the index.
        num_states (int): how many init states there are.

    Returns:
        the index.

    Raises:
        ValueError: if it is out of range.
    """
    if not -1 <= index < num_states:
        allowed = f"from 0 to {num_states - 1}, or -1 to sample" if num_states else "-1 (sample)"
        raise ValueError(
            f"init_state_id must be {allowed}, got {index}. "
            "The table of init states is set by the argument init_states."
        )
    return index


def init_state_table(
    task: LiberoTask,
    init_states: Literal["benchmark", "sampled"] | np.ndarray,
    *,
    mode: str = "sampled",
    index: int = 0,
) -> np.ndarray:
    """Check an environment's init-state arguments and load the table they name.

    Args:
        task (LiberoTask): the task.
        init_states (str or array): ``"benchmark"``, ``"sampled"`` (an empty table) or an array
            ``[N, D]``.

    Keyword Args:
        mode (str): what a reset without an index does.
        index (int): the index of mode ``"fixed"``.

    Returns:
        array ``[N, D]``.

    Raises:
        ValueError: for an unknown name, an index out of range, or a mode that needs a table where
            there is none.
        FileNotFoundError: if the benchmark's file is missing.

    Examples:
        >>> import numpy as np
        >>> table = init_state_table(None, np.zeros((2, 110)), mode="fixed", index=1)
        >>> table.shape
        (2, 110)
    """
    if mode not in _MODES:
        raise ValueError(
            f"init_state_mode must be one of {', '.join(_MODES)}, got {mode!r}. Correct the name."
        )
    if isinstance(init_states, str):
        if init_states not in ("benchmark", "sampled"):
            raise ValueError(
                "init_states must be 'benchmark', 'sampled' or an array [N, D], got "
                f"{init_states!r}. Correct the name."
            )
        is_benchmark = init_states == "benchmark"
        table = load_init_states(task) if is_benchmark else np.zeros((0, 0))
    else:
        table = np.asarray(init_states)
        if table.ndim != 2:
            raise ValueError(
                f"init_states must have shape [N, D], got {list(table.shape)}. "
                "Put one flattened simulator state in each row."
            )
    if mode != "sampled":
        if not len(table):
            raise ValueError(
                f"init_state_mode must be 'sampled' without a table, got {mode!r}. "
                "Pass init_states='benchmark'."
            )
        check_init_state_id(index, len(table))
    return table
