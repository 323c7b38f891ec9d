"""The `custom_generate` folder, tried as a user of it would: copied elsewhere, loaded by path."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub.repocard import metadata_load
from packaging.requirements import Requirement
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.generation.streamers import BaseStreamer

import hf_certkv
from hf_certkv import CertifiedQuantizedCache, CertKVConfig, ConfigError, InputError
from hf_certkv.embedded import embedded_path, load_embedded

pytestmark = pytest.mark.filterwarnings("ignore:.*certifies NOTHING")

HUB = Path(__file__).resolve().parents[1] / "examples" / "hub"
PROMPT = "It was a dark evening, and the old man sat by the fire. " * 22  # some 350 tokens: some of them are quantised
PLAIN = {"kernel": "reference"}  # nothing to compile


@pytest.fixture(scope="module")
def prose() -> Any:
    model, tokenizer = load_embedded("prose", dtype=torch.float32)
    return SimpleNamespace(model=model, inputs=dict(tokenizer(PROMPT, return_tensors="pt")), tokenizer=tokenizer)


@pytest.fixture(scope="module")
def method(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The folder as a user has it; what transformers copies of it goes to a folder of this test."""
    folder = tmp_path_factory.mktemp("hub") / "certkv-generate"
    shutil.copytree(HUB / "custom_generate", folder)
    modules = str(tmp_path_factory.mktemp("modules"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", modules)
        yield str(folder)
    if modules in sys.path:
        sys.path.remove(modules)


def call(prose: Any, method: str, **options: Any) -> Any:
    options = {"max_new_tokens": 6, "do_sample": False, **PLAIN, **options}
    return prose.model.generate(**prose.inputs, custom_generate=method, trust_remote_code=True, **options)


def own(prose: Any, cache: CertifiedQuantizedCache, **options: Any) -> Any:
    return prose.model.generate(**prose.inputs, past_key_values=cache, **{"max_new_tokens": 6, "do_sample": False, **options})


@pytest.mark.parametrize(
    "mode",
    [
        {},
        {"do_sample": True, "temperature": 1.3},
        {"num_beams": 2},
        {"num_return_sequences": 2, "do_sample": True},
        {"prompt_lookup_num_tokens": 3},
        {"assistant_model": "itself"},
    ],
    ids=["greedy", "sampling", "beams", "two sequences", "prompt lookup", "assisted"],
)
def test_the_method_is_generate_with_a_certified_cache(prose: Any, method: str, mode: dict[str, Any]) -> None:
    mode = {name: prose.model if value == "itself" else value for name, value in mode.items()}
    torch.manual_seed(3)
    output = call(prose, method, rtol=0.05, value_bits=8, return_dict_in_generate=True, **mode)
    torch.manual_seed(3)
    cache = CertifiedQuantizedCache(prose.model.config, rtol=0.05, value_bits=8, kernel="reference")
    expected = own(prose, cache, **mode)
    assert torch.equal(output.sequences, expected)
    assert isinstance(output.past_key_values, CertifiedQuantizedCache)
    mine, other = (one.report().to_dict()["overall"] for one in (output.past_key_values, cache))
    assert mine["head_steps"] == other["head_steps"] > 0
    assert mine["relative"]["bound"]["max"] == other["relative"]["bound"]["max"] <= 0.05


def test_without_a_dictionary_it_returns_token_ids(prose: Any, method: str) -> None:
    dense = prose.model.generate(**prose.inputs, max_new_tokens=6, do_sample=False)
    assert torch.equal(call(prose, method, rtol=0, atol=0), dense)


def test_settings_come_from_a_config_a_dictionary_or_a_folder(prose: Any, method: str, tmp_path: Path) -> None:
    settings = CertKVConfig(rtol=0.07, block_size=32, kernel="reference")
    settings.save_pretrained(tmp_path)
    for given in (settings, settings.to_dict(), tmp_path, str(tmp_path)):
        options = {"certkv_config": given, "scope": "layer", "max_new_tokens": 1, "return_dict_in_generate": True}
        output = prose.model.generate(**prose.inputs, custom_generate=method, trust_remote_code=True, **options)
        assert output.past_key_values.settings == settings.replace(scope="layer")


def test_a_certified_cache_goes_on(prose: Any, method: str) -> None:
    first = call(prose, method, rtol=0.05, return_dict_in_generate=True)
    cache = first.past_key_values
    options = {"max_new_tokens": 6, "do_sample": False}
    more = prose.model.generate(
        first.sequences, past_key_values=cache, custom_generate=method, trust_remote_code=True, **options
    )
    assert torch.equal(more, call(prose, method, rtol=0.05, max_new_tokens=12))
    assert cache.get_seq_length() == more.shape[1] - 1


def test_tokens_are_streamed(prose: Any, method: str) -> None:
    class Collect(BaseStreamer):
        def __init__(self) -> None:
            self.ids: list[int] = []

        def put(self, value: Any) -> None:
            self.ids += value.flatten().tolist()

        def end(self) -> None:
            self.ids.append(-1)

    streamer = Collect()
    written = call(prose, method, streamer=streamer)[0].tolist()
    assert streamer.ids == [*written, -1]


def test_the_report_is_printed(prose: Any, method: str, capsys: pytest.CaptureFixture[str]) -> None:
    call(prose, method, rtol=0.05, print_report=True)
    assert "certificate: rtol=0.05" in capsys.readouterr().out
    short = {name: value[:, :20] for name, value in prose.inputs.items()}
    prose.model.generate(**short, custom_generate=method, trust_remote_code=True, max_new_tokens=2, print_report=True)
    assert "Nothing was quantised" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"rtol": -1.0}, ConfigError, ["rtol=-1.0", "at least"]),
        ({"rtoll": 0.1}, ValueError, ["rtoll", "not used by the model"]),
        ({"use_cache": False}, ConfigError, ["use_cache=False"]),
        ({"past_key_values": DynamicCache()}, InputError, ["DynamicCache", "CertifiedQuantizedCache"]),
        ({"certkv_config": {"rtol": "much"}}, ConfigError, ["rtol='much'"]),
        ({"certkv_config": 5}, ConfigError, ["settings=5"]),
        ({"cache_implementation": "static"}, ValueError, ["cache_implementation", "past_key_values"]),
    ],
)
def test_bad_arguments(prose: Any, method: str, options: dict[str, Any], error: type[Exception], words: list[str]) -> None:
    with pytest.raises(error) as raised:
        call(prose, method, **options)
    assert all([word in str(raised.value) for word in words]), raised.value


