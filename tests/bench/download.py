"""Speed and memory of `fetch` for one large file from a local server, compared with curl and a plain loop.

Each runs in a process of its own against the same server, which sends from memory. `fetch` also computes the
sha256, flushes to disk and renames; the plain loop (urllib, blocks of 1 MiB) and curl only write.

    PYTHONPATH=pretrain python tests/bench/download.py --megabytes 1000
"""

import argparse
import http.server
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time

FETCH = """
import sys, time
from pathlib import Path
from recipe.corpus.fetch import fetch
started = time.perf_counter()
fetch(sys.argv[1], Path(sys.argv[2]))
"""
LOOP = """
import sys, time, urllib.request
started = time.perf_counter()
with urllib.request.urlopen(sys.argv[1]) as response, open(sys.argv[2], "wb") as out:
    while block := response.read(1 << 20):
        out.write(block)
"""
REPORT = """
import resource
print(time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""
PIECE = os.urandom(1 << 20)


class Handler(http.server.BaseHTTPRequestHandler):
    """Sends the same random MiB again and again."""

    def log_message(self, *arguments):
        """Print nothing."""

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", str(self.server.megabytes << 20))
        self.end_headers()
        for _ in range(self.server.megabytes):
            self.wfile.write(PIECE)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=1000)
    megabytes = parser.parse_args().megabytes
    os.environ["no_proxy"] = "127.0.0.1"
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.megabytes = megabytes
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/x"
        rows = {}
        with tempfile.TemporaryDirectory() as folder:
            for name, code in (("urllib loop", LOOP), ("fetch", FETCH)):
                command = [sys.executable, "-c", code + REPORT, url, f"{folder}/x"]
                output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                rows[name] = [float(value) for value in output.split()]
                os.remove(f"{folder}/x")
            if shutil.which("curl"):
                started = time.perf_counter()
                subprocess.run(["curl", "-s", "-o", f"{folder}/x", url], check=True)
                rows["curl"] = [time.perf_counter() - started, float("nan")]
        server.shutdown()
    print("| | MiB/s | of the loop | peak MiB |\n|---|---|---|---|")
    for name, (seconds, peak) in rows.items():
        ratio = rows["urllib loop"][0] / seconds
        print(f"| {name} | {megabytes / seconds:,.0f} | {ratio:.2f} | {peak:,.0f} |")


if __name__ == "__main__":
    main()
