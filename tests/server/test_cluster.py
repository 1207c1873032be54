"""The server on Ray Serve, for real: two replicas, many clients, and all that can go wrong."""

import json

import pytest

from tests.processes import launch

pytest.importorskip("ray", reason="the server over several processes needs ray[serve]")


def counted(tmp_path, *arguments):
    printed = launch("tests/server/cluster_job.py", str(tmp_path), *arguments, processes=1)
    return json.loads(next(line for line in printed.splitlines() if line.startswith('{"seconds"')))


@pytest.mark.slow
def test_no_answer_is_wrong_or_lost_whatever_happens_to_replicas_and_adapters(tmp_path):
    counts = counted(tmp_path, "--requests", "1500")
    assert counts["wrong"] == counts["lost"] == 0, counts["first"]
    assert counts["answers"] > 2000
    assert counts["refused"] > 50
    assert counts["new"] > 10
    assert (counts["killed"], counts["refreshed"]) == (1, 200)
    for replica in counts["replicas"]:
        assert replica["failures"] == replica["cache_leases"] == 0
    assert max(replica["most_adapters"] for replica in counts["replicas"]) > 1  # batches are mixed
    assert max(replica["cache_evictions"] for replica in counts["replicas"]) > 40
    # without the ingress, which asks again, what was in flight is lost: else the test would show nothing
    assert counts["what becomes of 512 without trying again"].get("ActorDiedError", 0) > 0


@pytest.mark.slow
def test_with_affinity_an_adapter_is_on_one_replica(tmp_path):
    counts = counted(tmp_path, "--requests", "400", "--affinity")
    assert counts["wrong"] == counts["lost"] == 0, counts["first"]
    held = [replica["cache_adapters"] for replica in counts["replicas"]]
    assert min(held) > 0
    assert sum(held) == 40
