"""The daemon's API from Python's standard library: HTTP over its unix socket."""
import http.client, socket


class Api(http.client.HTTPConnection):
    def __init__(self, path, timeout):
        super().__init__("spillway", timeout=timeout)
        self.path = path

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self.path))
