"""What an event sets off: a program of the user's, or a POST to an address. Both get the event as JSON.

An event counts as dealt with when its program ended with 0 and its POST was answered with 2xx; until then the cursor
stays before it. A POST that fails in a way that may pass (no connection, 429, 5xx) is tried again with pauses that
double, as every call of this project.
"""

import json
import os
import shlex
import subprocess
import time
import urllib.error
import urllib.request
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import typer

from cli.watch.rows import as_json, counted
from shared.errors import InvalidInput, SightlineError, Unavailable

if TYPE_CHECKING:
    from shared.clients import DetectionEvent

ANSWER_S = 10.0
GIVE_UP_S = 60.0


class Exec:
    """Runs a program once an event: the event's JSON on its stdin, the main facts in its environment. These are
    SIGHTLINE_CAMERA, SIGHTLINE_FRAME, SIGHTLINE_OUTCOME, and SIGHTLINE_LABELS with what scores at least `min_score`. No
    shell: write ``sh -c '...'`` for one."""

    def __init__(self, command: str, min_score: float) -> None:
        self._min_score = min_score
        try:
            self._command = shlex.split(command)
        except ValueError as error:
            raise typer.BadParameter(f"--exec: {error} in {command!r}") from None
        if not self._command:
            raise typer.BadParameter("--exec: expected a program, got nothing")

    def __call__(self, event: "DetectionEvent") -> None:
        """Raises SightlineError if it cannot be started or ends with anything but 0."""
        facts = {
            "SIGHTLINE_CAMERA": event.frame.camera_id,
            "SIGHTLINE_FRAME": str(event.frame),
            "SIGHTLINE_OUTCOME": event.outcome.value,
            "SIGHTLINE_LABELS": counted(event, self._min_score),
        }
        told = json.dumps(as_json(event)).encode()
        try:
            ended = subprocess.run(self._command, input=told, env=os.environ | facts, check=False)  # noqa: S603
        except OSError as error:
            raise SightlineError(f"--exec: cannot run '{self._command[0]}': {error.strerror}") from None
        if ended.returncode:
            raise SightlineError(
                f"--exec: '{shlex.join(self._command)}' ended with {ended.returncode} on frame {event.frame}"
            )


class Webhook:
    """POSTs each event as JSON. `give_up_s`: how long a failure that may pass is tried again."""

    def __init__(self, url: str, *, give_up_s: float = GIVE_UP_S) -> None:
        from shared.clients.retry import Retry

        if not url.startswith(("http://", "https://")):
            raise typer.BadParameter(
                f"--webhook: expected an address that begins with http:// or https://, got '{url}'"
            )
        self._url = url
        self._retry = Retry(give_up_s=give_up_s)

    def __call__(self, event: "DetectionEvent") -> None:
        """Raises InvalidInput for an answer that will not change, Unavailable once it is given up."""
        from shared.clients.retry import Attempts

        attempts = Attempts(self._retry)
        body = json.dumps(as_json(event)).encode()
        while True:
            try:
                self._post(body, str(event.cursor))
                return
            except Unavailable as error:
                pause_s = attempts.failed(error)
            time.sleep(pause_s)

    def _post(self, body: bytes, key: str) -> None:
        headers = {"Content-Type": "application/json", "Idempotency-Key": key}
        request: Any = urllib.request.Request(self._url, body, headers, method="POST")  # noqa: S310 - checked above
        try:
            with urllib.request.urlopen(request, timeout=ANSWER_S):  # noqa: S310
                return
        except urllib.error.HTTPError as error:
            may_pass = error.code >= HTTPStatus.INTERNAL_SERVER_ERROR or error.code == HTTPStatus.TOO_MANY_REQUESTS
            kind = Unavailable if may_pass else InvalidInput
            raise kind(f"--webhook: {self._url} answered {error.code} {error.reason}") from None
        except (OSError, urllib.error.URLError) as error:
            reason = getattr(error, "reason", error)
            raise Unavailable(f"--webhook: {self._url} cannot be reached: {reason}") from None
