"""What one rank does, in this process: who it is, how long it waits, what it tells; and what the launcher concludes."""

from __future__ import annotations

import os
import threading
import time

import pytest
import torch
import torch.distributed as dist

from llmc.compiler import cli
from llmc.compiler.diagnostics import UserError
from llmc.runtime import launch, ranks
from llmc.runtime.ranks import Gone, Missing, Place, Team, find_place

TORCHRUN = {
    "RANK": "3",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "host0",
    "MASTER_PORT": "20010",
}


def place(rank: int = 0, world_size: int = 2, local_world_size: int = 2) -> Place:
    return Place(
        rank=rank,
        world_size=world_size,
        local_rank=rank,
        local_world_size=local_world_size,
        master_addr="127.0.0.1",
        master_port=20010,
    )


def test_torchrun_says_who_a_rank_is():
    found = find_place(TORCHRUN)
    assert found is not None
    assert (found.rank, found.local_rank, found.world_size, found.comm_domain) == (3, 1, 4, "20010")
    assert not found.one_host


def domain(port: int) -> int:
    found = find_place({**TORCHRUN, "MASTER_PORT": str(port)})
    assert found is not None
    return int(found.comm_domain)


@pytest.mark.parametrize("base", [10067, 20000, 32768, 60000, 80])
def test_with_every_master_port_lccl_listens_on_a_free_port_that_needs_no_root(monkeypatch, base):
    """The vendor adds the domain to 10067, or to the port of LCAL_COMM_ID."""
    if base != 10067:
        monkeypatch.setenv("LCAL_COMM_ID", f"127.0.0.1:{base}")
    for port in range(1, 65536):
        listens = base + ranks.lccl_domain(port, base)
        assert 1024 <= listens <= 65535, port
        assert listens != port
    assert domain(60999) == ranks.lccl_domain(60999, base)


def test_runs_on_one_host_have_different_domains():
    """Ports that Linux chooses, what people write (torchrun's 29500, 20010, ...), and as many more as can differ."""
    assert len({domain(port) for port in range(10067, 65536)}) == 55469


@pytest.mark.parametrize("text", ["", "10.0.0.1", "host:", "127.0.0.1:70000", "127.0.0.1:x", "127.0.0.1:200000"])
def test_what_lccl_does_not_read_does_not_move_its_port(monkeypatch, text):
    monkeypatch.setenv("LCAL_COMM_ID", text)
    assert domain(65535) == 65535 - 55469


@pytest.mark.parametrize("name", TORCHRUN)
def test_a_process_that_torchrun_did_not_start_is_alone(name):
    """Some clusters set RANK and WORLD_SIZE for their own purposes."""
    assert find_place({key: value for key, value in TORCHRUN.items() if key != name}) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [("RANK", "x"), ("RANK", "4"), ("MASTER_PORT", ""), ("MASTER_PORT", "0"), ("MASTER_PORT", "65536")],
)
def test_an_environment_that_cannot_be_is_shown(name, value):
    with pytest.raises(UserError, match=name):
        find_place({**TORCHRUN, name: value})


@pytest.fixture
def team(monkeypatch) -> Team:
    """Rank 0 of 3 on a store that the test writes; no group is made."""
    monkeypatch.setenv("LLMC_START_TIMEOUT", "0.4")
    monkeypatch.setenv("LLMC_LAUNCHER", "1")
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **kwargs: None)
    monkeypatch.setattr(dist.distributed_c10d, "_set_pg_timeout", lambda *args: None)
    team = Team(place(world_size=3, local_world_size=3))
    team.store = dist.HashStore()
    return team


def test_ranks_that_did_not_arrive_are_named(team):
    team.store.set("llmc/arrived/1", "")
    with pytest.raises(Missing, match=r"rank 2 of 3 did not start: no sign for 0\.4 s"):
        team.meet()


def test_every_sign_of_a_rank_starts_the_wait_anew(team):
    """Signs come every 0.3 s, each in time although the last comes after 1.2 s."""

    def others() -> None:
        for sign in ("connected/1", "connected/2", "arrived/1", "arrived/2"):
            time.sleep(0.3)
            team.store.set(f"llmc/{sign}", "")

    thread = threading.Thread(target=others)
    thread.start()
    team.meet()
    thread.join()


