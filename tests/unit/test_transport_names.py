"""Each private name and behaviour of Faust, mode and aiokafka that workers/transport.py relies on exists as pinned."""

import asyncio
import inspect
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import faust
import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import NewTopic
from aiokafka.consumer import subscription_state
from aiokafka.consumer.fetcher import Fetcher
from aiokafka.consumer.group_coordinator import GroupCoordinator
from aiokafka.consumer.subscription_state import Assignment, SubscriptionState, TopicPartitionState
from aiokafka.coordinator.assignors.sticky.sticky_assignor import StickyPartitionAssignor
from aiokafka.partitioner import murmur2
from faust.agents.manager import AgentManager
from faust.app.base import App, BootStrategy
from faust.tables.recovery import Recovery
from faust.transport import conductor, consumer
from faust.transport.drivers import aiokafka as driver
from faust.types.tuples import ConsumerMessage
from faust.web import base as web_base
from mode import Service
from mode.threads import ServiceThread
from mode.utils.queues import FlowControlEvent
from mode.worker import Worker

from workers import transport


def source(thing: Any) -> str:
    return inspect.getsource(thing)


def parameters(thing: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(thing).parameters)


@pytest.mark.parametrize(
    ("package", "pinned"), [("faust-streaming", "0.15.3"), ("mode-streaming", "0.7.1"), ("aiokafka", "0.14.0")]
)
def test_the_three_packages_are_the_ones_that_were_read(package: str, pinned: str) -> None:
    assert version(package) == pinned


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(transport.BaseApp, faust.App), (transport.Consumer, driver.Consumer), (transport.Worker, faust.Worker)],
)
def test_our_subclasses_override_only_what_they_mean_to(ours: type, theirs: type) -> None:
    meant = {
        "BootStrategy", "_create_directories", "_new_transport", "on_rebalance_end", "_on_rebalance_when_stopped",
        "mundane_level",
        "_new_consumer_thread", "perform_seek", "verify_event_path", "on_buffer_drop", "getmany",
        "_schedule_shutdown", "_setproctitle",
    }  # fmt: skip
    python = {"__init__", "__module__", "__doc__", "__abstractmethods__", "__parameters__", "__annotations__"}
    python |= {"_abc_impl", "_tasks", "__orig_bases__", "__dict__", "__weakref__", "logger", "log", "abstract"}
    python |= {"__firstlineno__", "__static_attributes__"}  # of Python 3.13

    overridden = {name for name in vars(ours) if hasattr(theirs, name)} - python

    assert overridden <= meant


def test_attributes_of_our_app_do_not_hide_attributes_of_faust() -> None:
    from workers.app import App as OurApp

    meant = {"on_start", "on_stop", "on_shutdown", "on_webserver_init", "__init__", "__module__", "__doc__"}
    set_in_init = {
        "state_of_worker", "drained", "settings", "_handler", "_merchants", "_start_hook", "_stop_hook",
        "_web_setup", "_known", "_background", "lanes", "thread", "feed_lane", "subscribe_again",
    }  # fmt: skip

    assert not {name for name in set_in_init if hasattr(faust.App, name)}
    added = {name for name in vars(OurApp) if name not in meant and not name.startswith("__")}
    assert not {name for name in added if hasattr(faust.App, name)} - {"_abc_impl", "_tasks", "logger", "log"}


