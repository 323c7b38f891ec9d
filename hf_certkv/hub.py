"""The file of settings that lies beside a model: read, written, fetched from the Hub, pushed to it.

One JSON file, `certkv_config.json`: every setting of `CertKVConfig` and `certkv_version`, the version that wrote it. Nothing
else in a folder or a repository is read or touched.

`CertKVConfig` has the three methods of huggingface_hub's `ModelHubMixin`, but is no subclass of it. The mixin assigns
attributes in `__new__`, which a frozen dataclass forbids; it reads the signature of `__init__` before `@dataclass` has written
it; it deletes the `config.json` of the folder that it saves to, and puts a README.md beside it. So what the mixin is made of is
called directly: `hf_hub_download` and `HfApi`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NoReturn

from .errors import ConfigError
from .files import write_whole

FILE_NAME = "certkv_config.json"
VERSION_KEY = "certkv_version"
LARGEST_FILE = 64 * 1024  # bytes; what is written has about one kilobyte
LONGEST_MESSAGE = 400  # characters of a message or a value that are shown
_ADVICE = {  # by the name of huggingface_hub's error, or of a class that it derives from; the first that fits
    "GatedRepoError": "Ask for access on the repository's page, and give token=... or run `hf auth login`.",
    "RepositoryNotFoundError": "Check the name; for a private repository give token=... or run `hf auth login`.",
    "RevisionNotFoundError": "Check revision=...: expected a branch, a tag or a commit of the repository.",
    "LocalEntryNotFoundError": "It is not in the local cache either: go online once (and leave local_files_only and "
    "HF_HUB_OFFLINE out), or give a folder.",
    "EntryNotFoundError": f"The repository has no {FILE_NAME}: `CertKVConfig.push_to_hub` puts it there.",
    "HFValidationError": "Expected a folder, a file, or a name on the Hub such as 'user/name'.",
    "OfflineModeIsEnabled": "Unset HF_HUB_OFFLINE, or use a folder: `save_pretrained`.",
    "LocalTokenNotFoundError": "Give token=... or run `hf auth login`.",
    "HfHubHTTPError": "Check the name and that the token may do this (`hf auth login`), or try again later.",
}
_ANYWAY = "Check the name and the network, or use a folder."


def as_text(settings: dict[str, Any]) -> str:
    """The file that holds these settings."""
    from . import __version__

    return json.dumps({VERSION_KEY: __version__, **settings}, indent=2) + "\n"


def read(path: Path) -> tuple[dict[str, Any], str | None]:
    """The settings in a JSON file, not yet validated, and the version that wrote them, where the file says so.

    Raises:
        ConfigError: the file cannot be read, is no JSON object, or holds what no setting can be.
    """
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST_FILE + 1)
        if len(data) > LARGEST_FILE:
            raise ConfigError(f"{path}: more than {LARGEST_FILE:,} bytes: this is no file of settings.")
        settings = json.loads(data.decode("utf-8-sig"), object_pairs_hook=_unique, parse_constant=_no_number)
    except ConfigError as error:
        raise ConfigError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from error
    except (ValueError, RecursionError, OSError) as error:
        raise ConfigError(f"{path}: not a JSON file of settings ({str(error)[:LONGEST_MESSAGE]}).") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"{path}: expected a JSON object of settings by name, got {type(settings).__name__}.")
    version = settings.pop(VERSION_KEY, None)
    if version is not None and not isinstance(version, str):
        raise ConfigError(f"{path}: {VERSION_KEY} is {type(version).__name__}: expected the version as a string.")
    for name, value in settings.items():
        if isinstance(value, (list, dict)):
            kind = type(value).__name__
            raise ConfigError(
                f"{path}: {name[:LONGEST_MESSAGE]!r} is a {kind}: expected a number, a string, true, false or null."
            )
    return settings, version


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object in which no name occurs twice: the reader of another program might take the other one."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name[:LONGEST_MESSAGE] for name in names if names.count(name) > 1})
        raise ConfigError(f"setting(s) given twice: {', '.join(twice)[:LONGEST_MESSAGE]}.")
    return found


def _no_number(literal: str) -> NoReturn:
    raise ConfigError(f"{literal} is not JSON, and no setting: expected a finite number.")


def refused(path: Path, version: str | None, error: ConfigError) -> ConfigError:
    """What to raise where the settings of a file are not valid here; says so if another version wrote them."""
    from . import __version__

    message = f"{path}: {str(error)[: 2 * LONGEST_MESSAGE]}"
    if version is not None and version != __version__:
        message += (
            f" The file was written by hf_certkv {version[:40]} and this is {__version__}, which accepts only settings "
            "that it knows: install that version, or save the settings again with this one."
        )
    return ConfigError(message)


def write(folder: str | Path, text: str) -> Path:
    """Write the file into a folder, whole or not at all; the folder is made where there is none. Returns the folder."""
    try:
        folder = Path(os.path.expanduser(folder))
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / FILE_NAME, text)
    except (OSError, TypeError, ValueError) as error:
        raise ConfigError(
            f"save_directory={str(folder)[:LONGEST_MESSAGE]!r}: {FILE_NAME} cannot be written there "
            f"({getattr(error, 'strerror', None) or error}): expected a folder that can be written to."
        ) from error
    return folder


def find(name: str | Path, **download: Any) -> Path:
    """The file of settings: `name` is the file itself, a folder that holds it, or a model's name on the Hub.

    What lies on this machine goes first; a `Path` is never looked up on the Hub. `download`: options of `hf_hub_download`.

    Raises:
        ConfigError: there is no such file; the message says what to do.
    """
    if not isinstance(name, (str, os.PathLike)) or not os.fspath(name):
        raise ConfigError(
            f"{str(name)[:LONGEST_MESSAGE]!r}: expected a folder, a file, or a name on the Hub such as 'user/name'."
        )
    text = os.fspath(name)
    path = Path(os.path.expanduser(text))
    if os.path.isdir(path):
        if not os.path.isfile(path / FILE_NAME):
            raise ConfigError(f"{path}: the folder has no {FILE_NAME}: `CertKVConfig.save_pretrained` writes it.")
        return path / FILE_NAME
    if os.path.isfile(path):
        return path
    if isinstance(name, os.PathLike) or text.startswith((".", "/", "~")) or path.is_absolute():
        raise ConfigError(f"{text[:LONGEST_MESSAGE]!r}: there is no such folder or file.")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo_id=text, filename=FILE_NAME, **download))
    except Exception as error:  # which classes a lost network raises depends on the version of huggingface_hub
        raise _failed(f"{text[:LONGEST_MESSAGE]!r}: no settings from the Hub", error) from error


def push(
    text: str,
    repo_id: str,
    *,
    commit_message: str,
    private: bool | None,
    token: str | bool | None,
    branch: str | None,
    create_pr: bool | None,
) -> str:
    """Put the file, and nothing else, into a repository on the Hub in one commit; the repository is made where there is none.

    Returns:
        The address of the commit.

    Raises:
        ConfigError: the Hub refused or was not reached; the message says what to do.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id=repo_id, private=private, exist_ok=True).repo_id
        return api.upload_file(
            path_or_fileobj=text.encode("utf-8"),
            path_in_repo=FILE_NAME,
            repo_id=repo_id,
            repo_type="model",
            commit_message=commit_message,
            revision=branch,
            create_pr=create_pr,
        )
    except Exception as error:  # which classes a lost network raises depends on the version of huggingface_hub
        raise _failed(f"{str(repo_id)[:LONGEST_MESSAGE]!r}: not pushed to the Hub", error) from error


def _failed(what: str, error: Exception) -> ConfigError:
    """One line about a failure of the Hub's client, with advice."""
    names = {kind.__name__ for kind in type(error).__mro__}
    advice = next((text for name, text in _ADVICE.items() if name in names), _ANYWAY)
    said = " ".join(str(error).split())[:LONGEST_MESSAGE].rstrip(".")
    return ConfigError(f"{what} ({type(error).__name__}: {said}). {advice}")
