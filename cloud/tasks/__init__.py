"""Frozen task models by name.

One interface for all of them:

model = load_task("faster-rcnn-mobilenetv2")
for found in model.predict([image]):    # uint8 [3, H, W]
    ...
"""

from cloud.tasks import lean  # noqa: F401 - imports torchvision, before all that would

# isort: split
from cloud.tasks.loading import available_tasks, load_task
from cloud.tasks.types import Detections, TaskKind, TaskModel, TrainableThrough

__all__ = ["Detections", "TaskKind", "TaskModel", "TrainableThrough", "available_tasks", "load_task"]
