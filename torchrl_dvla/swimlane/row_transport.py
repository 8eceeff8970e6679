# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""TorchRL's inference server on rows of the environment pool."""

from __future__ import annotations

import math
import multiprocessing
import os
import select
import struct
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, NoReturn

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torchrl._comm import MailboxPeerClosedError
from torchrl.modules.inference_server import InferenceTransport

from torchrl_dvla.data.row_fields import RowFields
from torchrl_dvla.memory import WorkerView

__all__ = ["RowClient", "RowFuture", "RowTransport"]

#: Client, row, generation of its page, ticket (monotonic nanoseconds at the submission).
_REQUEST = struct.Struct("<4q")
#: Ticket, and the length of the error text that follows; 0 = the decision is in its row.
_REPLY = struct.Struct("<qH")
#: POSIX: a pipe takes so many bytes whole or not at all, so messages of clients never mix.
_ATOMIC_BYTES = 512
#: How often a waiting client looks whether the server still lives.
_LIVENESS_S = 0.1


class _Request(NamedTuple):
    client: int
    row: int
    generation: int
    ticket: int


class RowTransport(InferenceTransport):
    """A transport whose requests are row numbers.

    An environment process writes its observation into a leased row and submits the row's number.
    TorchRL's server gathers the observations of all waiting rows into one persistent batch (pinned
    where CUDA is) and runs the policy once; the transport scatters the decisions, with the policy
    version, into the same rows and wakes the clients. What passes between the processes is 32 bytes
    one way and 10 the other; the row is what the learner reads later, so nothing is copied out
    again::

        transport = RowTransport(pool.worker_view(), request_keys, response_keys, num_clients=8)
        server = ProcessInferenceServer(policy_factory=make_policy, transport=transport)
        clients = [transport.client() for _ in range(8)]     # one goes to each env process

        client.submit(row, page.generation).result()         # there, for each decision

    Requests and replies are pipes: no lock can be left held by a process that dies. A client that
    dies has its last request answered to nobody. A worker that replaces it is given the same
    client, which ignores that answer. A row is written only while its page is leased under the
    generation of the request (:doc:`/decisions/0010-generations-travel-with-rows`), so an answer
    for a row that was taken back meanwhile is dropped.

    Args:
        view (WorkerView): the rows.
        request_keys (sequence of NestedKey): what the policy reads.
        response_keys (sequence of NestedKey): what is written back; with ``"policy_version"``,
            which the server adds.

    Keyword Args:
        num_clients (int): processes that may hold a client.

    Raises:
        KeyError: if rows lack a key.
        ValueError: if *num_clients* is not positive, or requests could fill the pipe.
    """

    # TorchRL: clients need no hello at the running server, and the server gathers and scatters
    # batches through the four methods below instead of stacking single requests.
    _clients_require_registration = False
    _batched_slot_io = True

    def __init__(
        self,
        view: WorkerView,
        request_keys: Sequence[NestedKey],
        response_keys: Sequence[NestedKey],
        *,
        num_clients: int,
    ) -> None:
        # A client has one request on the way, and a pipe holds 65536 bytes: a submission never
        # waits for the server.
        most = 65536 // _REQUEST.size
        if not 1 <= num_clients <= most:
            raise ValueError(f"num_clients must be between 1 and {most}, got {num_clients}.")
        missing = [key for key in (*request_keys, *response_keys) if key not in view.layout]
        if missing:
            raise KeyError(
                f"Rows must hold the request and response keys, got none for {missing}. Build the "
                f"pool with them; its fields are {list(view.layout)}."
            )
        self._view = view
        self._request_keys, self._response_keys = list(request_keys), list(response_keys)
        self._requests, self._submissions = multiprocessing.Pipe(duplex=False)
        pipes = [multiprocessing.Pipe(duplex=False) for _ in range(num_clients)]
        self._replies = [reply for _, reply in pipes]
        self._answers = [answer for answer, _ in pipes]
        self._num_given = 0
        self._peer_alive: Any = None
        self._map()

    def _map(self) -> None:
        rows = self._view.rows
        self._inputs = RowFields(rows, self._request_keys)
        self._outputs = RowFields(rows, self._response_keys)
        self._batch: tuple[TensorDictBase | None, RowFields | None] = (None, None)

    # -- clients --------------------------------------------------------------------------------

    def client(self) -> RowClient:
        """The next client; it can be sent to a process that is being started.

        Raises:
            RuntimeError: if all ``num_clients`` were given out.
        """
        if self._num_given == len(self._answers):
            raise RuntimeError(
                f"All num_clients={self._num_given} clients were given out. Raise num_clients, or "
                "give a replacement the client of the process that it replaces."
            )
        number, self._num_given = self._num_given, self._num_given + 1
        return RowClient(
            number,
            self._submissions,
            self._answers[number],
            self._view,
            self._response_keys,
            self._peer_alive,
        )

    def submit(self, td: TensorDictBase) -> NoReturn:
        """Refused: requests are row numbers, see :meth:`client`."""
        raise NotImplementedError("RowTransport takes row numbers. Call client().submit(row, ...).")

    def _set_peer_alive(self, alive_event: Any) -> None:
        self._peer_alive = alive_event

    # -- the server -----------------------------------------------------------------------------

    def wait_for_work(self, timeout: float) -> None:
        """Wait until a row is ready or ``timeout`` seconds are over."""
        _is_readable(self._requests, timeout)

    def drain_slots(self, max_items: int) -> tuple[list[_Request], list[float]]:
        """Up to ``max_items`` requests that wait, and when each was submitted."""
        requests: list[_Request] = []
        if max_items > 0 and _is_readable(self._requests, 0.0):
            data = os.read(self._requests.fileno(), max_items * _REQUEST.size)
            requests = [_Request(*fields) for fields in _REQUEST.iter_unpack(data)]
        return requests, [request.ticket * 1e-9 for request in requests]

    def request_batch(self, capacity: int) -> TensorDict:
        """Memory for the observations of ``capacity`` rows."""
        return self._empty(self._request_keys, capacity)

    def response_batch(self, capacity: int) -> TensorDict:
        """Memory for the decisions of ``capacity`` rows."""
        return self._empty(self._response_keys, capacity)

    def gather_requests(self, slots: Sequence[_Request], out: TensorDictBase) -> None:
        """Copy the observations of the rows into the first rows of ``out``."""
        if self._batch[0] is not out:
            self._batch = (out, RowFields(out, self._request_keys))
        self._inputs.gather(torch.tensor([slot.row for slot in slots]), self._batch[1])

    def resolve_batch(self, slots: Sequence[_Request], results: TensorDictBase) -> None:
        """Write the decisions into their rows and wake the clients."""
        errors = [self._refusal(slot) for slot in slots]
        good = [number for number, error in enumerate(errors) if not error]
        if len(good) < len(slots):
            results = results[torch.tensor(good, dtype=torch.int64)]
        rows = torch.tensor([slots[number].row for number in good], dtype=torch.int64)
        self._outputs.scatter(rows, results)
        for slot, error in zip(slots, errors):
            self._reply(slot, error)

    def drain(self, max_items: int) -> tuple[list[TensorDict], list[_Request]]:
        """Single requests, for servers with a ``collate_fn`` of their own."""
        slots, _ = self.drain_slots(max_items)
        return [self._inputs.gather(torch.tensor([slot.row]))[0] for slot in slots], slots

    def resolve(self, callback: _Request, result: TensorDictBase) -> None:
        """Write one decision."""
        self.resolve_batch([callback], result.select(*self._response_keys).unsqueeze(0))

    def resolve_exception(self, callback: _Request, exc: BaseException) -> None:
        """Raise ``exc``, as text, in the client."""
        self._reply(callback, f"{type(exc).__name__}: {exc}")

    def _empty(self, keys: Sequence[NestedKey], capacity: int) -> TensorDict:
        batch = TensorDict({}, batch_size=[capacity])
        for key in keys:
            shape, dtype = self._view.layout[key]
            batch.set(key, torch.zeros((capacity, *shape), dtype=dtype))
        return batch

    def _refusal(self, request: _Request) -> str:
        try:
            self._view.require_leased(request.row, request.generation)
        except (RuntimeError, IndexError) as error:
            return str(error)
        return ""

    def _reply(self, request: _Request, error: str) -> None:
        text = error.encode()[: _ATOMIC_BYTES - _REPLY.size]
        try:
            reply = _REPLY.pack(request.ticket, len(text)) + text
            os.write(self._replies[request.client].fileno(), reply)
        except OSError:
            pass  # nobody holds this client any more

    # -- life -----------------------------------------------------------------------------------

    def close(self) -> None:
        """Close this process's ends: clients whose server ran in it raise."""
        for connection in (self._requests, self._submissions, *self._replies, *self._answers):
            connection.close()

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        for name in ("_inputs", "_outputs", "_batch"):
            del state[name]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._map()


