"""`sightline admin`: what operators ask a running edge or cloud, and tell it, over the service's admin port."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

if TYPE_CHECKING:
    import grpc

T = TypeVar("T")
admin = typer.Typer(no_args_is_help=True)
Timeout = Annotated[float, typer.Option(min=0.1, help="Give up after this many seconds.")]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An admin port and how to reach it."""

    address: str
    ca: Path | None
    certificate: Path | None
    key: Path | None
    token: Path | None
    insecure: bool

    def call(self, ask: "Callable[[grpc.Channel], T]") -> T:
        """Raises SightlineError as the service did."""
        import grpc

        from shared.rpc import status, tls

        tls.split_address(self.address, "address")
        credentials = tls.channel_credentials(
            self.address, self.ca, self.certificate, self.key, insecure=self.insecure, setting="address",
            token=self.token,
        )  # fmt: skip
        plain = credentials is None
        channel = grpc.insecure_channel(self.address) if plain else grpc.secure_channel(self.address, credentials)
        with channel:
            try:
                return ask(channel)
            except grpc.RpcError as error:
                raise status.from_rpc_error(error) from None  # type: ignore[arg-type]


@admin.callback()
def endpoint(
    context: typer.Context,
    address: Annotated[str, typer.Option(envvar="SIGHTLINE_ADMIN", help="host:port of the service's admin_listen.")],
    ca: Annotated[Path | None, typer.Option(help="PEM file: authority of the service's certificate (TLS).")] = None,
    certificate: Annotated[Path | None, typer.Option(help="PEM file: your certificate (mTLS).")] = None,
    key: Annotated[Path | None, typer.Option(help="PEM file: private key of --certificate.")] = None,
    token: Annotated[Path | None, typer.Option(help="File with a bearer token, instead of a certificate.")] = None,
    insecure: Annotated[bool, typer.Option(help="Allow plaintext to an address that is not loopback.")] = False,
) -> None:
    context.obj = Endpoint(address, ca, certificate, key, token, insecure)


@admin.command()
def bundles(context: typer.Context) -> None:
    """Codec bundles that are loaded (edge and cloud)."""
    from sightline.v1 import admin_pb2, admin_pb2_grpc

    answer = context.obj.call(
        lambda channel: admin_pb2_grpc.BundleAdminServiceStub(channel).ListBundles(
            admin_pb2.ListBundlesRequest(), timeout=30
        )
    )
    for each in answer.bundles:
        notes = [word for word, so in (("default", each.is_default), ("retiring", each.retiring)) if so]
        print(each.model_id, each.name, *notes)


@admin.command()
def load(
    context: typer.Context,
    reference: Annotated[str, typer.Argument(help="Name of a bundled one, or a folder on the service's machine.")],
    expect: Annotated[str, typer.Option(help="Refuse it unless this is its hex SHA-256.")] = "",
    default: Annotated[bool, typer.Option(help="At an edge: code with it from now on.")] = False,
    timeout: Timeout = 600,
) -> None:
    """Load a bundle beside those that serve (edge and cloud)."""
    from sightline.v1 import admin_pb2, admin_pb2_grpc

    request = admin_pb2.LoadBundleRequest(reference=reference, expected_model_id=expect, make_default=default)
    answer = context.obj.call(
        lambda channel: admin_pb2_grpc.BundleAdminServiceStub(channel).LoadBundle(request, timeout=timeout)
    )
    print(answer.bundle.model_id, answer.bundle.name, "was loaded already" if answer.was_loaded else "loaded")


@admin.command()
def retire(
    context: typer.Context,
    model_id: Annotated[str, typer.Argument(help="Hex SHA-256 of the bundle.")],
    timeout: Timeout = 600,
) -> None:
    """Take a bundle out of use, and wait until nothing needs it (edge first, then cloud)."""
    from sightline.v1 import admin_pb2, admin_pb2_grpc

    request = admin_pb2.RetireBundleRequest(model_id=model_id)
    context.obj.call(
        lambda channel: admin_pb2_grpc.BundleAdminServiceStub(channel).RetireBundle(request, timeout=timeout)
    )
    print(model_id, "retired")


