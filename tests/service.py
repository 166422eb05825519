"""A local web service for the tests: it serves ranges, cuts connections, refuses, redirects, and remembers what it was asked."""

import hashlib
import http.server
import json
import re
import threading
import time


class Service:
    """`pages`: path -> bytes. `plans`: path -> what its next answers do instead of delivering all: ("cut", bytes sent),
    ("some", bytes promised and sent), ("status", code, headers), ("to", address), ("wait", seconds). `ranges`, `if_range`: whether
    it honours Range and If-Range. `asked`: (path, headers) of each request."""

    def __init__(self):
        self.pages, self.plans, self.asked, self.ranges, self.if_range = {}, {}, [], True, True

    def __enter__(self):
        service = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                service.answer(self)

            def do_POST(self):
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                service.answer(self)

            def log_message(self, *_):
                pass

        self.httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.httpd.handle_error = lambda *_: None
        threading.Thread(target=self.httpd.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.httpd.server_port}"
        return self

    def __exit__(self, *_):
        self.httpd.shutdown()
        self.httpd.server_close()

    def answer(self, to):
        path = to.path.split("?")[0]
        self.asked.append((path, {name.lower(): value for name, value in to.headers.items()}))
        plan = self.plans.get(path, [])
        kind, *details = plan.pop(0) if plan else ("all",)
        if kind == "wait":
            time.sleep(details[0])
        if kind == "to":
            return send(to, 302, {"Location": details[0]})
        if kind == "status":
            return send(to, details[0], details[1] if len(details) > 1 else {}, b'{"message": "Bad key PLANTED-SECRET"}')
        if path not in self.pages:
            return send(to, 404, {})
        body = self.pages[path]
        tag = f'"{hashlib.md5(body).hexdigest()}"'
        start = re.fullmatch(r"bytes=(\d+)-", to.headers.get("Range", ""))
        headers, code, sent = {"ETag": tag, "Content-Length": len(body)}, 200, body
        if start and self.ranges and (to.headers.get("If-Range", tag) == tag or not self.if_range):
            first = int(start[1])
            if first >= len(body):
                return send(to, 416, {"Content-Range": f"bytes */{len(body)}"})
            code, sent = 206, body[first:first + details[0]] if kind == "some" else body[first:]
            headers |= {"Content-Length": len(sent), "Content-Range": f"bytes {first}-{first + len(sent) - 1}/{len(body)}"}
        send(to, code, headers, sent[:details[0]] if kind == "cut" else sent)

    def times(self, path):
        """How often `path` was asked for, and the Range of each."""
        return [headers.get("range") for asked, headers in self.asked if asked == path]

    def dataset(self, restricted=False, checksum="MD5", **files):
        """Lists {folder/name: content} as a Dataverse dataset does."""
        listing = []
        for number, (name, content) in enumerate(files.items()):
            label, _, file = name.rpartition("/")
            self.pages[f"/api/access/datafile/{number}"] = content
            digest = hashlib.new(checksum.replace("-", "").lower(), content).hexdigest()
            sums = {"md5": digest} if checksum == "MD5" else {"checksum": {"type": checksum, "value": digest}}
            listing.append({"directoryLabel": label, "label": file, "restricted": restricted,
                            "dataFile": {"id": number, "filesize": len(content), **sums}})
        self.pages["/api/datasets/:persistentId/"] = json.dumps({"data": {"latestVersion": {"files": listing}}}).encode()


def send(to, code, headers, body=b""):
    to.send_response(code)
    for name, value in headers.items():
        to.send_header(name, str(value))
    to.end_headers()
    to.wfile.write(body)
