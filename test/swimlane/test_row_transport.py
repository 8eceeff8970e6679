# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""TorchRL's inference server, in a thread and in a process, on rows of a real pool."""

from __future__ import annotations

import multiprocessing
import sys
import threading

import cloudpickle
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl._comm import MailboxPeerClosedError
from torchrl.data.utils import CloudpickleWrapper
from torchrl.modules.inference_server import InferenceServer, ProcessInferenceServer

from torchrl_dvla.memory import EnvironmentPool, RowLayout, RowWriter
from torchrl_dvla.swimlane import RowTransport

# The processes cannot import this file, so what they run is sent to them by value.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

IMAGE, STATE, ACTION = ("observation", "image"), ("observation", "state"), ("vla_action", "chunk")
LAYOUT = RowLayout(
    {
        IMAGE: ((3, 4, 4), torch.uint8),
        STATE: ((2,), torch.float32),
        ACTION: ((2, 2), torch.float32),
        "policy_version": ((1,), torch.int64),
    }
)


class Sum(nn.Module):
    """Action = sum of the state + mean of the image, which tells whose observation it was."""

    def forward(self, image, state):
        if (state < 0).any():
            raise ArithmeticError("a state below zero")
        total = state.sum(-1) + image.float().mean((-1, -2, -3))
        return total.view(-1, 1, 1).expand(-1, 2, 2)


def make_policy():
    return TensorDictModule(Sum(), in_keys=[IMAGE, STATE], out_keys=[ACTION])


@pytest.fixture
def pool():
    with EnvironmentPool(LAYOUT, num_pages=4, rows_per_page=4) as pool:
        pool.rows[ACTION].fill_(-1)
        yield pool


@pytest.fixture
def transport(pool):
    transport = RowTransport(
        pool.worker_view(), [IMAGE, STATE], [ACTION, "policy_version"], num_clients=4
    )
    yield transport
    transport.close()


def lease(pool):
    page = pool.lease("worker")
    return page * pool.rows_per_page, page.generation


def observe(pool, row, state=1.0, image=0):
    pool.rows[STATE][row] = state
    pool.rows[IMAGE][row] = image


# -- in a thread --------------------------------------------------------------------------------


def test_one_policy_call_for_all_waiting_rows(pool, transport):
    calls = []

    class Counted(Sum):
        def forward(self, image, state):
            calls.append(len(state))
            return super().forward(image, state)

    row, generation = lease(pool)
    clients = [transport.client() for _ in range(3)]
    for number in range(3):
        observe(pool, row + number, state=number, image=10)
    futures = [clients[number].submit(row + number, generation) for number in range(3)]
    policy = TensorDictModule(Counted(), in_keys=[IMAGE, STATE], out_keys=[ACTION])
    with InferenceServer(policy, transport, max_batch_size=8, policy_version=5) as server:
        decisions = [future.result(20) for future in futures]
        assert server.stats()["requests"] == 3
    assert calls == [3]
    assert [float(decision[ACTION][0, 0]) for decision in decisions] == [10.0, 12.0, 14.0]
    assert decisions[0][ACTION].data_ptr() == pool.rows[ACTION][row].data_ptr()
    assert pool.rows["policy_version"][row : row + 3].flatten().tolist() == [5, 5, 5]
    assert (pool.rows[ACTION][row + 3] == -1).all()


def test_max_batch_size_and_a_collate_fn_of_the_users(pool, transport):
    row, generation = lease(pool)
    clients = [transport.client() for _ in range(3)]
    for number in range(3):
        observe(pool, row + number, state=number)
    futures = [clients[number].submit(row + number, generation) for number in range(3)]
    with InferenceServer(
        make_policy(), transport, max_batch_size=2, collate_fn=lambda items: torch.stack(items)
    ) as server:
        assert [float(future.result(20)[ACTION][0, 0]) for future in futures] == [0, 2, 4]
        assert server.stats()["batches"] == 2


def test_an_error_of_the_policy_reaches_the_client_and_the_server_goes_on(pool, transport):
    row, generation = lease(pool)
    client = transport.client()
    with InferenceServer(make_policy(), transport):
        observe(pool, row, state=-1.0)
        with pytest.raises(RuntimeError, match=f"row {row}: ArithmeticError: a state below zero"):
            client(row, generation, timeout=20)
        observe(pool, row, state=2.0)
        assert float(client(row, generation, timeout=20)[ACTION][0, 0]) == 4.0


def test_a_row_that_was_taken_back_is_not_written(pool, transport):
    row, generation = lease(pool)
    other, other_generation = lease(pool)
    observe(pool, row)
    observe(pool, other)
    clients = [transport.client() for _ in range(2)]
    futures = [clients[0].submit(row, generation), clients[1].submit(other, other_generation)]
    pool.reclaim("worker")
    again = {lease(pool)[0] for _ in range(2)}
    assert again == {row, other}
    with InferenceServer(make_policy(), transport):
        for future in futures:
            with pytest.raises(RuntimeError, match="is leased anew"):
                future.result(20)
    assert (pool.rows[ACTION] == -1).all()


