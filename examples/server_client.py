"""Send images to a running server (twinspect serve model.twin), and tell it which alarms were false.

python examples/server_client.py shots/*.png
python examples/server_client.py shots/*.png --false-alarm 17
"""

from __future__ import annotations

import argparse
import json
import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any


def ask(address: str, method: str, body: bytes, kind: str) -> Any:
    """One request; the key, if the server wants one, comes from TWINSPECT_API_KEY."""
    headers = {"Content-Type": kind}
    if key := os.environ.get("TWINSPECT_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(address, body, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        raise SystemExit(f"{error.code}: {json.load(error)['error']['message']}") from None
    except urllib.error.URLError as error:
        raise SystemExit(f"no server at {address} ({error.reason}); start one: twinspect serve model.twin") from None


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", type=Path)
    parser.add_argument("--server", default="http://127.0.0.1:8000")
    parser.add_argument("--false-alarm", type=int, nargs="*", default=[], help="numbers of log rows that were good")
    given = parser.parse_args()

    for path in given.images:
        # The server reads the kind of an image from its content, whatever it is called.
        answer = ask(f"{given.server}/v1/predict", "POST", path.read_bytes(), "image/png")
        image = answer["results"][0]
        print(f"{path.name}: {image['answer']}, score {image['score']:.2f}, row {image['log_id']}")
    for number in given.false_alarm:
        verdict = json.dumps({"verdict": "false_alarm"}).encode()
        ask(f"{given.server}/v1/log/{number}/feedback", "POST", verdict, "application/json")
        print(f"row {number}: false alarm")


if __name__ == "__main__":
    main()
