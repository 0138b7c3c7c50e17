"""Real jobs through a real server, over real sockets."""

import itertools
import json
import os
import select
import signal
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from dptrain.errors import (
    CheckpointError,
    DataError,
    DptrainError,
    JobError,
    LaunchError,
    NotFoundError,
    RefusedError,
    RefusedTransition,
    UsageError,
)
from dptrain.processes import children
from dptrain.service import keeper, runner
from dptrain.service.client import Client
from dptrain.service.model import State
from dptrain.service.server import ROLES, TOKEN, TOKENS, JobServer
from dptrain.v1 import job_pb2, job_service_pb2, job_service_pb2_grpc, log_service_pb2, metric_service_pb2
from dptrain.wire.channel import connect
from dptrain.wire.security import Calling
from dptrain.wire.tokens import Role, TokenFile
from tests.service.jobs import JOB, LONG, solo, solo_hash


def write(tmp_path: Path, text: str = JOB, name: str = "job.toml") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def until(client: Client, job: str, *states: State, steps: int = 0) -> job_pb2.Job:
    """The job as soon as it is in one of the states and has done so many steps."""
    for message in client.watch(job, progress=True):
        found = client.job(job)
        if found.state in states and found.progress.step >= steps:
            return found
        if message.last:
            break
    raise AssertionError(f"{client.job(job)}")


def curve(stream: Iterable[metric_service_pb2.StreamMetricsResponse]) -> list[tuple[int, float]]:
    """The points of one curve."""
    return [(point.step, point.value) for message in stream for series in message.series for point in series.points]


def stopped_with_the_bits_of_a_run_by_hand(client: Client, job: str, tmp_path: Path) -> job_pb2.Job:
    """End a job that is LONG, and see that its checkpoint is what one process comes to in as many steps."""
    client.cancel(job)
    stopped = client.wait(job)
    step = client.checkpoints(job)[0].step
    name = Path("checkpoints") / f"step-{step:010}" / "manifest.json"
    manifest = client.download(job, str(name), tmp_path / "manifest.json")
    alone = solo(tmp_path, LONG.replace("steps = 100000", f"steps = {step}")) / name
    assert json.loads(manifest.read_text())["sha256"] == json.loads(alone.read_text())["sha256"]
    return stopped


def worker(server: JobServer, job: str) -> int:
    """The process of one of a job's workers."""
    below = [keeper.begun(server.desk.runner.folder(job))[-1]["pid"]]
    for pid in below:
        line = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if b"run" in line and b"-n" not in line:
            return pid
        below += children(pid)
    raise AssertionError("no worker")


def test_a_job_is_done_and_its_bits_are_those_of_a_run_by_hand(client: Client, tmp_path: Path) -> None:
    job = client.submit(write(tmp_path), workers=2, labels={"team": "x"})
    assert (job.state, job.launches) == (State.QUEUED, 0)
    with ThreadPoolExecutor(9) as pool:
        followed = list(pool.map(lambda _: list(client.logs(job.id, follow=True)), range(9)))
        streamed = list(pool.map(lambda _: curve(client.stream_metrics(job.id, ["loss"])), range(9)))
    done = client.wait(job.id)
    assert (done.state, done.exit_code, done.launches) == (State.SUCCEEDED, 0, 1)
    assert done.result.weights_sha256 == solo_hash(tmp_path)
    assert done.result.same_bits
    assert (done.progress.step, done.progress.total_steps) == (30, 30)
    *lines, end = everything = list(client.logs(job.id, follow=True))
    assert followed == [everything] * 9
    assert isinstance(end, log_service_pb2.LogEnd)
    assert (end.state, end.exit_code) == (State.SUCCEEDED, 0)
    texts = [line.text for line in lines if isinstance(line, log_service_pb2.LogLine)]
    assert any(done.result.weights_sha256 in text for text in texts)
    # From every cursor on there is the rest, and nothing else.
    for number, line in enumerate(lines):
        assert isinstance(line, log_service_pb2.LogLine)
        request = log_service_pb2.TailLogsRequest(job_id=job.id, cursor=line.cursor)
        rest = [told.text for message in client._logs.TailLogs(request) for told in message.lines]
        assert rest == texts[number + 1 :]
    assert [line.text for line in list(client.logs(job.id, tail=2))[:-1] if hasattr(line, "text")] == texts[-2:]
    curves = {series.name: series.points for series in client.metrics(job.id).series}
    assert curves["loss"][-1].step == 30
    assert {"loss", "lr", "samples_per_second"} <= curves.keys()
    assert [series.name for series in client.metrics(job.id, ["compute.*"]).series] == ["compute.0", "compute.1"]
    assert list(client.stream_metrics(job.id, ["loss"]))[-1].last
    assert streamed == [curve(client.stream_metrics(job.id, ["loss"]))] * 9
    assert streamed[0][-1] == (30, curves["loss"][-1].value)
    home = client.download_run(job.id, tmp_path / "home")
    assert {"job.toml", "result.json", "weights.safetensors"} <= {path.name for path in home.iterdir()}
    import dptrain

    assert dptrain.load(home).result["weights_sha256"] == done.result.weights_sha256
    assert [checkpoint.step for checkpoint in client.checkpoints(job.id)] == [30]
    assert [found.id for found in client.jobs("label.team=x state=SUCCEEDED")] == [job.id]
    client.delete(job.id)
    with pytest.raises(NotFoundError):
        client.job(job.id)
    assert not list(client.jobs())