class TestFaust:
    """What is called or replaced in Faust."""

    def test_the_transport_makes_consumer_and_conductor_from_its_class_attributes(self) -> None:
        assert driver.Transport.Consumer is driver.Consumer
        assert "self.Consumer(" in source(driver.Transport.create_consumer)
        assert "self.Conductor(" in source(driver.Transport.create_conductor)
        assert "transport.by_url" in source(App._new_transport)

    def test_the_thread_is_made_and_makes_its_consumer_where_we_replace_it(self) -> None:
        assert parameters(driver.Consumer._new_consumer_thread) == ["self"]
        assert "_new_consumer_thread()" in source(consumer.ThreadDelegateConsumer.__init__)
        assert "self._create_worker_consumer(transport)" in source(driver.AIOKafkaConsumerThread._create_consumer)
        assert "self._rebalance_listener" in source(driver.AIOKafkaConsumerThread.__post_init__)
        assert "topics=set(topics)" in source(driver.AIOKafkaConsumerThread.subscribe)
        assert parameters(driver.AIOKafkaConsumerThread._ensure_consumer) == ["self"]

    def test_a_fetch_goes_through_fetch_records_in_the_thread(self) -> None:
        assert "self._fetch_records" in source(driver.AIOKafkaConsumerThread.getmany)
        names = ["self", "consumer", "active_partitions", "timeout", "max_records"]
        assert parameters(driver.AIOKafkaConsumerThread._fetch_records) == names
        assert "if not self.consumer.flow_active" in source(driver.AIOKafkaConsumerThread._fetch_records)
        assert parameters(driver.Consumer._getmany) == ["self", "active_partitions", "timeout"]

    def test_messages_are_drained_from_getmany_and_nothing_else_is_done_with_what_it_does_not_yield(self) -> None:
        drain = source(consumer.Consumer._drain_messages)
        assert "getmany = self.getmany" in drain
        assert "callback(message), self.suspend_flow.wait()" in drain
        loop = drain.index("async for tp, message in ait:")
        assert loop < drain.index("get_read_offset(tp)") < drain.index("set_read_offset(tp, offset)")

    def test_back_pressure_moves_partitions_between_two_sets(self) -> None:
        assert "self._buffered_partitions.add(tp)" in source(consumer.Consumer.on_buffer_full)
        assert "active_partitions.add(tp)" in source(consumer.Consumer.on_buffer_drop)
        assert "_active_partitions" in source(consumer.Consumer._get_active_partitions)

    def test_a_rebalance_ends_after_the_queues_were_emptied_for_the_last_time(self) -> None:
        resume = source(Recovery._resume_streams)
        order = ["app.flow_control.resume()", "consumer.resume_flow()", "_fetcher.maybe_start()", "on_rebalance_end()"]
        assert sorted(order, key=resume.index) == order
        assert "self.clear()" in source(FlowControlEvent.resume)
        assert "consumer.perform_seek()" in resume

    def test_the_signal_of_a_revocation_is_sent_with_and_without_an_assignment(self) -> None:
        revoked = source(App._on_partitions_revoked)
        assert revoked.index("NOT COMMITTING: NO ASSIGNMENT") < revoked.index("self.on_partitions_revoked.send")
        assert "return self._on_rebalance_when_stopped()" in revoked
        assert "thread.app.consumer_generation_id = generation" in source(
            driver.ConsumerRebalanceListener.on_partitions_assigned
        ).replace("self._thread.", "thread.")

    def test_a_stop_sends_its_signal_while_the_consumer_is_alive(self) -> None:
        stop = source(App.on_stop)
        assert stop.index("self._stop_consumer()") < stop.index("self.on_before_shutdown.send()")
        assert source(Service.stop).index("self.on_stop()") < source(Service.stop).index("self._stop_children()")

    def test_the_conductor_can_be_told_to_look_again_and_waits_the_time_we_set(self) -> None:
        assert conductor.Conductor._resubscribe_sleep_lock_seconds == 45.0
        assert "self._resubscribe_sleep_lock_seconds" in source(conductor.Conductor._subscriber.fun)
        assert "_subscription_changed.set()" in source(conductor.Conductor._flag_changes)
        assert parameters(AgentManager.update_topic_index) == ["self"]
        assert "self._agents_started.set()" in source(AgentManager.on_start)

    def test_the_boot_strategy_can_leave_out_the_producer(self) -> None:
        assert BootStrategy.enable_kafka_producer is None
        assert "self.enable_kafka_producer" in source(BootStrategy._should_enable_kafka_producer)
        assert App.BootStrategy is BootStrategy

    def test_a_message_takes_the_arguments_we_give(self) -> None:
        first = ["topic", "partition", "offset", "timestamp", "timestamp_type", "headers", "key", "value", "checksum"]
        assert parameters(ConsumerMessage)[:9] == first
        assert {"tp", "generation_id"} <= set(parameters(ConsumerMessage))

    def test_the_web_server_calls_on_webserver_init_with_the_web_app(self) -> None:
        assert "self.app.on_webserver_init(self)" in source(web_base.Web.init_server)

    def test_the_settings_we_give_exist(self) -> None:
        settings = faust.App("names").conf
        for name in ("web_router_enabled", "web_tables_enabled", "web_stats_enabled", "stream_recovery_delay"):
            assert hasattr(settings, name)


class TestMode:
    """What is called or replaced in mode."""

    def test_a_thread_has_a_loop_of_its_own_that_is_closed_at_the_end(self) -> None:
        assert "self.thread_loop = thread_loop or asyncio.new_event_loop()" in source(ServiceThread.__init__)
        assert "self.thread_loop.close()" in source(ServiceThread._start_thread)

    def test_signals_go_through_schedule_shutdown(self) -> None:
        assert "_schedule_shutdown(signal.SIGTERM)" in source(Worker._on_sigterm)
        assert "_schedule_shutdown(signal.SIGINT)" in source(Worker._on_sigint)
        assert "if self.override_logging" in source(Worker.default_on_first_start)
        assert {"override_logging", "quiet", "redirect_stdouts", "loop"} <= set(parameters(Worker.__init__))