def test_a_server_that_stops_answers_what_waits(pool, transport):
    row, generation = lease(pool)
    observe(pool, row)
    entered, leave = threading.Event(), threading.Event()

    def policy(batch):
        entered.set()
        assert leave.wait(20)
        return batch.set(ACTION, torch.zeros(*batch.batch_size, 2, 2))

    clients = [transport.client() for _ in range(2)]
    server = InferenceServer(policy, transport).start()
    first = clients[0].submit(row, generation)
    assert entered.wait(20)
    second = clients[1].submit(row + 1, generation)
    loop = server._worker
    server.shutdown(timeout=0)
    leave.set()
    assert (first.result(20)[ACTION] == 0).all()
    with pytest.raises(RuntimeError, match="InferenceServer is shutting down"):
        second.result(20)
    loop.join(20)


def test_one_request_at_a_time(pool, transport):
    row, generation = lease(pool)
    observe(pool, row)
    client = transport.client()
    future = client.submit(row, generation)
    assert not future.done()
    with pytest.raises(TimeoutError, match=f"No decision for row {row} within 0 s"):
        future.result(0)
    with pytest.raises(RuntimeError, match=f"Row {row} is still waited for"):
        client.submit(row + 1, generation)
    with InferenceServer(make_policy(), transport):
        assert float(future.result(20)[ACTION][0, 0]) == 2.0
        assert future.done()
        client(row, generation, timeout=20)


def test_bad_arguments(pool, transport):
    view = pool.worker_view()
    with pytest.raises(KeyError, match=r"none for \['image'\]"):
        RowTransport(view, ["image"], [ACTION], num_clients=1)
    for num_clients in (0, 2049):
        with pytest.raises(ValueError, match="num_clients must be between 1 and 2048"):
            RowTransport(view, [IMAGE], [ACTION], num_clients=num_clients)
    with pytest.raises(NotImplementedError, match="takes row numbers"):
        transport.submit(TensorDict({}, []))
    for _ in range(4):
        transport.client()
    with pytest.raises(RuntimeError, match="All num_clients=4"):
        transport.client()


# -- in processes -------------------------------------------------------------------------------


def run_env(client, view, row, generation, num_decisions, first, results):
    """An environment process: decides ``num_decisions`` times in its own row."""
    writer = RowWriter(view, [IMAGE, STATE])
    try:
        for number in range(first, first + num_decisions):
            image = torch.full((3, 4, 4), number, dtype=torch.uint8).numpy()
            writer.write(row, generation, [image, [number, 0.0]])
            decision = client(row, generation, timeout=60)
            results.send((float(decision[ACTION][1, 1]), int(decision["policy_version"])))
    except (MailboxPeerClosedError, RuntimeError) as error:
        results.send(repr(error))


class EnvProcess:
    """:func:`run_env` in a process, and what it sends back."""

    def __init__(self, client, pool, row, generation, num_decisions, first=0):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torchrl_dvla.swimlane"])  # else each imports torch
        self.results, theirs = context.Pipe(duplex=False)
        args = (client, pool.worker_view(), row, generation, num_decisions, first, theirs)
        self.process = context.Process(target=CloudpickleWrapper(run_env), args=args, daemon=True)
        self.process.start()
        theirs.close()

    def receive(self):
        assert self.results.poll(60)
        return self.results.recv()

    def end(self):
        self.process.join(60)
        assert self.process.exitcode is not None
        self.results.close()


def test_environment_processes_at_a_server_in_a_process(pool, transport):
    """Also: one of them is killed while it waits, and one that replaces it goes on."""
    rows = [lease(pool) for _ in range(3)]
    server = ProcessInferenceServer(
        policy_factory=CloudpickleWrapper(make_policy),
        transport=transport,
        mp_context="forkserver",
        startup_timeout=60,
    )
    clients = [transport.client() for _ in range(3)]
    lost = EnvProcess(clients[2], pool, *rows[2], num_decisions=1)
    assert transport._requests.poll(60)  # it has submitted its row
    lost.process.kill()
    lost.end()
    try:
        server.start()
        workers = [
            EnvProcess(clients[0], pool, *rows[0], num_decisions=5),
            EnvProcess(clients[1], pool, *rows[1], num_decisions=5, first=10),
            EnvProcess(clients[2], pool, *rows[2], num_decisions=3, first=20),
        ]
        # Action = state + mean of the image = twice the number of the decision.
        for first, worker, count in zip((0, 10, 20), workers, (5, 5, 3)):
            received = [worker.receive() for _ in range(count)]
            assert received == [(2.0 * n, 0) for n in range(first, first + count)]
            worker.end()
        assert server.stats()["requests"] == 14  # that of the dead client too
        waiting = EnvProcess(clients[0], pool, *rows[0], num_decisions=10**6)
        waiting.receive()
    finally:
        server.shutdown()
    while isinstance(last := waiting.receive(), tuple):
        pass
    # A request that has come before the server ends is answered by it; a later one by nobody.
    assert "InferenceServer is shutting down" in last or "MailboxPeerClosedError" in last
    waiting.end()


def test_a_client_is_a_few_numbers(transport):
    """What goes to an environment process holds no row (the memory travels as a descriptor)."""
    state = transport.client().__getstate__()
    assert not any(isinstance(value, (torch.Tensor, TensorDict)) for value in state.values())
