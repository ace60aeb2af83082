"""Python clients of both services: a camera's, and a consumer's.

    CameraClient, AsyncCameraClient            pictures in, receipts back
    DetectionClient, AsyncDetectionClient      detection events, Detect and Review

Errors are those of `shared.errors`, as the server raised them.
"""

from shared.clients.camera import AsyncCameraClient, CameraClient
from shared.clients.connection import Connection
from shared.clients.cursor_file import CursorFile
from shared.clients.detection import AsyncDetectionClient, DetectionClient
from shared.clients.messages import Picture, StartAt
from shared.clients.retry import Retry
from shared.clients.types import (
    Box,
    CloudTimings,
    CompressOptions,
    Cursor,
    Delivery,
    Detected,
    Detection,
    DetectionEvent,
    EdgeTimings,
    EventFilter,
    FrameName,
    Mask,
    Outcome,
    Progress,
    Receipt,
    ReceiptState,
    Reviewed,
    Start,
    TaskResult,
)

__all__ = [
    "AsyncCameraClient",
    "AsyncDetectionClient",
    "Box",
    "CameraClient",
    "CloudTimings",
    "CompressOptions",
    "Connection",
    "Cursor",
    "CursorFile",
    "Delivery",
    "Detected",
    "Detection",
    "DetectionClient",
    "DetectionEvent",
    "EdgeTimings",
    "EventFilter",
    "FrameName",
    "Mask",
    "Outcome",
    "Picture",
    "Progress",
    "Receipt",
    "ReceiptState",
    "Retry",
    "Reviewed",
    "Start",
    "StartAt",
    "TaskResult",
]
