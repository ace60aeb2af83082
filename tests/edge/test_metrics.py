"""The edge's metrics: cameras cannot grow them without bound, and counters are there before the first event."""

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest

from edge.metrics import MAX_CAMERA_LABELS, EdgeMetrics
from edge.spool import Stats


def test_ten_thousand_camera_ids_make_no_more_labels_than_are_allowed() -> None:
    registry = CollectorRegistry()
    metrics = EdgeMetrics(registry, Stats)
    for i in range(10_000):
        metrics.frames.labels(metrics.camera(f"attacker-{i}"), "spooled").inc()
    text = generate_latest(registry).decode()
    assert text.count("sightline_edge_frames_total{") == MAX_CAMERA_LABELS + 1
    assert f'sightline_edge_frames_total{{camera="other",state="spooled"}} {10_000.0 - MAX_CAMERA_LABELS}' in text


def test_counters_begin_at_zero_so_that_a_first_event_is_an_increase() -> None:
    registry = CollectorRegistry()
    EdgeMetrics(registry, Stats)
    text = generate_latest(registry).decode()
    for sample in (
        'sightline_edge_uplink_acks_total{kind="rejected",reason="payload_crc"} 0.0',
        'sightline_edge_uplink_acks_total{kind="retry_later",reason="overloaded"} 0.0',
        'sightline_edge_frames_failed_total{code="RESOURCE_EXHAUSTED"} 0.0',
        'sightline_edge_spool_given_up_total{outcome="dropped"} 0.0',
    ):
        assert sample in text
