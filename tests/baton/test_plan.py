from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.up.plan import UpOptions, plan_groups


def planned(num_cpus=2.0, **options):
    ports = iter(range(40000, 41000))
    chosen = UpOptions(model_dir=Path("/models/m"), served_model_name="m", run_id="f00d", **options)
    return plan_groups(chosen, "redis://127.0.0.1:1", num_cpus, lambda: next(ports))


def members(groups):
    return [member for group in groups for member in group.members]


def test_the_default_is_one_prefill_one_decode_and_the_router_last():
    assert [group.name for group in planned()] == ["prefill-0", "decode-0", "router"]


def test_without_prefill_workers_the_decode_worker_gets_all_cores():
    groups = planned(num_cpus=8, num_prefill=0)
    assert [group.role for group in groups] == ["decode", "router"]
    assert groups[0].members[0].num_threads == 8


def test_services_are_told_model_store_and_ports_by_their_own_prefix():
    prefill, decode, router = members(planned(worker_settings={"DTYPE": "float32"}))
    assert prefill.environment["BATON_PREFILL_MODEL"] == "/models/m"
    assert prefill.environment["BATON_PREFILL_DTYPE"] == "float32"
    assert decode.environment["BATON_DECODE_REDIS_URL"] == "redis://127.0.0.1:1"
    assert decode.address == "127.0.0.1:" + decode.environment["BATON_DECODE_PORT"]
    assert router.environment["BATON_ROUTER_PORT"] == "8000"
    assert not [name for name in decode.environment if not name.startswith("BATON_DECODE_")]


def test_gpus_are_dealt_out_in_turn_and_the_router_gets_none():
    groups = planned(num_prefill=1, num_decode=2, gpus=("0", "3"))
    visible = [member.environment.get("CUDA_VISIBLE_DEVICES") for member in members(groups)]
    assert visible == ["0", "3", "0", None]
    with pytest.raises(ValueError, match="--gpus"):
        planned(gpus=("0", ""))


def test_with_certificates_every_service_gets_its_own_and_the_router_https():
    prefill, decode, router = members(planned(tls_dir=Path("/pki")))
    for worker, name in ((prefill, "PREFILL"), (decode, "DECODE")):
        assert worker.environment[f"BATON_{name}_TLS_CERT"] == "/pki/worker.pem"
        assert worker.environment[f"BATON_{name}_TLS_KEY"] == "/pki/worker.key"
        assert worker.environment[f"BATON_{name}_TLS_CA"] == "/pki/ca.pem"
        assert not [variable for variable in worker.environment if "HTTP_TLS" in variable]
    assert router.environment["BATON_ROUTER_TLS_CERT"] == "/pki/router.pem"
    assert router.environment["BATON_ROUTER_HTTP_TLS_KEY"] == "/pki/http.key"
    assert not [
        variable for member in members(planned()) for variable in member.environment if "TLS" in variable
    ]


def test_each_worker_keeps_its_blocks_in_a_directory_of_its_own_that_the_next_run_finds():
    def directories():
        groups = planned(num_prefill=2, ep_size=2, disk_kv_dir=Path("/kv"))
        names = ("BATON_PREFILL_DISK_KV_DIR", "BATON_DECODE_DISK_KV_DIR")
        return [m.environment[name] for m in members(groups) for name in names if name in m.environment]

    assert directories() == ["/kv/prefill-0", "/kv/prefill-1", "/kv/decode-0.0", "/kv/decode-0.1"]
    assert directories() == directories()


def test_the_ranks_of_a_group_share_rendezvous_and_group_and_differ_in_rank():
    first, second = (group for group in planned(num_decode=2, ep_size=3) if group.role == "decode")
    ranks = [member.environment["BATON_DECODE_EP_RANK"] for member in first.members]
    rendezvous = {member.environment["BATON_DECODE_EP_ADDRESS"] for member in first.members}
    assert ranks == ["0", "1", "2"]
    assert len(rendezvous) == 1
    assert rendezvous != {member.environment["BATON_DECODE_EP_ADDRESS"] for member in second.members}
    assert {member.environment["BATON_DECODE_GROUP_ID"] for member in second.members} == {"decode-1-f00d"}


def test_a_group_that_starts_again_meets_elsewhere_and_keeps_its_other_addresses():
    (group,) = (group for group in planned(ep_size=2) if group.role == "decode")
    moved = group.with_rendezvous("127.0.0.1:5")
    assert {m.environment["BATON_DECODE_EP_ADDRESS"] for m in moved.members} == {"127.0.0.1:5"}
    assert [m.address for m in moved.members] == [m.address for m in group.members]


@given(
    st.integers(0, 4), st.integers(1, 4), st.integers(1, 4), st.floats(0.5, 64), st.none() | st.integers(1, 8)
)
def test_names_and_ports_are_unique_and_threads_fit_the_cores(
    num_prefill, num_decode, ep_size, num_cpus, threads
):
    groups = planned(
        num_cpus=num_cpus,
        num_prefill=num_prefill,
        num_decode=num_decode,
        ep_size=ep_size,
        threads_per_worker=threads,
    )
    processes = members(groups)
    workers = [process for process in processes if process.role != "router"]
    assert len(workers) == num_prefill + num_decode * ep_size
    assert len({process.name for process in processes}) == len(processes)
    addresses = [address for worker in workers for address in (worker.address, worker.metrics_address)]
    assert len(set(addresses)) == len(addresses)
    for role in ("prefill", "decode"):
        counts = [worker.num_threads for worker in workers if worker.role == role]
        assert sum(counts) == len(counts) * threads if threads else sum(counts) <= max(num_cpus, len(counts))


def test_each_role_has_all_cores():
    groups = planned(num_cpus=8, num_prefill=2, ep_size=4)
    assert [member.num_threads for member in members(groups)] == [4, 4, 2, 2, 2, 2, 1]


@pytest.mark.parametrize(
    ("wrong", "option"),
    [
        ({"num_prefill": -1}, "--prefill"),
        ({"num_decode": 0}, "--decode"),
        ({"ep_size": 0}, "--ep-size"),
        ({"port": 70000}, "--port"),
        ({"threads_per_worker": 0}, "--threads"),
    ],
)
def test_a_wrong_number_is_refused_by_the_name_of_its_option(wrong, option):
    with pytest.raises(ValueError, match=option):
        planned(**wrong)
