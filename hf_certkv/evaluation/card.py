"""Model cards of the Hub: measured runs as `model-index` results, and a section of text that says what they mean."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..errors import InputError
from .card_command import changed, model_label
from .card_escape import one_line
from .card_text import TITLES, chosen, section
from .page_data import CacheView, caches_of
from .runs import load_run
from .summary import summary

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

BEGIN, END = "<!-- certkv -->", "<!-- /certkv -->"
LONGEST_CARD = 2**24  # bytes
LONGEST_NAME = 160  # characters of a name in the metadata
IDENTITY = ("name", "type", "parameters", "revision")  # of a model: what runs of one card have in common
SAME = (
    "task_type", "dataset_type", "dataset_name", "dataset_config", "dataset_split", "dataset_revision", "metric_type",
    "metric_config",
)  # fmt: skip  # results that agree in these replace each other


def make_card(paths: list[Path], base: Path | None = None, caches: list[str] | None = None) -> str:
    """The text of a model card.

    Args: paths: run files of one model; base: a card whose metadata and text stay, and to which the results are added;
        caches: names of the certified caches to write about, None for all.

    Raises: InputError: a file is no complete run, or they are of different models; the base is no card.
    """
    if not paths:
        raise InputError("no run file is given: `certkv eval ... --json RUN.json` writes one.")
    runs = [usable(path) for path in paths]
    one_model(paths, runs)
    names = certified_names(runs, caches)
    new = [result for run in runs for result in results(run, names)]
    _unlike(new)
    card = load_card(base) if base is not None else new_card(runs[0])
    data = cast("ModelCardData", card.data)
    data.eval_results = merged(data.eval_results or [], new)
    data.model_name = data.model_name or one_line(model_label(runs[0]), LONGEST_NAME)
    card.text = with_section(card.text, section(runs, names))
    text = str(card)
    _read_back(text, card.text, data.eval_results)
    return text


def usable(path: Path) -> dict[str, Any]:
    """A run from which a card can be made."""
    run = load_run(path)
    if run["kind"] != "eval":
        raise InputError(f"{path}: kind is {run['kind']!r}, which has no scores; a card is made of `certkv eval` runs.")
    if not run["complete"]:
        raise InputError(f"{path}: the run is not complete; run the same `certkv eval` command again, which goes on from it.")
    if not run["items"] or run["caches"][0]["settings"] is not None or run["caches"][0]["name"] not in run["summary"]:
        raise InputError(f"{path}: has no items, or its first cache is not the dense one, to which all are compared.")
    for cache in run["caches"]:
        part = run["summary"].get(cache["name"], {}).get("overall")
        if part is None or part["score"] is None:
            raise InputError(f"{path}: the cache {cache['name']!r} has no score; a card says only what was measured.")
        if cache["settings"] is not None and cache["name"] not in run["certificates"]:
            raise InputError(f"{path}: the cache {cache['name']!r} has no certificates; a card says only what was measured.")
        if any(item["scores"].get(cache["name"], {}).get("score") is None for item in run["items"]):
            raise InputError(
                f"{path}: an item has no score of the cache {cache['name']!r}; a card says only what was measured."
            )
        task = run["task"]
        found = summary(cache["name"], run["items"], task["name"], task["metric"]["right_or_wrong"], run.get("seed") or 0)
        where = _differs(run["summary"][cache["name"]], found)
        if where is not None:
            raise InputError(
                f"{path}: the summary of {cache['name']!r} is not that of the items ({where}): the file was changed after it "
                "was written."
            )
    return run


def _differs(shown: Any, found: Any, where: str = "") -> str | None:
    """Where a summary is not what was found; None where it is. Ends of intervals are not compared: versions of scipy differ."""
    if isinstance(found, dict):
        if not isinstance(shown, dict):
            return where
        keys = [key for key in found if key not in ("low", "high")]
        places = (_differs(shown.get(key), found[key], f"{where}.{key}".lstrip(".")) for key in keys)
        return next((place for place in places if place is not None), None)
    if isinstance(found, float) and isinstance(shown, (int, float)):
        return None if math.isclose(found, shown, rel_tol=1e-6, abs_tol=1e-9) else where
    return None if shown == found else where


def one_model(paths: list[Path], runs: list[dict[str, Any]]) -> None:
    """Refuse runs of different models."""
    for path, run in zip(paths[1:], runs[1:], strict=True):
        for key in IDENTITY:
            first, other = runs[0]["model"].get(key), run["model"].get(key)
            if first != other:
                raise InputError(
                    f"{path}: the model's {key} is {other!r}, but {first!r} in {paths[0]}; make one card for each model."
                )


def certified_names(runs: list[dict[str, Any]], asked: list[str] | None) -> list[str]:
    """The certified caches to write about, those of all runs."""
    known = list(dict.fromkeys(cache.name for run in runs for cache in caches_of(run) if cache.certified))
    if not known:
        raise InputError("none of the runs has a certified cache; a card is about what was certified.")
    for name in asked or []:
        if name not in known:
            raise InputError(
                f"--cache {name!r}: no certified cache of the runs is called so; there are {', '.join(map(repr, known))}."
            )
    return list(dict.fromkeys(asked or known))


def results(run: dict[str, Any], names: list[str]) -> list[EvalResult]:
    """What each cache scored, by context and by task, with all digits."""
    return [
        _result(run, cache, kind, name, part)
        for cache in chosen(run, names)
        for kind, parts in (("context", cache.by_context), ("task", cache.by_task))
        for name, part in (parts or {"all": cache.summary}).items()
        if part["score"] is not None and (parts or kind == "context")
    ]


def _result(run: dict[str, Any], cache: CacheView, kind: str, name: str, part: dict[str, Any]) -> EvalResult:
    from huggingface_hub import EvalResult

    task, metric = run["task"]["name"], run["task"]["metric"]
    perplexity = part.get("perplexity") is not None
    change = part.get("perplexity_difference" if perplexity else "difference")
    label = "perplexity" if perplexity else metric["label"]
    arguments: dict[str, Any] = {"cache": _name(cache.name), "items": part["items"]}
    if change is not None:
        ends = {key: change.get(key) for key in ("low", "high") if change.get(key) is not None}
        arguments["difference_from_dense"] = {"mean": change["mean"], **ends}
    if cache.settings is not None:
        arguments["settings"] = {
            _name(key): _name(value) if isinstance(value, str) else value
            for key, value in {"rtol": cache.rtol, **changed(cache.settings)}.items()
            if value is None or isinstance(value, (str, int, float, bool))
        }
    return EvalResult(
        task_type="text-generation",
        task_name=TITLES.get(task, _name(task)),
        **_dataset(run, kind, name),
        metric_type="perplexity" if perplexity else _name(metric["name"]),
        metric_name=f"{_name(label)}, KV cache {_name(cache.name)}",
        metric_value=part["perplexity"] if perplexity else part["score"],
        metric_config=f"{_name(cache.name)}, {_name(str(run['model'].get('dtype')))}",
        metric_args=arguments,
    )


def _dataset(run: dict[str, Any], kind: str, name: str) -> dict[str, Any]:
    """The fields of a result that say what was read."""
    task, settings = run["task"]["name"], run["task"].get("settings") or {}
    config = [f"{kind} {_name(name)}"]
    config += [f"{label} {settings[key]}" for key, label in _DISTINCT.items() if isinstance(settings.get(key), (int, float))]
    if task == "ppl" and "score_last" in settings and settings["score_last"] is None:
        config.append("all scored")
    if isinstance(settings.get("dataset"), str):
        found = {
            "dataset_type": settings["dataset"],
            "dataset_name": settings["dataset"],
            "dataset_split": settings.get("split"),
        }
    elif isinstance(settings.get("text"), str):
        config.insert(0, _name(settings["text"]))
        found = {"dataset_type": "text", "dataset_name": settings["text"]}
    else:
        found = {"dataset_type": task, "dataset_name": TITLES.get(task, task)}
    if isinstance(settings.get("text_sha256"), str):
        found["dataset_args"] = {"text_sha256": _name(settings["text_sha256"])}
    short = {key: _name(value) if isinstance(value, str) else value for key, value in found.items()}
    return {**short, "dataset_config": ", ".join(config)}


_DISTINCT = {
    "score_last": "last scored", "new_tokens": "new tokens", "depths": "depths", "needles": "needles", "margin": "margin",
}  # fmt: skip  # settings without which two results would look the same


def _name(text: str) -> str:
    return one_line(text, LONGEST_NAME)


def _key(result: EvalResult) -> tuple[Any, ...]:
    return tuple(repr(getattr(result, name)) for name in SAME)


def _unlike(found: list[EvalResult]) -> None:
    """Refuse two figures for one thing: which of them is right?"""
    seen = set()
    for result in found:
        if _key(result) in seen:
            raise InputError(
                f"two runs (or caches) have a result for {result.dataset_name!r}, {result.dataset_config!r}, "
                f"{result.metric_type!r}, {result.metric_config!r}: give the run that counts."
            )
        seen.add(_key(result))


def merged(old: list[EvalResult], new: list[EvalResult]) -> list[EvalResult]:
    """The old results in their order, replaced where there is a new one for the same thing; the other new ones after them."""
    fresh = {_key(result): result for result in new}
    kept = [fresh.pop(_key(result), result) for result in old]
    return kept + list(fresh.values())


def load_card(path: Path) -> ModelCard:
    """A card that lies on this machine.

    Raises: InputError: there is none, it is not text, or its metadata cannot be read.
    """
    import yaml  # type: ignore[import-untyped]
    from huggingface_hub import ModelCard

    path = path.expanduser()
    if not path.is_file():
        raise InputError(f"--base {path}: there is no such file; leave --base out to make a new card.")
    if path.stat().st_size > LONGEST_CARD:
        raise InputError(f"--base {path}: more than {LONGEST_CARD:,} bytes; expected a model card.")
    try:
        card = ModelCard.load(path)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, yaml.YAMLError) as error:
        message = " ".join(str(error).split())[:300]
        raise InputError(
            f"--base {path}: no model card that huggingface_hub can read ({type(error).__name__}: {message})."
        ) from error
    names = {repr(part["name"]) for part in _index(path)}
    if len(names) > 1:
        raise InputError(
            f"--base {path}: its model-index names several models ({len(names)}), of which one could be kept; split it."
        )
    return card


def _index(path: Path) -> list[dict[str, Any]]:
    """The `model-index` as it is in the file: huggingface_hub keeps one name of several."""
    from huggingface_hub import metadata_load

    return (metadata_load(path) or {}).get("model-index") or []


def new_card(run: dict[str, Any]) -> ModelCard:
    """A card for a model that has none: it says what was measured, and nothing else."""
    from huggingface_hub import ModelCard, ModelCardData

    from .card_escape import escaped

    data = ModelCardData(library_name="transformers", pipeline_tag="text-generation", tags=["kv-cache"])
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n# {escaped(model_label(run))}\n")


def with_section(text: str, new: str) -> str:
    """The text with the section between the markers: where it was, or at the end.

    Raises: InputError: the markers are not one pair.
    """
    newline = "\r\n" if "\r\n" in text else "\n"
    block = f"{BEGIN}\n\n{new.strip()}\n\n{END}".replace("\n", newline)
    counts = text.count(BEGIN), text.count(END)
    if counts == (0, 0):
        return text.rstrip() + newline * 2 + block + newline
    begin, end = text.find(BEGIN), text.find(END)
    if counts != (1, 1) or end < begin:
        raise InputError(
            f"the card has {counts[0]} {BEGIN} and {counts[1]} {END}; expected one of each, in this order, or none."
        )
    return text[:begin] + block + text[end + len(END) :]


def _read_back(text: str, body: str, results: list[EvalResult]) -> None:
    """Whoever reads the card finds these very results and this text."""
    from huggingface_hub import ModelCard

    found = ModelCard(text)
    read = cast("ModelCardData", found.data).eval_results or []
    if sorted(map(repr, read)) != sorted(map(repr, results)) or found.text != body:
        raise InputError("the card does not read back as it was written: its metadata holds what huggingface_hub changes.")
