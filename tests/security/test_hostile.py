"""A slice of `python -m bench.hostile`: hostile bytes into parsers and over the wire, and a good camera beside."""

from pathlib import Path

import grpc
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import hostile_wire as wire
from bench.hostile_parsers import targets
from edge.settings import EdgeSettings
from shared.codec.codec import Codec
from shared.codec.types import Bitstream
from shared.errors import InvalidSettings
from shared.rpc import tls
from tests.cloud.conftest import StartCloud
from tests.edge.conftest import RunningEdge
from tests.security.load import Camera, require_nothing_lost
from tests.shared.authority import CONSUMER, EDGE, POLICY, Authority

PARSER_INPUTS = 2000
WIRE_INPUTS = 300


def test_hostile_bytes_end_in_a_typed_error_or_do_no_harm(codec: Codec, tmp_path: Path) -> None:
    rng = np.random.default_rng(9)
    for name, target in targets(codec, tmp_path).items():
        ends = {target.attempt(rng) for _ in range(round(PARSER_INPUTS * target.share))}
        assert any(end[0].isupper() for end in ends), f"{name}: no input was refused"


@settings(max_examples=30, deadline=None)
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20), st.lists))
def test_any_value_of_a_setting_is_taken_or_named(value: object) -> None:
    for name in ("listen", "quality", "models", "spool_max_bytes", "spool_policy", "tls_key"):
        try:
            EdgeSettings.load(**{name: value})
        except InvalidSettings as error:
            said = str(error)
        else:
            continue
        assert name in said


async def test_hostile_callers_are_refused_and_a_good_camera_is_answered_throughout(
    tmp_path: Path, start_cloud: StartCloud, running_edge: RunningEdge, small_jpeg: bytes, spot: Bitstream
) -> None:
    authority = Authority(tmp_path / "certs")
    policy = tmp_path / "policy.toml"
    policy.write_text(POLICY)
    secured = {**authority.server_settings(), "policy": policy}
    own, key = authority.folder / "uplink.pem", authority.folder / "uplink.key"
    pair = authority.client(EDGE)
    own.write_bytes(pair.certificate)
    key.write_bytes(pair.key)
    cloud = await start_cloud(**secured)
    uplink = {"cloud": f"localhost:{cloud.server.port}", "cloud_ca": authority.ca}
    async with running_edge(**secured, **uplink, cloud_certificate=own, cloud_key=key) as (edge, _):
        good = authority.credentials(authority.client(EDGE))
        camera = Camera(
            lambda: tls.open_channel(f"localhost:{edge.server.port}", good, max_message_bytes=1 << 24), small_jpeg
        )

        def opener(port: int, uri: str) -> "wire.Opener":
            return wire.opener(port, authority.credentials(authority.client(uri)))

        to_edge = opener(edge.server.port, EDGE)
        attack = wire.Attack(to_edge, opener(cloud.server.port, EDGE), small_jpeg, spot)
        consumer = wire.Attack(to_edge, opener(cloud.server.port, CONSUMER), small_jpeg, spot)
        async with camera.sending():
            await camera.more()
            await attack.run(WIRE_INPUTS, 1, lambda _: None, lanes=3)
            await consumer.run(WIRE_INPUTS // 10, 2, lambda _: None, lanes=1)
            assert await wire.giant_metadata(to_edge, 200_000) == grpc.StatusCode.RESOURCE_EXHAUSTED.name
            await wire.rapid_reset(to_edge, 200)
            async with wire.connections(edge.server.port, 200):
                await camera.more()
        await require_nothing_lost(cloud, camera)
    assert attack.faults + consumer.faults == []
    assert {outcome.split(":")[0] for outcome in attack.outcomes} >= {"compress_stream", "upload"}
