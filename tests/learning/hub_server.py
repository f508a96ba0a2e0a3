"""A model Hub of one process: the few addresses that the real client asks when it pushes and pulls small files."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub:
    """Repositories in memory: name -> {"private", "files": path -> bytes, "commits": messages}."""

    def __init__(self):
        self.repositories = {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def answer(self, value, status=200, **headers):
                data = value if isinstance(value, bytes) else json.dumps(value).encode()
                self.send_response(status)
                for name, text in headers.items():
                    self.send_header(name.replace("_", "-"), text)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

            def body(self):
                if self.headers.get("Transfer-Encoding") != "chunked":
                    return self.rfile.read(int(self.headers.get("Content-Length") or 0))
                parts = []
                while size := int(self.rfile.readline(), 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)

            def do_POST(self):
                body, path = self.body(), self.path.partition("?")[0]
                if path == "/api/repos/create":
                    asked = json.loads(body)
                    name = f"{asked.get('organization') or 'me'}/{asked['name']}"
                    private = asked.get("private") or asked.get("visibility") == "private"
                    new = {"private": private, "files": {".gitattributes": b""}, "commits": []}
                    status = 409 if name in hub.repositories else 200
                    hub.repositories.setdefault(name, new)
                    self.answer({"url": f"{hub.url}/{name}", "id": name, "name": name}, status)
                elif path == "/api/validate-yaml":
                    assert json.loads(body)["content"].startswith("---\n")
                    self.answer({"errors": [], "warnings": []})
                elif path.endswith("/preupload/main"):
                    files = [file["path"] for file in json.loads(body)["files"]]
                    modes = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in files]
                    self.answer({"files": modes})
                elif path.endswith("/commit/main"):
                    name = path.removeprefix("/api/models/").removesuffix("/commit/main")
                    self.answer({"success": True, **hub.commit(name, body)})
                else:
                    self.answer({"error": f"unknown address {path}"}, 404)

            def do_GET(self):
                path = self.path.partition("?")[0]
                if path.startswith("/api/models/"):
                    name = path.removeprefix("/api/models/")
                    if name not in hub.repositories:
                        self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
                        return
                    repository = hub.repositories[name]
                    siblings = [{"rfilename": file, "size": len(data)} for file, data in repository["files"].items()]
                    facts = {"sha": hub.sha(name), "private": repository["private"], "siblings": siblings}
                    self.answer({"id": name, **facts})
                    return
                name, _, rest = path[1:].partition("/resolve/")
                revision, _, file = rest.partition("/")
                data = hub.repositories.get(name, {"files": {}})["files"].get(file)
                if data is None:
                    self.answer({"error": f"unknown address {path}"}, 404)
                    return
                etag = f'"{hashlib.sha1(data).hexdigest()}"'
                self.answer(data, ETag=etag, X_Repo_Commit=revision)

            do_HEAD = do_GET

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    def sha(self, name):
        return hashlib.sha1(f"{name}{len(self.repositories[name]['commits'])}".encode()).hexdigest()

    def commit(self, name, body):
        repository = self.repositories[name]
        for line in map(json.loads, body.decode().splitlines()):
            value = line["value"]
            if line["key"] == "header":
                assert value.get("parentCommit") in (None, self.sha(name))
                repository["commits"].append(value["summary"])
            elif line["key"] == "file":
                repository["files"][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del repository["files"][value["path"]]
        return {"commitUrl": f"{self.url}/{name}/commit/{self.sha(name)}", "commitOid": self.sha(name)}

    def close(self):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()