class RowClient:
    """The place of one environment process at a :class:`RowTransport`; one request at a time."""

    def __init__(
        self,
        number: int,
        submissions: Connection,
        answers: Connection,
        view: WorkerView,
        response_keys: Sequence[NestedKey],
        peer_alive: Any,
    ) -> None:
        self._number = number
        self._submissions, self._answers = submissions, answers
        self._view = view
        self._response_keys = list(response_keys)
        self._peer_alive = peer_alive
        self._in_flight: RowFuture | None = None
        self._map()

    def _map(self) -> None:
        self._outputs = [(key, self._view.rows.get(key)) for key in self._response_keys]

    def submit(self, row: int, generation: int) -> RowFuture:
        """Ask for the decision of ``row``, whose observation is written.

        Args:
            row (int): a row of a leased page.
            generation (int): the page's, as in the lease.

        Returns:
            RowFuture: done when the decision is in the row.

        Raises:
            RuntimeError: if the last request has not been answered.
        """
        if self._in_flight is not None:
            raise RuntimeError(
                f"Row {self._in_flight.row} is still waited for. A client has one request on the "
                "way: take its result() first."
            )
        ticket = time.monotonic_ns()
        request = _REQUEST.pack(self._number, row, generation, ticket)
        os.write(self._submissions.fileno(), request)
        self._in_flight = RowFuture(self, row, ticket)
        return self._in_flight

    def __call__(self, row: int, generation: int, timeout: float | None = None) -> TensorDict:
        """Ask, and wait for the decision."""
        return self.submit(row, generation).result(timeout)

    def _decision(self, row: int) -> TensorDict:
        return TensorDict({key: tensor[row] for key, tensor in self._outputs}, [])

    def _receive(self, ticket: int, timeout: float | None) -> str | None:
        """The error text of the reply, "" for none; ``None`` when the time is over."""
        deadline_s = None if timeout is None else time.monotonic() + timeout
        while True:
            left_s = _LIVENESS_S
            if deadline_s is not None:
                left_s = min(left_s, max(0.0, deadline_s - time.monotonic()))
            if _is_readable(self._answers, left_s):
                head = os.read(self._answers.fileno(), _REPLY.size)
                if not head:
                    self._raise_closed()
                answered, length = _REPLY.unpack(head)
                text = os.read(self._answers.fileno(), length).decode(errors="replace")
                if answered == ticket:
                    return text
                # An answer to the process that held this client before.
            elif self._peer_alive is not None and not self._peer_alive.is_set():
                self._raise_closed()
            elif deadline_s is not None and time.monotonic() >= deadline_s:
                return None

    def _raise_closed(self) -> NoReturn:
        raise MailboxPeerClosedError(
            "The inference server ended before it replied. Start it anew, and submit the row again."
        )

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        del state["_outputs"]
        return state | {"_in_flight": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._map()


class RowFuture:
    """A decision that is being taken."""

    def __init__(self, client: RowClient, row: int, ticket: int) -> None:
        #: The row it is for.
        self.row = row
        self._client = client
        self._ticket = ticket
        self._decision: TensorDict | None = None
        self._error: Exception | None = None

    def done(self) -> bool:
        """Whether :meth:`result` would return at once, with a decision or an error."""
        if self._decision is None and self._error is None:
            self._settle(0.0)
        return self._decision is not None or self._error is not None

    def result(self, timeout: float | None = None) -> TensorDict:
        """The decision: views on the fields of its row, valid while the row is leased.

        Args:
            timeout (float, optional): seconds to wait; ``None`` waits for ever. The request stays
                on its way when they are over.

        Raises:
            TimeoutError: if there is no answer in time.
            RuntimeError: if the policy or the server failed, with its message; a
                ``MailboxPeerClosedError`` if the server is gone.
        """
        if self._decision is None and self._error is None and not self._settle(timeout):
            raise TimeoutError(f"No decision for row {self.row} within {timeout:g} s.")
        if self._error is not None:
            raise self._error
        assert self._decision is not None
        return self._decision

    def _settle(self, timeout: float | None) -> bool:
        try:
            text = self._client._receive(self._ticket, timeout)
        except MailboxPeerClosedError as error:
            text, self._error = "", error
        if text is None:
            return False
        self._client._in_flight = None
        if text:
            self._error = RuntimeError(f"No decision for row {self.row}: {text}")
        elif self._error is None:
            self._decision = self._client._decision(self.row)
        return True


def _is_readable(connection: Connection, timeout_s: float) -> bool:
    poll = select.poll()
    poll.register(connection.fileno(), select.POLLIN)
    return bool(poll.poll(math.ceil(timeout_s * 1000)))
