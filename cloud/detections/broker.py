"""The way to NATS: a connection that comes back by itself, and the two streams of a log, made once and checked.

    NAME-index    one small message a frame, under the frame's own subject; kept for the key age
    NAME-blocks   the events, many to a message; kept by the log's bounds on age and bytes

What a log's promises rest on is checked at start, with an error that says what to change: a server that is new enough,
as many copies as asked for, and, where the servers' monitoring pages are given, `sync_interval: always` on each of
them. Without it a server acknowledges what only its page cache has, and a power cut takes it back.

The log's id is drawn by whoever makes the index stream and is part of the subjects: should the streams be deleted and
made again, a process that still holds the old log finds nobody at its subjects, and cannot write into the new one.
"""

import asyncio
import json
import logging
import secrets
import ssl
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from nats.aio.client import Client
from nats.errors import Error as NatsError
from nats.errors import TimeoutError as NatsTimeout
from nats.js import JetStreamContext
from nats.js.api import DiscardPolicy, RawStreamMsg, RetentionPolicy, StorageType, StreamConfig, StreamInfo
from nats.js.errors import APIError, NotFoundError, ServiceUnavailableError

from cloud.detections.log import Retention
from shared.errors import InvalidSettings, Unavailable
from shared.logs import facts
from shared.rpc.tls import is_local

_log = logging.getLogger("sightline.cloud.log")
OLDEST_SERVER = (2, 10)  # the first with `sync_interval: always`
ANSWER_S = 5.0  # longest wait for one answer of the broker
_RECONNECT_S = 0.25
_RETRY_S = 0.2
_PAGE_S = 5.0
_LAYOUT = "1"
# Codes of the broker's API.
_NAME_IN_USE = 10058
_NO_CLUSTER = 10074
_NO_PEERS = 10005


@dataclass(frozen=True, slots=True)
class BrokerOptions:
    """Which NATS, and how a log is kept there.

    `servers`: nats:// or tls:// addresses. `name`: of the log, as streams are called. `replicas`: copies of every
    message, 1, 3 or 5. `monitoring`: http addresses of the servers' monitoring pages. `insecure`: plaintext beyond
    loopback is wanted. `start_s`: how long a broker may take to answer at first.
    """

    servers: tuple[str, ...]
    name: str = "sightline"
    replicas: int = 3
    monitoring: tuple[str, ...] = ()
    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    insecure: bool = False
    start_s: float = 10.0


@dataclass(frozen=True, slots=True)
class Streams:
    """The two streams as they are now. `newest`: the last sequence of the index."""

    log_id: str
    index: str
    blocks: str
    frames_subject: str
    blocks_subject: str
    newest: int


@contextmanager
def broker_errors(doing: str) -> Iterator[None]:
    """Turns what the client raises into Unavailable."""
    try:
        yield
    except (NatsError, OSError) as error:
        raise Unavailable(f"detection log: {doing}: {error}") from error


async def message_or_none(asked: Awaitable[RawStreamMsg]) -> RawStreamMsg | None:
    """A message of a stream, None if the broker has none there."""
    try:
        return await asked
    except NotFoundError:
        return None


async def connect(options: BrokerOptions, on_loss: Callable[[], None]) -> Client:
    """A connection that, once made, is made again for as long as it takes; `on_loss` hears when it is lost.

    Raises InvalidSettings, also if a server is too old or does not sync; Unavailable if none answers in time.
    """
    tls = _tls(options)
    shown = ", ".join(_without_password(server) for server in options.servers)
    last_error = ""
    client = Client()

    async def on_error(error: Exception) -> None:
        nonlocal last_error
        last_error = str(error) or type(error).__name__

    async def on_disconnect() -> None:
        if client.is_closed:
            return
        _log.warning("lost the connection to NATS", extra=facts(servers=shown, error=last_error))
        on_loss()

    async def reconnected() -> None:
        if not _as_private_as_wanted(client, tls):
            _log.error(
                "a NATS server does not speak TLS any more: the connection is given up", extra=facts(servers=shown)
            )
            await client.close()
            return
        _log.info("connected to NATS again", extra=facts(servers=shown))

    try:
        try:
            async with asyncio.timeout(options.start_s):
                await client.connect(
                    list(options.servers),
                    name=f"sightline {options.name}",
                    error_cb=on_error,
                    disconnected_cb=on_disconnect,
                    reconnected_cb=reconnected,
                    max_reconnect_attempts=-1,
                    reconnect_time_wait=_RECONNECT_S,  # type: ignore[arg-type]  # it sleeps for it
                    ping_interval=5,
                    max_outstanding_pings=2,
                    tls=tls,
                    pending_size=0,  # what cannot be sent now fails now, and is not sent when nobody waits any more
                )
        except (NatsError, OSError, TimeoutError) as error:
            reason = last_error or str(error)
            raise Unavailable(f"no NATS server at {shown} let us in within {options.start_s:g} s: {reason}") from error
        if not _as_private_as_wanted(client, tls):
            raise Unavailable(f"the NATS server at {shown}: expected TLS, it speaks none")
        version = client.connected_server_version
        require_version((version.major, version.minor), f"the NATS server at {shown}")
        await _check_pages(options.monitoring)
    except BaseException:
        await disconnect(client)
        raise
    return client