def test_the_same_request_is_the_same_job(client: Client, tmp_path: Path) -> None:
    path = write(tmp_path)
    first = client.submit(path, request_id="one")
    assert client.submit(path, request_id="one").id == first.id
    with pytest.raises(UsageError, match="request_id"):
        client.submit(path, request_id="one", priority=1)
    assert len(list(client.jobs())) == 1


def test_a_dry_run_leaves_nothing(client: Client, tmp_path: Path) -> None:
    job = client.submit(write(tmp_path), dry_run=True)
    assert not job.id
    assert not list(client.jobs())


def test_pause_resume_cancel_retry_and_the_bits_are_the_same(client: Client, tmp_path: Path) -> None:
    text = LONG.replace("steps = 100000", "steps = 3000")
    job = client.submit(write(tmp_path, text), workers=2)
    until(client, job.id, State.RUNNING, steps=1)
    client.pause(job.id)
    paused = until(client, job.id, State.PAUSED)
    assert paused.workers == 0
    with pytest.raises(RefusedTransition, match="PAUSED"):
        client.retry(job.id)
    *_, end = client.logs(job.id, follow=True)
    assert end.state == State.PAUSED
    client.resume(job.id)
    until(client, job.id, State.RUNNING)
    client.cancel(job.id)
    *_, last = client.watch(job.id)
    assert last.state in (State.CANCELLED, State.SUCCEEDED)
    if last.state == State.CANCELLED:
        assert "step" in last.message
        with pytest.raises(CheckpointError, match="step 7"):
            client.retry(job.id, from_step=7)
        client.retry(job.id, from_step=client.checkpoints(job.id)[-1].step)
    done = client.wait(job.id)
    assert done.result.weights_sha256 == solo_hash(tmp_path, text)


def test_a_worker_and_a_supervisor_that_are_killed_are_started_again(
    client: Client, server: JobServer, tmp_path: Path
) -> None:
    job = client.submit(write(tmp_path, LONG), workers=2)
    until(client, job.id, State.RUNNING, steps=1)
    # First a worker, which its own supervisor starts again.
    os.kill(worker(server, job.id), signal.SIGKILL)
    found = until(client, job.id, State.RECOVERING)
    assert (found.workers, found.launches) == (2, 1)
    assert "SIGKILL" in found.message
    until(client, job.id, State.RUNNING)
    begun = keeper.begun(server.desk.runner.folder(job.id))[-1]
    handle = os.pidfd_open(begun["pid"])
    os.kill(begun["pid"], signal.SIGKILL)
    select.select([handle], [], [], 30)
    os.close(handle)
    until(client, job.id, State.RECOVERING)
    until(client, job.id, State.RUNNING)
    stopped = stopped_with_the_bits_of_a_run_by_hand(client, job.id, tmp_path)
    states = [message.state for message in client.watch(job.id)]
    assert [a for a, b in itertools.pairwise(states) if b is not a].count(State.RECOVERING) == 2
    assert (stopped.launches, stopped.progress.recoveries) == (2, 1)


def test_a_job_with_a_range_gives_slots_to_others_and_takes_them_back(
    serve: Callable[..., JobServer], environ: dict[str, str], tmp_path: Path
) -> None:
    with Client(str(serve(settled=0.0).address), environ=environ) as client:
        wide = client.submit(write(tmp_path, LONG), workers="1..2")
        assert until(client, wide.id, State.RUNNING, steps=1).workers == 2
        narrow = client.submit(write(tmp_path, JOB + '\n[exchange]\ntype = "ps"\n'))
        done = client.wait(narrow.id)
        assert done.state == State.SUCCEEDED
        result = json.loads(client.download(narrow.id, "result.json", tmp_path / "result.json").read_text())
        assert result["exchange"] == "ps"
        assert done.result.weights_sha256 == solo_hash(tmp_path)
        while client.job(wide.id).launches < 3:
            until(client, wide.id, State.STARTING)
        until(client, wide.id, State.RUNNING)
        stopped = stopped_with_the_bits_of_a_run_by_hand(client, wide.id, tmp_path)
        assert stopped.faults == 0
        told = [message.message for message in client.watch(wide.id)]
        trained = [text for text in told if text.startswith("trains with")]
        assert trained == ["trains with 2 workers", "trains with 1 worker", "trains with 2 workers"]


