"""What edge and cloud log of a frame, as processes that talk over TLS: one id at both, and never a secret."""

import base64
import json
import signal
from pathlib import Path

import grpc
import pytest
from sightline.v1 import edge_pb2, edge_pb2_grpc, ingest_pb2, ingest_pb2_grpc

from cli import certs
from shared.logs import frame_id
from tests.cloud.harness import spot_frame
from tests.test_end_to_end import Process, jpeg, request

WRONG = "not-the-token-but-a-secret-all-the-same"


@pytest.mark.slow  # two processes of its own, over TLS
def test_a_frame_has_one_id_in_both_logs_and_no_secret_is_in_either(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    certs.authority(tmp_path)
    certs.issue(tmp_path, "cloud", ip=["127.0.0.1"])
    token_file = tmp_path / "edge.token"
    capsys.readouterr()
    certs.token(token_file, "edge")
    line = next(line for line in capsys.readouterr().out.splitlines() if " = " in line)
    policy = tmp_path / "policy.toml"
    policy.write_text(f'[[grant]]\nidentity = "token:edge"\nsend = ["*"]\n\n[tokens]\n{line.strip()}\n')
    logging = ("--log-level", "debug", "--log-format", "json")
    tls = ("--tls-certificate", str(tmp_path / "cloud.pem"), "--tls-key", str(tmp_path / "cloud.key"))
    cloud = Process("cloud", tmp_path, *tls, "--policy", str(policy), *logging)
    edge = Process(
        "edge", tmp_path, "--cloud", cloud.address, "--cloud-ca", str(tmp_path / "ca.pem"),
        "--cloud-token", str(token_file), *logging,
    )  # fmt: skip
    picture = jpeg(spot_frame())
    try:
        cloud.start()
        edge.start()
        with grpc.insecure_channel(edge.address) as channel:
            ask = request("gate", picture, edge_pb2.DELIVERY_PERSISTED)
            receipt = edge_pb2_grpc.EdgeServiceStub(channel).Compress(ask, timeout=90).receipt
        credentials = grpc.ssl_channel_credentials((tmp_path / "ca.pem").read_bytes())
        with grpc.secure_channel(cloud.address, credentials) as channel, pytest.raises(grpc.RpcError):
            ingest_pb2_grpc.IngestServiceStub(channel).ListModels(
                ingest_pb2.ListModelsRequest(), metadata=(("authorization", f"Bearer {WRONG}"),)
            )
    finally:
        for process in (edge, cloud):
            if process.process is not None and process.process.poll() is None:
                process.kill(signal.SIGTERM)
    assert receipt.state == edge_pb2.RECEIPT_STATE_PERSISTED
    name = frame_id(receipt.frame.camera_id, receipt.frame.epoch, receipt.frame.seq)
    keys = [line for key in tmp_path.glob("*.key") for line in key.read_text().splitlines() if "KEY" not in line]
    secrets = [token_file.read_text().strip(), WRONG, *keys, base64.b64encode(picture[:48]).decode(), str(picture[:8])]
    assert all(len(secret) >= 8 for secret in secrets)
    for process, message in ((edge, "spooled"), (cloud, "persisted")):
        text = (tmp_path / f"{process.name}.log").read_text()
        lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
        assert [line["frame"] for line in lines if line.get("message") == message] == [name]
        assert [secret for secret in secrets if secret in text] == []
