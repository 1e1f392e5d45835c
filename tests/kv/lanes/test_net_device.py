"""The network device that pages go over: that of the address a node listens at, unless somebody has chosen."""

from pathlib import Path

import pytest

from callboard.kv.lanes.net_device import device_of, use_device_of

HAS_RDMA = any(Path("/sys/class/infiniband").glob("*"))


def test_a_device_is_found_by_its_address() -> None:
    assert device_of("127.0.0.1") == "lo"
    assert device_of("192.0.2.77") is None
    assert device_of("nonsense") is None


@pytest.mark.skipif(HAS_RDMA, reason="there is an RDMA device here: the choice is UCX's")
def test_ucx_is_told_the_device_unless_the_user_has_said() -> None:
    told: dict[str, str] = {}
    use_device_of("127.0.0.1", told)
    assert told == {"UCX_NET_DEVICES": "lo"}
    use_device_of("192.0.2.77", nothing := {})
    assert nothing == {}
    use_device_of("127.0.0.1", said := {"UCX_NET_DEVICES": "eth7"})
    assert said == {"UCX_NET_DEVICES": "eth7"}