@admin.command()
def cameras(context: typer.Context) -> None:
    """Cameras of an edge: frames since its start, when last seen, and whether paused."""
    from sightline.v1 import admin_pb2

    answer = edge_call(context, "ListCameras", admin_pb2.ListCamerasRequest())
    for each in answer.cameras:
        seen = each.last_seen.ToJsonString() if each.HasField("last_seen") else "not seen"
        print(each.camera_id, each.frames, seen, *(["paused"] if each.paused else []))


@admin.command()
def pause(context: typer.Context, camera: Annotated[str, typer.Argument(help="The camera's name.")]) -> None:
    """Refuse a camera's pictures at an edge, until it is resumed."""
    from sightline.v1 import admin_pb2

    edge_call(context, "PauseCamera", admin_pb2.PauseCameraRequest(camera_id=camera))
    print(camera, "paused")


@admin.command()
def resume(context: typer.Context, camera: Annotated[str, typer.Argument(help="The camera's name.")]) -> None:
    """Take a camera's pictures again."""
    from sightline.v1 import admin_pb2

    edge_call(context, "ResumeCamera", admin_pb2.ResumeCameraRequest(camera_id=camera))
    print(camera, "resumed")


@admin.command()
def spool(context: typer.Context) -> None:
    """What waits at an edge for the cloud."""
    from sightline.v1 import admin_pb2

    answer = edge_call(context, "GetSpool", admin_pb2.GetSpoolRequest())
    oldest = answer.oldest.ToJsonString() if answer.HasField("oldest") else "none"
    print(f"frames {answer.frames}\nbytes {answer.used_bytes} of {answer.max_bytes}\noldest {oldest}")
    print(f"writable {'yes' if answer.writable else 'no'}")
    print(f"uplink {'connected' if answer.uplink_connected else 'not connected'}")


@admin.command()
def quality(
    context: typer.Context,
    lowest: Annotated[float | None, typer.Argument(help="In [1, 8].")] = None,
    highest: Annotated[float | None, typer.Argument(help="In [LOWEST, 8].")] = None,
) -> None:
    """Show the bounds of quality at an edge, or set them."""
    from sightline.v1 import admin_pb2

    if (lowest is None) != (highest is None):
        raise typer.BadParameter("both bounds, or neither")
    if lowest is not None and highest is not None:
        edge_call(context, "SetQualityBounds", admin_pb2.SetQualityBoundsRequest(lowest=lowest, highest=highest))
    answer = edge_call(context, "GetQualityBounds", admin_pb2.GetQualityBoundsRequest())
    print(f"{answer.lowest:g} {answer.highest:g}")


@admin.command()
def uploads(context: typer.Context) -> None:
    """Upload streams of a cloud: edge, identity, frames so far, frames held, bundles."""
    from sightline.v1 import admin_pb2

    for each in cloud_call(context, "ListUploads", admin_pb2.ListUploadsRequest()).uploads:
        print(each.edge_id, each.identity, each.frames, each.held_frames, *each.model_ids)


@admin.command()
def consumers(context: typer.Context) -> None:
    """Subscriptions of a cloud: identity, position in the log, events behind."""
    from sightline.v1 import admin_pb2

    for each in cloud_call(context, "ListConsumers", admin_pb2.ListConsumersRequest()).consumers:
        print(each.identity, each.position, each.lag_events)


def edge_call(context: typer.Context, method: str, request: Any) -> Any:
    from sightline.v1 import admin_pb2_grpc

    return context.obj.call(
        lambda channel: getattr(admin_pb2_grpc.EdgeAdminServiceStub(channel), method)(request, timeout=30)
    )


def cloud_call(context: typer.Context, method: str, request: Any) -> Any:
    from sightline.v1 import admin_pb2_grpc

    return context.obj.call(
        lambda channel: getattr(admin_pb2_grpc.CloudAdminServiceStub(channel), method)(request, timeout=30)
    )
