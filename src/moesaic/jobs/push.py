"""A finished model onto the hub, as `huggingface_hub` sends it: large files in parts, known ones not again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moesaic.checkpoint.converted import as_written
from moesaic.checkpoint.reader import Checkpoint
from moesaic.errors import InputError, ResourceError
from moesaic.progress import Progress, Silent
from moesaic.staging.manifest import check_manifest

_LOGIN = "make a token that may write, then: hf auth login"


def check_push(repository: str) -> None:
    """Refuse early what :func:`push` would refuse: a name, a missing or wrong token, a hub out of reach.

    Raises:
        InputError: and which of them it is.
        ResourceError: the hub does not answer.
    """
    from huggingface_hub import HfApi

    _check_name(repository)
    with _errors(repository):
        HfApi().whoami()


def _check_name(repository: str) -> None:
    """Refuse what is no name; also one without an owner where no token says whose it is. Raises InputError."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    name = repository.partition("@")[0]
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise InputError(f"{repository!r} is no name of a repository on the hub", "give OWNER/NAME") from error
    if "/" not in name and get_token() is None:
        raise InputError(f"{repository!r} names no owner, and there is no token to take one from", "give OWNER/NAME")


def push(folder: str | Path, repository: str, *, progress: Progress | None = None) -> str:
    """Send a converted model, or a GGUF of it, to the hub; the address of its page.

    The repository is made where there is none. Files of the same name are replaced in one commit, others stay. The
    token is the one of ``hf auth login``, or ``HF_TOKEN``.

    Args:
        folder: A folder with config.json and safetensors, or a ``.gguf`` file.
        repository: ``owner/name``; without an owner it is the token's. ``owner/name@branch`` is a branch of it, made
            where there is none.
        progress: Receives the phase.

    Raises:
        InputError: no such model, no token, no right to write there.
        VerificationError: files of the folder are not those that were written.
        ResourceError: the hub does not answer. What it has already is not sent again.
    """
    path, progress = Path(folder).expanduser(), progress or Silent()
    _check_name(repository)  # before gigabytes are compared with the manifest
    files = _files(path)
    check_push(repository)
    name, _, branch = repository.partition("@")
    from huggingface_hub import CommitOperationAdd, HfApi

    hub = HfApi(library_name="moesaic")
    size = sum(file.stat().st_size for file in files.values())
    progress.start(f"sending {len(files)} files, {size / 1e6:,.0f} MB", 1)
    parts = [CommitOperationAdd(name, file) for name, file in files.items()]
    with _errors(repository):
        made = hub.create_repo(name, exist_ok=True)
        if branch:
            hub.create_branch(made.repo_id, branch=branch, exist_ok=True)
        done = hub.create_commit(made.repo_id, parts, commit_message=_message(path), revision=branch or None)
    progress.advance()
    return f"{done.repo_url}/tree/{branch}" if branch else str(done.repo_url)


def _files(path: Path) -> dict[str, Path]:
    """What is sent, by its name there. Raises InputError."""
    if path.is_file() and path.suffix == ".gguf":
        return {path.name: path}
    checkpoint = Checkpoint(path)
    if as_written(checkpoint.folder):
        check_manifest(checkpoint.folder)
    found = (file for file in sorted(checkpoint.folder.rglob("*")) if file.is_file())
    names = {file.relative_to(checkpoint.folder).as_posix(): file for file in found}
    return {name: file for name, file in names.items() if not any(part[0] == "." for part in name.split("/"))}


def _message(path: Path) -> str:
    return f"{path.name}, written by moesaic"


@contextmanager
def _errors(repository: str) -> Iterator[None]:
    """The hub's errors as ours."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    answers: dict[int, Callable[[str], InputError]] = {
        401: lambda why: InputError(f"the hub does not know the token: {why}", _LOGIN),
        403: lambda why: InputError(f"the token may not write to {repository}: {why}", _LOGIN),
    }
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise InputError("there is no token of the hub on this machine", _LOGIN) from error
    except OfflineModeIsEnabled as error:
        raise InputError("the hub is switched off by HF_HUB_OFFLINE", "unset it") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        if known := answers.get(status):
            raise known(_why(error)) from error
        raise ResourceError(f"the hub refused {repository}: {_why(error)}", "run the same command again") from error
    except OSError as error:
        raise ResourceError(f"the hub cannot be reached: {_why(error)}", "run the same command again") from error
    except Exception as error:  # whatever the network stack raises
        if not type(error).__module__.startswith(("httpx", "httpcore", "huggingface_hub")):
            raise
        raise ResourceError(f"the hub cannot be reached: {_why(error)}", "run the same command again") from error


def _why(error: Any) -> str:
    said = getattr(error, "server_message", None) or str(error) or type(error).__name__
    return str(said).splitlines()[0]
