"""Writes prometheusrule.yaml: the rules of deploy/prometheus/rules as the Prometheus operator takes them.

    python deploy/kubernetes/prometheusrule.py

`tests/deploy/test_manifests.py` compares the two.
"""

from pathlib import Path

HERE = Path(__file__).parent
RULES = HERE.parent / "prometheus" / "rules"
HEAD = """\
# Made from deploy/prometheus/rules by prometheusrule.py; do not edit.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: sightline
spec:
  groups:
"""


def text() -> str:
    """The manifest: the groups of every rule file, moved in, so that their expressions stay as they are written."""
    lines = []
    for path in sorted(RULES.glob("*.yml")):
        groups = path.read_text().split("groups:\n", 1)[1]
        lines += [f"  {line}" if line else line for line in groups.splitlines()]
    return HEAD + "\n".join(lines) + "\n"


if __name__ == "__main__":
    (HERE / "prometheusrule.yaml").write_text(text())