class TestAiokafka:
    """What is called in aiokafka."""

    def test_the_consumer_takes_the_arguments_we_give(self) -> None:
        names = {
            "client_id", "group_id", "bootstrap_servers", "partition_assignment_strategy", "isolation_level",
            "enable_auto_commit", "auto_offset_reset", "max_partition_fetch_bytes", "fetch_max_wait_ms",
            "request_timeout_ms", "session_timeout_ms", "rebalance_timeout_ms", "heartbeat_interval_ms",
            "max_poll_interval_ms", "metadata_max_age_ms",
        }  # fmt: skip
        assert names <= set(parameters(AIOKafkaConsumer.__init__))
        assert StickyPartitionAssignor.name == "sticky"

    def test_the_consumer_keeps_its_parts_under_these_names(self) -> None:
        body = source(AIOKafkaConsumer)
        for name in ("_coordinator", "_fetcher", "_subscription", "_max_poll_records", "_closed"):
            assert f"self.{name} = " in body, name
        for name in ("coordinator_id", "_coordinator_lookup_lock", "generation", "_coordination_task"):
            assert f"self.{name} = " in source(GroupCoordinator), name
        assert "self._fetch_task = " in source(Fetcher.__init__)

    def test_the_coordination_task_does_not_wait_while_the_coordinator_is_known(self) -> None:
        known = source(GroupCoordinator.ensure_coordinator_known)
        assert known.index("if self.coordinator_id is not None:") < known.index("async with")

    def test_an_assignment_is_an_object_that_ends_when_another_takes_its_place(self) -> None:
        async def check() -> None:
            tp = TopicPartition("t", 0)
            state = SubscriptionState()
            state.subscribe({"t"})
            state.assign_from_subscribed({tp})
            first = state.subscription.assignment
            assert first.active
            assert first.tps == {tp}
            assert not first.unassign_future.done()

            state.assign_from_subscribed({tp})
            assert not first.active
            assert first.unassign_future.done()
            second = state.subscription.assignment
            state.subscribe({"t", "u"})
            assert not second.active
            assert state.subscription.assignment is None

        asyncio.run(check())

    def test_each_fetch_asks_for_as_many_bytes_of_a_partition_as_is_set_then(self) -> None:
        assert "self._max_partition_fetch_bytes" in source(Fetcher._get_actions_per_node)

    def test_a_new_assignment_has_no_position_until_the_committed_offset_is_known(self) -> None:
        async def check() -> None:
            tp = TopicPartition("t", 0)
            state = Assignment([tp]).state_value(tp)
            assert isinstance(state, TopicPartitionState)
            assert not state.has_valid_position
            assert state.highwater is None
            state.seek(5)
            assert state.position == 5

        asyncio.run(check())
        assert "await tp_state.fetch_committed()" in source(Fetcher._update_fetch_positions)

    def test_nothing_runs_between_the_last_wait_and_the_return_of_fetched_records(self) -> None:
        body = source(Fetcher.fetched_records)
        # `drained` is filled and returned without an await in between; our look at the assignment relies on it.
        assert "await" not in body[body.index("drained = {}") : body.index("return drained\n\n            waiter")]
        assert "position != self._partition_records.next_fetch_offset" in source(
            inspect.getmodule(Fetcher).FetchResult.check_assignment  # type: ignore[union-attr]
        )

    def test_a_seek_drops_what_was_fetched_before(self) -> None:
        assert "self._fetcher.seek_to(partition, offset)" in source(AIOKafkaConsumer.seek)
        assert "del self._records[tp]" in source(Fetcher.seek_to)
        assert "tp_state.position != fetch_offset" in source(Fetcher._proc_fetch_request)

    def test_a_commit_is_tried_for_ever_and_can_be_cancelled(self) -> None:
        body = source(GroupCoordinator.commit_offsets)
        assert "while True" in body
        assert "asyncio.shield(self._do_commit_offsets" in body
        assert "CommitFailedError" in body

    def test_the_position_moves_past_markers_once_a_fetch_is_used_up(self) -> None:
        unpack = source(inspect.getmodule(Fetcher).PartitionRecords._unpack_records)  # type: ignore[union-attr]
        assert (
            "if next_batch.is_control_batch:\n                self.next_fetch_offset = next_batch.next_offset" in unpack
        )
        assert "consumed_to" in source(subscription_state.TopicPartitionState)

    def test_a_topic_with_the_default_replication_needs_an_empty_assignment_of_replicas(self) -> None:
        assert NewTopic("t", 4, -1, {}).num_partitions == 4

    def test_keys_are_hashed_as_kafka_does(self) -> None:
        # From the tests of Kafka's own Utils.murmur2.
        known = {b"21": -973932308, b"foobar": -790332482, b"a-little-bit-long-string": -985981536}
        for key, expected in known.items():
            assert (murmur2(key) ^ 0x80000000) - 0x80000000 == expected
