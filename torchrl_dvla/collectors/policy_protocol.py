# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The protocol that a policy speaks, as requirements, and a checklist of them for one policy."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import cloudpickle
import torch
from tensordict import NestedKey, NonTensorStack, TensorDict, TensorDictBase, unravel_key_list
from tensordict.nn import TensorDictModuleBase
from torch import distributions as d
from torch import nn
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type

from torchrl_dvla.data.schema import (
    ACTION_CHUNK_KEY,
    ACTION_PATH_KEY,
    ACTION_TOKENS_KEY,
    INSTRUCTION_KEY,
    OBSERVATION_KEY,
    SAMPLE_LOG_PROB_KEY,
    recorded_keys,
    sampled_key,
)
from torchrl_dvla.findings import Finding, Status, report
from torchrl_dvla.objectives.distribution import log_prob_of, of_single_actions, run_policy
from torchrl_dvla.objectives.validation import (
    agreement_of,
    check_actor,
    check_ranges,
    depends_on_mode,
)
from torchrl_dvla.swimlane.env_worker import describe_env
from torchrl_dvla.swimlane.inference import check_decisions, seeded
from torchrl_dvla.swimlane.managed_process import pickled
from torchrl_dvla.swimlane.messages import EnvSpecs
from torchrl_dvla.weight_update import WeightLayout

__all__ = ["PolicyReport", "check_policy_protocol", "decide", "require_protocol"]

_MAX_NAMES = 5


# -- requirements of the collector, and of the checklist ----------------------------------------


def decide(
    policy: TensorDictModuleBase,
    observed: TensorDictBase,
    mode: ExplorationType = ExplorationType.RANDOM,
) -> TensorDictBase:
    """Decisions as the inference lane takes them, in eval mode.

    Args:
        policy (TensorDictModuleBase): the policy; lazy parameters are initialised by the call.
        observed (TensorDictBase): observations and instructions ``[n]``.
        mode (ExplorationType): whether actions are drawn, or the most likely ones.

    Returns:
        TensorDictBase: what was observed, with what rows record of what the policy has written.
    """
    observed = observed.to(_device_of(policy))
    with in_eval_mode(policy), torch.no_grad(), set_exploration_type(mode):
        written = policy(observed.copy())
    return observed.copy().update(written.select(*recorded_keys(policy.out_keys), strict=False))


def _out_keys(policy: nn.Module) -> Sequence[NestedKey]:
    return getattr(policy, "out_keys", ())


def _device_of(policy: nn.Module) -> torch.device:
    return next((tensor.device for tensor in policy.parameters()), torch.device("cpu"))


@contextlib.contextmanager
def in_eval_mode(policy: nn.Module) -> Iterator[None]:
    """Eval mode inside the block; it also leaves the statistics of BatchNorm alone."""
    modes = {module: module.training for module in policy.modules()}
    policy.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def require_observed(policy: TensorDictModuleBase, specs: EnvSpecs) -> None:
    """Require that the environment observes what the policy reads.

    Raises:
        ValueError: naming what is not observed.
    """
    if missing := [name for name in ("in_keys", "out_keys") if not hasattr(policy, name)]:
        raise ValueError(
            f"policy must say by {' and '.join(missing)} what it reads and writes, got a "
            f"{type(policy).__name__} without. Put it into a tensordict.nn.TensorDictModule, or "
            "derive it from TensorDictModuleBase and set both lists."
        )
    observed = {key for key, _, _ in specs.observation}
    groups = {key[:end] for key in observed for end in range(1, len(key))}
    known = observed | groups | {(INSTRUCTION_KEY,)}
    wanted = unravel_key_list(list(policy.in_keys))
    paths = [(key,) if isinstance(key, str) else key for key in wanted]
    if unknown := [key for key, path in zip(wanted, paths) if path not in known]:
        raise ValueError(
            f"policy must read what the environment observes, {sorted(observed)} and "
            f"{INSTRUCTION_KEY!r}, got in_keys with {unknown}. Build it without them; or say where "
            "they are: lambda: torchrl_dvla.envs.ChunkEnv(make_env(), image_key='pixels', "
            "state_key='joints'), image_key='render' for the frames of gymnasium.make(..., "
            "render_mode='rgb_array')."
        )


