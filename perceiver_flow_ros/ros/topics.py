# SPDX-License-Identifier: Apache-2.0
"""Subscriptions and publishers with the QoS that image pipelines expect, all overridable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rclpy.event_handler import (
    PublisherEventCallbacks,
    SubscriptionEventCallbacks,
    UnsupportedEventTypeError,
)
from rclpy.lifecycle import LifecycleNode, LifecyclePublisher
from rclpy.qos import qos_policy_name_from_kind, QoSPolicyKind, QoSProfile, ReliabilityPolicy
from rclpy.qos_overriding_options import QoSOverridingOptions
from rclpy.subscription import Subscription

# As parameters: qos_overrides.<topic>.<subscription|publisher>.<policy>
OVERRIDABLE = QoSOverridingOptions(
    [getattr(QoSPolicyKind, name) for name in ('HISTORY', 'DEPTH', 'RELIABILITY', 'DURABILITY')]
)


def create_input(
    node: LifecycleNode, kind: type, name: str, callback: Callable, *,
    depth: int, reliability: str,
    on_incompatible: Callable[[str], None], on_lost: Callable[[int], None] | None = None,
) -> Subscription:
    """
    Subscribe like SensorDataQoS.

    Parameters
    ----------
    reliability : 'best_effort' or 'reliable'.
    on_incompatible : told the policy in which a publisher does not fit.
    on_lost : told how many messages were sent but did not arrive, where the middleware knows.

    """
    qos = QoSProfile(depth=depth, reliability=ReliabilityPolicy[reliability.upper()])
    events: dict[str, Any] = {'incompatible_qos': lambda event: on_incompatible(_policy(event))}
    if on_lost is not None:
        events['message_lost'] = lambda event: on_lost(event.total_count_change)

    def subscribe() -> Subscription:
        return node.create_subscription(
            kind, name, callback, qos, qos_overriding_options=OVERRIDABLE,
            event_callbacks=SubscriptionEventCallbacks(**events),
        )

    try:
        return subscribe()
    except UnsupportedEventTypeError:
        events.pop('message_lost')
        return subscribe()


def create_output(
    node: LifecycleNode, kind: type, name: str, on_incompatible: Callable[[str, str], None]
) -> LifecyclePublisher:
    """Publish reliable and volatile; `on_incompatible` is told the topic and the policy."""
    topic = node.resolve_topic_name(name)
    return node.create_lifecycle_publisher(
        kind, name, QoSProfile(depth=5), qos_overriding_options=OVERRIDABLE,
        event_callbacks=PublisherEventCallbacks(
            incompatible_qos=lambda event: on_incompatible(topic, _policy(event))
        ),
    )


def _policy(event: Any) -> str:
    return qos_policy_name_from_kind(event.last_policy_kind).lower()
