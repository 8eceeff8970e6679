# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The updater inside TorchRL's own collectors and servers."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
from functools import partial

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.collectors import Collector, MultiAsyncCollector, MultiSyncCollector
from torchrl.envs import ToyVLAEnv
from torchrl.modules import inference_server
from torchrl.modules.inference_server import InferenceServer, MPTransport, ProcessInferenceServer
from torchrl.weight_update.weight_sync_schemes import WeightSyncScheme

from torchrl_dvla.memory import SharedArena
from torchrl_dvla.weight_update import AsyncWeightUpdater, WeightStore

STATE, ACTION = ("observation", "state"), "action"


def make_policy(value: float = 0.0) -> TensorDictModule:
    """The action is the bias: what a policy did says which weights it had."""
    policy = TensorDictModule(nn.Linear(4, 2), in_keys=[STATE], out_keys=[ACTION])
    nn.init.zeros_(policy.module.weight)
    return set_bias(policy, value)


def set_bias(policy: TensorDictModule, value: float) -> TensorDictModule:
    with torch.no_grad():
        policy.module.bias.fill_(value)
    return policy


def bias_of(policy: TensorDictModule) -> float:
    (value,) = set(policy.module.bias.tolist())
    return value


REQUEST = TensorDict({"observation": {"state": torch.zeros(4)}}, batch_size=[])


def act(policy: TensorDictModule) -> float:
    return policy(REQUEST.clone())[ACTION][0].item()


make_env = partial(ToyVLAEnv, action_dim=2, state_dim=4)
# Spawned workers unpickle what they are given: modules and factories that any process can import.
make_stock_policy = partial(TensorDictModule, nn.Linear(4, 2), in_keys=[STATE], out_keys=[ACTION])


def actions_of(batch: TensorDict) -> list[float]:
    return sorted({round(v, 4) for v in batch[ACTION].reshape(-1).tolist()})


# -- without processes ---------------------------------------------------------------------------
def make_updater(trained: nn.Module, **kwargs: int) -> AsyncWeightUpdater:
    updater = AsyncWeightUpdater()
    updater.init_on_sender(model=trained, **kwargs)
    updater.connect()
    return updater


def test_it_is_a_registered_backend() -> None:
    updater = WeightSyncScheme.from_backend("dvla", num_slots=4)
    assert isinstance(updater, AsyncWeightUpdater)
    with pytest.raises(RuntimeError, match="has no store"):
        updater.publish()


def test_every_form_of_weights_is_published() -> None:
    trained, served = make_policy(), make_policy()
    updater = make_updater(trained)
    reader = updater.reader("mine")
    forms = [
        None,
        trained,
        TensorDict.from_module(trained),
        TensorDict.from_module(trained).data,
        trained.state_dict(),
        {"module": {"weight": trained.module.weight, "bias": trained.module.bias}},
    ]
    for version, form in enumerate(forms, start=1):
        set_bias(trained, float(version))
        assert updater.publish(form) == version
        reader.adopt_into(served)
        assert bias_of(served) == version
    with pytest.raises(ValueError, match="weights per worker"):
        updater.publish({0: trained, 1: trained})
    updater.shutdown()


def test_the_bytes_of_its_store_are_known_before_it_is_made() -> None:
    trained, taken = make_policy(), list[int]()

    class Pool:
        def arena(self, nbytes: int, name: str) -> SharedArena:
            taken.append(nbytes)
            return SharedArena(nbytes)

    updater = AsyncWeightUpdater(num_slots=5, transport_dtype=torch.bfloat16, max_readers=2)
    expected = updater.store_bytes(trained)
    updater.model_pool = Pool()  # type: ignore[assignment]
    updater.init_on_sender(model=trained)
    assert (taken, updater.store_bytes(trained)) == ([expected], 0)
    updater.shutdown()
    with pytest.raises(TypeError, match="check_nan"):
        AsyncWeightUpdater(check_nan=True)


def test_scalars_of_both_sides() -> None:
    trained, served = make_policy(), make_policy()
    updater = AsyncWeightUpdater(transport_dtype=torch.bfloat16)
    updater.init_on_sender(model=trained, num_workers=1)
    updater.connect()
    updater.reader("mine").adopt_into(served)
    assert updater.publish(version=5) == 5
    with pytest.raises(TimeoutError, match="'mine': 0"):
        updater.wait(5, timeout_s=0.0)
    with pytest.raises(ValueError, match="version must grow, got 4 after 5"):
        updater.publish(version=4)
    stats = updater.stats()
    assert (stats["version"], stats["num_publishes"], stats["num_coalesced"]) == (5, 2, 0)
    assert stats["published_bytes"] == 2 * 2 * (8 + 2)
    assert stats["publish_stall_max_s"] >= stats["publish_stall_s"] > 0.0
    assert (stats["mine_lag"], stats["mine_skipped"], stats["worker_0_lag"]) == (5, 0, 6)
    assert stats["mine_adopt_p99_s"] >= stats["mine_adopt_p50_s"] > 0.0
    updater.shutdown()
    assert updater.stats()["num_publishes"] == 2