async def disconnect(client: Client) -> None:
    """Closes the connection, and ends attempts at another one, which may outlive the client's own `close`."""
    await client.close()
    if client._reconnection_task is not None:
        await end(client._reconnection_task)


async def end(task: "asyncio.Task[None]") -> None:
    """Cancels a task that talks to the broker until it is over.

    Once is not enough: the client awaits answers by `asyncio.wait_for`, which up to Python 3.11 drops a cancellation
    that meets the answer.
    """
    while not task.done():
        task.cancel()
        await asyncio.wait({task}, timeout=0.1)


def _as_private_as_wanted(client: Client, tls: ssl.SSLContext | None) -> bool:
    """The client goes on in plaintext with a server that does not ask for TLS, whatever it was told."""
    return tls is None or bool(client._server_info.get("tls_required"))


def require_version(version: tuple[int, int], whose: str) -> None:
    """Raises InvalidSettings if a server is too old."""
    if version < OLDEST_SERVER:
        raise InvalidSettings(
            f"setting nats_servers: {whose}: "
            f"expected version {'.'.join(map(str, OLDEST_SERVER))} or newer, which can sync every write "
            f"(sync_interval: always), got {'.'.join(map(str, version))}"
        )


async def _check_pages(pages: tuple[str, ...]) -> None:
    """Asks the servers' monitoring pages what a client cannot see: whether every write is synced.

    A server that is down does not keep a cloud from starting, as long as one answers. Raises InvalidSettings,
    Unavailable.
    """
    if not pages:
        _log.warning(
            "nats_monitoring is not set: nobody has checked that the NATS servers sync every write "
            "(sync_interval: always); without it a power cut can take back what was acknowledged"
        )
        return
    answers = await asyncio.gather(*(asyncio.to_thread(_page, page) for page in pages), return_exceptions=True)
    for page, answer in zip(pages, answers, strict=True):
        if isinstance(answer, BaseException):
            _log.warning("a NATS server's monitoring page does not answer", extra=facts(page=page, error=str(answer)))
            continue
        major, minor = (int(part) for part in answer["version"].split(".")[:2])
        require_version((major, minor), f"the NATS server at {page}")
        if answer.get("jetstream", {}).get("config", {}).get("sync_always") is not True:
            raise InvalidSettings(
                f"setting nats_servers: the NATS server at {page}: "
                "expected `sync_interval: always` in its jetstream configuration, so that "
                "what it acknowledges is on disk; it is not set"
            )
    if all(isinstance(answer, BaseException) for answer in answers):
        raise Unavailable(f"none of the NATS monitoring pages answers: {', '.join(pages)}: {answers[0]}")


def _page(address: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"{address}/varz", timeout=_PAGE_S) as page:  # noqa: S310  # http(s), by the settings
        answer: dict[str, Any] = json.load(page)
    return answer


async def open_streams(client: Client, options: BrokerOptions, retention: Retention) -> Streams:
    """Finds the log's streams, or makes them; bounds and copies are made what the settings say.

    A cluster that is only coming up is waited for. Raises InvalidSettings, Unavailable.
    """
    js = client.jetstream(timeout=ANSWER_S)
    loop = asyncio.get_running_loop()
    deadline = loop.time() + options.start_s
    while True:
        try:
            return await _streams(js, options, retention)
        except (ServiceUnavailableError, NatsTimeout, APIError) as error:
            if isinstance(error, APIError) and error.err_code == _NO_CLUSTER:
                raise InvalidSettings(_too_few_servers(options, error)) from error
            if not _passes(error):
                raise Unavailable(f"the streams of log {options.name} cannot be made: {error}") from error
            if loop.time() > deadline:
                if isinstance(error, APIError) and error.err_code == _NO_PEERS:
                    raise Unavailable(_too_few_servers(options, error)) from error
                raise Unavailable(f"JetStream did not answer within {options.start_s:g} s: {error}") from error
        except NatsError as error:
            raise Unavailable(f"the streams of log {options.name} cannot be made: {error}") from error
        await asyncio.sleep(_RETRY_S)


def _passes(error: Exception) -> bool:
    """Whether the error may go by itself: no leader yet, or not all servers there yet."""
    return not isinstance(error, APIError) or isinstance(error, ServiceUnavailableError) or error.err_code == _NO_PEERS


def _too_few_servers(options: BrokerOptions, error: Exception) -> str:
    return (
        f"setting log_replicas is {options.replicas}: expected a NATS cluster of at least as many servers with "
        f"JetStream, got: {error}"
    )


