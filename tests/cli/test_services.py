"""A service's flags are its settings: all of them, described, checked, and before environment and file."""

from pathlib import Path

import pytest

from cli.services import run_service
from cloud.settings import CloudSettings
from shared.errors import InvalidSettings
from tests.cli.conftest import Sightline


def settings_from(*arguments: str) -> CloudSettings:
    """What a service would be started with."""
    started: list[CloudSettings] = []

    async def serve(settings: CloudSettings) -> None:
        started.append(settings)

    with pytest.raises(SystemExit) as end:
        run_service(CloudSettings, serve, arguments, "Run the cloud service.")
    assert end.value.code == 0
    return started[0]


@pytest.mark.parametrize("service", ["edge", "cloud"])
def test_help_shows_every_setting_with_flag_variable_and_description(service: str, sightline: Sightline) -> None:
    from edge.settings import EdgeSettings

    model = {"edge": EdgeSettings, "cloud": CloudSettings}[service]
    ended = sightline(service, "--help")
    assert ended.code == 0
    told = " ".join(ended.out.split())
    for name, field in model.model_fields.items():
        assert f"--{name.replace('_', '-')}" in told
        assert f"SIGHTLINE_{service.upper()}_{name.upper()}" in told.replace("_ ", "_")
        assert field.description, name


def test_flags_go_before_environment_before_file_before_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "sightline.toml"
    file.write_text('[cloud]\ndrain_s = 1\nmax_batch = 2\nlog_level = "debug"\n')
    monkeypatch.setenv("SIGHTLINE_CLOUD_MAX_BATCH", "3")
    monkeypatch.setenv("SIGHTLINE_CLOUD_LOG_LEVEL", "error")
    settings = settings_from("--config", str(file), "--log-level", "warning")
    assert (settings.drain_s, settings.max_batch, settings.log_level, settings.lanes) == (1, 3, "warning", 0)


def test_sizes_switches_and_paths_are_read_as_people_write_them(tmp_path: Path) -> None:
    settings = settings_from(
        *("--max-frame-bytes", "2MiB", "--reflection", "--no-insecure"),
        *("--models", f"detection,{tmp_path}", "--data-dir", str(tmp_path)),
    )
    assert settings.max_frame_bytes == 2 << 20
    assert (settings.reflection, settings.insecure) == (True, False)
    assert settings.models == f"detection,{tmp_path}"
    assert settings.data_dir == tmp_path


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--max-batch", "many"), "max_batch"),
        (("--max-batch", "1025"), "max_batch"),
        (("--log-level", "loud"), "log_level"),
        (("--config", "no-such.toml"), "no-such.toml"),
    ],
)
def test_a_wrong_value_names_its_setting(flags: tuple[str, ...], said: str, sightline: Sightline) -> None:
    with pytest.raises(InvalidSettings, match=said):
        settings_from(*flags)
    ended = sightline("cloud", *flags)
    assert ended.code == 2
    assert said in ended.err


def test_an_unknown_flag_is_wrong_usage(sightline: Sightline) -> None:
    assert sightline("cloud", "--paint-it", "black").code == 2