def test_jobs_go_on_without_a_server_and_are_found_again(
    serve: Callable[..., JobServer], environ: dict[str, str], tmp_path: Path
) -> None:
    from dptrain.service.server import Options

    text = LONG.replace("steps = 100000", "steps = 1500")
    first = serve()
    with Client(str(first.address), environ=environ) as client:
        job = client.submit(write(tmp_path, text), workers=2)
        until(client, job.id, State.RUNNING)
    first.__exit__()
    options = Options(listen=first.address, data=tmp_path / "data", slots=2)
    with JobServer(options, environ) as again, Client(str(again.address), environ=environ) as client:
        done = client.wait(job.id)
    assert (done.state, done.launches) == (State.SUCCEEDED, 1)
    assert done.result.weights_sha256 == solo_hash(tmp_path, text)


def test_one_folder_has_one_server(server: JobServer, serve: Callable[..., JobServer]) -> None:
    with pytest.raises(LaunchError, match="one that does"):
        serve()


def test_what_waits_says_why(client: Client, tmp_path: Path) -> None:
    first = client.submit(write(tmp_path, LONG), workers=2)
    until(client, first.id, State.STARTING, State.RUNNING)
    second = client.submit(write(tmp_path, LONG))
    reason = job_pb2.JOB_REASON_WAITING_FOR_SLOTS
    for _ in range(200):
        found = client.job(second.id)
        if found.reason == reason:
            break
        select.select([], [], [], 0.05)
    assert found.message.endswith("it wants 1 worker, none of 2 slots are free")
    assert client.cancel(second.id).state == State.CANCELLED
    client.cancel(first.id, grace=timedelta())
    assert client.wait(first.id).state == State.CANCELLED


def test_a_job_that_runs_too_long_is_ended(client: Client, tmp_path: Path) -> None:
    job = client.submit(write(tmp_path, LONG), max_duration=timedelta(seconds=3))
    done = client.wait(job.id)
    assert (done.state, done.reason) == (State.FAILED, job_pb2.JOB_REASON_TOO_LONG)


def test_an_error_of_the_job_is_told_and_not_retried(client: Client, tmp_path: Path) -> None:
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n1,x\n" * 100)
    client.upload(tmp_path / "bad.csv")
    text = JOB.replace('source = "digits"', 'source = "bad.csv"\nlabel = "nothing"')
    done = client.wait(client.submit(write(tmp_path, text)).id)
    assert (done.state, done.reason, done.launches) == (State.FAILED, job_pb2.JOB_REASON_JOB_ERROR, 1)
    assert "nothing" in done.message


@pytest.mark.parametrize(
    ("text", "error", "found"),
    [
        ("", JobError, "job_toml"),
        ("a = [", JobError, "TOML"),
        ("a = " + "[" * 5000, JobError, "nested too deeply"),
        ("a = " + "9" * 5000, JobError, "TOML"),
        (JOB + "epochs = 3", JobError, "epochs"),
        (JOB.replace("units = 10", "units = -1"), JobError, "units"),
        (JOB.replace("digits", "/etc/passwd"), DataError, "data.source"),
        (JOB.replace("digits", "../../etc/passwd"), DataError, "data.source"),
        (JOB.replace("digits", "a\\u0000b"), DataError, "data.source"),
        (JOB.replace('source = "digits"', 'test = "/etc/passwd"'), DataError, "data.test"),
        (JOB.replace("[model]", '[model]\ninit_from = "/"'), DataError, "init_from"),
        (JOB.replace('layers = [{ type = "linear", units = 10 }]', 'python = "m.py:f"'), JobError, "code"),
    ],
)
def test_bad_jobs_are_refused_with_their_place(
    server: JobServer, client: Client, text: str, error: type[DptrainError], found: str
) -> None:
    stub = client._jobs
    with pytest.raises(grpc.RpcError) as caught:
        stub.CreateJob(job_service_pb2.CreateJobRequest(spec=job_pb2.JobSpec(job_toml=text)))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    status = rpc_status.from_call(caught.value)
    details = error_details_pb2.BadRequest()
    assert any(detail.Unpack(details) for detail in status.details)
    assert details.field_violations[0].field.startswith("spec.job_toml")
    assert found in details.field_violations[0].field + details.field_violations[0].description
    assert not list(client.jobs())


