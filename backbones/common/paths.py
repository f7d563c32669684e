"""Files and folders behind prefixes (``s3://``, ``https://``, a lab's own), on this machine.

Both adapters take them through iopath's global path manager, which PyTorchVideo reads by as well::

    from iopath.common.file_io import g_pathmgr
    g_pathmgr.register_handler(MyHandler())

Imports iopath late: :mod:`backbones` runs without it.
"""

from __future__ import annotations

from contextlib import suppress
from functools import cache
from typing import Any

from backbones.common.errors import UserError, first_line

_REMEDY = {"s3": "pip install boto3, and give AWS credentials"}


def local_path(path: str, key: str) -> str:
    """Where a file or folder lies on this machine: ``path`` itself, if it has no prefix; what is
    remote is fetched once, and kept by iopath. ``key`` is what the user calls it; a UserError says
    that nothing is registered for the prefix, or that it cannot be had."""
    scheme, separator, rest = path.partition("://")
    if not separator:
        return path
    if scheme == "file":
        return rest
    try:
        found: str = path_manager().get_local_path(path)
    except Exception as error:  # by the kind of prefix, and of failure
        raise UserError(f"{key}={path} cannot be had ({first_line(error)})") from error
    if found == path:
        remedy = _REMEDY.get(scheme, "register one: iopath.common.file_io.g_pathmgr")
        raise UserError(f"{key}={path}: iopath has no handler for {scheme}://; {remedy}")
    return found


@cache
def path_manager() -> Any:
    """iopath's global path manager, which then knows the web too, and S3 where boto3 is there."""
    from iopath.common import file_io, s3

    register(file_io.HTTPURLHandler())
    if s3.boto3 is not None:
        register(s3.S3PathHandler())
    return file_io.g_pathmgr


def register(handler: Any) -> None:
    """Let the path manager use ``handler`` where none is registered for its prefixes: the user's
    own goes first."""
    from iopath.common.file_io import g_pathmgr

    with suppress(KeyError):
        g_pathmgr.register_handler(handler, allow_override=False)
