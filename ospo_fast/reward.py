"""A reward over HTTP: an image and questions → the score of the answers of a model, for online trainers."""

from __future__ import annotations

import base64
import contextlib
import hmac
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ospo_fast.config import Config
from ospo_fast.errors import OspoError, UsageError
from ospo_fast.evaluation.questions import Question, check_answer, check_question, soft_tifa
from ospo_fast.files import decode_image, read_bytes, reading, reason
from ospo_fast.records import parse_json

if TYPE_CHECKING:
    from ospo_fast.evaluation.judges import Judge

logger = logging.getLogger(__name__)

TOKEN = "OSPO_FAST_TOKEN"
MAX_REQUEST = 2**25  # bytes; an image of base64 is a third larger than its file
MAX_QUESTIONS = 256  # of a request
MAX_CONNECTIONS = 64  # at once
SECONDS = 30.0  # that a request may take to arrive


def read_token(path: Path | None) -> str:
    """Return the token that clients must send, from a file or from OSPO_FAST_TOKEN. Raises UsageError without one."""
    where = f"the variable {TOKEN}" if path is None else str(path)
    try:
        token = os.environ.get(TOKEN, "") if path is None else read_bytes(path, 4096).decode().strip()
    except (OSError, ValueError) as error:
        raise UsageError(f"--token-file: cannot read {path}: {reason(error)}; write a token into the file.") from error
    if not token:
        raise UsageError(f"reward: there is no token; set {TOKEN}, or name a file with --token-file.")
    if not (token.isascii() and token.isprintable()) or " " in token or len(token) < 16:
        raise UsageError(
            f"reward: the token of {where} should have 16 or more printable ASCII characters without spaces, such as "
            "those of `openssl rand -hex 32`."
        )
    return token


def check_address(host: str, port: int) -> None:
    """Raise UsageError for an address that no server can have."""
    if not 0 <= port < 2**16:
        raise UsageError(f"--port should be 0 to 65535, got {str(port)[:40]}.")
    if not host.isascii() or any(char.isspace() for char in host):
        raise UsageError(f"--host: got {host[:60]!r}, expected an IPv4 address or a host name.")


