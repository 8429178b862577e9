"""Addresses hold no secrets: what is refused, what is filled in from the environment, what errors show."""

import pytest
from pydantic import ValidationError

from perlhf.config.addresses import check_address, filled, is_address, shown
from perlhf.config.commands import EvaluateConfig
from perlhf.config.comparison import CompareConfig
from perlhf.config.recipe import validated
from perlhf.config.stages import PolicyConfig
from perlhf.errors import ConfigError

SECRET = "hunter2hunter2"


@pytest.mark.parametrize(
    "address",
    ["localhost:8000", "file:///etc/hosts", "ftp://host/x", "http://", "http://host:port/", "http://ho st/",
     "http://h/\n", "http://${HOST}/x", "http://h/<x>", ""],
)  # fmt: skip
def test_addresses_that_are_none(address: str):
    with pytest.raises(ConfigError, match=r"is no http address\n  allowed: http"):
        check_address(address)


@pytest.mark.parametrize(
    "address",
    [
        "http://127.0.0.1:8000",
        "https://host.example/v1/score",
        "http://[::1]:8000/",
        "http://host/score?model=rm-1&version=2024-01",
        "http://host/models/Skywork-Reward-V2-Llama-3.1-8B/score",
        "http://host/3f1c0c3e-1c1f-4b61-9d5a-0d2f1f7a2c11",
        "http://host/score?code=${CODE}&model=m",
        "http://host/hooks/${HOOK}",
        "http://host/x?model=",
    ],
)
def test_addresses_without_secrets(address: str):
    check_address(address)
    assert is_address(address) and is_address(address.upper())


NAMES = (
    "token access_token key api_key apikey x-api-key sig signature secret client_secret password passwd pw pwd auth "
    "authorization code subscription-key jwt session k p X-Amz-Signature AWSAccessKeyId"
).split()


@pytest.mark.parametrize("name", [*NAMES, *map(str.upper, NAMES), "api%5Fkey", "anything_else"])
def test_what_may_be_a_secret_is_refused_unseen(name: str):
    with pytest.raises(ConfigError) as raised:
        check_address(f"https://host/score?model=m&{name}={SECRET}", "PERLHF_JUDGE_KEY")
    said = str(raised.value)
    assert said.startswith("https://host/score: the address holds a value for ") and SECRET not in said
    assert "set PERLHF_JUDGE_KEY" in said and f"?{name}=${{MY_KEY}}" in said


@pytest.mark.parametrize(
    "address",
    [
        f"http://h/?{SECRET}",
        f"http://h/?model=m;token={SECRET}",
        f"http://h/?token=${{A}}{SECRET}",
        f"http://h/#{SECRET}",
        f"http://me:{SECRET}@h/",
        f"http://{SECRET}@h/",
        f"http://me:{SECRET}@h:port/",
        f"http://h/?model=sk-{SECRET}{SECRET}",
        "http://h/hooks/0123456789abcdef0123456789abcdef/x",
        "http://h/hooks/aB3dEfGh1jKlMn0pQrStUvWxYz",
        f"http://h/hf_{SECRET}",
        f"http://h x/?token={SECRET}",
    ],
)
def test_secrets_in_other_places_are_refused_unseen(address: str):
    with pytest.raises(ConfigError) as raised:
        check_address(address)
    said = str(raised.value)
    assert SECRET not in said and "0123456789abcdef" not in said and "aB3dEf" not in said


def test_a_placeholder_is_filled_from_the_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOOK", "T0/B1")
    monkeypatch.setenv("CODE", "a+b&c")
    found = filled("http://host/${HOOK}?code=${CODE}&model=m")
    assert found.url == "http://host/T0/B1?code=a%2Bb%26c&model=m"
    assert set(found.hidden) == {"T0/B1", "a+b&c", "a%2Bb%26c"}
    monkeypatch.setenv("CODE", "")
    with pytest.raises(ConfigError, match="environment variable CODE isn't set"):
        filled("http://host/?code=${CODE}")


def test_what_is_shown():
    assert shown(f"https://me:{SECRET}@host:8/a/b?token={SECRET}#{SECRET}") == "https://host:8/a/b"
    assert shown("http://host/${HOOK}?code=${CODE}") == "http://host/${HOOK}"


@pytest.mark.parametrize("key", ["reward", "validation_reward"])
def test_a_recipe_with_a_secret_is_refused(key: str):
    values = {"reward": ["m:f"], key: [f"http://h/?token={SECRET}"]}
    with pytest.raises(ConfigError) as raised:
        validated(PolicyConfig, values)
    assert str(raised.value).startswith(f"--{key.replace('_', '-')}: http://h/: ") and SECRET not in str(raised.value)


def test_a_value_of_the_wrong_type_is_shown_without_its_query():
    with pytest.raises(ConfigError) as raised:
        validated(PolicyConfig, {"reward": f"http://h/?token={SECRET}"})
    assert "http://h/" in str(raised.value) and SECRET not in str(raised.value)


def test_other_configurations_refuse_it_too():
    for give in (
        lambda: EvaluateConfig.model_validate({"run": "r", "judge": f"http://h/v1?key={SECRET}"}),
        lambda: EvaluateConfig.model_validate({"run": "r", "reward": (f"http://h/v1?key={SECRET}",)}),
        lambda: CompareConfig.model_validate(
            {"policy": {"reward": ["m:f"]}, "scorers": (f"http://h/v1?key={SECRET}",)}
        ),
    ):
        with pytest.raises(ValidationError, match="may be a secret"):
            give()


@pytest.mark.parametrize(
    "address",
    [
        f"http://me:{SECRET}/b@host/x",
        f"http://me:{SECRET}#b@host/x",
        f"http://me:1#{SECRET}@host/x",
        f"http://host/x;{SECRET}",
        f"http://host/x;token={SECRET}",
        f" http://host/x?token={SECRET}",
        f"http:/host/x?token={SECRET}",
        f"wss://host/x?token={SECRET}",
        f"http:/me:{SECRET}@host/x",
    ],
)
def test_mistyped_addresses_show_no_secret(address: str):
    assert is_address(address)
    with pytest.raises(ConfigError) as raised:
        check_address(address)
    assert SECRET not in str(raised.value)


@pytest.mark.parametrize("source", ["module:function", "runs/reward", "C:/runs/reward", "/runs/a:b"])
def test_what_is_no_address(source: str):
    assert not is_address(source)
