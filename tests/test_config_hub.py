"""Settings saved beside a model, loaded from a folder or from the Hub, and pushed to it."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_hub import GATED, FakeHub, commit_of, serve
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import hf_certkv
from hf_certkv import CertKVConfig, ConfigError
from hf_certkv.hub import FILE_NAME, LARGEST_FILE

COMMIT = "c0ffee" + "0" * 34
OTHER = CertKVConfig(rtol=0.07, value_bits=8, scope="layer", hot_blocks=3, certify_sliding=True)
FEW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SHARE = st.floats(0, 1)
COUNT = st.integers(0, 2**62)
VALID: dict[str, st.SearchStrategy[Any]] = {
    "rtol": st.floats(0, 1e300) | st.integers(0, 10**300),
    "atol": st.floats(0, 1e300),
    "scope": st.sampled_from(["head", "layer"]),
    "policy": st.sampled_from(["budget", "paper", "naive"]),
    "block_size": st.sampled_from([16, 32, 64, 128]),
    "value_bits": st.sampled_from([4, 8]),
    "value_group": st.none() | st.just(0) | st.integers(2, 2**62),
    "refine": st.sampled_from(["device", "host", "off"]),
    "sink_blocks": COUNT,
    "recent_window": COUNT,
    "hot_blocks": st.none() | COUNT,
    "exact_below": COUNT,
    "certify_queries": st.integers(1, 2**62),
    "certify_sliding": st.booleans(),
    "max_rounds": st.integers(1, 2**62),
    "dense_head_share": SHARE,
    "dense_layer_share": SHARE,
    "record": st.sampled_from(["summary", "full"]),
    "audit": st.booleans(),
    "kernel": st.sampled_from(["auto", "reference", "cpu", "triton"]),
    "seed": COUNT,
    "paper_tau_cov": SHARE,
    "paper_k_min": st.integers(0, 100),
    "paper_k_max": st.integers(100, 2**62),
    "paper_v_tol": st.floats(0, 1e300),
    "paper_rank_depth": COUNT,
    "paper_canary": st.booleans(),
    "paper_explore": SHARE,
}
SCALARS = st.none() | st.booleans() | st.integers() | st.integers(10**300, 10**400) | st.floats() | st.text(max_size=20)
ANY_JSON = st.recursive(SCALARS, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3))
NAMES = st.sampled_from([*VALID, "certkv_version"]) | st.text(max_size=8)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    """A Hub of this machine, in place of the real one, with an empty cache."""
    with serve() as server:
        server.replace_the_real_one(monkeypatch, tmp_path)
        yield server


def write(folder: Path, content: bytes | str) -> Path:
    data = content if isinstance(content, bytes) else content.encode("utf-8")
    (folder / FILE_NAME).write_bytes(data)
    return folder


@FEW
@given(chosen=st.fixed_dictionaries({}, optional=VALID))
def test_any_valid_settings_come_back(chosen: dict[str, Any], tmp_path: Path) -> None:
    config = CertKVConfig(**chosen)
    assert config.save_pretrained(tmp_path) is None
    for where in (tmp_path, str(tmp_path), tmp_path / FILE_NAME):
        assert CertKVConfig.from_pretrained(where) == config
    assert CertKVConfig.from_json(tmp_path / FILE_NAME) == config
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


def test_every_setting_is_drawn() -> None:
    assert set(VALID) == {field.name for field in dataclasses.fields(CertKVConfig)}


def test_the_file_is_plain_json_with_the_version(tmp_path: Path) -> None:
    OTHER.save_pretrained(tmp_path)
    data = json.loads((tmp_path / FILE_NAME).read_text(encoding="utf-8"))
    assert data.pop("certkv_version") == hf_certkv.__version__
    assert data == dataclasses.asdict(OTHER)


def test_what_else_lies_in_the_folder_stays(tmp_path: Path) -> None:
    others = {"README.md": b"# mine\n", "config.json": b'{"model_type": "llama"}', "model.safetensors": b"\0\1"}
    for name, data in others.items():
        (tmp_path / name).write_bytes(data)
    CertKVConfig().save_pretrained(tmp_path)
    OTHER.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != FILE_NAME} == others
    assert CertKVConfig.from_pretrained(tmp_path) == OTHER


def test_settings_can_be_changed_while_loading(tmp_path: Path) -> None:
    OTHER.save_pretrained(tmp_path / "new" / "folder")
    assert CertKVConfig.from_pretrained(tmp_path / "new/folder", rtol=0.5) == OTHER.replace(rtol=0.5)
    with pytest.raises(ConfigError, match="rtoll"):
        CertKVConfig.from_pretrained(tmp_path / "new/folder", rtoll=0.5)


def test_a_save_that_fails_leaves_the_former_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    OTHER.save_pretrained(tmp_path)

    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(ConfigError, match="No space left"):
        CertKVConfig().save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]
    assert CertKVConfig.from_pretrained(tmp_path) == OTHER


@pytest.mark.parametrize("folder", [None, 3, "a\0b", "file"])
def test_a_folder_that_cannot_be_is_refused(folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("here already")
    with pytest.raises(ConfigError, match="save_directory"):
        CertKVConfig().save_pretrained(folder)


def refused(folder: Path, content: bytes | str, *words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        CertKVConfig.from_pretrained(write(folder, content))
    assert len(str(caught.value)) < 3000
    for word in (FILE_NAME, *words):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ["not a JSON file"]),
        ("[]", ["list"]),
        ("3", ["int"]),
        ("null", ["NoneType"]),
        ('"rtol"', ["str"]),
        ('{"rtol": 0.1', ["not a JSON file"]),
        ('{"rtol": 0.1} {}', ["not a JSON file"]),
        ('{"rtol": NaN}', ["NaN"]),
        ('{"rtol": Infinity}', ["Infinity"]),
        ('{"atol": -Infinity}', ["-Infinity"]),
        ('{"rtol": 1e400}', ["rtol=inf"]),
        ('{"rtol": 1' + "0" * 5000 + "}", ["not a JSON file"]),
        ('{"seed": 1' + "0" * 400 + "}", ["seed="]),
        ('{"rtol": 0.1, "rtol": 0.2}', ["given twice", "rtol"]),
        ('{"rtol": "0.1"}', ["rtol='0.1'"]),
        ('{"scope": ["head"]}', ["'scope'", "list"]),
        ('{"scope": {"a": 1}}', ["'scope'", "dict"]),
        ('{"rtol": ' + "[" * 20000 + "]" * 20000 + "}", ["not a JSON file"]),
        ('{"scope": ' + "[" * 400 + "]" * 400 + "}", ["'scope'"]),
        ('{"scope": "' + "x" * 50000 + '"}', ["scope='xxx"]),
        ('{"' + "x" * 50000 + '": 1}', ["unknown setting"]),
        (" " * (LARGEST_FILE + 1), ["more than"]),
        (b"\xff\xfe{\x00}\x00", ["not a JSON file"]),
        (b'{"scope": "\xe9"}', ["not a JSON file"]),
        (b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00}\x94\x8c\x04rtol\x94K\x01s.", ["not a JSON file"]),
        ('{"certkv_version": 3}', ["certkv_version", "int"]),
        ('{"certkv_version": ["0.1.0"]}', ["certkv_version", "list"]),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_no_settings(content: bytes | str, words: list[str], tmp_path: Path) -> None:
    refused(tmp_path, content, *words)


def test_a_byte_order_mark_is_no_error(tmp_path: Path) -> None:
    assert CertKVConfig.from_pretrained(write(tmp_path, b'\xef\xbb\xbf{"rtol": 0.25}')) == CertKVConfig(rtol=0.25)


def test_unknown_settings_of_another_version_are_refused_and_name_it(tmp_path: Path) -> None:
    data = {"certkv_version": "7.5.1", **OTHER.to_dict()}
    assert CertKVConfig.from_pretrained(write(tmp_path, json.dumps(data))) == OTHER
    words = ["frobnicate", "7.5.1", hf_certkv.__version__, "install that version"]
    refused(tmp_path, json.dumps({**data, "frobnicate": 1}), *words)
    refused(tmp_path, json.dumps({**data, "scope": "model"}), "scope='model'", "7.5.1")


def test_unknown_settings_of_this_version_do_not_blame_the_version(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="rtoll") as caught:
        CertKVConfig.from_pretrained(write(tmp_path, json.dumps({"certkv_version": hf_certkv.__version__, "rtoll": 1})))
    assert "install that version" not in str(caught.value)


def test_settings_that_an_older_version_did_not_have_are_the_defaults(tmp_path: Path) -> None:
    content = json.dumps({"certkv_version": "0.0.1", "rtol": 0.3})
    assert CertKVConfig.from_pretrained(write(tmp_path, content)) == CertKVConfig(rtol=0.3)


def loads_or_refuses(folder: Path, content: bytes | str) -> CertKVConfig | None:
    """The settings; None where they were refused. Any other exception is a failure of the test."""
    write(folder, content)
    try:
        return CertKVConfig.from_pretrained(folder)
    except ConfigError:
        return None


@FEW
@given(data=ANY_JSON | st.dictionaries(NAMES, SCALARS | ANY_JSON, max_size=4))
def test_any_json_is_read_or_refused(data: Any, tmp_path: Path) -> None:
    found = loads_or_refuses(tmp_path, json.dumps(data))
    if found is not None:
        known = {name: value for name, value in data.items() if name != "certkv_version"}
        assert found.to_dict() == {**CertKVConfig().to_dict(), **known}


@FEW
@given(data=st.binary(max_size=80))
def test_any_bytes_are_read_or_refused(data: bytes, tmp_path: Path) -> None:
    found = loads_or_refuses(tmp_path, data)
    assert found is None or isinstance(json.loads(data.decode("utf-8-sig")), dict)


def test_every_truncated_file_is_refused(tmp_path: Path) -> None:
    OTHER.save_pretrained(tmp_path)
    whole = (tmp_path / FILE_NAME).read_bytes()
    last = whole.rindex(b"}")
    assert [cut for cut in range(last + 1) if loads_or_refuses(tmp_path, whole[:cut]) is not None] == []
    assert loads_or_refuses(tmp_path, whole[: last + 1]) == OTHER


@FEW
@given(position=st.integers(0, 10**6), byte=st.integers(0, 255))
def test_a_damaged_byte_never_makes_an_invalid_config(position: int, byte: int, tmp_path: Path) -> None:
    OTHER.save_pretrained(tmp_path)
    data = bytearray((tmp_path / FILE_NAME).read_bytes())
    data[position % len(data)] = byte
    found = loads_or_refuses(tmp_path, bytes(data))
    assert found is None or CertKVConfig(**found.to_dict()) == found


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("./nowhere", ["no such folder"]),
        ("/nowhere/at/all", ["no such folder"]),
        ("~nobody-of-this-name/x", ["no such folder"]),
        ("empty", [FILE_NAME, "save_pretrained"]),
        (Path("some/model"), ["no such folder"]),
        ("", ["user/name"]),
        (None, ["user/name"]),
        (3, ["user/name"]),
        ("a/b/c", ["user/name"]),
        ("a\0b", ["user/name"]),
        ("https://huggingface.co/a/b", ["user/name"]),
    ],
)
def test_no_such_place(name: Any, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    with pytest.raises(ConfigError) as caught:
        CertKVConfig.from_pretrained(name)
    for word in words:
        assert word in str(caught.value)


def test_offline_cache_of_the_hub_is_read(tmp_path: Path) -> None:
    """The layout that huggingface_hub documents: refs name a commit, snapshots hold its files."""
    repository = tmp_path / "models--someone--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    snapshot = repository / "snapshots" / COMMIT
    OTHER.save_pretrained(snapshot)
    for revision in (None, "main", COMMIT):
        found = CertKVConfig.from_pretrained("someone/model", cache_dir=tmp_path, local_files_only=True, revision=revision)
        assert found == OTHER
    with pytest.raises(ConfigError, match="local cache") as caught:
        CertKVConfig.from_pretrained("someone/other", cache_dir=tmp_path, local_files_only=True)
    assert "go online" in str(caught.value)


def test_saving_into_a_snapshot_leaves_the_cached_blob(tmp_path: Path) -> None:
    blob = tmp_path / "blob"
    blob.write_text("{}")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / FILE_NAME).symlink_to(blob)
    OTHER.save_pretrained(tmp_path / "snapshot")
    assert blob.read_text() == "{}" and CertKVConfig.from_pretrained(tmp_path / "snapshot") == OTHER


def test_push_and_load(hub: FakeHub) -> None:
    hub.repositories["me/model"] = {"main": {"README.md": b"# mine", "config.json": b"{}"}}
    url = OTHER.push_to_hub("me/model", token="hf_x", commit_message="Settings")
    assert url == f"{hub.url}/me/model/commit/{commit_of(hub.repositories['me/model']['main'])}"
    (commit,) = hub.commits
    assert (commit["repo"], commit["revision"], commit["pr"], commit["summary"]) == ("me/model", "main", False, "Settings")
    assert set(commit["files"]) == {FILE_NAME}
    assert hub.repositories["me/model"]["main"]["README.md"] == b"# mine"
    assert hub.repositories["me/model"]["main"]["config.json"] == b"{}"
    assert CertKVConfig.from_pretrained("me/model") == OTHER
    assert "Bearer hf_x" in hub.tokens


def test_push_makes_the_repository(hub: FakeHub) -> None:
    OTHER.push_to_hub("me/new", token="hf_x", private=True)
    assert hub.private["me/new"] is True
    assert json.loads(hub.repositories["me/new"]["main"][FILE_NAME])["rtol"] == 0.07


def test_push_to_a_branch_and_as_a_pull_request(hub: FakeHub) -> None:
    hub.repositories["me/model"] = {"main": {}, "try": {}}
    OTHER.push_to_hub("me/model", token="hf_x", branch="try")
    CertKVConfig().push_to_hub("me/model", token="hf_x", create_pr=True)
    assert [(commit["revision"], commit["pr"]) for commit in hub.commits] == [("try", False), ("main", True)]
    assert CertKVConfig.from_pretrained("me/model", revision="try") == OTHER
    with pytest.raises(ConfigError, match="push_to_hub"):
        CertKVConfig.from_pretrained("me/model")


def test_save_and_push(hub: FakeHub, tmp_path: Path) -> None:
    url = OTHER.save_pretrained(tmp_path / "model", push_to_hub=True, token="hf_x")
    assert url is not None and url.startswith(f"{hub.url}/me/model")
    OTHER.save_pretrained(tmp_path / "model", push_to_hub=True, repo_id="me/elsewhere", token="hf_x", commit_message="More")
    assert [(commit["repo"], commit["summary"]) for commit in hub.commits][1] == ("me/elsewhere", "More")
    assert hub.commits[0]["files"][FILE_NAME] == (tmp_path / "model" / FILE_NAME).read_bytes()


def test_a_new_version_on_the_hub_is_fetched_and_the_old_one_kept(hub: FakeHub) -> None:
    hub.repositories["me/model"] = {"main": {FILE_NAME: b'{"rtol": 0.5}'}}
    assert CertKVConfig.from_pretrained("me/model").rtol == 0.5
    hub.repositories["me/model"]["main"][FILE_NAME] = b'{"rtol": 0.25}'
    assert CertKVConfig.from_pretrained("me/model", local_files_only=True).rtol == 0.5
    assert CertKVConfig.from_pretrained("me/model", force_download=True).rtol == 0.25


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("me/nowhere", {}, ["RepositoryNotFoundError", "Check the name"]),
        ("me/model", {}, ["RemoteEntryNotFoundError", "push_to_hub"]),
        ("me/model", {"revision": "nope"}, ["RevisionNotFoundError", "revision="]),
        (GATED, {}, ["GatedRepoError", "access"]),
        ("me/broken", {}, ["not a JSON file"]),
        ("me/model", {"force_download": True, "local_files_only": True}, ["force_download"]),
    ],
)
def test_what_the_hub_does_not_have(hub: FakeHub, name: str, options: dict[str, Any], words: list[str]) -> None:
    hub.repositories = {"me/model": {"main": {"README.md": b""}}, "me/broken": {"main": {FILE_NAME: b"\x80\x04"}}}
    with pytest.raises(ConfigError) as caught:
        CertKVConfig.from_pretrained(name, **options)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_push_without_a_token_or_without_the_hub(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    with pytest.raises(ConfigError, match=r"not pushed.*hf auth login"):
        OTHER.push_to_hub("me/model", token=False)
    with pytest.raises(ConfigError, match=r"not pushed.*user/name"):
        OTHER.push_to_hub("a/b/c", token="hf_x")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"not pushed.*HF_HUB_OFFLINE"):
        OTHER.push_to_hub("me/model", token="hf_x")
    assert hub.commits == []


def test_no_network(monkeypatch: pytest.MonkeyPatch, hub: FakeHub) -> None:
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    monkeypatch.setattr(_http.time, "sleep", lambda _: None)  # between its attempts
    nobody = "http://127.0.0.1:9"
    monkeypatch.setattr(constants, "ENDPOINT", nobody)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", nobody + "/{repo_id}/resolve/{revision}/{filename}")
    with pytest.raises(ConfigError, match=r"no settings from the Hub.*go online"):
        CertKVConfig.from_pretrained("me/model")
    with pytest.raises(ConfigError, match="not pushed"):
        OTHER.push_to_hub("me/model", token="hf_x")


def test_the_class_is_what_it_was() -> None:
    assert CertKVConfig.__mro__ == (CertKVConfig, object)
    twin = CertKVConfig(**OTHER.to_dict())
    assert twin == OTHER and hash(twin) == hash(OTHER) and CertKVConfig() != OTHER
    assert pickle.loads(pickle.dumps(OTHER)) == copy.deepcopy(OTHER) == dataclasses.replace(OTHER) == OTHER
    assert dataclasses.asdict(OTHER) == OTHER.to_dict() == vars(OTHER)
    assert repr(OTHER).startswith("CertKVConfig(rtol=0.07, atol=0.0, scope='layer',") and eval(repr(OTHER)) == OTHER
    with pytest.raises(dataclasses.FrozenInstanceError):
        OTHER.rtol = 0.1  # type: ignore[misc]
