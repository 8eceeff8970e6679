# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Which setting of the running lanes to move next, from what the timeline measured."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torchrl_dvla.swimlane.reading import Reading

__all__ = ["Knob", "Measurement", "Move", "Scheduler"]

_log = logging.getLogger("torchrl_dvla")

#: Coarse steps first, fine ones when no coarse step helps any more.
_FACTORS = (2.0, 1.4)
#: A lane that is busy for this share of the time has nothing left to give.
_SATURATED = 0.95


@dataclass(frozen=True)
class Knob:
    """A setting that may be moved while the lanes run.

    Args:
        name (str): of the setting.
        value (float): where it stands at first.
        low (float): lower bound.
        high (float): upper bound.
        helps (str): the lane that does more when the setting is raised; ``"all"`` if it keeps more
            work under way, so that every lane rests less.
        unit (float): smallest step from zero; values are multiples of it.
        takes_from (str): the lane that does less when the setting is raised, if there is one.
        follows (str): another setting, of which this one is a part: it keeps its share of it when
            that one is moved, and cannot be more than it.

    Examples:
        >>> knob = Knob("max_batch_size", 6, low=1, high=16, helps="inference")
        >>> knob.moved(6, 2.0), knob.moved(6, 0.5), knob.moved(16, 2.0), knob.moved(1, 1.4)
        (12, 3, 16, 2)
        >>> wait = Knob("batch_wait_s", 0.0, low=0.0, high=0.032, helps="inference", unit=0.001)
        >>> wait.moved(0.0, 2.0), wait.moved(0.001, 0.5)
        (0.001, 0.0)
    """

    name: str
    value: float
    low: float
    high: float
    helps: str
    unit: float = 1
    takes_from: str = ""
    follows: str = ""

    def __post_init__(self) -> None:
        if not self.low <= self.value <= self.high:
            raise ValueError(
                f"{self.name} must lie in [{self.low:g}, {self.high:g}], got {self.value:g}. Widen "
                "the bounds of SchedulerConfig, or start inside of them."
            )

    def moved(self, value: float, factor: float) -> float:
        """*value*, grown or shrunk by *factor*: at least by one unit, within the bounds."""
        steps, target = round(value / self.unit), round(value * factor / self.unit)
        if target == steps:
            target += 1 if factor > 1 else -1
        return min(self.high, max(self.low, target * self.unit))


class Measurement(NamedTuple):
    """One window of a run."""

    #: Decisions a second.
    rate: float
    #: What the lanes did meanwhile.
    reading: Reading


class Move(NamedTuple):
    """A setting to change, and why."""

    knob: str
    old: float
    new: float
    reason: str
    #: Relative gain in decisions a second that there is to hope for at most; 0 when taking back.
    expected_gain: float

    def __str__(self) -> str:
        hope = f"; hoping for up to {self.expected_gain:+.0%}" if self.expected_gain else ""
        return f"{self.knob}: {self.old:g} -> {self.new:g}, because {self.reason}{hope}"


class _Trial(NamedTuple):
    moves: tuple[Move, ...]
    factor: float

    @property
    def key(self) -> tuple[str, float]:
        """What is closed when it was no good."""
        return self.moves[0].knob, self.factor


