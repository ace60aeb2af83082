"""Both sides at once: the fixtures of the edge's and the cloud's own tests."""

from tests.cloud.conftest import spot, start_cloud
from tests.edge.conftest import running_edge, small_jpeg, small_rgb

__all__ = ["running_edge", "small_jpeg", "small_rgb", "spot", "start_cloud"]