def require_written(policy: TensorDictModuleBase, written: Collection[NestedKey]) -> None:
    """Require that all that is recorded of a decision is among what the policy has ``written``.

    Raises:
        ValueError: naming all that is missing, and how each is written.
    """
    out_keys = _out_keys(policy)
    missing = [key for key in recorded_keys(out_keys) if key not in written]
    if not missing:
        return
    remedies = {
        ACTION_CHUNK_KEY: "the chunk is the action to execute, [*B, chunk, A]",
        ACTION_TOKENS_KEY: "tokens are the indices that were drawn, [*B, chunk, A]; a policy that "
        "draws the chunk itself lists ('vla_action', 'chunk') in its out_keys, and no tokens",
        SAMPLE_LOG_PROB_KEY: "log-probs are get_dist(...).log_prob(...) of what was drawn",
    }
    hints = "; ".join(remedies.get(key, f"{key} is in its out_keys") for key in missing)
    raise ValueError(
        f"policy must write {', '.join(map(str, missing))}, got "
        f"{sorted(map(str, out_keys))}. Write each, and list it in out_keys: {hints}. A "
        "VLAWrapperBase: action_head='tokens', output_mode='both' and an action_tokenizer."
    )


def require_shapes(
    policy: TensorDictModuleBase, decisions: TensorDictBase, specs: EnvSpecs
) -> None:
    """Require a chunk that the environment takes, and log-probs of what was drawn.

    Raises:
        ValueError: naming what has another shape or type.
    """
    sampled = sampled_key(policy.out_keys)
    chunk, log_probs = decisions.get(ACTION_CHUNK_KEY), decisions.get(SAMPLE_LOG_PROB_KEY)
    for key, values in ((ACTION_CHUNK_KEY, chunk), (SAMPLE_LOG_PROB_KEY, log_probs)):
        if not values.is_floating_point():
            raise ValueError(
                f"policy must write real numbers as {key}, got {values.dtype}. Write the indices "
                f"of tokens as {ACTION_TOKENS_KEY}, and as the chunk what they decode to."
            )
    shape, expected = tuple(chunk.shape[1:]), (specs.chunk_size, specs.action_dim)
    if len(shape) != 2 or shape[1] != specs.action_dim or specs.chunk_size not in (-1, shape[0]):
        size = "any" if specs.chunk_size == -1 else specs.chunk_size
        raise ValueError(
            f"policy must write chunks of [chunk_size={size}, action_dim={expected[1]}], as the "
            f"environment takes them, got {list(shape)}. Build the policy, or choose its "
            "checkpoint, for this environment."
        )
    of, found = tuple(decisions.get(sampled).shape[1:]), tuple(log_probs.shape[1:])
    allowed = {shape, shape[:1]} if sampled == ACTION_PATH_KEY else {of, of[:-1]}
    if found not in allowed or found[:1] != shape[:1]:
        raise ValueError(
            f"policy must write one log-prob a token, or action dimension, or env step, got "
            f"{sampled[-1]} {list(of)} of chunks {list(shape)} and log-probs {list(found)}. Build "
            "it with log_probs_mode='token', or a distribution that is not summed over the chunk: "
            "a sum cannot leave out env steps that were not executed."
        )


def present_log_prob(
    policy: TensorDictModuleBase, decisions: TensorDictBase
) -> tuple[torch.Tensor, d.Distribution]:
    """Log-probabilities of decisions in their recorded shape, and the distribution, in eval mode.

    Raises:
        ValueError: if the policy gives no such distribution.
    """
    key = sampled_key(policy.out_keys)
    sampled, recorded = decisions.get(key), decisions.get(SAMPLE_LOG_PROB_KEY)
    chunk = decisions.get(ACTION_CHUNK_KEY)
    units = recorded.unsqueeze(-1) if recorded.ndim < chunk.ndim else recorded
    mask = torch.ones_like(units, dtype=torch.bool)
    with in_eval_mode(policy):
        dist = of_single_actions(run_policy(decisions, policy, None, key))
    log_prob, ranges = log_prob_of(sampled, dist, mask, check=True)
    check_ranges(ranges, decisions, len(decisions))
    return log_prob.reshape(recorded.shape), dist


