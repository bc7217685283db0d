"""The reward over HTTP: scores as those of the package, and requests that are refused."""

import base64
import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from PIL import Image

from ospo_fast import reward
from ospo_fast.config import load_config
from ospo_fast.errors import OspoError, UsageError
from ospo_fast.evaluation.judges import open_judge
from ospo_fast.generation import answer_questions
from ospo_fast.models import load_model
from ospo_fast.stages.templates import load_templates

pytestmark = pytest.mark.usefixtures("omegaconf")

TOKEN = "0123456789abcdef"
ROOT = Path(__file__).resolve().parents[1]


def encoded(color="red", kind="PNG", size=(48, 48)):
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, kind)
    return base64.b64encode(buffer.getvalue()).decode()


BODY = {"image": encoded(), "questions": ["is there a red circle?", "is there a blue square?"]}


@pytest.fixture(scope="module")
def server(tiny):
    with reward.Server(("127.0.0.1", 0), open_judge(str(tiny), load_config([])), TOKEN) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def ask(server, body=None, *, method="POST", path="/score", token=TOKEN, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    if token is not None:
        headers["Authorization"] = f"Bearer {token}"
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    connection.request(method, path, data, {name.replace("_", "-"): value for name, value in headers.items()})
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def test_a_score_is_the_local_score_of_the_stages(server, tiny):
    status, found = ask(server, {**BODY, "answers": ["yes", "no"]})
    assert status == 200
    model, templates = load_model(tiny), load_templates("shapes")
    (answers,) = answer_questions(
        model, [Image.new("RGB", (48, 48), "red")], [BODY["questions"]],
        template=lambda question: templates.messages("vqa", question=question),
    )  # fmt: skip
    yes, no = [answer["p_yes"] for answer in answers], [answer["p_no"] for answer in answers]
    assert found == {
        "score": pytest.approx((yes[0] - no[0] + yes[1] - no[1]) / 2),
        "p_yes": pytest.approx(yes),
        "p_no": pytest.approx(no),
        "soft_tifa": {"am": pytest.approx((yes[0] + no[1]) / 2), "gm": pytest.approx((yes[0] * no[1]) ** 0.5)},
    }
    assert ask(server, BODY)[1]["soft_tifa"]["am"] == pytest.approx(sum(yes) / 2)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_other_formats(server, kind):
    assert ask(server, {**BODY, "image": encoded(kind=kind)})[0] == 200


def test_requests_at_once_have_the_answers_of_single_ones(server):
    bodies = [{**BODY, "image": encoded(color)} for color in ("red", "blue", "green", "black")]
    alone = [ask(server, body) for body in bodies]
    found = {}
    threads = [threading.Thread(target=lambda n=n: found.update({n: ask(server, bodies[n])})) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[n] for n in range(4)] == alone
    assert len({answer["score"] for _, answer in alone}) > 1


def test_health_needs_no_token(server):
    assert ask(server, method="GET", path="/health", token=None) == (200, {"status": "ok"})


@pytest.mark.parametrize("token", [None, "", "0123456789abcdee", "0123456789abcdef0", "é"])
def test_a_wrong_token_is_refused(server, token):
    status, found = ask(server, BODY, token=token)
    assert (status, found["error"][:33]) == (401, "The token is missing or wrong; se")


def test_another_scheme_is_refused(server):
    assert ask(server, BODY, token=None, Authorization=f"Basic {TOKEN}")[0] == 401


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/"), ("GET", "/score"), ("POST", "/health"), ("POST", "/../score")]
)
def test_unknown_paths(server, method, path):
    assert ask(server, BODY, method=method, path=path)[0] == 404


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"{", "The body is no JSON"),
        (b"", "The body is no JSON"),
        (b"\xff", "The body is no JSON"),
        (b"[" * 5000, "The body is no JSON"),
        ([], "The body is a JSON list, expected an object"),
        ({**BODY, "model": "x"}, "The body has 'model', expected image, questions and answers"),
        ({"image": BODY["image"]}, "questions: expected a list of 1 to 256 texts"),
        ({**BODY, "questions": []}, "questions: expected a list of 1 to 256 texts"),
        ({**BODY, "questions": ["is there a circle?"] * 257}, "questions: expected a list of 1 to 256 texts"),
        ({**BODY, "questions": "is there a circle?"}, "questions: expected a list"),
        ({**BODY, "questions": [1]}, "questions: got int, expected a text"),
        ({**BODY, "questions": [" "]}, "questions: got one of 0 characters"),
        ({**BODY, "questions": ["is there a zebra?"]}, "holds words that"),
        ({**BODY, "answers": ["yes"]}, "answers: expected a list of 2 words, one for each question"),
        ({**BODY, "answers": ["yes", 2]}, "answers: got int"),
        ({**BODY, "answers": ["yes", "two words"]}, "answers: got 'two words', expected one word"),
        ({"questions": BODY["questions"]}, "image: expected the base64 of one PNG, JPEG or WEBP image"),
        ({**BODY, "image": "@@@"}, "Cannot read the image of the request"),
        ({**BODY, "image": base64.b64encode(b"no image").decode()}, "it is none of PNG, JPEG, WEBP"),
        ({**BODY, "image": encoded(kind="GIF")}, "it is none of PNG, JPEG, WEBP"),
        ({**BODY, "image": encoded(size=(2**14 + 1, 1))}, "pixels, expected 1 to"),
    ],
)
def test_wrong_requests_are_400_with_a_sentence(server, body, words):
    status, found = ask(server, body)
    assert status == 400
    assert words in found["error"]
    assert found["error"].endswith(".")


