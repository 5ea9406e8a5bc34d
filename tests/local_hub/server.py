"""The transport: HTTP/1.1 on a loopback port, with faults, and a log entry for each request."""

import re
import threading
import time
import traceback
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

from tests.local_hub.faults import Fault, LoggedRequest
from tests.local_hub.messages import Answer, Body, HubError, Request, error_answer

Route = tuple[str, re.Pattern, Callable[..., Answer]]


class HubServer(ThreadingHTTPServer):
    """One origin: its routes, its log, its thread."""

    daemon_threads = True
    block_on_close = False  # clients keep connections open
    request_queue_size = 128

    def __init__(self, hub, routes: list[Route], no_route: Callable[..., Answer], log: list, port: int = 0):
        super().__init__(("127.0.0.1", port), HubRequestHandler)
        self.hub = hub
        self.routes = routes
        self.no_route = no_route
        self.log = log
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    def handle_error(self, request, client_address) -> None:
        """Do nothing: clients that disconnect are part of the tests."""

    def stop(self) -> None:
        self.shutdown()
        self.thread.join()
        self.server_close()


class HubRequestHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: HubServer

    def answer_request(self) -> None:
        """Apply a fault or do the work; log; answer."""
        path, _, query = self.path.partition("?")
        headers = {name.lower(): value for name, value in self.headers.items()}
        body = Body(self.rfile, int(headers.get("content-length", 0)))
        request = Request(self.command, path, query, headers, body)
        num_resets = self.server.hub.num_resets
        fault = self.server.hub.faults.strike(request.method, path)
        try:
            answer = self._find_answer(request, fault)
            body.drain()  # an error may have occurred before it was read
        except ConnectionError:
            answer = None
        if self.server.hub.num_resets != num_resets:  # from a client that was killed in an earlier test
            self.close_connection = True
            return
        # Logged before it is sent: a test may look as soon as its client is done.
        self._log(request, answer, fault)
        if answer is None or (fault is not None and fault.kind == "lost_answer"):
            self.close_connection = True
        else:
            self._send(answer, truncate=fault is not None and fault.kind == "truncate")

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer_request

    def _find_answer(self, request: Request, fault: Fault | None) -> Answer | None:
        if "transfer-encoding" in request.headers:
            self.close_connection = True
            return error_answer(HubError(411, "the local Hub needs a Content-Length"))
        if fault is not None and fault.kind == "drop":
            request.body.drain()  # closing with unread data would cause a reset
            return None
        if fault is not None and fault.kind == "status":
            retry_after = {} if fault.retry_after is None else {"Retry-After": str(fault.retry_after)}
            return error_answer(HubError(fault.status, f"injected fault {fault.status}", headers=retry_after))
        if fault is not None and fault.kind == "delay":
            time.sleep(fault.seconds)
        if fault is not None and fault.kind == "hold":
            fault.released.wait()
        try:
            return self._do_work(request)
        except HubError as error:
            return error_answer(error)
        except ConnectionError:
            raise
        except Exception:  # any exception of the server: the fixture fails the test because of `failures`
            self.server.hub.failures.append(f"{request.method} {request.path}\n{traceback.format_exc()}")
            return error_answer(HubError(500, "the local Hub has a bug, see hub.failures"))

    def _do_work(self, request: Request) -> Answer:
        method = "GET" if request.method == "HEAD" else request.method
        for route_method, pattern, function in self.server.routes:
            match = pattern.fullmatch(request.path)
            if route_method == method and match:
                groups = [None if group is None else unquote(group) for group in match.groups()]
                return function(self.server.hub, request, *groups)
        return self.server.no_route(self.server.hub, request)

    def _send(self, answer: Answer, truncate: bool) -> None:
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body[: len(answer.body) // 2] if truncate else answer.body)
        if truncate:
            self.close_connection = True

    def _log(self, request: Request, answer: Answer | None, fault: Fault | None) -> None:
        status, kind = answer and answer.status, fault and fault.kind
        num_bytes_in = request.body.num_bytes - request.body.num_bytes_left
        what = request.method, request.path, request.query, request.token
        self.server.log.append(LoggedRequest(*what, status, kind, num_bytes_in, request.headers))

    def log_message(self, format, *args) -> None:
        """Do nothing: `hub.log` has it."""
