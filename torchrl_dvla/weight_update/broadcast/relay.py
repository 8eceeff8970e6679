# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""A node's end of the broadcast: receives versions from the learner for the node's readers."""

from __future__ import annotations

import concurrent.futures
import functools
import logging
import socket
import threading
import time
from multiprocessing.connection import wait as wait_for
from typing import Any

from torchrl_dvla.weight_update.broadcast.channel import (
    HEARTBEATS_PER_TIMEOUT,
    Channel,
    ChannelError,
    parse_address,
)
from torchrl_dvla.weight_update.broadcast.edge import Rendezvous
from torchrl_dvla.weight_update.broadcast.rounds import RoundPlan
from torchrl_dvla.weight_update.broadcast.transfer import NodeTransfer, StoreTarget, restore_layout
from torchrl_dvla.weight_update.store import WeightStore
from torchrl_dvla.weight_update.weight_layout import WeightSource

__all__ = ["WeightRelay"]

_log = logging.getLogger("torchrl_dvla")
_RETRY_S = 0.2
_ATTEMPT_S = 2.0  # close() may have to wait for it
_POLL_S = 0.1


class WeightRelay:
    """A node's end of a :class:`WeightBroadcast`: a store that follows the learner's.

    Readers of this node register in :attr:`store` and adopt from it as from the learner's own; it
    never shows half of a version. When the learner's node is lost, the last whole version
    stays, and the relay tries to find the learner again until it is closed. It then gets the newest
    version. So does a new relay that takes the place of a dead one.

    Args:
        address (str): ``WeightBroadcast.address``.
        source (nn.Module, TensorDictBase or mapping): a policy as this node's readers have it; a
            meta module will do. Its weights must be those of the learner.

    Keyword Args:
        name (str, optional): the node's name at the learner. Default: this host's name.
        num_slots (int): see :class:`WeightStore`. Default: 3.
        max_readers (int): see :class:`WeightStore`. Default: 64.
        timeout_s (float): how long to look for the learner's node. Default: 60.

    Raises:
        ValueError: listing the differences, if ``source`` has other weights than the learner.
        TimeoutError: if the learner's node does not answer in time.

    Examples:
        >>> from torch import nn
        >>> from torchrl_dvla.weight_update import WeightBroadcast, WeightStore
        >>> learner, served = nn.Linear(2, 1), nn.Linear(2, 1)
        >>> store = WeightStore(learner)
        >>> broadcast = WeightBroadcast(store.reader("broadcast"))
        >>> relay = WeightRelay(broadcast.address, served)  # on another node
        >>> store.publish()
        1
        >>> relay.wait(1, timeout_s=30.0)
        1
        >>> reader = relay.store.reader("worker 0")
        >>> reader.adopt_into(served), served.weight.equal(learner.weight)
        (1, True)
        >>> reader.close(); relay.close(); broadcast.close(); store.close()
    """

    def __init__(
        self,
        address: str,
        source: WeightSource,
        *,
        name: str | None = None,
        num_slots: int = 3,
        max_readers: int = 64,
        timeout_s: float = 60.0,
    ) -> None:
        self.address = address
        self.name = socket.gethostname() if name is None else name
        self._host_and_port = parse_address(address)
        self._ending = threading.Event()
        self._changed = threading.Condition()
        self._lost: str | None = None
        self._failure: BaseException | None = None
        channel, welcome = self._connect(timeout_s)
        try:
            self._run = welcome["run"]
            layout = restore_layout(welcome["layout"])
            if layout.differences(source, as_reader=True):
                error = layout.mismatch("source", source, as_reader=True)
                channel.send("refuse", name=self.name, reason=str(error))
                raise error
            self.store = WeightStore(layout, num_slots, max_readers=max_readers)
        except BaseException:
            channel.close()
            raise
        self._target = StoreTarget(self.store, self._notify)
        self._thread = threading.Thread(
            target=self._serve, args=(channel, welcome), name="dvla-weight-relay", daemon=True
        )
        self._thread.start()

    @property
    def version(self) -> int:
        """The newest version that readers of this node can adopt; -1 before the first."""
        return self.store.visible_version

    @property
    def is_connected(self) -> bool:
        """Whether the learner's node is there."""
        return self._lost is None and self._failure is None and not self._ending.is_set()

    def wait(self, version: int = 0, timeout_s: float = 60.0) -> int:
        """Wait until readers of this node can adopt ``version`` or a newer one; returns the newest.

        Raises:
            TimeoutError: after ``timeout_s``, saying what is known of the learner's node.
            RuntimeError: if the relay has ended, with the cause.
        """
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while self.store.visible_version < version:
                if self._failure is not None or self._ending.is_set():
                    raise RuntimeError(
                        f"Relay {self.name!r} has ended at version {self.version}, which stays "
                        "readable. Start a new one."
                    ) from self._failure
                if time.monotonic() > deadline:
                    lost = "is there" if self._lost is None else f"is lost ({self._lost})"
                    raise TimeoutError(
                        f"Relay {self.name!r} waited {timeout_s} s for version {version}, got "
                        f"{self.version}, which stays readable; the learner's node at "
                        f"{self.address} {lost}. Check that it runs, or wait longer."
                    )
                self._changed.wait(_RETRY_S)
            return self.store.visible_version

    def close(self) -> None:
        """Leave the tree and close the store; readers keep what they have.

        Takes as long as one bucket on its way, at most the time-out of the broadcast.
        """
        self._ending.set()
        self._thread.join()
        self.store.close()

    # -- the relay's thread --------------------------------------------------------------------

    def _connect(self, timeout_s: float) -> tuple[Channel, dict[str, Any]]:
        deadline = time.monotonic() + timeout_s
        problem: OSError | None = None
        while (left_s := deadline - time.monotonic()) > 0 and not self._ending.is_set():
            try:
                channel = Channel.connect(*self._host_and_port, left_s)
                try:
                    return channel, channel.wait_for("welcome", deadline)
                except BaseException:
                    channel.close()
                    raise
            except OSError as error:
                problem = error
                self._ending.wait(min(_RETRY_S, left_s))
        raise TimeoutError(
            f"The learner's node at {self.address} did not answer within {timeout_s} s "
            f"({problem}). Start WeightBroadcast there first, or check the address."
        )

    def _serve(self, channel: Channel | None, welcome: dict[str, Any]) -> None:
        try:
            while not self._ending.is_set():
                if channel is None:
                    try:
                        channel, welcome = self._connect(_ATTEMPT_S)
                    except TimeoutError:
                        self._ending.wait(_RETRY_S)
                        continue
                    if welcome["run"] != self._run:
                        raise RuntimeError(
                            f"Another learner answers at {self.address} than the one this relay "
                            "followed; its versions may be older than those of this node. Start a "
                            "new relay."
                        )
                    self._set_lost(None)
                session = _Session(self, channel, welcome)
                try:
                    session.follow()
                except ConnectionError as error:
                    self._set_lost(str(error))
                finally:
                    session.close()
                    channel = None
        except BaseException as error:
            self._failure = error
            _log.error(
                "Relay %r has ended at version %d, which stays readable",
                self.name,
                self.version,
                exc_info=error,
            )
        finally:
            if channel is not None:
                channel.close()
            self._notify()

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _set_lost(self, lost: str | None) -> None:
        self._lost = lost
        self._notify()


