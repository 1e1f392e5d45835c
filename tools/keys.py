"""``callboard keys``: make the keys of a fleet, and tell them from another's. Nothing here shows a secret."""

import argparse
import os
import secrets
import tempfile
from pathlib import Path

from callboard.bus.keys import KEY_FILE, SECRET_BYTES, KeysError, fingerprint, format_secret, read_secret
from callboard.bus.private import make_private

from .errors import CliError


def run_new(arguments: argparse.Namespace) -> int:
    """Make a directory with a new key file. Raises CliError rather than overwrite one."""
    folder = Path(arguments.folder).expanduser()
    path = folder / KEY_FILE
    secret = secrets.token_bytes(SECRET_BYTES)
    try:
        make_private(folder)
        if arguments.force:
            _replace(path, format_secret(secret))
        else:
            _create(path, format_secret(secret))
        _keep_out_of_git(folder)
    except (FileExistsError, NotADirectoryError) as error:
        if not folder.is_dir():
            raise CliError(f"{error.filename or folder} is no directory: name one, which need not exist yet") from None
        raise CliError(
            f"{path} exists already: name another directory, or pass --force (whoever holds the old key is then shut "
            "out, from the fleet's next start on)"
        ) from None
    except PermissionError as error:
        raise CliError(f"keys are not put there, because {error.strerror or error}") from None
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise CliError(f"cannot write {path} ({reason}): name a directory that you can write to") from None
    print(f"Wrote {path}, readable by you alone. Fingerprint: {fingerprint(secret)}")
    print(f'Name the directory in the fleet file, under [listen]: keys = "{folder}"')
    print("Other hosts of the fleet need a copy of that file, sent over a channel you trust.")
    return 0


def run_show(arguments: argparse.Namespace) -> int:
    """Check a key file and print its fingerprint. Raises CliError where a fleet would refuse it."""
    folder = Path(arguments.folder).expanduser()
    try:
        secret = read_secret(folder)
    except KeysError as error:
        raise CliError(str(error)) from None
    print(f"{folder / KEY_FILE}: {fingerprint(secret)}")
    return 0


def _create(path: Path, text: str) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w") as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(text)


def _replace(path: Path, text: str) -> None:
    """Put a file in place as a whole: nobody reads half a key, and no other name leads to the new one."""
    fd, part = tempfile.mkstemp(dir=path.parent, prefix=".")
    try:
        with os.fdopen(fd, "w") as file:
            os.fchmod(fd, 0o600)
            file.write(text)
        os.replace(part, path)
    except OSError:
        os.unlink(part)
        raise


def _keep_out_of_git(folder: Path) -> None:
    try:
        _create(folder / ".gitignore", "*\n")
    except FileExistsError:
        pass
