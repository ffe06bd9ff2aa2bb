"""Uploads to the Hub. What is published arrives whole, in one commit; every failure is one line."""

import warnings
from collections.abc import Mapping
from pathlib import Path

from ibmd_cli import __version__
from ibmd_cli.errors import IbmdError, NotAvailable, UsageError
from ibmd_cli.hub import MB, is_lost, manners, parse_hf, persist
from ibmd_cli.reporting import Reporter, is_plain


def repository(name: str) -> str:
    """Return OWNER/REPO of a name, which may begin with `hf://`.

    Raises:
        UsageError: it is of another form.
    """
    try:
        repo, revision, file = parse_hf(f"hf://{name.removeprefix('hf://')}")
    except UsageError:
        repo, revision, file = "", None, None
    if not repo or revision or file:
        raise UsageError(f"--push-to {name!r}: expected OWNER/REPO, of letters, digits, '-', '_' and '.'")
    return repo


def push(files: Mapping[str, Path | bytes], repo: str, *, public: bool = False, quiet: bool = False) -> str:
    """Publish files on the Hub in one commit: all of them or none. A repository that is not there yet is made.

    The same call again changes nothing if all arrived, so it may be repeated whatever happened.

    Args:
        files: path in the repository → a file, or its content.
        repo: OWNER/REPO.
        public: make a new repository public. Otherwise it is private, and one that is public already is refused.
        quiet: show no progress.

    Returns:
        The address of the repository.

    Raises:
        UsageError: `repo` is not OWNER/REPO; or it is public, and `public` is not set.
        NotAvailable: not logged in, not allowed to write there, no network, or `HF_HUB_OFFLINE` is set.
        IbmdError: the Hub refuses the card.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token

    repo, reporter, api = repository(repo), Reporter(quiet), HfApi()
    if constants.HF_HUB_OFFLINE:
        raise NotAvailable(f"hf://{repo}: HF_HUB_OFFLINE is set: unset it to push")
    if get_token() is None:
        raise NotAvailable(f"hf://{repo}: not logged in: hf auth login, or set HF_TOKEN to a token that may write")

    def upload() -> str:
        url = str(api.create_repo(repo, private=not public, exist_ok=True))
        is_private = api.model_info(repo).private
        if not is_private and not public:
            raise UsageError(f"hf://{repo}: is there, and public: add --public to push where all can read")
        if is_private and public:
            reporter.warn(f"hf://{repo}: is there, and stays private: make it public at {url}/settings")
        # Not `upload_folder`, which may make several commits.
        added = [CommitOperationAdd(path, content) for path, content in files.items()]
        api.create_commit(repo, added, commit_message=f"Upload by ibmd {__version__}")
        return url

    size = sum(len(content) if isinstance(content, bytes) else content.stat().st_size for content in files.values())
    reporter.note(f"pushing {len(files)} files, {size / MB:.1f} MB, to {constants.ENDPOINT}/{repo}")
    with manners(quiet, not quiet and not is_plain()), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        url = persist(upload, lambda error: _explain_push(error, repo))
    for warning in caught:
        if "metadata" in (told := " ".join(str(warning.message).split())):  # what the Hub has to say of the card
            reporter.warn(f"hf://{repo}: {told}")
    return url


def _explain_push(error: Exception, repo: str) -> IbmdError:
    """Return the error to show for one of huggingface_hub's while it uploads."""
    from huggingface_hub import constants

    if type(error) is RuntimeError and isinstance(error.__cause__, Exception):  # of the upload of a large file
        error = error.__cause__
    name, page = f"hf://{repo}", constants.ENDPOINT
    lines = str(getattr(error, "server_message", None) or error).split("\n")
    said = next((line for line in lines if line.strip()), type(error).__name__)
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return NotAvailable(f"{name}: {page} does not accept this login ({said}): log in again: hf auth login")
    if status in (403, 404):
        return NotAvailable(
            f"{name}: this login may not write there ({said}): name a repository of your own, or use a token that may "
            f"write: {page}/settings/tokens"
        )
    if is_lost(error):
        return NotAvailable(
            f"{name}: the connection to {page} broke, or there was none ({type(error).__name__}: {said}): "
            "run the same command again"
        )
    if isinstance(error, ValueError):
        return IbmdError(f"{name}: the Hub refuses it: {' '.join(str(error).split())}")
    return NotAvailable(f"{name}: cannot be pushed ({type(error).__name__}: {said}): run the same command again")