async def _streams(js: JetStreamContext, options: BrokerOptions, retention: Retention) -> Streams:
    index_name, blocks_name = f"{options.name}-index", f"{options.name}-blocks"
    new_id = secrets.token_hex(16)
    index = await _find_or_make(js, _index_config(index_name, options, retention, new_id))
    log_id = _log_id(index)
    wanted = _index_config(index_name, options, retention, log_id)
    await _fit(js, index, wanted)
    wanted = _blocks_config(blocks_name, options, retention, log_id)
    blocks = await _find_or_make(js, wanted)
    if _log_id(blocks) != log_id:
        raise Unavailable(
            f"stream {blocks_name} belongs to log {_log_id(blocks)} and stream {index_name} to log {log_id}: one of "
            "them was deleted; restore it, or delete the other too and begin a new log"
        )
    await _fit(js, blocks, wanted)
    return Streams(
        log_id=log_id,
        index=index_name,
        blocks=blocks_name,
        frames_subject=f"{options.name}.{log_id}.frame",
        blocks_subject=f"{options.name}.{log_id}.block",
        newest=index.state.last_seq,
    )


async def _find_or_make(js: JetStreamContext, wanted: StreamConfig) -> StreamInfo:
    name = str(wanted.name)
    try:
        return await js.stream_info(name)
    except NotFoundError:
        pass
    try:
        info = await js.add_stream(wanted)
    except APIError as error:
        if error.err_code != _NAME_IN_USE:
            raise
        return await js.stream_info(name)  # another cloud was first
    _log.info("made a stream", extra=facts(stream=name, replicas=wanted.num_replicas))
    return info


async def _fit(js: JetStreamContext, info: StreamInfo, wanted: StreamConfig) -> None:
    """Makes the bounds and copies of a stream that was there before what they should be."""
    have = info.config
    same = (
        round(have.max_age or 0) == round(wanted.max_age or 0)
        and (have.max_bytes or -1) == (wanted.max_bytes or -1)
        and have.num_replicas == wanted.num_replicas
    )
    if not same:
        await js.update_stream(wanted)
        _log.info("changed a stream's bounds", extra=facts(stream=wanted.name, replicas=wanted.num_replicas))


def _log_id(info: StreamInfo) -> str:
    metadata = info.config.metadata or {}
    if metadata.get("sightline.layout") != _LAYOUT:
        raise InvalidSettings(
            f"setting log_name: stream {info.config.name}: expected one that this program made (layout {_LAYOUT}), "
            f"got layout {metadata.get('sightline.layout', 'unknown')}; choose another name"
        )
    return metadata["sightline.log_id"]


def _config(name: str, options: BrokerOptions, log_id: str) -> StreamConfig:
    return StreamConfig(
        name=name,
        storage=StorageType.FILE,
        retention=RetentionPolicy.LIMITS,
        num_replicas=options.replicas,
        metadata={"sightline.log_id": log_id, "sightline.layout": _LAYOUT},
    )


def _index_config(name: str, options: BrokerOptions, retention: Retention, log_id: str) -> StreamConfig:
    return _config(name, options, log_id).evolve(
        description="Sightline: one entry a frame",
        subjects=[f"{options.name}.{log_id}.frame.>"],
        max_age=retention.key_age_s,
        max_bytes=-1,
        discard=DiscardPolicy.NEW,  # a full server refuses: no name is ever given up before its age
    )


def _blocks_config(name: str, options: BrokerOptions, retention: Retention, log_id: str) -> StreamConfig:
    return _config(name, options, log_id).evolve(
        description="Sightline: the events",
        subjects=[f"{options.name}.{log_id}.block"],
        max_age=retention.max_age_s,
        max_bytes=retention.max_bytes,
        discard=DiscardPolicy.OLD,
        allow_direct=True,
    )


def _tls(options: BrokerOptions) -> ssl.SSLContext | None:
    """TLS to the servers, None for plaintext. Raises InvalidSettings."""
    for server in options.servers:
        address = urlsplit(server)
        if address.scheme not in ("nats", "tls") or not address.hostname:
            raise InvalidSettings(f"setting nats_servers: expected nats://host:port or tls://host:port, got {server!r}")
    if (options.certificate is None) != (options.key is None):
        raise InvalidSettings("settings nats_certificate and nats_key must be given together")
    wanted = options.ca is not None or any(urlsplit(server).scheme == "tls" for server in options.servers)
    if not wanted:
        if options.certificate is not None:
            raise InvalidSettings("setting nats_certificate needs TLS: give nats_ca, or tls:// addresses")
        for server in options.servers:
            if not options.insecure and not is_local(f"{urlsplit(server).hostname}:0"):
                raise InvalidSettings(
                    f"setting nats_servers: plaintext to {_without_password(server)} could be read and changed by "
                    "anyone on the network; give nats_ca or a tls:// address, or set nats_insecure to allow it"
                )
        return None
    try:
        context = ssl.create_default_context(cafile=options.ca)
        if options.certificate is not None:
            context.load_cert_chain(options.certificate, options.key)
    except (OSError, ssl.SSLError) as error:
        raise InvalidSettings(f"settings nats_ca, nats_certificate, nats_key: cannot be used: {error}") from error
    return context


def _without_password(server: str) -> str:
    address = urlsplit(server)
    return f"{address.scheme}://{address.netloc.rpartition('@')[2]}"