def require_protocol(
    policy: TensorDictModuleBase, decisions: TensorDictBase, specs: EnvSpecs
) -> None:
    """Require decisions that rows, environment and loss take; the first failure is raised.

    Args:
        policy (TensorDictModuleBase): the policy.
        decisions (TensorDictBase): ``[n]``, what it has written, with what it has read.
        specs (EnvSpecs): what the environment reads and writes.

    Raises:
        ValueError: if anything is missing, or has another shape or type; if the distribution is of
            other actions than those recorded; or what :func:`check_decisions` refuses.
    """
    require_written(policy, decisions.keys(True, True))
    check_decisions(decisions, policy, recorded_keys(policy.out_keys))
    require_shapes(policy, decisions, specs)
    if callable(getattr(policy, "get_dist", None)):  # a collector alone needs none
        with torch.no_grad():
            present_log_prob(policy, decisions)


# -- the checklist --------------------------------------------------------------------------------


class PolicyReport(NamedTuple):
    """What :func:`check_policy_protocol` has found; ``str()`` is the checklist."""

    findings: list[Finding]

    @property
    def ok(self) -> bool:
        """Whether nothing failed."""
        return all(finding.status is not Status.FAIL for finding in self.findings)

    def __str__(self) -> str:
        return report(self.findings)


def check_policy_protocol(
    policy: TensorDictModuleBase, env: EnvBase | Callable[[], EnvBase]
) -> PolicyReport:
    """A checklist of all that a policy must do to be trained in an environment, with its failures.

    The policy decides for three scenes of the environment, in eval mode, as the inference lane
    calls it. Nothing is trained or changed, but lazy parameters are initialised.

    Args:
        policy (TensorDictModuleBase): the policy.
        env (EnvBase or Callable): an environment, or what makes one; one of gymnasium goes into a
            :class:`~torchrl_dvla.envs.ChunkEnv` first.

    Returns:
        PolicyReport: print it. Each line is a check, with a remedy below where it has failed.

    Examples:
        >>> from torchrl_dvla.envs import ToyChunkEnv
        >>> from torchrl_dvla.modules import tiny_token_policy
        >>> env = ToyChunkEnv(chunk_size=4, action_dim=2)
        >>> print(check_policy_protocol(tiny_token_policy(2, 4).eval(), env))
        ok    environment         chunks [4, 2], ...
        ok    reads               ...
        ok    writes              ('vla_action', 'tokens'), ('vla_action', 'chunk'), ...
        ok    values              ...
        ok    shapes              ...
        ok    get_dist            Categorical, one log-prob for each of [4, 2]
        ok    log-probs           ...
        ok    gradient            ...
        ok    sampling            ...
        ok    batch               ...
        ok    mode                ...
        ok    weights             ...
        ok    process             ...
        <BLANKLINE>
        13 ok, 0 warn, 0 fail
    """
    checklist = _Checklist(policy)
    made = env if isinstance(env, EnvBase) or not callable(env) else None
    try:
        made = env() if made is None and callable(env) else made
        return PolicyReport(checklist.run(made))
    finally:
        if made is not env and isinstance(made, EnvBase):
            made.close(raise_if_closed=False)


class _SkippedError(Exception):
    """A check needs what another one did not get."""


