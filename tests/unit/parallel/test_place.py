"""Which of several workers a process is, by its environment."""

import pytest

from perlhf.errors import ConfigError
from perlhf.parallel.place import Place, launched, place, several

WHOLE = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
WHOLE |= {"MASTER_ADDR": "node0", "MASTER_PORT": "29500"}


def test_torchrun_says_all_of_it():
    agent = {"TORCHELASTIC_RUN_ID": "a", "TORCHELASTIC_RESTART_COUNT": "2", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    assert place(WHOLE | agent) == Place(3, 4, 1, 2, "node0", 29500, "a/2", True)
    assert place(WHOLE) == Place(3, 4, 1, 2, "node0", 29500, "/0", False)


@pytest.mark.parametrize("environment", [{}, {"WORLD_SIZE": "1"}, {"WORLD_SIZE": ""}, {"RANK": "0"}])
def test_a_single_process_is_alone(environment):
    assert not several(environment)
    assert place(environment) is None


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"RANK": ""}, r"\$RANK: WORLD_SIZE is 4, but RANK isn't set"),
        ({"RANK": "4"}, "a number from 0 to 3"),
        ({"MASTER_ADDR": " "}, "MASTER_ADDR isn't set"),
        ({"MASTER_PORT": "http"}, "a number from 1 to 65535"),
        ({"WORLD_SIZE": "two"}, r"\$WORLD_SIZE"),
    ],
)
def test_what_is_missing_or_wrong_is_named_with_a_way_out(changed, said):
    with pytest.raises(ConfigError, match=said) as caught:
        place(WHOLE | changed)
    assert "perlhf launch" in str(caught.value)


def test_one_worker_is_launched_where_a_launcher_says_so():
    assert not launched({}) and not launched({"WORLD_SIZE": "1"})
    assert launched({"WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"})
