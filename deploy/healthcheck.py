"""The image's HEALTHCHECK: exits 0 if the server in this container answers /healthz."""

import os
import sys
from urllib.error import URLError
from urllib.request import ProxyHandler, build_opener


def port() -> str:
    """VBLORA_PORT, unless it is the address that Kubernetes gives a Service called `vblora`."""
    given = os.environ.get("VBLORA_PORT", "")
    return given if given.isdecimal() else "8000"


def main() -> int:
    url = f"http://127.0.0.1:{port()}/healthz"
    direct = build_opener(ProxyHandler({}))  # http_proxy is meant for the outside
    try:
        with direct.open(url, timeout=4) as answer:
            print(f"{url}: {answer.status}")
    except (URLError, OSError) as error:
        print(f"{url}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