def test_settings_beside_a_cache_are_refused(prose: Any, method: str) -> None:
    cache = CertifiedQuantizedCache(prose.model.config)
    with pytest.raises(ConfigError, match=r"kernel, rtol and past_key_values were both given"):
        call(prose, method, past_key_values=cache, rtol=0.1)
    with pytest.raises(ConfigError, match=r"certkv_config and past_key_values"):
        prose.model.generate(
            **prose.inputs, custom_generate=method, trust_remote_code=True, past_key_values=cache, certkv_config={}
        )
    assert cache.get_seq_length() == 0


def test_where_the_method_comes_from_is_no_argument_of_generate(prose: Any, method: str) -> None:
    assert torch.equal(call(prose, method, revision="main", local_files_only=True), call(prose, method))


def test_it_runs_only_for_who_trusts_it(prose: Any, method: str) -> None:
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        prose.model.generate(**prose.inputs, custom_generate=method, trust_remote_code=False)


def test_a_missing_or_old_package_is_named(prose: Any, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    known = importlib.metadata.version
    with monkeypatch.context() as patch:
        patch.setattr(importlib.metadata, "version", lambda name: "0.0.1" if name == "hf_certkv" else known(name))
        with pytest.raises(ImportError, match=r"hf_certkv>=\S+ \(installed: 0\.0\.1\)"):
            call(prose, method)

    def refuse(name: str, *_: Any) -> None:
        if name == "hf_certkv":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    with monkeypatch.context() as patch:
        for name in [name for name in sys.modules if name.split(".")[0] == "hf_certkv"]:
            patch.delitem(sys.modules, name)
        patch.setattr(sys, "meta_path", [SimpleNamespace(find_spec=refuse), *sys.meta_path])
        with pytest.raises(ImportError, match=r"not found in your environment: .*hf_certkv"):
            call(prose, method)


def test_the_requirements_are_those_of_the_package(method: str) -> None:
    asked = dict(line.split(">=") for line in (Path(method) / "custom_generate/requirements.txt").read_text().split())
    assert asked.pop("hf_certkv") == hf_certkv.__version__
    ours = [Requirement(line) for line in importlib.metadata.requires("hf_certkv") or []]
    least = {one.name: part.version for one in ours for part in one.specifier if part.operator == ">="}
    assert asked == {name: least[name] for name in ("transformers", "torch")}


def test_a_model_that_brings_the_method_is_certified(prose: Any, method: str, tmp_path: Path) -> None:
    folder = tmp_path / "with-model"
    shutil.copytree(method, folder)
    shutil.copytree(embedded_path("prose"), folder, dirs_exist_ok=True)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "rtol": 0.05, **PLAIN}
    by_position = model.generate(prose.inputs["input_ids"], return_dict_in_generate=True, **options)
    assert by_position.past_key_values.settings.rtol == 0.05
    assert torch.equal(by_position.sequences, call(prose, method, **options))


def test_called_by_hand(prose: Any, method: str) -> None:
    generate = prose.model.load_custom_generate(method, trust_remote_code=True)
    options: dict[str, Any] = {"max_new_tokens": 2, "do_sample": False, **PLAIN}
    ids = prose.inputs["input_ids"]
    assert torch.equal(generate(prose.model, ids, **options), generate(model=prose.model, input_ids=ids, **options))
    with pytest.raises(InputError, match="expected a model of transformers"):
        generate(ids, **options)


def test_the_hub_finds_the_method() -> None:
    card: Any = metadata_load(HUB / "custom_generate" / "README.md")
    assert card["library_name"] == "transformers" and "custom_generate" in card["tags"] and card["license"] == "apache-2.0"
