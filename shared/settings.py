"""Settings of a service: read once at start, checked, and never changed after.

A setting's value comes from the first of these that has it:

    flag            --spool-max-bytes 2GiB                  given to `load` as a keyword
    environment     SIGHTLINE_EDGE_SPOOL_MAX_BYTES=2GiB
    TOML file       [edge] spool_max_bytes = "2GiB"         the file named by --config or SIGHTLINE_EDGE_CONFIG
    default

Every field is documented with its unit, so that the command line can show them all. A name that no field has is an
error wherever it stands, because a misspelt setting that is silently ignored is found in production. Every error is
InvalidSettings and names the field in all the ways it can be given.
"""

import os
import tomllib
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import ByteSize, Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from shared.errors import InvalidSettings


class _TomlTable(PydanticBaseSettingsSource):
    """The table of a TOML file that is named like the service."""

    def __init__(self, settings_cls: type["Settings"], path: Path) -> None:
        super().__init__(settings_cls)
        self._table = settings_cls.read_table(path)

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        return self._table.get(field_name), field_name, False

    def __call__(self) -> dict[str, Any]:
        return self._table


class Settings(BaseSettings):
    """Base of a service's settings. A subclass names its `table` and sets `env_prefix` to SIGHTLINE_<TABLE>_."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", validate_default=True)

    table: ClassVar[str]

    config: Path | None = Field(
        default=None, description="TOML file with these settings, in a table named like the service"
    )

    @classmethod
    def load(cls, **flags: Any) -> Self:
        """Reads flags, environment and file. A flag that is None counts as not given.

        Raises InvalidSettings, one sentence for each field at fault.
        """
        given = {name: value for name, value in flags.items() if value is not None}
        prefix = cls.model_config["env_prefix"]
        for variable in os.environ:
            if variable.startswith(prefix) and variable.removeprefix(prefix).lower() not in cls.model_fields:
                raise InvalidSettings(f"environment variable {variable} is no setting of {cls.table}")
        try:
            return cls(**given)
        except ValidationError as error:
            raise InvalidSettings("; ".join(cls._sentence(fault) for fault in error.errors())) from None

    @classmethod
    def read_table(cls, path: Path) -> dict[str, Any]:
        """The service's own table of a TOML file, {} if it has none. Raises InvalidSettings."""
        try:
            document = tomllib.loads(path.read_text())
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
            raise InvalidSettings(f"setting config: {path} must be a readable TOML file, got: {error}") from None
        table = document.get(cls.table, {})
        if not isinstance(table, dict):
            raise InvalidSettings(f"setting config: [{cls.table}] in {path} must be a table, got {table!r}")
        for name in table:
            if name not in cls.model_fields:
                raise InvalidSettings(f"{name} in [{cls.table}] of {path} is no setting of {cls.table}")
        return table

    @classmethod
    def _sentence(cls, fault: Any) -> str:
        name = str(fault["loc"][0]) if fault["loc"] else "settings"
        variable = f"{cls.model_config['env_prefix']}{name}".upper()
        return (
            f"{cls.table} setting {name} (--{name.replace('_', '-')}, {variable}): "
            f"{fault['msg']}, got {fault['input']!r}"
        )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        path = init_settings().get("config") or env_settings().get("config")
        if path is None:
            return init_settings, env_settings
        return init_settings, env_settings, _TomlTable(cls, Path(path))


class ServerSettings(Settings):
    """What every Sightline server needs to be set."""

    listen: str = Field(default="127.0.0.1:0", description="host:port of the gRPC server; port 0 takes a free one")
    metrics_listen: str = Field(
        default="127.0.0.1:0",
        description="host:port of the HTTP server with /metrics, /healthz and /readyz; port 0 takes a free one, "
        "empty switches it off",
    )
    metrics_insecure: bool = Field(
        default=False,
        description="allow metrics_listen, which is plaintext and asks nobody who they are, on an address that is not "
        "loopback, for Prometheus and probes on a network of their own",
    )
    metrics_tls: bool = Field(
        default=False,
        description="serve that page in TLS with tls_certificate, and where tls_client_ca is set to its callers only",
    )
    ready_file: Path | None = Field(
        default=None, description="file that gets a line of JSON with the bound ports once the service is ready"
    )
    max_message_bytes: ByteSize = Field(
        default=ByteSize(32 << 20), ge=64 << 10, le=1 << 30, description="largest gRPC message taken or sent, bytes"
    )
    drain_s: float = Field(
        default=20.0, ge=0, le=3600, description="on SIGTERM, finish for at most this many seconds before exit"
    )
    reflection: bool = Field(default=False, description="answer gRPC server reflection")
    insecure: bool = Field(
        default=False,
        description="allow plaintext on an address that is not loopback; anyone on the network can read it",
    )
    tls_certificate: Path | None = Field(default=None, description="PEM file: the server's certificate chain")
    tls_key: Path | None = Field(default=None, description="PEM file: the certificate's private key")
    tls_client_ca: Path | None = Field(
        default=None, description="PEM file: clients must show a certificate of this authority (mTLS)"
    )
    policy: Path | None = Field(
        default=None,
        description="TOML file: which identity may send for which cameras, see which detections, administer; read anew "
        "when it changes. None: over TLS, whoever has a certificate of tls_client_ca may send and subscribe",
    )
    admin_listen: str = Field(
        default="",
        description="host:port of the admin services, with the same certificates; port 0 takes a free one, empty "
        "switches them off. Over TLS a policy must say who may administer",
    )
    max_connections: int = Field(
        default=4096, ge=1, le=1_000_000, description="connections at once; more are closed when they come"
    )
    max_streams_connection: int = Field(
        default=128, ge=1, le=100_000, description="calls at once on one connection; more wait at the caller"
    )
    max_calls: int = Field(default=8192, ge=1, le=1_000_000, description="calls and streams under way at once, in all")
    max_calls_caller: int = Field(
        default=256, ge=1, le=1_000_000, description="calls and streams under way at once, of one identity"
    )
    rate_caller: float = Field(
        default=1000.0,
        ge=0,
        le=1e6,
        description="calls and frames per second that one identity may send, with bursts of two seconds' worth; "
        "0: any number. Callers in plaintext on loopback are not limited",
    )
    log_level: str = Field(
        default="info", pattern="^(debug|info|warning|error)$", description="debug, info, warning or error"
    )
    log_format: str = Field(default="console", pattern="^(console|json)$", description="console or json, on stderr")
    trace_endpoint: str = Field(
        default="",
        pattern=r"^(https?://\S+)?$",
        description="http:// or https:// address of an OpenTelemetry collector (OTLP over gRPC, mostly port 4317) that "
        "gets a trace of each frame; empty: none",
    )
    trace_ratio: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="share of frames that are traced; the same at edge and cloud, so that they choose the same frames",
    )
