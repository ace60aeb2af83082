"""Which detection log a cloud opens."""

from cloud.detections.log import DetectionLog
from cloud.detections.sqlite import SqliteLog
from cloud.settings import CloudSettings
from shared.errors import InvalidSettings


async def open_log(settings: CloudSettings) -> DetectionLog:
    """The detection log that the settings name. Raises InvalidSettings, Unavailable."""
    if settings.log == "sqlite":
        return await SqliteLog.open(settings.data_dir.expanduser() / "detections.sqlite", settings.retention)
    try:
        from cloud.detections.broker import BrokerOptions
        from cloud.detections.jetstream import JetStreamLog
    except ModuleNotFoundError as error:
        raise InvalidSettings(f"setting log: jetstream needs the extra `nats` (package nats-py): {error}") from error
    options = BrokerOptions(
        servers=tuple(settings.nats_server_list),
        name=settings.log_name,
        replicas=settings.log_replicas,
        monitoring=tuple(settings.nats_monitoring_list),
        ca=settings.nats_ca,
        certificate=settings.nats_certificate,
        key=settings.nats_key,
        insecure=settings.nats_insecure,
    )
    return await JetStreamLog.open(options, settings.retention)
