"""Writes the Grafana dashboards: `python deploy/grafana/dashboards.py [OUT]`.

A dashboard is a table of panels here and a file of JSON beside it, which is committed, because Grafana reads JSON and
people read tables. `tests/deploy/test_monitoring.py` writes them again and compares, and asks a real Prometheus that
scrapes live services for every expression.
"""

import json
import sys
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent / "dashboards"
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
HEIGHT = 8
WIDTH = 24


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel. `queries`: expression -> legend. `kind`: a Grafana panel type. `unit`: a Grafana unit id."""

    title: str
    queries: dict[str, str]
    unit: str = "short"
    kind: str = "timeseries"
    width: int = 8
    about: str = ""


@dataclass(frozen=True, slots=True)
class Dashboard:
    """`job`: regular expression of the jobs whose instances can be chosen."""

    uid: str
    title: str
    job: str
    rows: dict[str, list[Panel]]


def here(metric: str) -> str:
    """A metric at the chosen instances."""
    return f'{metric}{{instance=~"$instance"}}'


def rate(metric: str, by: str) -> str:
    return f"sum by ({by}) (rate({here(metric)}[$__rate_interval]))"


def total(metric: str, by: str) -> str:
    return f"sum by ({by}) (rate({metric}[$__rate_interval]))"


def quantiles(metric: str, by: str = "") -> dict[str, str]:
    """Median and 95th percentile of a histogram at the chosen instances."""
    buckets = rate(f"{metric}_bucket", f"{by}, le" if by else "le")
    legend = f"{{{{{by}}}}} " if by else ""
    return {
        f"histogram_quantile(0.5, {buckets})": f"{legend}p50",
        f"histogram_quantile(0.95, {buckets})": f"{legend}p95",
    }


E, C = "sightline_edge", "sightline_cloud"
ONE = "{{instance}}"
UNARY = 'grpc_server_handling_seconds_bucket{grpc_type="unary", instance=~"$instance"}[$__rate_interval]'
STARTED = f"sum by (grpc_method) ({here('grpc_server_started_total')})"
RUNNING = f"{STARTED} - (sum by (grpc_method) ({here('grpc_server_handled_total')}) or {STARTED} * 0)"
UPLINKS_DOWN = f"count({E}_uplink_connected == 0 and {E}_uplink_enabled == 1) or vector(0)"

CALLS = [
    Panel("Refused by identity or rate", {rate("sightline_rpc_refused_total", "reason"): "{{reason}}"}, "reqps"),
    Panel(
        "Calls ended",
        {rate("grpc_server_handled_total", "grpc_method, grpc_code"): "{{grpc_method}} {{grpc_code}}"},
        "reqps",
    ),
    Panel(
        "Duration of unary calls",
        {f"histogram_quantile(0.95, sum by (grpc_method, le) (rate({UNARY})))": "{{grpc_method}} p95"},
        "s",
    ),
    Panel("Calls running", {RUNNING: "{{grpc_method}}"}),
]
PROCESS = [
    Panel("Memory", {here("process_resident_memory_bytes"): ONE}, "bytes"),
    Panel("CPU cores", {f"rate({here('process_cpu_seconds_total')}[$__rate_interval])": ONE}),
    Panel("Open files", {here("process_open_fds"): ONE}),
]


def stat(title: str, expression: str) -> Panel:
    return Panel(title, {expression: ""}, kind="stat", width=4)


FLEET = Dashboard(
    "sightline-fleet",
    "Sightline / Fleet",
    "sightline-.+",
    {
        "Now": [
            stat("Edges up", 'sum(up{job="sightline-edge"})'),
            stat("Cloud replicas up", 'sum(up{job="sightline-cloud"})'),
            stat("Not ready", "count(sightline_ready == 0) or vector(0)"),
            stat("Uplinks down", UPLINKS_DOWN),
            stat("Frames waiting at edges", f"sum({E}_spool_frames)"),
            stat("Alerts firing", 'count(ALERTS{alertstate="firing"}) or vector(0)'),
        ],
        "Frames": [
            Panel("Pictures answered", {f"sum by (state) (instance_state:{E}_frames:rate5m)": "{{state}}"}, "ops"),
            Panel("Records logged", {f"sum by (outcome) (instance_outcome:{C}_events:rate5m)": "{{outcome}}"}, "ops"),
            Panel("Capture to detection", {f"{C}_capture_to_detection_seconds:p95_5m": "p95"}, "s"),
        ],
        "Edges": [
            Panel("Oldest frame in a spool", {f"topk(10, {E}_spool_oldest_age_seconds)": ONE}, "s"),
            Panel("Spool fill", {f"topk(10, instance:{E}_spool_fill:ratio)": ONE}, "percentunit"),
            Panel(
                "Sent to the cloud",
                {f"sum(rate({E}_uplink_sent_bytes_total[$__rate_interval])) * 8": "all edges"},
                "bps",
            ),
        ],
        "Cloud": [
            Panel(
                "Wait for a batch, mean",
                {f"instance:{C}_queue_seconds:mean5m": ONE},
                "s",
                about="The autoscaler's measure.",
            ),
            Panel("Rejected", {total(f"{C}_rejected_total", "reason"): "{{reason}}"}, "ops"),
            Panel("Sent away for now", {total(f"{C}_retry_later_total", "reason"): "{{reason}}"}, "ops"),
        ],
        "Versions": [
            Panel("Software", {"count by (version, python, machine) (sightline_build_info)": ""}, kind="table"),
            Panel("Codecs at edges", {f"count by (name, model_id) ({E}_model_info)": ""}, kind="table"),
            Panel("Models in the cloud", {f"count by (kind, name, model_id) ({C}_model_info)": ""}, kind="table"),
        ],
    },
)

EDGE = Dashboard(
    "sightline-edge",
    "Sightline / Edge",
    "sightline-edge",
    {
        "Pictures": [
            Panel("Answered, by camera", {rate(f"{E}_frames_total", "camera"): "{{camera}}"}, "ops"),
            Panel("Refused, by status", {rate(f"{E}_frames_failed_total", "code"): "{{code}}"}, "ops"),
            Panel("In work", {here(f"{E}_in_flight_bytes"): ONE}, "bytes"),
        ],
        "Encoder": [
            Panel("Stages", quantiles(f"{E}_encode_seconds", "stage"), "s"),
            Panel("Frames in a batch", quantiles(f"{E}_batch_frames")),
            Panel("Bits per pixel", quantiles(f"{E}_bits_per_pixel")),
            Panel("Coded size", quantiles(f"{E}_frame_bytes"), "bytes"),
            Panel("Until on disk", quantiles(f"{E}_spool_seconds"), "s"),
            Panel("Quality that the uplink's budget allows", {here(f"{E}_paced_quality"): ONE}),
        ],
        "Spool": [
            Panel("Frames", {here(f"{E}_spool_frames"): ONE}),
            Panel("Oldest frame", {here(f"{E}_spool_oldest_age_seconds"): ONE}, "s"),
            Panel(
                "Size",
                {
                    here(f"{E}_spool_used_bytes"): "used {{instance}}",
                    here(f"{E}_spool_limit_bytes"): "limit {{instance}}",
                    here(f"{E}_disk_free_bytes"): "disk free {{instance}}",
                },
                "bytes",
            ),
            Panel("Writable", {here(f"{E}_spool_writable"): ONE}, "bool"),
            Panel("Given up", {rate(f"{E}_spool_given_up_total", "outcome"): "{{outcome}}"}, "ops"),
            Panel("Refused: spool full", {rate(f"{E}_spool_refused_total", "instance"): ONE}, "ops"),
        ],
        "Uplink": [
            Panel("Connected", {here(f"{E}_uplink_connected"): ONE}, "bool"),
            Panel("Sent", {rate(f"{E}_uplink_sent_bytes_total", "instance") + " * 8": ONE}, "bps"),
            Panel("Capacity", {here(f"{E}_uplink_capacity_bits_per_second"): ONE}, "bps"),
            Panel("Frames under way", {here(f"{E}_uplink_in_flight_frames"): ONE}),
            Panel("Frames sent", {rate(f"{E}_uplink_sent_frames_total", "instance"): ONE}, "ops"),
            Panel("Acknowledgements", {rate(f"{E}_uplink_acks_total", "kind, reason"): "{{kind}} {{reason}}"}, "ops"),
            Panel("Streams ended", {rate(f"{E}_uplink_connects_total", "end"): "{{end}}"}, "ops"),
        ],
        "Calls": CALLS,
        "Process": PROCESS,
    },
)

CLOUD = Dashboard(
    "sightline-cloud",
    "Sightline / Cloud",
    "sightline-cloud",
    {
        "Frames": [
            Panel("Records logged", {rate(f"{C}_events_total", "outcome"): "{{outcome}}"}, "ops"),
            Panel("Rejected", {rate(f"{C}_rejected_total", "reason"): "{{reason}}"}, "ops"),
            Panel("Sent away for now", {rate(f"{C}_retry_later_total", "reason"): "{{reason}}"}, "ops"),
            Panel("Came again", {rate(f"{C}_duplicates_total", "instance"): ONE}, "ops"),
            Panel("Coded size", quantiles(f"{C}_frame_bytes"), "bytes"),
            Panel("Capture to detection", quantiles(f"{C}_capture_to_detection_seconds"), "s"),
        ],
        "Batches": [
            Panel("Wait for a batch", quantiles(f"{C}_queue_seconds"), "s"),
            Panel("Frames in a batch", quantiles(f"{C}_batch_size")),
            Panel(
                "Held",
                {
                    here(f"{C}_waiting_frames"): "waiting {{instance}}",
                    here(f"{C}_in_flight_frames"): "held {{instance}}",
                },
            ),
            Panel("Decoding", quantiles(f"{C}_decode_seconds", "stage"), "s"),
            Panel("Task models", quantiles(f"{C}_task_seconds", "task"), "s"),
            Panel("Coded bytes held", {here(f"{C}_in_flight_bytes"): ONE}, "bytes"),
        ],
        "Log and consumers": [
            Panel("Until a record is durable", quantiles(f"{C}_log_append_seconds"), "s"),
            Panel("Disk free", {here(f"{C}_disk_free_bytes"): ONE}, "bytes"),
            Panel("Ready", {here("sightline_ready"): ONE}, "bool"),
            Panel("Subscriptions", {here(f"{C}_subscribers"): ONE}),
            Panel("Furthest behind", {here(f"{C}_subscriber_lag_events"): ONE}),
            Panel("Upload streams", {here(f"{C}_upload_streams"): ONE}),
        ],
        "Calls": CALLS,
        "Process": PROCESS,
    },
)

DASHBOARDS = (FLEET, EDGE, CLOUD)


def to_json(dashboard: Dashboard) -> dict[str, Any]:
    """The dashboard as Grafana 10 reads it."""
    ids = count(1)
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in dashboard.rows.items():
        place = _place(0, y, WIDTH, 1)
        panels.append(
            {"id": next(ids), "type": "row", "title": title, "collapsed": False, "gridPos": place, "panels": []}
        )
        y += 1
        x = 0
        height = HEIGHT if row[0].kind != "stat" else HEIGHT // 2
        for panel in row:
            if x + panel.width > WIDTH:
                x, y = 0, y + height
            panels.append(_panel(panel, next(ids), _place(x, y, panel.width, height)))
            x += panel.width
        y += height
    return {
        "uid": dashboard.uid,
        "title": dashboard.title,
        "tags": ["sightline"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "timezone": "utc",
        "links": [{"type": "dashboards", "tags": ["sightline"], "title": "Sightline", "asDropdown": True}],
        "templating": {"list": _variables(dashboard.job)},
        "annotations": {"list": []},
        "panels": panels,
    }


def _place(x: int, y: int, width: int, height: int) -> dict[str, int]:
    return {"x": x, "y": y, "w": width, "h": height}


def _panel(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    instant = panel.kind != "timeseries"
    targets = [
        {
            "refId": chr(ord("A") + i),
            "datasource": DATASOURCE,
            "expr": expression,
            "legendFormat": legend or "__auto",
            "instant": instant,
            "range": not instant,
            "format": "table" if panel.kind == "table" else "time_series",
        }
        for i, (expression, legend) in enumerate(panel.queries.items())
    ]
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.about,
        "datasource": DATASOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": {"unit": panel.unit}, "overrides": []},
        "options": {} if instant else {"legend": {"displayMode": "list", "placement": "bottom"}},
        "targets": targets,
    }


def _variables(job: str) -> list[dict[str, Any]]:
    return [
        {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"},
        {
            "name": "instance",
            "label": "Instance",
            "type": "query",
            "datasource": DATASOURCE,
            "query": {"query": f'label_values(up{{job=~"{job}"}}, instance)', "refId": "instances"},
            "refresh": 2,
            "includeAll": True,
            "multi": True,
            "allValue": ".*",
            "current": {"text": "All", "value": "$__all"},
        },
    ]


def write(out: Path) -> None:
    """One file a dashboard, named like it."""
    for dashboard in DASHBOARDS:
        path = out / f"{dashboard.uid.removeprefix('sightline-')}.json"
        path.write_text(json.dumps(to_json(dashboard), indent=2) + "\n")


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