def test_limits_of_requests(server, monkeypatch):
    monkeypatch.setattr(reward, "MAX_REQUEST", 100)
    status, found = ask(server, BODY)
    assert (status, found["error"][-50:]) == (413, "bytes, expected at most 100; send a smaller image.")
    # One that no buffer of the connection holds is read to its end: a client that still sends sees no answer.
    assert ask(server, b"x" * 2**25)[0] == 413
    for length in ("-1", "x", "9" * 5000):
        assert ask(server, b"", Content_Length=length)[0] == 411


@pytest.mark.parametrize("method", ["PUT", "DELETE", "OPTIONS"])
def test_other_methods_are_refused_in_the_form_of_the_answers(server, method):
    status, found = ask(server, method=method)
    assert status == 501
    assert found["error"].endswith("; send GET /health or POST /score.")
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    connection.request("HEAD", "/score")
    assert connection.getresponse().read() == b""


def test_a_body_that_does_not_arrive(server, monkeypatch):
    monkeypatch.setattr(reward, "SECONDS", 0.2)
    with socket.create_connection(("127.0.0.1", server.server_port)) as client:
        head = f"POST /score HTTP/1.0\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: 9\r\n\r\n"
        client.sendall(head.encode() + b"{")
        client.shutdown(socket.SHUT_WR)
        assert b" 400 " in client.recv(1000)
    assert ask(server, BODY)[0] == 200


def test_a_request_that_arrives_byte_by_byte_has_an_end(server, monkeypatch):
    monkeypatch.setattr(reward, "SECONDS", 0.3)
    start = time.monotonic()

    def ends_at_a_byte():
        try:
            client.sendall(b"x")
            return not client.recv(1000)
        except TimeoutError:
            return False
        except OSError:
            return True

    with socket.create_connection(("127.0.0.1", server.server_port)) as client:
        client.settimeout(0.05)
        while not (ended := ends_at_a_byte()) and time.monotonic() < start + 10:
            pass
    assert ended
    assert ask(server, BODY)[0] == 200


def test_an_error_of_the_model_is_500_and_logged(server, monkeypatch, caplog):
    def fail(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr(server.judge, "answer", fail)
    assert ask(server, BODY) == (500, {"error": "The model failed; the log of the server says why."})
    assert "a request failed" in caplog.text
    assert TOKEN not in caplog.text


def test_tokens(tmp_path, monkeypatch):
    path = tmp_path / "token"
    path.write_text(f"{TOKEN}\n")
    assert reward.read_token(path) == TOKEN
    monkeypatch.setenv("OSPO_FAST_TOKEN", TOKEN[::-1])
    assert reward.read_token(None) == TOKEN[::-1]
    assert reward.read_token(path) == TOKEN
    monkeypatch.delenv("OSPO_FAST_TOKEN")
    with pytest.raises(UsageError, match="there is no token; set OSPO_FAST_TOKEN"):
        reward.read_token(None)
    for content in ("short", "sixteen characters with spaces", "ü" * 20, "x" * 5000):
        path.write_text(content)
        with pytest.raises(UsageError, match=r"16 or more printable ASCII|expected 1 to 4096"):
            reward.read_token(path)


def test_an_address_in_use(server, tiny):
    config = load_config([f"model={tiny}"])
    with pytest.raises(OspoError, match=f"cannot listen at 127.0.0.1:{server.server_port} .*; choose another --host"):
        reward.serve(config, "127.0.0.1", server.server_port, TOKEN, announce=print)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_server_with_success(tiny, number):
    command = [sys.executable, "-m", "ospo_fast", "reward", "--model", str(tiny), "--port", "0"]
    environment = os.environ | {"OSPO_FAST_TOKEN": TOKEN, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        line = process.stdout.readline()
        assert line.startswith("listening at http://127.0.0.1:"), process.stderr.read()
        port = int(line.split(":")[2].split(",")[0])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        connection.request("POST", "/score", json.dumps(BODY), {"Authorization": f"Bearer {TOKEN}"})
        assert connection.getresponse().status == 200
        with socket.create_connection(("127.0.0.1", port)):  # a client that sends nothing
            time.sleep(0.1)
            process.send_signal(number)
            assert process.wait(timeout=20) == 0
        assert process.stderr.read() == ""