class _Session:
    """A connection to the learner's node: one thread receives messages, another the weights."""

    def __init__(self, relay: WeightRelay, channel: Channel, welcome: dict[str, Any]) -> None:
        self._relay = relay
        self._channel = channel
        self._timeout_s: float = welcome["timeout_s"]
        self._failure: BaseException | None = None
        self._is_over = False
        self._rendezvous = Rendezvous(functools.partial(channel.send, "address"))
        self._transfer = NodeTransfer(
            self._rendezvous,
            host=channel.local_host,
            timeout_s=self._timeout_s,
            is_ending=lambda: self._is_over,
        )
        self._executor = concurrent.futures.ThreadPoolExecutor(1, "dvla-weight-transfer")

    def follow(self) -> None:
        """Join, and pass on the plans that come, until the relay is closed.

        Raises:
            ConnectionError: when the learner's node is gone or silent.
        """
        relay, channel, target = self._relay, self._channel, self._relay._target
        channel.send("join", name=relay.name, version=target.version, has_frozen=target.has_frozen)
        next_heartbeat_s = 0.0
        while not relay._ending.is_set():
            wait_for([channel.socket], min(_POLL_S, self._timeout_s / HEARTBEATS_PER_TIMEOUT))
            for message in channel.receive():
                if message["kind"] == "plan":
                    self._executor.submit(self._run, RoundPlan.from_json(message["plan"]))
                elif message["kind"] == "address":
                    self._rendezvous.receive(message["edge"], message["key"], message["text"])
                elif message["kind"] == "departed":
                    self._rendezvous.fail_peer(message["node"])
            if self._failure is not None:
                raise self._failure
            if channel.silence_s > self._timeout_s:
                raise ChannelError(f"silent for {channel.silence_s:.1f} s")
            if time.monotonic() >= next_heartbeat_s:
                channel.send("heartbeat")
                next_heartbeat_s = time.monotonic() + self._timeout_s / HEARTBEATS_PER_TIMEOUT
            channel.flush()

    def close(self) -> None:
        """Leave the tree. A bucket that is on its way is waited for, at most for the time-out."""
        self._is_over = True
        self._channel.close()
        self._rendezvous.close()
        self._executor.shutdown()
        self._transfer.close()

    def _run(self, plan: RoundPlan) -> None:
        try:
            result = self._transfer.transfer(plan, self._relay._target)
            self._channel.send("result", round=plan.round, result=result.to_json())
        except ConnectionError:
            pass  # the thread that receives messages finds out by itself
        except BaseException as error:
            self._failure = error