@pytest.mark.parametrize(
    ("spoke", "words"),
    [
        ([0, 2], "rank 1 of 3 did not connect to the others within 0.4 s"),
        ([0, 1, 2], "cannot connect to each other: no"),
    ],
)
def test_a_group_that_is_not_made_names_the_rank_that_stopped_or_the_reason(team, monkeypatch, spoke, words):
    def refuse(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no route to host\nand a stack of C++")

    monkeypatch.setattr(dist, "init_process_group", refuse)
    monkeypatch.setattr(ranks, "FIRST_WORD_SECONDS", 0.0)
    for rank in spoke:
        team.store.set(f"llmc/alone/{rank}", "")
    for rank in range(3):
        team.store.set(f"llmc/arrived/{rank}", "")
    with pytest.raises(Missing, match=words):
        team.meet()


def test_a_store_that_ends_while_ranks_arrive_is_named(team):
    class Store:
        def set(self, *args: object) -> None:
            raise dist.DistStoreError("wait timeout")

    team.store = Store()
    with pytest.raises(Missing, match=r"the store of the ranks at 127\.0\.0\.1:20010 does not answer any more: wait"):
        team.meet()
    team.dismiss()


@pytest.mark.parametrize("name", ["LLMC_START_TIMEOUT", "LLMC_END_TIMEOUT"])
@pytest.mark.parametrize("value", ["soon", "0", "-1", "nan"])
def test_a_time_limit_that_is_no_time_is_refused(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=name):
        Team(place())


class Ended(BaseException):
    """In place of the end of this process."""


@pytest.fixture
def told(monkeypatch):
    """told(team, error) -> the messages that the rank prints and its exit code; waits are not waited for."""

    def end(code: int) -> None:
        raise Ended(code)

    def go(team: Team, error: Exception) -> tuple[list[str], int]:
        said: list[str] = []
        with pytest.raises(Ended) as ended:
            team.fail(error, lambda e: said.append(str(e)))
        return said, ended.value.args[0]

    monkeypatch.setattr(ranks, "end", end)
    monkeypatch.setattr(ranks, "LOST_SECONDS", 0.2)
    monkeypatch.setattr(ranks, "FIRST_WORD_SECONDS", 0.0)
    monkeypatch.setattr(ranks, "SILENT_SECONDS", 0.0)
    return go


def test_of_several_ranks_with_an_error_one_speaks(told):
    store, said = dist.HashStore(), []
    for rank in (1, 0):
        team = Team(place(rank))
        team.store = store
        words, code = told(team, UserError("no", hint="yes"))
        assert code == 1
        said += words
    assert said == ["rank 1: no\n  likely: yes"]


def test_an_unforeseen_error_shows_where_and_what(told, capsys):
    said, _ = told(Team(place(1)), KeyError("odd"))
    assert said == ["rank 1: KeyError: 'odd'"]
    assert "KeyError: 'odd'" in capsys.readouterr().err


def test_a_file_that_cannot_be_read_is_named_without_a_traceback(told, capsys):
    said, _ = told(Team(place(1)), PermissionError(13, "Permission denied", "/w/a"))
    assert said == ["rank 1: /w/a: Permission denied"]
    assert capsys.readouterr().err == ""


def test_a_lost_rank_is_no_error_when_rank_0_left_on_purpose(told):
    team = Team(place(1))
    team.store = dist.HashStore()
    team.dismiss()
    assert told(team, Gone("Connection closed by peer")) == ([], 0)


def test_a_lost_rank_is_told_when_nobody_else_tells(told):
    said, code = told(Team(place(1)), Gone("Connection closed by peer"))
    assert code == 1
    assert said == ["rank 1: another rank does not answer any more (Connection closed by peer)"]


def test_a_rank_whose_device_hangs_ends_when_another_has_failed(monkeypatch):
    ended = threading.Event()
    monkeypatch.setattr(ranks, "LOST_SECONDS", 0.1)
    monkeypatch.setattr(ranks, "end", lambda code: ended.set() or team.arrived.set())
    team = Team(place(1))
    team.store = dist.HashStore()
    thread = threading.Thread(target=team.watch)
    thread.start()
    assert not ended.wait(0.8)
    team.store.add("llmc/spoken", 1)
    assert ended.wait(5)
    thread.join()


def test_ranks_take_the_tokens_of_rank_0(monkeypatch):
    class Inner:
        def sample(self, logits, states):
            return [7, 8]

    def broadcast(tensor, src):
        assert src == 0
        sent.append(tensor.tolist())
        tensor.copy_(torch.tensor([7, 8]))

    sent: list[list[int]] = []
    monkeypatch.setattr(dist, "broadcast", broadcast)
    for rank in (0, 1):
        assert Team(place(rank)).sampler(Inner()).sample(torch.zeros(2, 3), [None, None]) == [7, 8]
    assert sent == [[7, 8], [0, 0]]


def test_ranks_agree_on_the_least_memory_that_one_of_them_has(monkeypatch):
    """Each measures for itself; with caches of different sizes they would take different steps."""
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, op: tensor.clamp_(max=5 << 30))
    assert Team(place()).least(7 << 30) == 5 << 30
    assert Team(place(world_size=1, local_world_size=1)).least(7 << 30) == 7 << 30


