"""/metrics: what Prometheus is told of a node."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families


def figures(text):
    """(name, labels) -> value of every sample."""
    return {(sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(text) for sample in family.samples}


def test_the_node_is_told_in_figures(client):
    """Prometheus' own parser reads it, and it says what the ledger holds."""
    answer = client.get("/metrics")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    found = figures(answer.text)
    assert found["dicomnode_jobs", (("state", "held"),)] == 1