class Server(ThreadingHTTPServer):
    """Answers POST /score and GET /health. Requests that need the model are answered one after another."""

    daemon_threads = True  # a client that sends slowly does not keep the process
    request_queue_size = MAX_CONNECTIONS

    def __init__(self, address: tuple[str, int], judge: Judge, token: str) -> None:
        self.judge, self.token, self.model_lock = judge, token.encode(), threading.Lock()
        self._places = threading.BoundedSemaphore(MAX_CONNECTIONS)
        super().__init__(address, _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer a request in a thread of its own, as soon as one of MAX_CONNECTIONS is free."""
        self._places.acquire()
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer a request."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log that a connection broke, where the standard library prints a traceback."""
        logger.info("the connection of %s broke", client_address)

    def score(self, data: bytes) -> dict[str, Any]:
        """Answer a request. Raises OspoError if it is wrong, or the judge fails."""
        image, questions = parse_request(data)
        with self.model_lock:
            self.judge.check(questions)
            verdicts = self.judge.answer([image], [questions])[0]
        am, gm = soft_tifa([min(1.0, verdict["p_expected"]) for verdict in verdicts])
        return {
            "score": sum(verdict["p_yes"] - verdict["p_no"] for verdict in verdicts) / len(verdicts),
            "p_yes": [verdict["p_yes"] for verdict in verdicts],
            "p_no": [verdict["p_no"] for verdict in verdicts],
            "soft_tifa": {"am": am, "gm": gm},
        }


def parse_request(data: bytes) -> tuple[Any, list[Question]]:
    """Return the image and the questions of the body of a request. Raises UsageError for a wrong one."""
    try:
        body = parse_json(data)
    except ValueError as error:
        raise UsageError(f"The body is no JSON ({reason(error)}); send an object.") from error
    if not isinstance(body, dict):
        raise UsageError(f"The body is a JSON {type(body).__name__}, expected an object; see the documentation.")
    if unknown := body.keys() - {"image", "questions", "answers"}:
        raise UsageError(f"The body has {min(unknown)[:60]!r}, expected image, questions and answers; delete it.")
    asked, answers, encoded = body.get("questions"), body.get("answers"), body.get("image")
    if not isinstance(asked, list) or not 0 < len(asked) <= MAX_QUESTIONS:
        raise UsageError(f"questions: expected a list of 1 to {MAX_QUESTIONS} texts; correct it.")
    if answers is None:
        answers = ["yes"] * len(asked)
    if not isinstance(answers, list) or len(answers) != len(asked):
        raise UsageError(f"answers: expected a list of {len(asked)} words, one for each question; correct it.")
    questions = [Question(check_question(q), check_answer(a)) for q, a in zip(asked, answers, strict=True)]
    if not isinstance(encoded, str):
        raise UsageError("image: expected the base64 of one PNG, JPEG or WEBP image; add it.")
    with reading("image", Path("of the request"), "send the base64 of one PNG, JPEG or WEBP image"):
        return decode_image(base64.b64decode(encoded, validate=True)), questions


class _Handler(BaseHTTPRequestHandler):
    server: Server
    timeout = SECONDS
    server_version, sys_version = "ospo-fast", ""

    def setup(self) -> None:
        """Give the client SECONDS to send its whole request: `timeout` alone is that of each part of it."""
        super().setup()
        self._deadline = threading.Timer(SECONDS, self._disconnect)
        self._deadline.daemon = True
        self._deadline.start()

    def _disconnect(self) -> None:
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RD)  # only reading ends: the answer says what was missing

    def finish(self) -> None:
        """End a connection."""
        self._deadline.cancel()
        super().finish()

    def do_GET(self) -> None:
        self._deadline.cancel()
        known = self.path == "/health"
        self._reply(200 if known else 404, {"status": "ok"} if known else _error("Only /score and /health exist."))

    def do_POST(self) -> None:
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        known = hmac.compare_digest(token.strip().encode(), self.server.token) and scheme.lower() == "bearer"
        # Read in any case: a client that is still sending does not see an answer.
        status, data = self._read(keep=known)
        self._deadline.cancel()
        if not known:
            self._reply(401, _error("The token is missing or wrong; send the header Authorization: Bearer TOKEN."))
        elif self.path != "/score":
            self._reply(404, _error("Only /score and /health exist."))
        elif status:
            self._reply(status, _error(data.decode()))
        else:
            self._score(data)

    def _score(self, data: bytes) -> None:
        try:
            self._reply(200, self.server.score(data))
        except OspoError as error:
            self._reply(400, _error(f"{str(error).rstrip('.')}."))
        except Exception:
            logger.exception("a request failed")
            self._reply(500, _error("The model failed; the log of the server says why."))

    def _read(self, *, keep: bool) -> tuple[int, bytes]:
        """Return 0 and the body, which is empty unless it is kept, or a status and a sentence."""
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdecimal() and len(length) < 20):
            return 411, b"The header Content-Length is missing or no number; send it."
        keep = keep and int(length) <= MAX_REQUEST
        parts, missing, end = [], int(length), time.monotonic() + SECONDS
        while missing and time.monotonic() < end:
            part = self.rfile.read1(min(missing, 2**16))
            if not part:
                break
            if keep:
                parts.append(part)
            missing -= len(part)
        if int(length) > MAX_REQUEST:
            return 413, f"The body has {length} bytes, expected at most {MAX_REQUEST}; send a smaller image.".encode()
        if missing:
            return 400, b"The body is shorter than Content-Length says; send all of it."
        return 0, b"".join(parts)

    def _reply(self, status: int, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if status == 401:
            self.send_header("WWW-Authenticate", "Bearer")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer a request that is no GET or POST, or no HTTP, in the form of the other answers."""
        self._reply(code, _error(f"{message or explain or 'The request is no HTTP'}; send GET /health or POST /score."))

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (the name of the base class)
        logger.info("%s: %s", self.address_string(), format % args)


def _error(sentence: str) -> dict[str, str]:
    return {"error": sentence}


def serve(config: Config, host: str, port: int, token: str, *, announce: Callable[[str], object]) -> int:
    """Load the model and answer requests until a signal ends the process. Returns the exit code 0.

    Raises OspoError if the address cannot be used, or the model cannot be loaded.
    """
    from ospo_fast.evaluation.judges import open_judge

    judge = open_judge(config.model, config, "model")
    try:
        server = Server((host, port), judge, token)
    except OSError as error:
        raise OspoError(
            f"reward: cannot listen at {host}:{port} ({error.strerror or error}); choose another --host or --port."
        ) from error
    with server, contextlib.suppress(KeyboardInterrupt):
        announce(f"listening at http://{host}:{server.server_port}, model {config.model}; stop with Ctrl-C")
        server.serve_forever()
    server.model_lock.acquire()  # an answer that is being computed ends before the process does
    return 0