class Scheduler:
    """Climbs towards more decisions a second, one setting at a time, and says why.

    It has no thread and no clock: whoever owns the lanes hands it a window of measurements from
    time to time (:meth:`observe`) and applies the moves that it answers with.

    A move is a *trial*. After it one window is left out, for what was under way to settle; then
    windows are compared with those before. A trial is kept if it gained more than ``min_gain`` and
    more than twice the standard error of the comparison, and tried again in the same direction;
    else it is taken back, and not repeated before another one was kept. A setting that is a part of
    another (:attr:`Knob.follows`) keeps its share of it: more work under way brings nothing without
    larger batches, so the two are one trial.

    The timeline says where to begin: with more work under way, then with what helps a lane that is
    busy all the time. It also says what is not worth a trial: what a step can bring is limited by
    the lanes that it does not help, and below ``min_gain`` it is left out. So the search ends at
    once when sampling or the learner is busy all the time. Steps double and halve; when none of
    these helps, finer ones are tried, and coarse ones again after each that was kept; when none of
    those does, the scheduler rests until the rate changes by ``drift``.

    How often a cohort is learned from is its own matter (``num_epochs``): it is not climbed, for
    fewer passes are always faster. It rises while the learner would still have time to spare, and
    falls when sampling waits for the learner, within its bounds.

    Args:
        knobs (iterable of Knob): what may be moved.

    Keyword Args:
        min_gain (float): relative gain below which a trial is not worth keeping.
        num_windows (int): windows that a comparison takes at least.
        max_windows (int): at most: what is undecided then is taken back.
        num_settle (int): windows left out after each move.
        drift (float): relative change of the rate that wakes a scheduler at rest.

    Examples:
        >>> knob = Knob("max_batch_size", 1, low=1, high=8, helps="inference")
        >>> scheduler = Scheduler([knob], num_windows=1, num_settle=0)
        >>> busy = Reading(1.0, {"inference": 1.0}, {}, {"inference": 1})
        >>> print(*scheduler.observe(Measurement(10.0, busy)))
        max_batch_size: 1 -> 2, because inference is the critical lane (busy 100 %); hoping for \
up to +100%
        >>> print(*scheduler.observe(Measurement(17.0, busy)))
        max_batch_size: 2 -> 4, because inference is the critical lane (busy 100 %); hoping for \
up to +100%
        >>> print(*scheduler.observe(Measurement(12.0, busy)))  # it was better before
        max_batch_size: 4 -> 2, because it brought -29%
        max_batch_size: 2 -> 3, because inference is the critical lane (busy 100 %); hoping for \
up to +50%
    """

    def __init__(
        self,
        knobs: Iterable[Knob],
        *,
        min_gain: float = 0.02,
        num_windows: int = 3,
        max_windows: int = 8,
        num_settle: int = 1,
        drift: float = 0.15,
    ) -> None:
        self._knobs = {knob.name: knob for knob in knobs}
        self.settings = {name: knob.value for name, knob in self._knobs.items()}
        self._min_gain = min_gain
        self._num_windows = num_windows
        self._max_windows = max_windows
        self._num_settle = num_settle
        self._drift = drift
        self._stage = 0
        self._trial: _Trial | None = None
        self._momentum: tuple[str, bool] | None = None
        #: Steps that were no good, by knobs and factor, since the last one that was.
        self._closed: set[tuple[str, float]] = set()
        self._base: list[float] = []
        self._rates: list[float] = []
        #: What the lanes did in the windows of each of the two.
        self._base_readings: list[Reading] = []
        self._readings: list[Reading] = []
        self._left_out = 0
        #: Whether no step is left to try.
        self.at_rest = False
        self.num_moves = 0

    def observe(self, measurement: Measurement) -> list[Move]:
        """Take one window in; returns what to change now, in this order."""
        if self._left_out:
            self._left_out -= 1
            return []
        self._rates.append(measurement.rate)
        self._readings.append(measurement.reading)
        if self._trial is None:
            moves = self._begin(measurement)
        else:
            moves = self._judge(self._trial, measurement)
        for move in moves:
            self.settings[move.knob] = move.new
            _log.info("Scheduler: %s.", move)
        if moves:
            self.num_moves += len(moves)
            self._left_out, self._rates, self._readings = self._num_settle, [], []
        return moves

    # -- the steps of a trial -------------------------------------------------------------------

    def _begin(self, measurement: Measurement) -> list[Move]:
        self._rates = self._rates[-self._max_windows :]
        self._readings = self._readings[-self._max_windows :]
        if len(self._rates) < self._num_windows:
            return []
        if self.at_rest:
            change = _mean(self._rates) / _mean(self._base) - 1.0
            if abs(change) < max(self._drift, 2.0 * _error(self._rates, self._base)):
                return self._balance(measurement)
            _log.info("Scheduler: the rate has changed by %+.0f %%, looking again.", 100 * change)
            self.at_rest, self._stage, self._closed = False, 0, set()
        self._base, self._base_readings = self._rates, self._readings
        return self._next(measurement)

    def _judge(self, trial: _Trial, measurement: Measurement) -> list[Move]:
        if len(self._rates) < self._num_windows:
            return []
        gain = _mean(self._rates) / _mean(self._base) - 1.0
        threshold = max(self._min_gain, 2.0 * _error(self._rates, self._base))
        knob, factor = trial.key
        if gain > threshold:
            what = ", ".join(f"{move.knob} = {move.new:g}" for move in trial.moves)
            _log.info("Scheduler: %s is kept, it brought %+.0f %%.", what, 100 * gain)
            # Another landscape: what did not help before may help now, but for the way back.
            self._closed, self._stage = {(knob, 1.0 / factor)}, 0
            self._momentum = (knob, factor > 1)
            self._base, self._base_readings = self._rates, self._readings
            self._trial = None
            return self._next(measurement)
        if gain > -threshold and len(self._rates) < self._max_windows:
            return []
        self._closed.add(trial.key)
        self._momentum, self._trial = None, None
        back = [
            Move(move.knob, move.new, move.old, f"it brought {gain:+.0%}", 0.0)
            for move in trial.moves
        ]
        self.settings |= {move.knob: move.new for move in back}
        return [*back, *self._next(measurement)]

    def _next(self, measurement: Measurement) -> list[Move]:
        """The next trial; what the timeline says about it comes with the move.

        It is asked about the settings as they are now, not about a trial that was taken back.
        """
        shares = _mean_shares(self._base_readings)
        critical = max(("sampling", "inference", "gradient"), key=shares.__getitem__)
        while self._stage < len(_FACTORS):
            found = self._choose(critical, shares, self._base_readings[-1])
            if found is not None:
                self._trial = found
                return list(found.moves)
            self._stage += 1
        self.at_rest = True
        _log.info("Scheduler: at rest with %s, %s.", self.settings, _say_busy(critical, shares))
        return self._balance(measurement)

    def _choose(
        self, critical: str, shares: Mapping[str, float], reading: Reading
    ) -> _Trial | None:
        """The step that promises most, of those that are not closed."""
        up = _FACTORS[self._stage]
        names = [name for name in self._knobs if name != "num_epochs"]
        candidates = [(name, factor) for factor in (up, 1.0 / up) for name in names]
        best: tuple[int, _Trial] | None = None
        for key in candidates:
            trial = self._make_trial(*key, critical, shares, reading)
            if trial is None or key in self._closed:
                continue
            if max(move.expected_gain for move in trial.moves) < self._min_gain:
                continue  # another lane has no time left for it
            rank = self._rank(*key, critical, shares)
            if best is None or rank < best[0]:
                best = rank, trial
        return None if best is None else best[1]

    def _rank(self, name: str, factor: float, critical: str, shares: Mapping[str, float]) -> int:
        """0 for a direction that has just helped, then what helps the critical lane."""
        if self._momentum == (name, factor > 1):
            return 0
        knob = self._knobs[name]
        saturated = shares[critical] >= _SATURATED
        if factor < 1:
            return 1 if saturated and knob.takes_from == critical else 3
        if knob.helps == "all":
            return 1
        return 1 if saturated and knob.helps == critical else 2

    def _make_trial(
        self,
        name: str,
        factor: float,
        critical: str,
        shares: Mapping[str, float],
        reading: Reading,
    ) -> _Trial | None:
        knob, old = self._knobs[name], self._effective(self._knobs[name])
        new = knob.moved(old, factor)
        if new == old or (knob.follows and new > self.settings[knob.follows]):
            return None
        reason = _say_busy(critical, shares)
        if knob.helps == "all" and factor > 1:
            reason = _say_idle(reading) or reason
        elif critical != (knob.helps if factor > 1 else knob.takes_from):
            reason += ", and nothing else is left to try"
        moves = []
        relieved = {knob.helps if factor > 1 else knob.takes_from}
        ratio = new / old if old else 2.0
        for other in self._knobs.values():
            if other.follows == name:
                before = self._effective(other)
                after = other.moved(before, ratio)
                if after != self.settings[other.name]:
                    why = f"it keeps its share of {name}"
                    moves.append(Move(other.name, self.settings[other.name], after, why, 0.0))
                if after > before:
                    relieved.add(other.helps)
        hope = self._headroom(relieved, ratio, shares)
        return _Trial((Move(name, self.settings[name], new, reason, hope), *moves), factor)

    def _effective(self, knob: Knob) -> float:
        """Where the setting stands: not above the one that it is a part of."""
        value = self.settings[knob.name]
        return min(value, self.settings[knob.follows]) if knob.follows else value

    @staticmethod
    def _headroom(relieved: set[str], factor: float, shares: Mapping[str, float]) -> float:
        """What a step can bring at most: then another lane has no time left."""
        others = max(share for lane, share in shares.items() if lane not in relieved)
        limit = 1.0 / max(others, 0.01) - 1.0
        return max(0.0, min(factor - 1.0 if factor > 1.0 else limit, limit))

    # -- how often to learn from the same data --------------------------------------------------

    def _balance(self, measurement: Measurement) -> list[Move]:
        knob = self._knobs.get("num_epochs")
        if knob is None:
            return []
        epochs, share = self.settings["num_epochs"], measurement.reading.shares()["gradient"]
        blocked = measurement.reading.idle_shares().get(("sampling", "no_admission"), 0.0)
        after = share * (epochs + 1) / epochs
        if epochs < knob.high and after < 0.9 and blocked < 0.05:
            reason = f"the learner is busy {share:.0%} only, and would be {after:.0%}"
            return self._set_epochs(epochs + 1, reason, 0.0)
        if epochs > knob.low and share > _SATURATED and blocked > 0.05:
            reason = f"sampling waits for the learner ({blocked:.0%})"
            return self._set_epochs(epochs - 1, reason, blocked / (1.0 - blocked))
        return []

    def _set_epochs(self, value: float, reason: str, gain: float) -> list[Move]:
        self.at_rest = False  # the learner has another pace: look again
        return [Move("num_epochs", self.settings["num_epochs"], value, reason, gain)]


def _mean(rates: list[float]) -> float:
    return max(statistics.fmean(rates), 1e-9)


def _mean_shares(readings: list[Reading]) -> dict[str, float]:
    every = [reading.shares() for reading in readings]
    return {lane: statistics.fmean(shares[lane] for shares in every) for lane in every[0]}


def _error(rates: list[float], base: list[float]) -> float:
    """Relative standard error of the comparison of two means."""
    variance = 0.0
    for values in (rates, base):
        if len(values) > 1:
            variance += statistics.variance(values) / _mean(values) ** 2 / len(values)
    return math.sqrt(variance)


def _say_busy(lane: str, shares: Mapping[str, float]) -> str:
    return f"{lane} is the critical lane (busy {100 * shares[lane]:.0f} %)"


def _say_idle(reading: Reading) -> str:
    """The largest rest of a lane that waits for another."""
    waits = {
        key: share
        for key, share in reading.idle_shares().items()
        if key[1] in ("no_decision", "no_ready_row", "no_batch")
    }
    if not waits:
        return ""
    lane, reason = max(waits, key=waits.__getitem__)
    return f"{lane} rests {waits[lane, reason]:.0%} of the time ({reason})"