@pytest.mark.parametrize(
    "spec",
    [
        {"model_source": "x"},
        {"environment": {"A": "b"}},
        {"workers": "3"},
        {"workers": "0"},
        {"priority": 101},
        {"max_retries": 1000},
        {"name": "x" * 300},
        {"labels": {"": "x"}},
        {"labels": {"x": "y" * 100}},
    ],
)
def test_bad_specs_are_refused(client: Client, spec: dict[str, object]) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        client._jobs.CreateJob(
            job_service_pb2.CreateJobRequest(spec=job_pb2.JobSpec(job_toml=JOB, **spec))  # type: ignore[arg-type]
        )
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_code_runs_where_the_operator_says_so_and_within_the_limits(
    serve: Callable[..., JobServer], environ: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(allow_code=True, job_limits=runner.Limits(memory_bytes=400 << 20))
    model = (Path(__file__).parents[2] / "examples/own_model.py").read_text()
    (tmp_path / "m.py").write_text(model + '\nimport os\n\nassert os.environ["MINE"] == "x y; $(z)"\n')
    text = JOB.replace('layers = [{ type = "linear", units = 10 }]', 'python = "m.py:build"')
    large = JOB.replace("units = 10 }", 'units = 1000000 }, { type = "linear", units = 10 }')
    mine = {"MINE": "x y; $(z)"}
    with Client(str(server.address), environ=environ) as client:
        with pytest.raises(JobError, match="the system's"):
            client.submit(write(tmp_path), environment={"LD_PRELOAD": "x"})
        first = client.submit(write(tmp_path, text), environment=mine)
        second = client.submit(write(tmp_path, large))
        done, failed = client.wait(first.id), client.wait(second.id)
    assert done.state == State.SUCCEEDED, done.message
    monkeypatch.setenv(*mine.popitem())
    assert done.result.weights_sha256 == solo_hash(tmp_path, text.replace("m.py", str(tmp_path / "m.py")))
    assert (failed.state, failed.reason, failed.launches) == (State.FAILED, job_pb2.JOB_REASON_JOB_ERROR, 1)
    assert "expected to get by with 0.419 GB of memory, the limit of each process" in failed.message
    assert "--job-memory of `dptrain serve`" in failed.message


@pytest.mark.parametrize("name", ["two words", "a\nb", "$(reboot)", "'; --", "\x00\x1b[2J", "日本", "../x", "-n 9"])
def test_names_are_data(client: Client, tmp_path: Path, name: str) -> None:
    job = client.submit(write(tmp_path), name=name, labels={name: name})
    assert client.wait(job.id).state == State.SUCCEEDED
    assert client.job(job.id).spec.name == name
    assert dict(client.job(job.id).spec.labels) == {name: name}


def test_update_changes_what_the_mask_says(client: Client, tmp_path: Path) -> None:
    job = client.submit(write(tmp_path, LONG), workers=2)
    after = client.update(job.id, priority=5, name="other", labels={"a": "b"})
    assert (after.spec.priority, after.spec.name, dict(after.spec.labels)) == (5, "other", {"a": "b"})
    request = job_service_pb2.UpdateJobRequest(job_id=job.id)
    for paths in ([], ["workers"], ["priority", "owner"]):
        del request.update_mask.paths[:]
        request.update_mask.paths.extend(paths)
        with pytest.raises(grpc.RpcError) as caught:
            client._jobs.UpdateJob(request)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    client.cancel(job.id, grace=timedelta())
    client.wait(job.id)


def test_another_owners_jobs_are_not_there(client: Client, as_owner: Callable[..., Client], tmp_path: Path) -> None:
    ada, bob = as_owner("ada/laptop"), as_owner("bob")
    also = as_owner("ada/ci", Role.read)
    job = ada.submit(write(tmp_path))
    assert ada.wait(job.id).owner == "ada"
    assert also.job(job.id[:4]).id == job.id
    assert [found.id for found in client.jobs()] == [job.id]
    assert not list(bob.jobs("owner=ada"))
    actions: list[Callable[[], object]] = [
        lambda: bob.job(job.id),
        lambda: bob.job("@latest"),
        lambda: bob.update(job.id, priority=1),
        lambda: bob.cancel(job.id),
        lambda: bob.pause(job.id),
        lambda: bob.resume(job.id),
        lambda: bob.retry(job.id),
        lambda: bob.delete(job.id),
        lambda: list(bob.watch(job.id)),
        lambda: list(bob.logs(job.id)),
        lambda: bob.metrics(job.id),
        lambda: list(bob.stream_metrics(job.id)),
        lambda: bob.artifacts(job.id),
        lambda: bob.checkpoints(job.id),
        lambda: bob.download(job.id, "result.json", tmp_path / "x"),
    ]
    for action in actions:
        with pytest.raises(NotFoundError):
            action()
    (tmp_path / "d.csv").write_text("a,b\n1,2\n")
    ada.upload(tmp_path / "d.csv")
    assert not bob.datasets().datasets
    with pytest.raises(DataError):
        bob.submit(write(tmp_path, JOB.replace("digits", "d.csv")), dry_run=True)
    ada.submit(write(tmp_path, JOB.replace("digits", "d.csv")), dry_run=True)


OF_EVERY_SERVER = {
    "dptrain.v1.VersionService": {"GetVersion": Role.any},
    "grpc.health.v1.Health": {"Check": Role.any, "Watch": Role.any},
    "grpc.reflection.v1alpha.ServerReflection": {"ServerReflectionInfo": Role.any},
}


def test_every_method_without_with_a_wrong_and_with_a_read_only_token(server: JobServer, tmp_path: Path) -> None:
    read = TokenFile(tmp_path / "data" / TOKENS).create("reader", Role.read)
    for token in (None, "dptrain_" + "x" * 43, read):
        with connect(server.address, Calling(token)) as channel:
            for service, roles in {**ROLES, **OF_EVERY_SERVER}.items():
                for method, role in roles.items():
                    code = code_of(channel, f"/{service}/{method}")
                    if token != read:
                        assert code == "UNAUTHENTICATED", (method, code)
                    elif not Role.read.grants(role):
                        assert code == "PERMISSION_DENIED", (method, code)
                    else:
                        assert code not in BUGS | {"UNAUTHENTICATED", "PERMISSION_DENIED"}, (method, code)


BUGS = {"UNIMPLEMENTED", "UNKNOWN", "INTERNAL"}


def code_of(channel: grpc.Channel, path: str) -> str:
    """How a call ends that says nothing; what has no end of its own is "OK" with its first answer."""
    # Every kind of call can be made as a stream both ways; an empty message parses as any.
    call = channel.stream_stream(path)(iter([b""]), timeout=20)
    try:
        next(call, None)
        call.cancel()
    except grpc.RpcError as error:
        return str(error.code().name)
    return "OK"


def test_tokens_are_kept_for_their_user_alone(server: JobServer, tmp_path: Path, environ: dict[str, str]) -> None:
    token = (tmp_path / "data" / TOKEN).read_text().strip()
    for path in [*(tmp_path / "data").rglob("*"), *(tmp_path / "config").rglob("*")]:
        if path.is_file():
            holds = token in path.read_bytes().decode(errors="replace")
            assert holds == (path.suffix == ".token" or path.name == TOKEN), path
            if holds:
                assert path.stat().st_mode & 0o077 == 0
    assert (tmp_path / "data").stat().st_mode & 0o077 == 0
    with pytest.raises(RefusedError), Client(str(server.address), environ={"HOME": str(tmp_path)}) as client:
        client.info()


def test_a_stream_that_is_cut_off_is_not_an_end(
    serve: Callable[..., JobServer], environ: dict[str, str], tmp_path: Path
) -> None:
    first = serve()
    with Client(str(first.address), environ=environ) as client:
        job = client.submit(write(tmp_path, LONG))
        until(client, job.id, State.RUNNING, steps=1)
    with connect(first.address, Calling((tmp_path / "data" / TOKEN).read_text().strip())) as channel:
        stub = job_service_pb2_grpc.JobServiceStub(channel)
        stream = stub.WatchJob(job_service_pb2.WatchJobRequest(job_id=job.id))
        next(stream)
        first.__exit__()
        with pytest.raises(grpc.RpcError) as caught:
            assert not any(message.last for message in stream)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def test_prometheus_is_told(serve: Callable[..., JobServer], environ: dict[str, str], tmp_path: Path) -> None:
    from urllib.request import urlopen

    from dptrain.wire.address import parse

    server = serve(metrics=parse("127.0.0.1:0"))
    with Client(str(server.address), environ=environ) as client:
        client.wait(client.submit(write(tmp_path)).id)
    with urlopen(f"http://{server.exposition.address}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    assert 'dptrain_jobs{state="succeeded"} 1.0' in text
    assert "dptrain_jobs_accepted_total 1.0" in text
    assert "dptrain_slots 2.0" in text
