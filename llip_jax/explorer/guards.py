"""Which requests the explorer answers: those of its own page, and uploads of one picture each."""

import socket
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llip_jax.explorer.content import UPLOAD

MOST_BODY = UPLOAD.image_bytes + 2**16
"""Bytes of a request: a picture and the names around it."""
MOST_KEPT = 4 * UPLOAD.image_bytes
"""Bytes of all uploads that lie in the folder: an upload goes once it has been read, others after minutes."""


def guards(host: str, folder: Path) -> list[Middleware]:
    """What stands before the page.

    Args:
        host: name or address that is listened on.
        folder: of the uploads.
    """
    return [
        Middleware(TrustedHostMiddleware, allowed_hosts=host_names(host), www_redirect=False),
        Middleware(OwnRequests, folder=folder),
    ]


def host_names(host: str) -> list[str]:
    """The names by which the page may be asked for.

    Any other one may be a foreign site's that was made to resolve to this machine, so that its scripts can read here
    (DNS rebinding).
    """
    names = ["127.0.0.1", "localhost", host.lower()]
    if host == "0.0.0.0":
        names.append(socket.gethostname().lower())
        with suppress(OSError):
            names += socket.gethostbyname_ex(socket.gethostname())[2]
    return list(dict.fromkeys(names))


class OwnRequests:
    """Refuses requests of other sites' pages, and bodies that are no upload of one picture."""

    def __init__(self, app: ASGIApp, folder: Path):
        self.app, self.folder = app, folder

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request (ASGI)."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = Request(scope, receive)
        try:
            self._check_headers(request)
            if request.headers.get("content-type", "").startswith("multipart/"):
                receive = await self._one_file(request)
        except HTTPException as error:
            await PlainTextResponse(error.detail, error.status_code)(scope, receive, send)
        except ClientDisconnect:
            pass
        else:
            await self.app(scope, receive, send)

    def _check_headers(self, request: Request) -> None:
        origin = request.headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
            raise HTTPException(403, "Requests of other sites are refused.")
        length = request.headers.get("content-length", "0")
        if "transfer-encoding" in request.headers or not length.isdecimal():
            raise HTTPException(411, "The length of a body must be said beforehand.")
        if int(length) > MOST_BODY:
            raise HTTPException(413, f"{int(length):,} bytes are too many, expected at most {MOST_BODY:,}.")

    async def _one_file(self, request: Request) -> Receive:
        """The body once more, which was found to be an upload of one file."""
        if not request.url.path.endswith("/upload"):
            raise HTTPException(404, "Nothing is uploaded here.")
        body = await request.body()
        async with request.form(max_files=1, max_fields=0):
            pass
        if self._kept() + len(body) > MOST_KEPT:
            raise HTTPException(507, "Too many uploads at once; try again in some minutes.")
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> Message:
            return messages.pop() if messages else await request.receive()

        return again

    def _kept(self) -> int:
        total = 0
        for path in self.folder.rglob("*"):
            with suppress(FileNotFoundError):  # read, and so removed, in between
                total += path.stat().st_size if path.is_file() else 0
        return total