def test_what_is_inherited_is_honoured_or_refused() -> None:
    trained, served = make_policy(), make_policy()
    updater = AsyncWeightUpdater()
    updater.init_on_sender(model=trained, num_workers=1)
    with pytest.raises(RuntimeError, match=r"send\(\) needs a sender that is connected"):
        updater.send()
    updater.connect()
    receiver = updater.receiver(0)
    receiver.init_on_receiver(model_id="policy", model=served, worker_idx=0)
    with pytest.raises(RuntimeError, match=r"receive\(\) needs a receiver that is connected"):
        receiver.receive()
    with pytest.raises(ValueError, match="must be init_on_receiver.s, 0, got 1"):
        receiver.connect(worker_idx=1)
    receiver.connect()
    with pytest.raises(ValueError, match="timeout must be None or 0, got 1.0"):
        receiver.receive(timeout=1.0)
    with pytest.raises(NotImplementedError, match="other readers of the store read"):
        receiver.apply_weights(TensorDict.from_module(trained))
    for end in (updater, receiver):
        assert end.model is (trained if end is updater else served)
        assert end.weights["module", "bias"].tolist() == [0.0, 0.0]
        for name in ("strategy", "weights", "shared_transport"):
            with pytest.raises(NotImplementedError, match=f"{name} must be left as it is"):
                setattr(end, name, None)
    assert updater.version == 0
    alone = copy.deepcopy(updater)
    with pytest.raises(RuntimeError, match="has no store"):
        alone.publish()
    receiver.shutdown()
    updater.shutdown()


def test_all_workers_or_none() -> None:
    updater = make_updater(make_policy(), num_workers=2)
    updater.send(worker_ids=[0, 1])
    assert updater.version == 1
    with pytest.raises(ValueError, match="worker_ids"):
        updater.send(worker_ids=0)
    updater.shutdown()


def test_senders_need_one_model_and_receivers_a_reader() -> None:
    with pytest.raises(ValueError, match="model or weights"):
        AsyncWeightUpdater().init_on_sender()
    with pytest.raises(ValueError, match="params_map"):
        AsyncWeightUpdater().init_on_sender(params_map={0: TensorDict()})
    updater = make_updater(make_policy(), num_workers=1)
    with pytest.raises(ValueError, match=r"worker_idx must be one of \[0\], got 3"):
        updater.receiver(3)
    receiver = updater.receiver(0)
    with pytest.raises(ValueError, match="got 1"):
        receiver.init_on_receiver(model_id="policy", model=make_policy(), worker_idx=1)
    updater.shutdown()


def test_a_given_store_is_used_and_outlives_the_updater() -> None:
    trained = make_policy()
    with WeightStore(trained, first_version=7) as store:
        updater = AsyncWeightUpdater(store=store)
        updater.init_on_sender(model=trained)
        updater.connect()
        assert updater.publish() == 8
        updater.shutdown()
        assert store.publish() == 9


def test_a_receiver_adopts_before_each_call_and_counts_its_lag() -> None:
    trained, served = make_policy(), make_policy(-1.0)
    updater = make_updater(trained, num_workers=1)
    receiver = updater.receiver(0)
    receiver.init_on_receiver(model_id="policy", model=served, worker_idx=0)
    receiver.connect(worker_idx=0)
    assert bias_of(served) == 0.0  # connected: the first version is there
    set_bias(trained, 5.0)
    updater.publish()
    assert bias_of(served) == 0.0  # ... and stays until the next call
    assert act(served) == 5.0
    assert (receiver.version, updater.store.adopted_versions()) == (1, {"worker 0": 1})
    assert receiver.receive() is None
    updater.create_transport().send_weights(trained)
    weights = receiver.create_transport().receive_weights(timeout=0.0)
    assert weights is not None
    assert weights["module", "bias"].tolist() == [5.0, 5.0]
    # The runner of a collector may have moved the policy to a copy of its own: it is followed.
    moved = copy.deepcopy(served)
    receiver.model = moved
    set_bias(trained, 6.0)
    updater.publish()
    assert act(moved) == 6.0
    # A pickled policy has lost the connection.
    alone = pickle.loads(pickle.dumps(moved))
    set_bias(trained, 7.0)
    updater.publish()
    assert act(alone) == 6.0
    receiver.shutdown()
    assert updater.store.adopted_versions() == {}
    updater.shutdown()