class _Checklist:
    """Checks in order; each returns what was found, as a detail, and a remedy for a warning."""

    def __init__(self, policy: TensorDictModuleBase) -> None:
        self._policy = policy
        self._recorded = recorded_keys(_out_keys(policy))
        self._findings: list[Finding] = []
        self._have: dict[str, Any] = {}

    def run(self, env: Any) -> list[Finding]:
        checks: Mapping[str, Callable[[], str | tuple[str, str]]] = {
            "environment": lambda: self._environment(env),
            "reads": self._reads,
            "writes": self._writes,
            "values": self._values,
            "shapes": self._shapes,
            "get_dist": self._get_dist,
            "log-probs": self._log_probs,
            "gradient": self._gradient,
            "sampling": self._sampling,
            "batch": self._batch,
            "mode": self._mode,
            "weights": self._weights,
            "process": self._process,
        }
        for name, check in checks.items():
            try:
                found = check()
                detail, remedy = (found, "") if isinstance(found, str) else found
                status = Status.WARN if remedy else Status.OK
            except _SkippedError as error:
                status, detail, remedy = Status.WARN, f"not checked: it needs {error}", ""
            except Exception as error:  # of whatever the policy or environment does
                status = Status.FAIL
                text = " ".join(str(error.args[0] if error.args else "").split())
                if not isinstance(error, ValueError):
                    text = f"{type(error).__name__}: {text[:300]}"
                detail, _, remedy = text.partition(". ")
            self._findings.append(Finding(name, status, detail, remedy))
        return self._findings

    def _need(self, name: str) -> Any:
        if name not in self._have:
            raise _SkippedError(name)
        return self._have[name]

    def _environment(self, env: Any) -> str:
        specs = self._have["an environment"] = describe_env(env)
        size = "any" if specs.chunk_size == -1 else specs.chunk_size
        scenes = []
        for seed in range(3):
            env.set_seed(seed, static_seed=True)
            scenes.append(env.reset())
        observed = TensorDict.stack([scene.select(OBSERVATION_KEY) for scene in scenes])
        words = [scene.get(INSTRUCTION_KEY, "") for scene in scenes]
        observed.set(INSTRUCTION_KEY, NonTensorStack(*[getattr(w, "data", w) for w in words]))
        self._have["observations"] = observed
        return f"chunks [{size}, {specs.action_dim}], {len(specs.observation)} observed tensors"

    def _reads(self) -> str:
        require_observed(self._policy, self._need("an environment"))
        self._have["inputs"] = True
        return ", ".join(map(str, self._policy.in_keys))

    def _writes(self) -> str:
        policy, observed = self._policy, self._need("observations")
        if "inputs" not in self._have:  # what it does not list is missing, called or not
            require_written(policy, unravel_key_list(list(_out_keys(policy))))
        self._need("inputs")
        decisions = decide(policy, observed)
        require_written(policy, decisions.keys(True, True))
        self._have["decisions"] = decisions
        return ", ".join(map(str, self._recorded))

    def _values(self) -> str:
        check_decisions(self._need("decisions"), self._policy, self._recorded)
        return "finite numbers, and integers as tokens"

    def _shapes(self) -> str:
        decisions = self._need("decisions")
        require_shapes(self._policy, decisions, self._need("an environment"))
        self._have["log-probs that rows take"] = decisions.get(SAMPLE_LOG_PROB_KEY)
        shapes = {key[-1]: list(decisions.get(key).shape[1:]) for key in self._recorded}
        return ", ".join(f"{name} {shape}" for name, shape in shapes.items())

    def _get_dist(self) -> str | tuple[str, str]:
        check_actor(self._policy)
        recorded = self._need("log-probs that rows take")
        decisions = self._need("decisions")
        with torch.no_grad():
            present, dist = present_log_prob(self._policy, decisions)
        self._have["a distribution"] = present
        detail = f"{type(dist).__name__}, one log-prob for each of {list(recorded.shape[1:])}"
        if recorded.ndim < decisions.get(ACTION_CHUNK_KEY).ndim:
            remedy = "GRPOLoss needs ratio_level='env_step', or 'sequence', to learn from it."
            return f"{detail}, the env steps", remedy
        return detail

    def _log_probs(self) -> str:
        present = self._need("a distribution")
        gap = (self._have["decisions"].get(SAMPLE_LOG_PROB_KEY) - present).abs().mean().item()
        allowed = self._agreement()
        if not gap <= allowed:
            raise ValueError(
                "log-probs must be those of get_dist for the same decision, got a mean difference "
                f"of {gap:.2g} (up to {allowed:g} is rounding). Record get_dist(...).log_prob(...) "
                "of what was drawn, before it is clipped or rounded, at the same temperature."
            )
        return f"recorded and recomputed differ by {gap:.1g} on average"

    def _agreement(self) -> float:
        return agreement_of(tensor.dtype for tensor in self._policy.parameters())

    def _gradient(self) -> str | tuple[str, str]:
        self._need("a distribution")
        named = {name: p for name, p in self._policy.named_parameters() if p.requires_grad}
        if not named:
            raise ValueError(
                "policy must have parameters that require a gradient, got none. Register them, and "
                "unfreeze what is to be trained."
            )
        total = present_log_prob(self._policy, self._have["decisions"])[0].sum()
        grads: tuple[torch.Tensor | None, ...] = (None,) * len(named)
        if total.requires_grad:
            grads = torch.autograd.grad(total, list(named.values()), allow_unused=True)
        if not any(grad is not None and bool((grad != 0).any()) for grad in grads):
            raise ValueError(
                "get_dist must depend on the parameters, got no gradient. Compute it from the "
                "observation, outside of torch.no_grad(), and detach nothing on the way."
            )
        bad = [name for name, g in zip(named, grads) if g is not None and not g.isfinite().all()]
        if bad:
            raise ValueError(
                f"gradients must be finite, got others in {_some(bad)}. Bound scales from below, "
                "and what is divided by."
            )
        if unused := [name for name, grad in zip(named, grads) if grad is None]:
            remedy = "Freeze them by requires_grad_(False) if they are not to be trained."
            return f"{len(unused)} of {len(named)} parameters get none: {_some(unused)}", remedy
        return f"reaches all {len(named)} parameters"

    def _sampling(self) -> str | tuple[str, str]:
        self._need("decisions")
        observed, key = self._have["observations"], sampled_key(self._policy.out_keys)

        def drawn(mode: ExplorationType, seed: int) -> torch.Tensor:
            with seeded(seed, _device_of(self._policy)):
                decisions = decide(self._policy, observed, mode)
            parts = [decisions.get(each).flatten(1).double() for each in (key, ACTION_CHUNK_KEY)]
            return torch.cat(parts, 1)

        greedy = [drawn(ExplorationType.DETERMINISTIC, seed) for seed in (0, 1)]
        if not torch.equal(*greedy):
            raise ValueError(
                "chunks must be the most likely ones under ExplorationType.DETERMINISTIC, got "
                "others from call to call. Ask tensordict.nn.interaction_type(), as "
                "ProbabilisticTensorDictModule does: evaluations are greedy."
            )
        random = [drawn(ExplorationType.RANDOM, seed) for seed in (0, 1, 0)]
        if torch.equal(random[0], random[1]):
            raise ValueError(
                "actions must be drawn under ExplorationType.RANDOM, got the same ones for two "
                "seeds. Rollouts of a group that all act alike teach nothing: sample from "
                "get_dist(...)."
            )
        if not torch.equal(random[0], random[2]):
            remedy = "Draw from torch's default generator if runs are to repeat."
            return "one seed draws different actions", remedy
        return "greedy repeats, seeds draw differently, one seed draws the same"

    def _batch(self) -> str:
        present = self._need("a distribution")
        parts = []
        for row in self._have["decisions"].split(1):
            with torch.no_grad():
                parts.append(present_log_prob(self._policy, row)[0])
        gap, allowed = (torch.cat(parts) - present).abs().mean().item(), self._agreement()
        if not gap <= allowed:
            raise ValueError(
                "decisions of a batch must not depend on each other, got log-probs that differ by "
                f"{gap:.2g} between a batch of three and three of one. Normalise by the statistics "
                "of nothing but the row itself, or by running ones."
            )
        return "three rows at once and one by one agree"

    def _mode(self) -> str | tuple[str, str]:
        modules = self._policy.named_modules()
        found = [f"{name} ({type(m).__name__})" for name, m in modules if depends_on_mode(m)]
        if found:
            remedy = "Call policy.eval() before the loop: decisions are taken in eval mode."
            return f"in training mode: {_some(found)}", remedy
        return "no module computes anything else in training mode"

    def _weights(self) -> str:
        policy, observed = self._policy, self._need("decisions")
        before = {name: value.clone() for name, value in policy.state_dict().items()}
        layout = WeightLayout(policy)
        decide(policy, observed)
        after = policy.state_dict()
        changed = [name for name, value in before.items() if not torch.equal(value, after[name])]
        if changed:
            raise ValueError(
                f"a decision in eval mode must leave weights and buffers alone, got others in "
                f"{_some(changed)}. The lane's are those of a published version: update "
                "statistics in training mode, in the learner."
            )
        num_bytes = layout.slot_bytes + layout.frozen_bytes
        return f"{len(before)} tensors of {num_bytes:,} bytes, unchanged by a call"

    def _process(self) -> str:
        policy = self._policy
        other = cloudpickle.loads(pickled(policy, "policy, or policy_factory,"))
        present = self._need("a distribution")
        with torch.no_grad():
            for value in other.state_dict().values():
                value.zero_()
            other.load_state_dict(policy.state_dict())
            again, _ = present_log_prob(other, self._have["decisions"])
        gap = (again - present).abs().mean().item()
        if not gap <= self._agreement():
            raise ValueError(
                "a copy with the same state_dict must give the same log-probs, got others that "
                f"differ by {gap:.2g}. Register what they depend on as parameters or "
                "buffers."
            )
        return "can be sent to a process; its state_dict brings it back"


def _some(names: list[str]) -> str:
    return ", ".join(names[:_MAX_NAMES]) + (", ..." if len(names) > _MAX_NAMES else "")