@pytest.mark.parametrize(
    ("ended", "message"),
    [
        ({1: -9}, "rank 1 was killed by SIGKILL, and the other ranks were ended"),
        ({0: 1, 1: -11}, "rank 1 was killed by SIGSEGV"),
        ({2: 7}, "rank 2 ended with code 7 and gave no reason"),
    ],
)
def test_a_rank_that_could_not_speak_is_spoken_for(ended, message):
    with pytest.raises(UserError, match=message):
        launch.outcome(ended)


def test_a_rank_that_has_spoken_gives_the_exit_code():
    assert launch.outcome({1: 1}) == 1
    for code in (130, -2):
        with pytest.raises(KeyboardInterrupt):
            launch.outcome({0: code})


def test_starting_ranks_leaves_the_environment_as_it_was(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = dict(os.environ)
    with launch.environment({"OMP_NUM_THREADS": "1", "LLMC_LAUNCHER": "5"}):
        assert os.environ["LLMC_LAUNCHER"] == "5"
    assert dict(os.environ) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tp", "9"], "world size 9"),
        (["--input-file", "nowhere"], "--input-file nowhere cannot be read"),
        (["--device", "gpu"], "gpu"),
        (["--input-ids", "1", "99"], "prompt 1 holds token id 99; the model knows 0 to 63"),
        (["--input-text", "w1 w2", "--max-position-embeddings", "2"], "a sequence can have 2 in all"),
    ],
)
def test_what_every_rank_would_refuse_is_refused_before_one_starts(model, monkeypatch, capsys, words, message):
    monkeypatch.setattr(launch, "launch", lambda *args, **kwargs: pytest.fail("ranks were started"))
    assert cli.main(["run", *model, "--tp", "2", *words]) == 1
    assert message in capsys.readouterr().err


def test_an_artifact_says_how_many_ranks_it_is_for(model, monkeypatch, tmp_path, capsys):
    built = str(tmp_path / "built")
    graph, folder = model[model.index("--graph") + 1], model[model.index("--model-path") + 1]
    assert cli.main(["compile", graph, "--device", "host", "--tp", "3", "-o", built]) == 0
    started = []
    monkeypatch.setattr(launch, "launch", lambda words, world_size: started.append((words, world_size)) or 0)
    assert cli.main(["run", "--model-path", folder, "--artifact", built, "--input-text", "w1"]) == 0
    ((words, world_size),) = started
    assert world_size == 3
    assert f"--artifact={built}" in words
    assert cli.main(["run", "--model-path", folder, "--artifact", built, "--tp", "2"]) == 1
    assert "it was compiled for world size 3, and 2 is asked for" in capsys.readouterr().err