def test_a_single_process_collector_follows_another_module() -> None:
    acting, trained = make_policy(), make_policy()
    updater = AsyncWeightUpdater()
    schemes = {"policy": updater}
    collector = Collector(make_env, acting, frames_per_batch=4, weight_sync_schemes=schemes)
    address = acting.module.bias.data_ptr()
    batches = iter(collector)
    assert actions_of(next(batches)) == [0.0]
    set_bias(trained, 0.5)
    collector.update_policy_weights_(trained)
    assert actions_of(next(batches)) == [0.5]
    # By copy: the collector's policy may be the one under training at another time.
    assert acting.module.bias.data_ptr() == address
    set_bias(acting, 0.25)
    collector.update_policy_weights_()
    assert actions_of(next(batches)) == [0.25]
    assert updater.version == 2
    collector.shutdown()
    updater.shutdown()


def test_an_inference_server_asks_between_two_batches() -> None:
    trained, served = make_policy(0.5), make_policy()
    updater = make_updater(trained, num_workers=1)
    transport = inference_server.ThreadingTransport()
    options = {"weight_sync": updater.receiver(0), "policy_version_key": "policy_version"}
    server = InferenceServer(served, transport, **options)
    with server:
        client = transport.client()
        answer = client(REQUEST.clone())
        assert (answer[ACTION][0].item(), answer["policy_version"].item()) == (0.5, 0)
        for version, value in ((1, 1.5), (2, 2.5)):
            set_bias(trained, value)
            assert updater.publish() == version
            # A request that was sent after the publish may join a batch whose turn to ask is over.
            answers = [client(REQUEST.clone()) for _ in range(2)]
            assert answers[-1][ACTION][0].item() == value
            assert answers[-1]["policy_version"].item() == version
            for answer in answers:  # the stamp never lies
                assert answer[ACTION][0].item() == answer["policy_version"].item() + 0.5
    updater.shutdown()


def test_a_server_in_its_own_process_follows() -> None:
    trained = make_policy(0.5)
    updater = make_updater(trained, num_workers=1)
    transport = MPTransport(ctx=multiprocessing.get_context("spawn"))
    client = transport.client()
    server = ProcessInferenceServer(
        policy_factory=make_stock_policy,
        transport=transport,
        weight_sync=updater.receiver(0),
        policy_version_key="policy_version",
    )
    with server:
        answer = client(REQUEST.clone())
        assert (answer[ACTION][0].item(), answer["policy_version"].item()) == (0.5, 0)
        set_bias(trained, 1.5)
        updater.publish()
        updater.wait(1, timeout_s=60.0)  # it asks while it has nothing to do, too
        answer = client(REQUEST.clone())
        assert (answer[ACTION][0].item(), answer["policy_version"].item()) == (1.5, 1)
    updater.shutdown()


# -- TorchRL's workers ---------------------------------------------------------------------------
@pytest.mark.parametrize("is_sync", [True, False])
def test_workers_of_a_multi_collector_adopt(is_sync: bool) -> None:
    policy = make_policy(0.25)
    updater = AsyncWeightUpdater()
    num_workers = 2 if is_sync else 1
    collector = (MultiSyncCollector if is_sync else MultiAsyncCollector)(
        [make_env] * num_workers,
        policy,
        # A factory's policies begin with the learner's weights, not with their own.
        policy_factory=None if is_sync else make_stock_policy,
        frames_per_batch=4 * num_workers,
        total_frames=-1,
        weight_sync_schemes={"policy": updater},
        track_policy_version=True,
    )
    try:
        batches = iter(collector)
        assert actions_of(next(batches)) == [0.25]
        adopted = {f"worker {index}": 0 for index in range(num_workers)}
        assert updater.store.adopted_versions() == adopted
        set_bias(policy, 0.5)
        collector.update_policy_weights_()
        assert updater.version == 1
        # What was collected meanwhile may be old; each row says what it is.
        for _ in range(6):
            batch = next(batches)
            if actions_of(batch) == [0.5]:
                break
        assert actions_of(batch) == [0.5]
        assert set(batch["next", "policy_version"].reshape(-1).tolist()) == {1}
        updater.wait(1, timeout_s=0.0)
        assert bias_of(policy) == 0.5  # the learner's memory stays its own
        set_bias(policy, 0.75)
        collector.update_policy_weights_(policy)
        assert updater.version == 2
    finally:
        collector.shutdown()
        updater.shutdown()
